"""Shapes of rows: which columns a file has, what it looks like, and each row as a stage takes it.

Whatever the shape, a row becomes one of few forms: ``text``; ``messages``; ``prompt`` and
``completion``; ``prompt``, ``chosen`` and ``rejected``; ``prompt``, ``completions`` and ``ranks``;
or ``prompt`` alone. ``tools``, ``chat_template_kwargs`` and ``margin`` go with it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any, Literal, NamedTuple

from goose_lora.data import columns as names
from goose_lora.data import labelled
from goose_lora.data.columns import (
    first_of,
    meaning,
    plain_name,
    says_nothing,
    set_aside,
    setting_aside,
)
from goose_lora.data.labelled import BEST_FIRST, BOTH, Pairs, cell, ranks_from, winner_of
from goose_lora.data.messages import (
    ASKING_ROLES,
    Cell,
    Content,
    Message,
    TurnsAsJson,
    check_asks,
    history_of,
    is_messages,
    is_turns,
    messages_of,
    parsed,
    said,
    system_of,
    texts_of,
    tools_of,
    turns_of,
)
from goose_lora.errors import UserError
from goose_lora.files import is_number

StageName = Literal["sft", "reward", "ppo"]
Row = Mapping[str, Any]
Cells = dict[str, Any]

APART = "\n\n"  # between a prompt and a reply of text that are not glued
TURN_MARKER = "\n\nAssistant:"  # of Anthropic's hh-rlhf, whose texts hold the whole dialogue
# A text that is a dialogue already: it is left as text
DIALOGUE = re.compile(
    r"\n\nAssistant:|### ?(Human|Assistant|Response)|<\|im_start\|>|<\|start_header_id\|>"
    r"|<start_of_turn>|\[INST\]"
)
TWO_SIDES = (("a", "b"), ("0", "1"), ("1", "2"), ("left", "right"))
# Of a reply that is an object: where its text is, and what ranks it
REPLY_KEYS = ("response", "answer", "completion", "generation", "output", "text", "content", "summary")
OF_TWO = ("reply", "conversation", "candidate")  # further names of one of two replies
SCORE_KEYS = ("overall_score", "score", "rating", "reward")
SCORED = ("score", "rating", "reward", "avg_rating")
NO_PROMPT = "chosen and rejected do not begin alike, so there is no prompt in them."
OWN_COLUMN = "Give the prompt in a column of its own."
TLDR = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


class LeftOut(Exception):
    """A row that is sound and teaches nothing; its text is the reason."""


class Reading(NamedTuple):
    """How a user says that rows are to be read: ``pairs``, ``as_chat`` and ``leave_out``."""

    pairs: tuple[str, ...] = ()
    as_chat: bool | None = None
    leave_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shape:
    """What rows look like, and how one of them is read.

    ``asking`` has the prompt's columns, for PPO, which needs no sound replies. ``judged``: a column
    says which reply is better, and others that seem to are told only.
    """

    title: str
    form: tuple[str, ...]
    uses: frozenset[str]
    read: Callable[[Row], Cells]
    judged: bool = False
    asking: "Asking | None" = None


@dataclass
class Columns:
    """The columns of a file with the first value in each, and how they are to be read."""

    values: dict[str, Any]
    reading: Reading
    used: set[str] = field(default_factory=set)

    def find(self, candidates: Sequence[str]) -> str | None:
        """Return the column with the first of these names, and count it as used."""
        column = first_of(self.values, candidates)
        if column is not None:
            self.used.add(column)
        return column

    def has(self, *candidates: str) -> bool:
        """Return whether all these columns are there."""
        return all(first_of(self.values, (plain_name(name),)) is not None for name in candidates)


@dataclass(frozen=True)
class Asking:
    """The columns that a prompt is made of."""

    prompt: str | None
    system: str | None
    input: str | None
    history: str | None
    tools: str | None
    template: str | None
    chat: bool  # text becomes messages
    separate: bool  # text is not glued: prompt and reply have something between
    instead: str = OWN_COLUMN  # what to do where there is no prompt
    turns: bool = False  # prompts may be lists of texts, the first of which is asked

    def of(self, row: Row) -> Content | None:
        """Return the prompt of a row, without its replies; None if it has none.

        Raises:
            UserError: parts that cannot go together.
        """
        # The parts, each as text or messages
        asked = None if self.prompt is None else value_of(self._first(row[self.prompt]), self.prompt)
        system = ""
        if self.system is not None and not says_nothing(row[self.system]):
            system = system_of(row[self.system], self.system)
        about = self._text(row, self.input)
        history = [] if self.history is None else history_of(row[self.history])
        if asked is None:
            return None
        # Text: one paragraph a part, or the turn of the user
        if isinstance(asked, str):
            if not self.chat:
                turns = [said(turn) for turn in history]
                return "\n\n".join(filter(None, [system, *turns, asked, about]))
            asked = [{"role": "user", "content": "\n\n".join(filter(None, [asked, about]))}]
        elif about:
            raise UserError(
                f"{self.input} stands beside a prompt of messages. Put it into them, or"
                f" {setting_aside(str(self.input))}."
            )
        return with_system([*history, *asked], system)

    def asked(self, prompt: Content) -> Content:
        """Return a prompt as the stage gets it: text as the user's turn where that is wanted."""
        return [{"role": "user", "content": prompt}] if self.chat and isinstance(prompt, str) else prompt

    def extras(self, row: Row) -> Cells:
        """Return what the chat template needs besides messages."""
        # Columns of their own
        found: Cells = {}
        if self.tools is not None and (tools := tools_of(row[self.tools])):
            found["tools"] = tools
        if self.template is not None and (template := parsed(row[self.template])):
            if not isinstance(template, dict):
                raise UserError(
                    f"{self.template} is {str(template)[:60]}; expected an object of names and values:"
                    " {enable_thinking: false}."
                )
            found["chat_template_kwargs"] = {
                key: value for key, value in template.items() if value is not None
            }
        # OpenAI's preference data keeps tools beside the messages
        inner = None if self.prompt is None else row[self.prompt]
        if isinstance(inner, dict) and (tools := tools_of(inner.get("tools"))):
            found["tools"] = tools
        return found

    def answer(self, reply: Content, prompt: Content | None) -> Content:
        """Return a reply in the kind of its prompt."""
        # TRL's texts begin with a space, which a turn has no use for
        if isinstance(reply, str) and (isinstance(prompt, list) or (self.chat and prompt is not None)):
            return [{"role": "assistant", "content": reply.removeprefix(" ")}]
        if isinstance(reply, str) and isinstance(prompt, str) and self.separate and prompt:
            apart = prompt[-1:].isspace() or reply[:1].isspace()
            return reply if apart else f"{APART}{reply}"
        return reply

    def _first(self, value: Cell) -> Cell:
        """Return the first text of a list of turns; other prompts are returned as they are."""
        if self.turns and isinstance(value, TurnsAsJson | list) and not is_messages(value):
            return next(iter(texts_of(value) or ()), None)
        if isinstance(value, TurnsAsJson) and texts_of(value) is not None:
            raise UserError(
                f"{self.prompt} is a JSON list of texts: {value[:60]}. Write each turn as a message, or as"
                " plain text."
            )
        return value

    @staticmethod
    def _text(row: Row, column: str | None) -> str:
        value = None if column is None else row[column]
        if says_nothing(value):
            return ""
        if not isinstance(value, str):
            raise UserError(f"{column} is {type(value).__name__}; expected text.")
        return value


