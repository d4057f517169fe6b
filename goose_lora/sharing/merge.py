"""The policy merged into its base: one set of dense weights that plain transformers loads, and how
far it is from the adapter's model.

The base is dequantized as it was trained on and the adapter added to that, in fp32, rounded once.
Merging into the 4-bit weights themselves rounds the sum to sixteen levels again and loses part of
what was learned (PEFT#2321); that is done only where it is asked for.
"""

import shlex
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from goose_lora.data.rows import load_rows
from goose_lora.data.tokenization import left_pad, tokenize_prompts
from goose_lora.errors import UserError
from goose_lora.files import read_jsonl
from goose_lora.generation.rollout import Rollout
from goose_lora.generation.sampling import generation_config, sample
from goose_lora.models.adapters import local_folder, read_lineage
from goose_lora.models.arguments import ModelArguments, arguments_of
from goose_lora.models.dense_copy import DenseCopy
from goose_lora.models.loading import load_base, tokenizer_of
from goose_lora.models.quantization import keep_4bit_trainable_on_cpu, quantization_config
from goose_lora.models.shared_base import SharedBase
from goose_lora.sharing import lineage, model_card
from goose_lora.training.cost import cost

KL_PROMPTS, REPLY_TOKENS, MAX_PROMPT_TOKENS = 32, 32, 512  # what the KL is measured on
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def merge(
    run: str | Path,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    quantized: bool = False,
    prompts: str | None = None,
    base: str | None = None,
) -> str:
    """Write the merged model of ``run`` with tokenizer, chat template, generation settings and card
    to ``out``; returns what was measured.

    Args:
        dtype: bfloat16 or float32; nf4 goes by ``quantized``.
        quantized: write the weights in nf4, and measure those too.
        prompts: rows with a prompt to measure on; those in the run's samples.jsonl if unset.
        base: where the base is, if not where the run had it.

    Raises:
        ValueError: nf4 without ``quantized``; a run that is no policy, or of which the base's
            quantization is not known; ``out`` is not empty; no prompts.
    """
    folder, out = local_folder(run), Path(out)
    noted = _check(folder, out, dtype, quantized)
    args = arguments_of(noted, base)
    tokenizer = tokenizer_of(folder, args)
    prompt_ids, data = _prompts(folder, prompts, tokenizer)
    shared = SharedBase.build(load_base(args, tokenizer), folder)
    rollout = _replies(shared, tokenizer, prompt_ids)
    torch_dtype = DTYPES.get(dtype, torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        dense = Path(scratch) if quantized else out
        write_dense(shared, torch_dtype, dense)
        figures: dict[str, Any] = {"kl": kl_to_adapter(shared, _load(dense, torch_dtype, shared), rollout)}
        if quantized:
            small = _load(dense, torch_dtype, shared, quantization_config(replace(args, quantization="nf4")))
            figures["kl_nf4"] = kl_to_adapter(shared, small, rollout)
            small.save_pretrained(out)
    figures |= {"prompts": len(prompt_ids), "tokens": int(rollout.response_mask.sum())}
    tokenizer.save_pretrained(out)
    _copy_generation_config(args, out)
    command = [
        "goose-lora",
        "merge",
        str(run),
        "--out",
        str(out),
        "--dtype",
        dtype,
        *(["--quantized"] if quantized else []),
    ]
    noted_too = {"command": shlex.join(command), "data": data, "parents": {"policy": folder}}
    lineage.record(out, "merge", model=args, tokenizer=tokenizer, figures={**figures, **cost()}, **noted_too)
    model_card.write_card(out)
    lines = [
        f"merged into {out}: KL to the adapter's model {figures['kl']:.3g} nats a token ({len(prompt_ids)}"
        f" prompts, {figures['tokens']} tokens)"
    ]
    return "\n".join(
        lines
        + ([f"written in nf4, which makes it {figures['kl_nf4']:.3g} nats a token"] if quantized else [])
    )


def _check(folder: Path, out: Path, dtype: str, quantized: bool) -> dict[str, Any]:
    if dtype == "nf4" and not quantized:
        raise UserError(
            "merging into 4 bits rounds the adapter away in part, so it is done only if you insist:"
            " --quantized, which shows the KL with and without it. Otherwise keep --dtype bfloat16, and let"
            " whoever loads it quantize."
        )
    noted = read_lineage(folder)
    if "base" not in noted:
        raise UserError(
            f"{folder} has no goose_lora.json that tells how the base was quantized in training, and it must"
            " be the same again."
        )
    if noted["stage"] == "reward":
        raise UserError(
            f"{folder} is a reward model, whose head is no part of the base. Only policies are merged."
        )
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty. Give a new folder.")
    return noted["base"]


def _prompts(
    folder: Path, name: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    if name is not None:
        rows = load_rows(name, stage="ppo", max_rows=KL_PROMPTS)
        ids = tokenize_prompts(rows, tokenizer, name=name, max_prompt_tokens=MAX_PROMPT_TOKENS)["input_ids"]
        return [list(row) for row in ids], [lineage.fingerprint(name, None, rows)]
    if not (folder / "samples.jsonl").is_file():
        raise UserError(
            f"{folder} has no samples.jsonl, so there are no prompts to measure on: --prompts FILE, with rows"
            " that have a prompt."
        )
    texts = list(dict.fromkeys(row["prompt"] for row in read_jsonl(folder / "samples.jsonl")))[:KL_PROMPTS]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], []  # type: ignore[misc]


def _replies(shared: SharedBase, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[list[int]]) -> Rollout:
    torch.manual_seed(0)
    ids, mask = left_pad(prompt_ids, tokenizer.pad_token_id, _head(shared).device)
    ends = {"eos_token_ids": [tokenizer.eos_token_id], "pad_token_id": tokenizer.pad_token_id}
    return sample(shared, ids, mask, generation_config(response_tokens=REPLY_TOKENS, temperature=1.0, **ends))


def _head(shared: SharedBase) -> Any:
    core: Any = shared.get_base_model()
    return core.get_output_embeddings().weight


def write_dense(shared: SharedBase, dtype: torch.dtype, folder: Path) -> None:
    """The policy's merged model as safetensors in ``dtype``. The shared base keeps its own tensors:
    tied ones stay tied in the copy."""
    model = DenseCopy(shared, dtype).become("policy")
    cast_once: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dtype != dtype:
                key = id(parameter)
                cast_once.setdefault(key, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
                setattr(module, name, cast_once[key])
    model.config.dtype = dtype
    model.save_pretrained(folder)


def _load(folder: Path, dtype: torch.dtype, shared: SharedBase, quantization: Any = None) -> Any:
    place: Any = {"": _head(shared).device}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=place, quantization_config=quantization, use_safetensors=True
    )
    keep_4bit_trainable_on_cpu(model)  # the other form knows no layer whose width is not a multiple of 32
    return model.eval()


@torch.no_grad()
def kl_to_adapter(shared: SharedBase, merged: Any, rollout: Rollout) -> float:
    """Mean over the reply tokens of KL(adapter's model || ``merged``) over the whole vocabulary, in
    nats."""
    total, count = 0.0, 0
    for row in range(len(rollout.input_ids)):
        real = rollout.attention_mask[row].bool()
        ids, tokens = rollout.input_ids[row][real][None], int(rollout.response_mask[row].sum())
        with shared.role("policy") as core, shared.autocast():
            want = (
                cast(Any, core)(input_ids=ids, use_cache=False)
                .logits[0, -tokens - 1 : -1]
                .float()
                .log_softmax(-1)
            )
        got = merged(input_ids=ids, use_cache=False).logits[0, -tokens - 1 : -1].float().log_softmax(-1)
        total += float((want.exp() * (want - got)).sum())
        count += tokens
    return total / count


def _copy_generation_config(args: ModelArguments, out: Path) -> None:
    """The base's own, as it ships: what this project loads has no sampling filters."""
    name = "generation_config.json"
    shipped = Path(args.model_name_or_path) / name
    if not Path(args.model_name_or_path).exists():
        try:
            shipped = Path(hf_hub_download(args.model_name_or_path, name, revision=args.model_revision))
        except OSError:  # the base has none
            return
    if shipped.is_file():
        shutil.copyfile(shipped, out / name)
