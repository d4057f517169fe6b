"""``goose-lora verdict``: any reward model on any preference data.

An adapter of this project or of PEFT, an ensemble of them, or a sequence classifier.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import file_exists, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers import PreTrainedTokenizerBase

from goose_lora.data.preferences import encode_reply
from goose_lora.data.rows import fingerprint, load_rows, take_told
from goose_lora.data.shapes import Reading
from goose_lora.data.sources import HubPlace
from goose_lora.data.tokenization import right_pad
from goose_lora.embedded import resolve
from goose_lora.errors import UserError
from goose_lora.evaluation.benchmark import BenchmarkVerdict, benchmark_verdict
from goose_lora.evaluation.ensembles import AGGREGATIONS, combine_scores, figures_line, members_apart
from goose_lora.evaluation.reward_model import HeldOut, HeldOutScores, prepare_held_out
from goose_lora.files import write_json
from goose_lora.models.arguments import ModelArguments, arguments_of, usable_dtype
from goose_lora.models.compatibility import check_fit
from goose_lora.models.ensembles import RewardEnsemble
from goose_lora.models.folders import ADAPTER_CONFIG, AdapterFolder
from goose_lora.models.identity import BaseName, same_base
from goose_lora.models.loading import device_of_process, load_base, lora_config, tokenizer_of
from goose_lora.models.shared_base import SharedBase
from goose_lora.rewards.classifier import PREFIX, ClassifierReward
from goose_lora.terminal import table
from goose_lora.training.validation import require_output_folder

logger = logging.getLogger(__name__)

Quantization = Literal["nf4", "int8", "none"]
Dtype = Literal["bfloat16", "float16", "float32"]
SUBSET = "subset"
SPLIT = "test"  # of --split, where nobody names one
PROBED = 200  # prompts: the interval of a share is then at most 0.07 to either side
COLUMNS = ("subset", "prompts", "replies", "accuracy", "best of N", "length balanced")


class Judged(Protocol):
    """A reward model that is to be judged: how it reads replies, and what it says of them."""

    title: str
    chat: bool
    names: list[str]
    ensemble: RewardEnsemble | None
    tokenizer: PreTrainedTokenizerBase
    append_eos: bool
    encode: Callable[..., list[int]]

    def load(self, held_out: HeldOut) -> None: ...
    def scores(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]: ...


class AdapterModel:
    """A reward adapter on its base, or the members of an ensemble, as PPO loads them."""

    def __init__(
        self, name: str, base: str | None, quantization: Quantization | None, dtype: Dtype | None, batch: int
    ):
        # The adapter, and its base as it was in training
        self.folder = AdapterFolder.open("verdict", name)
        if not self.folder.has_head:
            raise UserError(
                f"{name}: has no score head, so it is no reward model. Give what recipes/reward.py or"
                " trl.RewardTrainer saved."
            )
        lineage, own = self.folder.lineage, self.folder.config["base_model_name_or_path"]
        noted = BaseName(own or "", content=(lineage.get("base") or {}).get("content"))
        if base is not None and noted.content and not same_base(noted, BaseName(resolve(base))):
            raise UserError(
                f"--base {base}: {name} was trained on {own}, whose weights are others. Give that base,"
                " wherever it is now."
            )
        if "base" in lineage:
            arguments = arguments_of(self.folder.path, lineage["base"], base)
        elif base or own:
            arguments = ModelArguments(base or own, quantization="none", dtype=_usual_dtype())
        else:
            raise UserError(f"{name}: does not say what its base is. Say it: --base PATH_OR_HUB_ID.")
        self.arguments = usable_dtype(
            replace(
                arguments,
                quantization=quantization or arguments.quantization,
                dtype=dtype or arguments.dtype,
            )
        )
        self.batch = batch

        # How it reads a text
        self.tokenizer = tokenizer_of(self.folder.path, args=self.arguments)
        self.append_eos = lineage.get("append_eos", True)
        known = [row.get("chat") for row in lineage.get("data", [])]
        self.chat = bool(self.tokenizer.chat_template) and (any(known) or not known)
        self.encode = partial(encode_reply, self.tokenizer, append_eos=self.append_eos)
        self.ensemble = self.folder.ensemble
        self.title = f"{name} on {self.arguments.model_name_or_path}, {self.arguments.quantization}"
        self.names = [f"member_{place}" for place in range(len(self.folder.members))]

    def load(self, held_out: HeldOut) -> None:
        """Put base and adapters into memory, if texts of these lengths fit them."""
        check_fit(
            self.arguments,
            self.tokenizer,
            self.folder.members,
            tokens=max(map(len, held_out.texts())),
            chat=False,
        )
        base = load_base(self.arguments, self.tokenizer)
        # A shared base has a policy; nobody asks this one
        policy = lora_config(replace(self.arguments, lora_r=1, lora_layers="top-1"), base)
        self.shared = SharedBase.build(base, policy, reward=self.folder)
        self.shared.requires_grad_(False).eval()

    @torch.no_grad()
    def scores(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return each member's scores of all texts, less its bias."""
        shared, pad = self.shared, cast(int, self.tokenizer.pad_token_id)
        found = np.zeros((len(self.names), len(texts)))
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        device = next(shared.parameters()).device
        states = list(dict.fromkeys(shared.member_states.values()))
        for first in range(0, len(order), self.batch):
            places = order[first : first + self.batch]
            batch = right_pad([list(texts[place]) for place in places], pad)
            ids, mask = (tensor.to(device) for tensor in batch)
            # The layers below the adapters run once for all members
            trunks = shared.trunks(ids, mask, states)
            found[:, places] = torch.stack(shared.member_scores(ids, mask, trunks)).cpu().numpy()
        return list(found)


