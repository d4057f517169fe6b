"""Saving of a run's result: the policy as a plain PEFT adapter, other roles in folders below."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from goose_lora.models.shared_base import SharedBase
from goose_lora.ownership import replacing


def save_policy(shared: SharedBase, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save the policy and the tokenizer in ``folder``, whole or not at all.

    The other roles go to ``value/``, ``reward/`` and ``reference/`` below it. All weights are
    safetensors.
    """
    # A run that is killed while it saves leaves what was there before, or nothing that loads
    with replacing(folder) as temporary:
        shared.save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))


def loading_snippet(base: str, folder: str | Path) -> str:
    """Return one line of Python that loads the policy without this project."""
    return (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM; "
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}")'
    )
