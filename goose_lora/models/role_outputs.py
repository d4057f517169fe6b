"""The four models that one base is: hidden states, log-probabilities, values and scores under each
role, and one forward for the update."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from goose_lora.functional import last_counted, token_kl, token_logprobs
from goose_lora.models.roles import ADAPTERS, Role
from goose_lora.models.trunk import above, below, captured_depth, decoder_layers, reading, same_below


class PolicyAndValue(NamedTuple):
    """What one forward of policy and critic gives for each response token, in fp32: (B, T) each;
    and the policy's loss on pretraining text."""

    logprobs: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"] | None
    kl: Float[Tensor, "B T"] | None = None
    ptx_loss: Float[Tensor, ""] | None = None


class Views:
    """What ``SharedBase`` computes. It brings the roles."""

    critic: Any
    reads_eos: bool
    offsets: dict[Role, float]
    trained_from: dict[Role, int]
    get_base_model: Any
    role: Any
    has: Any
    value_states: Any
    _columns: int | None = None

    @property
    def layers(self) -> nn.ModuleList:
        return decoder_layers(self.get_base_model())

    def trunk_depth(self, role: Role = "policy") -> int:
        """How many of the lowest layers ``role`` has in common with a role that trains, unchanged
        while that one does; 0 if none."""
        leader = role if role in self.trained_from else self._leader(role)
        return 0 if leader is None else self.trained_from[leader]

    def kept_trunks(self) -> int:
        """How many trunks of a rollout the update needs: policy and critic may have one
        together."""
        roles: list[Role] = ["policy", "value"] if self.critic == "adapter" else ["policy"]
        return len({self._leader(role) for role in roles} - {None})

    def capture_depth(self, *, merged: bool) -> int:
        """How many of the lowest layers may be noted while the policy generates: those of its
        trunk, unless merging changes their weights."""
        depth = self.trunk_depth("policy")
        adapted = merged and not same_below(self, self.layers, depth, ADAPTERS["policy"], None)
        return captured_depth(depth, merged=merged, adapted_below=adapted)

    def _leader(self, role: Role) -> Role | None:
        """The role that trains whose trunk serves ``role``: itself, the policy, or the critic."""
        depth = self.trained_from.get(role)
        for other, common in self.trained_from.items():
            if (
                depth in (None, common)
                and common > 0
                and same_below(self, self.layers, common, *map(self._adapter, (role, other)))
            ):
                return other
        return role if depth else None

    def _adapter(self, role: Role) -> str | None:
        """PEFT's name of the adapter whose states ``role`` has; None for the bare base."""
        role = self.value_states if role == "value" else role
        return ADAPTERS[role] if self.has(role) else None

    @torch.no_grad()
    def trunks(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        roles: Sequence[Role],
        captured: Float[Tensor, "B L H"] | None = None,
    ) -> dict[Role, Tensor | None]:
        """For each of ``roles`` the output (B, L, H) of the layers below what trains; one tensor
        for all that share it, None without any.

        ``captured``: the policy's, where it was noted while generating.
        """
        leaders: dict[Role, Role | None] = {role: self._leader(role) for role in roles}
        outputs: dict[Role | None, Tensor | None] = {None: None}
        if captured is not None:
            outputs["policy"] = captured
        for leader in self.trained_from:
            if leader in leaders.values() and leader not in outputs:
                with self.role(leader) as core, below(self.layers, self.trained_from[leader]) as output:
                    self._decode(core, input_ids, attention_mask)
                outputs[leader] = output[0]
        return {role: outputs[leader] for role, leader in leaders.items()}

    def hidden(
        self,
        role: Role,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        trunk: Float[Tensor, "B L H"] | None = None,
        columns: int | None = None,
    ) -> Float[Tensor, "B L H"]:
        """Last hidden states under ``role``, resumed from ``trunk`` if given. Padding may stand on
        either side.

        ``columns``: how many of the last columns are read, all if None; the others' states are then
        worthless, and the last layer mostly spared them.
        """
        resumed = nullcontext() if trunk is None else above(self.layers, self.trunk_depth(role), trunk)
        with self.role(role) as core, resumed, self.reading(columns):
            return self._decode(core, input_ids, attention_mask)

    @contextmanager
    def reading(self, columns: int | None) -> Iterator[None]:
        """Inside, only the last ``columns`` columns of hidden states are read. A recompute of
        checkpointing enters it again."""
        before, self._columns = self._columns, columns
        try:
            with reading(self.layers[-1], columns):
                yield
        finally:
            self._columns = before

    def _decode(self, core: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # GPT-2's learned positions count padding unless told otherwise (TRL#6800).
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        decoder = getattr(core, core.base_model_prefix)
        with self.autocast():
            output = decoder(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )
        return output.last_hidden_state

    def autocast(self) -> Any:
        """bf16 matrix products with fp32 adapters, for rollout and update alike; nothing for an
        fp32 base."""
        core: Any = self.get_base_model()
        weight = core.get_output_embeddings().weight
        enabled = weight.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(
            weight.device.type, dtype=weight.dtype if enabled else torch.bfloat16, enabled=enabled
        )

    def score_head(self, role: Role) -> nn.Linear:
        """The linear head of ``value`` or ``reward``: (1, H), fp32, without bias."""
        core: Any = self.get_base_model()
        return core.score.modules_to_save[ADAPTERS[role]]

    def apply_head(self, role: Role, hidden: Float[Tensor, "*s H"]) -> Float[Tensor, "*s"]:
        """Scalar of each state under the role's head, less the role's offset, in fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            head = self.score_head(role)
            return head(hidden.to(head.weight.dtype)).squeeze(-1) - self.offsets[role]

    def logprobs(
        self,
        hidden: Float[Tensor, "B L H"],
        input_ids: Int[Tensor, "B L"],
        response_mask: Bool[Tensor, "B T"],
        *,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Log-probabilities of the last T tokens and entropies (nats), zero outside
        ``response_mask``; only masked positions meet the head."""
        core: Any = self.get_base_model()
        head, tokens = core.get_output_embeddings(), response_mask.shape[1]
        logprobs, entropies = token_logprobs(
            before_response(hidden, response_mask)[response_mask],
            input_ids[:, -tokens:][response_mask],
            head.weight,
            head.bias,
            temperature=temperature,
            softcap=self._final_softcap,
            entropy_gradient=entropy_gradient,
        )
        zeros = torch.zeros(response_mask.shape, dtype=logprobs.dtype, device=logprobs.device)
        return zeros.masked_scatter(response_mask, logprobs), zeros.masked_scatter(response_mask, entropies)

    def exact_kl(
        self,
        hidden: Float[Tensor, "B T H"],
        ref_hidden: Float[Tensor, "B T H"],
        response_mask: Bool[Tensor, "B T"],
        *,
        temperature: float = 1.0,
    ) -> Float[Tensor, "B T"]:
        """KL(policy || reference) of each next token over the whole vocabulary (nats), zero outside
        ``response_mask``; gradient to ``hidden``."""
        core: Any = self.get_base_model()
        head = core.get_output_embeddings()
        kl = token_kl(
            hidden[response_mask],
            ref_hidden[response_mask],
            head.weight,
            head.bias,
            temperature=temperature,
            softcap=self._final_softcap,
        )
        return torch.zeros(response_mask.shape, dtype=kl.dtype, device=kl.device).masked_scatter(
            response_mask, kl
        )

    @property
    def _final_softcap(self) -> float | None:
        core: Any = self.get_base_model()
        return core.config.get_text_config().to_dict().get("final_logit_softcapping")

    def values(
        self, hidden: Float[Tensor, "B L H"], response_mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """V of the state before each of the last T tokens, zero outside ``response_mask``."""
        values = self.apply_head("value", before_response(hidden, response_mask))
        return torch.where(response_mask, values, 0.0)

    def scores(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        trunk: Float[Tensor, "B L H"] | None = None,
        ended: Bool[Tensor, " B"] | None = None,
    ) -> Float[Tensor, " B"]:
        """The reward model's score of each row, read at its last counted token: what the SEQ_CLS
        model of RewardTrainer gives, less the ``reward_bias`` beside the adapter (the mean raw
        score of references, which so have 0: Ouyang et al. 2022, arXiv:2203.02155, 3.5).

        ``ended`` tells which rows close with an end-of-text token; a reward model that was trained
        without it reads the token before.
        """
        return self.read_scores(
            self.hidden("reward", input_ids, attention_mask, trunk), attention_mask, ended
        )

    def read_scores(
        self,
        hidden: Float[Tensor, "B L H"],
        attention_mask: Int[Tensor, "B L"],
        ended: Bool[Tensor, " B"] | None = None,
    ) -> Float[Tensor, " B"]:
        """``scores``, given the hidden states under ``reward``."""
        last = last_counted(attention_mask)
        if ended is not None and not self.reads_eos:
            last = last - ended.long()
        return self.apply_head("reward", hidden[torch.arange(len(last), device=last.device), last])

    def forward(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        response_mask: Bool[Tensor, "B T"],
        trunk: Float[Tensor, "B L H"] | None = None,
        value_trunk: Float[Tensor, "B L H"] | None = None,
        features: Float[Tensor, "B T H"] | None = None,
        ref_hidden: Float[Tensor, "B T H"] | None = None,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
        ptx: tuple[Int[Tensor, "P N"], Int[Tensor, "P N"]] | None = None,
    ) -> PolicyAndValue:
        """Policy and critic in one call, which is what DistributedDataParallel must see: one
        forward, then one backward.

        ``trunk``: the policy's from ``trunks``; ``value_trunk``: the critic's, where it is another.
        ``features``: the reward adapter's states before each response token, for a critic on
        ``reward_features``; computed where not given. ``ref_hidden``: the reference's states before
        each response token, for the exact KL to it. ``ptx``: pretraining texts and their attention
        mask; their mean negative log-likelihood a token is PPO-ptx's term.
        """
        ptx_loss = None if ptx is None else self.negative_log_likelihood(*ptx)
        read = columns_read(response_mask)
        hidden = self.hidden("policy", input_ids, attention_mask, trunk, read)
        logprobs, entropy = self.logprobs(
            hidden, input_ids, response_mask, temperature=temperature, entropy_gradient=entropy_gradient
        )
        kl = (
            None
            if ref_hidden is None
            else self.exact_kl(
                before_response(hidden, response_mask), ref_hidden, response_mask, temperature=temperature
            )
        )
        if self.critic is None:
            values = None
        elif features is not None:
            values = torch.where(response_mask, self.apply_head("value", features), 0.0)
        else:
            below = trunk if value_trunk is None else value_trunk
            states = (
                hidden
                if self.critic == "shared"
                else self.hidden("value", input_ids, attention_mask, below, read)
            )
            values = self.values(states, response_mask)
        return PolicyAndValue(logprobs, entropy, values, kl, ptx_loss)

    def negative_log_likelihood(
        self, input_ids: Int[Tensor, "P N"], attention_mask: Int[Tensor, "P N"]
    ) -> Float[Tensor, ""]:
        """Of whole texts under the policy: nats a token, the first token of each left out. Only the
        policy gets a gradient."""
        predicted = (attention_mask[:, 1:] & attention_mask[:, :-1]).bool()
        logprobs, _ = self.logprobs(self.hidden("policy", input_ids, attention_mask), input_ids, predicted)
        return -logprobs.sum() / predicted.sum()


def columns_read(response_mask: Bool[Tensor, "B T"]) -> int:
    """How many of the last columns of hidden states the heads read of a rollout: those of the
    reply, and the one before."""
    return response_mask.shape[1] + 1


def before_response(
    hidden: Float[Tensor, "B L H"], response_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T H"]:
    """States from which each of the last T tokens was chosen."""
    return hidden[:, -response_mask.shape[1] - 1 : -1]
