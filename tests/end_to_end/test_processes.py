"""PPO on two processes is PPO: other prompts on each, equal weights on both, and the step that one
process with all replies would make."""

import os
import subprocess
import sys
import time

import pytest
import tiny
import tiny_runs
import torch
from ranks import free_port, on_ranks
from recipe_runs import ROOT, options, recipe
from safetensors.torch import load_file

from goose_lora.files import read_json, read_jsonl
from goose_lora.generation.rollout import Rollout
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.collector import RolloutCollector
from goose_lora.ppo.first_step_checks import FirstStepChecks
from goose_lora.ppo.sampler import RolloutBatches
from goose_lora.training import checkpoints


def weights(shared):
    return {name: p.detach().clone() for name, p in tiny_runs.trained_parameters(shared).items()}


def note_rollouts(seen):
    """Prompts and replies of each rollout into ``seen``."""
    generate = RolloutCollector.generate

    def noting(self, *args, **kwargs):
        rollout = generate(self, *args, **kwargs)
        seen.append((rollout.prompt_ids(), rollout.response_ids()))
        return rollout

    return noting


def canned(self, input_ids, attention_mask, **how):
    """Replies that follow from the prompts alone, so that one process and two have the same; some
    are written more than once."""
    kind = input_ids[:, -1:] % 9
    replies = 4 + (kind * torch.arange(1, 7) * 7) % (tiny.VOCABULARY - 4)
    lengths = 2 + kind % 3 + 2 * (kind == 8)
    mask = torch.arange(6) < lengths
    ids, attention = torch.cat([input_ids, replies], 1), torch.cat([attention_mask, mask.long()], 1)
    # As wide as the longest reply, which need not be so on another process
    cut = int(lengths.max()) - 6 or None
    return Rollout(
        ids[:, :cut],
        attention[:, :cut],
        mask[:, :cut],
        lengths[:, 0] < 6,
        torch.full(mask[:, :cut].shape, -2.0),
    )


def shifted(evaluate):
    """Log-probabilities of the rollout that are not those of the update, by so much more the later
    a token comes."""

    def evaluating(self, rollout, **how):
        seen = evaluate(self, rollout, **how)
        return seen._replace(
            logprobs=seen.logprobs + 0.03 * torch.arange(rollout.response_tokens) * rollout.response_mask
        )

    return evaluating


def sometimes(completion_ids, **columns):
    """A reward that says nothing of short replies, of which one process has more."""
    return [len(ids) / 2 if len(ids) > 4 else None for ids in completion_ids]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two rollouts on two processes, as each of them saw it."""
    folder = tmp_path_factory.mktemp("two")

    def work(rank):
        seen = []
        RolloutCollector.generate = note_rollouts(seen)
        trainer = tiny_runs.trainer(folder / "run", score_normalization="running", kl_target=1.0)
        start = weights(trainer.shared)
        trainer.train()
        rollouts = seen[-2:]
        return {
            "start": start,
            "end": weights(trainer.shared),
            "prompts": [p for p, _ in rollouts],
            "replies": [r for _, r in rollouts],
            "kl_coef": trainer.rollout_state.kl_control.coef,
            "moments": list(trainer.rollout_state.score_moments),
            "wrapped": type(trainer.model_wrapped).__name__,
        }

    return on_ranks(work, folder), folder


def test_weights_are_equal_on_both_and_have_moved(two):
    (one, other), _ = two
    assert one["wrapped"] == "DistributedDataParallel"
    assert all(torch.equal(p, other["end"][name]) for name, p in one["end"].items())
    assert all(torch.equal(p, other["start"][name]) for name, p in one["start"].items())
    assert all(not torch.equal(p, one["start"][name]) for name, p in one["end"].items())


def test_they_roll_out_other_prompts_with_other_random_numbers(two):
    (one, other), _ = two
    rows = {tuple(row["input_ids"]): number for number, row in enumerate(tiny_runs.prompt_rows())}
    for mine, theirs in zip(one["prompts"], other["prompts"], strict=True):
        numbers = [[rows[tuple(prompt)] for prompt in prompts] for prompts in (mine, theirs)]
        assert len(set(numbers[0]) | set(numbers[1])) == 2 * 16
    replies = [{tuple(reply) for rollout in side["replies"] for reply in rollout} for side in (one, other)]
    assert len(replies[0] & replies[1]) < 4


def test_state_between_rollouts_is_that_of_all_replies(two):
    (one, other), _ = two
    assert one["kl_coef"] == other["kl_coef"]
    assert one["moments"] == other["moments"] and one["moments"][0] == 2 * 2 * 16


def test_only_the_first_writes_and_a_row_a_rollout(two):
    _, folder = two
    rows = tiny_runs.logged(folder / "run")
    assert [row["step"] for row in rows] == [4, 8]
    assert len({row["prompt"] for row in tiny_runs.read_jsonl(folder / "run" / "samples.jsonl")}) > 4


LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    str(ROOT / "recipes/configs/accelerate/several_gpus.yaml"),
]
STEP = {
    "num_rollouts": 1,
    "num_mini_batches": 1,
    "gradient_accumulation_steps": 1,
    "num_ppo_epochs": 2,
    "learning_rate": 1.0,
    "optim": "sgd",
    "whiten_rewards": True,
    "score_normalization": "running",
    "max_grad_norm": 0.5,
}


def one_step(folder, rows, batch, **changes):
    """Weights and figures after one rollout of canned replies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutCollector, "generate", canned)
        patch.setattr(RolloutCollector, "evaluate", shifted(RolloutCollector.evaluate))
        patch.setattr(FirstStepChecks, "tolerance", lambda self, by_dtype: 1.0)
        rewards = [tiny_runs.even_share, sometimes]
        trainer = tiny_runs.trainer(
            folder, rows=rows, per_device_train_batch_size=batch, reward=rewards, **STEP, **changes
        )
        trainer.train()
    return weights(trainer.shared)


