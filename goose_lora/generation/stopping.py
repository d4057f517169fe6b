"""Texts that end a reply, besides the end-of-text token: they are looked for as it is written."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

# A token of the tail that decodes to nothing, such as half a character, must not push a stop text
# out of it.
TOKENS_WITHOUT_TEXT = 8


class StopStrings(StoppingCriteria):
    """End a row as soon as one of ``strings`` stands in its reply, and remember where.

    The prompt is not searched. transformers' own ``stop_strings`` also finds a text that began in
    the prompt, and does not tell at which token a row ended; what it pads after that would then
    count as part of the reply.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], prompt_tokens: int):
        self.tokenizer, self.strings, self.prompt_tokens = tokenizer, list(strings), prompt_tokens
        # Each other token of a match adds a byte or more to it.
        self.tail = max(len(text.encode()) for text in strings) + TOKENS_WITHOUT_TEXT
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Int[Tensor, "B L"], scores: Tensor, **kwargs: object) -> Bool[Tensor, " B"]:
        # A row that has ended is not read again.
        written = input_ids[:, self.prompt_tokens :]
        rows = [row for row in range(len(written)) if row not in self.lengths]

        # Where generate's check for the end lags behind, it asks again after all rows have ended;
        # batch_decode takes no rows for one.
        texts = []
        if rows:
            texts = self.tokenizer.batch_decode(written[rows, -self.tail :])
        for row, text in zip(rows, texts, strict=True):
            if any(string in text for string in self.strings):
                self.lengths[row] = written.shape[1]
        return torch.tensor([row in self.lengths for row in range(len(written))], device=input_ids.device)

    def cut(
        self, mask: Bool[Tensor, "B T"], ended: Bool[Tensor, " B"]
    ) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, " B"]]:
        """Return ``mask`` up to each stop text, and ``ended`` with the rows that have one."""
        # A row without a stop text keeps its whole width.
        width = mask.shape[1]
        lengths = torch.tensor([self.lengths.get(row, width) for row in range(len(mask))], device=mask.device)
        stopped = torch.tensor([row in self.lengths for row in range(len(mask))], device=mask.device)
        return mask & (torch.arange(width, device=mask.device) < lengths[:, None]), ended | stopped


def ends_with_stop(
    tokenizer: PreTrainedTokenizerBase, reply: Sequence[int], token_ids: Sequence[int], strings: Sequence[str]
) -> bool:
    """Return whether ``reply`` ends by itself.

    It does by one of ``token_ids``, or with a token that completes one of ``strings``.
    """
    if reply[-1] in token_ids:
        return True
    # The text must come with the last token: one that stood there before did not end the reply.
    whole, before = tokenizer.batch_decode([list(reply), list(reply[:-1])])
    return any(string in whole and string not in before for string in strings)
