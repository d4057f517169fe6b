"""The public names of goose_lora.data."""

from .demonstrations import Learning as Learning
from .demonstrations import tokenize_demonstrations as tokenize_demonstrations
from .demonstrations import tokenize_texts as tokenize_texts
from .hints import tell_hints as tell_hints
from .messages import asked as asked
from .preferences import require_pairs as require_pairs
from .preferences import tokenize_rankings as tokenize_rankings
from .preferences import tokenize_references as tokenize_references
from .rows import DataArguments as DataArguments
from .rows import RowSet as RowSet
from .rows import load_rows as load_rows
from .tokenization import left_pad as left_pad
from .tokenization import tokenize_prompts as tokenize_prompts
