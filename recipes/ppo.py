"""Stage 3: PPO. Policy, critic, reward model and reference are adapters and heads on one base.

    accelerate launch recipes/ppo.py --config recipes/configs/demo_cpu/ppo.yaml [--any_field value]

Rows: prompt, as text or chat messages; or conversations or preference pairs, whose prompts are
taken. The policy starts from policy_adapter, with a frozen copy of it as reference; without one it
starts from the bare base, which is then the reference. Writes the policy to output_dir, where plain
PEFT loads it, the critic and the reward model to folders beside it, metrics.jsonl and
samples.jsonl.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from goose_lora import cli
from goose_lora.data import DataArguments
from goose_lora.errors import UserError
from goose_lora.evaluation import require_verdict
from goose_lora.models import ModelArguments, SharedBase, lora_config, require_ensemble
from goose_lora.ppo import PPOConfig, PPOTrainer
from goose_lora.rewards import ClassifierReward, check_sources, check_weights, reward_sources
from goose_lora.training import require_at_least_one


@dataclass
class RoleArguments:
    """Where the roles come from."""

    policy_adapter: str | None = field(
        default=None, metadata={"help": "Folder of the SFT adapter; a fresh one if unset."}
    )
    ptx_dataset_name: str | None = field(
        default=None, metadata={"help": "Rows as fine-tuning takes them, for PPO-ptx."}
    )
    ptx_max_length: int = field(default=512, metadata={"help": "Longer pretraining texts are cut."})
    reward_adapter: str | None = field(
        default=None, metadata={"help": "Folder of the reward adapter that recipes/reward.py saved."}
    )
    reward_aggregation: Literal["mean", "min", "mean_minus_std"] | None = field(
        default=None,
        metadata={"help": "How reward models of num_members score as one; unset: as their folder says."},
    )
    uncertainty_coef: float | None = field(
        default=None, metadata={"help": "Weight of the deviation in mean_minus_std; 1 if unset."}
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
                "Scores replies in place of the reward adapter: module:function; trl:NAME or"
                " check:NAME, ready rewards, with (argument=value); model:NAME, a classifier; openai:MODEL,"
                " which compares the replies to a prompt; or several, also 'adapter'."
            )
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One to each reward_function; 1 if unset."}
    )
    judge_base_url: str | None = field(
        default=None,
        metadata={"help": "Server of openai:MODEL, like http://localhost:11434/v1; OpenAI's if unset."},
    )
    judge_rubric: str | None = field(
        default=None,
        metadata={"help": "File that tells openai:MODEL what is better; one for all if unset."},
    )
    reward_model_quantization: Literal["nf4", "int8", "none"] = field(
        default="none", metadata={"help": "How a classifier of model:NAME is kept."}
    )

    def __post_init__(self) -> None:
        require_at_least_one(self, "ptx_max_length")
        if self.ptx_max_length == 1:
            raise UserError("ptx_max_length=1: one token has nothing to predict. Use 2 or more.")
        if isinstance(self.reward_weights, (int, float)):  # one number without brackets in a YAML file
            self.reward_weights = [self.reward_weights]
        check_weights(self.reward_weights, self.reward_function)
        cli.check_reward_judges(self.reward_function, self.judge_base_url, self.judge_rubric)
        coef, aggregation = self.uncertainty_coef, self.reward_aggregation
        if coef is not None and (aggregation != "mean_minus_std" or coef < 0):
            raise UserError(
                f"uncertainty_coef={coef:g}: a weight of 0 or more, of reward_aggregation: mean_minus_std"
                f" alone, which is {aggregation}. Set both, or leave it out."
            )


def main(args: list[str] | None = None) -> PPOTrainer:
    """Train a policy by PPO."""
    config, model, data, roles = cli.parse(PPOConfig, ModelArguments, DataArguments, RoleArguments, args=args)
    stage = cli.Stage.begin("ppo", config, model, data, roles, command=args)

    # 1. Everything that can be known before a weight is read.
    policy = stage.adapter("policy_adapter")  # None for a fresh adapter
    reward = stage.adapter("reward_adapter")
    sources = reward_sources(
        roles.reward_function,
        has_adapter=reward is not None,
        trust_remote_code=config.trust_remote_code,
        judge=cli.judge_maker(config, roles.judge_base_url, roles.judge_rubric),
    )
    require_ensemble(reward, roles.reward_aggregation, asked="adapter" in sources)
    plan = config.role_plan(has_policy=policy is not None, has_reward=reward is not None)
    if reward is not None:
        require_verdict(reward.path, force=roles.force)
    prompts = stage.prompts(
        pretraining=roles.ptx_dataset_name,
        pretraining_length=roles.ptx_max_length,
    )
    tokenizer = stage.tokenizer()
    reply = tokenizer.encode("ok", add_special_tokens=False)
    check_sources(sources, prompts.train[0], reply, timeout=config.reward_timeout)
    stage.check_fit(
        tokenizer,
        policy,
        *([] if reward is None else reward.members),
        tokens=prompts.longest + config.response_length,
        chat=prompts.chat,
    )
    stage.memory_plan(
        policy,
        reward,
        prompt_tokens=prompts.longest,
        pretraining_length=roles.ptx_max_length,
        force=roles.force,
    )
    cli.begin_judging(stage, sources, roles.reward_weights, prompts)  # last: an answer may be paid for

    # 2. One base in memory. Policy, critic, reward model and reference are adapters on it.
    base = stage.base(tokenizer)
    classifiers = [source for source in sources if isinstance(source, ClassifierReward)]
    for classifier in classifiers:
        own = replace(stage.model, quantization=roles.reward_model_quantization)
        classifier.load(own, config.device)
    shared = SharedBase.build(
        base,
        policy or lora_config(stage.model, base),
        reward=reward,
        critic=plan.critic,
        critic_init=plan.critic_init,
        average=plan.average,
        train_layers=plan.train_layers,
        reward_aggregation=roles.reward_aggregation,
        uncertainty_coef=roles.uncertainty_coef,
    )

    # 3. Roll out, score, update; then leave the policy, its roles and a report.
    trainer = PPOTrainer(
        shared,
        stage.trainer_config,
        prompts.train,
        tokenizer,
        reward_function=sources,
        reward_weights=roles.reward_weights,
        ptx_dataset=prompts.pretraining,
        eval_dataset=prompts.held_out,
    )
    trainer.given = stage.given  # what a run that resumes this one must be given too
    trainer.train(resume_from_checkpoint=stage.checkpoint)
    stage.finish(trainer, parents={"policy": policy, "reward": reward})
    cli.tell_judging(stage, sources)
    return trainer


if __name__ == "__main__":
    cli.command(main)()
