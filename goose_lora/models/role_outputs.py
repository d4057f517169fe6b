"""What is read of a model's last hidden states: log-probabilities, KL, and scalars of a head."""

import functools
import inspect
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from goose_lora.functional import last_counted, token_kl, token_logprobs
from goose_lora.functional.own_head import own_token_kl, own_token_logprobs
from goose_lora.models.trunk import patched_forward


class PolicyAndValue(NamedTuple):
    """What one forward of policy and critic gives per response token, in fp32: (B, T) each.

    ``ptx_loss`` is the policy's loss on pretraining text, in nats per token.
    """

    logprobs: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"] | None
    kl: Float[Tensor, "B T"] | None = None
    ptx_loss: Float[Tensor, ""] | None = None


def autocast(core: PreTrainedModel) -> torch.autocast:
    """Compute matrix products in the base's bf16 though adapters are fp32; fp32 bases as they are.

    Rollout and update alike run inside it.
    """
    # The head is never quantized: its dtype is the model's
    weight = output_head(core).weight
    enabled = weight.dtype in (torch.bfloat16, torch.float16)
    dtype = weight.dtype if enabled else torch.bfloat16
    return torch.autocast(weight.device.type, dtype=dtype, enabled=enabled)


def decode(
    core: PreTrainedModel, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"]
) -> Float[Tensor, "B L H"]:
    """Return the last hidden states. Padding may stand on either side."""
    # GPT-2's learned positions count padding unless told otherwise (TRL#6800). Models that take no
    # positions, such as BLOOM and Mamba, read them from the mask.
    positions: dict[str, Tensor] = {}
    if _takes_positions(type(core.base_model)):
        positions["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with autocast(core):
        output = core.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **positions,
        )
    return output.last_hidden_state


@functools.cache
def _takes_positions(kind: type[nn.Module]) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters


class _States:
    """What a model's body returns, of which its head reads the last states alone."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden
        self.asked = False

    def instead_of_body(self, *args: object, **kwargs: object) -> "_States":
        self.asked = True
        return self

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None  # no cache, no attentions, no router


def own_logits(core: PreTrainedModel, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
    """Return the logits that the model itself makes of last hidden states.

    Its forward runs with its body left out.

    Raises:
        RuntimeError: the forward does not call the body that transformers names.
    """
    # OPT's forward calls the decoder inside its body
    bodies = list({id(body): body for body in (core.base_model, core.get_decoder())}.values())
    states = _States(hidden[None].to(output_head(core).weight.dtype))
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    with patched_forward(bodies, [states.instead_of_body] * len(bodies)):
        logits = core(input_ids=ids, use_cache=False).logits[0]
    if not states.asked:
        raise RuntimeError("its head cannot be asked without its body")
    return logits


def response_logprobs(
    core: PreTrainedModel,
    hidden: Float[Tensor, "B L H"],
    input_ids: Int[Tensor, "B L"],
    response_mask: Bool[Tensor, "B T"],
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    own_head: bool = False,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Return log-probabilities of the last T tokens, and entropies (nats).

    Both are zero outside ``response_mask``; only positions inside it meet the LM head. With
    ``own_head`` the logits are those of ``own_logits``.
    """
    # Selected before the product: of a long prompt no position meets the head. The mask is read
    # from the device once, here.
    places = response_mask.nonzero(as_tuple=True)
    states = before_response(hidden, response_mask)[places]
    ids = input_ids[:, -response_mask.shape[1] :][places]
    if own_head:
        logprobs, entropies = own_token_logprobs(
            states,
            ids,
            functools.partial(own_logits, core),
            temperature=temperature,
            entropy_gradient=entropy_gradient,
        )
    else:
        head = output_head(core)
        logprobs, entropies = token_logprobs(
            states,
            ids,
            head.weight,
            head.bias,
            temperature=temperature,
            softcap=final_softcap(core),
            entropy_gradient=entropy_gradient,
        )
    shape = response_mask.shape
    return _spread(logprobs, places, shape), _spread(entropies, places, shape)


def response_kl(
    core: PreTrainedModel,
    hidden: Float[Tensor, "B T H"],
    ref_hidden: Float[Tensor, "B T H"],
    response_mask: Bool[Tensor, "B T"],
    *,
    temperature: float = 1.0,
    own_head: bool = False,
) -> Float[Tensor, "B T"]:
    """Return KL(policy || reference) of each next token over the whole vocabulary (nats).

    It is zero outside ``response_mask``, and its gradient goes to ``hidden``. ``own_head`` is that
    of ``response_logprobs``.
    """
    places = response_mask.nonzero(as_tuple=True)
    states, of_reference = hidden[places], ref_hidden[places]
    if own_head:
        kl = own_token_kl(states, of_reference, functools.partial(own_logits, core), temperature=temperature)
    else:
        head = output_head(core)
        kl = token_kl(
            states,
            of_reference,
            head.weight,
            head.bias,
            temperature=temperature,
            softcap=final_softcap(core),
        )
    return _spread(kl, places, response_mask.shape)


def head_output(head: nn.Linear, hidden: Float[Tensor, "*s H"], bias: float) -> Float[Tensor, "*s"]:
    """Return the scalar of each state under ``head``, less ``bias``, in fp32."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype)).squeeze(-1) - bias


def score_columns(
    attention_mask: Int[Tensor, "B L"], skip: Bool[Tensor, " B"] | None = None
) -> Int[Tensor, " B"]:
    """Return the column of each row's last counted token, or the one before it where ``skip``."""
    # Where RewardTrainer's model reads its score, whichever side is padded
    last = last_counted(attention_mask)
    return last if skip is None else last - skip.long()


def final_softcap(core: PreTrainedModel) -> float | None:
    """Return the bound that Gemma 2 and its kin put on logits; None where there is none."""
    return core.config.get_text_config().to_dict().get("final_logit_softcapping")


def columns_read(response_mask: Bool[Tensor, "B T"]) -> int:
    """Return how many last columns of hidden states heads read: the reply's, and one before."""
    return response_mask.shape[1] + 1


def before_response(
    hidden: Float[Tensor, "B L H"], response_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T H"]:
    """Return the states from which each of the last T tokens was chosen."""
    return hidden[:, -response_mask.shape[1] - 1 : -1]


def output_head(core: PreTrainedModel) -> nn.Linear:
    """Return the LM head of a causal language model."""
    return cast(nn.Linear, core.get_output_embeddings())


def _spread(
    numbers: Float[Tensor, " N"], places: tuple[Tensor, ...], shape: torch.Size
) -> Float[Tensor, "B T"]:
    """Put numbers in their places, and zeros elsewhere."""
    # Not x * mask: a NaN of a position outside would spread. Nor by the mask itself, which the
    # backward pass would read from the device again.
    return torch.zeros(shape, dtype=numbers.dtype, device=numbers.device).index_put(places, numbers)
