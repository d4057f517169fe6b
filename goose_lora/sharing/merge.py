"""The policy merged into its base: dense weights that plain transformers loads, and their KL.

The base is dequantized as it was trained on and the adapter added to that, in fp32, rounded once.
Merging into the 4-bit weights themselves rounds the sum to sixteen levels again and loses part of
what was learned (PEFT#2321); that is done only where it is asked for.
"""

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from goose_lora.data.rows import fingerprint, load_rows
from goose_lora.data.tokenization import left_pad, tokenize_prompts
from goose_lora.errors import UserError
from goose_lora.files import read_json_object, read_jsonl, share_weights, sync_all, write_json
from goose_lora.generation.rollout import Rollout
from goose_lora.generation.sampling import generation_config, sample
from goose_lora.models.arguments import DTYPES, ModelArguments, arguments_of
from goose_lora.models.dense_copy import DenseCopy
from goose_lora.models.endings import reply_ends
from goose_lora.models.folders import ADAPTER_CONFIG, local_folder, read_lineage
from goose_lora.models.loading import load_base, tokenizer_of
from goose_lora.models.quantization import keep_4bit_trainable_on_cpu, quantization_config
from goose_lora.models.shared_base import SharedBase
from goose_lora.ownership import LOCK, hold, kept_from_writers, release, require_free
from goose_lora.reporting.run_files import BaseRecord, lineage_of
from goose_lora.sharing import lineage, model_card
from goose_lora.training.cost import cost
from goose_lora.training.validation import require_output_folder

# What the KL is measured on: at most so many prompts, and replies of so many tokens.
KL_PROMPTS, KL_REPLY_TOKENS, KL_PROMPT_TOKENS = 32, 32, 512
# Settings of adapters that are no sum of two matrices, and whether PEFT's own merge is exact there
_NOT_PLAIN = {
    "use_dora": ("is a DoRA adapter", True),
    "modules_to_save": ("has whole modules of its own", True),
    "trainable_token_indices": ("has embeddings of its own", True),
    "target_parameters": ("adapts parameters that are no layers", False),
    "lora_bias": ("has biases of its own", False),
}