@pytest.mark.parametrize("parts", [None, 40])
def test_two_processes_make_the_step_that_one_makes_of_all_replies_and_log_its_figures(parts, tmp_path):
    rows = tiny_runs.prompt_rows(16)
    results = on_ranks(
        lambda rank: one_step(tmp_path / "two", rows, 8, max_tokens_per_microbatch=parts), tmp_path
    )
    want = one_step(tmp_path / "one", rows, 16, max_tokens_per_microbatch=parts)
    start = tiny_runs.trained_parameters(tiny_runs.fresh())
    for name, parameter in want.items():
        step = parameter - start[name]
        assert step.norm() > 1e-4, name
        assert (results[0][name] - start[name] - step).norm() < 1e-3 * step.norm(), name
    one, two = (tiny_runs.logged(tmp_path / name)[0] for name in ("one", "two"))
    if parts:  # is that of the first part, which has other rows
        one.pop("policy/first_ratio_gap"), two.pop("policy/first_ratio_gap")
    assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert (
        min(
            abs(one[name])
            for name in ("rollout/sampling_gap", "value/explained_variance", "reward/sometimes")
        )
        > 0.01
    )
    assert one["rollout/distinct_replies"] < 1


def test_a_run_resumed_on_two_processes_ends_where_the_uninterrupted_one_does(two, tmp_path):
    (one, _), _ = two
    how = {"score_normalization": "running", "kl_target": 1.0}

    def begin(rank):
        tiny_runs.trainer(
            tmp_path / "run", save_strategy="steps", save_steps=4, num_rollouts=1, **how
        ).train()
        return {}

    def finish(rank):
        trainer = tiny_runs.trainer(tmp_path / "run", **how)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
        return weights(trainer.shared)

    on_ranks(begin, tmp_path / "begin")
    for end in on_ranks(finish, tmp_path / "finish"):
        apart = {
            name: (p - one["end"][name]).abs().max().item()
            for name, p in end.items()
            if not torch.equal(p, one["end"][name])
        }
        assert not apart, apart


