"""One PPO step on every kind of base, and each of its views beside the model of plain transformers
and PEFT that it stands for."""

import copy
import itertools
from pathlib import Path
from typing import NamedTuple

import tiny
import tiny_runs
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import TrainerCallback

from goose_lora.models.loading import load_base, load_reward_base, load_tokenizer
from goose_lora.models.role_outputs import before_response
from goose_lora.models.shared_base import SharedBase

QUANTIZATIONS, DTYPES = ("none", "int8", "nf4"), ("float32", "bfloat16")
BASES = list(itertools.product(tiny.ARCHITECTURES, QUANTIZATIONS, DTYPES))
CPU = torch.device("cpu")
ROLES = list(itertools.product(("adapter", "shared"), ("base", "copy")))  # critic, reference
LAYERS = {"gpt2": "n_layer"}
STEP = {
    "num_rollouts": 1,
    "num_mini_batches": 1,
    "num_ppo_epochs": 1,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 4,
    "response_length": 3,
    "score_normalization": "none",
    "learning_rate": 0.1,
    "sample_rows": 0,
}


class Step(NamedTuple):
    """What a step left: gradients by name, what was logged, and which parameters it changed."""

    gradients: dict
    logged: dict
    changed: set


class Gradients(TrainerCallback):
    """Those of the last optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Architecture:
    """Folders of a base of two layers, and of a policy and a reward model on it."""

    def __init__(self, folder: Path, name: str):
        self.base = tiny.save_base(folder / "base", name, **{LAYERS.get(name, "num_hidden_layers"): 2})
        args = tiny.arguments(self.base)
        for role, load, task in (("policy", load_base, "CAUSAL_LM"), ("reward", load_reward_base, "SEQ_CLS")):
            model = load(args, load_tokenizer(args))
            adapter = get_peft_model(model, tiny.lora(model, task_type=task))
            tiny.randomise(adapter)
            adapter.save_pretrained(folder / role)
        self.policy, self.reward = folder / "policy", folder / "reward"


class Base:
    """One base, quantized and in a dtype, and the plain models on it: a language model with two
    adapters, and a classifier with two."""

    def __init__(self, architecture: Architecture, quantization: str, dtype: str, device: torch.device = CPU):
        self.architecture, self.dtype = architecture, getattr(torch, dtype)
        self.device = device
        args = tiny.arguments(architecture.base, quantization=quantization, dtype=dtype)
        tokenizer = load_tokenizer(args)
        self.base, causal = (load_base(args, tokenizer, device=self.device) for _ in range(2))
        self.lora = tiny.lora(self.base)
        self.causal = PeftModel.from_pretrained(causal, architecture.policy, "policy").eval()
        self.judge = PeftModel.from_pretrained(
            load_reward_base(args, tokenizer, device=self.device), architecture.reward, "reward"
        ).eval()
        self.causal.load_adapter(architecture.policy, "reference")
        self.judge.load_adapter(architecture.reward, "value")
        self.steps: dict[tuple, Step] = {}

    def step(self, folder: Path, critic: str, reference: str, checkpointing: bool) -> SharedBase:
        """A rollout and an optimizer step."""
        torch.manual_seed(4)  # of a fresh adapter
        base, gradients = copy.deepcopy(self.base), Gradients()
        policy = self.architecture.policy if reference == "copy" else self.lora
        shared = SharedBase.build(
            base, policy, reward=self.architecture.reward, critic=critic, reference=reference
        )
        tiny.randomise(shared, "value", seed=3)
        before = {name: parameter.detach().clone() for name, parameter in shared.named_parameters()}
        how = STEP | {"gradient_checkpointing": checkpointing, "use_cpu": self.device.type == "cpu"}
        ppo = tiny_runs.trainer(
            folder, shared=shared, reward=None, rows=tiny_runs.prompt_rows(4), callbacks=[gradients], **how
        )
        ppo.train()
        changed = {
            name for name, parameter in shared.named_parameters() if not torch.equal(parameter, before[name])
        }
        self.steps[critic, reference, checkpointing] = Step(
            gradients.seen, tiny_runs.logged(folder)[0], changed
        )
        return shared.eval()

    # ---- The same from plain models, which have read what the step has saved ----

    def read(self, folder: Path, reference: str, critic: str) -> None:
        self.own_reference = reference == "copy"
        places = [(self.causal, "policy", folder), (self.judge, "reward", folder / "reward")]
        places += [(self.causal, "reference", folder / "reference")] if self.own_reference else []
        places += [(self.judge, "value", folder / "value")] if critic == "adapter" else []
        for model, adapter, place in places:
            weights = load_peft_weights(str(place), device="cpu")
            assert not set_peft_model_state_dict(model, weights, adapter).unexpected_keys
            assert len(weights) == sum(f".{adapter}." in name for name, _ in model.named_parameters())
        self.head = load_peft_weights(str(folder / "value"), device=self.device.type)[
            "base_model.model.score.weight"
        ][0]

    @torch.no_grad()
    def plain(self, adapter: str | None, ids: torch.Tensor, mask: torch.Tensor):
        """The output of one of the plain models under one of its adapters, or of the bare language
        model."""
        model = self.judge if adapter in ("reward", "value") else self.causal
        if adapter is not None:
            model.set_adapter(adapter)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            inputs = {
                "input_ids": ids,
                "attention_mask": mask,
                "position_ids": positions,
                "use_cache": False,
                "output_hidden_states": True,
            }
            if adapter is None:
                with model.disable_adapter():
                    return model(**inputs)
            return model(**inputs)

    def logprobs(
        self, adapter: str | None, ids: torch.Tensor, mask: torch.Tensor, response: torch.Tensor
    ) -> torch.Tensor:
        tokens = response.shape[1]
        log_p = self.plain(adapter, ids, mask).logits[:, -tokens - 1 : -1].float().log_softmax(-1)
        return log_p.gather(-1, ids[:, -tokens:, None]).squeeze(-1)[response]

    def scores(self, adapter: str, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Of texts whose last token is the last of the row."""
        return self.plain(adapter, ids, mask).logits[:, 0].float()


