"""The day that a chat template writes: one for all stages of a chain.

Templates of Llama 3 and others write today's date. A policy would then be trained, scored and asked
under other prompts, and a run that is resumed tomorrow would have other rows.
"""

import json
import re
from collections.abc import Iterable
from datetime import date

from transformers import PreTrainedTokenizerBase

from goose_lora.errors import UserError
from goose_lora.models.folders import by_name

# Llama 3's own templates write this day where nothing tells them another. SFT and reward model do
# not know of each other, so that the day of either is not the other's.
USUAL = "2024-07-26"
_NOTED = "template_date"  # saved with the tokenizer, so that each stage hands its day to the next
_ASKS = "strftime_now"  # what templates call
_ASKED = re.compile(rf"""{_ASKS}\(\s*(['"])(.*?)\1\s*\)""")


def template_date(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the day that the chat template writes, as 2024-07-26; None where it writes none."""
    template = tokenizer.chat_template
    if not template:
        return None
    named = by_name(template)
    texts: Iterable[str] = named.values() if isinstance(named, dict) else [str(named)]
    if not any(_ASKS in text for text in texts):
        return None
    return str(tokenizer.init_kwargs.get(_NOTED, USUAL))


def note_date(tokenizer: PreTrainedTokenizerBase) -> None:
    """Note the day with the tokenizer, which is saved with it."""
    found = template_date(tokenizer)
    if found is not None:
        tokenizer.init_kwargs[_NOTED] = found


def with_day(tokenizer: PreTrainedTokenizerBase, template: str | None, tools: object) -> dict[str, str]:
    """Return what ``apply_chat_template`` needs to write the chain's day in place of today's.

    Args:
        template: the one that is to be used, if it is not the tokenizer's own.

    Raises:
        UserError: the template computes the form in which it asks for the day.
    """
    day = template_date(tokenizer)
    if day is None:
        return {}
    # Where the template asks for the day, it has it: transformers passes no functions to templates
    text = tokenizer.get_chat_template(template, tools)  # type: ignore[arg-type]
    fixed = _ASKED.sub(lambda asked: json.dumps(date.fromisoformat(day).strftime(asked[2])), text)
    if f"{_ASKS}(" in fixed:
        raise UserError(
            "the chat template asks for today's date in a form that it computes, so that stages would differ"
            " by the day. Write the date into the template: chat_template_path."
        )
    return {"chat_template": fixed}
