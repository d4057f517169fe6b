"""What a process has cost so far: seconds, and the largest memory that it held."""

import resource
import sys
import time

import torch

_STARTED = time.monotonic()


def peak_rss_gb() -> float:
    """Most memory this process ever had resident, in GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def cost() -> dict[str, float]:
    """What this process has taken so far: seconds, and most memory, in GB (10^9 bytes)."""
    gpu = (
        {"peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
        if torch.cuda.is_available()
        else {}
    )
    return {"seconds": round(time.monotonic() - _STARTED, 1), "peak_rss_gb": round(peak_rss_gb(), 2), **gpu}