class ClassifierModel:
    """A sequence classifier of any origin, with its own tokenizer and template."""

    append_eos = True  # whatever its tokenizer does
    ensemble: RewardEnsemble | None = None

    def __init__(self, name: str, quantization: Quantization | None, dtype: Dtype | None, batch: int):
        self.classifier = ClassifierReward(f"{PREFIX}{name}", batch_size=batch)
        self.arguments = usable_dtype(
            ModelArguments(
                self.classifier.name,
                quantization=quantization or "none",
                dtype=dtype or _usual_dtype(),
            )
        )
        self.tokenizer = self.classifier.tokenizer
        self.chat = bool(self.tokenizer.chat_template)
        self.encode = self.classifier.encode
        self.title = f"{name}, a classifier, {self.arguments.quantization}"
        self.names = [name]

    def load(self, held_out: HeldOut) -> None:
        """Put the weights into memory."""
        self.classifier.load(self.arguments, device_of_process())

    def scores(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return the scores of all texts."""
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        found = np.zeros(len(texts))
        found[order] = self.classifier.score_tokens([texts[place] for place in order])
        return [found]


def _usual_dtype() -> Dtype:
    return "bfloat16" if device_of_process().type == "cuda" else "float32"


def judged_model(
    name: str, *, base: str | None, quantization: Quantization | None, dtype: Dtype | None, batch_size: int
) -> Judged:
    """Return the reward model of a name: an adapter or a classifier, here or on the Hub.

    Raises:
        UserError: it is neither, or a base is named for a classifier.
    """
    name = name.removeprefix(PREFIX)  # as a reward function of PPO has it
    if _is_adapter(name):
        return AdapterModel(name, base, quantization, dtype, batch_size)
    if base is not None:
        raise UserError(f"--base {base}: {name} is no adapter. Leave it out.")
    return ClassifierModel(name, quantization, dtype, batch_size)


def _is_adapter(name: str) -> bool:
    """Return whether a folder, or a repository of the Hub, holds an adapter."""
    for place in (name, name.partition("#")[0]):  # with the label of a classifier
        if place.strip() and Path(place).exists():
            return (Path(place) / ADAPTER_CONFIG).is_file()
    if not name.strip() or name.startswith(("/", ".", "~")):
        return False  # a folder that is missing
    place, _, revision = name.partition("#")[0].partition("@")
    parts = place.split("/")
    if len(parts) > 2 or revision:
        return True  # names of this form are adapters' alone
    if len(parts) < 2:
        return False
    if isinstance(try_to_load_from_cache(place, ADAPTER_CONFIG), str):
        return True
    try:
        return file_exists(place, ADAPTER_CONFIG)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError):
        return False  # the classifier's loader says why it is not to be had


@dataclass(frozen=True)
class BenchmarkRows:
    """Rows of a benchmark as a reward model reads them, and the subset of each, if any."""

    name: str
    split: str
    rows: Dataset
    numbers: tuple[int, ...]
    subsets: tuple[str | None, ...] | None


def benchmark_rows(
    name: str,
    split: str,
    *,
    max_rows: int | None,
    column_mapping: Sequence[str] | None,
    reading: Reading,
    place: HubPlace,
    subset: str | None,
) -> BenchmarkRows:
    """Read pairs, ranked lists, or right and wrong replies; ``subset`` names the subsets' column.

    Raises:
        UserError: as the reader, or there is no such column.
    """
    rows = load_rows(
        name,
        split,
        max_rows,
        column_mapping,
        place=place,
        split_by="--split",
        is_default=split == SPLIT,
    )
    if subset is not None and subset not in rows.column_names:
        raise UserError(
            f"--subset {subset}: {name} has no such column. It has {', '.join(rows.column_names)}."
        )
    column = subset or (SUBSET if SUBSET in rows.column_names else None)
    own = None
    if column is not None:
        own = [None if value is None or value == "" else str(value) for value in rows[column]]
        if missing := own.count(None):
            logger.warning(
                "%s: %d of %d rows have no %s: they count among all, and in no subset.",
                name,
                missing,
                len(own),
                column,
            )
        rows = rows.remove_columns(column)
    taken = take_told(rows, "reward", resolve(name), reading)
    if own is not None and len(taken.numbers) + sum(map(len, taken.dropped.values())) != len(rows):
        raise UserError(
            f"{name}: rows with thumbs up and down become lists of several rows, which have no one {column}."
            f" Leave the column out: --column_mapping {column}=unused_{column}."
        )
    found = None if own is None else tuple(own[number - 1] for number in taken.numbers)
    return BenchmarkRows(name, split, taken.rows, tuple(taken.numbers), found)


def verdict(
    model: str,
    dataset: str,
    *,
    split: str,
    subset: str | None,
    max_rows: int | None,
    max_length: int | None,
    column_mapping: Sequence[str] | None,
    pairs: Sequence[str] | None,
    as_chat: bool | None,
    hub_place: HubPlace,
    base: str | None,
    quantization: Quantization | None,
    dtype: Dtype | None,
    batch_size: int,
    output_dir: str | None,
) -> str:
    """Judge a reward model on a benchmark; return the table, and save ``verdict.json``.

    Raises:
        UserError: no reward model, no such rows, or a result that is there already.
    """
    # 1. What can be known before a weight is read
    for option, value in (("max_rows", max_rows), ("max_length", max_length), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"--{option} {value}: must be 1 or more.")
    path = None if output_dir is None else Path(output_dir) / "verdict.json"
    if path is not None:
        require_output_folder(str(output_dir), option="--output_dir")
        if path.exists():
            raise UserError(f"{path} is there already. Give another --output_dir, or move it away.")
    judged = judged_model(model, base=base, quantization=quantization, dtype=dtype, batch_size=batch_size)
    chat = judged.chat if as_chat is None else as_chat
    found = benchmark_rows(
        dataset,
        split,
        max_rows=max_rows,
        column_mapping=column_mapping,
        reading=Reading(tuple(pairs or ()), chat),
        place=hub_place,
        subset=subset,
    )
    held_out = prepare_held_out(
        found.rows,
        judged.tokenizer,
        name=found.name,
        append_eos=judged.append_eos,
        max_length=max_length,
        numbers=found.numbers,
        encode=judged.encode,
        probe_prompts=PROBED,
    )

    # 2. All texts in one sweep, and the figures of each member and each way to combine them
    judged.load(held_out)
    scores = [held_out.split(flat) for flat in judged.scores(held_out.texts())]
    subsets = None if found.subsets is None else [found.subsets[place] for place in held_out.rows]
    report = _report(judged, held_out, scores, subsets)

    # 3. Saved, then shown
    if path is not None:
        about = {"model": judged.title, "dataset": fingerprint(found.name, found.split, found.rows)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**about, "as_chat": chat, **report.to_dict()})
    return report.text(f"{judged.title}\n{found.name}, prompts read as {'chat' if chat else 'they are'}")


@dataclass(frozen=True)
class BenchmarkReport:
    """The verdict on a reward model, and those of members and aggregations where there are any."""

    whole: BenchmarkVerdict
    members: dict[str, BenchmarkVerdict]
    aggregations: dict[str, BenchmarkVerdict]
    apart: str

    def to_dict(self) -> dict[str, object]:
        """Return JSON values."""
        found = self.whole.to_dict()
        for name, verdicts in (("members", self.members), ("aggregations", self.aggregations)):
            if verdicts:
                found[name] = {key: verdict.to_dict() for key, verdict in verdicts.items()}
        return found

    def text(self, title: str) -> str:
        """Return the table, the verdict's lines, and one for each member and aggregation."""
        rows = self.whole.rows()
        used = [column for column in COLUMNS if any(row.get(column) for row in rows)]
        if all(row.get("accuracy", "") == row["best of N"] for row in rows):
            used.remove("best of N")
        lines = [title, "", table(rows, used), ""]
        lines += [f"  {line}" for line in self.whole.pairs.lines()]
        for verdicts in (self.members, self.aggregations):
            lines += [f"  {figures_line(name, each.pairs)}" for name, each in verdicts.items()]
        return "\n".join([*lines, *([f"  {self.apart}"] if self.apart else [])])


def _report(
    judged: Judged, held_out: HeldOut, scores: list[HeldOutScores], subsets: list[str | None] | None
) -> BenchmarkReport:
    if judged.ensemble is None:
        return BenchmarkReport(benchmark_verdict(held_out, scores[0], subsets), {}, {}, "")
    ensemble = judged.ensemble
    members = {
        name: benchmark_verdict(held_out, own, subsets)
        for name, own in zip(judged.names, scores, strict=True)
    }
    coef = ensemble.uncertainty_coef
    aggregations = {
        name: benchmark_verdict(held_out, combine_scores(ensemble, scores, name, coef)[0], subsets)
        for name in AGGREGATIONS
    }
    apart = members_apart(combine_scores(ensemble, scores, "mean")[1])
    return BenchmarkReport(aggregations[ensemble.aggregation], dict(members), dict(aggregations), apart)