def value_of(value: object, column: str) -> Content | None:
    """Return a cell as text or messages; text is text (``as_meant`` has read what stands for more).

    Raises:
        UserError: messages that are not sound, or neither text nor messages.
    """
    alone = isinstance(value, dict) and (is_messages([value]) or is_messages(value.get("messages")))
    if alone or (isinstance(value, list) and value):
        try:
            return messages_of(value)
        except UserError as error:
            raise UserError(f"{column}: {error}") from error
    # What is neither has no place in a prompt or a reply
    if value is not None and not isinstance(value, str | list):
        raise UserError(f"{column} is {type(value).__name__}; expected text or a list of chat messages.")
    return value


def with_system(messages: list[Message], system: str) -> list[Message]:
    """Return messages that begin with this system message; nothing changes where it is empty.

    Raises:
        UserError: they begin with another one.
    """
    if not system:
        return messages
    # The column may repeat the first message, and not contradict it
    if messages and messages[0]["role"] in ("system", "developer"):
        if said(messages[0]) != system:
            raise UserError(
                f"the system column and the first message differ. Keep one: {setting_aside('system')}."
            )
        return messages
    return [{"role": "system", "content": system}, *messages]


def implicit_prompt(chosen: Cell, rejected: Cell) -> Content:
    """Return what both begin with, cut where a reply can begin.

    Both replies keep something. Messages: up to the last turn that asks. Text: after the last
    ``Assistant:`` that opens a paragraph, if there is one (replies may begin alike, or be empty),
    otherwise after the last whole word. TRL's ``extract_prompt`` cuts at the first letter that
    differs, within words and replies.
    """
    # An empty reply of a dialogue: all of it is prompt, and the other goes on from there
    if isinstance(chosen, str):
        for whole, other in ((chosen, rejected), (rejected, chosen)):
            if whole.rstrip().endswith(TURN_MARKER.strip()) and other.startswith(whole.rstrip()):
                return whole.rstrip()
    # What both begin with, to the letter or to the message
    shortest = min(len(chosen), len(rejected)) - 1
    same = next((place for place in range(shortest) if chosen[place] != rejected[place]), max(shortest, 0))
    if isinstance(chosen, str):
        prefix = chosen[:same]
        if TURN_MARKER in prefix:
            return prefix[: prefix.rindex(TURN_MARKER) + len(TURN_MARKER)]
        inside_a_word = not (chosen[same : same + 1].isspace() and rejected[same : same + 1].isspace())
        while inside_a_word and prefix and not prefix[-1].isspace():
            prefix = prefix[:-1]
        return prefix.rstrip(" ")
    # Messages: back to the turn that asks
    while same and chosen[same - 1]["role"] not in ASKING_ROLES:
        same -= 1
    return chosen[:same]


def conversation_prompt(messages: list[Message]) -> list[Message]:
    """Return everything before the assistant's last turn, if that is the last.

    A conversation that ends otherwise is a prompt as a whole.
    """
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def shape_of(values: dict[str, Any], stage: StageName, reading: Reading) -> Shape | None:
    """Return the shape in which ``stage`` takes rows whose columns begin with these values.

    None if the columns say nothing to it.

    Raises:
        UserError: a shape that is known and not understood; two replies without a judgement.
    """
    # Preferences first: fine-tuning alone looks past them
    refuse_by_name(values)
    for look in (_labelled_pairs, _right_and_wrong, _pairs, _lists, _tldr, _label_studio, _scored_sides):
        found = look(Columns(values, reading), stage)
        if found is not None and stage != "sft":
            return found if stage == "reward" else _prompts_of(found)
    if stage == "reward":
        thumbs = _thumbs(Columns(values, reading))
        if thumbs is None:
            _refuse_unjudged(values)
        return thumbs
    return _demonstrations(Columns(values, reading), stage)


def refuse_by_name(values: Mapping[str, Any]) -> None:
    """Raise UserError for shapes of the field that no stage understands, with what to do."""
    # By columns that no other shape has together
    have = Columns(dict(values), Reading())
    labels = parsed(next((values[name] for name in ("labels",) if name in values), None))
    if have.has("completions") and isinstance(labels, list):
        raise UserError(
            "looks like step-wise data (PRM800K: completions are steps, labels judge each). The reward model"
            " here scores whole replies: give prompt, chosen and rejected."
        )
    if have.has("message_id", "parent_id", "role", "text"):
        raise UserError(
            "looks like OpenAssistant's single messages: a row is one turn, and parent_id says what it"
            " answers. Use its conversations: dataset_name: timdettmers/openassistant-guanaco."
        )
    if have.has("message_tree_id") and isinstance(parsed(values.get("prompt")), dict):
        raise UserError(
            "looks like OpenAssistant's trees: a row is a tree of messages. Use its conversations:"
            " dataset_name: timdettmers/openassistant-guanaco."
        )


def leftover(shape: Shape, row: Row, stage: StageName) -> str | None:
    """Return why a row may not be read so: a column with a meaning that ``shape`` does not use.

    The stage ppo gives all but parts of the prompt to reward functions.
    """
    # Only cells that say something count: exports have many empty columns
    for column, value in row.items():
        # Columns of the shape are used; of the others, those that mean something
        what = None if column in shape.uses or says_nothing(value) else meaning(column)
        if what is None or (stage == "ppo" and what not in ("a system message", "a part of the prompt")):
            continue
        if _harmless(column, value, what, shape, stage):
            continue
        return (
            f"the column {column} is {what} ({str(value)[:40]}), and rows read as {shape.title} do not use"
            f" it. {setting_aside(column)} leaves it out, if that is right."
        )
    return None


