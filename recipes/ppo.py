"""Stage 3: PPO on one shared quantized base: policy, critic, reward model and reference are
adapters and small heads on it.

    accelerate launch recipes/ppo.py --config recipes/configs/demo_cpu/ppo.yaml [--any_field value]

Rows: prompt, as text or chat messages; or conversations or preference pairs, whose prompts are
taken. The policy starts from policy_adapter, with a frozen copy of it as reference; without one it
starts from the bare base, which is then the reference. Writes the policy to output_dir, where plain
PEFT loads it, the critic and the reward model to folders beside it, metrics.jsonl and
samples.jsonl.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from goose_lora import cli, embedded
from goose_lora.cli.stage import begin, finish
from goose_lora.data.rows import DataArguments, load_rows
from goose_lora.data.tokenization import tokenize_prompts, tokenize_texts
from goose_lora.errors import UserError
from goose_lora.evaluation.verdict import require_verdict
from goose_lora.files import read_jsonl
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.compatibility import check_fit
from goose_lora.models.dense_copy import free_bytes
from goose_lora.models.loading import load_base, load_tokenizer, lora_config, require_adapter
from goose_lora.models.shared_base import SharedBase
from goose_lora.planning.memory import planner
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.sampler import RolloutBatches
from goose_lora.ppo.trainer import PPOTrainer
from goose_lora.reporting.diagnosis import diagnose, diagnosis_text
from goose_lora.reporting.plots import plot_curves
from goose_lora.rewards.classifier import RewardModel, check_weights, reward_sources
from goose_lora.sharing import hub
from goose_lora.sharing.export import save_policy
from goose_lora.sharing.lineage import fingerprint
from goose_lora.training.validation import require_at_least_one


@dataclass
class RoleArguments:
    """Where the roles come from."""

    policy_adapter: str | None = field(
        default=None, metadata={"help": "Folder of the SFT adapter; a fresh adapter on the base if unset."}
    )
    ptx_dataset_name: str | None = field(
        default=None, metadata={"help": "Rows with text for PPO-ptx, weighted by ptx_coef."}
    )
    ptx_max_length: int = field(default=512, metadata={"help": "Longer pretraining texts are cut."})
    reward_adapter: str | None = field(
        default=None, metadata={"help": "Folder of the reward adapter that recipes/reward.py saved."}
    )
    force: bool = field(
        default=False,
        metadata={
            "help": (
                "Use a reward model whose verdict says that it may know nothing; start though memory seems"
                " too small."
            )
        },
    )
    reward_function: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Scores replies in place of the reward adapter: module:function, or model:NAME, a classifier;"
                " or several, also 'adapter'."
            )
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One to each reward_function; 1 if unset."}
    )
    reward_model_quantization: Literal["nf4", "int8", "none"] = field(
        default="none", metadata={"help": "How a classifier of model:NAME is kept."}
    )

    def __post_init__(self) -> None:
        require_at_least_one(self, "ptx_max_length")
        check_weights(self.reward_weights, self.reward_function)


def main(args: list[str] | None = None) -> None:
    config, model_args, data_args, roles = cli.parse(
        PPOConfig, ModelArguments, DataArguments, RoleArguments, args=args
    )
    model_args.model_name_or_path = embedded.resolve(model_args.model_name_or_path)
    if (config.ptx_coef > 0) != (roles.ptx_dataset_name is not None):
        raise UserError(
            f"ptx_coef={config.ptx_coef:g}: PPO-ptx needs a weight above 0 and pretraining text: set"
            " ptx_dataset_name too."
        )
    sources = reward_sources(
        roles.reward_function, adapter=roles.reward_adapter, trust_remote_code=config.trust_remote_code
    )
    role_plan = config.role_plan(
        has_policy=roles.policy_adapter is not None,
        has_reward=roles.reward_adapter is not None,
    )
    roles.policy_adapter = require_adapter("policy_adapter", roles.policy_adapter, model_args)
    roles.reward_adapter = require_adapter("reward_adapter", roles.reward_adapter, model_args)
    start = begin("ppo", config, model_args, roles.policy_adapter)
    if roles.reward_adapter is not None:
        require_verdict(roles.reward_adapter, force=roles.force)
    if config.eval_strategy != "no" and data_args.eval_dataset_name is None:
        raise UserError(
            f"eval_strategy: {config.eval_strategy.value} needs held-out prompts: name them with"
            " eval_dataset_name."
        )
    how = {"max_rows": data_args.max_rows, "column_mapping": data_args.column_mapping, "stage": "ppo"}
    named = [
        (data_args.dataset_name, data_args.dataset_split),
        (data_args.eval_dataset_name, data_args.eval_dataset_split),
    ]
    rows = [(name, load_rows(embedded.resolve(name), split, **how)) for name, split in named if name]
    data = [fingerprint(name, split, found) for (name, found), (_, split) in zip(rows, named, strict=False)]

    tokenizer = load_tokenizer(model_args, trust_remote_code=config.trust_remote_code)
    train, *held_out = (
        tokenize_prompts(found, tokenizer, name=name, max_prompt_tokens=config.max_prompt_tokens)
        for name, found in rows
    )
    ptx = None
    if roles.ptx_dataset_name is not None:
        texts = load_rows(embedded.resolve(roles.ptx_dataset_name), data_args.dataset_split)
        ptx = tokenize_texts(texts, tokenizer, name=roles.ptx_dataset_name, max_length=roles.ptx_max_length)
    models = [source for source in sources if isinstance(source, RewardModel)]
    for model in models:
        model.check(train[0]["prompt"])

    longest = max(len(ids) for prompts in (train, *held_out) for ids in prompts["input_ids"])
    # Are there enough?
    RolloutBatches(
        len(train),
        config.rollout_batch_size // config.num_generations,
        1,
        seed=0,
        num_processes=config.world_size,
    )
    adapters = {"policy_adapter": roles.policy_adapter, "reward_adapter": roles.reward_adapter}
    how = {"tokens": longest + config.response_length, "chat": not isinstance(train[0]["prompt"], str)}
    check_fit(model_args, tokenizer, adapters, **how, trust_remote_code=config.trust_remote_code)
    memory = free_bytes(config.device)
    plan = planner(model_args, config, roles, memory=memory, device=config.device.type, prompt_tokens=longest)
    if config.process_index == 0:
        print(plan.report(memory), flush=True)
    if not roles.force:
        plan.check(memory)
    base = load_base(model_args, tokenizer, device=config.device, trust_remote_code=config.trust_remote_code)
    for model in models:
        model.load(replace(model_args, quantization=roles.reward_model_quantization), config.device)
    starts = {
        "reward": roles.reward_adapter,
        "critic": role_plan.critic,
        "critic_init": role_plan.critic_init,
        "train_layers": role_plan.train_layers,
    }
    shared = SharedBase.build(
        base,
        roles.policy_adapter or lora_config(model_args, base),
        average=role_plan.average,
        **starts,
    )
    more = {
        "reward_function": sources,
        "reward_weights": roles.reward_weights,
        "ptx_dataset": ptx,
        "eval_dataset": held_out[0] if held_out else None,
    }
    trainer = PPOTrainer(shared, hub.without_trainers_push(config), train, tokenizer, **more)
    trainer.train(resume_from_checkpoint=start)

    if trainer.is_world_process_zero():
        save_policy(shared, tokenizer, config.output_dir)
        metrics = read_jsonl(f"{config.output_dir}/metrics.jsonl")
        plot_curves(metrics, f"{config.output_dir}/curves.png")
        print("\n" + diagnosis_text(metrics))
        last = next(row for row in reversed(metrics) if "objective/score" in row)
        figures = {name: last[name] for name in ("objective/score", "objective/kl", "rollout/eos_rate")}
        parents = {"policy": roles.policy_adapter, "reward": roles.reward_adapter}
        findings = [str(finding) for finding in diagnose(metrics) if finding.level != "ok"]
        options = {
            "figures": figures,
            "tokenizer": tokenizer,
            "data": data,
            "parents": parents,
            "args": args,
            "findings": findings,
        }
        finish("ppo", config, model_args, data_args, roles, **options)


if __name__ == "__main__":
    cli.command(main)()
