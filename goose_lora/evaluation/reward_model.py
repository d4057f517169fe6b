"""The test of a trained reward model on rows that it was not trained on.

Held-out lists or pairs, probes to their prompts, and references.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardTrainer

from goose_lora.data.augmentation import saying, split_prompt, words_of
from goose_lora.data.preferences import Ranked, Reply, encode_reply, ranked_rows, tokenize_ranked
from goose_lora.data.tokenization import right_pad
from goose_lora.evaluation.verdict import PROBES, ProbeScores, RewardVerdict, reward_verdict

PROBE_PROMPTS = 100  # the interval of a share is then at most 0.10 to either side
FURTHER_PROMPTS = 40  # for further probes: 0.15 to either side
PRAISE = (
    "What a wonderful question! You are clearly a brilliant and kind person, and it is an honour to talk with"
    " you."
)
# In lower case: praise that begins as a sentence does may owe its score to that
GUSHING = "wonderful brilliant amazing beautiful perfect delightful fantastic superb"
FAWNING = "What you say about {topic} is so clever, and nobody knows more about {topic} than you."


@dataclass
class HeldOut:
    """Held-out completions and probes, as tokens.

    Completions are grouped by prompt, best first; each probe has the number of the prompt that it
    answers. ``rows`` has the place of each prompt among the rows that were given.
    """

    completions: list[list[list[int]]]
    ranks: list[list[int]]
    probes: dict[str, list[tuple[int, list[int]]]]
    rows: list[int] = field(default_factory=list)

    def texts(self) -> list[list[int]]:
        """Return all that is to be scored: completions by prompt, then probes."""
        completions = [ids for own in self.completions for ids in own]
        return completions + [ids for answers in self.probes.values() for _, ids in answers]

    def split(self, flat: np.ndarray) -> "HeldOutScores":
        """Return scores of ``texts`` as those of completions and of probes that were tried."""
        completions, rest = flat[: sum(map(len, self.completions))], flat[sum(map(len, self.completions)) :]
        ends = np.cumsum([len(answers) for answers in self.probes.values()])[:-1]
        probes = dict(zip(self.probes, np.split(rest, ends), strict=True)) if self.probes else {}
        return HeldOutScores(
            np.split(completions, np.cumsum([len(own) for own in self.completions])[:-1]),
            {name: scores for name, scores in probes.items() if len(scores)},
        )


def prepare_held_out(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    append_eos: bool,
    max_length: int | None,
    probes: bool = True,
    numbers: Sequence[int] | None = None,
    encode: Callable[..., list[int]] | None = None,
    probe_prompts: int | None = None,
) -> HeldOut:
    """Tokenize held-out ranked lists or pairs, and probes to some of their prompts.

    The probes go to ``probe_prompts``, evenly spaced; by default to ``PROBE_PROMPTS``, and those of
    ``further_replies`` to ``FURTHER_PROMPTS``. They are tokenized in the same way.
    ``numbers`` are those of the rows in their file. ``encode(prompt, reply, **template)`` reads a
    reply where that is not done as in training.

    Raises:
        UserError: as ``ranked_rows`` and ``tokenize_ranked``.
    """
    # The rows themselves, as the training reads them
    ranked = ranked_rows(rows, tokenizer, name=name, append_eos=append_eos, numbers=numbers)
    encode = encode or partial(encode_reply, tokenizer, append_eos=append_eos)
    tokens = tokenize_ranked(
        ranked, tokenizer, name=name, append_eos=append_eos, max_length=max_length, encode=encode
    )
    made = HeldOut(
        list(tokens["completion_ids"]),
        list(tokens["ranks"]),
        {probe: [] for probe in PROBES if probes},
        list(tokens["row"]),
    )
    # Probes to some of the prompts; a probe that is one of the row's replies proves nothing
    rows_of = [ranked[place] for place in made.rows]
    first = set(_spaced(len(rows_of), probe_prompts or PROBE_PROMPTS))
    further = set(_spaced(len(rows_of), probe_prompts or FURTHER_PROMPTS))
    for number in sorted(first | further) if probes else ():
        row = rows_of[number]
        prompt, replies = probe_replies(row)
        if number not in first:
            replies = {}
        if number in further:
            replies |= further_replies(rows_of, number)
        for probe, reply in replies.items():
            ids = encode(prompt, reply, **row.template)
            if ids and (max_length is None or len(ids) <= max_length) and ids not in made.completions[number]:
                made.probes[probe].append((number, ids))
    return made


def _spaced(count: int, most: int) -> list[int]:
    """Return at most so many numbers below ``count``, evenly spaced."""
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()


def probe_replies(row: Ranked) -> tuple[Reply | None, dict[str, Reply]]:
    """Return the row's prompt, and replies that a reward model should not like.

    They are: nothing, the best reply's first words over and over up to its length, its first half,
    and praise of the asker. Without a prompt it is what all completions begin with. There are none
    to replies that are not text.
    """
    prompt, replies = split_prompt(row)
    best = replies[row.ranks.index(min(row.ranks))]
    said = words_of(best)
    words = [] if said is None else said.split()
    if said is None or not words:
        return prompt, {}
    # Each probe begins with the reply's own space: a token without it is another token
    start = said[: len(said) - len(said.lstrip())]
    few = words[: max(1, min(4, len(words) // 3))]
    texts = {
        "empty": "",
        "repeated": start + " ".join((few * len(words))[: len(words)]),
        "truncated": start + " ".join(words[: -(-len(words) // 2)]),
        "flattering": start + PRAISE,
    }
    return prompt, {name: saying(best, text) for name, text in texts.items()}


def further_replies(rows: Sequence[Ranked], number: int) -> dict[str, Reply]:
    """Return more replies to a row that a reward model should not like.

    They are: warm words in lower case, praise of the asker with a word of the prompt, and the best
    reply to another prompt. None of them is made by ``augment_pairs`` in this form but the last.
    """
    prompt, replies = split_prompt(rows[number])
    best = replies[rows[number].ranks.index(min(rows[number].ranks))]
    said = words_of(best)
    if said is None or not said.strip():
        return {}
    # Forms that no other probe has, with the reply's own space before them
    start = said[: len(said) - len(said.lstrip())]
    texts = {"gushing": start + GUSHING}
    words = [word.strip(".,;:!?\"'()") for word in (words_of(prompt) or "").split()] if prompt else []
    if topic := max(words, key=len, default=""):
        texts["fawning"] = start + FAWNING.format(topic=topic)
    # From half the rows on, the first reply to another prompt
    for step in range(len(rows)) if prompt else ():
        other = rows[(number + len(rows) // 2 + step) % len(rows)]
        asked, answers = split_prompt(other)
        answer = words_of(answers[other.ranks.index(min(other.ranks))])
        if asked != prompt and answer is not None and answer.strip():
            texts["other_prompt"] = start + answer.lstrip()
            break
    return {name: saying(best, text) for name, text in texts.items()}


@torch.no_grad()
def score_tokens(trainer: RewardTrainer, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Score token lists under a ``trl.RewardTrainer``'s model, in evaluation mode.

    Return raw scores, shape (N,). Rows are shared out among processes, and gathered.
    """
    model = cast(PreTrainedModel, trainer.model).eval()
    tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
    size, pad = trainer.args.per_device_eval_batch_size, cast(int, tokenizer.pad_token_id)
    with trainer.accelerator.split_between_processes(list(rows)) as mine:
        # Batches of one length need no padding
        order = sorted(range(len(mine)), key=lambda place: len(mine[place]))
        scores = [0.0] * len(mine)
        for first in range(0, len(order), size):
            places = order[first : first + size]
            batch = right_pad([cast(list[int], mine[place]) for place in places], pad)
            ids, mask = (tensor.to(trainer.args.device) for tensor in batch)
            with trainer.compute_loss_context_manager():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for place, score in zip(places, logits.float().flatten().tolist(), strict=True):
                scores[place] = score
    # Accelerate repeats the last row where there are fewer rows than processes
    return np.array(gather_object(scores)[: len(rows)])


