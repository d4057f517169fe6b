"""What leaves a run: the policy as a plain PEFT adapter at the root of its folder, the other roles
in folders beside it."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from goose_lora.files import replacing
from goose_lora.models.shared_base import SharedBase


def save_policy(shared: SharedBase, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Policy to ``folder``, and ``value/``, ``reward/`` and ``reference/`` below it, with the
    tokenizer; safetensors only. Whole or not at all."""
    with replacing(folder) as temporary:
        shared.save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))


def loading_snippet(base: str, folder: str | Path) -> str:
    """The code that loads the policy without this project."""
    return (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM; "
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}")'
    )
