"""A loop of your own: a text environment of several turns, with PPO's generate and step.

    accelerate launch recipes/own_loop.py --config recipes/configs/demo_cpu/raw/own_loop.yaml
    [--any_field value]

A critic at the ticket desk is asked two things about a film. The policy goes on from the opening of
a review; the environment answers with a question of its own, and the policy goes on again. Each
turn is rated by itself, on the token that ends it; the environment's tokens are read
and never trained on. Replace ``Interview`` by a game, a tool or a person: what the trainer wants is
token ids, scores and a mask.
"""

from dataclasses import dataclass, field

from goose_lora import cli
from goose_lora.data import DataArguments
from goose_lora.errors import UserError
from goose_lora.files import import_function
from goose_lora.models import ModelArguments, SharedBase, lora_config
from goose_lora.ppo import PPOConfig, PPOTrainer
from goose_lora.rewards import RewardMix


@dataclass
class InterviewArguments:
    """The policy's start, and the environment."""

    policy_adapter: str | None = field(
        default=None, metadata={"help": "Folder of the SFT adapter; a fresh adapter on the base if unset."}
    )
    rating: str = field(
        default="goose_lora.demo:vader",
        metadata={"help": "module:function that rates each turn's reply, as for reward functions."},
    )
    questions: list[str] = field(
        default_factory=lambda: [" And the acting is"],
        metadata={"help": "What the environment says after each reply."},
    )


class Interview:
    """One conversation with each of a batch of prompts: everything written so far, who wrote it,
    and what it was worth."""

    def __init__(self, prompts, tokenizer):
        self.prompts, self.tokenizer = prompts, tokenizer
        self.written: list[list[int]] = [[] for _ in prompts]
        self.own: list[list[bool]] = [[] for _ in prompts]
        self.scores: list[list[float]] = [[] for _ in prompts]

    def contexts(self) -> list[list[int]]:
        return [prompt + written for prompt, written in zip(self.prompts, self.written, strict=True)]

    def add(self, row: int, ids: list[int], *, own: bool, score: float = 0.0) -> None:
        self.written[row] += ids
        self.own[row] += [own] * len(ids)
        self.scores[row] += [0.0] * (len(ids) - 1) + [score]

    def play(self, trainer, questions, rate) -> None:
        for turn in range(len(questions) + 1):
            replies = [reply.tolist() for reply in trainer.generate(self.contexts())]
            texts = self.tokenizer.batch_decode(replies, skip_special_tokens=True)
            for row, (reply, score) in enumerate(
                zip(replies, rate(prompts=[""] * len(texts), completions=texts), strict=True)
            ):
                self.add(row, reply, own=True, score=score)
                if turn < len(questions):
                    self.add(
                        row, self.tokenizer(questions[turn], add_special_tokens=False)["input_ids"], own=False
                    )


def main(args: list[str] | None = None) -> PPOTrainer:
    """Train a policy over conversations of several turns."""
    config, model, data, game = cli.parse(
        PPOConfig, ModelArguments, DataArguments, InterviewArguments, args=args
    )
    if config.num_rollouts is None:
        raise UserError(
            "num_rollouts: a loop of your own needs to know how long it is, for the learning rate's schedule."
        )
    if config.eval_strategy != "no":
        raise UserError(
            f"eval_strategy: {config.eval_strategy.value}: this loop evaluates nothing. Leave it out."
        )
    if config.ema_decay is not None:
        raise UserError(f"ema_decay={config.ema_decay}: this loop keeps no average. Leave it out.")
    if config.sampling_correction is not None:
        raise UserError(
            f"sampling_correction={config.sampling_correction}: this loop's replies come without the"
            " probabilities that they were drawn with. Leave it out."
        )
    stage = cli.Stage.begin("own_loop", config, model, data, game, command=args)

    # 1. Everything that can be known before a weight is read.
    rating = import_function(game.rating)
    rate = RewardMix([rating], timeout=config.reward_timeout)
    policy = stage.adapter("policy_adapter")
    plan = config.role_plan(has_policy=policy is not None, has_reward=False)
    prompts = stage.prompts(held_out=False)
    tokenizer = stage.tokenizer()
    rate.check("")
    stage.check_fit(tokenizer, policy, tokens=prompts.longest + config.response_length)

    # 2. One base in memory. Policy, critic and reference are adapters on it.
    base = stage.base(tokenizer)
    shared = SharedBase.build(
        base,
        policy or lora_config(stage.model, base),
        critic=plan.critic,
        critic_init=plan.critic_init,
        train_layers=plan.train_layers,
    )

    # 3. Play, rate, update; then leave the policy and a report.
    trainer = PPOTrainer(shared, stage.trainer_config, None, tokenizer, reward_function=rating)
    trainer.given = stage.given
    done = trainer.start(resume_from_checkpoint=stage.checkpoint)
    ids = list(prompts.train["input_ids"])
    count, figures = config.rollout_batch_size, {}
    for rollout in range(done, config.num_rollouts):
        # Each process takes prompts of its own, in order, and begins anew at the end.
        first = (rollout * config.world_size + config.process_index) * count
        chosen = [ids[(first + row) % len(ids)] for row in range(count)]
        interview = Interview(chosen, tokenizer)
        interview.play(trainer, game.questions, rate.numbers)
        figures = trainer.step(
            chosen,
            interview.written,
            interview.scores,
            response_masks=interview.own,
        )
        ratings, kl = figures["objective/raw_score"], figures["objective/kl"]
        print(f"rollout {rollout + 1}: ratings of a conversation {ratings:.3f}, KL {kl:.2f}", flush=True)
    trainer.finish()
    stage.finish(trainer, parents={"policy": policy}, figures=figures)
    return trainer


if __name__ == "__main__":
    cli.command(main)()