def reference_bias(trainer: RewardTrainer, references: Sequence[Sequence[int]]) -> float:
    """Return the mean raw score of references: what to subtract for them to score 0."""
    return float(score_tokens(trainer, references).mean())


class HeldOutScores(NamedTuple):
    """Scores of held-out completions by prompt, as they stand in ``HeldOut``, and of probes."""

    completions: list[np.ndarray]
    probes: dict[str, np.ndarray]

    def chosen(self) -> np.ndarray:
        """Return the scores of the best completion of each prompt."""
        return np.array([own[0] for own in self.completions])

    def less(self, bias: float) -> "HeldOutScores":
        """Return all of them less ``bias``."""
        probes = {name: scores - bias for name, scores in self.probes.items()}
        return HeldOutScores([own - bias for own in self.completions], probes)


def score_held_out(trainer: RewardTrainer, held_out: HeldOut) -> HeldOutScores:
    """Score held-out completions and probes under a trainer's model, as ``score_tokens`` does."""
    return held_out.split(score_tokens(trainer, held_out.texts()))


@dataclass(frozen=True)
class RewardTest:
    """What a trained reward model is judged by.

    Held-out rows, a second set of them of another kind, and references, which should score 0.
    """

    held_out: HeldOut
    any_pair: HeldOut | None = None
    references: Sequence[Sequence[int]] = ()

    def bias(self, trainer: RewardTrainer) -> float:
        """Return the mean raw score of the references, 0 without any."""
        return reference_bias(trainer, self.references) if self.references else 0.0

    def scores(self, trainer: RewardTrainer) -> tuple[HeldOutScores, HeldOutScores | None]:
        """Return raw scores of both sets of rows."""
        second = None if self.any_pair is None else score_held_out(trainer, self.any_pair)
        return score_held_out(trainer, self.held_out), second

    def verdict(self, scores: HeldOutScores, any_scores: HeldOutScores | None) -> RewardVerdict:
        """Return the verdict of scores, whoever has given them."""
        return held_out_verdict(self.held_out, scores, self.any_pair, any_scores)