def _harmless(column: str, value: object, what: str, shape: Shape, stage: StageName) -> bool:
    """Return whether a meaning changes nothing for the stage in this company; it is told then."""
    # A weight of 1 is no weight
    if what == "how much a row counts":
        return value in (1, 1.0, "1")
    if what == "thoughts of the reply":
        return stage != "sft" or "completion" not in shape.form
    if what == "a score or a rank":
        return not isinstance(parsed(value), list) or stage != "reward"
    if what == "a judgement":
        never = plain_name(column).removeprefix("is_") in ("tie", "swapped", "flipped")
        if shape.judged or (never and str(value).lower() in ("false", "0")):
            return True
        # A word for good or bad is one on the reply
        verdict = isinstance(value, str) and names.VERDICTS.fullmatch(value.strip().lower())
        if verdict and "text" not in shape.form:
            return False
        # A class of a text, or a topic: no word on how good it is
        return (
            stage == "sft"
            and not isinstance(value, bool | list)
            and (isinstance(value, str | dict) or "completion" not in shape.form)
        )
    return False


# ---- What a file looks like ----


def _asking(have: Columns, *, plain: bool, replies: Sequence[object] = ()) -> Asking:
    """Return the columns of the prompt; ``plain``: the reply's column has TRL's name."""
    prompt = have.find(names.ASKED)
    # Names that are prompts by what they hold: HelpSteer3's context, SHP's history, OpenAI's input
    if prompt is None:
        for name in ("context", "history", "input"):
            column = first_of(have.values, (name,))
            value = None if column is None else parsed(have.values[column])
            if is_messages(value) or isinstance(value, str | dict):
                prompt = have.find((name,))
                break
    # What goes with it
    system = have.find(names.SYSTEMS)
    beside = [column for column in have.values if column != prompt]
    about, history = first_of(beside, names.INPUTS), first_of(beside, names.HISTORIES)
    have.used |= {column for column in (about, history) if column is not None}
    # Plain names of TRL mean plain text, and so does a dialogue that is written out
    first = "" if prompt is None else have.values[prompt]
    plain = plain and prompt in (None, "prompt") and not (system or about or history)
    texts = [text for text in (first, *replies) if isinstance(text, str)]
    dialogue = any(DIALOGUE.search(text) for text in texts)
    wanted = have.reading.as_chat
    chat = (not plain and not dialogue) if wanted is None else wanted
    return Asking(
        prompt,
        system,
        about,
        history,
        have.find(names.TOOLS),
        have.find(names.TEMPLATE),
        chat,
        separate=not plain and not dialogue,
    )


def _labelled_pairs(have: Columns, stage: StageName) -> Shape | None:
    """Look for two replies and a column that says which is better."""
    # The setting, or a preset that the columns fit
    words = list(have.reading.pairs)
    pairs = None if not words or words == [BEST_FIRST] else labelled.parse_pairs(words)
    if pairs is None:
        pairs = labelled.preset_of(list(have.values))
    elif missing := [column for column in pairs.columns if not have.has(column)]:
        raise UserError(
            f"pairs names {', '.join(missing)}, and there is no such column. There are"
            f" {', '.join(have.values)}."
        )
    if pairs is None:
        return None
    # The columns under the names that the file has
    found: Pairs = pairs
    a, b, *_ = (str(first_of(have.values, (plain_name(name),))) for name in found.columns)
    have.used |= {str(first_of(have.values, (plain_name(name),))) for name in found.columns if have.has(name)}
    # A winner may be named by its model
    models = [column for column in (first_of(have.values, (name,)) for name in labelled.MODELS) if column]
    if found.winner and cell(have.values, found.winner) in [have.values[column] for column in models]:
        have.used |= set(models)
    plain = {a, b} == {"chosen", "rejected"}
    asking = _asking(have, plain=plain, replies=(have.values[a], have.values[b]))
    turns = asking.prompt is not None and plain_name(found.a) == "response_a"
    asking = replace(asking, turns=turns)

    def read(row: Row) -> Cells:
        # A row without a judgement, or with a tie, teaches no preference
        winner = winner_of(row, found)
        if winner is None and stage == "reward":
            raise LeftOut("there is no judgement")
        if winner == "tie" and stage == "reward":
            raise LeftOut("it is a tie, no preference")
        if winner == BOTH and stage == "reward":
            raise LeftOut("it is won by several sides at once")
        if asking.turns:
            row = _turns_of_the_arena(row, str(asking.prompt), a, b)
        # The better one first
        better, worse = (b, a) if winner == "b" else (a, b)
        made = _pair(row, better, worse, asking)
        if found.margin and stage == "reward":
            made["margin"] = _margin(
                cell(row, found.margin), found.margin, is_signed=found.margin == found.winner
            )
        return made

    return Shape(found.title, ("prompt", "chosen", "rejected"), frozenset(have.used), read, True, asking)


def _turns_of_the_arena(row: Row, prompt: str, a: str, b: str) -> Row:
    """Return a row whose prompts and replies are lists of texts, one a turn, as two conversations.

    Any other row is returned as it is.
    """
    # Beside one prompt of text, replies of text are what they are, JSON too
    one = isinstance(row[prompt], str) and not isinstance(row[prompt], TurnsAsJson)
    if is_messages(row[a]) or is_messages(row[prompt]) or (one and isinstance(row[a], str)):
        return row
    # One prompt and one reply a turn; the judgement is on both conversations
    asked, *answers = [row[prompt]] if one else texts_of(row[prompt]), texts_of(row[a]), texts_of(row[b])
    if not all(texts and all(texts) for texts in (asked, *answers)):
        raise LeftOut("a turn is missing")
    sides = []
    for texts in answers:
        turns = list(zip(asked or (), texts or (), strict=False))
        if not len(turns) == len(asked or ()) == len(texts or ()):
            raise LeftOut("there are not as many replies as prompts")
        sides.append(turns_of([str(text) for turn in turns for text in turn]))
    return {**row, a: sides[0], b: sides[1], prompt: str((asked or [""])[0])}


