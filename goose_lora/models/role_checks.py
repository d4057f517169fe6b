"""Check on a few tokens, when roles are put on a base, that each role is the model it stands for.

Both sides of a later comparison could share a mistake. So here the other side is the model's own
forward, of one row without padding, through PEFT's modules.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.generation import GenerateDecoderOnlyOutput

from goose_lora.errors import UserError
from goose_lora.files import brief
from goose_lora.models import role_outputs
from goose_lora.models.roles import Role
from goose_lora.models.trunk import above, entering_last

logger = logging.getLogger(__name__)

TOKENS, PADDING = 7, 2
# One step from keys and values that are kept as they are tells all. A cache that sums up drifts: by
# 0.0005, 0.001 and 0.006 nats in three tokens of Zamba2
NEW_TOKENS, NEW_TOKENS_OF_SUMS = 2, 4
_KEPT_AS_THEY_ARE = ("DynamicLayer", "DynamicSlidingWindowLayer")
# Nats a token at most, besides the rounding of logits, of two sums taken in another order
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
ROUNDED = {torch.bfloat16: 0.1, torch.float16: 0.02}  # on average


# A protocol, since SharedBase calls these checks: to import it here would be a circle.
class RolesOnBase(Protocol):
    """What is asked of a ``SharedBase``, which imports this module."""

    own_head: bool
    reuse_layers: bool
    head_bias: dict[Role, float]
    trained_from: dict[Role, int]

    @property
    def core(self) -> PreTrainedModel: ...
    @property
    def layers(self) -> nn.ModuleList: ...
    def has(self, role: Role) -> bool: ...
    def role_parameters(self, role: Role) -> Iterator[tuple[str, nn.Parameter]]: ...
    def says_the_same(self, role: Role, other: Role) -> bool: ...
    def role(self, role: Role, *, generating: bool = False) -> AbstractContextManager[object]: ...
    def score_head(self, role: Role) -> nn.Linear: ...
    def spare_last_layer(self, on: bool) -> None: ...
    @property
    def reward_roles(self) -> tuple[Role, ...]: ...
    def read_scores(
        self, hidden: Tensor, attention_mask: Tensor, ended: Tensor | None = None, *, role: Role = "reward"
    ) -> Tensor: ...
    def trunks(
        self, input_ids: Tensor, attention_mask: Tensor, roles: Sequence[Role]
    ) -> Mapping[Role, Tensor | None]: ...
    def hidden(
        self,
        role: Role,
        input_ids: Tensor,
        attention_mask: Tensor,
        trunk: Tensor | None = None,
        columns: int | None = None,
    ) -> Tensor: ...
    def logprobs(self, hidden: Tensor, input_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]: ...


class OwnAnswer(NamedTuple):
    """What a model's own forward says of one row without padding."""

    ids: Int[Tensor, "1 N"]
    logits: Float[Tensor, "N V"]