def merge(
    run: str | Path,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    quantized: bool = False,
    prompts: str | None = None,
    base: str | None = None,
) -> str:
    """Write the merged model of ``run`` to ``out``; return what was measured, as text.

    Tokenizer, chat template, generation settings and card are written beside the weights.

    Args:
        dtype: bfloat16, float16 or float32; nf4 goes by ``quantized``.
        quantized: write the weights in nf4, and measure those too.
        prompts: rows with a prompt to measure on; those in the run's samples.jsonl if unset.
        base: where the base is, if not where the run had it.

    Raises:
        UserError: nf4 without ``quantized``; the run is no policy, or the quantization of its base
            is not known; ``out`` is not empty; there are no prompts.
    """
    # What can be known before a weight is read
    folder, out = local_folder(run), Path(out)
    noted = _check(folder, out, dtype, quantized)
    args = arguments_of(folder, noted, base)
    require_free(folder)
    tokenizer = tokenizer_of(folder, args=args)
    prompt_ids, data = _prompts(folder, prompts, tokenizer)

    # The adapter's model replies, and the merged one is compared with it on these replies
    with kept_from_writers(folder), _whole(out) as work:
        shared = SharedBase.build(load_base(args, tokenizer), folder)
        rollout = _replies(shared, tokenizer, prompt_ids)
        figures: dict[str, Any] = _write_and_measure(
            shared,
            rollout,
            work,
            DTYPES.get(dtype, torch.bfloat16),
            args=args,
            quantized=quantized,
        )
        tokenizer.save_pretrained(work)
        _write_generation_config(args, work, _ends(folder, tokenizer))
        figures |= {"prompts": len(prompt_ids), "tokens": int(rollout.response_mask.sum())}

        # What goes beside the weights moves into its place with them
        lineage.record(
            work,
            "merge",
            model=args,
            tokenizer=tokenizer,
            figures={**figures, **cost()},
            data=data,
            parents={"policy": folder},
            command=_command(run, out, dtype, quantized),
        )
        model_card.write_card(work, place=out)

    said = (
        f"merged into {out}: KL to the adapter's model {figures['kl']:.3g} nats a token ({len(prompt_ids)}"
        f" prompts, {figures['tokens']} tokens)"
    )
    if quantized:
        said += f"\nwritten in nf4, which makes it {figures['kl_nf4']:.3g} nats a token"
    return said


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Give a folder beside ``out`` that becomes it at the end: half of a model is never there."""
    work = out.with_name(f".{out.name}.unfinished")
    require_free(work)
    # One that was killed has left its lock there; anything else is somebody's
    if work.is_symlink() or (work.exists() and any(work.iterdir()) and not (work / LOCK).exists()):
        raise UserError(
            f"{work} is in the way of a merge into {out}, and no merge has left it. Move it away."
        )
    shutil.rmtree(work, ignore_errors=True)
    hold(work)
    try:
        yield work
        share_weights(work)
        sync_all(work)
        release(work)
        if out.is_dir():
            out.rmdir()  # it is empty
        os.replace(work, out)
    except BaseException:
        release(work)
        shutil.rmtree(work, ignore_errors=True)
        raise


def _command(run: str | Path, out: Path, dtype: str, quantized: bool) -> str:
    words = ["goose-lora", "merge", str(run), "--out", str(out), "--dtype", dtype]
    if quantized:
        words.append("--quantized")
    return shlex.join(words)


def _check(folder: Path, out: Path, dtype: str, quantized: bool) -> BaseRecord:
    """Return the base as the run recorded it; raise UserError if nothing can be merged into it."""
    if dtype == "nf4" and not quantized:
        raise UserError(
            "merging into 4 bits rounds the adapter away in part, so it is done only if you insist:"
            " --quantized, which shows the KL with and without it. Otherwise keep --dtype bfloat16, and let"
            " whoever loads it quantize."
        )
    # The base must be loaded as it was in training, or the sum is another model's
    noted = lineage_of(folder)
    if "base" not in noted and not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder} has no {ADAPTER_CONFIG}: no adapter. Give the output_dir of a stage, run to its end,"
            " or user/repo on the Hub."
        )
    if "base" not in noted:
        raise UserError(
            f"{folder} has no goose_lora.json that tells how the base was quantized in training, and it must"
            f" be the same again. If it was not, PEFT merges it: {_by_peft(folder)}."
        )
    if noted["stage"] == "reward":
        raise UserError(
            f"{folder} is a reward model, whose head is no part of the base. Only policies are merged."
        )
    _require_plain(folder, noted["base"].get("quantization"))
    # Nothing of the user's is written over
    if out.is_symlink() or out.is_file() or (out.exists() and any(out.iterdir())):
        kind = "is a link or a file" if out.is_symlink() or out.is_file() else "is not empty"
        raise UserError(f"--out {out} {kind}. Give a new folder.")
    if os.path.ismount(out):
        raise UserError(
            f"--out {out}: another disk begins there, so that nothing can be moved into its place."
            f" Give a folder in it: {out / 'merged'}."
        )
    require_output_folder(str(out), option="--out")
    return noted["base"]


def _require_plain(folder: Path, quantization: str | None) -> None:
    """Raise UserError for an adapter that is more than sums of two matrices."""
    path = folder / ADAPTER_CONFIG
    config = read_json_object(path) if path.is_file() else {}
    for setting, (kind, by_peft) in _NOT_PLAIN.items():
        if not config.get(setting):
            continue
        way_out = f"Train one without {setting}"
        if by_peft:
            way_out += f"; or let PEFT merge it: {_by_peft(folder)}"
        if by_peft and quantization != "none":
            way_out += f" (into the base as it is, not in {quantization} as in training)"
        raise UserError(f"{folder} {kind} ({setting}), and only plain LoRA is merged here. {way_out}.")


def _by_peft(folder: Path) -> str:
    show = shlex.join(["goose-lora", "show", str(folder)])
    return f"run the code of {show}, then model.merge_and_unload().save_pretrained(DIR)"


def _prompts(
    folder: Path, name: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Return the token ids of the prompts, and the fingerprint of the data set they are from."""
    if name is not None:
        rows = load_rows(name, stage="ppo", max_rows=KL_PROMPTS)
        ids = tokenize_prompts(rows, tokenizer, name=name, max_prompt_tokens=KL_PROMPT_TOKENS)["input_ids"]
        return [list(row) for row in ids], [fingerprint(name, None, rows)]
    path = folder / "samples.jsonl"
    if not path.is_file():
        raise UserError(
            f"{folder} has no samples.jsonl, so there are no prompts to measure on: --prompts FILE, with rows"
            " that have a prompt."
        )
    # A sampled prompt stands there with its template and special tokens, once a logged rollout
    texts = list(dict.fromkeys(row["prompt"] for row in read_jsonl(path)))[:KL_PROMPTS]
    return [cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts], []


