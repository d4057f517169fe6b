"""What the sides of benchmarks/step.py have in common, in either environment.

It is the work, the clock, the FLOPs and the memory of one step.
"""

import gc
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import torch
from torch.utils.flop_counter import FlopCounterMode

# SmolLM2-135M's shape, and one like Qwen3-1.7B's
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "1.7B": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}
SHAPE = SHAPES[os.environ.get("BENCHMARK_SHAPE", "135M")]
PAD, EOS = SHAPE["vocab_size"] - 1, SHAPE["vocab_size"] - 2
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, **changes)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.WordLevel({f"<{index}>": index for index in range(SHAPE["vocab_size"])}, unk_token="<0>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=f"<{EOS}>",
        pad_token=f"<{PAD}>",
        unk_token="<0>",
        padding_side="left",
    )


def prompts(count: int, tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, SHAPE["vocab_size"] - 10, (count, tokens), generator=generator).tolist()


class Steps:
    """CPU seconds and FLOPs of the phases of PPO steps.

    FLOPs are counted in the first step after ``warm_up``, which is not timed.
    """

    def __init__(self, warm_up: int = 0) -> None:
        _reset_peak()
        self.warm_up = warm_up
        self.start_mb = _status_mb("VmRSS")
        self.flops: dict[str, float] = defaultdict(float)
        self.seconds: list[dict[str, float]] = []
        self._counter: Any = FlopCounterMode(display=False)
        self._counting = False

    def begin(self) -> None:
        """At the start of a step."""
        if self.flops:
            self.seconds.append(defaultdict(float))
        elif self.warm_up:
            self.warm_up -= 1
            return
        else:
            self._counter.__enter__()
            self._counting = True
        self._since, self._counted = time.process_time(), 0.0

    def lap(self, phase: str) -> None:
        """Everything since the last lap was ``phase``."""
        if self.seconds:
            now = time.process_time()
            self.seconds[-1][phase] += now - self._since
            self._since = now
        elif self._counting:
            total = self._counter.get_total_flops()
            self.flops[phase] += total - self._counted
            self._counted = total

    def end(self) -> None:
        if self._counting:
            self._counting = False
            self._counter.__exit__(None, None, None)
            gc.collect()
            _reset_peak()  # the counter holds on to tensors

    def lapped(self, owner: Any, method: str, phase: str) -> None:
        """Let each call of ``method`` be ``phase``, and what is before it the update."""
        inner = getattr(owner, method)

        def outer(*args: Any, **kwargs: Any) -> Any:
            self.lap("update")
            result = inner(*args, **kwargs)
            self.lap(phase)
            return result

        setattr(owner, method, outer)

    def write(self, path: str, **facts: Any) -> None:
        """Write figures as JSON: FLOPs, the mean step's seconds, and the peak of the timed steps.

        The peak is what is above what the process held before models were made.
        """
        seconds = {
            phase: sum(step[phase] for step in self.seconds) / len(self.seconds) for phase in self.seconds[0]
        }
        figures = {
            "flops": self.flops,
            "seconds": seconds,
            "all_seconds": [sum(step.values()) for step in self.seconds],
        }
        Path(path).write_text(
            json.dumps(
                figures
                | {"peak_mb": _status_mb("VmHWM") - self.start_mb, "imports_mb": self.start_mb}
                | facts,
                indent=2,
            )
        )


def arguments() -> dict[str, Any]:
    """The case, as ``step.py`` hands it on: JSON in the first argument."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return json.loads(sys.argv[1])


def _status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
