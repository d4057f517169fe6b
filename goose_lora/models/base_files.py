"""Check that a base's files hold the whole model, in the form that was asked for.

transformers fills what is missing with random numbers, and takes the quantization of the files for
that of the settings.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from goose_lora.errors import UserError
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.folders import reading

logger = logging.getLogger(__name__)

# What bitsandbytes keeps beside a quantized matrix
_BESIDE_WEIGHTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def require_whole(args: ModelArguments, *, trust_remote_code: bool = False) -> None:
    """Compare names and shapes in the safetensors headers of a base with those of its model.

    No weight is read. A name on the Hub is looked at once it is loaded (``require_loaded``).

    Raises:
        UserError: tensors are missing or of another shape, or the base is saved in another
            quantization than the settings ask for.
    """
    name = args.model_name_or_path
    with reading("its configuration", name):
        config = AutoConfig.from_pretrained(
            name, revision=args.model_revision, trust_remote_code=trust_remote_code
        )
    _require_quantization(args, config)
    # Of a name on the Hub there are no files to look at yet
    if not Path(name).is_dir():
        return
    # The model on the meta device, from tensors that have names and shapes alone
    plain, saved = copy.deepcopy(config), hasattr(config, "quantization_config")
    if saved:
        delattr(plain, "quantization_config")
    headers = {key: tensor for key, tensor in _headers(Path(name)) if not _beside_weights(key)}
    with reading("the names of its weights", name), _without_a_report():
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(plain, trust_remote_code=trust_remote_code)
        loaded: Any = type(empty).from_pretrained(
            None,
            config=plain,
            state_dict=headers,
            device_map={"": "meta"},
            dtype=args.torch_dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        found = loaded[1]
    if saved:
        found["mismatched_keys"] = set()  # matrices are packed
    require_loaded(name, found)


def require_loaded(name: str, found: Mapping[str, set], *, without: str | None = None) -> None:
    """Raise UserError where transformers has filled in tensors that the files lack.

    Args:
        found: transformers' loading info.
        without: the end of the names that may be missing, as a fresh head is.
    """
    # What is missing would be drawn at random; what is left over may be its other name
    missing = sorted(key for key in found["missing_keys"] if without is None or not key.endswith(without))
    unknown = sorted(found["unexpected_keys"])
    if missing:
        others = f", and {len(unknown)} that it does not know, such as {unknown[0]}" if unknown else ""
        raise UserError(
            f"{name}: {len(missing)} tensors of the model are not in its files, such as {missing[0]}{others}."
            " They would be random numbers. Download or save the model again."
        )
    if found["mismatched_keys"]:
        key, in_file, in_model = sorted(found["mismatched_keys"], key=str)[0]
        raise UserError(
            f"{name}: {key} has the shape {list(in_file)} in the file and {list(in_model)} in config.json."
            " Download or save the model again."
        )
    if unknown and without is None:
        logger.warning("%s: %d tensors in its files are not used, such as %s", name, len(unknown), unknown[0])


def _require_quantization(args: ModelArguments, config: PretrainedConfig) -> None:
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return
    # Of bitsandbytes' own forms, those that the settings can name
    said = dict(saved if isinstance(saved, dict) else saved.to_dict())
    method = str(said.get("quant_method", "unknown")).rpartition(".")[2].lower()
    form = f"quantized by {method}"
    setting = None
    if said.get("load_in_4bit"):
        form = f"saved in 4 bits ({said.get('bnb_4bit_quant_type')})"
        setting = "nf4" if said.get("bnb_4bit_quant_type") == "nf4" else None
    elif said.get("load_in_8bit"):
        form = f"saved in int8 with llm_int8_threshold {said.get('llm_int8_threshold')}"
        setting = "int8" if said.get("llm_int8_threshold") == 0 else None
    if setting == args.quantization:
        return
    way_out = f"Set quantization: {setting}, or give" if setting else "Give"
    raise UserError(
        f"{args.model_name_or_path} is {form}, and the settings ask for quantization: {args.quantization}."
        f" {way_out} the model that it was made from, which nf4 and int8 quantize as it loads."
    )


def _headers(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                # A slice knows shape and dtype without its numbers
                part = file.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype(), torch.float32)
                yield name, torch.empty(part.get_shape(), dtype=dtype, device="meta")


def _beside_weights(name: str) -> bool:
    return name.endswith(_BESIDE_WEIGHTS) or ".quant_state." in name


@contextmanager
def _without_a_report() -> Iterator[None]:
    """Keep transformers' table of missing tensors back: the error names them."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
