"""The training of a reward model on pairs, some of which may be ties."""

import copy
from collections import defaultdict
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from goose_lora.functional import pairwise_loss
from goose_lora.rewards.ranking_trainer import pad_id

TARGET = "target"  # the column with the probability that the chosen reply is the better one


class TargetCollator(DataCollatorForPreference):
    """TRL's collator of pairs, which also hands on the column ``target`` where rows have it."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate pairs."""
        batch = super().torch_call(examples)
        if TARGET in examples[0]:
            batch[TARGET] = torch.tensor([example[TARGET] for example in examples], dtype=torch.float)
        return batch


class PairRewardTrainer(RewardTrainer):
    """``trl.RewardTrainer`` for pairs of which some are ties: rows with a column ``target``.

    Without that column it is TRL's own.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: RewardConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase,
        peft_config: PeftConfig | None = None,
    ):
        self.seen: dict[str, list[float]] = defaultdict(list)
        collator = None
        if TARGET in train_dataset.column_names:
            args = copy.copy(args)
            multiple = cast(int | None, args.pad_to_multiple_of)
            args.remove_unused_columns = False  # what TRL counts as used are its own columns, not this one
            collator = TargetCollator(
                pad_token_id=pad_id(args, processing_class), pad_to_multiple_of=multiple
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=cast(Dataset, eval_dataset),  # or several by name
            processing_class=processing_class,
            peft_config=peft_config,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        """Return the loss. Overridden for rows with ``target``, which TRL's loss does not know."""
        target = inputs.pop(TARGET, None)
        if target is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        loss = pairwise_loss(chosen, rejected, inputs.get("margin"), target)
        centred = cast(RewardConfig, self.args).center_rewards_coefficient
        if centred is not None:
            loss = loss + centred * ((chosen + rejected) ** 2).mean()
        if not model.training:  # what evaluations see is no part of the training's means
            return (loss, outputs) if return_outputs else loss
        # TRL's figures, of the pairs that are decided: a tie has no right side
        with torch.no_grad():
            margins, decided = (chosen - rejected).float(), target != 0.5
            sums = torch.stack(
                [
                    decided.sum().float(),
                    ((margins > 0) & decided).sum().float(),
                    torch.where(decided, margins, 0.0).sum(),
                    outputs.logits.float().mean(),
                ]
            )
            count, right, margin, mean = cast(
                Tensor, self.accelerator.reduce(sums, reduction="mean")
            ).tolist()
            self.seen["mean_reward"].append(mean)
            if count:
                self.seen["accuracy"].append(right / count)
                self.seen["margin"].append(margin / count)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means of what ``compute_loss`` saw of pairs with a target, under TRL's names."""
        assert self.model is not None
        if self.model.training:
            logs.update({name: sum(values) / len(values) for name, values in self.seen.items()})
            self.seen.clear()
        super().log(logs, start_time)