def own_answer(core: PreTrainedModel) -> OwnAnswer:
    """Return what ``core`` says, as it is now, of a few tokens.

    Raises:
        UserError: it cannot be asked.
    """
    # Tokens from all over the vocabulary, and no padding among them
    weight = cast(nn.Embedding, core.get_input_embeddings()).weight
    words, device = len(weight), role_outputs.output_head(core).weight.device
    pad = core.config.get_text_config().pad_token_id
    ids = [(3 + index * (words // TOKENS + 1)) % words for index in range(TOKENS)]
    ids = [(token + 1) % words if token == pad else token for token in ids]
    row = torch.tensor([ids], device=device)
    with _of_the_model(core), torch.no_grad(), role_outputs.autocast(core):
        logits = core(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0]
    return OwnAnswer(row, logits.to(torch.promote_types(logits.dtype, torch.float32)))


def bare_answer(base: PreTrainedModel) -> OwnAnswer | None:
    """Return what a base says before any adapter comes; None if it has shapes and no numbers."""
    # Memory is planned on the meta device, where nothing can be compared.
    if role_outputs.output_head(base).weight.device.type == "meta":
        return None
    bare = own_answer(base)
    _require_finite(base, "the base", bare.logits, base.named_parameters())
    return bare


@torch.no_grad()
def check_against_model(shared: RolesOnBase, bare: OwnAnswer | None) -> None:
    """Compare each role with the model's own forward, and switch off what it cannot do exactly.

    Args:
        bare: ``bare_answer`` of the base; nothing is compared where it is None.

    Raises:
        UserError: a role is not the model that it stands for.
    """
    if bare is None:
        return
    # The head first: all log-probabilities go through it.
    core, allowed = shared.core, tolerance(bare.logits)
    _require_plain_head(shared)
    shared.own_head = needs_own_head(core)

    # The base, which no adapter may have touched, and roles that have log-probabilities.
    _compare(shared, "base", bare, allowed)
    own_of_policy = _compare_generated(shared, bare)
    with entering_last(shared.layers) as entered:
        hidden = _compare(shared, "policy", own_of_policy, allowed)
    # A copy of which no tensor differs has been compared with the policy.
    copies: tuple[Role, ...] = ("reference", "ema")
    for role in copies:
        if shared.has(role) and not shared.says_the_same(role, "policy"):
            with shared.role(role):
                own = own_answer(core)
            _require_finite(core, f"the role {role}", own.logits, shared.role_parameters(role))
            _compare(shared, role, own, allowed)
    for role in shared.reward_roles:
        _compare_scores(shared, role, bare)

    # Short cuts that are exact in most models, and can be left out.
    _probe_last_columns(shared, bare, hidden, entered)
    _probe_trunk(shared, bare)


def tolerance(logits: Float[Tensor, "N V"]) -> float:
    """Return the difference of log-probabilities that rounding explains, in nats."""
    # Logits arrive in fp32; how they were rounded is seen in their last bits
    for narrow, mean in ROUNDED.items():
        if (logits == logits.to(narrow)).all():
            return mean + 2 * torch.finfo(narrow).eps * logits.abs().max().item()
    return TOLERANCE.get(logits.dtype, ROUNDED[torch.bfloat16])


def _apart(differences: Tensor, allowed: float) -> float:
    """Return the largest difference, or their mean where logits are rounded."""
    sizes = differences.abs()
    return (sizes.max() if allowed in TOLERANCE.values() else sizes.mean()).item()


def needs_own_head(core: PreTrainedModel) -> bool:
    """Return whether logits are something else than product, bias and softcap of the head.

    Raises:
        UserError: the model's head cannot be asked without its body.
    """
    head = role_outputs.output_head(core)
    # Small and large states: a bound shows at large ones
    features = head.weight.shape[1]
    waves = torch.arange(3 * features, device=head.weight.device).reshape(3, features)
    sizes = torch.tensor([[0.1], [1.0], [10.0]], device=head.weight.device)
    states = ((waves * 0.7).sin() * sizes).to(head.weight.dtype)
    with _of_the_model(core), role_outputs.autocast(core):
        own = role_outputs.own_logits(core, states).float()
    ours = F.linear(states, head.weight, head.bias).float()
    if own.shape != ours.shape:
        return True
    softcap = role_outputs.final_softcap(core)
    if softcap:
        ours = softcap * (ours / softcap).tanh()
    # Of each size by itself: a product rounds in proportion
    rounding = 8 * torch.finfo(head.weight.dtype).eps * own.abs().amax(-1)
    return not bool(((own - ours).abs().amax(-1) <= rounding).all())


def _require_plain_head(shared: RolesOnBase) -> None:
    """Refuse an adapter on the head, which log-probabilities would leave out."""
    # PEFT wraps a head that an adapter changes, which then has modules of its own
    head = shared.core.get_output_embeddings()
    if isinstance(head, nn.Linear) and not any(True for _ in head.children()):
        return
    raise UserError(
        f"{type(shared.core).__name__}: the language-model head is a {type(head).__name__}, and roles share"
        " one plain linear head. Leave the head out of the adapters (target_modules, modules_to_save), or"
        " merge the adapter into the base first."
    )


def _compare(shared: RolesOnBase, role: Role, own: OwnAnswer, allowed: float) -> Tensor:
    """Compare a role's log-probabilities and entropies, of a padded row, with its own logits.

    Returns:
        The role's states of that row.
    """
    # Ours with padding, theirs without: positions are part of what is compared
    ids, mask = _padded(own.ids)
    counted = torch.ones_like(own.ids[:, 1:], dtype=torch.bool)
    with _of_the_model(shared.core):
        hidden = shared.hidden(role, ids, mask)
        logprobs, entropies = shared.logprobs(hidden, ids, counted)
    # Theirs, from whole logits
    log_p = own.logits[:-1].log_softmax(-1)
    wanted = log_p.gather(-1, own.ids[0, 1:, None]).squeeze(-1)
    of_entropy = entropies[0] + torch.linalg.vecdot(log_p.exp(), log_p)
    gap = max(_apart(logprobs[0] - wanted, allowed), _apart(of_entropy, allowed))
    what, wanted_of = f"the role {role}", "its own logits, without padding, are"
    if role == "base":
        what, wanted_of = "the base with its adapters off", "its own logits, without padding, were before"
    _refuse(shared.core, what, wanted_of, gap, allowed)
    return hidden


def _compare_generated(shared: RolesOnBase, bare: OwnAnswer) -> OwnAnswer:
    """Compare what the policy generates after padding, from its cache, with its own logits.

    Returns:
        The policy's own answer, of the row before what it generates.
    """
    core = shared.core
    with _of_the_model(core), shared.role("policy", generating=True), role_outputs.autocast(core):
        out = _greedy(core, bare.ids, NEW_TOKENS)
        layers = getattr(out.past_key_values, "layers", [])
        if not layers or any(type(layer).__name__ not in _KEPT_AS_THEY_ARE for layer in layers):
            out = _greedy(core, bare.ids, NEW_TOKENS_OF_SUMS)
        row = out.sequences[:, PADDING:]
        wanted = core(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0]
    _require_finite(core, "the role policy", wanted, shared.role_parameters("policy"))
    # One pass over the same tokens says what each step should have said
    assert out.logits is not None
    steps = torch.cat(out.logits).to(bare.logits.dtype)
    wanted = wanted.to(steps.dtype)
    of_steps = wanted[TOKENS - 1 : TOKENS - 1 + len(steps)]
    allowed = tolerance(bare.logits)
    gap = _apart(steps.log_softmax(-1) - of_steps.log_softmax(-1), allowed)
    _refuse(core, "what it generates from its cache", "its own logits are", gap, allowed)
    return OwnAnswer(bare.ids, wanted[:TOKENS])


def _greedy(core: PreTrainedModel, row: Int[Tensor, "1 N"], tokens: int) -> GenerateDecoderOnlyOutput:
    """Return what ``core`` generates after the row with padding, with the logits of each step."""
    ids, mask = _padded(row)
    greedy = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=int(ids[0, 0]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    out = core.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        generation_config=greedy,
    )
    return cast(GenerateDecoderOnlyOutput, out)


def _compare_scores(shared: RolesOnBase, role: Role, bare: OwnAnswer) -> None:
    """Compare a score with that of the sequence classifier that RewardTrainer trains."""
    core, head = shared.core, shared.score_head(role)
    kinds = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    kind = cast(type[PreTrainedModel] | None, kinds.get(type(core.config), None))
    if kind is None:
        raise UserError(
            f"{type(core).__name__}: transformers has no sequence classifier of this model, so no reward"
            " adapter can have been trained on it. Use reward_function."
        )
    # The classifier's forward, around the base's body and the role's head
    config = copy.deepcopy(core.config)
    config.num_labels = 1
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    with init_empty_weights():
        judge = kind(config)
    setattr(judge, judge.base_model_prefix, core.base_model)
    judge.score = _Head(head)
    ids, mask = _padded(bare.ids)
    with _of_the_model(core), shared.role(role), role_outputs.autocast(core):
        wanted = judge.eval()(input_ids=bare.ids, use_cache=False).logits.reshape(-1)
    _require_finite(core, f"the role {role}", wanted, shared.role_parameters(role))
    with _of_the_model(core):
        score = shared.read_scores(shared.hidden(role, ids, mask), mask, role=role) + shared.head_bias[role]
    gap = (score - wanted).abs().max().item()
    size = max(1.0, wanted.abs().max().item())
    _refuse(core, "the score", "that of its sequence classifier is", gap, tolerance(bare.logits) * size)


class _Head(nn.Module):
    """The score head in fp32, as it is everywhere here."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.inner = head

    def forward(self, hidden: Tensor) -> Tensor:
        return role_outputs.head_output(self.inner, hidden, 0.0)[..., None]


def _probe_last_columns(
    shared: RolesOnBase, bare: OwnAnswer, hidden: Tensor, entered: Sequence[object]
) -> None:
    """Let the last layer compute all columns where leaving some out changes the others.

    ``hidden`` are the policy's states of the padded row, all columns computed, and ``entered`` what
    the last layer was given then.
    """
    ids, mask = _padded(bare.ids)
    columns = TOKENS // 2
    whole = hidden[:, -columns:]

    def gap() -> float:
        try:
            return _relative(shared.hidden("policy", ids, mask, None, columns)[:, -columns:], whole)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            _pass_on_memory(error)
            return float("inf")

    # The last layer alone tells, where nothing of it is a part of others too, and a pass can begin
    # at it; else a whole pass does.
    *lower, last = shared.layers
    parts = {id(module) for layer in lower for module in layer.modules()}
    states = entered[0] if len(entered) == 1 else None
    alone = lower and not any(id(module) in parts for module in last.modules())
    if alone and isinstance(states, Tensor) and states.dim() == 3:
        with above(shared.layers, len(lower), states):
            if gap() <= _same(whole):
                return
    if not gap() <= _same(whole):
        shared.spare_last_layer(False)
        logger.info("%s: its last layer computes all columns.", type(shared.core).__name__)


def _probe_trunk(shared: RolesOnBase, bare: OwnAnswer) -> None:
    """Run whole passes where one that is resumed from a trunk gives other states."""
    if not any(shared.trained_from.values()):
        return
    ids, mask = _padded(bare.ids)
    # Every role resumes from the trunk that it would be given in a rollout
    roles: tuple[Role, ...] = ("policy", "value", *shared.reward_roles, "reference", "ema", "base")
    present: list[Role] = [role for role in roles if role in ("reference", "base") or shared.has(role)]
    worst = 0.0
    try:
        for role, trunk in shared.trunks(ids, mask, present).items():
            if trunk is not None:
                _require_tensor(trunk)
                whole = shared.hidden(role, ids, mask)[mask.bool()]
                gap = _relative(shared.hidden(role, ids, mask, trunk)[mask.bool()], whole)
                worst = max(worst, gap / _same(whole)) if gap == gap else float("inf")
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        _pass_on_memory(error)
        worst = float("inf")
    if worst > 1:
        shared.reuse_layers = False
        logger.warning(
            "%s: passes cannot be resumed in the middle of this model, so the layers below what trains run"
            " each time: slower, and as exact.",
            type(shared.core).__name__,
        )


def _require_finite(
    core: PreTrainedModel, who: str, outputs: Tensor, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Refuse outputs that are no numbers, with the name of the first tensor that has none."""
    if outputs.isfinite().all():
        return
    # Packed weights are whole numbers, and always finite
    broken = first_not_finite(tensors)
    where = f"{broken} has numbers that are not finite. Load or save it again."
    if broken is None:
        where = f"its own tensors are. Use a wider dtype than {core.dtype}, or another base."
    raise UserError(f"{type(core).__name__}: what {who} says is not finite: {where}")


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first of ``tensors`` that holds NaN or an infinity, if one does."""
    return next((name for name, tensor in tensors if not tensor.isfinite().all()), None)


def _require_tensor(trunk: object) -> None:
    """Raise TypeError where a layer gives a tuple, of which only states could be kept."""
    if not isinstance(trunk, Tensor) or trunk.dim() != 3:
        raise TypeError(f"a layer gives {type(trunk).__name__}")


def _padded(ids: Int[Tensor, "1 N"]) -> tuple[Int[Tensor, "1 L"], Int[Tensor, "1 L"]]:
    """Return the row with padding on the left, and its mask."""
    mask = F.pad(torch.ones_like(ids), (PADDING, 0))
    return F.pad(ids, (PADDING, 0), value=int(ids[0, 0])), mask


def _relative(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-9)).item()


def _same(states: Tensor) -> float:
    """Return the relative difference that another order of sums explains."""
    narrow = {torch.bfloat16: 0.05, torch.float16: 0.01}
    return narrow.get(states.dtype, 1000 * torch.finfo(states.dtype).eps)


def _refuse(core: PreTrainedModel, what: str, wanted: str, gap: float, allowed: float) -> None:
    if not gap <= allowed:
        raise UserError(
            f"{type(core).__name__}: {what} is not what {wanted}: {gap:.3g} apart on a few tokens (allowed"
            f" {allowed:.2g}). Training it here would train another model. Use another base, or adapters of"
            " plain LoRA."
        )


def _pass_on_memory(error: Exception) -> None:
    if isinstance(error, torch.OutOfMemoryError):
        raise error


@contextmanager
def _of_the_model(core: PreTrainedModel) -> Iterator[None]:
    """Name the model where its code cannot do what is asked of it."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        # Want of memory says nothing of the model
        if isinstance(error, (UserError, torch.OutOfMemoryError)):
            raise
        raise UserError(
            f"{type(core).__name__}: its forward cannot be asked for log-probabilities of a row"
            f" ({type(error).__name__}: {brief(error)}). Use another base."
        ) from error
