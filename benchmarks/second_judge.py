"""A second judge of film sentences, which no stage of training sees: the untrained model's word.

It is asked for the sentiment of a text, and the judgement is log P(positive) - log P(negative) of
its next word. Of 300 held-out pairs of people's ratings (``embedded/preferences-test``) it tells
0.79 as people do, VADER 0.735:

    python benchmarks/second_judge.py
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from goose_lora import cli, demo, embedded
from goose_lora.files import read_jsonl
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.loading import load_base, load_tokenizer

QUESTION = "Review: {}\nSentiment (positive or negative):"
POSITIVE, NEGATIVE = (" positive", " Positive"), (" negative", " Negative")


@torch.no_grad()
def sentiments(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 50) -> list[float]:
    """Return a number for each text, above 0 where the model finds it positive (nats)."""
    words = [[tokenizer(word)["input_ids"][0] for word in said] for said in (POSITIVE, NEGATIVE)]
    found = []
    for start in range(0, len(texts), batch_size):
        asked = [QUESTION.format(text) for text in texts[start : start + batch_size]]
        batch = tokenizer(asked, return_tensors="pt", padding=True, padding_side="left")
        logprobs = model(**batch, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
        positive, negative = (logprobs[:, ids].logsumexp(-1) for ids in words)
        found += (positive - negative).tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    cli.quiet_libraries()
    pairs = read_jsonl(embedded.resolve("embedded/preferences-test"))[:300]
    args = ModelArguments(embedded.resolve("embedded"), quantization="none", dtype="float32")
    tokenizer = load_tokenizer(args)
    model = load_base(args, tokenizer).eval()
    sides = [[pair["prompt"] + pair[side] for pair in pairs] for side in ("chosen", "rejected")]
    for name, judged in (
        ("the untrained model", [sentiments(model, tokenizer, texts) for texts in sides]),
        ("VADER", [demo.vader([""] * len(texts), texts) for texts in sides]),
    ):
        right = sum((a > b) + (a == b) / 2 for a, b in zip(*judged, strict=True))
        print(f"{name}: {right / len(pairs):.3f} of {len(pairs)} pairs as people rated them")


if __name__ == "__main__":
    main()