def cells(full: bool) -> list[tuple]:
    """All, or two of each base, with checkpointing and without: every pair of values of two
    settings occurs."""
    few = [(base, ROLES[(number + number // 6) % 4]) for number, base in enumerate(BASES)]
    chosen = list(itertools.product(BASES, ROLES)) if full else few
    return [(*base, *roles, checkpointing) for base, roles in chosen for checkpointing in (False, True)]


# float32 sums in another order; bf16 has three digits, and the plain models round the heads' output
# to it too.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def assert_step(base, critic, reference, checkpointing, folder):
    """One cell; returns the shared base after its step."""
    shared = base.step(folder, critic, reference, checkpointing)
    step = base.steps[critic, reference, checkpointing]
    assert all(torch.tensor(value).isfinite() for value in step.logged.values())
    assert_gradients(shared, step, fresh=reference == "base")
    other = base.steps.get((critic, reference, not checkpointing))
    if other is not None:
        assert step.gradients.keys() == other.gradients.keys()
        for name, gradient in step.gradients.items():
            torch.testing.assert_close(
                gradient, other.gradients[name], rtol=0, atol=1e-5 * max(1.0, gradient.abs().max().item())
            )
    shared.save_pretrained(folder / "saved")
    base.read(folder / "saved", reference, critic)
    assert_views(shared, base, critic, reference)
    return shared


def assert_gradients(shared, step, *, fresh):
    """Of policy and critic, all of them and no other; and what has one, and nothing else, is
    changed."""
    trained = {name for role in ("policy", "value") for name, _ in shared.role_parameters(role)}
    assert step.gradients.keys() == trained
    assert all(gradient.isfinite().all() for gradient in step.gradients.values())
    still = {name for name, gradient in step.gradients.items() if not gradient.any()}
    # B is 0 in a fresh adapter: no gradient reaches A before B has moved.
    assert still == ({name for name in trained if "lora_A.default" in name} if fresh else set())
    assert step.changed == trained - still


def assert_views(shared, base, critic, reference):
    ids, mask, response = (x.to(base.device) for x in (*tiny.batch((9, 6, 8)), tiny.response_mask((4, 4, 4))))
    tolerance = TOLERANCE[base.dtype]
    seen = {}
    with torch.no_grad():
        for role, adapter in (
            ("policy", "policy"),
            ("reference", "reference" if reference == "copy" else None),
        ):
            got, _ = shared.logprobs(shared.hidden(role, ids, mask), ids, response)
            seen[role] = got[response]
            close(seen[role], base.logprobs(adapter, ids, mask, response), tolerance)
        seen["reward"] = shared.scores(ids, mask)
        close(seen["reward"], base.scores("reward", ids, mask), tolerance)
        values = shared.values(shared.hidden(shared.value_states, ids, mask), response)
        # The last value is read where the score of the text without its last token is
        if critic == "adapter":
            close(values[:, -1], base.scores("value", ids[:, :-1], mask[:, :-1]), tolerance)
        else:
            states = before_response(base.plain("policy", ids, mask).hidden_states[-1], response)
            close(values, states.float() @ base.head, tolerance)
    assert (seen["policy"] - seen["reference"]).abs().max() > 3 * tolerance, "the step must show"
    assert (values[:, -1] - seen["reward"]).abs().max() > 3 * tolerance, "critic and reward model must differ"


def close(got, want, tolerance):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