def _replies(shared: SharedBase, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[list[int]]) -> Rollout:
    # The same replies each time, so that two merges of one run have comparable figures
    torch.manual_seed(0)
    ids, mask = left_pad(prompt_ids, tokenizer.pad_token_id, _head_device(shared))
    sampling = generation_config(
        response_tokens=KL_REPLY_TOKENS,
        temperature=1.0,
        eos_token_ids=reply_ends(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    return sample(shared, ids, mask, sampling)


def _head_device(shared: SharedBase) -> torch.device:
    model = cast(PreTrainedModel, shared.get_base_model())
    return cast(nn.Linear, model.get_output_embeddings()).weight.device


# ---- Weights ----


def _write_and_measure(
    shared: SharedBase,
    rollout: Rollout,
    out: Path,
    dtype: torch.dtype,
    *,
    args: ModelArguments,
    quantized: bool,
) -> dict[str, float]:
    """Write the merged weights to ``out``; return their KL to the adapter's model."""
    out.mkdir(parents=True, exist_ok=True)
    # transformers quantizes what it loads from disk: dense weights wait in a folder of their own
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        dense = Path(scratch) if quantized else out
        write_dense(shared, dtype, dense)
        figures = {"kl": kl_to_adapter(shared, _load(dense, dtype, shared), rollout)}
        if quantized:
            in_nf4 = quantization_config(replace(args, quantization="nf4"))
            small = _load(dense, dtype, shared, in_nf4)
            figures["kl_nf4"] = kl_to_adapter(shared, small, rollout)
            small.save_pretrained(out)
    return figures


def write_dense(shared: SharedBase, dtype: torch.dtype, folder: Path) -> None:
    """Write the policy's merged model as safetensors in ``dtype``.

    The shared base keeps its own tensors. Tied ones stay tied in the copy.
    """
    # What the copy did not dequantize is shared with the base, and is cast to a tensor of its own.
    # A tensor that two modules share is cast once
    copied = DenseCopy(shared, dtype)
    model = copied.merge_role("policy")
    cast_once: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dtype != dtype:
                key = id(parameter)
                cast_once.setdefault(key, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
                setattr(module, name, cast_once[key])
    copied.require_same("policy")
    model.config.dtype = dtype
    model.save_pretrained(folder)


def _load(
    folder: Path,
    dtype: torch.dtype,
    shared: SharedBase,
    quantization: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """Load the written model as a user would, on the device of the shared base."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": _head_device(shared)},
        quantization_config=quantization,
        use_safetensors=True,
    )
    keep_4bit_trainable_on_cpu(model)  # the other form knows no layer whose width is not a multiple of 32
    return model.eval()


# ---- The distance between the two models ----


@torch.no_grad()
def kl_to_adapter(shared: SharedBase, merged: PreTrainedModel, rollout: Rollout) -> float:
    """Return the mean per reply token of KL(adapter's model || ``merged``), in nats.

    It is taken over the whole vocabulary.
    """
    total, count = 0.0, 0
    # One reply at a time, so that no more than one has logits over the vocabulary
    for row in range(len(rollout.input_ids)):
        real = rollout.attention_mask[row].bool()
        ids = rollout.input_ids[row][real][None]
        tokens = int(rollout.response_mask[row].sum())
        with shared.role("policy") as core, shared.autocast():
            want = _reply_logprobs(core, ids, tokens)
        got = _reply_logprobs(merged, ids, tokens)
        total += float((want.exp() * (want - got)).sum())
        count += tokens
    return total / count


def _reply_logprobs(model: Callable[..., Any], ids: Tensor, tokens: int) -> Float[Tensor, "T V"]:
    """Return the log-probabilities over the vocabulary at each of the last ``tokens`` positions."""
    # The logits at a position are of the next token
    logits = model(input_ids=ids, use_cache=False).logits
    return logits[0, -tokens - 1 : -1].float().log_softmax(-1)


def _ends(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens at which the run ended its replies."""
    return reply_ends(tokenizer, read_lineage(folder).get("settings", {}).get("stop_token_ids"))


def _write_generation_config(args: ModelArguments, out: Path, ends: list[int]) -> None:
    """Write the base's own file as it ships, with ``ends``.

    What this project loads has no sampling filters.
    """
    name = "generation_config.json"
    shipped = Path(args.model_name_or_path) / name
    if not Path(args.model_name_or_path).exists():
        try:
            shipped = Path(hf_hub_download(args.model_name_or_path, name, revision=args.model_revision))
        except OSError:  # the base has none: what save_pretrained wrote is there
            shipped = out / name
    if shipped.is_file():
        write_json(out / name, read_json_object(shipped) | {"eos_token_id": ends})
