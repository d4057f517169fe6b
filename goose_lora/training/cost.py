"""What a process has cost so far: seconds, and the largest memory that it held."""

import sys
import time

import psutil
import torch


def peak_rss_gb() -> float:
    """Return the most memory that this process ever had resident, in GB (10^9 bytes)."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # which Windows does not have

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def cost() -> dict[str, float]:
    """Return seconds since the process began, and its most memory, in GB (10^9 bytes)."""
    seconds = time.time() - psutil.Process().create_time()
    taken = {"seconds": round(seconds, 1), "peak_rss_gb": round(peak_rss_gb(), 2)}
    if torch.cuda.is_available():
        taken["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return taken
