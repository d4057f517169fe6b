"""Stage 3: PPO on one shared quantized base: policy, critic, reward model and reference are adapters and small heads on it.

    accelerate launch recipes/ppo.py --config recipes/configs/demo_cpu/ppo.yaml [--any_field value]

Rows: prompt, as text or chat messages. The policy starts from policy_adapter, with a frozen copy of it as reference; without one it starts
from the bare base, which is then the reference. Writes the policy to output_dir, where plain PEFT loads it, the critic and the reward model
to folders beside it, metrics.jsonl and samples.jsonl.
"""

from dataclasses import dataclass, field

from goose_lora import cli, demo
from goose_lora.data import DataArguments, load_rows, tokenize_prompts, tokenize_texts
from goose_lora.diagnosis import report
from goose_lora.evaluation import import_function
from goose_lora.export import save_policy
from goose_lora.loading import ModelArguments, load_base, load_tokenizer, lora_config, require_adapter
from goose_lora.ppo_config import PPOConfig
from goose_lora.ppo_trainer import PPOTrainer
from goose_lora.report import plot_curves, read_jsonl, require_verdict, write_stage
from goose_lora.shared_base import SharedBase


@dataclass
class RoleArguments:
    """Where the roles come from."""

    policy_adapter: str | None = field(default=None, metadata={"help": "Folder of the SFT adapter; a fresh adapter on the base if unset."})
    ptx_dataset_name: str | None = field(default=None, metadata={"help": "Rows with text for PPO-ptx, weighted by ptx_coef."})
    ptx_max_length: int = field(default=512, metadata={"help": "Longer pretraining texts are cut."})
    reward_adapter: str | None = field(default=None, metadata={"help": "Folder of the reward adapter that recipes/reward.py saved."})
    force: bool = field(default=False, metadata={"help": "Use a reward model whose verdict says that it may know nothing."})
    reward_function: list[str] | None = field(
        default=None, metadata={"help": "module:function to score replies in place of the reward adapter; or several, 'adapter' among them."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One to each reward_function; 1 if unset."})


def main(args: list[str] | None = None) -> None:
    config, model_args, data_args, roles = cli.parse(PPOConfig, ModelArguments, DataArguments, RoleArguments, args=args)
    named = [roles.reward_function] if isinstance(roles.reward_function, str) else roles.reward_function or ["adapter"]
    if roles.reward_adapter is None and "adapter" in named:
        raise ValueError("nothing scores the replies: set reward_adapter to the output of recipes/reward.py, or reward_function to module:function.")
    model_args.model_name_or_path = demo.resolve(model_args.model_name_or_path)
    functions: list = [name if name == "adapter" else import_function(name) for name in named]
    require_adapter("policy_adapter", roles.policy_adapter, model_args)
    require_adapter("reward_adapter", roles.reward_adapter, model_args)
    if roles.reward_adapter is not None:
        require_verdict(roles.reward_adapter, force=roles.force)
    rows = load_rows(demo.resolve(data_args.dataset_name), data_args.dataset_split, data_args.max_rows, data_args.column_mapping, stage="ppo")

    tokenizer = load_tokenizer(model_args, trust_remote_code=config.trust_remote_code)
    prompts = tokenize_prompts(rows, tokenizer, name=data_args.dataset_name, max_prompt_tokens=config.max_prompt_tokens)
    ptx = None
    if roles.ptx_dataset_name is not None:
        texts = load_rows(demo.resolve(roles.ptx_dataset_name), data_args.dataset_split)
        ptx = tokenize_texts(texts, tokenizer, name=roles.ptx_dataset_name, max_length=roles.ptx_max_length)
    base = load_base(model_args, tokenizer, device=config.device, trust_remote_code=config.trust_remote_code)
    policy = roles.policy_adapter or lora_config(model_args, base)
    shared = SharedBase.build(
        base,
        policy,
        reward=roles.reward_adapter,
        critic=config.critic if config.needs_critic else None,
        critic_init=config.critic_init,
        average=config.ema_decay is not None,
    )
    rewards = {"reward_function": functions, "reward_weights": roles.reward_weights}
    trainer = PPOTrainer(shared, config, prompts, tokenizer, **rewards, ptx_dataset=ptx)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)

    if trainer.is_world_process_zero():
        save_policy(shared, tokenizer, config.output_dir)
        metrics = read_jsonl(f"{config.output_dir}/metrics.jsonl")
        plot_curves(metrics, f"{config.output_dir}/curves.png")
        print("\n" + report(metrics))
        last = next(row for row in reversed(metrics) if "objective/score" in row)
        write_stage(config.output_dir, "ppo", {name: last[name] for name in ("objective/score", "objective/kl", "rollout/eos_rate")})


if __name__ == "__main__":
    cli.command(main)()
