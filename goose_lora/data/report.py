"""``goose-lora data``: rows as a stage sees them, their lengths, and which are left out.

No model is loaded.
"""

import json
import math
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, median
from typing import Any, NamedTuple, get_args

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from goose_lora.data.demonstrations import Learning, demonstration, prompt_alone, tokens_in_common
from goose_lora.data.formats import (
    CONVERSATIONS,
    FORMATS,
    PROMPTS,
    RANKED_LISTS,
    TEXTS,
    Format,
    Taken,
    looks_like,
    ranks_of,
    take,
)
from goose_lora.data.hints import hints
from goose_lora.data.labelled import pair_words
from goose_lora.data.messages import Content
from goose_lora.data.preferences import check_margin, encode_reply, within
from goose_lora.data.rows import DataArguments, load_rows
from goose_lora.data.shapes import Reading, Shape, StageName, conversation_prompt
from goose_lora.data.sources import HubPlace
from goose_lora.data.tokenization import (
    chat_options,
    foreign_markers,
    require_chat_template,
    row_prompt_ids,
)
from goose_lora.errors import UserError
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.loading import change_ends, load_tokenizer
from goose_lora.terminal import table

MEANT_FOR: tuple[StageName, ...] = ("reward", "sft", "ppo")  # rows are meant for the first that takes them
SHOWN_ROWS = 3
SHOWN_CHARACTERS = 1500  # of one part of a row; the middle of a longer one is left out
# Of the recipes, where nothing else is set: max_length, and max_prompt_tokens of PPO
RECIPE_LIMITS: dict[StageName, int] = {"sft": 1024, "reward": 1024, "ppo": 512}
LEGEND = "⏎ is a line break, · a space at an edge"


class Part(NamedTuple):
    """A piece of a row as it is shown.

    ``length`` is its own, in tokens or words; ``whole`` that of prompt and reply together.
    """

    label: str
    text: str
    length: int
    whole: int


def describe(
    dataset: str,
    *,
    stage: StageName | None = None,
    tokenizer: str | None = None,
    max_length: int | None = None,
    max_rows: int | None = None,
    split: str = "train",
    column_mapping: Sequence[str] | None = None,
    pairs: Sequence[str] | None = None,
    as_chat: bool | None = None,
    leave_out: Sequence[str] | None = None,
    assistant_only_loss: bool = False,
    chat_template_path: str | None = None,
    hub_place: HubPlace | None = None,
) -> str:
    """Return the report on ``dataset``, a file or Hub name, for a terminal.

    Args:
        stage: whose view; the one that the format is meant for if None.
        tokenizer: folder or Hub id; without it lengths are in words and chat messages are shown
            unrendered.
        max_length: tokens; longer prompts (ppo) or replies (reward) count as left out, longer
            texts (sft) as cut. With a tokenizer it is the recipe's default if None.
        chat_template_path, hub_place: as the recipes' settings.

    Raises:
        ValueError: what ``load_rows`` and ``take`` raise; messages for a tokenizer without a chat
            template; max_length or chat_template_path without a tokenizer.
    """
    _check_options(tokenizer, max_rows, max_length, chat_template_path)
    # Rows as the stage takes them, and the tokenizer that it would use
    rows = load_rows(
        dataset,
        split,
        max_rows,
        column_mapping,
        place=hub_place,
        split_by="--split",
        is_default=split == DataArguments.dataset_split,
    )
    how = Reading(tuple(pair_words(pairs) or ()), as_chat, tuple(leave_out or ()))
    stage = stage or _main_stage(rows, dataset, how)
    taken = take(rows, stage, dataset, how)
    encoder = None if tokenizer is None else _encoder(tokenizer, chat_template_path, taken, dataset)
    if encoder is not None and max_length is None:
        max_length = RECIPE_LIMITS[stage]
    # Each row in its pieces; rows keep their numbers in the file
    cut = max_length if stage == "sft" else None
    learning = Learning(cut, assistant_only_loss=assistant_only_loss)
    numbers = taken.numbers
    parts, lost = _all_parts(taken, stage, encoder, learning, dataset)
    kept = [kept_parts(row, stage, max_length) for row in parts]
    too_long = {place for place, row in enumerate(parts) if max_length and _whole(row) > max_length}
    dropped = {**taken.dropped}
    if lost:
        dropped[f"nothing of the reply is left to learn at max_length={max_length}"] = lost
    if gone := [numbers[place] for place in sorted(too_long) if not kept[place]]:
        dropped[f"longer than max_length={max_length}"] = gone
    # The text: what the rows are, three of them, lengths, and what is left out
    shown = [place for place, row in enumerate(kept) if row and numbers[place] not in lost][:SHOWN_ROWS]
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [
        f"{dataset}: {_count(len(rows), 'row')}, columns {', '.join(rows.column_names)}",
        *_format_lines(rows, taken, stage, how),
        "",
    ]
    lines += [*textwrap.wrap(_view(taken, stage, encoder, assistant_only_loss), width), ""]
    for sentence in hints(taken.rows, encoder, as_chat=as_chat, numbers=numbers) if encoder else []:
        lines += [*textwrap.wrap(sentence[0].upper() + sentence[1:], width), ""]
    lines += _marker_lines(taken, stage, encoder)
    for place in shown:
        lines += _row_lines(numbers[place], kept[place], width)
    lines += _length_lines(parts, "tokens" if encoder else "words")
    if stage == "sft" and max_length is not None:
        lines.append(f"{len(too_long):,} of {_count(len(parts), 'row')} cut at max_length={max_length}")
    if stage == "reward" and (shorter := sum(bool(kept[place]) for place in too_long)):
        lines.append(f"{_count(shorter, 'list')} without their replies over max_length={max_length}")
    lines += ["", *_dropped_lines(dropped, len(rows))]
    return "\n".join([*lines, *_settings_lines(dataset, stage, column_mapping, how)])