def test_the_random_state_of_a_process_that_is_ahead_stays_in_the_checkpoint(tmp_path):
    def work(rank):
        discard = checkpoints.discard
        if rank == 0:
            checkpoints.discard = lambda folder: (time.sleep(2), discard(folder))
        tiny_runs.trainer(tmp_path / "run", save_strategy="steps", save_steps=4, num_rollouts=1).train()
        return {}

    on_ranks(work, tmp_path)
    assert {path.name for path in (tmp_path / "run" / "checkpoint-4").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


def test_batches_are_dealt_so_that_no_rank_has_anothers_prompts():
    batches = list(RolloutBatches(16, 4, repeat=3, seed=0, num_processes=2))
    ranks = [batches[rank::2] for rank in range(2)]  # as accelerate deals them
    assert all(
        ranks[rank][block] == ranks[rank][block + 1] == ranks[rank][block + 2]
        for rank in range(2)
        for block in (0, 3)
    )
    assert sorted(row for rank in ranks for block in (0, 3) for row in rank[block]) == list(range(16))


@pytest.fixture(scope="module")
def launched(tmp_path_factory, request):
    """The four training recipes on two processes, on a tiny base: forks of this one, or with --full
    started by accelerate's launcher."""
    folder = tmp_path_factory.mktemp("launched")
    base = tiny.save_base(folder / "base")
    data = {
        name: tiny.write_rows(folder / f"{name}.jsonl", getattr(tiny, name)(24))
        for name in ("texts", "preferences", "prompts")
    }
    model = {
        "model_name_or_path": base,
        "quantization": "none",
        "dtype": "float32",
        "lora_r": 3,
        "lora_alpha": 6,
        "lora_layers": "top-2",
    }
    train = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    }
    train["per_device_train_batch_size"] = 4
    (folder / "my_rewards.py").write_text(
        "def short(completions, **columns):\n    return [-float(len(text)) for text in completions]\n"
    )
    few = {"bf16": False, "max_steps": 2, "gradient_checkpointing": False}
    pairs = {"dataset_name": data["preferences"], "eval_dataset_name": data["preferences"]}
    ppo = {
        "num_rollouts": 2,
        "num_ppo_epochs": 2,
        "response_length": 4,
        "score_normalization": "none",
        "dataset_name": data["prompts"],
    }
    started = {"policy_adapter": folder / "sft", "reward_adapter": folder / "reward", "force": True}
    stages = {
        "sft": model | train | few | {"dataset_name": data["texts"]},
        "reward": model | train | few | pairs,
        "ppo": model | train | ppo | started,
        "own_loop": (
            model
            | train
            | ppo
            | {
                "policy_adapter": folder / "sft",
                "rating": f"{folder}/my_rewards.py:short",
            }
        ),
    }
    for name, settings in stages.items():
        main, command = recipe(name).main, options(**settings, output_dir=folder / name)
        if request.config.getoption("--full"):
            start = [*LAUNCH, "--main_process_port", str(free_port()), str(ROOT / "recipes" / f"{name}.py")]
            subprocess.run([*start, *command], check=True, timeout=240)
        else:
            on_ranks(lambda rank, main=main, command=command: (main(command), {})[1], folder / f"of_{name}")
    return folder


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "own_loop"])
def test_a_recipe_on_two_processes_leaves_one_result(launched, name):
    stage = read_json(launched / name / "stage.json")
    assert stage["stage"] == name
    rows = [row for row in read_jsonl(launched / name / "metrics.jsonl") if "train_runtime" not in row]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), "one process writes"
    assert (launched / name / "goose_lora.json").is_file() and (
        launched / name / "adapter_model.safetensors"
    ).is_file()
    assert not list((launched / name).rglob(".unfinished"))


def test_policy_and_critic_of_a_launched_run_load_again(launched):
    shared = SharedBase.build(
        tiny.base(), launched / "ppo", reward=launched / "reward", critic="reward_features"
    )
    shared.load_role("value", launched / "ppo" / "value")
    (saved,) = (
        x
        for name, x in load_file(launched / "ppo" / "value" / "adapter_model.safetensors").items()
        if name.endswith("score.weight")
    )
    assert torch.equal(shared.score_head("value").weight, saved) and saved.abs().max() > 0


def test_two_launchers_as_on_two_machines_make_one_run(launched):
    """By accelerate's launcher and the shipped configuration, which --use_cpu true turns into
    processes of a CPU."""
    model = {
        "model_name_or_path": launched / "base",
        "quantization": "none",
        "dtype": "float32",
        "policy_adapter": launched / "sft",
    }
    train = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    }
    ppo = {
        "num_rollouts": 1,
        "num_ppo_epochs": 1,
        "response_length": 4,
        "score_normalization": "none",
        "per_device_train_batch_size": 4,
    }
    more = {
        "dataset_name": launched / "prompts.jsonl",
        "reward_function": f"{launched}/my_rewards.py:short",
        "critic_init": "zero",
    }
    command = options(**model | train | ppo | more, output_dir=launched / "machines")
    meet = [
        "--num_machines",
        "2",
        "--num_processes",
        "2",
        "--main_process_ip",
        "127.0.0.1",
        "--main_process_port",
        str(free_port()),
    ]
    where = {
        "env": os.environ | {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
    }
    machines = [
        subprocess.Popen(
            [*LAUNCH, *meet, "--machine_rank", str(rank), str(ROOT / "recipes" / "ppo.py"), *command], **where
        )
        for rank in range(2)
    ]
    outputs = [machine.communicate(timeout=240)[0].decode() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)[-4000:]
    said = "read 1 rollouts"  # the diagnosis at the end
    assert said in outputs[0] and said not in outputs[1], "the first machine speaks"
    (row,) = tiny_runs.logged(launched / "machines")
    assert row["epoch"] == pytest.approx(8 / 24), "eight prompts, four on each"
