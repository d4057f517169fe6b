"""Evaluation while training: the policy as it is now on prompts that never change, by the trainer's own rollouts and rewards."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset

from goose_lora import ppo_math
from goose_lora.experience import ExperienceMaker
from goose_lora.rollouts import Rollouts


@torch.no_grad()
def evaluate_prompts(
    rollouts: Rollouts, experiences: ExperienceMaker, rows: Dataset, collate: Callable[[list], dict[str, Any]], *, seed: int
) -> dict[str, float]:
    """Means over all processes, which share the rows out among them: of sampled replies score (normalised), KL (nats a reply), length (tokens) and
    share that ended; of greedy replies score and length. The same random numbers each time, and none of the training's are used up.
    """
    accelerator = experiences.accelerator
    device = accelerator.device
    own = list(range(accelerator.process_index, len(rows), accelerator.num_processes))
    totals = torch.zeros(7, device=device, dtype=torch.float64)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + accelerator.process_index)
        for start in range(0, len(own), rollouts.batch_size):
            prompts = collate([rows[row] for row in own[start : start + rollouts.batch_size]])
            ids, mask = prompts["input_ids"].to(device), prompts["attention_mask"].to(device)
            sampled, greedy = (rollouts.generate(ids, mask, greedy=greedy) for greedy in (False, True))
            seen = rollouts.evaluate(sampled)
            kl = ppo_math.masked_sum(seen.logprobs - seen.ref_logprobs, sampled.response_mask)
            score = experiences.scale.normalise(rollouts.scores(sampled, prompts["columns"], seen.by_adapter).total)
            greedy_score = experiences.scale.normalise(rollouts.scores(greedy, prompts["columns"]).total)
            sums = [score.sum(), kl, sampled.lengths.sum(), sampled.ended.sum(), greedy_score.sum(), greedy.lengths.sum()]
            totals += torch.stack([torch.as_tensor(len(ids), device=device), *sums]).double()
    everywhere: Any = accelerator.reduce(totals, reduction="sum")
    count, *sums = everywhere.tolist()
    names = ("score", "kl", "response_tokens", "eos_rate", "greedy_score", "greedy_response_tokens")
    return {name: total / count for name, total in zip(names, sums, strict=True)}