def _pairs(have: Columns, stage: StageName) -> Shape | None:
    """Look for chosen and rejected, with a prompt beside or inside them."""
    sides = next((pair for pair in names.CHOSEN if have.has(*pair)), None)
    if sides is None:
        return None
    better, worse = (str(have.find((side,))) for side in sides)
    asking = _asking(
        have,
        plain=sides == names.CHOSEN[0],
        replies=(have.values[better], have.values[worse]),
    )
    # A text that nothing else says the meaning of may be the prompt
    others = [name for name, value in have.values.items() if isinstance(value, str) and name not in have.used]
    if asking.prompt is None and others:
        asking = replace(
            asking, instead=f"If it is another column, name it: column_mapping: [{others[0]}=prompt]."
        )
    # LLaMA-Factory's ranking of ShareGPT: the conversation up to the replies
    if asking.prompt is None and (dialogue := _conversation_column(have)) is not None:
        asking = replace(asking, prompt=dialogue, chat=True)
    scores = _score_columns(have)
    margin = have.find(("margin",))

    def read(row: Row) -> Cells:
        made = _pair(row, better, worse, asking)
        for chosen, rejected in scores:
            _check_scores(row, chosen, rejected)
        if margin is not None and stage == "reward":
            made["margin"] = _margin(row[margin], margin)
        return made

    inside = ", the prompt inside both" if asking.prompt is None else ""
    return Shape(
        f"preference pairs{inside}",
        ("prompt", "chosen", "rejected"),
        frozenset(have.used),
        read,
        asking=asking,
    )


def _right_and_wrong(have: Columns, stage: StageName) -> Shape | None:
    """Look for lists of right and of wrong replies, as in RewardBench 2: best of N."""
    sides = next((pair for pair in names.CHOSEN if have.has(*pair)), None)
    if sides is None or not any(_are_replies(have.values[str(first_of(have.values, (s,)))]) for s in sides):
        return None
    better, worse = (str(have.find((side,))) for side in sides)
    replies = [
        reply
        for column in (better, worse)
        if _are_replies(have.values[column])
        for reply in have.values[column]
    ]
    asking = _asking(have, plain=sides == names.CHOSEN[0], replies=replies)
    if asking.prompt is None:
        raise UserError(f"{better} and {worse} are lists of replies, and there is no prompt. {OWN_COLUMN}")

    def read(row: Row) -> Cells:
        prompt = asking.of(row)
        if prompt is None:
            raise LeftOut(f"{asking.prompt} is missing")
        answers: list[Content] = []
        ranks: list[int] = []
        for rank, column in enumerate((better, worse), 1):
            # One reply may stand without a list
            value = row[column]
            listed = value if value is None or _are_replies(value) else [value]
            if says_nothing(listed):
                raise LeftOut(f"{column} is missing")
            found, _ = _list_of_replies(listed)
            answers += found
            ranks += [rank] * len(found)
        answers = without_prompt(answers, prompt, better)
        made = [asking.answer(reply, prompt) for reply in answers]
        if isinstance(prompt, str) and any(isinstance(answer, list) for answer in made):
            prompt = [{"role": "user", "content": prompt}]
        return {"prompt": asking.asked(prompt), "completions": made, "ranks": ranks, **asking.extras(row)}

    title = "right and wrong replies, best of N"
    return Shape(title, ("prompt", "completions"), frozenset(have.used), read, True, asking)


