"""FLOPs of one step counted by hand, in matrix products alone.

They are the limit that a design has, for any model, length and batch. A multiplication with an
addition is 2 FLOPs. Attention's products of length by length are left out, as ``torch``'s counter
leaves out the fused kernel on a CPU. A forward through a frozen matrix with LoRA costs the matrix
and both factors; the backward pass of a frozen matrix is one product (the gradient of its input),
of a factor two; the lowest layer that trains needs no gradient of its input.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Features of a Llama-like decoder."""

    hidden: int
    intermediate: int
    layers: int
    queries: int
    keys: int
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the matrices of one layer."""
        attention = [
            (self.hidden, self.queries),
            (self.hidden, self.keys),
            (self.hidden, self.keys),
            (self.queries, self.hidden),
        ]
        return [
            *attention,
            (self.hidden, self.intermediate),
            (self.hidden, self.intermediate),
            (self.intermediate, self.hidden),
        ]

    @property
    def by_position(self) -> list[tuple[int, int]]:
        """The linears that the last layer runs only where its states are read."""
        # All but keys and values.
        return [matrix for index, matrix in enumerate(self.linears) if index not in (1, 2)]

    @property
    def layer(self) -> int:
        """FLOPs of one token through one layer without adapters."""
        return 2 * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def head(self) -> int:
        return 2 * self.hidden * self.vocabulary

    def lora(self, rank: int) -> int:
        return 2 * rank * sum(inputs + outputs for inputs, outputs in self.linears)


SHAPES = {
    "135M": Shape(576, 1536, 30, 576, 192, 49152),
    "0.5B": Shape(896, 4864, 24, 896, 128, 151936),
    "1.7B": Shape(2048, 6144, 28, 2048, 1024, 151936),
    "8B": Shape(4096, 14336, 32, 4096, 1024, 128256),
}


@dataclass(frozen=True)
class Work:
    """One step: replies, tokens of prompt and reply, epochs, rank of LoRA."""

    batch: int = 16
    prompt: int = 32
    response: int = 32
    epochs: int = 4
    rank: int = 16

    @property
    def tokens(self) -> int:
        return self.batch * (self.prompt + self.response)

    @property
    def replies(self) -> int:
        return self.batch * self.response


def goose(shape: Shape, work: Work, *, layers: int, critic: str | None) -> dict[str, int]:
    """Count this project's PPO with adapters in the ``layers`` uppermost layers.

    ``critic`` is as in PPOConfig, None for RLOO and GRPO with a reward adapter.

    One minibatch: the update's first forward is the one that scoring makes, as in every rollout but
    a run's first. Generation is by the merged copy, without adapters; the trunk is noted on the
    way, with one more step of its layers for the last tokens.
    """
    lora, upper = shape.lora(work.rank), layers * shape.layer
    # Positions that the last layer's matrices are spared, but for keys and values
    unread = work.batch * (work.prompt - 1)
    spared = unread * 2 * sum(inputs * outputs for inputs, outputs in shape.by_position)
    spared_lora = unread * 2 * work.rank * sum(inputs + outputs for inputs, outputs in shape.by_position)
    bare = upper * work.tokens - spared  # the reference's pass above the trunk
    own = bare + layers * lora * work.tokens - spared_lora  # that of a role with an adapter
    head = shape.head * work.replies
    scored = own + bare + own  # policy, reference, reward adapter
    # With the policy's slope, for the update's first backward
    score = scored + 2 * head + head + (own if critic == "adapter" else 0)
    passes = 2 if critic == "adapter" else 1
    backward = (
        (upper - (shape.layer - _above_lowest(shape)) + 2 * layers * lora) * work.tokens
        - spared
        - 2 * spared_lora
    )
    # The first forward is that of scoring
    update = work.epochs * (passes * (own + backward) + 2 * head) - passes * own - 2 * head
    last = (shape.layers - layers) * shape.layer * work.batch
    return {"generate": _generate(shape, work) + last, "score": score, "update": update}


def trl_ppo(shape: Shape, work: Work) -> dict[str, int]:
    """Count TRL 1.12.0's PPO, with LoRA on all linear layers of the policy.

    A value model trains whole, beside a reward model; logits are those of prompt and reply.
    """
    lora, body = shape.lora(work.rank), shape.layers * shape.layer
    policy = body + shape.layers * lora
    head = shape.head * work.tokens
    score = body * work.tokens + head + 2 * body * work.tokens
    backward = body - (shape.layer - _above_lowest(shape)) + 2 * shape.layers * lora
    update = work.epochs * ((policy + backward) * work.tokens + 2 * head + 3 * body * work.tokens)
    return {"generate": _generate(shape, work, lora=shape.layers * lora), "score": score, "update": update}


def _above_lowest(shape: Shape) -> int:
    """Return the FLOPs of the input gradients inside the lowest layer that trains."""
    # Its first three products need no gradient of their own input.
    first = 2 * shape.hidden * (shape.queries + 2 * shape.keys)
    return shape.layer - first


def _generate(shape: Shape, work: Work, lora: int = 0) -> int:
    """Return the FLOPs of generation with a cache."""
    # Each token but the last goes through the layers once, and the head at each reply token.
    tokens = work.batch * (work.prompt + work.response - 1)
    return tokens * (shape.layers * shape.layer + lora) + work.replies * shape.head
