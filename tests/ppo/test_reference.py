"""PPOTrainer against a slow reference written from the papers, in fp64: losses, KL, advantages,
returns and every gradient to 1e-6.

The reference shares no code with the package. It runs one reply at a time, without padding and
without PEFT: an adapter is W + (alpha / r) B A put in place of each weight of a plain transformers
model. Logits are whole, log-probabilities their log_softmax, and everything after that is sums over
tokens, written out. Its gradients are autograd's through all of it.

The trainer is only watched: its rollout is frozen, and each ``compute_loss`` (a public hook) tells
what it was given and what came out.
"""

import math
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainerCallback

from goose_lora.generation.rollout import Rollout
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.microbatches import Microbatch
from goose_lora.ppo.trainer import PPOTrainer

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
ROWS, TEMPERATURE, SCALING = 6, 0.8, 2.0  # lora_alpha / r of tiny.lora
# Prompt, reply, ended
LENGTHS = ((4, 5, True), (2, 3, True), (5, 6, False), (3, 1, True), (5, 6, True), (1, 4, True))


def frozen_rollout(group_size):
    """Ragged replies to left-padded prompts; replies to one prompt stand together."""
    generator = torch.Generator().manual_seed(5)
    prompts, width, longest = [], max(p for p, _, _ in LENGTHS), max(r for _, r, _ in LENGTHS)
    ids, attention = (
        torch.full((ROWS, width + longest), tiny.PAD),
        torch.zeros(ROWS, width + longest, dtype=torch.long),
    )
    mask = torch.zeros(ROWS, longest, dtype=torch.bool)
    for row, (prompt, reply, ended) in enumerate(LENGTHS):
        prompts.append(
            torch.randint(4, tiny.VOCABULARY, (prompt,), generator=generator)
            if row % group_size == 0
            else prompts[-1]
        )
        tokens = torch.randint(4, tiny.VOCABULARY, (reply,), generator=generator)
        tokens[-1] = tiny.EOS if ended else tokens[-1]
        ids[row, width - len(prompts[-1]) : width] = prompts[-1]
        ids[row, width : width + reply] = tokens
        attention[row, width - len(prompts[-1]) : width + reply] = 1
        mask[row, :reply] = True
    # As another sampler drew them, which found some a third as likely as the policy, and less
    drawn = -2.0 - 3.0 * torch.rand(mask.shape, generator=torch.Generator().manual_seed(6))
    return Rollout(ids, attention, mask, torch.tensor([ended for _, _, ended in LENGTHS]), drawn)


@dataclass
class Call:
    """What one ``compute_loss`` was given, what the trainable tensors were then, and the loss."""

    inputs: Microbatch
    weights: dict[str, torch.Tensor]
    loss: float


@dataclass
class Watch(TrainerCallback):
    calls: list[Call] = field(default_factory=list)
    steps: list[tuple[list[Call], dict[str, torch.Tensor]]] = field(default_factory=list)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        self.steps.append((self.calls, gradients))
        self.calls = []


def reward_adapter(folder):
    judge = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("llama", **tiny.ARCHITECTURES["llama"], num_labels=1)
    )
    adapter = get_peft_model(judge, tiny.lora(tiny.base(), layers="top-2", task_type="SEQ_CLS"))
    tiny.randomise(adapter, std=0.3)
    adapter.save_pretrained(folder)
    return folder


def watched_run(folder, critic, **settings):
    """Two rollouts of two passes, each of one optimizer step of three microbatches; the second
    rollout begins with a policy that has moved."""
    base = tiny.base()
    policy = tiny.lora(base, layers="top-2")
    shared = SharedBase.build(base, policy, reward=reward_adapter(folder / "reward"), critic=critic).double()
    if critic == "adapter":
        tiny.randomise(shared, "value", seed=7)
    elif critic is not None:
        torch.nn.init.normal_(
            shared.score_head("value").weight, std=0.3, generator=torch.Generator().manual_seed(7)
        )
    everything = {
        "num_rollouts": 2,
        "num_ppo_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "response_length": 6,
        "temperature": TEMPERATURE,
        "kl_coef": 0.3,
        "vf_coef": 0.4,
        "cliprange": 0.02,
        "cliprange_value": 0.05,
        "ratio_threshold": None,
        "gamma": 0.97,
        "lam": 0.9,
        "missing_eos_penalty": 0.7,
        "entropy_coef": 0.05,
        "max_grad_norm": 0,
        "optim": "sgd",
        "learning_rate": 0.02,
        "score_calibration_prompts": ROWS,
        "rollout_weights": "shared",
    } | settings
    fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 0}
    config = PPOConfig(output_dir=str(folder / "run"), **everything, **fixed)
    prompts = Dataset.from_list([{"input_ids": [4 + row, 9, 5]} for row in range(12)])
    watch = Watch()
    trainer = PPOTrainer(shared, config, prompts, tiny.tokenizer(), callbacks=[watch])
    rollout = frozen_rollout(config.num_generations)
    trainer.collector.generate = lambda *args, **kwargs: rollout
    compute_loss = trainer.compute_loss

    def watched(model, inputs, **kwargs):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss = compute_loss(model, inputs, **kwargs)
        watch.calls.append(Call(inputs, weights, loss.item()))
        return loss

    trainer.compute_loss = watched
    trainer.train()
    return trainer, watch, rollout


