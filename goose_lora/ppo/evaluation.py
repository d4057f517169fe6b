"""Evaluation while training: the policy as it is now on prompts that never change.

It goes by the trainer's own rollouts and rewards.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

import goose_lora.functional as F
from goose_lora.ppo.collector import RolloutCollector
from goose_lora.ppo.processes import summed
from goose_lora.ppo.sampler import PromptCollator, repeated
from goose_lora.rewards.scale import ScoreScale


@contextmanager
def own_random_numbers(accelerator: Accelerator, seed: int) -> Iterator[None]:
    """Draw inside the same random numbers each time, others on each process.

    None of those outside are used up.
    """
    device = accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + accelerator.process_index)
        yield


@torch.no_grad()
def evaluate_prompts(
    collector: RolloutCollector,
    accelerator: Accelerator,
    rows: Dataset,
    collate: PromptCollator,
    *,
    scale: ScoreScale,
    seed: int,
) -> dict[str, float]:
    """Return means over all processes, which share the rows out among them.

    Of sampled replies: score (in ``scale``), KL (nats a reply), length (tokens) and share that
    ended. Of greedy replies: score and length. The random numbers are the same each time, and none
    of the training's are used up.
    """
    device = accelerator.device
    # Each process takes every n-th prompt: their numbers differ by one at most.
    own = list(range(accelerator.process_index, len(rows), accelerator.num_processes))
    size = collector.batch_size  # out of memory, the collector makes its groups smaller, not these
    totals = torch.zeros(7, device=device, dtype=torch.float64)
    with own_random_numbers(accelerator, seed):
        for start in range(0, len(own), size):
            prompts = collate([rows[row] for row in own[start : start + size]])
            ids, mask = prompts["input_ids"].to(device), prompts["attention_mask"].to(device)
            sampled = collector.generate(ids, mask)
            greedy = collector.generate(ids, mask, greedy=True)

            # The sampled replies meet all roles, the greedy ones the sources of reward alone.
            seen = collector.evaluate(sampled)
            kl = F.masked_sum(seen.logprobs - seen.ref_logprobs, sampled.response_mask)
            sampled_scores = collector.scores(sampled, prompts["columns"], seen.by_adapter, alone=True)
            greedy_scores = collector.scores(greedy, prompts["columns"], alone=True)
            sums = [
                torch.as_tensor(len(ids), device=device),
                scale.normalise(sampled_scores.total).sum(),
                kl,
                sampled.lengths.sum(),
                sampled.ended.sum(),
                scale.normalise(greedy_scores.total).sum(),
                greedy.lengths.sum(),
            ]
            totals += torch.stack(sums).double()
    # Means are made of sums over all processes, so that each prompt counts alike.
    count, *sums = summed(accelerator, totals).tolist()
    names = ("score", "kl", "response_tokens", "eos_rate", "greedy_score", "greedy_response_tokens")
    return {name: total / count for name, total in zip(names, sums, strict=True)}


def calibration_prompts(count: int, *, processes: int, generations: int = 1) -> int:
    """Return to how many prompts each process takes its part of ``count`` replies."""
    return -(-count // (processes * generations))


@torch.no_grad()
def reference_scores(
    collector: RolloutCollector,
    accelerator: Accelerator,
    rows: Dataset,
    collate: PromptCollator,
    *,
    count: int,
    seed: int,
    generations: int = 1,
) -> Float[Tensor, " N"]:
    """Return raw scores of ``count`` replies of the policy, to as many prompts.

    They are drawn from ``rows`` by ``seed``. Each process returns its part.

    Args:
        generations: replies to a prompt, where they are scored by comparing them; there are so many
            times fewer prompts.
    """
    # A generator of its own: which prompts they are does not depend on what was drawn before.
    generator = torch.Generator().manual_seed(seed + accelerator.process_index)
    own_count = calibration_prompts(count, processes=accelerator.num_processes, generations=generations)
    chosen = torch.randint(len(rows), (own_count,), generator=generator).tolist()
    prompts = repeated(collate([rows[row] for row in chosen]), generations)
    device = accelerator.device
    rollout = collector.generate(prompts["input_ids"].to(device), prompts["attention_mask"].to(device))
    return collector.scores(rollout, prompts["columns"], alone=generations == 1).total
