"""Prompts to replies: batched, left-padded, sampled from the model's true distribution, cut at the
first end-of-text token."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from goose_lora.errors import UserError
from goose_lora.generation.rollout import Rollout
from goose_lora.generation.stopping import StopStrings
from goose_lora.models.dense_copy import DenseCopy
from goose_lora.models.roles import Role
from goose_lora.models.shared_base import SharedBase
from goose_lora.models.trunk import Capture, below, decoder_layers


def generation_config(
    *,
    response_tokens: int,
    temperature: float,
    eos_token_ids: Sequence[Any],
    pad_token_id: Any,
    do_sample: bool = True,
) -> GenerationConfig:
    """Settings under which the log-probabilities of a plain forward are those of sampling.

    Common filters are off by name, since ``generate`` has defaults of its own (top_k = 50).
    """
    sampled = {
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
    }
    return GenerationConfig(
        max_new_tokens=response_tokens,
        do_sample=do_sample,
        **(sampled if do_sample else {"temperature": 1.0, "top_k": 50, "top_p": 1.0}),
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        encoder_repetition_penalty=1.0,
        min_length=0,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        eos_token_id=list(eos_token_ids),
        pad_token_id=pad_token_id,
    )


@torch.no_grad()
def sample(
    shared: SharedBase,
    input_ids: Int[Tensor, "B P"],
    attention_mask: Int[Tensor, "B P"],
    config: GenerationConfig,
    *,
    role: Role = "policy",
    dense: DenseCopy | None = None,
    stop: StopStrings | None = None,
    trunk_depth: int = 0,
    keep_trunk_on: torch.device | None = None,
    streamer: BaseStreamer | None = None,
) -> Rollout:
    """One reply to each left-padded prompt under ``role``; by ``dense`` if given, which must have
    become that role.

    ``stop`` ends replies at a text, besides the end-of-text tokens of ``config``; it serves one
    call. With ``trunk_depth``, the output of so many of the lowest layers is kept, on
    ``keep_trunk_on`` or the model's device: they run for every token anyway. ``streamer`` gets the
    tokens of one reply as they are drawn.
    """
    sampler = TokenSampler(config.temperature if config.do_sample else None)
    settings = copy.deepcopy(config)
    settings.update(
        do_sample=False,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        min_p=None,
        typical_p=None,
        epsilon_cutoff=None,
        eta_cutoff=None,
    )
    acting = nullcontext(dense.model) if dense else shared.role(role, generating=True)
    settings.return_dict_in_generate = True
    with acting as model, _nothing_shipped(model), _contiguous_head(model), shared.autocast():
        columns = input_ids.shape[1] + config.max_new_tokens
        capture = Capture(decoder_layers(model), trunk_depth, columns, keep_trunk_on) if trunk_depth else None
        with capture.watching() if capture else nullcontext():
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([stop] if stop else []),
                streamer=streamer,
            )
        sequences = output.sequences
        trunk = _trunk(model, capture, output, attention_mask) if capture else None
    mask, ended = response_mask(sequences[:, input_ids.shape[1] :], config.eos_token_id)
    if stop:
        mask, ended = stop.cut(mask, ended)
    logprobs = torch.where(mask, sampler.logprobs(mask.shape[1]), 0.0)
    return Rollout(sequences, torch.cat([attention_mask, mask.long()], dim=1), mask, ended, logprobs, trunk)


def _trunk(
    model: Any, capture: Capture, output: Any, attention_mask: Int[Tensor, "B P"]
) -> Float[Tensor, "B L H"]:
    """What ``capture`` has seen, and the state of each last token, which was sampled and not read:
    one more step of the lower layers."""
    sequences = output.sequences
    length = sequences.shape[1]
    if capture.seen < length:
        mask = torch.nn.functional.pad(attention_mask, (0, length - attention_mask.shape[1]), value=1)
        decoder = getattr(model, model.base_model_prefix)
        with below(capture.layers, capture.depth), capture.watching():
            decoder(
                input_ids=sequences[:, -1:],
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=output.past_key_values,
                use_cache=True,
            )
    return capture.states[:, :length]


class TokenSampler:
    """Draws each token from softmax(logits / temperature), or takes the likeliest where
    ``temperature`` is None, and notes its log-probability.

    It stands among the logits processors of ``generate`` and hands back numbers whose argmax is the
    token drawn. ``torch.multinomial`` draws one exponential number for every entry of the
    vocabulary, which was half the time of a rollout on a CPU; here a uniform number a row picks a
    block of the vocabulary by the blocks' probabilities, then the token within it. Everything
    happens in the logits' own memory.
    """

    BLOCK = 256

    def __init__(self, temperature: float | None):
        self.temperature = temperature
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Int[Tensor, "B L"], logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        if self.temperature not in (None, 1.0):
            logits.div_(self.temperature)
        greedy = logits.argmax(-1, keepdim=True) if self.temperature is None else None
        weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
        total = weights.sum(-1, keepdim=True)
        if not torch.isfinite(total).all():
            raise UserError(
                f"the policy's logits are not finite in {int((~torch.isfinite(total)).sum())} of {len(total)}"
                " rows: training has diverged, or the base overflows in this dtype. Lower the learning rate,"
                " or use dtype: bfloat16 or float32."
            )
        token = self._draw(weights) if greedy is None else greedy
        self.columns.append((weights.gather(-1, token) / total).log())
        return weights.zero_().scatter_(-1, token, 1.0)

    def _draw(self, weights: Float[Tensor, "B V"]) -> Int[Tensor, "B 1"]:
        size, whole = self.BLOCK, weights.shape[1] // self.BLOCK * self.BLOCK
        sums = weights[:, :whole].unflatten(-1, (-1, size)).sum(-1)
        if whole < weights.shape[1]:
            sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=-1)
        block, rest = _inverse_cdf(sums, torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device))
        places = block * size + torch.arange(size, device=weights.device)
        outside = places >= weights.shape[1]
        inside = weights.gather(-1, places.masked_fill(outside, 0)).masked_fill(outside, 0.0)
        return block * size + _inverse_cdf(inside, rest)[0]

    def logprobs(self, tokens: int) -> Float[Tensor, "B T"]:
        # Where the check for the end lags behind, generate samples a few tokens more and throws
        # them away.
        return torch.cat(self.columns[:tokens], dim=-1)


def _inverse_cdf(
    weights: Float[Tensor, "B N"], uniform: Float[Tensor, "B 1"]
) -> tuple[Int[Tensor, "B 1"], Float[Tensor, "B 1"]]:
    """For each row the index that ``uniform`` in [0, 1) falls on when [0, 1) is divided in
    proportion to ``weights``, and how far into its part."""
    upto = weights.double().cumsum(-1)
    target = uniform * upto[:, -1:]
    index = torch.searchsorted(upto, target, right=True).clamp(max=weights.shape[1] - 1)
    own = weights.gather(-1, index).double()
    return index, ((target - (upto.gather(-1, index) - own)) / own).clamp(0.0, 1.0 - 2**-53)


@contextmanager
def _nothing_shipped(model: Any) -> Iterator[None]:
    """What a configuration leaves unset, ``generate`` takes from the one that the model came with,
    and a repetition penalty or a list of suppressed tokens from there makes the KL negative,
    without a word."""
    shipped, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = shipped


@contextmanager
def _contiguous_head(model: Any) -> Iterator[None]:
    """Give the language-model head whole rows. After the prompt it gets a slice, for which torch's
    CPU matmul in bf16 copies the head's weight once for every row: 3.6 GB and a third of the time
    of a rollout of 64 prompts on SmolLM2-135M."""
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: (args[0].contiguous(), *args[1:])
    )
    try:
        yield
    finally:
        hook.remove()


def response_mask(
    response_ids: Int[Tensor, "B T"], eos_token_ids: Sequence[int]
) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, " B"]]:
    """True up to and with each reply's first end-of-text token, and whether there is one.

    A pad token inside a reply is a token like any other: TRL 0.12-1.12 takes it for the reply's
    end.
    """
    is_eos = torch.isin(response_ids, torch.tensor(list(eos_token_ids), device=response_ids.device))
    ended_before = is_eos.cumsum(-1) - is_eos.long()
    return ended_before == 0, is_eos.any(-1)