# ---- The reference ----


class Slow:
    """The four models and PPO's loss, from one set of weights (names as in ``SharedBase``), one
    reply at a time."""

    def __init__(self, rollout, config, critic):
        self.base: Any = tiny.base().double()
        self.drawn = [
            row[keep].tolist()
            for row, keep in zip(rollout.sampling_logprobs, rollout.response_mask, strict=True)
        ]
        self.config, self.critic, self.ended = config, critic, rollout.ended.tolist()
        self.prompts, self.replies = rollout.prompt_ids(), rollout.response_ids()

    def states(self, weights, adapter, text):
        """Last hidden states (L, H) of one unpadded text under an adapter: each weight is W +
        (alpha / r) B A."""
        changed = {}
        for name in [name for name in weights if f".lora_A.{adapter}." in name]:
            module = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
            b_a = weights[name.replace("lora_A", "lora_B")] @ weights[name]
            changed[f"{module}.weight"] = self.base.get_parameter(f"{module}.weight") + SCALING * b_a
        inner = {name.removeprefix("model."): value for name, value in changed.items()}
        return functional_call(
            self.base.model, inner, kwargs={"input_ids": torch.tensor([text]), "use_cache": False}
        ).last_hidden_state[0]

    def distributions(self, weights, adapter, row):
        """log softmax(logits / temperature) (T, V), from which each token of the reply was
        drawn."""
        prompt, reply = self.prompts[row], self.replies[row]
        logits = self.states(weights, adapter, prompt + reply) @ self.base.lm_head.weight.T
        return torch.log_softmax(logits[len(prompt) - 1 : -1] / TEMPERATURE, dim=-1)

    def values(self, weights, row):
        adapter = {"adapter": "value", "shared": "default", "reward_features": "reward"}[self.critic]
        prompt, reply = self.prompts[row], self.replies[row]
        head = weights["base_model.model.score.modules_to_save.value.weight"][0]
        states = self.states(weights, adapter, prompt + reply)
        return [states[len(prompt) - 1 + t] @ head for t in range(len(reply))]

    def score(self, weights, row):
        head = weights["base_model.model.score.modules_to_save.reward.weight"][0]
        raw = self.states(weights, "reward", self.prompts[row] + self.replies[row])[-1] @ head
        return raw.float().item()  # scores are fp32 numbers, whoever gave them

    def experience(self, weights):
        """Rewards, values, advantages and returns of the rollout, as lists of floats, under the
        weights that it is made with."""
        config, rows = self.config, range(ROWS)
        raw = [self.score(weights, row) for row in rows]
        mean, std = fmean(raw), stdev(raw)
        policy = [self.distributions(weights, "default", row) for row in rows]
        reference = [self.distributions(weights, "no adapter", row) for row in rows]
        self.old = [[policy[row][t, y].item() for t, y in enumerate(self.replies[row])] for row in rows]
        self.reference = [
            [reference[row][t, y].item() for t, y in enumerate(self.replies[row])] for row in rows
        ]
        self.rewards, self.kl = [], 0.0
        for row in rows:
            kls = [
                self.kl_of(policy[row][t], reference[row][t], y).item()
                for t, y in enumerate(self.replies[row])
            ]
            self.kl += (
                sum(old - ref for old, ref in zip(self.old[row], self.reference[row], strict=True)) / ROWS
            )
            rewards = [-config.kl_coef * kl if config.kl_location == "reward" else 0.0 for kl in kls]
            rewards[-1] += (raw[row] - mean) / std - (0.0 if self.ended[row] else config.missing_eos_penalty)
            self.rewards.append(rewards)
        if self.critic is None:
            self.advantages = [
                [a] * len(reply) for a, reply in zip(self.against_the_group(), self.replies, strict=True)
            ]
            return
        # A critic that started as the reward model speaks in its units; one with a head of zero
        # speaks in those of the normalised score.
        shift, scale = (mean, std) if self.critic != "shared" else (0.0, 1.0)
        self.in_scores = lambda value: (value - shift) / scale
        self.old_values = [[self.in_scores(v.item()) for v in self.values(weights, row)] for row in rows]
        if config.whiten_rewards:
            flat = [r for row in self.rewards for r in row]
            deviation = (fmean((r - fmean(flat)) ** 2 for r in flat) + 1e-8) ** 0.5
            self.rewards = [
                [(r - fmean(flat)) / deviation + fmean(flat) for r in row] for row in self.rewards
            ]
        plain = [self.gae(*both, config.lam) for both in zip(self.rewards, self.old_values, strict=True)]
        # The critic's by a lambda of its own (VC-PPO): with 1, all that is earned from there on
        lam = config.lam if config.lam_critic is None else config.lam_critic
        ahead = [self.gae(*both, lam) for both in zip(self.rewards, self.old_values, strict=True)]
        self.returns = [
            [a + v for a, v in zip(*both, strict=True)] for both in zip(ahead, self.old_values, strict=True)
        ]
        flat = [a for row in plain for a in row]
        centre = fmean(flat)
        deviation = (fmean((a - centre) ** 2 for a in flat) + 1e-8) ** 0.5
        self.advantages = [[(a - centre) / deviation for a in row] for row in plain]

    def against_the_group(self):
        """RLOO: less the mean of the others. GRPO: in sample standard deviations of the group, plus
        1e-4."""
        size, sums = self.config.num_generations, [sum(rewards) for rewards in self.rewards]
        found = []
        for row, own in enumerate(sums):
            group = sums[row // size * size : row // size * size + size]
            if self.config.advantage_estimator == "rloo":
                found.append(own - (sum(group) - own) / (size - 1))
            else:
                found.append((own - fmean(group)) / (stdev(group) + 1e-4))
        return found

    def gae(self, rewards, values, lam):
        """Each advantage as the sum over all later steps of (gamma lambda)^k delta
        (arXiv:1506.02438, eq. 16)."""
        gamma, end = self.config.gamma, len(rewards)
        ahead = [*values[1:], 0.0]
        delta = [rewards[t] + gamma * ahead[t] - values[t] for t in range(end)]
        return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, end)) for t in range(end)]

    def kl_of(self, policy, reference, token):
        log_ratio = policy[token] - reference[token]
        if self.config.kl_estimator == "exact":
            return sum(policy[v].exp() * (policy[v] - reference[v]) for v in range(tiny.VOCABULARY))
        return {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": (-log_ratio).exp() - 1 + log_ratio}[
            self.config.kl_estimator
        ]

    def weight(self, row, t):
        """The truncated (TIS) or masked (MIS) weight of a token, by what its sampler thought."""
        correction, cap = self.config.sampling_correction, self.config.sampling_correction_cap
        if correction is None:
            return 1.0
        weight = math.exp(self.old[row][t] - self.drawn[row][t])
        self.capped += weight > cap
        return min(weight, cap) if correction == "truncate" else weight * (weight <= cap)

    def loss(self, weights):
        """Everything that one optimizer step minimises: a mean over the rollout's tokens. Counts
        the clipped ones."""
        config, terms = self.config, []
        self.policy_terms, self.value_terms, self.clipped, self.values_clipped = [], [], 0, 0
        self.capped = 0
        for row in range(ROWS):
            log_p = self.distributions(weights, "default", row)
            log_q = self.distributions(weights, "no adapter", row).detach()
            values = None if self.critic is None else [self.in_scores(v) for v in self.values(weights, row)]
            for t, token in enumerate(self.replies[row]):
                advantage = self.advantages[row][t]
                ratio = torch.exp(log_p[t, token] - self.old[row][t])
                high = config.cliprange_high or config.cliprange
                bound = torch.clamp(ratio, 1 - config.cliprange, 1 + high)
                gain = min(ratio * advantage, bound * advantage)
                self.clipped += bool(bound != ratio and bound * advantage < ratio * advantage)
                gain = gain * self.weight(row, t)
                self.policy_terms.append(-gain)
                entropy = -(log_p[t].exp() * log_p[t]).sum()
                term = -gain - config.entropy_coef * entropy
                if values is not None:
                    target, old = self.returns[row][t], self.old_values[row][t]
                    near = torch.clamp(values[t], old - config.cliprange_value, old + config.cliprange_value)
                    squared = max((values[t] - target) ** 2, (near - target) ** 2)
                    self.values_clipped += bool((near - target) ** 2 > (values[t] - target) ** 2)
                    self.value_terms.append(squared / 2)
                    term = term + config.vf_coef * squared / 2
                if config.kl_location == "loss":
                    weight = 1.0
                    if config.kl_importance_weight:
                        weight = ratio.item() if config.kl_estimator == "k2" else ratio
                    term = term + config.kl_coef * weight * self.kl_of(log_p[t], log_q[t], token)
                terms.append(term)
        return sum(terms) / len(terms)


