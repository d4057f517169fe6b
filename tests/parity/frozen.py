"""Step 1 of `make parity`: write one tiny base in fp64, adapters, TRL's models, and rollouts.

    python tests/parity/frozen.py FOLDER

It runs in the project's environment. TRL's models have the same weights: TRL's value and reward
models are plain SEQ_CLS models whose weights are W + (alpha / r) B A of the adapters here.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import tiny

from goose_lora.models.shared_base import SharedBase

PROMPTS, REPLIES = (2, 5, 3, 4, 1, 5, 2, 3), (6, 3, 5, 1, 6, 4, 2, 6)
COMMON = {
    "temperature": 0.7,
    "kl_coef": 0.1,
    "kl_estimator": "k1",
    "whiten_rewards": False,
    "missing_eos_penalty": None,
    "stop_token": None,
    "rows": 8,
    "accumulation": 1,
    "mini_batches": 1,
    "epochs": 2,
    "rollouts": 1,
    "cliprange": 0.05,
    "cliprange_value": 0.05,
    "vf_coef": 0.1,
    "gamma": 1.0,
    "lam": 0.95,
}
RAGGED = {"replies": "ragged", "stop_token": "eos", "missing_eos_penalty": 1.0}
CASES = {
    "equally long": {"replies": "full"},
    "equally long, k3, whitened rewards": {"replies": "full", "kl_estimator": "k3", "whiten_rewards": True},
    "ragged": RAGGED,
    # Two rollouts: on the last batch of its data TRL makes every microbatch an optimizer step, and
    # the first is compared.
    "ragged, four microbatches": RAGGED | {"rows": 2, "accumulation": 4, "epochs": 1, "rollouts": 2},
    "a pad id sampled inside": {"replies": "pad inside", "epochs": 1},
    "steps, 1 mini-batch x 1": RAGGED | {"epochs": 1, "rollouts": 3},
    "steps, 2 mini-batches x 2": (
        RAGGED | {"rows": 4, "accumulation": 2, "mini_batches": 2, "epochs": 1, "rollouts": 3}
    ),
    "steps, 4 mini-batches x 4": (
        RAGGED | {"rows": 2, "accumulation": 4, "mini_batches": 4, "epochs": 1, "rollouts": 3}
    ),
}


def rollout(kind: str) -> torch.Tensor:
    """Return eight left-padded prompts with their replies (B, P + T)."""
    generator = torch.Generator().manual_seed(3)
    width, longest = max(PROMPTS), max(REPLIES)
    ids = torch.full((len(PROMPTS), width + longest), tiny.PAD)
    for row, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        reply = reply if kind == "ragged" else longest
        ids[row, width - prompt : width + reply] = torch.randint(
            4, tiny.VOCABULARY, (prompt + reply,), generator=generator
        )
        if kind == "ragged" and row != 4:  # which is cut at the length limit
            ids[row, width + reply - 1] = tiny.EOS
    if kind == "pad inside":
        ids[1, width + 3] = tiny.PAD
    return ids


def build_shared(folder: Path) -> SharedBase:
    """Return policy, critic and reward model as adapters on one fp64 base, all with an effect."""
    base = tiny.base()
    judge = SharedBase.build(tiny.base(), tiny.lora(base), critic="adapter")
    # Any adapter with a head; its weights are replaced
    judge.save_pretrained(str(folder / "adapters"), selected_adapters=["value"])
    shared = SharedBase.build(
        base, tiny.lora(base), reward=folder / "adapters" / "value", critic="adapter", reference="base"
    ).double()
    for seed, adapter in enumerate(("default", "value", "reward")):
        tiny.randomise(shared, adapter, std=0.1, seed=seed)
    return shared


def write_classifier(shared: SharedBase, adapter: str, folder: Path) -> None:
    """Write a plain SEQ_CLS model whose weights are the base's with ``adapter`` merged in."""
    weights = {name: p.detach() for name, p in shared.named_parameters()}
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("llama", **tiny.ARCHITECTURES["llama"], num_labels=1)
    ).double()
    state = {
        name: p.detach().clone() for name, p in tiny.base().double().model.named_parameters(prefix="model")
    }
    for name in (name for name in weights if f".lora_A.{adapter}." in name):
        target = name.removeprefix("base_model.model.").partition(".lora_A.")[0] + ".weight"
        state[target] = state[target] + 2.0 * weights[name.replace("lora_A", "lora_B")] @ weights[name]
    state["score.weight"] = weights[f"base_model.model.score.modules_to_save.{adapter}.weight"]
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    tiny.base().double().save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    shared = build_shared(folder)
    adapters = {
        name: p.detach().contiguous()
        for name, p in shared.named_parameters()
        if {"default", "value", "reward"} & set(name.split("."))
    }
    save_file(adapters, folder / "adapters.safetensors")
    for adapter in ("value", "reward"):
        write_classifier(shared, adapter, folder / adapter)
    config = shared.peft_config["default"]
    lora = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
        "task_type": "CAUSAL_LM",
    }
    cases = {name: COMMON | case for name, case in CASES.items()}
    save_file(
        {kind.replace(" ", "_"): rollout(kind) for kind in ("full", "ragged", "pad inside")},
        folder / "rollouts.safetensors",
    )
    facts = {"cases": cases, "lora": lora, "prompt_tokens": max(PROMPTS), "pad": tiny.PAD, "eos": tiny.EOS}
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
