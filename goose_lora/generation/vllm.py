"""Rollouts by vLLM, in the same process and on the same device.

vLLM holds a base of its own, and gets the policy's adapter before each rollout. The settings are
those of vLLM 0.32.
"""

import importlib
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import numpy as np
import torch
from jaxtyping import Int
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from goose_lora.errors import UserError
from goose_lora.generation.rollout import Rollout
from goose_lora.generation.sampling import response_mask
from goose_lora.generation.stopping import StopStrings
from goose_lora.models.dense_copy import DenseCopy
from goose_lora.models.folders import ADAPTER_WEIGHTS
from goose_lora.models.roles import ADAPTERS
from goose_lora.models.shared_base import SharedBase

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
_SCRATCH = "goose_lora-vllm-"


class TokenLogprob(Protocol):
    """vLLM's log-probability of one token."""

    @property
    def logprob(self) -> float: ...


class VLLMReply(Protocol):
    """One reply of vLLM's: its ``CompletionOutput``."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[Mapping[int, TokenLogprob]]: ...
    @property
    def finish_reason(self) -> str | None: ...


def require_vllm() -> ModuleType:
    """Return the package vllm, told to stay in this process and to report to nobody.

    Raises:
        UserError: it is not installed.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    try:
        return importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        raise UserError(
            f"rollout_engine: vllm, but {error.name} is not installed. pip install vllm, then pip install"
            " goose-lora once more, since vLLM takes an older transformers with it (docs/vllm.md); or use"
            " rollout_engine: transformers."
        ) from error


