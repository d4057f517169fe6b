"""Base, SFT and PPO side by side on held-out prompts, on one shared base.

    accelerate launch recipes/evaluate.py --config recipes/configs/demo_cpu/evaluate.yaml
    [--any_field value]

Prints a table and samples, and writes evaluation.json and replies.jsonl to output_dir. A judge,
given as module:function with TRL's signature (prompts=, completions=, -> list of numbers), is asked
about every reply; best_of shows what the reward model alone can pick from SFT.
"""

from dataclasses import dataclass, field

from goose_lora import cli, embedded
from goose_lora.data.rows import DataArguments, load_rows
from goose_lora.data.tokenization import tokenize_prompts
from goose_lora.errors import UserError
from goose_lora.evaluation.policies import Replies, answer, best_of, judge_all, summary
from goose_lora.files import import_function, write_json, write_jsonl
from goose_lora.generation.sampling import generation_config
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.compatibility import check_fit
from goose_lora.models.dense_copy import RolloutWeights, make_dense_copy
from goose_lora.models.loading import load_base, load_tokenizer, require_adapter
from goose_lora.models.roles import Role
from goose_lora.models.shared_base import SharedBase
from goose_lora.reporting.html_report import refresh_report
from goose_lora.reporting.run_files import write_stage
from goose_lora.sharing.model_card import add_evaluation
from goose_lora.terminal import side_by_side, table
from goose_lora.training.launch import require_one_process
from goose_lora.training.validation import require_at_least_one

COLUMNS = [
    "score",
    "judge",
    "kl",
    "tokens",
    "ended",
    "distinct_2",
    "score_win_rate",
    "judge_win_rate",
    "judge_gain_at_equal_length",
]


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
        metadata={"help": "module:function that rates replies; training should not have seen it."},
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
    seed: int = field(default=0, metadata={"help": "Of the sampling."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code from the model's repository."}
    )

    def __post_init__(self) -> None:
        require_at_least_one(self, "num_prompts", "response_length", "max_prompt_tokens", "batch_size")
        if self.temperature < 0 or self.best_of < 0:
            raise UserError(
                f"temperature={self.temperature}, best_of={self.best_of}: must not be negative; 0 is for"
                " greedy replies, and for none."
            )


def main(args: list[str] | None = None) -> None:
    config, model_args, data_args = cli.parse(EvaluationArguments, ModelArguments, DataArguments, args=args)
    require_one_process("recipes/evaluate.py")
    if config.best_of and not config.reward_adapter:
        raise UserError("best_of needs reward_adapter: the reward model picks the best reply.")
    model_args.model_name_or_path = embedded.resolve(model_args.model_name_or_path)
    for name in ("policy_adapter", "sft_adapter", "reward_adapter"):
        setattr(config, name, require_adapter(name, getattr(config, name), model_args))
    judge = import_function(config.judge) if config.judge else None
    rows = load_rows(
        embedded.resolve(data_args.dataset_name),
        data_args.dataset_split,
        data_args.max_rows,
        data_args.column_mapping,
        stage="ppo",
    )
    rows = rows.select(range(min(config.num_prompts, len(rows))))

    tokenizer = load_tokenizer(model_args, trust_remote_code=config.trust_remote_code)
    prompts = tokenize_prompts(
        rows, tokenizer, name=data_args.dataset_name, max_prompt_tokens=config.max_prompt_tokens
    )
    prompt_ids = list(prompts["input_ids"])
    adapters = {name: getattr(config, name) for name in ("policy_adapter", "sft_adapter", "reward_adapter")}
    how = {
        "tokens": max(map(len, prompt_ids)) + config.response_length,
        "chat": not isinstance(prompts[0]["prompt"], str),
    }
    check_fit(model_args, tokenizer, adapters, **how, trust_remote_code=config.trust_remote_code)
    base = load_base(model_args, tokenizer, trust_remote_code=config.trust_remote_code)
    shared = SharedBase.build(
        base, config.policy_adapter, reward=config.reward_adapter, reference=config.sft_adapter or "base"
    )
    sampling = generation_config(
        response_tokens=config.response_length,
        temperature=config.temperature or 1.0,
        do_sample=config.temperature > 0,
        eos_token_ids=[tokenizer.eos_token_id, *(config.stop_token_ids or [])],
        pad_token_id=tokenizer.pad_token_id,
    )

    dense = make_dense_copy(shared, config.rollout_weights)

    def replies(role: Role, seed: int, label: str) -> Replies:
        options = {"batch_size": config.batch_size, "stop_strings": config.stop_strings, "dense": dense}
        return answer(shared, role, prompt_ids, tokenizer, sampling, **options, seed=seed, label=label)

    roles: dict[str, Role] = (
        {"base": "base", "sft": "reference", "ppo": "policy"}
        if config.sft_adapter
        else {"base": "base", "ppo": "policy"}
    )
    named = {name: replies(role, config.seed, name) for name, role in roles.items()}
    reference = "sft" if config.sft_adapter else "base"
    if config.best_of:
        tries = [
            named[reference],
            *(
                replies("reference", config.seed + i, f"{reference} {i + 1}")
                for i in range(1, config.best_of)
            ),
        ]
        named[f"{reference} best of {config.best_of}"] = best_of(tries)
    texts = tokenizer.batch_decode(prompt_ids)
    if judge:
        judge_all(named, texts, judge)

    figures = summary(named, against=reference)
    print(f"\n{len(texts)} held-out prompts; win rates and gains against {reference}:\n")
    print(
        table(
            [{"": name, **row} for name, row in figures.items()],
            ["", *(c for c in COLUMNS if any(c in r for r in figures.values()))],
        )
    )
    print("\n" + side_by_side(texts, {name: r.texts for name, r in named.items()}))
    evaluation = {
        "prompts": len(texts),
        "dataset": data_args.dataset_name,
        "against": reference,
        "figures": figures,
    }
    replies_of = [
        {"prompt": text, **{name: r.texts[i] for name, r in named.items()}} for i, text in enumerate(texts)
    ]
    write_json(f"{config.output_dir}/evaluation.json", evaluation)
    write_jsonl(f"{config.output_dir}/replies.jsonl", replies_of)
    add_evaluation(config.policy_adapter, evaluation, replies_of)
    refresh_report(config.policy_adapter)
    write_stage(config.output_dir, "evaluate", {"prompts": len(texts)})


if __name__ == "__main__":
    cli.command(main)()
