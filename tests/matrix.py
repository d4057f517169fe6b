"""One PPO step on every kind of base, and each of its views beside the model of plain transformers and PEFT that it stands for."""

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

from goose_lora.loading import load_base, load_reward_base, load_tokenizer
from goose_lora.shared_base import SharedBase

QUANTIZATIONS, DTYPES = ("none", "int8", "nf4"), ("float32", "bfloat16")
BASES = list(itertools.product(tiny.ARCHITECTURES, QUANTIZATIONS, DTYPES))
CPU = torch.device("cpu")
ROLES = list(itertools.product(("adapter", "shared"), ("base", "copy")))  # critic, reference
LAYERS = {"gpt2": "n_layer"}
STEP = {
    "num_rollouts": 1, "num_mini_batches": 1, "num_ppo_epochs": 1, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4,
    "response_length": 3, "score_normalization": "none", "learning_rate": 0.1, "sample_rows": 0,
}  # fmt: skip


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
    """One base, quantized and in a dtype, and the plain models on it: a language model with two adapters, and a classifier with two."""

    def __init__(self, architecture: Architecture, quantization: str, dtype: str, device: torch.device = CPU):
        self.architecture, self.dtype = architecture, getattr(torch, dtype)
        self.device = device
        args = tiny.arguments(architecture.base, quantization=quantization, dtype=dtype)
        tokenizer = load_tokenizer(args)
        self.base, causal = (load_base(args, tokenizer, device=self.device) for _ in range(2))
        self.lora = tiny.lora(self.base)
        self.causal = PeftModel.from_pretrained(causal, architecture.policy, "policy").eval()
        self.judge = PeftModel.from_pretrained(load_reward_base(args, tokenizer, device=self.device), architecture.reward, "reward").eval()
        self.causal.load_adapter(architecture.policy, "reference")
        self.judge.load_adapter(architecture.reward, "value")
        self.steps: dict[tuple, Step] = {}

    def step(self, folder: Path, critic: str, reference: str, checkpointing: bool) -> SharedBase:
        """A rollout and an optimizer step."""
        torch.manual_seed(4)  # of a fresh adapter
        base, gradients = copy.deepcopy(self.base), Gradients()
        policy = self.architecture.policy if reference == "copy" else self.lora
        shared = SharedBase.build(base, policy, reward=self.architecture.reward, critic=critic, reference=reference)
        tiny.randomise(shared, "value", seed=3)
        before = {name: parameter.detach().clone() for name, parameter in shared.named_parameters()}
        how = STEP | {"gradient_checkpointing": checkpointing, "use_cpu": self.device.type == "cpu"}
        ppo = tiny_runs.trainer(folder, shared=shared, reward=None, rows=tiny_runs.prompt_rows(4), callbacks=[gradients], **how)
        ppo.train()
        changed = {name for name, parameter in shared.named_parameters() if not torch.equal(parameter, before[name])}
        self.steps[critic, reference, checkpointing] = Step(gradients.seen, tiny_runs.logged(folder)[0], changed)
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
        self.head = load_peft_weights(str(folder / "value"), device=self.device.type)["base_model.model.score.weight"][0]

    @torch.no_grad()
    def plain(self, adapter: str | None, ids: torch.Tensor, mask: torch.Tensor):
        """The output of one of the plain models under one of its adapters, or of the bare language model."""
        model = self.judge if adapter in ("reward", "value") else self.causal
        if adapter is not None:
            model.set_adapter(adapter)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False, "output_hidden_states": True}
            if adapter is None:
                with model.disable_adapter():
                    return model(**inputs)
            return model(**inputs)

    def logprobs(self, adapter: str | None, ids: torch.Tensor, mask: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
        tokens = response.shape[1]
        log_p = self.plain(adapter, ids, mask).logits[:, -tokens - 1 : -1].float().log_softmax(-1)
        return log_p.gather(-1, ids[:, -tokens:, None]).squeeze(-1)[response]

    def scores(self, adapter: str, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Of texts whose last token is the last of the row."""
        return self.plain(adapter, ids, mask).logits[:, 0].float()


def cells(full: bool) -> list[tuple]:
    """All, or two of each base, with checkpointing and without: every pair of values of two settings occurs."""
    few = [(base, ROLES[(number + number // 6) % 4]) for number, base in enumerate(BASES)]
    chosen = list(itertools.product(BASES, ROLES)) if full else few
    return [(*base, *roles, checkpointing) for base, roles in chosen for checkpointing in (False, True)]