class VLLMEngine:
    """Sampling from the policy of ``shared`` by vLLM.

    Weights of the base are read once, dequantized, when it is made; it sleeps between rollouts.

    Args:
        generation: lengths, temperature and tokens that end a reply, from
            ``sampling.generation_config``.
        rows: replies written at a time.
        prompt_tokens: longest prompt.
        memory_share: of the device's memory, for weights, cache and activations of vLLM.
        stop_strings: texts that end a reply, besides the tokens of ``generation``.

    Raises:
        UserError: vllm is not installed, or for another device; or the policy's adapter is of a
            kind that it does not load.
    """

    def __init__(
        self,
        shared: SharedBase,
        tokenizer: PreTrainedTokenizerBase,
        generation: GenerationConfig,
        *,
        rows: int,
        prompt_tokens: int,
        memory_share: float,
        stop_strings: Sequence[str] | None = None,
    ):
        # What can be refused is, before weights are written.
        vllm = require_vllm()
        self.shared, self.tokenizer, self.generation = shared, tokenizer, generation
        self.stop_strings = list(stop_strings or [])
        self.prompt_tokens, self._syncs = prompt_tokens, 0
        rank = _rank(shared)
        weight = shared.get_base_model().get_output_embeddings().weight  # type: ignore[operator]
        self._sleeps = weight.device.type == "cuda"
        _require_device(weight.device.type)

        # vLLM reads a model from a folder.
        with _random_numbers_kept(), tempfile.TemporaryDirectory(prefix=_SCRATCH) as folder:
            # No adapter is called so: what is written is the base as it computes here.
            copied = DenseCopy(shared)
            copied.require_same("base")
            copied.merge_role("base").save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            self._give_back()
            self.llm = vllm.LLM(
                model=folder,
                dtype=str(weight.dtype).removeprefix("torch."),
                generation_config="vllm",  # or the filters that a model ships with would be the defaults
                logprobs_mode="processed_logprobs",  # at the temperature
                enable_lora=True,
                max_loras=1,
                max_lora_rank=rank,
                max_num_seqs=rows,
                max_model_len=prompt_tokens + generation.max_new_tokens,
                gpu_memory_utilization=memory_share,
                enable_sleep_mode=self._sleeps,
            )
        self._try_adapter()
        if self._sleeps:
            self.llm.sleep(level=1)

    @torch.no_grad()
    def sample(
        self, input_ids: Int[Tensor, "B P"], attention_mask: Int[Tensor, "B P"], *, greedy: bool = False
    ) -> Rollout:
        """Return one reply to each left-padded prompt, by the policy as it is now.

        Each reply has a seed of its own, which torch's generator draws, so that a resumed run
        writes what the uninterrupted one would have.

        Raises:
            UserError: a prompt that is too long, or log-probabilities that are not finite.
        """
        longest = int(attention_mask.sum(-1).max())
        if longest > self.prompt_tokens:
            raise UserError(
                f"a prompt of {longest} tokens, and rollout_engine: vllm has room for {self.prompt_tokens}."
                " Raise max_prompt_tokens."
            )

        # vLLM takes lists without padding.
        prompts = [
            {"prompt_token_ids": ids[seen].tolist()}
            for ids, seen in zip(input_ids, attention_mask.bool(), strict=True)
        ]
        seeds: list[int | None] = [None] * len(prompts)
        if not greedy:
            seeds = torch.randint(2**31, (len(prompts),)).tolist()
        with _random_numbers_kept(), self._awake(), self._policy() as adapter:
            outputs = self.llm.generate(
                prompts,
                [self._parameters(seed) for seed in seeds],
                lora_request=adapter,
                use_tqdm=False,
            )
        return self._rollout(input_ids, attention_mask, [output.outputs[0] for output in outputs])

    def _parameters(self, seed: int | None) -> object:
        """Return vLLM's settings of one reply; greedy without a seed.

        Under them the log-probabilities of a plain forward are those of sampling.
        """
        return require_vllm().SamplingParams(
            temperature=0.0 if seed is None else self.generation.temperature,
            seed=seed,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            max_tokens=self.generation.max_new_tokens,
            ignore_eos=True,  # the model's; the tokens that end a reply are these
            stop_token_ids=self.generation.eos_token_id,
            stop=self.stop_strings,
            detokenize=bool(self.stop_strings),
            skip_special_tokens=False,
            logprobs=0,  # of the token that was drawn alone
        )

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Keep vLLM's weights and cache on the device inside; else they are on the host."""
        self._give_back()
        if self._sleeps:
            self.llm.wake_up()
        try:
            yield
        finally:
            if self._sleeps:
                self.llm.sleep(level=1)

    def _give_back(self) -> None:
        """Leave vLLM the memory that torch's allocator holds and does not use."""
        if self._sleeps:
            torch.cuda.empty_cache()

    @contextmanager
    def _policy(self) -> Iterator[object]:
        """Give vLLM the policy's adapter as it is now inside; yield its request for it."""
        # The name and the number were never used: vLLM keeps adapters by number, and what it has
        # read of a prompt by name.
        self._syncs += 1
        with tempfile.TemporaryDirectory(prefix=_SCRATCH) as folder:
            weights = get_peft_model_state_dict(
                self.shared, adapter_name=ADAPTERS["policy"], save_embedding_layers=False
            )
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
            save_file(tensors, Path(folder) / ADAPTER_WEIGHTS)
            self.shared.peft_config[ADAPTERS["policy"]].save_pretrained(folder)
            request = importlib.import_module("vllm.lora.request").LoRARequest(
                f"policy-{self._syncs}", self._syncs, folder
            )
            self.llm.llm_engine.add_lora(request)
        try:
            yield request
        finally:
            self.llm.llm_engine.remove_lora(self._syncs)

    def _try_adapter(self) -> None:
        """Refuse an adapter that vLLM does not load, before the first rollout."""
        try:
            with self._policy():
                pass
        except ValueError as error:
            raise UserError(
                f"rollout_engine: vllm does not load the policy's adapter: {error}. Use rollout_engine:"
                " transformers."
            ) from error

    def _rollout(
        self,
        input_ids: Int[Tensor, "B P"],
        attention_mask: Int[Tensor, "B P"],
        replies: Sequence[VLLMReply],
    ) -> Rollout:
        """Return the replies as a rollout, each cut where the project's own rules end it.

        vLLM's rules agree with them but for how it decodes a stop text.
        """
        width, rows, device = max(len(reply.token_ids) for reply in replies), len(replies), input_ids.device
        ids = torch.full((rows, width), self.tokenizer.pad_token_id)  # type: ignore[arg-type]
        logprobs, written = torch.zeros(rows, width), torch.zeros(rows, width, dtype=torch.bool)
        for row, reply in enumerate(replies):
            count = len(reply.token_ids)
            ids[row, :count] = torch.tensor(list(reply.token_ids))
            logprobs[row, :count] = torch.tensor(
                [seen[token].logprob for seen, token in zip(reply.logprobs, reply.token_ids, strict=True)]
            )
            written[row, :count] = True

        # A token of probability 0 or NaN would spoil the first ratio without a word.
        broken = int((~torch.isfinite(logprobs)).any(-1).sum())
        if broken:
            raise UserError(
                f"vLLM's log-probabilities are not finite in {broken} of {rows} replies: training has"
                " diverged, or the base overflows in this dtype. Lower the learning rate, or use dtype:"
                " bfloat16 or float32."
            )

        # A stop text is looked for token by token, as while transformers writes.
        mask, ended = response_mask(ids, self.generation.eos_token_id)  # type: ignore[arg-type]
        mask = mask & written
        if self.stop_strings:
            stop = StopStrings(self.tokenizer, self.stop_strings, 0)
            for column in range(width):
                stop(ids[:, : column + 1], logprobs)
            mask, ended = stop.cut(mask, ended)
        ended = ended | torch.tensor([reply.finish_reason == "stop" for reply in replies])

        # Columns that no reply counts are dropped.
        kept = int(mask.sum(-1).max())
        logprobs = torch.where(mask, logprobs, 0.0)
        ids, mask, logprobs = (x[:, :kept].to(device) for x in (ids, mask, logprobs))
        return Rollout(
            input_ids=torch.cat([input_ids, ids], dim=1),
            attention_mask=torch.cat([attention_mask, mask.long()], dim=1),
            response_mask=mask,
            ended=ended.to(device),
            sampling_logprobs=logprobs,
        )


