"""Input embeddings in the host's memory: a batch's rows of the table cross over, and no more.

A table of 128,000 words is 1 GB of an 8B's 5.7 GB in 4 bits, and a step reads a few thousand rows.
"""

import logging

import torch
from jaxtyping import Float, Int
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedModel

from goose_lora.errors import UserError

logger = logging.getLogger(__name__)


class HostEmbedding(nn.Module):
    """A frozen table of embeddings that stays on the host when its model moves.

    It is no parameter: what asks a model for its parameters, or for its device, sees the rest.
    """

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self._table = (table.weight.detach().cpu(),)  # in a tuple, nothing of torch moves it

    @property
    def weight(self) -> Float[Tensor, "V H"]:
        """The table, on the host."""
        return self._table[0]

    def forward(self, ids: Int[Tensor, "*s"]) -> Float[Tensor, "*s H"]:
        """Return the rows of ``ids`` on their device, where each distinct row comes once."""
        # One wait for the ids; a generated token is waited for anyway
        distinct, places = torch.unique(ids, return_inverse=True)
        rows = self.weight[distinct.to(self.weight.device)].to(ids.device)
        return rows[places]


def keep_embeddings_on_host(model: PreTrainedModel, name: str) -> None:
    """Take the input embeddings of a loaded model to the host's memory.

    Args:
        name: of the model, for the error.

    Raises:
        UserError: the head is the same table, which the device needs, or the table is of a kind
            that does more than look up rows.
    """
    table = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is not None and head.weight is table.weight:
        raise UserError(tied(name))
    # A subclass may scale what it looks up, as Gemma's does
    if type(table) is not nn.Embedding or table.max_norm is not None:
        raise UserError(
            f"embeddings: host: those of {name} are of a kind of their own ({type(table).__name__}). Use"
            " embeddings: device."
        )
    device = table.weight.device
    if device.type == "cpu":
        logger.warning("embeddings: host: the model is in the host's memory as a whole; nothing is saved.")

    # In its place in the model, and the device's copy given back
    place = next(path for path, module in model.named_modules() if module is table)
    model.set_submodule(place, HostEmbedding(table))
    del table
    if device.type == "cuda":
        torch.cuda.empty_cache()


def tied(name: str) -> str:
    """Return why a tied table cannot be on the host."""
    return (
        f"embeddings: host: {name} has one table for its embeddings and its head (tie_word_embeddings), and"
        " the device needs it. Use embeddings: device."
    )


def require_frozen_embeddings(base: PreTrainedModel, config: LoraConfig) -> None:
    """Raise UserError for an adapter that changes embeddings which are on the host."""
    places = [path for path, module in base.named_modules() if isinstance(module, HostEmbedding)]
    for place in places:
        last = place.rpartition(".")[2]
        whole = last in (config.modules_to_save or [])
        if whole or config.trainable_token_indices or check_target_module_exists(config, place):
            raise UserError(
                f"embeddings: host: the adapter changes {place}, which is in the host's memory and does not"
                " train. Use embeddings: device."
            )