MODES = {
    "gae, own critic, k1": {"critic": "adapter"},
    "gae, own critic, k1, whitened rewards": {"critic": "adapter", "whiten_rewards": True},
    "gae, own critic, k2": {"critic": "adapter", "kl_estimator": "k2"},
    "gae, own critic, k3": {"critic": "adapter", "kl_estimator": "k3"},
    "gae, own critic, exact KL": {"critic": "adapter", "kl_estimator": "exact"},
    "gae, own critic, k2 in the loss": {"critic": "adapter", "kl_estimator": "k2", "kl_location": "loss"},
    "gae, own critic, k3 in the loss": {"critic": "adapter", "kl_estimator": "k3", "kl_location": "loss"},
    "gae, own critic, exact KL in the loss": {
        "critic": "adapter",
        "kl_estimator": "exact",
        "kl_location": "loss",
    },
    "gae, a lambda for the critic": {"critic": "adapter", "lam_critic": 1.0},
    "gae, own critic, weighed k2 in the loss": (
        {"critic": "adapter", "kl_estimator": "k2", "kl_location": "loss", "kl_importance_weight": True}
    ),
    "grpo, truncated weights": (
        {"critic": None, "advantage_estimator": "grpo", "num_generations": 2, "cliprange": 0.002}
        | {"sampling_correction": "truncate"}
    ),
    "rloo, masked weights": (
        {"critic": None, "advantage_estimator": "rloo", "num_generations": 2, "cliprange": 0.002}
        | {"sampling_correction": "mask", "sampling_correction_cap": 2.0}
    ),
    "gae, critic on the policy": {"critic": "shared"},
    "gae, critic on the reward model": {"critic": "reward_features", "value_learning_rate": 0.3},
    "rloo": {"critic": None, "advantage_estimator": "rloo", "num_generations": 2, "cliprange": 0.002},
    "rloo, clip-higher": (
        {"critic": None, "advantage_estimator": "rloo", "num_generations": 2}
        | {"cliprange": 0.002, "cliprange_high": 0.01}
    ),
    "grpo": {"critic": None, "advantage_estimator": "grpo", "num_generations": 2, "cliprange": 0.002},
    "grpo, k3 in the loss": (
        {"critic": None, "advantage_estimator": "grpo", "num_generations": 2, "cliprange": 0.002}
        | {"kl_estimator": "k3", "kl_location": "loss"}
    ),
    "grpo, weighed k3 in the loss": (
        {"critic": None, "advantage_estimator": "grpo", "num_generations": 2, "cliprange": 0.002}
        | {"kl_estimator": "k3", "kl_location": "loss", "kl_importance_weight": True}
    ),
}