def _are_replies(value: object) -> bool:
    """Return whether a cell is a list of texts, or of conversations, and no conversation itself."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(reply, str) or is_messages(reply) for reply in value)
    )


def _score_columns(have: Columns) -> list[tuple[str, str]]:
    found = []
    for what in SCORED:
        # Both must be there: one score alone compares nothing
        for form in ("{side}_{what}", "{what}_{side}"):
            pair = [have.find((form.format(side=side, what=what),)) for side in ("chosen", "rejected")]
            if pair[0] is not None and pair[1] is not None:
                found.append((pair[0], pair[1]))
    return found


def _check_scores(row: Row, chosen: str, rejected: str) -> None:
    try:
        better, worse = float(row[chosen]), float(row[rejected])
    except (TypeError, ValueError):
        return  # no scores in this row
    # A tie is no preference, and the wrong order is a mistake in the file
    if better == worse:
        raise LeftOut(f"{chosen} and {rejected} are equal, a tie")
    if better < worse:
        raise UserError(
            f"{chosen} is {better:g} and {rejected} {worse:g}: the reply that is chosen has the lower score."
            f" Mend the row, or leave the scores out: {setting_aside(chosen, rejected)}."
        )


def _margin(value: Cell, column: str, *, is_signed: bool = False) -> Cell:
    """Return by how much the chosen reply is better; its type is checked where it is used.

    ``is_signed``: the column says by its sign which reply is better.
    """
    if not is_number(value) or value >= 0:
        return value
    if is_signed:
        return -value
    raise UserError(
        f"{column} is {value:g}: it is below 0, which says that the reply that is chosen is worse. Mend the"
        f" row, or leave the margins out: {setting_aside(column)}."
    )


def _pair(row: Row, better: str, worse: str, asking: Asking) -> Cells:
    """Return prompt, chosen and rejected of a row.

    Raises:
        LeftOut: one is missing, or they are the same.
        UserError: there is no prompt, or not one.
    """
    # Both replies, of one kind
    chosen, rejected = (_reply(row[column], column) for column in (better, worse))
    if chosen == rejected:
        raise LeftOut("chosen and rejected are the same")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(
            f"{better} and {worse} are text and a list of chat messages. Write all as text or all as"
            " messages."
        )
    # The prompt beside them, or inside both
    prompt = asking.of(row)
    extras = asking.extras(row)
    alone = isinstance(chosen, str) or chosen[0]["role"] == "assistant"
    if prompt is None and asking.prompt is not None and alone:
        raise LeftOut(f"{asking.prompt} is missing")
    if isinstance(chosen, list):
        assert isinstance(rejected, list)
        prompt, chosen, rejected = _split_messages(prompt, chosen, rejected, asking.prompt, asking.instead)
    elif prompt is None:
        prompt = implicit_prompt(chosen, rejected)
        if not str(prompt).strip():
            raise UserError(f"{NO_PROMPT} {asking.instead}")
        chosen, rejected = chosen[len(prompt) :], str(rejected)[len(prompt) :]
    replies = {side: asking.answer(reply, prompt) for side, reply in _sides(chosen, rejected)}
    return {"prompt": asking.asked(prompt), **replies, **extras}


def _sides(chosen: Content, rejected: Content) -> tuple[tuple[str, Content], tuple[str, Content]]:
    return ("chosen", chosen), ("rejected", rejected)


def _split_messages(
    prompt: Content | None,
    chosen: list[Message],
    rejected: list[Message],
    column: str | None,
    instead: str,
) -> tuple[Content, list[Message], list[Message]]:
    """Return a pair of messages without its prompt, and that prompt.

    The replies may be turns of the assistant, or hold the whole conversation.
    """
    # Turns of the assistant alone answer the prompt beside them
    whole = chosen[0]["role"] != "assistant"
    if not whole and prompt is not None:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return prompt, chosen, rejected
    common = implicit_prompt(chosen, rejected)
    if not common:
        raise UserError(f"{NO_PROMPT} {instead}")
    assert isinstance(common, list)
    if prompt is None:
        return common, chosen[len(common) :], rejected[len(common) :]
    # A prompt beside whole conversations is in them, or one of the two is wrong
    asked = [prompt] if isinstance(prompt, str) else [said(turn) for turn in prompt]
    held = [said(turn).strip() for turn in common]
    strange = next((text for text in asked if text.strip() not in held), None)
    if isinstance(prompt, list) and prompt[0]["role"] == "system" and strange == said(prompt[0]):
        # The system message stands in a column of its own
        common, strange = with_system(common, said(prompt[0])), None
    if strange is not None:
        raise UserError(
            f"{column or 'prompt'} is not what chosen and rejected begin with: {strange[:60]!r}. If they hold"
            f" the whole conversation, leave it out: {setting_aside(str(column))}."
        )
    length = len(implicit_prompt(chosen, rejected))
    return common, chosen[length:], rejected[length:]


def _reply(value: object, column: str) -> Content:
    if value is None:
        raise LeftOut(f"{column} is missing")
    # Nothing to learn from is left out; what cannot be a reply is refused
    found = value_of(value, column)
    if not found or (isinstance(found, str) and not found.strip()):
        raise LeftOut(f"{column} is empty")
    if isinstance(found, list) and found[-1]["role"] != "assistant":
        raise UserError(
            f"{column}: the last message is of the {found[-1]['role']}; a reply ends with a turn of the"
            " assistant."
        )
    return found


def _lists(have: Columns, stage: StageName) -> Shape | None:
    """Look for a list of replies, with ranks or scores beside or inside them."""
    column = next(
        (
            found
            for name in names.REPLY_LISTS
            if (found := first_of(have.values, (name,))) is not None
            and (isinstance(parsed(have.values[found]), list) or name == "completions")
            and not is_messages(parsed(have.values[found]))
        ),
        None,
    )
    asking = _asking(have, plain=column == "completions")
    if column is None or asking.prompt is None:
        return None
    have.used.add(column)
    ranks = have.find(("ranks",))
    first = parsed(have.values[column])
    size = len(first) if isinstance(first, list) else 0
    # Scores beside the list: as many as replies
    scores = next(
        (
            name
            for name in have.values
            if plain_name(name) in names.SCORE_LISTS
            and isinstance(values := parsed(have.values[name]), list)
            and len(values) == size
        ),
        None,
    )
    have.used |= {scores} - {None}  # type: ignore[arg-type]
    best_first = BEST_FIRST in have.reading.pairs

    def read(row: Row) -> Cells:
        prompt = asking.of(row)
        replies, own = _list_of_replies(row[column])
        if prompt is None:
            raise LeftOut(f"{asking.prompt} is missing")
        answers = [asking.answer(reply, prompt) for reply in without_prompt(replies, prompt, column)]
        if isinstance(prompt, str) and any(isinstance(answer, list) for answer in answers):
            prompt = [{"role": "user", "content": prompt}]
        made: Cells = {"prompt": asking.asked(prompt), "completions": answers, **asking.extras(row)}
        # What judges the replies: the first counts, and others may not contradict it
        judged: dict[str, Cell] = {}
        if ranks is not None and row[ranks] is not None:
            judged[ranks] = _from_one(parsed(row[ranks]), len(answers))
        if scores is not None and not (judged and row[scores] is None):
            judged[scores] = ranks_from(_one_each(parsed(row[scores]), answers, scores), best="high")
        judged |= own
        if judged:
            made["ranks"] = next(iter(judged.values()))
            if stage == "reward":
                _check_order(judged, row)
        elif best_first:
            made["ranks"] = list(range(1, len(answers) + 1))
        elif stage == "reward":
            raise UserError(
                f"nothing says which of the {column} is better. Add ranks, 1 the best, or scores; or say that"
                f" the list stands best first: pairs: {BEST_FIRST}."
            )
        return made

    inside = size > 0 and isinstance(first[0], dict) and not is_messages([first[0]])
    title = "ranked lists" + (
        f", by {scores}" if scores else ", each with its rank or score" if inside else ""
    )
    return Shape(title, ("prompt", "completions"), frozenset(have.used), read, True, asking)


def _check_order(judged: Mapping[str, Cell], row: Row) -> None:
    """Raise UserError where a judgement puts two replies in another order than the first does."""
    (name, first), *others = judged.items()
    for other, ranks in others:
        if not isinstance(first, list) or not all(map(is_number, first)) or len(first) != len(ranks):
            return  # told where ranks are checked
        both = list(zip(first, ranks, strict=True))
        if any(a < b and c > d for (a, c), (b, d) in permutations(both, 2)):
            way_out = setting_aside(other) if other in row else f"leave {other} out of the replies"
            raise UserError(
                f"{name} and {other} put the replies in different orders: ranks {first} and {ranks}. Mend the"
                f" row, or keep the one that is right: {way_out}."
            )


def without_prompt(replies: Sequence[Content], prompt: Content, column: str) -> list[Content]:
    """Return replies without the prompt that whole conversations begin with.

    Raises:
        UserError: a conversation that begins with another prompt.
    """
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    made: list[Content] = []
    for reply in replies:
        if isinstance(reply, list) and reply and reply[0]["role"] != "assistant":
            if reply[: len(asked)] != asked or len(reply) == len(asked):
                raise UserError(
                    f"{column} begins with a turn of the {reply[0]['role']}, and not with the prompt. Give"
                    " the turns of the assistant alone, or whole conversations that begin with the prompt."
                )
            reply = reply[len(asked) :]
        made.append(reply)
    return made


def without_prompts(made: Sequence[Cells], asking: Asking | None) -> list[Cells] | None:
    """Return rows of text whose replies all hold their prompt, without it there.

    None if any reply of any row does not: one may begin with the words of its prompt by chance.
    """
    # The prompt stands beside the replies, and says something in some row
    if asking is None or asking.prompt is None:
        return None
    if not any(isinstance(row["prompt"], str) and row["prompt"].strip() for row in made):
        return None
    # Both sides of a pair, or all of a list: one that does not begin so ends it for the file
    cut = []
    for row in made:
        replies = {side: row[side] for side in ("chosen", "rejected") if side in row}
        listed = row["completions"] if "completions" in row else list(replies.values())
        rest = [_after(reply, row["prompt"], asking) for reply in listed]
        if None in rest:
            return None
        sides = dict(zip(replies, rest, strict=True)) if replies else {"completions": rest}
        cut.append({**row, **sides})
    return cut


def _after(reply: Content, prompt: Content, asking: Asking) -> Content | None:
    """Return a reply of text without its prompt; None if it does not begin with it as words."""
    if not isinstance(reply, str) or not isinstance(prompt, str):
        return None
    if not prompt.strip():
        return reply
    reply = reply.removeprefix(APART) if asking.separate else reply
    rest = reply.removeprefix(prompt)
    # "Yes" is no beginning of "Yesterday"
    around = prompt[-1] + rest[:1]
    inside_a_word = len(around) > 1 and around.isascii() and around.isalnum()
    return None if not reply.startswith(prompt) or inside_a_word else asking.answer(rest, prompt)


def _from_one(ranks: Cell, count: int) -> Cell:
    """Return ranks that count from 1; OpenAssistant counts from 0."""
    numbers = [rank for rank in ranks if isinstance(rank, int | float)] if isinstance(ranks, list) else []
    if len(numbers) == count and 0 in numbers and all(0 <= rank < count for rank in numbers):
        return [rank + 1 for rank in ranks]
    return ranks


def _one_each(scores: Cell, replies: Sequence[object], column: str) -> list[Any]:
    if not isinstance(scores, list) or len(scores) != len(replies):
        found = len(scores) if isinstance(scores, list) else "no"
        raise UserError(f"{found} {column} for {len(replies)} replies; give one to each.")
    return scores


def _list_of_replies(value: object) -> tuple[list[Content], dict[str, list[int]]]:
    """Return the replies of a list, and ranks by each rank or score that all of them have."""
    # Texts or messages, with their ranks elsewhere
    items = parsed(value)
    if items is None:
        raise LeftOut("completions are missing")
    if not isinstance(items, list):
        raise UserError(f"completions is {type(items).__name__}; expected a list of replies.")
    if any(says_nothing(item) for item in items):
        raise LeftOut("a completion is missing or empty")
    if not all(isinstance(item, dict) and not is_messages([item]) for item in items):
        replies = [value_of(item, f"completion {place}") for place, item in enumerate(items, 1)]
        return [reply for reply in replies if reply is not None], {}
    # Objects: their text, and what ranks them
    key = next((key for key in REPLY_KEYS if items and key in items[0]), None)
    if key is None:
        raise UserError(
            f"completion 1 is an object with {', '.join(items[0]) if items else 'nothing'}; its text is"
            f" expected in {', '.join(REPLY_KEYS)}. Rename it in the rows."
        )
    texts = [value_of(item.get(key), key) for item in items]
    if any(says_nothing(text) for text in texts):
        raise LeftOut("a completion is missing or empty")
    replies = [text for text in texts if text is not None]
    judged: dict[str, list[int]] = {}
    for name, best in (("rank", "low"), *((score, "high") for score in SCORE_KEYS)):
        own = [item.get(name) for item in items]
        # The first must be numbers; of others, those that are
        if all(map(is_number, own)) or (not judged and all(number is not None for number in own)):
            judged[name] = ranks_from(own, best=best)
    return replies, judged


def _tldr(have: Columns, stage: StageName) -> Shape | None:
    """Look for OpenAI's summaries with a choice; prompts are worded as TRL's TL;DR data."""
    if not have.has("info", "summaries", "choice"):
        return None

    def read(row: Row) -> Cells:
        # What the prompt is worded from
        info, both, choice = parsed(row["info"]), parsed(row["summaries"]), row["choice"]
        for key in ("post", "title", "subreddit"):
            if not isinstance(info, dict) or says_nothing(info.get(key)):
                raise LeftOut(f"there is no {key} in info")
        # Two summaries, as texts or as objects, and which of them is chosen
        if choice not in (0, 1):
            raise LeftOut("choice is not 0 or 1")
        listed = both if isinstance(both, list) else []
        texts = [text.get("text") if isinstance(text, dict) else text for text in listed]
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise LeftOut("there are not two summaries")
        better, worse = texts if choice == 0 else texts[::-1]
        return {"prompt": TLDR.format(**info), "chosen": better, "rejected": worse}

    uses = frozenset(("info", "summaries", "choice"))
    title = "OpenAI's summarize_from_feedback: two summaries and a choice"
    return Shape(title, ("prompt", "chosen", "rejected"), uses, read, judged=True)


def _label_studio(have: Columns, stage: StageName) -> Shape | None:
    """Label Studio's export of pairwise comparisons: data, and what annotators selected."""
    data = parsed(have.values.get("data"))
    if not isinstance(data, dict) or not have.has("annotations"):
        return None
    # The data of a task has the columns that other files have
    inner = Columns(data, Reading(as_chat=have.reading.as_chat))
    asking = _asking(inner, plain=False)
    sides = two_sides(data)
    if sides is None or asking.prompt is None:
        raise UserError(
            f"looks like Label Studio's export; its data has {', '.join(data)}, and needed are prompt and two"
            " texts such as text1 and text2. Rename them in the rows."
        )
    left, right = sides
    pairs = Pairs(left, right, "selected", ("left", left), ("right", right))

    def read(row: Row) -> Cells:
        # What annotators selected; results of other kinds are about something else
        chosen = [
            word
            for annotation in _objects(row["annotations"])
            if not annotation.get("was_cancelled")
            for result in _objects(annotation.get("result"))
            if result.get("type") in (None, "pairwise")
            for word in _selected(result)
        ]
        if strange := [word for word in chosen if word not in ("left", "right", left, right)]:
            raise UserError(f"an annotator selected {strange[0]!r}; expected left or right. Mend the row.")
        task = {**dict.fromkeys(data), **next(iter(_objects([row["data"]])), {})}
        winner = winner_of({"selected": chosen}, pairs) if chosen else None
        if winner in (None, "tie"):
            raise LeftOut("there is no judgement" if winner is None else "it is a tie, no preference")
        return _pair(task, left if winner == "a" else right, right if winner == "a" else left, asking)

    title = "Label Studio: two texts and what annotators selected"
    uses = frozenset(("data", "annotations"))
    return Shape(title, ("prompt", "chosen", "rejected"), uses, read, judged=True)


