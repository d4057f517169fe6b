"""What a model card says, compared with the files of its run."""

import json
import re
from numbers import Real

from goose_lora.reporting import figures


def leaves(content):
    if isinstance(content, dict):
        content = list(content.values())
    return [leaf for inner in content for leaf in leaves(inner)] if isinstance(content, list) else [content]


def unexplained(folder, text):
    """Numbers of ``text`` that stand in no file of the run, neither as they are nor as the card
    rounds them."""
    files = [path for path in folder.iterdir() if path.suffix in (".json", ".jsonl")]
    written = " ".join(path.read_text(encoding="utf-8") for path in files)
    values = [
        leaf
        for path in files
        for line in (path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()])
        for leaf in leaves(json.loads(line))
    ]
    rounded = {figures.rounded(value) for value in values if isinstance(value, Real)}
    found = re.findall(r"(?<![\w.\-/])-?\d+(?:\.\d+)*(?:e[+-]?\d+)?(?![\w])", text)
    assert found, "the card has numbers"
    return [
        number
        for number in found
        if number not in rounded and not re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", written)
    ]
