"""The public names of goose_lora.data."""

from .augmentation import count_made as count_made
from .augmentation import made_text as made_text
from .augmentation import parse_shares as parse_shares
from .augmentation import share_words as share_words
from .augmentation import tokenize_augmented as tokenize_augmented
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
