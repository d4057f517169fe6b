"""Log-probabilities of tokens from hidden states, without logits of all tokens at a time.

The language-model head is frozen, so the gradient of one token's log-probability with respect to
its hidden state,

    d log p(y | h) / dh = (W_y - sum_v p_v W_v) / temperature,

is a vector of the hidden size that does not depend on the rest of the loss. It is computed beside
the log-probability, chunk by chunk, and kept in place of the logits: the two matrix products of a
plain forward and backward, but H numbers a token instead of V.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from goose_lora.functional.masked import _upcast

# Tokens whose logits are in memory at a time: 256 x 150,000 words in fp32 are 150 MB.
CHUNK_TOKENS = 256


def entropy(logits: Float[Tensor, "*shape V"]) -> Float[Tensor, "*shape"]:
    """Return the entropy of the next token, -sum_v p_v log p_v, in nats.

    logsumexp(x) - sum_v p_v x_v in TRL, OpenAI and CleanRL is the same, but NaN where a logit is
    -inf, and TRL computes it in the model's dtype. TRL's "objective/entropy" is the sum of
    -logprobs instead, a sample of the sequence's entropy. Raises nothing.
    """
    log_p = _upcast(logits).log_softmax(-1)
    # Where p is 0 the term is 0, and not 0 times infinity.
    p = log_p.exp()
    return -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)


def gather_logprobs(
    logits: Float[Tensor, "*shape V"], ids: Int[Tensor, "*shape"], *, temperature: float = 1.0
) -> Float[Tensor, "*shape"]:
    """Return log softmax(logits / temperature) at ``ids``, in nats.

    That is the log-probability under the distribution that was sampled from. ``ids`` in padding
    must be valid tokens too (not -100). TRL and CleanRL's summarize/ppo.py divide by temperature +
    1e-7, and in the model's dtype, of which bf16 has three digits; OpenAI has no epsilon either.
    Raises ValueError unless the temperature is positive.
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature} gives no distribution. Use a positive one; 1.0 is the model's own."
        )
    return (_upcast(logits) / temperature).log_softmax(-1).gather(-1, ids.long().unsqueeze(-1)).squeeze(-1)


