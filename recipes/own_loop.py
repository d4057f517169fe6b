"""A loop of your own: a text environment of several turns, with PPO's generate and step.

    accelerate launch recipes/own_loop.py --config recipes/configs/demo_cpu/own_loop.yaml
    [--any_field value]

A critic at the ticket desk is asked two things about a film. The policy goes on from the opening of
a review; the environment answers with a question of its own, and the policy goes on again. Each
turn is rated by itself, on the token that ends it; the environment's tokens are read
and never trained on. Replace ``Interview`` by a game, a tool or a person: what the trainer wants is
token ids, scores and a mask.
"""

from dataclasses import dataclass, field

from goose_lora import cli, embedded
from goose_lora.cli.stage import begin, finish
from goose_lora.data.rows import DataArguments, load_rows
from goose_lora.data.tokenization import tokenize_prompts
from goose_lora.errors import UserError
from goose_lora.files import import_function
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.compatibility import check_fit
from goose_lora.models.loading import load_base, load_tokenizer, lora_config, require_adapter
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.trainer import PPOTrainer
from goose_lora.sharing import hub
from goose_lora.sharing.export import save_policy
from goose_lora.sharing.lineage import fingerprint


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


def main(args: list[str] | None = None) -> None:
    config, model_args, data_args, game = cli.parse(
        PPOConfig, ModelArguments, DataArguments, InterviewArguments, args=args
    )
    if config.num_rollouts is None:
        raise UserError(
            "num_rollouts: a loop of your own needs to know how long it is, for the learning rate's schedule."
        )
    model_args.model_name_or_path = embedded.resolve(model_args.model_name_or_path)
    rate = import_function(game.rating)
    game.policy_adapter = require_adapter("policy_adapter", game.policy_adapter, model_args)
    start = begin("own_loop", config, model_args, game.policy_adapter)
    rows = load_rows(
        embedded.resolve(data_args.dataset_name),
        data_args.dataset_split,
        data_args.max_rows,
        data_args.column_mapping,
        stage="ppo",
    )
    tokenizer = load_tokenizer(model_args, trust_remote_code=config.trust_remote_code)
    prompts = tokenize_prompts(
        rows, tokenizer, name=data_args.dataset_name, max_prompt_tokens=config.max_prompt_tokens
    )["input_ids"]
    tokens = max(map(len, prompts)) + config.response_length
    check_fit(
        model_args,
        tokenizer,
        {"policy_adapter": game.policy_adapter},
        tokens=tokens,
        trust_remote_code=config.trust_remote_code,
    )

    base = load_base(model_args, tokenizer, device=config.device, trust_remote_code=config.trust_remote_code)
    plan = config.role_plan(has_policy=game.policy_adapter is not None, has_reward=False)
    starts = {"critic": plan.critic, "critic_init": plan.critic_init, "train_layers": plan.train_layers}
    shared = SharedBase.build(base, game.policy_adapter or lora_config(model_args, base), **starts)
    trainer = PPOTrainer(shared, hub.without_trainers_push(config), None, tokenizer)
    done = trainer.start(resume_from_checkpoint=start)
    count, figures = config.rollout_batch_size, {}
    for rollout in range(done, config.num_rollouts):
        first = (rollout * config.world_size + config.process_index) * count
        chosen = [prompts[(first + row) % len(prompts)] for row in range(count)]
        interview = Interview(chosen, tokenizer)
        interview.play(trainer, game.questions, rate)
        figures = trainer.step(chosen, interview.written, interview.scores, response_masks=interview.own)
        print(
            f"rollout {rollout + 1}: ratings of a conversation {figures['objective/raw_score']:.3f}, KL"
            f" {figures['objective/kl']:.2f}",
            flush=True,
        )
    trainer.finish()
    if trainer.is_world_process_zero():
        save_policy(shared, tokenizer, config.output_dir)
        data = [fingerprint(data_args.dataset_name, data_args.dataset_split, rows)]
        options = {
            "figures": figures,
            "tokenizer": tokenizer,
            "data": data,
            "parents": {"policy": game.policy_adapter},
            "args": args,
        }
        finish("own_loop", config, model_args, data_args, game, **options)


if __name__ == "__main__":
    cli.command(main)()