def _rank(shared: SharedBase) -> int:
    """Return the smallest rank that vLLM has room for and the policy's adapter fits into.

    Raises:
        UserError: the adapter is none of plain LoRA on linear layers, or larger than any.
    """
    name = ADAPTERS["policy"]
    config = cast(LoraConfig, shared.peft_config[name])
    layers = [layer for layer in shared.modules() if isinstance(layer, LoraLayer)]
    # vLLM would pass over what it does not know
    special = any(name in layer.lora_variant or name in layer.lora_embedding_A for layer in layers)
    if special or config.lora_bias or config.bias != "none":
        raise UserError(
            "rollout_engine: vllm loads plain LoRA on linear layers only, without biases. Use rollout_engine:"
            " transformers."
        )
    # The largest rank of any layer, rounded up to one of vLLM's
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if rank > _RANKS[-1]:
        raise UserError(
            f"lora_r={rank}: vLLM takes adapters up to rank {_RANKS[-1]}. Lower it, or use rollout_engine:"
            " transformers."
        )
    return next(known for known in _RANKS if known >= rank)


def _require_device(kind: str) -> None:
    """Refuse a vLLM that is built for another device than the base's."""
    built = importlib.import_module("vllm.platforms").current_platform.device_type
    if built != kind:
        raise UserError(
            f"rollout_engine: vllm, which runs on {built or 'no device'} here, and the base is on {kind}."
            " They share one device: install the vLLM that is built for it, or use rollout_engine:"
            " transformers."
        )


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Put all generators of random numbers back afterwards as they were before."""
    # vLLM seeds the whole process when it starts: what training draws afterwards must not depend on
    # that.
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
