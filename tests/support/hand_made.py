"""Runs that nobody ran: rows, samples and lineage written by hand, for the tests of what shows a
run. And a reader of pages."""

import base64
import re
from html.parser import HTMLParser
from io import BytesIO

from PIL import Image

from goose_lora.files import write_json, write_jsonl
from goose_lora.models.folders import write_lineage

VOID = {"meta", "img", "br", "hr", "link", "input"}
VERDICT = {
    "accuracy": 0.8125,
    "accuracy_ci": [0.5625, 0.9375],
    "n_pairs": 16,
    "warnings": ["empty reply: score <1.5> on average"],
}
EVALUATION = {
    "prompts": 77,
    "dataset": "org/prompts",
    "against": "sft",
    "figures": {
        "sft": {"score": 0.0123, "score_ci": [-0.1, 0.12], "kl": 0.0, "tokens": 18.5},
        "ppo": {"score": 1.877, "score_ci": [1.503, 2.251], "kl": 8.512, "tokens": 11.25},
    },
}


def rows(count=12, slope=0.1):
    """Metrics of ``count`` rollouts of 4 steps each, and the summary that Trainer logs at the
    end."""
    logged = [
        {
            "step": 4 * (k + 1),
            "objective/score": slope * k + 0.013 * (-1) ** k,
            "objective/raw_score": 2 * slope * k + 0.51,
            "objective/kl": 0.3 * k + 0.017,
            "loss/value": 1 / (k + 1),
            "policy/entropy": 3.2 - 0.05 * k,
            "policy/clip_fraction": 0.0625,
            "rollout/response_tokens": 20.0 - k,
            "rollout/eos_rate": 0.5 + k / 100,
        }
        for k in range(count)
    ]
    return [*logged, {"step": 4 * count, "train_runtime": 12.5}]


def samples(steps=(0, 4, 8, 12, 16), text="a reply"):
    told = [(step, k) for step in steps for k in (0, 1)]
    return [
        {
            "step": step,
            "prompt": f"<s> prompt {k}",
            "reply": f"{text} at {step}",
            "raw_score": 0.375 + k,
            "kl": 0.5,
        }
        for step, k in told
    ]


def lineage(reward="a" * 64, data="d" * 64, **settings):
    parent = {"name": "runs/reward", "sha256": reward, "verdict": VERDICT, "lineage": {}}
    return {
        "stage": "ppo",
        "base": {"id": "org/base", "quantization": "nf4"},
        "command": "recipes/ppo.py --config x.yaml",
        "parents": {"reward": parent},
        "settings": {"output_dir": "somewhere", "learning_rate": 0.0123, **settings},
        "data": [{"name": "org/prompts", "rows": 8, "sha256": data}],
        "figures": {"objective/score": 1.25},
    }


def write(folder, *, metrics=None, lines=None, noted=None, evaluation=None):
    """A run in ``folder``: what is None is as above, but for the evaluation, which most runs
    lack."""
    folder.mkdir(parents=True)
    write_jsonl(folder / "metrics.jsonl", rows() if metrics is None else metrics)
    write_jsonl(folder / "samples.jsonl", samples() if lines is None else lines)
    write_lineage(folder, **(lineage() if noted is None else noted))
    if evaluation is not None:
        write_json(folder / "evaluation.json", evaluation)
    return folder


class Page(HTMLParser):
    """A page as a reader has it. Fails where a tag is closed that is not open, or open at the
    end."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.rows, self.texts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], "never closed"
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [
            value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")
        ]
        self.open += [] if tag in VOID else [tag]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert tag not in VOID and self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, first):
        """The cells after the first of the row that begins with ``first``, of the first table that
        has one."""
        return next(row[1:] for row in self.rows if row and row[0] == first)

    def pictures(self):
        encoded = [re.fullmatch(r"data:image/png;base64,(.+)", link) for link in self.links]
        return [Image.open(BytesIO(base64.b64decode(found[1], validate=True))) for found in encoded if found]
