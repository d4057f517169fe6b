"""Counts where the program waits for its device: reads of numbers, and shapes that depend on them.

On a CPU nothing waits, but the calls are the same. Each is counted under the function of the
program that makes it, or under the library's where no function of the program does.
"""

import sys
from collections import Counter
from types import FrameType

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import goose_lora

HOME = goose_lora.__path__[0]
# Each reads the device, or makes as many rows as it finds there.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
    "is_nonzero",
}
READS = ("tolist", "numpy", "cpu")  # which no operator shows on a CPU


class Waits(TorchDispatchMode):
    """Counts inside; ``ours`` has those of the program's own functions, ``others`` all the rest."""

    def __init__(self):
        super().__init__()
        self.ours: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.operators = 0

    def __enter__(self):
        self._plain = {name: getattr(torch.Tensor, name) for name in READS}
        for name, plain in self._plain.items():
            setattr(torch.Tensor, name, self._counting(plain))
        return super().__enter__()

    def __exit__(self, *error):
        for name, plain in self._plain.items():
            setattr(torch.Tensor, name, plain)
        return super().__exit__(*error)

    def _counting(self, plain):
        def read(x, *args, **kwargs):
            self._note(sys._getframe(1))
            return plain(x, *args, **kwargs)

        return read

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.__name__.split(".")[0]
        self.operators += 1
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if by_mask or name in WAITING:
            self._note(sys._getframe(1))
        return operator(*args, **(kwargs or {}))

    def _note(self, frame: FrameType | None) -> None:
        # The innermost frame that is not torch's own
        inner = "torch"
        while frame is not None:
            file = frame.f_code.co_filename
            if "/torch/" not in file and not file.endswith("support/waits.py"):
                inner = f"{file.rpartition('/')[2]}:{frame.f_code.co_name}"
                break
            frame = frame.f_back
        counter = self.others
        if frame is not None and frame.f_code.co_filename.startswith(HOME):
            counter = self.ours
        counter[inner] += 1
