"""Run the whole of PPO in one file: RLHF on one shared base, to be read from top to bottom.

    accelerate launch recipes/ppo_in_one_file.py [--any_field value]
    python recipes/ppo_in_one_file.py --policy_adapter FOLDER --reward_adapter FOLDER

By default the demo's model learns to continue film reviews, and VADER scores them. The loop:

    load the base; policy, critic, reward model and reference are adapters on it   chapter 1
    for each rollout:
        reply to a batch of prompts, and score the replies                         chapters 2 and 3
        charge the KL: one reward per token                                        chapter 4
        estimate values, and from them advantages                                  chapter 5
        for each epoch, for each minibatch:                                        chapter 6
            for each microbatch: add up the gradients of the loss                  chapter 7
            clip the gradient, make one optimizer step                             chapter 8
        log, and at the end save the policy                                        chapter 9

B replies of up to T tokens are a rollout. PPOTrainer (recipes/ppo.py) takes the same steps, faster.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import goose_lora.functional as F  # isort: skip  (before torch: how its threads wait)
import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from goose_lora import cli
from goose_lora.data.rows import load_rows
from goose_lora.data.tokenization import left_pad, tokenize_prompts
from goose_lora.errors import UserError
from goose_lora.files import append_line, import_function
from goose_lora.generation.sampling import generation_config, sample
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.endings import reply_ends
from goose_lora.models.loading import load_base, load_tokenizer, lora_config
from goose_lora.models.shared_base import SharedBase
from goose_lora.ownership import begin_in, claim
from goose_lora.sharing.export import save_policy
from goose_lora.training.launch import require_one_process


@dataclass
class Settings(ModelArguments):
    """Settings of the run, named as in PPOConfig. Those of the base and of LoRA are inherited."""

    model_name_or_path: str = "embedded"
    lora_layers: str = "top-10"  # adapters in the upper third of the demo's layers: half the time
    dataset_name: str = "embedded/prompts"  # rows with a prompt
    output_dir: str = "runs/one_file"
    policy_adapter: str | None = None  # where the policy starts: an SFT adapter, or a fresh one
    reward_adapter: str | None = None  # the reward model; without one, reward_function scores
    reward_function: str = "goose_lora.demo:vader"  # module:function or file.py:function
    seed: int = 0
    num_rollouts: int = 20
    max_prompt_tokens: int = 32  # longer prompts are left out
    response_length: int = 24  # most tokens of a reply
    temperature: float = 1.0
    kl_coef: float = 0.05  # price of a nat of KL to the reference
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # GAE's trade of bias for variance
    num_ppo_epochs: int = 2  # passes over each rollout
    num_mini_batches: int = 2  # optimizer steps per pass
    gradient_accumulation_steps: int = 2  # microbatches per optimizer step
    per_device_train_batch_size: int = 8  # replies per microbatch
    cliprange: float = 0.2  # the policy's ratio counts within 1 +- this
    cliprange_value: float = 0.2  # a value counts within its old value +- this
    vf_coef: float = 0.1  # weight of the critic's loss
    learning_rate: float = 5e-4  # of the policy, at the first step
    value_learning_rate: float = 1e-3  # of the critic, at the first step
    max_grad_norm: float = 1.0


# ---- 1. Load ----
# PPO needs four models: the policy that learns, the critic that predicts its reward, the reward
# model that scores it, and the reference that it stays near to. Here one frozen base is in memory
# once, in 4 bits (Dettmers et al. 2023, arXiv:2305.14314), and each model is a low-rank adapter on
# it (Hu et al. 2021, arXiv:2106.09685). A layer computes
#
#     W x + (alpha / r) B A x,    W frozen, A and B the active adapter's, of rank r.
#
# The critic and the reward model also have a linear head that reads one number from a hidden state.
# The critic starts as a copy of the reward model if there is one (Ouyang et al. 2022,
# arXiv:2203.02155, section 3.5); otherwise its head is 0. The reference is a frozen copy of the SFT
# adapter, or the base with all adapters off.
def load_roles(settings):
    """Return the shared base with its roles, the tokenizer and the tokenized prompts."""
    tokenizer = load_tokenizer(settings)
    name, limit = settings.dataset_name, settings.max_prompt_tokens
    rows = load_rows(name, stage="ppo")
    prompts = tokenize_prompts(rows, tokenizer, name=name, max_prompt_tokens=limit)
    base = load_base(settings, tokenizer)
    policy = settings.policy_adapter or lora_config(settings, base)
    shared = SharedBase.build(base, policy, reward=settings.reward_adapter, critic="adapter")
    return shared, tokenizer, prompts


# ---- 2. Roll out ----
# The policy pi replies to a batch of prompts x. It draws one token after the other,
#
#     y_t ~ pi(. | x, y_<t) = softmax(logits_t / temperature),
#
# up to the end-of-text token or T tokens. There is no top-k or top-p: the update computes the
# probabilities that were sampled from. The reply is the action, one token at a time (Ziegler et al.
# 2019, arXiv:1909.08593). Prompts are padded on the left, so that all replies begin in one column.
# `response_mask` (B, T) is true where a reply's token counts, its end-of-text token included.
def prompt_batches(prompts, size, seed):
    """Yield batches of `size` prompts without end, each epoch in a new random order."""
    if len(prompts) < size:
        raise UserError(f"{len(prompts)} prompts do not fill a rollout of {size}: lower num_mini_batches.")
    for epoch in itertools.count():
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed + epoch))
        yield from DataLoader(prompts, size, sampler=order.tolist(), collate_fn=list, drop_last=True)


def roll_out(shared, tokenizer, rows, settings):
    """Sample one reply to each prompt."""
    ids, mask = left_pad([row["input_ids"] for row in rows], tokenizer.pad_token_id, shared.device)
    generation = generation_config(
        response_tokens=settings.response_length,
        temperature=settings.temperature,
        eos_token_ids=reply_ends(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    return sample(shared, ids, mask, generation)


# ---- 3. Score ----
# A score s(x, y) says how good a whole reply is. The reward model has learned it from pairs of
# replies of which people preferred one (Bradley and Terry 1952; Ouyang et al. 2022, equation 1):
#
#     P(y preferred to y') = sigmoid(s(x, y) - s(x, y'))
#
# Its head reads the hidden state of the reply's last token. A Python function may score instead: a
# test suite, a classifier, a rule. It is called as TRL calls reward functions.
@torch.no_grad()
def score(shared, tokenizer, rollout, rows, function):
    """Return one score per reply (B,), by `function` or, if it is None, by the reward model."""
    if function is None:
        ids, attention, read = rollout.input_ids, rollout.attention_mask, rollout.response_tokens + 1
        ended = rollout.ends_with_token(reply_ends(tokenizer))
        return shared.judge(ids, attention, {}, ended, columns=read).scores  # of the last columns only
    replies = rollout.response_ids()
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "input_ids"}
    prompts, texts = columns.pop("prompt"), tokenizer.batch_decode(replies, skip_special_tokens=True)
    answer = function(prompts=prompts, completions=texts, completion_ids=replies, **columns)
    return torch.tensor(answer, dtype=torch.float32, device=shared.device).reshape(len(replies))


# ---- 4. KL and token rewards ----
# A policy that seeks only the score finds replies that the reward model overrates. So each token
# pays for its part of the KL divergence from the reference rho, estimated at the sampled token (k1
# of Schulman, joschu.net/blog/kl-approx.html), and the last token gets the score (Ziegler et al.
# 2019, equation 2; Ouyang et al. 2022, equation 2):
#
#     KL_t = log pi(y_t | x, y_<t) - log rho(y_t | x, y_<t)
#     r_t  = -kl_coef KL_t + [t is the last token] s(x, y)
#
# ---- 5. Values and advantages ----
# The critic predicts V_t, the reward that is still to come, from the state before token t. The
# advantage A_t says how much better a token was than the critic expected. Generalised advantage
# estimation (Schulman et al. 2016, arXiv:1506.02438, equation 16) adds up the critic's errors:
#
#     delta_t = r_t + gamma V_{t+1} - V_t,    V is 0 after the last token
#     A_t     = delta_t + gamma lam A_{t+1}
#     R_t     = A_t + V_t,                    the return, which the critic is to learn
#
# lam = 0 trusts the critic beyond the next token; lam = 1 trusts the sampled rewards. The policy
# gets whitened advantages: mean 0 and variance 1 over the tokens of the rollout.
@torch.no_grad()
def evaluate(shared, rollout, scores, settings):
    """Return what the update needs of each token, all (B, T)."""
    ids, attention, mask = rollout.input_ids, rollout.attention_mask, rollout.response_mask
    old = shared(ids, attention, mask, temperature=settings.temperature)
    hidden = shared.hidden("reference", ids, attention, columns=rollout.response_tokens + 1)
    ref_logprobs, _ = shared.logprobs(hidden, ids, mask, temperature=settings.temperature)
    kl = F.kl_per_token(old.logprobs, ref_logprobs, estimator="k1")
    rewards = F.token_rewards(scores, kl, mask, kl_coef=settings.kl_coef)
    advantages = F.gae(rewards, old.values, mask, gamma=settings.gamma, lam=settings.lam)
    tokens = {"mask": mask, "kl": kl, "logprobs": old.logprobs, "values": old.values}
    return tokens | {"returns": advantages + old.values, "advantages": F.whiten(advantages, mask)}


# ---- 6. Epochs, minibatches, microbatches ----
# A rollout is expensive, so it is used several times (Schulman et al. 2017, arXiv:1707.06347,
# algorithm 1). An epoch is one pass over it in random order, cut into minibatches of one optimizer
# step each. A minibatch is cut into microbatches of as many replies as fit into memory; their
# gradients add up. Each mean is over the tokens of the minibatch (`num_tokens`), so that the result
# does not depend on how it is cut.
#
# ---- 7. The loss ----
# The policy that sampled is pi_old. The one that learns leaves it step by step. With
#
#     ratio_t = pi(y_t) / pi_old(y_t) = exp(log pi(y_t) - log pi_old(y_t))
#
# the clipped objective (equation 7 there) no longer moves a token whose ratio has left 1 +- eps in
# its advantage's favour; eps is cliprange. The critic's squared error (equation 9) is clipped
# likewise, as in OpenAI's baselines; c is cliprange_value.
#
#     policy loss = mean max(-A_t ratio_t, -A_t clip(ratio_t, 1 - eps, 1 + eps))
#     value loss  = 1/2 mean max((V_t - R_t)^2, (clip(V_t, V_old - c, V_old + c) - R_t)^2)
#     loss        = policy loss + vf_coef value loss
#
# ---- 8. Clip and step ----
# One reply with a surprising score can undo many steps. So the gradient g of policy and critic
# together is shortened (Pascanu et al. 2013, arXiv:1211.5063), and AdamW makes the step (Loshchilov
# and Hutter 2019, arXiv:1711.05101), here without weight decay:
#
#     g <- g min(1, max_grad_norm / |g|)
def update(shared, optimizer, schedule, rollout, tokens, settings):
    """Make the optimizer steps of one rollout; return the figures of each."""
    size, steps = settings.per_device_train_batch_size, []
    for _ in range(settings.num_ppo_epochs):
        order, lengths = torch.randperm(len(rollout.lengths)), rollout.attention_mask.sum(-1)
        for minibatch in order.to(shared.device).split(size * settings.gradient_accumulation_steps):
            num_tokens, figures = tokens["mask"][minibatch].sum(), {}
            if len(minibatch) > size:  # like lengths together: less padding, the same sum
                minibatch = minibatch[lengths[minibatch].argsort(descending=True, stable=True)]
            for rows in minibatch.split(size):
                # Leave out the columns that are padding in all rows of the microbatch.
                attended, counted = rollout.attention_mask[rows].any(0), tokens["mask"][rows].any(0)
                ids = rollout.input_ids[rows][:, attended]
                attention = rollout.attention_mask[rows][:, attended]
                old = {name: x[rows][:, counted] for name, x in tokens.items()}
                new = shared(ids, attention, old["mask"], temperature=settings.temperature)
                policy_loss, policy_figures = F.policy_loss(
                    new.logprobs, old["logprobs"], old["advantages"], old["mask"],
                    cliprange=settings.cliprange, num_tokens=num_tokens,
                )  # fmt: skip
                value_loss, value_figures = F.value_loss(
                    new.values, old["values"], old["returns"], old["mask"],
                    cliprange_value=settings.cliprange_value, num_tokens=num_tokens,
                )  # fmt: skip
                (policy_loss + settings.vf_coef * value_loss).backward()
                losses = {"loss/policy": policy_loss, "loss/value": value_loss}
                for name, share in (losses | policy_figures | value_figures).items():
                    figures[name] = figures.get(name, 0.0) + share.detach()
            clip_grad_norm_(shared.parameters(), settings.max_grad_norm, error_if_nonfinite=True)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            steps.append({name: float(total) for name, total in figures.items()})
    return steps


# ---- 9. The loop: log and save ----
# The score should rise, and the KL slowly: PPO maximises score - kl_coef KL. The clip fraction is
# the share of tokens that the loss no longer moves: usually a few per cent. The explained variance
# is 1 for a perfect critic, and 0 for one no better than a constant. Read replies too: a high score
# may be a trick. The learning rate falls to 0 as in the PPO paper, lr (1 - step / steps).
def main(args=None):
    """Train the policy, and leave it in output_dir as a plain PEFT adapter, with metrics.jsonl."""
    settings = cli.parse(Settings, args=args)
    require_one_process("recipes/ppo_in_one_file.py")
    begin_in(settings.output_dir, "ppo_in_one_file", settings)
    function = None if settings.reward_adapter else import_function(settings.reward_function)
    torch.manual_seed(settings.seed)
    shared, tokenizer, prompts = load_roles(settings)

    # The optimizer has two groups of parameters, each with a learning rate that falls to 0.
    policy = [parameter for _, parameter in shared.training_parameters("policy")]
    critic = [parameter for _, parameter in shared.training_parameters("value")]
    groups = [{"params": policy}, {"params": critic, "lr": settings.value_learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0)
    steps_per_rollout = settings.num_ppo_epochs * settings.num_mini_batches
    total = settings.num_rollouts * steps_per_rollout
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (total - step) / total)

    # The seed again, so that replies do not depend on the random numbers that loading drew.
    torch.manual_seed(settings.seed)
    replies_per_step = settings.gradient_accumulation_steps * settings.per_device_train_batch_size
    batches = prompt_batches(prompts, settings.num_mini_batches * replies_per_step, settings.seed)
    claim(output := Path(settings.output_dir), "metrics.jsonl")
    (output / "metrics.jsonl").unlink(missing_ok=True)
    for number, rows in enumerate(itertools.islice(batches, settings.num_rollouts), 1):
        rollout = roll_out(shared, tokenizer, rows, settings)
        scores = score(shared, tokenizer, rollout, rows, function)
        tokens = evaluate(shared, rollout, scores, settings)
        steps = update(shared, optimizer, schedule, rollout, tokens, settings)
        explained = F.explained_variance(tokens["values"], tokens["returns"], tokens["mask"])
        figures = {
            "step": number * steps_per_rollout,
            "objective/score": scores.mean().item(),
            "objective/kl": tokens["kl"].sum(-1).mean().item(),
            "rollout/response_tokens": rollout.lengths.float().mean().item(),
            "rollout/eos_rate": rollout.ended.float().mean().item(),
            "value/explained_variance": explained.item(),
        }
        figures |= {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        append_line(output / "metrics.jsonl", figures)
        shown = ("objective/score", "objective/kl", "policy/clip_fraction", "value/explained_variance")
        print(f"rollout {number}:", *(f"{name} {figures[name]:.3f}" for name in shown))
        print("   ", repr(tokenizer.decode(rollout.prompt_ids()[0] + rollout.response_ids()[0])), flush=True)
    save_policy(shared, tokenizer, output)


if __name__ == "__main__":
    cli.command(main)()
