"""Base, SFT and PPO side by side on held-out prompts, on one shared base.

    accelerate launch recipes/evaluate.py --config recipes/configs/demo_cpu/evaluate.yaml
    [--any_field value]

Prints greedy replies to three prompts and a table, and writes evaluation.json and replies.jsonl to
output_dir. A judge, given and called as a reward function is (module:function, trl:NAME or
check:NAME), is asked about every reply, and about one before anything loads. judge: openai:MODEL
asks a language model behind a server which of two replies is better, in both orders. best_of shows
what the reward model alone can pick from SFT.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from goose_lora import cli
from goose_lora.data import DataArguments, asked, tokenize_prompts
from goose_lora.embedded import resolve
from goose_lora.errors import UserError
from goose_lora.evaluation import Replies, answer, best_of, compare_all, judge_all, summary
from goose_lora.files import write_json, write_jsonl
from goose_lora.generation import RolloutCompile, StaticCache, generation_config, make_static_cache
from goose_lora.models import (
    AdapterFolder,
    DenseCopy,
    ModelArguments,
    Role,
    RolloutWeights,
    SharedBase,
    check_fit,
    ends_text,
    load_base,
    make_dense_copy,
    reply_ends,
    require_tokens,
    tokenizer_of,
    usable_dtype,
)
from goose_lora.ownership import RESULTS, begin_in, claim, release, share
from goose_lora.reporting import refresh_report, write_stage
from goose_lora.rewards import (
    CACHE_FILE,
    SERVED,
    PairwiseJudge,
    RewardMix,
    check_judge_settings,
    reward_function,
    rubric_text,
    served_model,
)
from goose_lora.sharing import add_evaluation
from goose_lora.terminal import side_by_side, table
from goose_lora.training import device_text, require_at_least_one, require_one_process

from datasets import Dataset  # isort: skip  (after goose_lora, which says how torch's threads wait)
from transformers import GenerationConfig, PreTrainedTokenizerBase  # isort: skip

COLUMNS = [
    "score",
    "judge",
    "kl",
    "tokens",
    "ended",
    "distinct_2",
    "base_loss",
    "score_win_rate",
    "judge_win_rate",
    "judge_ties",
    "judge_gain_at_equal_length",
]


SHOWN = 3  # prompts whose greedy replies are printed


@dataclass
class EvaluationArguments:
    """What to compare, and how replies are sampled."""

    output_dir: str = field(metadata={"help": "Folder for evaluation.json and replies.jsonl."})
    policy_adapter: str = field(
        metadata={"help": "Folder of the policy to judge: the output of recipes/ppo.py."}
    )
    sft_adapter: str | None = field(
        default=None, metadata={"help": "Folder of the SFT adapter: the reference; the bare base if unset."}
    )
    reward_adapter: str | None = field(default=None, metadata={"help": "Folder of the reward adapter."})
    judge: str | None = field(
        default=None,
        metadata={
            "help": (
                "Rates replies: module:function, trl:NAME or check:NAME; or openai:MODEL, which compares them"
                " in pairs. Training should not have seen it."
            )
        },
    )
    judge_base_url: str | None = field(
        default=None,
        metadata={"help": "Server of openai:MODEL, like http://localhost:11434/v1; OpenAI's if unset."},
    )
    judge_rubric: str | None = field(
        default=None,
        metadata={"help": "File that tells openai:MODEL what is better; one for all if unset."},
    )
    best_of: int = field(
        default=0, metadata={"help": "Also take the best of so many SFT replies by the reward model."}
    )
    num_prompts: int = field(default=200, metadata={"help": "Prompts to answer."})
    response_length: int = field(default=53, metadata={"help": "Most tokens of a reply."})
    stop_token_ids: list[int] | None = field(default=None, metadata={"help": "As in recipes/ppo.py."})
    stop_strings: list[str] | None = field(default=None, metadata={"help": "As in recipes/ppo.py."})
    max_prompt_tokens: int = field(default=512, metadata={"help": "Longer prompts are left out."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; 0 for greedy replies."})
    batch_size: int = field(default=64, metadata={"help": "Replies at a time."})
    rollout_weights: RolloutWeights = field(default="auto", metadata={"help": "As in recipes/ppo.py."})
    rollout_compile: RolloutCompile = field(default="auto", metadata={"help": "As in recipes/ppo.py."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code from the model's repository."}
    )

    def __post_init__(self) -> None:
        self.output_dir = os.path.expanduser(self.output_dir)  # as TrainingArguments do
        require_at_least_one(self, "num_prompts", "response_length", "max_prompt_tokens", "batch_size")
        if isinstance(self.stop_strings, str):  # one text without brackets in a YAML file
            self.stop_strings = [self.stop_strings]
        if not all(self.stop_strings or []):
            raise UserError(f"stop_strings={self.stop_strings}: an empty text would end every reply at once.")
        if self.temperature < 0 or self.best_of < 0:
            raise UserError(
                f"temperature={self.temperature}, best_of={self.best_of}: must not be negative; 0 is for"
                " greedy replies, and for none."
            )
        if self.best_of and self.temperature == 0:
            raise UserError(
                f"best_of={self.best_of}, temperature=0: greedy replies are all alike. Set a temperature"
                " above 0, or leave best_of out."
            )
        check_judge_settings(self.judge, self.judge_base_url, self.judge_rubric)


@dataclass
class Answers:
    """The models of a comparison, and how they are asked."""

    shared: SharedBase
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    config: EvaluationArguments
    dense: DenseCopy | None
    static: StaticCache | None

    def of(self, role: Role, label: str, *, seed: int) -> Replies:
        """Let a role answer all prompts."""
        return answer(
            self.shared,
            role,
            self.prompts,
            self.tokenizer,
            self._sampling(),
            batch_size=self.config.batch_size,
            stop_strings=self.config.stop_strings,
            dense=self.dense,
            static=self.static,
            seed=seed,
            label=label,
        )

    def greedy(self, roles: dict[str, Role], questions: list[str]) -> list[dict[str, str]]:
        """Let all roles answer the first prompts with what they find likeliest, a row a prompt."""
        first = replace(
            self,
            prompts=self.prompts[:SHOWN],
            config=replace(self.config, temperature=0.0, best_of=0),
            static=None,  # made for groups of another size
        )
        said = {
            name: first.of(role, f"{name}, greedy", seed=self.config.seed).texts
            for name, role in roles.items()
        }
        return [
            {"asked": question} | {name: texts[row] for name, texts in said.items()}
            for row, question in enumerate(questions[:SHOWN])
        ]

    def _sampling(self) -> GenerationConfig:
        return generation_config(
            response_tokens=self.config.response_length,
            temperature=self.config.temperature or 1.0,
            do_sample=self.config.temperature > 0,
            eos_token_ids=reply_ends(self.tokenizer, self.config.stop_token_ids),
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def best_of(self, name: str) -> Replies:
        """Take the best of several replies of the reference.

        Other seeds: the reply that it is compared with must not be one of them.
        """
        tries = range(1, self.config.best_of + 1)
        return best_of([self.of("reference", f"{name} {i}", seed=self.config.seed + i) for i in tries])


def show(greedy: list[dict[str, str]], prompts: int, figures: dict, against: str) -> None:
    """Print some prompts with everybody's greedy replies, and the table of figures."""
    asked_for = [row["asked"] for row in greedy]
    names = [name for name in greedy[0] if name != "asked"]
    found = [column for column in COLUMNS if any(column in row for row in figures.values())]
    print(
        "\nGreedy replies:\n"
        + side_by_side(asked_for, {name: [row[name] for row in greedy] for name in names})
    )
    print(f"\n{prompts} held-out prompts; win rates and gains against {against}:\n")
    print(table([{"": name, **row} for name, row in figures.items()], ["", *found]))


