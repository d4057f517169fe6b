"""Bytes that one pass through the base takes: what a forward keeps, and its widest point.

docs/memory.md has the list of tensors that a forward keeps for the backward pass.
"""

from dataclasses import dataclass

from goose_lora.functional import CHUNK_TOKENS
from goose_lora.models.trunk import BY_POSITION
from goose_lora.planning.shapes import FP32, AdapterShape, LinearShape, ModelShape
from goose_lora.ppo.config import PPOConfig


@dataclass(frozen=True)
class PassCosts:
    """Bytes of passes through the base ``model`` under the settings of a run."""

    model: ModelShape
    config: PPOConfig

    def kept_by_layer(self, adapter: AdapterShape, layer: int, length: int, read: float = 1.0) -> int:
        """Return the bytes a token that one layer keeps for its backward pass.

        Args:
            adapter: the one that is active.
            layer: index of the layer.
            length: tokens of a row.
            read: share of a row's positions that the heads read. In the last layer, the modules of
                ``BY_POSITION`` see these positions alone.
        """
        model, number = self.model, self.model.compute
        linears = [linear for linear in model.linears if linear.layer == layer]
        spared = []
        if read < 1 and layer == model.layers - 1:
            spared = [linear for linear in linears if set(linear.name.split(".")) & set(BY_POSITION)]
        full = [linear for linear in linears if linear not in spared]
        inputs = self._inputs(adapter, linears, full) + read * self._inputs(adapter, linears, spared)

        # The feed-forward part keeps the outputs of all its linears but the last, and the product
        # of gate and up where it is gated.
        feed_forward = [linear for linear in linears if not linear.in_attention]
        inner: float = sum(linear.outputs for linear in feed_forward[:-1])
        if inner >= 2 * model.wide:
            inner += model.wide
        if feed_forward and feed_forward[0] in spared:
            inner *= read

        # Experts keep the same of each token that they read, and the token and their answer to it.
        if layer in model.layers_of_experts:
            inner += model.experts_of_token * (model.expert_features + 2 * model.hidden)

        # Attention keeps queries, keys, values and its output, fp32 statistics of each head, and a
        # row of the mask; where it is not fused, the probabilities of each head twice.
        attention = 4 * model.queries * number + FP32 * model.heads
        if model.fused_attention:
            attention += length * number
        else:
            attention += length * model.heads * (FP32 + number)
        return int(FP32 * model.norms + number * (inputs + inner) + attention)

    def _inputs(self, adapter: AdapterShape, linears: list[LinearShape], part: list[LinearShape]) -> int:
        """Return the numbers a token that adapted linears keep of inputs and LoRA's inner states.

        Args:
            linears: all linears of one layer.
            part: those of them that are counted.
        """
        adapted = [linear for linear in part if linear.name in adapter.ranks]
        inner = sum(adapter.ranks[linear.name] for linear in adapted)

        # Casting makes a copy of the input for each linear; otherwise all that read one tensor keep
        # that tensor.
        if self.model.casts:
            return sum(linear.inputs for linear in adapted) + inner
        groups = _by_input(linears)
        return inner + sum(
            max((linear.inputs for linear in group if linear in adapted), default=0) for group in groups
        )

    def kept(self, adapter: AdapterShape, rows: int, length: int, read: float = 1.0) -> int:
        """Return the bytes that a forward of ``rows`` rows keeps until the backward pass.

        They are those of all layers, or with checkpointing of the layers' inputs.
        """
        layers = range(adapter.trained_from, self.model.layers)
        if self.config.gradient_checkpointing:
            return rows * length * self.model.hidden * self.model.compute * len(layers)
        by_token = sum(self.kept_by_layer(adapter, layer, length, read) for layer in layers)
        return rows * length * by_token + self.cast(adapter)

    def kept_again(self, adapter: AdapterShape, rows: int, length: int) -> int:
        """Return the bytes that checkpointing's recompute of one layer keeps; 0 without it."""
        if not self.config.gradient_checkpointing:
            return 0
        layers = range(adapter.trained_from, self.model.layers)
        return rows * length * max(self.kept_by_layer(adapter, layer, length) for layer in layers)

    def cast(self, adapter: AdapterShape) -> int:
        """Return the bytes of an adapter's copies in the base's dtype.

        Autocast keeps them during a forward.
        """
        return adapter.parameters * self.model.compute if self.model.compute < FP32 else 0

    def forward(self, rows: int, tokens: int, adapter: AdapterShape | None) -> int:
        """Return the bytes that a forward without gradients takes at its widest point.

        It is inside the feed-forward part of one layer, or in its attention. ``adapter`` is None
        where the weights are merged.
        """
        # In the feed-forward part three tensors of its width and three of the hidden size are there
        # at a time. An adapter that is not merged adds its output, and its copy of the input.
        model = self.model
        feed_forward = model.compute * (3 * model.wide + 3 * model.hidden)
        copies = 0
        if adapter is not None:
            feed_forward += model.compute * model.wide
            copies = self.cast(adapter)
            if model.casts:
                feed_forward += FP32 * model.hidden

        # In the attention, queries, output, and keys and values repeated for all heads. The mask is
        # there as bools and as numbers.
        attention = model.compute * (5 * model.queries + 2 * model.hidden)
        mask = tokens * (1 + model.compute)
        return rows * tokens * (max(feed_forward, attention) + mask) + model.largest_weight + copies

    def backward(self, rows: int, length: int) -> int:
        """Return the bytes of gradients at the widest point of a layer's backward pass.

        There, gate and up have theirs, and their product, which the forward kept, is gone.
        """
        model = self.model
        return rows * length * model.compute * (model.wide + 2 * model.hidden) + model.largest_weight

    def head(self, tokens: int, *, training: bool) -> int:
        """Return the bytes of the language-model head over one chunk of response tokens.

        Its tables are (tokens, vocabulary), in fp32.
        """
        # Three tables are there at a time, five where the entropy has a gradient. An exact KL also
        # has the reference's, and between chunks those that wait for the backward pass.
        config = self.config
        tables = 3
        if training and config.entropy_coef > 0:
            tables = 5
        if config.kl_estimator == "exact" and (not training or config.kl_location == "loss"):
            in_chunks = tokens > CHUNK_TOKENS
            tables = max(tables, 6 if in_chunks else 4)
        return FP32 * tables * min(CHUNK_TOKENS, tokens) * self.model.vocabulary


def _by_input(linears: list[LinearShape]) -> list[list[LinearShape]]:
    """Return the linears of a layer in groups that read one tensor.

    All but the last of a module read the module's input. The last of the attention reads the
    attention's output, which is counted with the attention.
    """
    groups = []
    for parent in dict.fromkeys(linear.parent for linear in linears):
        *readers, last = [linear for linear in linears if linear.parent == parent]
        groups.append(readers)
        if not last.in_attention:
            groups.append([last])
    return groups
