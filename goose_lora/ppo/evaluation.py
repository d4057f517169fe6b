"""Evaluation while training: the policy as it is now on prompts that never change, by the trainer's
own rollouts and rewards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

import goose_lora.functional as F
from goose_lora.ppo.collector import Rollouts
from goose_lora.rewards.scale import ScoreScale

Collate = Callable[[list], dict[str, Any]]


@contextmanager
def own_random_numbers(accelerator: Accelerator, seed: int) -> Iterator[None]:
    """Inside, the same random numbers each time, others on each process; none of those outside are
    used up."""
    device = accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + accelerator.process_index)
        yield


@torch.no_grad()
def evaluate_prompts(
    rollouts: Rollouts,
    accelerator: Accelerator,
    rows: Dataset,
    collate: Collate,
    *,
    scale: ScoreScale,
    seed: int,
) -> dict[str, float]:
    """Means over all processes, which share the rows out among them: of sampled replies score (in
    ``scale``), KL (nats a reply), length (tokens) and share that ended; of greedy replies score and
    length. The same random numbers each time, and none of the training's are used up.
    """
    device = accelerator.device
    own = list(range(accelerator.process_index, len(rows), accelerator.num_processes))
    totals = torch.zeros(7, device=device, dtype=torch.float64)
    with own_random_numbers(accelerator, seed):
        for start in range(0, len(own), rollouts.batch_size):
            prompts = collate([rows[row] for row in own[start : start + rollouts.batch_size]])
            ids, mask = prompts["input_ids"].to(device), prompts["attention_mask"].to(device)
            sampled, greedy = (rollouts.generate(ids, mask, greedy=greedy) for greedy in (False, True))
            seen = rollouts.evaluate(sampled)
            kl = F.masked_sum(seen.logprobs - seen.ref_logprobs, sampled.response_mask)
            score = scale.normalise(rollouts.scores(sampled, prompts["columns"], seen.by_adapter).total)
            greedy_score = scale.normalise(rollouts.scores(greedy, prompts["columns"]).total)
            sums = [
                score.sum(),
                kl,
                sampled.lengths.sum(),
                sampled.ended.sum(),
                greedy_score.sum(),
                greedy.lengths.sum(),
            ]
            totals += torch.stack([torch.as_tensor(len(ids), device=device), *sums]).double()
    everywhere: Any = accelerator.reduce(totals, reduction="sum")
    count, *sums = everywhere.tolist()
    names = ("score", "kl", "response_tokens", "eos_rate", "greedy_score", "greedy_response_tokens")
    return {name: total / count for name, total in zip(names, sums, strict=True)}


@torch.no_grad()
def reference_scores(
    rollouts: Rollouts, accelerator: Accelerator, rows: Dataset, collate: Collate, *, count: int, seed: int
) -> Float[Tensor, " N"]:
    """Raw scores of the policy's replies to ``count`` prompts, drawn from ``rows`` by ``seed``:
    this process's part."""
    generator = torch.Generator().manual_seed(seed + accelerator.process_index)
    chosen = torch.randint(len(rows), (-(-count // accelerator.num_processes),), generator=generator).tolist()
    prompts = collate([rows[row] for row in chosen])
    rollout = rollouts.generate(
        prompts["input_ids"].to(accelerator.device), prompts["attention_mask"].to(accelerator.device)
    )
    return rollouts.scores(rollout, prompts["columns"]).total