def _check_options(
    tokenizer: str | None, max_rows: int | None, max_length: int | None, chat_template_path: str | None
) -> None:
    """Raise UserError for options that need another one, and for counts that are none."""
    if max_length is not None and tokenizer is None:
        raise UserError(
            f"--max_length {max_length} counts tokens: give --tokenizer too, a Hub id, a folder or embedded."
        )
    if chat_template_path is not None and tokenizer is None:
        raise UserError(
            "--chat_template_path is for a tokenizer: give --tokenizer too, a Hub id, a folder or embedded."
        )
    for option, value in (("max_rows", max_rows), ("max_length", max_length)):
        if value is not None and value < 1:
            raise UserError(f"--{option} {value}: must be 1 or more.")


def _encoder(tokenizer: str, template_path: str | None, taken: Taken, name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer as the recipes do, with a chat template where the rows need one."""
    encoder = load_tokenizer(ModelArguments(tokenizer))
    change_ends(encoder, template_path, None)
    if taken.kind == "chat":
        require_chat_template(encoder, name)
    return encoder


def _settings_lines(
    dataset: str, stage: StageName, column_mapping: Sequence[str] | None, how: Reading
) -> list[str]:
    """Return the YAML lines that make a recipe read rows so; none where the name is enough."""
    # Only what was given here: a preset that the columns fit needs no line
    given = {
        "column_mapping": column_mapping,
        "pairs": how.pairs,
        "as_chat": how.as_chat,
        "leave_out": how.leave_out,
    }
    lines = [
        f"  {name}: {json.dumps(list(value) if isinstance(value, Sequence) else value)}"
        for name, value in given.items()
        if value is not None and value != ()
    ]
    if not lines:
        return []
    return ["", f"settings of recipes/{stage}.py:", f"  dataset_name: {dataset}", *lines]


def _all_parts(
    taken: Taken,
    stage: StageName,
    encoder: PreTrainedTokenizerBase | None,
    learning: Learning,
    name: str,
) -> tuple[list[list[Part]], list[int]]:
    """Return the pieces of all rows, and the numbers of rows whose reply is cut away."""
    parts, lost = [], []
    for number, row in zip(taken.numbers, _rows(taken), strict=True):
        try:
            if "margin" in row:
                check_margin(row["margin"])
            parts.append(row_parts(row, taken, stage, encoder, cut=learning.max_length, learning=learning))
            if encoder is not None and stage == "sft" and not demonstration(row, encoder, learning).has_reply:
                lost.append(number)
        except UserError as error:
            raise UserError(f"{name}: row {number}: {error}") from error
    return parts, lost


def row_parts(
    row: Mapping[str, Any],
    taken: Taken,
    stage: StageName,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    cut: int | None = None,
    learning: Learning | None = None,
) -> list[Part]:
    """Return the pieces of a row: its prompt, if it has one, then each reply that the stage sees.

    With a tokenizer they are what TRL's trainers and ``tokenize_prompts`` make of the row, decoded.
    A reply begins at the first token in which prompt and reply together differ from the prompt
    alone. Text beyond ``cut`` tokens is not shown; lengths are those of the whole.
    """
    # Without a tokenizer: words, as they are in the file
    prompt, replies = _pieces(row, taken.format, stage)
    if tokenizer is None:
        length = 0 if prompt is None else _words(prompt)
        shown = [] if prompt is None else [Part("prompt", _plain(prompt), length, length)]
        return shown + [
            Part(label, _plain(reply), _words(reply), length + _words(reply))
            for label, reply in replies.items()
        ]
    # With one, the tokens of the stage itself: prompt and reply together, and the prompt alone
    if stage == "ppo":
        alone = row_prompt_ids(row, tokenizer)
        return [Part("prompt", _decode(alone, tokenizer), len(alone), len(alone))]
    if stage == "sft":
        return _learned_parts(row, prompt, replies, tokenizer, learning or Learning(cut))
    alone = _alone(row, prompt, tokenizer)
    options = chat_options(row)
    wholes = {
        label: encode_reply(tokenizer, prompt, reply, append_eos=True, **options)
        for label, reply in replies.items()
    }
    # The reply begins where the two differ: a token may span both
    start = min(tokens_in_common(alone, whole) for whole in wholes.values())
    end = cut if cut is not None else max(map(len, wholes.values()))
    parts = (
        [Part("prompt", _decode(alone[: min(start, end)], tokenizer), start, start)]
        if prompt is not None
        else []
    )
    return parts + [
        Part(label, _decode(whole[start:end], tokenizer), len(whole) - start, len(whole))
        for label, whole in wholes.items()
    ]


def kept_parts(parts: list[Part], stage: StageName, max_length: int | None) -> list[Part]:
    """Return the pieces of a row that the stage keeps at its limit; none where it keeps none."""
    if stage == "sft" or max_length is None:
        return parts
    prompt = [part for part in parts if part.label == "prompt"]
    if stage == "ppo":
        return [part for part in prompt if 0 < part.length <= max_length]
    # A list goes on without its long replies, while two of different rank are left
    replies = [part for part in parts if part.label != "prompt"]
    replies = [replies[place] for place in within([part.whole for part in replies], max_length)]
    ranks = {part.label.rpartition("rank ")[2] for part in replies}
    return [*prompt, *replies] if len(ranks) > 1 else []


def _learned_parts(
    row: Mapping[str, Any],
    prompt: Content | None,
    replies: Mapping[str, Content],
    tokenizer: PreTrainedTokenizerBase,
    learning: Learning,
) -> list[Part]:
    """Return the pieces of a row for fine-tuning, as ``demonstration`` tokenizes it.

    Where not all of a reply is learned, or not all of a text, its pieces say which are.
    """
    tokens = demonstration(row, tokenizer, learning)
    (label,) = replies
    start = tokens_in_common(_alone(row, prompt, tokenizer), tokens.ids)
    parts = []
    if prompt is not None:
        parts.append(Part("prompt", _decode(tokens.ids[:start], tokenizer), start, start))
    whole = tokens.whole
    plain = all(tokens.learned[start:]) and (start == 0 or len(set(tokens.learned[:start])) == 1)
    if plain:
        return [*parts, Part(label, _decode(tokens.ids[start:], tokenizer), whole - start, whole)]
    # Runs of tokens that are learned, and that are not
    parts, first = [], 0
    for place in range(1, len(tokens.ids) + 1):
        if place == len(tokens.ids) or tokens.learned[place] != tokens.learned[first]:
            name = "learned" if tokens.learned[first] else "read only"
            parts.append(Part(name, _decode(tokens.ids[first:place], tokenizer), place - first, whole))
            first = place
    return parts


def _alone(row: Mapping[str, Any], prompt: Content | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a prompt without its reply."""
    return prompt_alone(prompt, tokenizer, chat_options(row)) if prompt else []


def _rows(taken: Taken) -> Iterator[Any]:
    yield from taken.rows


def _pieces(row: Mapping[str, Any], format: Format, stage: StageName) -> tuple[Any, dict[str, Any]]:
    """Return the prompt of a row (None where there is none) and its replies by name."""
    if stage == "ppo":
        return row["prompt"], {}
    if format is TEXTS:
        return None, {"text": row["text"]}
    prompt = conversation_prompt(row["messages"]) if format is CONVERSATIONS else row["prompt"]
    if format is CONVERSATIONS:
        reply = row["messages"][len(prompt) :]
        return (prompt, {"reply": reply}) if prompt and reply else (None, {"messages": row["messages"]})
    if format is RANKED_LISTS:
        places = sorted(enumerate(ranks_of(row)), key=lambda place: place[1])
        return prompt, {
            f"{number}: rank {rank}": row["completions"][place]
            for number, (place, rank) in enumerate(places, 1)
        }
    # Pairs and completions, whose prompt is the row's own or what both begin with
    names = (
        {"chosen": "chosen", "rejected": "rejected"}
        if "chosen" in format.columns
        else {"reply": "completion"}
    )
    return prompt or None, {label: row[column] for label, column in names.items()}


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _plain(value: Content) -> str:
    if isinstance(value, str):
        return value
    return "\n".join(
        f"{message['role']}: {message.get('content') or message.get('tool_calls')}" for message in value
    )


def _words(value: Content) -> int:
    return len(
        (
            value if isinstance(value, str) else " ".join(message.get("content") or "" for message in value)
        ).split()
    )


def _whole(parts: Sequence[Part]) -> int:
    return max(part.whole for part in parts)


def _main_stage(rows: Dataset, name: str, how: Reading) -> StageName:
    """Return the stage that rows of this shape are meant for."""
    refused: list[str] = []
    for stage in MEANT_FOR:
        try:
            shape = looks_like(rows, stage, how)
        except UserError as error:
            refused.append(str(error))
            continue
        # KTO's rows are lists for the reward model only where a prompt has both kinds
        if shape is not None and "label" not in shape.form:
            return stage
    # What is known and not understood says more than a list of columns
    if refused:
        raise UserError(f"{name}: {refused[0]}")
    columns = rows.column_names
    accepted = " or ".join("+".join(format.columns) for format in FORMATS)
    way_out = f"Rename yours, for example --column_mapping {columns[0]}=prompt."
    raise UserError(f"{name}: has the columns {', '.join(columns)}; the stages take {accepted}. {way_out}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _format_lines(rows: Dataset, taken: Taken, stage: StageName, how: Reading) -> list[str]:
    kind = "plain text" if taken.kind == "text" else "chat messages"
    shape = looks_like(rows, stage, how)
    lines = [f"format: {_title(rows, shape)}, {kind}"]
    # Which stages could take the same rows, and what others need
    for other in get_args(StageName):
        try:
            found = looks_like(rows, other, how)
        except UserError:
            found = None
        if found is None:
            needed = " or ".join("+".join(f.columns) for f in FORMATS if other in f.stages)
            lines.append(f"  {other:6}  no: takes {needed}")
            continue
        alone = ", the prompt alone" if other == "ppo" and found.title != PROMPTS.title else ""
        title = "" if shape is None or found.title == shape.title else f", as {_title(rows, found)}"
        shown = " (shown below)" if other == stage else f"; --stage {other} shows it"
        lines.append(f"  {other:6}  yes{alone}{title}{shown}")
    # Reward functions get all columns but the prompt; elsewhere what is not used is told
    if stage == "ppo":
        others = [column for column in taken.rows.column_names if column != "prompt"]
        return [*lines, f"  kept for reward functions: {', '.join(others)}"] if others else lines
    return [*lines, f"  ignored: {', '.join(taken.ignored)}"] if taken.ignored else lines


def _title(rows: Dataset, shape: Shape | None) -> str:
    if shape is None:
        return ""
    # As the format names them first, then as the file does
    used = [column for column in (*shape.form, *rows.column_names) if column in shape.uses]
    extras = ("ranks", "margin", "tools", "chat_template_kwargs")
    return f"{shape.title} ({' + '.join(column for column in dict.fromkeys(used) if column not in extras)})"


def _view(
    taken: Taken, stage: StageName, encoder: PreTrainedTokenizerBase | None, only_assistant: bool = False
) -> str:
    if encoder is None:
        what = "chat messages without a template" if taken.kind == "chat" else "text without special tokens"
        return f"Rows as they are in the file: {what}. --tokenizer shows what the model sees. {LEGEND}."
    if stage == "ppo":
        how = "Prompts as PPO sees them; the policy writes the replies."
    elif stage == "sft":
        loss = "the reply" if "completion" in taken.format.columns else "all of it"
        if only_assistant:
            loss = "the assistant's turns"
        how = f"Rows as SFT sees them; the loss is on {loss}."
    else:
        how = "Rows as the reward model sees them: each reply after the prompt."
        how += (
            f" {encoder.eos_token} at the end is left out with append_eos: false."
            if taken.kind == "text"
            else ""
        )
    return f"{how} {LEGEND}."


def _marker_lines(taken: Taken, stage: StageName, encoder: PreTrainedTokenizerBase | None) -> list[str]:
    """Warn of texts that went through the template of another family."""
    if encoder is None or taken.kind == "chat":
        return []
    first = "text" if "text" in taken.format.columns else "prompt"
    found = [marks for row in _rows(taken) if (marks := foreign_markers(row[first], encoder))]
    if not found:
        return []
    shown = ", ".join(dict.fromkeys(found[0]))
    return [
        (
            f"{_count(len(found), 'row')}: {first} has {shown}, which are no tokens of this tokenizer but"
            " plain text. Use messages, or a base of that family."
        ),
        "",
    ]


def _row_lines(number: int, parts: Sequence[Part], width: int) -> list[str]:
    margin = max(len(part.label) for part in parts) + 4
    lines = [f"-- row {number} ".ljust(width, "-")]
    for part in parts:
        wrapped = [
            piece
            for line in _visible(part.text).split("\n")
            for piece in _wrap(line, max(width - margin, 20))
        ]
        lines.append(f"  {part.label}".ljust(margin) + ("\n" + " " * margin).join(wrapped))
    return [*lines, ""]


def _visible(text: str) -> str:
    """Make spaces at the edges, line breaks and control characters visible.

    The middle of a long text is left out.
    """
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    # Spaces at the edges as dots; what a terminal would obey, as backslash escapes
    body = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    after = len(text) - len(body) - before
    escaped = "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in body
    )
    return ("·" * before + escaped.replace("\n", "⏎\n") + "·" * after).removesuffix("\n") or "(nothing)"


def _wrap(line: str, width: int) -> list[str]:
    """Cut a line into pieces of at most ``width`` characters, after a space where there is one.

    Joined they are the line again.
    """
    pieces = []
    while len(line) > width:
        place = line.rfind(" ", 0, width) + 1 or width
        pieces.append(line[:place])
        line = line[place:]
    return [*pieces, line]


def _length_lines(parts: Sequence[Sequence[Part]], unit: str) -> list[str]:
    # Lengths by the label of the piece; ranks of a list together
    columns: dict[str, list[int]] = {}
    for row in parts:
        for part in row:
            columns.setdefault("reply" if ": rank" in part.label else part.label, []).append(part.length)
    if any(len(row) > 1 for row in parts):
        columns["prompt + longest reply" if any(len(row) > 2 for row in parts) else "prompt + reply"] = [
            _whole(row) for row in parts
        ]
    rows: list[dict[str, Any]] = [
        {unit: label, "min": min(values), "median": round(median(values)), "mean": round(mean(values), 1)}
        | {"95 %": sorted(values)[math.ceil(0.95 * len(values)) - 1], "max": max(values)}
        for label, values in columns.items()
    ]
    return table(rows, [unit, "min", "median", "mean", "95 %", "max"]).split("\n")


def _dropped_lines(dropped: Mapping[str, Sequence[int]], count: int) -> list[str]:
    if not dropped:
        return ["No row is left out."]
    left_out = sum(map(len, dropped.values()))
    lines = [f"{left_out:,} of {_count(count, 'row')} left out:"]
    for reason, numbers in dropped.items():
        first = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        lines.append(f"  {len(numbers):,}  {reason}: row{'' if len(numbers) == 1 else 's'} {first}")
    return lines