def _objects(value: object) -> list[dict[str, Any]]:
    """Return the objects of a list; none where there is no list."""
    found = parsed(value)
    listed = [parsed(item) for item in found] if isinstance(found, list) else []
    return [item for item in listed if isinstance(item, dict)]


def _selected(result: Mapping[str, Any]) -> list[Any]:
    """Return what a result of Label Studio selects, under either name."""
    value = result.get("value")
    found = (value.get("selected") or value.get("choices")) if isinstance(value, dict) else None
    return found if isinstance(found, list) else [] if found is None else [found]


def two_sides(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return two columns of replies whose names differ in a, b or 1, 2 alone; None if none are."""
    # Names alike but for their ends; numbers on replies may be written as text
    names_ = {
        plain_name(name): name
        for name, value in values.items()
        if _may_be_reply(value) and not names.ON_A_REPLY.search(plain_name(name))
    }
    found: dict[str, tuple[str, str]] = {}
    for first, second in TWO_SIDES:
        for name, column in names_.items():
            if re.search(rf"(^|_|[a-z]){first}$", name):
                stem = name[: len(name) - len(first)]
                other = names_.get(stem + second)
                if other is not None and "model" not in name and not name.endswith(f"id_{first}"):
                    found.setdefault(stem.rstrip("_"), (column, other))
    # Beside replies there may be what somebody says of each
    replies = [sides for stem, sides in found.items() if stem in (*REPLY_KEYS, *OF_TWO)]
    both = replies or list(found.values())
    return both[0] if len(both) == 1 else None


def _scored_sides(have: Columns, stage: StageName) -> Shape | None:
    """Look for two replies with a score each, of which the higher one is better."""
    sides, found = two_sides(have.values), _two_scores(have.values)
    if sides is None or not found or have.reading.pairs:
        return None
    scores = found[0]
    # Of a score by another name nobody knows whether more of it is better: toxicity_score_a
    plain = names.QUALITY.fullmatch(plain_name(scores[0])) is not None and len(found) == 1
    if not plain and stage == "reward":
        _refuse_scores(sides, found)
    have.used |= {*sides, *scores}
    asking = _asking(have, plain=False, replies=(have.values[sides[0]], have.values[sides[1]]))

    def read(row: Row) -> Cells:
        first, second = (_score(row[name]) for name in scores)
        if first is None or second is None:
            raise LeftOut("a score is missing")
        if first == second and stage == "reward":
            raise LeftOut("it is a tie, no preference")
        better, worse = sides if first >= second else sides[::-1]
        return _pair(row, better, worse, asking)

    title = "two replies"
    if plain:
        title += f", the better one by {scores[0]} and {scores[1]}"
    return Shape(title, ("prompt", "chosen", "rejected"), frozenset(have.used), read, True, asking)


def _refuse_scores(sides: tuple[str, str], found: Sequence[tuple[str, str]]) -> None:
    """Raise UserError for scores of two replies that do not say which is better."""
    # Plain names say that the higher one is, and swapped ones the lower one
    one, two = found[0]
    scores = " and ".join(", ".join(pair) for pair in found)
    aside = set_aside(name for pair in found[1:] for name in pair)
    high, low = (
        ", ".join([f"{first}=score_a", f"{second}=score_b", *aside])
        for first, second in ((one, two), (two, one))
    )
    raise UserError(
        f"{sides[0]} and {sides[1]} stand beside {scores}, and nothing says which is better. If it is the"
        f" one of the higher {one}: column_mapping: [{high}]; if it is that of the lower one: [{low}]."
    )


def _score(value: object) -> float | None:
    """Return a score, which may be written as text; None if there is none."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return float(number) if is_number(number) else None  # type: ignore[arg-type]


def _two_scores(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the columns of scores whose names differ as those of two replies do, two by two."""
    names_ = {plain_name(name): name for name, value in values.items() if _score(value) is not None}
    return [
        (column, names_[name[: len(name) - len(first)] + second])
        for first, second in TWO_SIDES
        for name, column in names_.items()
        if names.ON_A_REPLY.search(name)
        and name.endswith(first)
        and name[: len(name) - len(first)] + second in names_
    ]


def _may_be_reply(value: object) -> bool:
    return isinstance(value, str) or is_messages(parsed(value))


def _refuse_unjudged(values: Mapping[str, Any]) -> None:
    """Raise UserError for two replies whose judgement is not known, with the setting to fill in."""
    sides = two_sides(values)
    if sides is None:
        return
    # A number on one reply is no judgement on two
    numbers = {name for pair in _two_scores(values) for name in pair}
    judging = [
        name
        for name in values
        if meaning(name) in ("a judgement", "a score or a rank") and name not in numbers
    ]
    found = [values[name] for name in judging[:1]]
    raise UserError(
        f"{sides[0]} and {sides[1]} look like two replies, and nothing says which is better. Say so:"
        f" {labelled.suggestion(*sides, judging, found)}."
    )


def _conversation_column(have: Columns) -> str | None:
    for name in names.CONVERSATIONS_NAMES:
        column = first_of(have.values, (name,))
        value = None if column is None else parsed(have.values[column])
        texts = isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
        # TRL's name is one whatever it holds: what is wrong with it is told by its rows
        if column is not None and (is_messages(value) or is_turns(value) or texts or name == "messages"):
            have.used.add(column)
            return column
    return None


def _demonstrations(have: Columns, stage: StageName) -> Shape | None:
    """Look for what fine-tuning takes, and what has a prompt for PPO."""
    # A reply is text or messages, whatever its column is called
    replies = [
        column
        for name in names.REPLIES
        if (column := first_of(have.values, (name,))) is not None
        and (_may_be_reply(have.values[column]) or column == "completion")
    ]
    reply = next(iter(replies), None)
    truth = stage == "ppo" and reply is not None and plain_name(reply) in names.TRUTHS
    asking = _asking(have, plain=truth or reply in (None, "completion"))
    text_prompt = asking.prompt is None or not is_messages(parsed(have.values[asking.prompt]))
    beside = Columns(have.values, have.reading)
    dialogue = _conversation_column(beside)
    # TRL's name says which is the reply, others do not
    if (
        stage == "sft"
        and asking.prompt is not None
        and len(replies) > 1
        and plain_name(replies[0]) != "completion"
    ):
        raise UserError(
            f"{' and '.join(replies)} could each be the reply to {asking.prompt}. Set aside what is not, for"
            f" example {setting_aside(*replies[1:])} to learn {reply}."
        )
    # Messages say more than a prompt of text beside them
    if (
        asking.prompt is not None
        and (reply is not None or stage == "ppo")
        and not (stage == "ppo" and dialogue is not None and text_prompt)
    ):
        return _prompt_and_reply(have, asking, reply, stage)
    if dialogue is not None:
        return _conversation(beside, dialogue, stage)
    text = first_of(have.values, ("text",))
    if stage == "sft" and text is not None and asking.prompt is None:
        return Shape("texts", ("text",), frozenset((text,)), lambda row: {"text": _text_of(row, text)})
    return None


def _text_of(row: Row, column: str) -> str:
    value = row[column]
    if value is None:
        raise LeftOut(f"{column} is missing")
    if not isinstance(value, str):
        raise UserError(
            f"{column} is {type(value).__name__}; expected text. Chat messages go into a column messages."
        )
    if not value.strip():
        raise LeftOut(f"{column} is empty")
    return value


def _prompt_and_reply(have: Columns, asking: Asking, reply: str | None, stage: StageName) -> Shape:
    prompt_column = str(asking.prompt)
    label = first_of(have.values, names.THUMBS)
    thumbs = label if label is not None and _thumb(have.values[label]) is not None else None
    have.used |= {column for column in (reply, thumbs) if column is not None}

    def read(row: Row) -> Cells:
        if row[prompt_column] is None:
            raise LeftOut(f"{prompt_column} is missing")
        if thumbs is not None and reply is not None and stage == "sft" and _thumb(row[thumbs]) is not True:
            raise LeftOut(f"{thumbs} is not true: a reply that is not to be imitated")
        prompt = asking.of(row)
        assert prompt is not None
        made: Cells = asking.extras(row)
        if reply is not None and stage == "sft":
            (own,) = without_prompt([_reply(row[reply], reply)], prompt, reply)
            answer = asking.answer(own, prompt)
            if isinstance(answer, list) and isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            made["completion"] = answer
        return {"prompt": asking.asked(prompt), **made}

    if reply is None or (plain_name(reply) in names.TRUTHS and stage == "ppo"):
        return Shape("prompts", ("prompt",), frozenset(have.used - {reply}), read)
    title = "prompts and completions" if prompt_column == "prompt" else f"{prompt_column} and {reply}"
    if thumbs is not None:
        title += f" with {thumbs} (KTO)"
    form = ("prompt",) if stage == "ppo" else ("prompt", "completion")
    return Shape(title, form, frozenset(have.used), read)


def _thumb(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    return names.THUMB_WORDS.get(value.strip().lower()) if isinstance(value, str) else None


def _conversation(have: Columns, column: str, stage: StageName) -> Shape:
    system = have.find(names.SYSTEMS)
    tools, template = have.find(names.TOOLS), have.find(names.TEMPLATE)
    extras = Asking(None, None, None, None, tools, template, chat=True, separate=False)

    def read(row: Row) -> Cells:
        if row[column] is None:
            raise LeftOut(f"{column} is missing")
        value = parsed(row[column])
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            if column == "messages":
                raise UserError("messages: message 1 is str; expected an object with role and content.")
            value = turns_of(value)
        try:
            messages = messages_of(value)
        except UserError as error:
            raise UserError(f"{column}: {error}") from error
        if not messages:
            raise LeftOut(f"{column} is empty")
        if system is not None:
            about = "" if says_nothing(row[system]) else system_of(row[system], system)
            messages = with_system(messages, about)
        if stage == "ppo":
            prompt = conversation_prompt(messages)
            if not prompt:
                raise LeftOut("there is no turn before the reply")
            try:
                check_asks(prompt)
            except UserError as error:
                raise UserError(f"{column}, before the last reply: {error}") from error
            return {"prompt": prompt, **extras.extras(row)}
        return {"messages": messages, **extras.extras(row)}

    form = ("prompt",) if stage == "ppo" else ("messages",)
    title = "conversations" if column == "messages" else f"conversations ({column})"
    return Shape(title, form, frozenset(have.used), read)


def _prompts_of(shape: Shape) -> Shape:
    """Return the same rows for PPO: their prompts alone. Replies need not be sound."""
    asking = shape.asking

    def read(row: Row) -> Cells:
        try:
            made = shape.read(row)
        except LeftOut:
            # It is the replies that teach nothing
            prompt = None if asking is None else asking.of(row)
            if asking is None or prompt is None:
                raise
            made = {"prompt": asking.asked(prompt), **asking.extras(row)}
        return {name: made[name] for name in ("prompt", "tools", "chat_template_kwargs") if name in made}

    return Shape(shape.title, ("prompt",), shape.uses, read, shape.judged, asking)


def _thumbs(have: Columns) -> Shape | None:
    """Look for KTO's rows for the reward model: a reply each, and whether it is good."""
    label = first_of(have.values, names.THUMBS)
    if label is None or says_nothing(have.values[label]):
        return None
    shape = _demonstrations(Columns(have.values, have.reading), "sft")
    if shape is None or "completion" not in shape.form:
        return None
    if _thumb(have.values[label]) is None:
        raise UserError(
            f"{label} is {have.values[label]!r}. A judgement on one reply is"
            f" {', '.join(names.THUMB_WORDS)}, with both kinds of replies to a prompt. Write it so in the"
            " rows, or give pairs: prompt, chosen and rejected."
        )

    def read(row: Row) -> Cells:
        thumb = _thumb(row[label])
        if thumb is None:
            raise LeftOut(f"{label} is missing")
        return {**shape.read({**row, label: True}), "label": thumb}

    return Shape(shape.title, ("prompt", "completion", "label"), shape.uses, read, judged=True)


def asked_of(row: Row) -> str:
    """Return what a row asks, by which KTO's rows go together: its prompt, tools and template's."""
    return json.dumps([row.get(key) for key in ("prompt", "tools", "chat_template_kwargs")], sort_keys=True)


def by_prompt(rows: Sequence[Row]) -> Iterator[Cells]:
    """Yield KTO rows as ranked lists: the prompts that have a good and a bad reply."""
    # Prompts in the order of the file
    groups: dict[str, tuple[Cells, dict[bool, list[Content]]]] = {}
    for row in rows:
        _, replies = groups.setdefault(asked_of(row), (dict(row), {True: [], False: []}))
        replies[bool(row["label"])].append(row["completion"])
    for row, replies in groups.values():
        if replies[True] and replies[False]:
            ranks = [1] * len(replies[True]) + [2] * len(replies[False])
            extras = {key: row[key] for key in ("tools", "chat_template_kwargs") if key in row}
            both = replies[True] + replies[False]
            yield {"prompt": row["prompt"], "completions": both, "ranks": ranks, **extras}