def token_logprobs(
    hidden: Float[Tensor, "N H"],
    ids: Int[Tensor, " N"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy_gradient: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return the log-probability of ``ids`` and the entropy of the distribution, in nats and fp32.

    The distribution is softmax(softcap(hidden W' + bias) / temperature). Equals log_softmax of the
    full logits and its gather (TRL, lm-human-preferences and CleanRL hold those logits).
    ``softcap`` is Gemma 2's bound on logits, c * tanh(x / c) (arXiv:2408.00118, section 2).
    Gradients reach ``hidden`` alone; through the entropy only with ``entropy_gradient``, which
    costs a third matrix product.

    Raises:
        ValueError: the head is trainable, where its gradient would silently be lost, or the
            temperature is not positive.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "token_logprobs: the language-model head is trainable, and would get no gradient. Freeze it:"
            " heads stay in the base."
        )
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature}: must be positive; for greedy replies sample with do_sample=False"
            " instead"
        )
    # autograd.Function takes no keywords.
    return _FrozenHead.apply(hidden, weight, bias, ids, temperature, softcap, entropy_gradient, chunk_tokens)


def token_kl(
    hidden: Float[Tensor, "N H"],
    ref_hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Float[Tensor, " N"]:
    """Return KL(policy || reference) of the next token from hidden states, in nats and fp32.

    sum_v p_v (log p_v - log q_v): exact where k1, k2 and k3 are samples. Gradients reach ``hidden``
    alone: d KL / d logit_v = p_v (log p_v - log q_v - KL), taken beside the value like that of
    ``token_logprobs``.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    return _FrozenHeadKL.apply(hidden, ref_hidden.detach(), weight, bias, temperature, softcap, chunk_tokens)


# Both functions compute the gradient in the forward pass, so that a chunk's logits can be dropped,
# and their backward pass is a product of that gradient with the incoming one.


class _FrozenHeadKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, ref_hidden, weight, bias, temperature, softcap, chunk_tokens):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        kl = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        slope = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, len(hidden), chunk_tokens):
            # Only this chunk's logits are there, of the policy and of the reference.
            rows = slice(start, start + chunk_tokens)
            (log_p, bend), (log_q, _) = (
                _log_softmax(states[rows], weight, bias, temperature, softcap, wide)
                for states in (hidden, ref_hidden)
            )
            p = log_p.exp()
            difference = log_p.sub_(log_q)
            kl[rows] = torch.linalg.vecdot(p, difference)

            # d KL / d logit_v = p_v (log p_v - log q_v - KL), written over p.
            if slope is not None:
                of_logits = p.mul_(difference.sub_(kl[rows, None]))
                slope[rows] = _at_hidden(of_logits, bend, weight, temperature, hidden.dtype)
        ctx.save_for_backward(slope)
        return kl

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad[:, None].to(slope.dtype) * slope, *[None] * 6


def _log_softmax(hidden, weight, bias, temperature, softcap, wide):
    logits = F.linear(hidden.to(weight.dtype), weight, bias).to(wide)
    bend = _soften(logits, softcap)
    return logits.div_(temperature).log_softmax(-1), bend


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, temperature, softcap, entropy_gradient, chunk_tokens):
        ctx.set_materialize_grads(False)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        of_logprob = torch.empty_like(hidden) if hidden.requires_grad else None
        of_entropy = torch.empty_like(hidden) if hidden.requires_grad and entropy_gradient else None
        # Two buffers for all chunks, written in place: fresh ones of this size cost a CPU more in
        # page faults than in arithmetic.
        size = (min(chunk_tokens, len(hidden)), len(weight))
        buffers = torch.empty(2, *size, dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chosen = ids[rows, None]
            x, p = buffers[:, : len(chosen)]
            x.copy_(F.linear(hidden[rows].to(weight.dtype), weight, bias))
            bend = _soften(x, softcap)

            # Softmax by hand, in place: x becomes the logits less their largest, p probabilities.
            x.div_(temperature).sub_(x.amax(-1, keepdim=True))
            torch.exp(x, out=p)
            total = p.sum(-1)
            p.div_(total[:, None])
            logprobs[rows] = x.gather(-1, chosen).squeeze(-1) - total.log()
            entropies[rows] = total.log() - torch.linalg.vecdot(p, x)

            # Slopes by the logits: -p_v (log p_v + entropy) of the entropy, one-hot - p of the
            # log-probability. The second is written over p and so comes last.
            if of_entropy is not None:
                log_p = x.sub_(total.log()[:, None])
                by_logits = -p * (log_p + entropies[rows, None])
                of_entropy[rows] = _at_hidden(by_logits, bend, weight, temperature, hidden.dtype)
            if of_logprob is not None:
                one_hot_minus_p = p.neg_().scatter_add_(-1, chosen, torch.ones_like(p[:, :1]))
                of_logprob[rows] = _at_hidden(one_hot_minus_p, bend, weight, temperature, hidden.dtype)
        ctx.save_for_backward(of_logprob, of_entropy)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies):
        # Either gradient is None where the loss does not use that output.
        of_logprob, of_entropy = ctx.saved_tensors
        grad = torch.zeros_like(of_logprob)
        if grad_logprobs is not None:
            grad = grad + grad_logprobs[:, None].to(grad.dtype) * of_logprob
        if grad_entropies is not None and of_entropy is not None:
            grad = grad + grad_entropies[:, None].to(grad.dtype) * of_entropy
        return grad, *[None] * 7


def _soften(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Bound ``logits`` in place to softcap * tanh(logits / softcap); return the slope of that.

    Without a softcap, nothing is bounded and there is no slope.
    """
    if not softcap:
        return None
    # d/dx of c * tanh(x / c) is 1 - tanh^2(x / c).
    tanh = logits.div_(softcap).tanh_()
    bend = 1 - tanh.square()
    logits.mul_(softcap)
    return bend


def _at_hidden(
    by_logits: Tensor, bend: Tensor | None, weight: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """Return the slope by hidden states of a slope by softened logits, which is overwritten."""
    if bend is not None:
        by_logits = by_logits.mul_(bend)
    return (by_logits.to(weight.dtype) @ weight).to(dtype) / temperature
