"""The training of a reward model on ranked lists.

All completions of a prompt are in one batch element, one forward a completion (Ouyang et al. 2022,
3.5).
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from goose_lora.data.tokenization import right_pad
from goose_lora.errors import UserError
from goose_lora.functional import ranking_loss, untied_pairs


def collate_ranked(
    rows: Sequence[dict[str, Any]], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """Collate all completions of all rows into one batch of N, padded on the right.

    Return ``input_ids`` and ``attention_mask`` (N, L), ``ranks`` (N,), and ``prompts`` (N,), the
    number of the row in the batch.
    """
    ids, mask = right_pad(
        [ids for row in rows for ids in row["completion_ids"]], pad_token_id, pad_to_multiple_of
    )
    # Which prompt each completion answers: only those of one prompt are compared
    counts = torch.tensor([len(row["ranks"]) for row in rows])
    ranks = torch.tensor([rank for row in rows for rank in row["ranks"]])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "ranks": ranks,
        "prompts": torch.arange(len(rows)).repeat_interleave(counts),
    }


def pad_id(args: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills up texts, which TRL gives the tokenizer only as it is made."""
    token = cast(str, args.pad_token or tokenizer.pad_token)
    return cast(int, tokenizer.convert_tokens_to_ids(token))


class RankedRewardTrainer(RewardTrainer):
    """``trl.RewardTrainer`` for data of ``preferences.tokenize_ranked``.

    ``per_device_train_batch_size`` counts prompts, not completions.

    Raises:
        UserError: ``center_rewards_coefficient``, which is defined for pairs.
    """

    def __init__(self, *, args: RewardConfig, processing_class: PreTrainedTokenizerBase, **kwargs: Any):
        if args.center_rewards_coefficient is not None:
            raise UserError(
                f"center_rewards_coefficient={args.center_rewards_coefficient} is for pairs, not for ranked"
                " lists. Leave it out; reference_dataset_name shifts the scores exactly, after training."
            )
        args = copy.copy(args)
        args.remove_unused_columns = False  # what RewardTrainer counts as used are its own columns, not these
        # Our collator, since a row has any number of completions
        multiple: Any = args.pad_to_multiple_of
        pad = pad_id(args, processing_class)
        self.seen: dict[str, list[float]] = defaultdict(list)
        # Not a lambda: processes that load data may have to pickle it
        kwargs["data_collator"] = partial(collate_ranked, pad_token_id=pad, pad_to_multiple_of=multiple)
        super().__init__(args=args, processing_class=processing_class, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: object = None,
    ) -> Any:
        """Return the loss over all untied pairs, where TRL's is over two halves of a batch."""
        # One forward of all completions; their pairs are made of scores alone
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        scores = outputs.logits.squeeze(-1)
        loss = ranking_loss(scores, inputs["ranks"], inputs["prompts"])
        with torch.no_grad():
            # TRL's metrics, means over pairs, alike on all processes
            better, worse = untied_pairs(inputs["ranks"], inputs["prompts"])
            margins = scores[better].float() - scores[worse].float()
            seen = {
                "accuracy": (margins > 0).float().mean(),
                "margin": margins.mean(),
                "mean_reward": scores.float().mean(),
            }
            for name, value in seen.items():
                mean = cast(Tensor, self.accelerator.reduce(value, reduction="mean"))
                self.seen[name].append(mean.item())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means of what ``compute_loss`` saw since the last time, under TRL's names."""
        assert self.model is not None
        prefix = "" if self.model.training else "eval_"
        logs.update({f"{prefix}{name}": sum(values) / len(values) for name, values in self.seen.items()})
        self.seen.clear()
        super().log(logs, start_time)