@dataclass
class Results:
    """What an evaluation leaves: figures, and everybody's replies."""

    output_dir: str
    evaluation: dict[str, Any]  # without what a judge says
    replies: dict[str, Replies]
    rows: list[dict[str, str]]  # prompts with all replies

    def save(self, found: dict[str, Any]) -> dict[str, Any]:
        """Write figures, with what was found in the replies, and the replies; return the first."""
        evaluation = {**self.evaluation, **found}
        claim(self.output_dir, *RESULTS["evaluate"])
        write_json(f"{self.output_dir}/evaluation.json", evaluation)
        write_jsonl(f"{self.output_dir}/replies.jsonl", self.rows)
        return evaluation

    def leave(self, found: dict[str, Any], policy: Path) -> None:
        """Save all, and bring card and report of the policy up to date."""
        add_evaluation(policy, self.save(found), self.rows)
        refresh_report(policy)
        write_stage(self.output_dir, "evaluate", {"prompts": len(self.rows)})
        release(policy)


def _columns(prompts: Dataset) -> dict[str, list]:
    """Return what a judge is given of the prompts' rows, as a reward function is."""
    return {name: list(prompts[name]) for name in prompts.column_names if name not in ("prompt", "input_ids")}


def _static_cache(
    shared: SharedBase, dense: DenseCopy | None, config: EvaluationArguments, replies: int
) -> StaticCache | None:
    steps = -(-replies // config.batch_size) * config.response_length
    return make_static_cache(dense, config.rollout_compile, shared.core.device, steps=steps)


def _checked_judge(
    config: EvaluationArguments, prompts: Dataset, tokenizer: PreTrainedTokenizerBase
) -> RewardMix | PairwiseJudge | None:
    """Return the judge that is named, once it has judged something made up."""
    name = config.judge
    if name is None:
        return None
    if name.startswith(SERVED):
        served = PairwiseJudge(
            served_model(name),
            base_url=config.judge_base_url,
            rubric=rubric_text(config.judge_rubric),
            cache=Path(config.output_dir) / CACHE_FILE,
        )
        print(f"Asking {name} one made-up question ...", flush=True)
        served.check()
        return served
    judge = RewardMix([reward_function(name)])
    first = {column: values[0] for column, values in _columns(prompts).items()}
    judge.check(prompts[0]["prompt"], first, tokenizer.encode("ok", add_special_tokens=False))
    return judge


def _judged(
    judge: RewardMix | PairwiseJudge | None,
    name: str | None,
    results: Results,
    prompts: Dataset,
    against: str,
) -> dict[str, Any]:
    """Return what is found in the replies, by the judge too, which is asked once they are saved."""
    found: dict[str, Any] = {}
    if judge is not None:
        results.save({"figures": summary(results.replies, against=against)})
    if isinstance(judge, PairwiseJudge):
        compare_all(results.replies, prompts["prompt"], judge, against)
        found = {"judge": judge.name, "judge_asked": judge.asked._asdict()}
        print(judge.told(), flush=True)
    elif judge is not None:
        judge_all(results.replies, prompts["prompt"], judge.numbers, _columns(prompts))
        found = {"judge": name}
    return {"figures": summary(results.replies, against=against), **found}


def main(args: list[str] | None = None) -> None:
    """Compare base, SFT and PPO."""
    config, model, data = cli.parse(EvaluationArguments, ModelArguments, DataArguments, args=args)
    require_one_process("recipes/evaluate.py")
    print(device_text(model.dtype), flush=True)
    if config.best_of and not config.reward_adapter:
        raise UserError("best_of needs reward_adapter: the reward model picks the best reply.")

    # 1. Everything that can be known before a weight is read.
    begin_in(config.output_dir, "evaluate", config, model, data)
    if Path(config.policy_adapter).is_dir():
        share(config.policy_adapter)  # the card there gets the figures at the end
    model = replace(usable_dtype(model), model_name_or_path=resolve(model.model_name_or_path))
    policy, sft, reward = (
        name
        and AdapterFolder.open(setting, name, base=model.model_name_or_path, base_hub_id=model.base_hub_id)
        for setting, name in (
            ("policy_adapter", config.policy_adapter),
            ("sft_adapter", config.sft_adapter),
            ("reward_adapter", config.reward_adapter),
        )
    )
    rows: Dataset = data.train("ppo").rows.take(config.num_prompts)
    tokenizer = tokenizer_of(policy.path, args=model, trust_remote_code=config.trust_remote_code)
    require_tokens(tokenizer, config.stop_token_ids, model.model_name_or_path)
    print(ends_text(tokenizer, config.stop_token_ids), flush=True)
    prompts = tokenize_prompts(
        rows, tokenizer, name=data.dataset_name, max_prompt_tokens=config.max_prompt_tokens
    )
    ids = list(prompts["input_ids"])
    check_fit(
        model,
        tokenizer,
        [policy, sft, reward],
        tokens=max(map(len, ids)) + config.response_length,
        chat=not isinstance(prompts[0]["prompt"], str),
        trust_remote_code=config.trust_remote_code,
    )
    judge = _checked_judge(config, prompts, tokenizer)  # last: a server may be paid for its answer

    # 2. One base in memory, and all that is compared as adapters on it.
    base = load_base(model, tokenizer, trust_remote_code=config.trust_remote_code)
    shared = SharedBase.build(base, policy, reward=reward, reference=sft or "base")
    dense = make_dense_copy(shared, config.rollout_weights)
    roles: dict[str, Role] = {"base": "base", "sft": "reference", "ppo": "policy"}
    against = "base" if sft is None else "sft"
    if sft is None:
        del roles["sft"]
    static = _static_cache(shared, dense, config, len(ids) * (len(roles) + config.best_of))
    answers = Answers(shared, tokenizer, ids, config, dense, static)

    # 3. Ask everybody the same, and leave the figures.
    replies = {name: answers.of(role, name, seed=config.seed) for name, role in roles.items()}
    if config.best_of:
        replies[f"{against} best of {config.best_of}"] = answers.best_of(against)
    texts = tokenizer.batch_decode(ids)
    questions = [asked(prompt) for prompt in prompts["prompt"]]
    greedy = answers.greedy(roles, questions)
    answered = [
        {"prompt": text, "asked": question} | {name: given.texts[i] for name, given in replies.items()}
        for i, (text, question) in enumerate(zip(texts, questions, strict=True))
    ]
    about = {"prompts": len(texts), "dataset": data.dataset_name, "against": against, "greedy": greedy}
    results = Results(config.output_dir, about, replies, answered)
    found = _judged(judge, config.judge, results, prompts, against)
    results.leave(found, policy.path)
    # Last: a console may fail, and the figures are saved
    show(greedy, len(texts), found["figures"], against)


if __name__ == "__main__":
    cli.command(main)()