def beside(slow, rows, calls, name):
    """Each reply's ``name`` as the trainer had it, where it counts, and the reference's.
    Microbatches are shuffled: texts tell which is which."""
    by_text = {
        (*prompt, *reply): row for prompt, reply, row in zip(slow.prompts, slow.replies, rows, strict=True)
    }
    for call in calls:
        for row, (ids, attended, mask) in enumerate(
            zip(call.inputs.input_ids, call.inputs.attention_mask, call.inputs.response_mask, strict=True)
        ):
            yield (
                getattr(call.inputs, name)[row][mask],
                torch.tensor(by_text[tuple(ids[attended.bool()].tolist())], dtype=torch.float64),
            )


@pytest.mark.parametrize("mode", MODES)
def test_the_trainer_is_the_papers(mode, tmp_path):
    settings = dict(MODES[mode])
    trainer, watch, rollout = watched_run(tmp_path, **settings)
    slow = Slow(rollout, trainer.args, settings["critic"])
    assert len(watch.steps) == 4 and all(len(calls) == 3 for calls, _ in watch.steps)
    for number, (calls, gradients) in enumerate(watch.steps):
        if number % 2 == 0:  # a new rollout
            slow.experience(calls[0].weights)
            told = [
                ("old_logprobs", slow.old),
                ("ref_logprobs", slow.reference),
                ("advantages", slow.advantages),
            ]
            if slow.critic is not None:
                told += [("old_values", slow.old_values), ("returns", slow.returns)]
            for name, rows in told:
                for got, want in beside(slow, rows, calls, name):
                    torch.testing.assert_close(
                        got, want, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
                    )
        weights = {
            name: value.clone().requires_grad_(name in gradients) for name, value in calls[0].weights.items()
        }
        loss = slow.loss(weights)
        assert sum(call.loss for call in calls) == pytest.approx(loss.item(), abs=1e-6)
        wanted = torch.autograd.grad(loss, [weights[name] for name in gradients])
        for (name, got), want in zip(gradients.items(), wanted, strict=True):
            assert want.abs().max() > 1e-6 or (number == 0 and "lora_A.default" in name), (
                f"{name}: the reference has no gradient"
            )
            torch.testing.assert_close(got, want, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    assert abs(slow.kl) > 1e-3, "the policy of the second rollout is still the reference"
    assert 0 < slow.clipped < len(slow.policy_terms)
    assert slow.critic is None or 0 < slow.values_clipped < len(slow.value_terms)
    assert trainer.args.sampling_correction is None or 0 < slow.capped < len(slow.policy_terms)
    shown = [row for row in trainer.state.log_history if "objective/kl" in row][-1]
    assert shown["objective/kl"] == pytest.approx(slow.kl, abs=1e-6)


def test_losses_are_logged_as_the_reference_has_them(tmp_path):
    trainer, watch, rollout = watched_run(tmp_path, "adapter", num_rollouts=1, num_ppo_epochs=1)
    slow = Slow(rollout, trainer.args, "adapter")
    slow.experience(watch.steps[0][0][0].weights)
    slow.loss(watch.steps[0][0][0].weights)
    shown = next(row for row in trainer.state.log_history if "loss/policy" in row)
    assert shown["loss/policy"] == pytest.approx(fmean(x.item() for x in slow.policy_terms), abs=1e-6)
    assert shown["loss/value"] == pytest.approx(fmean(x.item() for x in slow.value_terms), abs=1e-6)


def test_every_trainable_tensor_was_compared(tmp_path):
    trainer, watch, _ = watched_run(tmp_path, "adapter", num_rollouts=1, num_ppo_epochs=1)
    names = {name for name, _ in trainer.shared.role_parameters("policy")} | {
        name for name, _ in trainer.shared.role_parameters("value")
    }
    assert watch.steps[0][1].keys() == names and len(names) == 2 * 2 * 7 * 2 + 1
    assert {gradient.dtype for gradient in watch.steps[0][1].values()} == {torch.float64}


def test_with_a_lambda_of_one_the_critic_learns_what_is_earned_and_the_policy_as_before(tmp_path):
    runs = {}
    for lam in (None, 1.0):
        folder = tmp_path / str(lam)
        trainer, watch, rollout = watched_run(
            folder, "adapter", num_rollouts=1, num_ppo_epochs=1, lam_critic=lam
        )
        shown = next(row for row in trainer.state.log_history if "advantage/std" in row)
        runs[lam] = Slow(rollout, trainer.args, "adapter"), watch.steps[0][0], shown
    slow, calls, shown = runs[1.0]
    slow.experience(calls[0].weights)
    gamma = trainer.args.gamma
    earned = [
        [sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))]
        for row in slow.rewards
    ]
    for got, want in beside(slow, earned, calls, "returns"):
        torch.testing.assert_close(got, want, **TOLERANCE)
    for one, other in zip(calls, runs[None][1], strict=True):
        assert torch.equal(one.inputs.advantages, other.inputs.advantages)
        assert not torch.allclose(one.inputs.returns, other.inputs.returns)
    assert shown["advantage/std"] == runs[None][2]["advantage/std"]
