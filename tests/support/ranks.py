"""Work on several processes of one machine: forks of this one, joined by gloo, so that the
libraries are imported once."""

import os
import socket
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


def on_ranks(work, folder, count=2):
    """What ``work(rank)`` returned on each of ``count`` processes; an assertion with the traceback
    where one failed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    children = {os.fork() or _serve(work, folder, rank, count, port): rank for rank in range(count)}
    failed = []
    for child, rank in children.items():
        if os.waitpid(child, 0)[1]:
            failed.append((folder / f"error{rank}.txt").read_text(encoding="utf-8"))
    assert not failed, "\n".join(failed)
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(count)]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def become(rank, count, port):
    """Let this process, a fork, be one of ``count`` that meet at ``port``."""
    torch.set_num_threads(1)  # GNU's OpenMP hangs in a fork
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}


def _serve(work, folder, rank, count, port):
    status = 1
    try:
        become(rank, count, port)
        torch.save(work(rank), folder / f"result{rank}.pt")
        status = 0
    except BaseException:
        (folder / f"error{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        os._exit(status)
