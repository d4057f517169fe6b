"""Replies of base, SFT and PPO to the same held-out prompts, and what can be said of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from goose_lora.data.tokenization import left_pad
from goose_lora.errors import UserError
from goose_lora.evaluation import statistics
from goose_lora.generation.rollout import Rollout
from goose_lora.generation.sampling import sample
from goose_lora.generation.static_cache import StaticCache
from goose_lora.generation.stopping import StopStrings
from goose_lora.models.dense_copy import DenseCopy
from goose_lora.models.endings import reply_ends
from goose_lora.models.role_outputs import output_head
from goose_lora.models.roles import Role
from goose_lora.models.shared_base import SharedBase
from goose_lora.rewards.pairwise_judge import PairwiseJudge

Judge = Callable[..., Any]


@dataclass
class Replies:
    """One reply to each of N prompts: texts and figures.

    For each reply its raw score, its KL to the reference (nats), the bare base's own loss on it
    (nats, summed over its tokens), its length (tokens), its tokens, and whether it ended.
    """

    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    base_loss: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)
    preferred: list[float | None] = field(default_factory=list)  # by a judge of pairs: 1, 0.5 or 0
    token_ids: list[list[int]] = field(default_factory=list)


@torch.no_grad()
def answer(
    shared: SharedBase,
    role: Role,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    *,
    batch_size: int,
    seed: int = 0,
    label: str = "",
    dense: DenseCopy | None = None,
    stop_strings: Sequence[str] | None = None,
    static: StaticCache | None = None,
) -> Replies:
    """Answer all prompts (token ids) under ``role``, and measure the replies.

    They are scored if there is a reward adapter. KL is the sum over a reply's tokens of log-
    probability under ``role`` minus that under the reference, in nats, at the temperature of
    sampling. The base's loss is at temperature 1: text that it finds unlikely is seldom good text.
    """
    # The same seed for every role: what differs between their replies is the role
    torch.manual_seed(seed)
    if dense is not None:
        dense.merge_role(role)
    replies, ends = Replies(), reply_ends(tokenizer)
    device = output_head(shared.core).weight.device
    for start in tqdm(range(0, len(prompts), batch_size), desc=label or role, disable=None):
        # One group of replies
        ids, mask = left_pad(prompts[start : start + batch_size], tokenizer.pad_token_id, device)

        def written(static: StaticCache | None, ids: Tensor = ids, mask: Tensor = mask) -> Rollout:
            stop = StopStrings(tokenizer, stop_strings, ids.shape[1]) if stop_strings else None
            return sample(shared, ids, mask, config, role=role, dense=dense, stop=stop, static=static)

        rollout = written(None) if static is None else static.try_first(written)
        ids, mask, counted = rollout.input_ids, rollout.attention_mask, rollout.response_mask
        # Layers that two roles have in common are run once
        trunks = shared.trunks(ids, mask, [role, "reference", "reward", "base"])

        # Each role's states once, of which the base's may be asked at two temperatures
        logprobs: dict[tuple[Role, float], Tensor] = {}
        for of in dict.fromkeys((role, "reference", "base")):
            hidden = shared.hidden(of, ids, mask, trunks[of])
            temperatures = {config.temperature} if of in (role, "reference") else set()
            for temperature in temperatures | ({1.0} if of == "base" else set()):
                logprobs[of, temperature] = shared.logprobs(hidden, ids, counted, temperature=temperature)[0]
        own, reference = (logprobs[of, config.temperature] for of in (role, "reference"))

        # Texts and figures of the group
        token_ids = rollout.response_ids()
        replies.token_ids += token_ids
        replies.texts += tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        replies.kl += (own - reference).sum(-1).tolist()
        replies.base_loss += (-logprobs["base", 1.0]).sum(-1).tolist()
        replies.lengths += rollout.lengths.tolist()
        replies.ended += rollout.ended.tolist()
        if shared.has("reward"):
            replies.scores += shared.scores(
                ids, mask, trunks["reward"], rollout.ends_with_token(ends)
            ).tolist()
    return replies


def best_of(tries: Sequence[Replies]) -> Replies:
    """Return for each prompt the reply with the highest score, of tries by the reference.

    That is what the reward model alone can pick: the yardstick for PPO. Picking one of N moves the
    distribution: its KL to the reference is at most log N - (N - 1) / N (Stiennon et al. 2020,
    arXiv:2009.01325, appendix G.3), which is what stands as each reply's KL.
    """
    best, bound = Replies(), math.log(len(tries)) - (len(tries) - 1) / len(tries)
    for row in range(len(tries[0].texts)):
        # A tie goes to the first try, which is a reply like any other
        chosen = max(tries, key=lambda replies: replies.scores[row])
        for name in ("texts", "scores", "base_loss", "lengths", "ended"):
            getattr(best, name).append(getattr(chosen, name)[row])
        if chosen.token_ids:
            best.token_ids.append(chosen.token_ids[row])
        best.kl.append(bound)
    return best


def judge_all(
    named: dict[str, Replies],
    prompts: Sequence[object],
    judge: Judge,
    columns: Mapping[str, Sequence[object]] | None = None,
) -> None:
    """Ask a judge about all replies: one number a reply.

    It is called like a reward function. ``columns`` are the other columns of the prompts' rows.
    """
    for name, replies in named.items():
        asked: dict[str, Any] = {key: list(values) for key, values in (columns or {}).items()}
        asked |= {"prompts": list(prompts), "completions": replies.texts}
        if replies.token_ids:
            asked["completion_ids"] = replies.token_ids
        replies.judged = [float(value) for value in judge(**asked)]
        if len(replies.judged) != len(replies.texts):
            raise UserError(
                f"the judge returned {len(replies.judged)} numbers for {len(replies.texts)} replies of"
                f" {name}; one a reply is needed."
            )


def compare_all(
    named: dict[str, Replies], prompts: Sequence[object], judge: PairwiseJudge, against: str
) -> None:
    """Ask a judge of pairs about all replies, each beside that of ``against`` to its prompt."""
    outcomes = judge.compare(prompts, {name: replies.texts for name, replies in named.items()}, against)
    for name, values in outcomes.items():
        named[name].preferred = values


def summary(named: dict[str, Replies], *, against: str) -> dict[str, dict[str, Any]]:
    """Return figures by name: means with 95 % intervals, and comparisons with ``against``.

    A comparison is a win rate, and a difference at equal length where some lengths are alike.
    """
    figures = {}
    for name, replies in named.items():
        row: dict[str, Any] = {
            # The replies alone
            "kl": statistics.mean_interval(replies.kl).value,
            "tokens": statistics.mean_interval(replies.lengths).value,
            "ended": sum(replies.ended) / len(replies.ended),
            "distinct_1": statistics.distinct_n(replies.texts, 1),
            "distinct_2": statistics.distinct_n(replies.texts, 2),
            "repetition": statistics.repetition(replies.texts),
        }
        if replies.base_loss:
            row["base_loss"] = sum(replies.base_loss) / sum(replies.lengths)
        # Scores of the reward model, and of a judge that PPO did not see
        for kind, values, others in (
            ("score", replies.scores, named[against].scores),
            ("judge", replies.judged, named[against].judged),
        ):
            if not values:
                continue
            # The mean, and beside it what length alone does not explain
            mean = statistics.mean_interval(values)
            row |= {kind: mean.value, f"{kind}_ci": [mean.low, mean.high]}
            if name != against:
                wins = statistics.win_rate(values, others)
                row |= {f"{kind}_win_rate": wins.value, f"{kind}_win_rate_ci": [wins.low, wins.high]}
                # Where no two replies are of like length, nobody can know what length explains
                with suppress(UserError):
                    matched = statistics.matched_length_difference(
                        values, replies.lengths, others, named[against].lengths
                    )
                    row |= {f"{kind}_gain_at_equal_length": matched.value}
        # A judge of pairs has no number a reply; a pair without an answer says nothing
        answered = [value for value in replies.preferred if value is not None]
        if answered:
            wins = statistics.win_rate(answered, [0.5] * len(answered))
            row |= {"judge_win_rate": wins.value, "judge_win_rate_ci": [wins.low, wins.high]}
            row |= {"judge_ties": answered.count(0.5) / len(answered), "judge_pairs": len(answered)}
        figures[name] = row
    return figures
