"""What ensembles of the reward models of augmented_pairs.py do: accuracy, and what probes beat.

    python benchmarks/ensemble_probes.py [--runs runs/pairs] [--pairs 400]
    python benchmarks/ensemble_probes.py --data raw --runs runs/pairs_raw --made "all"

Takes the adapters that augmented_pairs.py has left of ``none`` and of a kind with made pairs
(``empty``), seeds 0 to 2, scores the held-out pairs and all probes by each, in one sweep, and puts
the scores together in sets of one, two, three, four and six. On one thread of an older CPU it takes
half an hour. The ensembles of four are left beside the adapters, as ``four/seed0`` and so on, for
reward_models_in_ppo.py.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from statistics import fmean

import yaml
from augmented_pairs import CHATS, CONFIGS, KINDS

from goose_lora import cli, embedded
from goose_lora.cli.reward_verdict import AdapterModel
from goose_lora.data.rows import load_rows
from goose_lora.evaluation.ensembles import AGGREGATIONS, ScoredMember, align_members, judge_ensemble
from goose_lora.evaluation.reward_model import prepare_held_out
from goose_lora.evaluation.verdict import RewardVerdict
from goose_lora.models.ensembles import Member, RewardEnsemble

ROOT = Path(__file__).resolve().parent.parent
PLAIN = "none"
# Seeds of members without made pairs and of those with: three ensembles, or one
FOUR = "four, two of them with"
SETS = {
    "three seeds without": [((0, 1, 2), ())],
    "three seeds with": [((), (0, 1, 2))],
    "two, one of them with": [(((i + 1) % 3,), (i,)) for i in range(3)],
    FOUR: [(((i + 1) % 3, i), (i, (i + 2) % 3)) for i in range(3)],
    "six, three of them with": [((0, 1, 2), (0, 1, 2))],
}
SHOWN = ("flattering", "gushing", "fawning", "empty", "repeated", "truncated", "other_prompt")


def put_together(runs: Path, models: list[tuple[str, int]], ensemble: RewardEnsemble, folder: Path) -> Path:
    """Copy models into ``folder`` as the members of one, beside what says how they score as one."""
    names = [f"member_{place}" for place in range(len(models))]
    for name, (kind, seed) in zip(names, models, strict=True):
        shutil.copytree(runs / f"seed{seed}" / kind, folder / name, dirs_exist_ok=True)
    ensemble.write_beside(folder / names[0], names)
    return folder / names[0]


def figures(verdict: RewardVerdict) -> list[float]:
    found = verdict.to_dict()
    return [found["accuracy"], *(found["probes"][probe]["beats_chosen"] for probe in SHOWN)]


def line(name: str, rows: list[list[float]]) -> str:
    """A row of the table: means over the ensembles of one set."""
    return f"| {name} | {' | '.join(f'{fmean(values):.3f}' for values in zip(*rows, strict=True))} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=CONFIGS, default=CHATS)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "pairs")
    parser.add_argument("--made", choices=KINDS, default="empty", help="what the members with made pairs saw")
    parser.add_argument("--pairs", type=int, help="take so many of the held-out pairs (default: all)")
    arguments = parser.parse_args()
    cli.quiet_libraries()
    config = yaml.safe_load((CONFIGS[arguments.data] / "reward.yaml").read_text(encoding="utf-8"))
    models = [(kind, seed) for kind in (PLAIN, arguments.made) for seed in range(3)]

    # Every model's scores of the same texts
    runs = arguments.runs.resolve()
    rows = load_rows(embedded.resolve(config["eval_dataset_name"]), max_rows=arguments.pairs)
    unaligned = tuple(Member("", "", 0.0, 1.0, seed) for _, seed in models)
    with tempfile.TemporaryDirectory() as temporary:
        whole = put_together(runs, models, RewardEnsemble("adapters", 1.0, 0.0, unaligned), Path(temporary))
        judged = AdapterModel(str(whole), None, None, None, 32)
        held_out = prepare_held_out(
            rows,
            judged.tokenizer,
            name=config["eval_dataset_name"],
            append_eos=judged.append_eos,
            max_length=config["max_length"],  # as the demo's reward model reads them
            encode=judged.encode,
            probe_prompts=100,
        )
        judged.load(held_out)
        scored = {
            (kind, seed): ScoredMember(
                f"{kind} {seed}", "", seed, kind != PLAIN, False, held_out.split(scores), None
            )
            for (kind, seed), scores in zip(models, judged.scores(held_out.texts()), strict=True)
        }

    # Put together
    print(f"| members | accuracy | {' | '.join(SHOWN)} |\n|{'---|' * (2 + len(SHOWN))}")
    for name, ensembles in SETS.items():
        verdicts = []
        for place, (without, with_made) in enumerate(ensembles):
            members = [(arguments.made, seed) for seed in with_made] + [(PLAIN, seed) for seed in without]
            tested = [scored[member] for member in members]
            aligned = align_members("adapters", tested)
            verdicts.append(judge_ensemble(aligned, tested, held_out))
            if name == FOUR:
                put_together(runs, members, aligned, runs / "four" / f"seed{place}")
        if name.startswith("three"):
            print(line(f"one of {name}", [figures(one) for one in verdicts[0].members.values()]))
        for aggregation in AGGREGATIONS:
            own = [figures(verdict.aggregations[aggregation]) for verdict in verdicts]
            print(line(f"{name}, {aggregation}", own))


if __name__ == "__main__":
    main()
