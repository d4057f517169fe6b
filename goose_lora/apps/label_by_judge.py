"""``goose-lora label --judge``: a judge behind a server chooses, of a file's or a policy's replies.

What it decides in both orders becomes a pair in TRL's preference format.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from goose_lora.apps.label import Choice, LabelQueue
from goose_lora.apps.session import Prompt
from goose_lora.data.rows import load_rows
from goose_lora.errors import UserError
from goose_lora.files import write_jsonl
from goose_lora.rewards.group_judge import compared_pairs
from goose_lora.rewards.pairwise_judge import (
    LEAST_QUESTIONS,
    SERVED,
    Comparison,
    PairwiseJudge,
    check_judge_settings,
    rubric_text,
    served_model,
)

logger = logging.getLogger(__name__)

_CHOICES: dict[float | None, Choice] = {1.0: "left", 0.0: "right", 0.5: "tie", None: "skip"}
_TEMPLATE = ("tools", "chat_template_kwargs")  # columns that pairs take along
_LISTED = "completions"  # the column of lists that is read where none is named


def labelling_judge(name: str, *, base_url: str | None, rubric: str | None, out: str | Path) -> PairwiseJudge:
    """Return the judge that ``openai:MODEL`` names, whose answers are kept beside ``out``.

    Raises:
        UserError: settings that cannot be, or as ``PairwiseJudge``.
    """
    if not name.startswith(SERVED):
        raise UserError(f"--judge {name}: write {SERVED}MODEL, a model behind an OpenAI-compatible server.")
    check_judge_settings(name, base_url, rubric, setting="--judge")
    return PairwiseJudge(
        served_model(name),
        base_url=base_url,
        rubric=rubric_text(rubric),
        cache=Path(out).with_suffix(".judge_cache.jsonl"),
        least_questions=LEAST_QUESTIONS,
    )


# ---- A policy's replies ----


def judge_queue(queue: LabelQueue, judge: PairwiseJudge) -> str:
    """Let the judge choose from all pairs of a queue; return what has come of it.

    Ties and contradictions are recorded as ties, pairs without an answer as skipped.

    Raises:
        UserError: the server fails for good. What was chosen is in the file.
    """
    # A prompt that has a line already is not asked again
    before = queue.progress()
    done = before["pairs"] + before["passed"]
    with tqdm(total=before["prompts"], initial=done, desc="judge", unit="prompt", disable=None) as bar:
        while (pair := queue.next("judge")) is not None:
            asked = Comparison(pair.prompt, pair.left.text, pair.right.text)
            (outcome,) = judge.compare_pairs([asked], shows=False)
            queue.record("judge", pair.key, _CHOICES[outcome])
            bar.update()
    counts = queue.progress()
    return (
        f"{counts['pairs']} pairs in {queue.file.path}, of {counts['prompts']} prompts; {counts['passed']}"
        f" ties or without an answer in {queue.file.passed}, {counts['alike']} without two different"
        f" replies.\n{judge.told()}"
    )


# ---- Replies in a file ----


class _Row(NamedTuple):
    """A prompt with its different replies, as its row has them and as texts."""

    prompt: Prompt
    replies: list[Any]
    texts: list[str]
    template: dict[str, Any]  # what a chat template gets besides

    def pair(self, better: int, worse: int) -> dict[str, Any]:
        """Return a line of preferences, in messages where the prompt is messages."""
        chosen, rejected = (self._written(self.replies[place]) for place in (better, worse))
        return {"prompt": self.prompt, "chosen": chosen, "rejected": rejected, **self.template}

    def _written(self, reply: object) -> object:
        if isinstance(self.prompt, str) or not isinstance(reply, str):
            return reply
        return [{"role": "assistant", "content": reply}]


def judge_replies(
    replies: str, out: str | Path, judge: PairwiseJudge, *, columns: Sequence[str] | None = None
) -> str:
    """Let the judge compare the replies of each row; write pairs, and return what has come of it.

    Up to four different replies to a prompt are all compared; of more, each meets four others. Ties
    and contradictions are no pairs. Nothing is written before all is asked; a second call takes the
    answers so far from the judge's file.

    Args:
        replies: file or Hub dataset of rows with ``prompt``, text or messages, and replies.
        out: the .jsonl of pairs, which must not be there.
        columns: one with lists of replies (``completions`` if not given), or two or more with one
            reply each.

    Raises:
        UserError: rows that cannot be read so, nothing to compare, or the server fails for good.
    """
    # Which replies meet which: known before anybody is asked
    path = _new_file(out)
    rows, alike = _read_replies(replies, list(columns or [_LISTED]))
    met = [(row, *places) for row in rows for places in compared_pairs(len(row.texts))]
    if not met:
        raise UserError(f"--replies {replies}: no row has two different replies to compare.")
    # What it may cost comes first, then one question that shows whether the server answers
    tqdm.write(f"{len(rows):,} prompts, {len(met):,} pairs of replies: at most {2 * len(met):,} calls.")
    judge.check()
    path.parent.mkdir(parents=True, exist_ok=True)
    outcomes = judge.compare_pairs(
        [Comparison(row.prompt, row.texts[first], row.texts[second]) for row, first, second in met]
    )

    # Pairs are what both orders agree on
    decided = [
        row.pair(first, second) if outcome else row.pair(second, first)
        for (row, first, second), outcome in zip(met, outcomes, strict=True)
        if outcome in (0.0, 1.0)
    ]
    silent = sum(outcome is None for outcome in outcomes)
    told = (
        f"{len(decided)} pairs of {len(met)} that were compared; left out: {outcomes.count(0.5)} ties and"
        f" contradictions, {silent} without an answer; {alike} prompts without two different replies."
    )
    if not decided:
        raise UserError(f"--judge: no pair is decided, and {path} is not written: {told} {judge.told()}")
    write_jsonl(path, decided)
    return f"{told}\n{judge.told()}\nSaved in {path}"


def _new_file(out: str | Path) -> Path:
    path = Path(out)
    if path.suffix != ".jsonl":
        raise UserError(f"--out {out}: pairs are written line by line. Give a name that ends in .jsonl.")
    if path.exists():
        raise UserError(
            f"--out {out}: is there already, and pairs of replies in a file are written anew. Give another"
            " name, or move it away; answers so far stay in the judge's own file."
        )
    return path


def _read_replies(name: str, columns: Sequence[str]) -> tuple[list[_Row], int]:
    """Return the rows with two different replies or more, and how many have not."""
    # Columns that are asked for must be there, and others are told
    found = load_rows(name)
    missing = [column for column in ("prompt", *columns) if column not in found.column_names]
    if missing:
        raise UserError(
            f"--replies {name}: has the columns {', '.join(found.column_names)}, and not"
            f" {', '.join(missing)}. Name the replies by --columns: one with lists, or two or more with a"
            " reply each; the prompt's is prompt."
        )
    ignored = [name for name in found.column_names if name not in ("prompt", *columns, *_TEMPLATE)]
    if ignored:
        logger.warning("%s: ignored: %s", name, ", ".join(ignored))
    rows, alike = [], 0
    for number, row in enumerate(found, 1):
        read = _read_row(f"--replies {name}: row {number}", dict(row), columns)
        if len(read.texts) < 2:
            alike += 1
        else:
            rows.append(read)
    return rows, alike


def _read_row(where: str, row: Mapping[str, Any], columns: Sequence[str]) -> _Row:
    # The prompt, and its replies as a list
    prompt = row["prompt"]
    if not prompt or not isinstance(prompt, (str, list)):
        raise UserError(f"{where} has no prompt of text or messages.")
    replies = [row[column] for column in columns]
    if len(columns) == 1:
        (replies,) = replies
        if not isinstance(replies, list):
            raise UserError(
                f"{where} has no list in {columns[0]}. Name two columns or more, of a reply each."
            )
    # Replies of one text are one reply
    different: dict[str, Any] = {}
    for reply in replies:
        different.setdefault(_text(where, reply, chat=not isinstance(prompt, str)), reply)
    template = {name: row[name] for name in _TEMPLATE if row.get(name) is not None}
    return _Row(prompt, list(different.values()), list(different), template)


def _text(where: str, reply: object, *, chat: bool) -> str:
    """Return the text of a reply, itself or in the one turn of an assistant."""
    if isinstance(reply, str):
        return reply
    turns = reply if isinstance(reply, list) and chat else []
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    alone = len(turns) == 1 and turns[0].get("role") == "assistant"
    if not alone or not isinstance(contents[0], str):
        raise UserError(
            f"{where} has a reply that is neither text nor, beside a prompt of messages, one turn of the"
            " assistant with a text."
        )
    return contents[0]
