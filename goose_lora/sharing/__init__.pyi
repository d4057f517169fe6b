"""The public names of goose_lora.sharing."""

from .export import save_policy as save_policy
