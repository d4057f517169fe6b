"""README and docs as tests read them: code blocks, code spans, links, anchors and commands."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = (
    "goose-lora ",
    "make ",
    "python ",
    "pytest ",
    "accelerate launch ",
    "torchrun ",
    "recipes/",
    "OMP_NUM_THREADS=",
    "pip install ",
)
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)((?:    .*\n)+)")


class Block(NamedTuple):
    """A fenced block, and the line that it begins in."""

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """A command as it stands on a page."""

    path: Path
    line: int
    text: str
    is_span: bool = False

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} {self.text[:70]}"

    @property
    def words(self) -> list[str]:
        """Without comments, variables before the command, the folder of the environment, what is
        piped into it, and dots that stand for more; S is a number."""
        words = [
            {"S": "0"}.get(word, word)
            for word in shlex.split(self.text, comments=" #" in self.text)
            if word != "..."
        ]
        if "|" in words:
            words = words[words.index("|") + 1 :]
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str | None = None) -> list[Block]:
    text = read(path)
    found = [
        Block(path, text.count("\n", 0, match.start()) + 1, match[2], match[3])
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def prose(path: Path) -> str:
    """Without fenced blocks, whose lines are left empty."""
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), read(path))


def spans(path: Path) -> list[tuple[int, str]]:
    """Code spans with their lines. A line break in one is a space, as Markdown has it; in a table a
    bar is written with a backslash."""
    text = prose(path)
    found = re.finditer(r"(?<!`)`([^`]+)`(?!`)", text)
    return [
        (text.count("\n", 0, match.start()) + 1, " ".join(match[1].replace("\\|", "|").split()))
        for match in found
    ]


def commands(path: Path) -> list[Command]:
    """All of bash blocks, and of indented blocks and code spans those that begin as a command
    does."""
    found = []
    for block in blocks(path, "bash"):
        for number, line in enumerate(block.text.replace("\\\n", " \0").split("\n")):
            if line.strip() and not line.lstrip().startswith("#"):
                found.append(
                    Command(
                        path, block.line + 1 + number, " ".join(line.replace("\0", "").split(" ")).strip()
                    )
                )
    text = prose(path)
    for match in INDENTED.finditer(text):
        lines = [line.strip() for line in match[1].splitlines()]
        found += [
            Command(path, text.count("\n", 0, match.start()) + 1, line)
            for line in lines
            if line.startswith(STARTS)
        ]
    for line, span in spans(path):
        if span.startswith(STARTS) and not re.fullmatch(r"recipes/\S*", span):
            found.append(Command(path, line, span, is_span=True))
    return found


def links(path: Path) -> list[tuple[int, str]]:
    """Targets of links and pictures that are no address elsewhere, with their lines."""
    text = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda match: "x" + "\n" * match[0].count("\n"), prose(path))
    found = [
        (text.count("\n", 0, match.start()) + 1, match[1]) for match in re.finditer(r"\]\(([^)\s]+)\)", text)
    ]
    return [(line, target) for line, target in found if not re.match(r"https?://", target)]


def anchors(path: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}
