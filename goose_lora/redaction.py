"""Secrets: what is one by its name, and texts with none of them in it.

A value is a secret if the setting, variable or key that holds it is named like one, or if it has
the form of a known service's token. Texts that are printed or kept pass through ``redacted``.
"""

import functools
import os
import re
import sys
from collections.abc import Iterable, Sequence

HIDDEN = "(not recorded)"
# Parts of names that mean a secret wherever they stand, and words that do at a name's end.
_ANYWHERE = re.compile(
    r"secret|passw|passphrase|credential|authoriz|bearer|webhook|connection_?string|private_?key|api_?key",
    re.I,
)
_AT_THE_END = {"tok", "token", "pwd", "pw", "key", "keys", "auth", "jwt", "pat", "cookie", "cookies", "dsn"}
# Words before "token" that mean a word of a language model, and not a permission.
_OF_A_VOCABULARY = {"pad", "eos", "bos", "unk", "mask", "cls", "sep", "stop", "end", "start", "think", "per"}
_OF_A_VOCABULARY |= {"image", "video", "audio"}
# Plural: counts of words, but for these.
_SECRET_TOKENS = re.compile(r"(hub|hf|access|auth|api|refresh|session|secret)_?tokens?$", re.I)
# Tokens by their form: Hugging Face, OpenAI and its kin, GitHub, GitLab, AWS, Slack, JSON Web.
SECRET_VALUES = re.compile(
    r"\b(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|"
    r"glpat-[\w-]{16,}|AKIA[A-Z0-9]{16}|xox[a-z]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]+\.[\w-]+)"
)
_IN_ADDRESS = re.compile(r"(\w+://[^/\s:@]*:)[^/\s@]+@")
# name: value, name=value, "name": "value", --name value; the value as far as it can be told.
_NAMED = re.compile(
    r"""(?P<name>[A-Za-z][\w.-]*)(?P<between>["']?\s*(?:=|:(?!/))\s*["']?)(?P<value>[^\s"',;)}\]\[({]+)"""
)
_OPTION = re.compile(r"""(?P<name>--?[A-Za-z][\w.-]*)(?P<between>["']?,?\s+["']?)(?P<value>[^\s"',]+)""")
_SHORTEST = 6  # a shorter value would be found in every other word
_known: set[str] = set()  # values that were met under a secret's name


def is_secret(name: object) -> bool:
    """Return whether a setting, variable or key of this name holds a secret."""
    return _is_secret(str(name))


@functools.lru_cache(maxsize=4096)  # the environment's names are asked for at each line that is printed
def _is_secret(name: str) -> bool:
    # camelCase and dashes are written as one way
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).strip("-").replace("-", "_").replace(".", "_")
    words = [word for word in text.lower().split("_") if word and not word.isdigit()]
    if len(words) == 1 and words[0] in ("key", "keys"):
        return False
    if _ANYWHERE.search(text) or _SECRET_TOKENS.search(text):
        return True
    if not words or words[-1] not in _AT_THE_END:
        return False
    return words[-1] not in ("tok", "token") or not set(words[:-1]) & _OF_A_VOCABULARY


def remember(value: object) -> None:
    """Note a secret's value, so that it is found wherever it turns up."""
    if isinstance(value, str) and len(value) >= _SHORTEST:
        _known.add(value)


def remember_named(text: str) -> None:
    """Note the values of secrets in a file's text, whether or not it can be read as settings."""
    for found in _NAMED.finditer(text):
        if is_secret(found["name"]):
            remember(found["value"].lstrip("*!&@%|>-"))  # YAML's signs before a value


def _secrets() -> Iterable[str]:
    """Return the values that are known: noted, in the environment, and on the command line."""
    named = [value for name, value in os.environ.items() if is_secret(name) and name != "PWD"]  # a folder
    found = _known | {value for value in named if len(value) >= _SHORTEST}
    found |= {value for value in _values(sys.argv[1:]) if len(value) >= _SHORTEST}
    return sorted(found, key=len, reverse=True)  # a longer one may begin with a shorter one


def _values(words: Sequence[str]) -> list[str]:
    """Return the words that are values of secrets."""
    pairs = zip(words, without_secrets(words), strict=True)
    return [word.partition("=")[2] or word for word, kept in pairs if word != kept]


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return the words of a command with ``HIDDEN`` in place of each secret's value."""
    kept = list(words)
    for index, word in enumerate(kept):
        name, equals, _ = word.partition("=")
        if not is_secret(name) or not (name.startswith("-") or equals):
            continue
        # A secret stands behind "=", or is the next word
        if equals:
            kept[index] = f"{name}={HIDDEN}"
        elif index + 1 < len(kept) and not kept[index + 1].startswith("--"):
            kept[index + 1] = HIDDEN
    return kept


def redacted(text: str) -> str:
    """Return ``text`` with ``HIDDEN`` in place of secrets.

    Secrets are values that are known, tokens by their form, passwords in addresses, and what
    follows a secret's name in the text itself.
    """
    text = without_known_secrets(text)
    for pattern in (_NAMED, _OPTION):
        text = pattern.sub(_hide_value, text)
    return text


def without_known_secrets(text: str) -> str:
    """Return ``text`` with ``HIDDEN`` in place of values that are known, and tokens by their form.

    Names in the text itself are not asked: a text of others, such as a reply, stays as it is.
    """
    for value in _secrets():
        text = text.replace(value, HIDDEN)
    return _IN_ADDRESS.sub(rf"\1{HIDDEN}@", SECRET_VALUES.sub(HIDDEN, text))


def _hide_value(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    if not is_secret(name) or HIDDEN.startswith(value):
        return found[0]
    return f"{name}{found['between']}{HIDDEN}"
