"""Columns that carry meaning: which mean the same, and which may not be passed over.

A stage uses a column that is named here, or refuses the rows. All others are told as ignored.
"""

import math
import re
from collections.abc import Iterable, Sequence

# Names of one meaning, the first that a row has counts. Underscore, hyphen and dot are one.
ASKED = ("prompt", "instruction", "question", "query", "problem", "user_prompt", "context_messages")
SYSTEMS = ("system", "system_prompt", "system_message")
INPUTS = ("input", "context")  # what an instruction is about
HISTORIES = ("history",)
REPLIES = ("completion", "output", "response", "answer", "generation", "solution")
TRUTHS = ("answer", "solution")  # beside a prompt for PPO: what a reward function compares with
CONVERSATIONS_NAMES = ("messages", "conversations", "conversation", "dialogue", "dialog", "data")
CHOSEN = (
    ("chosen", "rejected"),
    ("preferred_output", "non_preferred_output"),  # OpenAI
    ("preferred", "dispreferred"),
    ("response_j", "response_k"),  # Stack Exchange paired: j is the better one
)
REPLY_LISTS = ("completions", "responses", "answers", "generations", "candidates", "replies", "outputs")
SCORE_LISTS = ("scores", "rewards", "ratings", "score", "rating")
TOOLS, TEMPLATE = ("tools", "functions"), ("chat_template_kwargs",)
# What a file holds for a trainer of its own; never passed on to another
OF_TRAINERS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "completion_mask",
    "assistant_masks",
    "seq_lengths",
)
# What a column that no reading has used would have said, by the pattern of its name
MEANINGS = (
    (r"system(_prompt|_message)?|custom_system_prompt", "a system message"),
    (r"input|context|history|(image|picture|audio|video)s?", "a part of the prompt"),
    (r"tools|functions|chat_template_kwargs", "something for the chat template"),
    (r"winner.*|.*preference.*|preferred.*|better_.*|safer_.*|choice|labels?|verdict|vote", "a judgement"),
    (r"thumbs?(_?(up|down))?|(is_)?(correct|accepted|helpful|good)|is_(chosen|preferred)", "a judgement"),
    (r"(up|down)voted|(dis)?liked|(is_)?(tie|swapped|flipped)", "a judgement"),
    (r"thinking|reasoning(_content)?|thoughts?|chain_of_thought|cot|rationale", "thoughts of the reply"),
    (r".*scores?(_.*)?|.*ratings?(_.*)?|rewards?|ranks?", "a score or a rank"),
    (r"weights?", "how much a row counts"),
)
# KTO's columns of a judgement on one reply, and the words in them besides true and false
THUMBS = ("label", "thumbs_up", "thumb")
THUMB_WORDS = {"true": True, "false": False, "desirable": True, "undesirable": False}
# Names of numbers on replies; of those of the second kind, of one side each, more is better
ON_A_REPLY = re.compile(r"(^|_)(score|rating|reward|rank)s?(_|\d|$)")
QUALITY = re.compile(
    r"((overall|total|final|quality|helpful(ness)?|human|user|annotator|expert|gpt_?\d[a-z]*|llm|ai|judge"
    r"|model|rm|reward(_model)?|preference|mean|average|avg|response|reply|answer|output|completion)_)*"
    r"(score|rating|reward)s?_?(a|b|0|1|2|left|right)"
)
# Texts that judge a reply; others in a column named label are topics
VERDICTS = re.compile(
    r"good|bad|chosen|rejected|accept(ed)?|reject|true|false|yes|no"
    r"|up|down|positive|negative|pass|fail|(in)?correct|wrong|right"
    r"|(un)?desirable|(un)?desired|(dis)?liked?|(dis)?preferred|(un)?helpful|(un)?acceptable"
    r"|(dis)?approved?|thumbs?[ _-]?(up|down)|better|worse|best|worst|[+-]?[01]"
)
SET_ASIDE = re.compile(r"(unused|ignored|old)(_.*)?$")


def plain_name(column: str) -> str:
    """Return a column's name in lower case with underscores: ``chosen-rating``, chosen_rating."""
    return re.sub(r"[-. ]", "_", column).lower()


def first_of(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the column that has the first of ``names``; None if there is none."""
    found = {plain_name(column): column for column in reversed(list(columns))}
    return next((found[name] for name in names if name in found), None)


def meaning(column: str) -> str | None:
    """Return what a column with this name says of its row; None if nothing that a stage needs."""
    name = plain_name(column)
    if SET_ASIDE.match(name):
        return None
    return next((what for pattern, what in MEANINGS if re.fullmatch(pattern, name)), None)


def is_text(column: str) -> bool:
    """Return whether a column with this name holds what people or models write."""
    name = plain_name(column)
    replies = [side for pair in CHOSEN for side in pair]
    known = (*ASKED, *SYSTEMS, *INPUTS, *HISTORIES, *REPLIES, *CONVERSATIONS_NAMES, *replies, "text")
    return name in known or re.fullmatch(r"(response|output|answer|text)_?[a-z0-9]", name) is not None


def says_nothing(value: object) -> bool:
    """Return whether a cell is missing, empty or not a number."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or value in ("", [], {}, "[]", "{}")


def set_aside(columns: Iterable[str]) -> list[str]:
    """Return what of ``column_mapping`` leaves columns out."""
    return [f"{column}=unused_{plain_name(column)}" for column in columns]


def setting_aside(*columns: str) -> str:
    """Return the setting that leaves columns out."""
    return f"column_mapping: [{', '.join(set_aside(columns))}]"