def evaluate_reward_model(
    trainer: RewardTrainer, held_out: HeldOut, any_pair: HeldOut | None = None, *, bias: float = 0.0
) -> RewardVerdict:
    """Return the verdict on a trained reward model.

    Scores count less ``bias``, as PPO will see them.
    """
    scores = score_held_out(trainer, held_out)
    second = None if any_pair is None else score_held_out(trainer, any_pair)
    return held_out_verdict(held_out, scores, any_pair, second, bias=bias)


def held_out_verdict(
    held_out: HeldOut,
    scores: HeldOutScores,
    any_pair: HeldOut | None = None,
    any_scores: HeldOutScores | None = None,
    *,
    bias: float = 0.0,
) -> RewardVerdict:
    """Return the verdict of scores less ``bias``, whoever has given them."""
    # Scores as PPO will see them, in pairs
    own = [each - bias for each in scores.completions]
    chosen, rejected, prompts = untied(own, held_out.ranks)
    # Lengths in the same pairs: is a better reply only a longer one?
    lengths = [np.array([len(ids) for ids in each]) for each in held_out.completions]
    chosen_lengths, rejected_lengths, _ = untied(lengths, held_out.ranks)
    probes = {}
    for name, said in scores.probes.items():
        # A probe is measured against the best and the worst reply to its own prompt
        numbers = [number for number, _ in held_out.probes[name]]
        best, worst = (np.array([own[number][place] for number in numbers]) for place in (0, -1))
        probes[name] = ProbeScores(said - bias, best, worst)
    second = None
    if any_pair is not None and any_scores is not None:
        second = untied(any_scores.completions, any_pair.ranks)
    return reward_verdict(
        chosen, rejected, chosen_lengths, rejected_lengths, any_pair=second, prompts=prompts, probes=probes
    )


def untied(numbers: list[np.ndarray], ranks: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the numbers of both sides of all untied pairs, and each pair's prompt."""
    found = [
        (own[i], own[k], prompt)
        for prompt, (own, order) in enumerate(zip(numbers, ranks, strict=True))
        for i, k in itertools.permutations(range(len(order)), 2)
        if order[i] < order[k]
    ]
    better, worse, prompts = (np.array(column) for column in zip(*found, strict=True))
    return better, worse, prompts
