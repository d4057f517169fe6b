"""The public names of goose_lora.data."""

from .rows import DataArguments as DataArguments
from .rows import load_rows as load_rows
from .tokenization import left_pad as left_pad
from .tokenization import tokenize_prompts as tokenize_prompts
from .tokenization import tokenize_texts as tokenize_texts
