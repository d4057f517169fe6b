"""Prompts to replies, sampled from the model's true distribution.

Prompts come as a left-padded batch; replies are cut at the first end-of-text token.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from goose_lora.errors import UserError
from goose_lora.generation.rollout import Rollout, SpecialTokenId
from goose_lora.generation.static_cache import StaticCache
from goose_lora.generation.stopping import StopStrings
from goose_lora.models.dense_copy import DenseCopy
from goose_lora.models.roles import Role
from goose_lora.models.shared_base import SharedBase
from goose_lora.models.trunk import Capture, below, decoder_layers


def generation_config(
    *,
    response_tokens: int,
    temperature: float,
    eos_token_ids: Sequence[SpecialTokenId],
    pad_token_id: SpecialTokenId,
    do_sample: bool = True,
) -> GenerationConfig:
    """Return settings under which the log-probabilities of a plain forward are those of sampling.

    Common filters are off by name, since ``generate`` has defaults of its own (top_k = 50).
    """
    config = GenerationConfig(
        max_new_tokens=response_tokens,
        do_sample=do_sample,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
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
    # Without sampling, transformers warns of any of these that is not its default.
    if do_sample:
        config.update(
            temperature=temperature,
            top_k=0,
            min_p=0.0,
            typical_p=1.0,
            epsilon_cutoff=0.0,
            eta_cutoff=0.0,
        )
    return config


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
    static: StaticCache | None = None,
) -> Rollout:
    """Return one reply to each left-padded prompt.

    Args:
        role: who writes.
        dense: a dense copy that writes in its place; it must have become that role.
        stop: ends replies at a text, besides the end-of-text tokens of ``config``; it serves one
            call.
        trunk_depth: keep the output of so many of the lowest layers, which run for every token
            anyway.
        keep_trunk_on: the device that the output goes to; the model's if None.
        streamer: gets the tokens of one reply as they are drawn.
        static: a cache of fixed size for ``dense``, in place of one that grows.

    Raises:
        UserError: logits that are not finite.
        ValueError: a static cache without a dense copy, or with a trunk that is kept: the hooks
            that note it are no part of a compiled step.
    """
    if static and (dense is None or trunk_depth):
        raise ValueError("a static cache serves a dense copy, and keeps no trunk")
    # The sampler draws, and hands generate numbers of which the greedy choice is what it drew.
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
    settings.return_dict_in_generate = True
    criteria = StoppingCriteriaList([sampler.until_broken])
    if stop:
        criteria.append(stop)

    columns, head = input_ids.shape[1] + config.max_new_tokens, _contiguous_head
    if static:
        static.apply_to(settings, columns)
        head = nullcontext
    acting = nullcontext(dense.model) if dense else shared.role(role, generating=True)
    with acting as model, _nothing_shipped(model), head(model), shared.autocast():
        with _capturing(model, trunk_depth, columns, keep_trunk_on) as capture:
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=criteria,
                streamer=streamer,
            )
        sampler.require_finite()
        sequences = output.sequences
        trunk = _trunk(model, capture, output, attention_mask) if capture else None

    # A reply counts up to its first end, be it a token or a text.
    mask, ended = response_mask(sequences[:, input_ids.shape[1] :], config.eos_token_id)
    if stop:
        mask, ended = stop.cut(mask, ended)
    logprobs = torch.where(mask, sampler.logprobs(mask.shape[1]), 0.0)
    return Rollout(
        input_ids=sequences,
        attention_mask=torch.cat([attention_mask, mask.long()], dim=1),
        response_mask=mask,
        ended=ended,
        sampling_logprobs=logprobs,
        trunk=trunk,
    )


@contextmanager
def _capturing(
    model: PreTrainedModel, depth: int, columns: int, keep_on: torch.device | None
) -> Iterator[Capture | None]:
    """Note the output of the ``depth`` lowest layers inside; yield None for 0 layers."""
    if depth == 0:
        yield None
        return
    capture = Capture(decoder_layers(model), depth, columns, keep_on)
    with capture.watching():
        yield capture


def _trunk(
    model: PreTrainedModel,
    capture: Capture,
    output: GenerateDecoderOnlyOutput,
    attention_mask: Int[Tensor, "B P"],
) -> Float[Tensor, "B L H"]:
    """Return the states that ``capture`` has seen, and those of the last tokens.

    Each last token was sampled and not read: the lower layers take one more step for it.
    """
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
    capture.wait()
    return capture.states[:, :length]


class TokenSampler:
    """A logits processor that draws each token, and notes its log-probability.

    Tokens are drawn from softmax(logits / temperature), or are the likeliest where ``temperature``
    is None. It stands among the logits processors of ``generate`` and hands back numbers whose
    argmax is the token drawn. ``torch.multinomial`` draws one exponential number for every entry of
    the vocabulary, which was half the time of a rollout on a CPU; here a uniform number a row picks
    a block of the vocabulary by the blocks' probabilities, then the token within it. Everything
    happens in the logits' own memory, and nothing waits for the device.
    """

    BLOCK = 256

    def __init__(self, temperature: float | None):
        self.temperature = temperature
        self.columns: list[Tensor] = []
        self.broken: Bool[Tensor, " B"] | None = None  # rows with logits that were not finite

    def until_broken(
        self, input_ids: Int[Tensor, "B L"], scores: object, **kwargs: object
    ) -> Bool[Tensor, " B"]:
        """End all rows at the first logits that are not finite: a stopping criterion."""
        assert self.broken is not None, "asked before a token was drawn"
        return self.broken.any().expand(len(input_ids))

    def require_finite(self) -> None:
        """Raise UserError if logits were not finite, at which all rows have ended."""
        # Here and not at each token: reading the device makes it wait for the host
        broken = 0 if self.broken is None else int(self.broken.sum())
        if self.broken is not None and broken:
            raise UserError(
                f"the policy's logits are not finite in {broken} of {len(self.broken)} rows: training has"
                " diverged, or the base overflows in this dtype. Lower the learning rate, or use dtype:"
                " bfloat16 or float32."
            )

    def __call__(self, input_ids: Int[Tensor, "B L"], logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        # The likeliest is found before rounding can make two alike.
        token = None
        if self.temperature is None:
            token = logits.argmax(-1, keepdim=True)
        elif self.temperature != 1.0:
            logits.div_(self.temperature)
        weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
        total = weights.sum(-1, keepdim=True)
        broken = ~torch.isfinite(total).squeeze(-1)
        self.broken = broken if self.broken is None else self.broken | broken
        if token is None:
            token = self._draw(weights)
        self.columns.append((weights.gather(-1, token) / total).log())
        return weights.zero_().scatter_(-1, token, 1.0)

    def _draw(self, weights: Float[Tensor, "B V"]) -> Int[Tensor, "B 1"]:
        """Return an index for each row, drawn in proportion to ``weights``."""
        # The blocks' sums; the last block may be shorter.
        size, whole = self.BLOCK, weights.shape[1] // self.BLOCK * self.BLOCK
        sums = weights[:, :whole].unflatten(-1, (-1, size)).sum(-1)
        if whole < weights.shape[1]:
            sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=-1)
        block, rest = _inverse_cdf(sums, torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device))

        # The token within the block, by what is left of the uniform number.
        places = block * size + torch.arange(size, device=weights.device)
        outside = places >= weights.shape[1]
        inside = weights.gather(-1, places.masked_fill(outside, 0)).masked_fill(outside, 0.0)
        # Of a row that is not finite any index may come, and must be a token
        return (block * size + _inverse_cdf(inside, rest)[0]).clamp_(max=weights.shape[1] - 1)

    def logprobs(self, tokens: int) -> Float[Tensor, "B T"]:
        """Return the log-probabilities of the first ``tokens`` tokens that were drawn."""
        # Where the check for the end lags behind, generate samples a few tokens more and throws
        # them away.
        return torch.cat(self.columns[:tokens], dim=-1)


def _inverse_cdf(
    weights: Float[Tensor, "B N"], uniform: Float[Tensor, "B 1"]
) -> tuple[Int[Tensor, "B 1"], Float[Tensor, "B 1"]]:
    """Return for each row the index that ``uniform`` falls on, and how far into its part.

    [0, 1) is divided in proportion to ``weights``, and ``uniform`` lies in [0, 1).
    """
    # In float64: fp32 sums over a large vocabulary would favour some tokens.
    upto = weights.double().cumsum(-1)
    target = uniform * upto[:, -1:]
    index = torch.searchsorted(upto, target, right=True).clamp(max=weights.shape[1] - 1)
    own = weights.gather(-1, index).double()
    return index, ((target - (upto.gather(-1, index) - own)) / own).clamp(0.0, 1.0 - 2**-53)


@contextmanager
def _nothing_shipped(model: PreTrainedModel) -> Iterator[None]:
    """Take the model's own generation settings away inside."""
    # What a configuration leaves unset, generate takes from the one that the model came with, and a
    # repetition penalty or a list of suppressed tokens from there makes the KL negative, without a
    # word.
    shipped, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = shipped


@contextmanager
def _contiguous_head(model: PreTrainedModel) -> Iterator[None]:
    """Give the language-model head whole rows inside."""
    # After the prompt it gets a slice, for which torch's CPU matmul in bf16 copies the head's
    # weight once for every row: 3.6 GB and a third of the time of a rollout of 64 prompts on
    # SmolLM2-135M.
    head: nn.Module = model.get_output_embeddings()  # type: ignore[assignment]
    hook = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def response_mask(
    response_ids: Int[Tensor, "B T"], eos_token_ids: Sequence[int]
) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, " B"]]:
    """Return a mask that is true up to and with each reply's first end-of-text token, and its end.

    The second result tells which replies have such a token. A pad token inside a reply is a token
    like any other: TRL 0.12-1.12 takes it for the reply's end.
    """
    is_eos = torch.isin(response_ids, torch.tensor(list(eos_token_ids), device=response_ids.device))
    ended_before = is_eos.cumsum(-1) - is_eos.long()
    return ended_before == 0, is_eos.any(-1)
