"""What a run that does not fit into memory can change, and what each change brings.

The changes are in the order of what they cost: first those after which the run computes the same,
then those that train or generate less, and a smaller base last.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from goose_lora.errors import UserError
from goose_lora.planning.memory import MARGIN_BYTES, MARGIN_SHARE, Planner, amount, largest_number
from goose_lora.planning.shapes import is_trained

_FEWEST_LAYERS = 0.125  # of the layers: below, an adapter learns little
_SHORTEST = 0.25  # of the tokens as they are
_WHOLE = 8  # lengths are multiples of it

_Settings = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A change of settings, and the bytes that the run needs with it and those before it."""

    settings: _Settings
    need: int

    def __str__(self) -> str:
        written = ", ".join(f"{name}: {_written(value)}" for name, value in self.settings.items())
        return f"{written} ({amount(self.need)})"


def ways_to_fit(planner: Planner, memory: int) -> tuple[list[Way], Planner]:
    """Return the changes, one after another, until the run fits, and the plan with all of them.

    A change that brings nothing is left out. The last plan may still not fit.
    """
    found: list[Way] = []
    now = planner.changed({}, memory=memory)
    changes = (
        _checkpointing,
        _shared_weights,
        _groups,
        _host_embeddings,
        _quantization,
        _fewer_layers,
        _shorter,
    )
    for change in changes:
        if now.fits(now.sizes, memory):
            break
        settings = change(now, memory)
        # A change is kept where it brings something.
        after = now.changed(settings)
        if settings and after.needed() < now.needed():
            found.append(Way(settings, after.needed()))
            now = after
    return found, now


def check(planner: Planner, memory: int) -> None:
    """Refuse a run that does not fit, and say what would.

    Raises:
        UserError: it needs more than ``memory`` bytes.
    """
    lack = planner.lack(memory)
    if lack is not None:
        raise UserError(
            f"{lack} Largest that fits: {planner.advice(memory)}. {ways_out(planner, memory)}"
            " --force True goes on anyway."
        )


def ways_out(planner: Planner, memory: int) -> str:
    """Return in one line what would make the run fit, each change with what the run needs then."""
    found, after = ways_to_fit(planner, memory)
    steps = ", then ".join(str(way) for way in found)
    if after.fits(after.sizes, memory):
        return f"It fits with {steps}; goose-lora plan --config FILE --fit SIZE writes them."
    without = f"Even with {steps} it does not" if steps else "No other setting makes it"
    return f"{without} fit: {smaller_base(after, memory)}."


def smaller_base(planner: Planner, memory: int) -> str:
    """Say how large a base may be at the settings as they are."""
    # All that a run takes grows about as its base does.
    model = planner.model
    parameters = model.weights + model.other_parameters
    share = max(0.0, (memory - MARGIN_BYTES) / (1 + MARGIN_SHARE)) / planner.plan().peak
    number = share * parameters
    words = f"{number / 1e9:.1f} billion" if number >= 10**9 else f"{number / 1e6:.0f} million"
    return f"take a smaller base, of some {words} parameters"


# ---- The changes, in their order ----
def _checkpointing(planner: Planner, memory: int) -> _Settings:
    return {} if planner.config.gradient_checkpointing else {"gradient_checkpointing": True}


def _shared_weights(planner: Planner, memory: int) -> _Settings:
    return {"rollout_weights": "shared"} if planner.dense else {}


def _groups(planner: Planner, memory: int) -> _Settings:
    """Return smaller microbatches, more of them, and smaller groups of a rollout."""
    config, largest = planner.config, planner.largest(memory)
    settings: _Settings = {}
    # As many replies to an optimizer step as before
    rows = config.per_device_train_batch_size
    fitting = max(1, min(rows, largest["per_device_train_batch_size"]))
    taken = next(number for number in range(fitting, 0, -1) if rows % number == 0)
    if taken < rows:
        settings["per_device_train_batch_size"] = taken
        settings["gradient_accumulation_steps"] = config.gradient_accumulation_steps * rows // taken
    # A run whose groups are not set makes them fit itself
    asked = config.local_rollout_forward_batch_size
    if asked is None:
        return settings
    # Groups no smaller than what else the run needs makes of use
    smaller = planner.changed(settings)
    limit = max(memory, smaller.needed(replace(smaller.sizes, rollout_rows=1)))

    def fits(number: int) -> bool:
        return smaller.fits(replace(smaller.sizes, rollout_rows=number), limit)

    most = min(asked, planner.most_replies(planner.sizes))
    group = largest_number(fits, most)
    if group < most:
        settings["local_rollout_forward_batch_size"] = group
    return settings


def _host_embeddings(planner: Planner, memory: int) -> _Settings:
    # Not a table that is the head too
    head, table = planner.core.get_output_embeddings(), planner.core.get_input_embeddings()
    return {} if head is None or head.weight is table.weight else {"embeddings": "host"}


def _quantization(planner: Planner, memory: int) -> _Settings:
    # Adapters that were trained belong to the base as it was
    trained = any(_is_trained(adapter) for adapter in (planner.policy, planner.reward))
    return {} if trained or planner.args.quantization == "nf4" else {"quantization": "nf4"}


def _fewer_layers(planner: Planner, memory: int) -> _Settings:
    # Adapters that are there keep their layers, of which fewer may train
    trained = any(_is_trained(adapter) for adapter in (planner.policy, planner.reward))
    name = "train_layers" if trained else "lora_layers"
    layers = planner.model.layers
    fewest = max(1, round(layers * _FEWEST_LAYERS))
    most = layers - planner.roles.policy.trained_from
    if fewest >= most:
        return {}
    return _most(planner, memory, lambda number: {name: f"top-{number}"}, fewest, most - 1)


def _shorter(planner: Planner, memory: int) -> _Settings:
    sizes = planner.sizes

    def lengths(percent: int) -> _Settings:
        return {
            "response_length": _part(sizes.response_tokens, percent),
            "max_prompt_tokens": _part(sizes.prompt_tokens, percent),
        }

    return _most(planner, memory, lengths, round(100 * _SHORTEST), 99)


def _most(
    planner: Planner, memory: int, settings: Callable[[int], _Settings], fewest: int, most: int
) -> _Settings:
    """Return the settings of the largest number from ``fewest`` to ``most`` with which it fits.

    Where none does, those of ``fewest``.
    """

    def fits(number: int) -> bool:
        changed = planner.changed(settings(number + fewest - 1))
        return changed.fits(changed.sizes, memory)

    found = largest_number(fits, most - fewest + 1)
    return settings(max(fewest, found + fewest - 1))


def _part(tokens: int, percent: int) -> int:
    return max(_WHOLE, tokens * percent // 100 // _WHOLE * _WHOLE)


def _is_trained(adapter: Any) -> bool:
    return adapter is not None and (not isinstance(adapter, str) or is_trained(adapter))


# ---- A configuration with the changes ----
def fitting(planner: Planner, memory: int, text: str, file: str) -> tuple[str | None, str]:
    """Return the text of a configuration with the changes that make its run fit, and what was done.

    The text is None where it fits as it is.

    Args:
        text: of the YAML file ``file``.

    Raises:
        UserError: no change makes it fit.
    """
    if planner.fits(planner.sizes, memory):
        return None, f"{file} fits as it is: nothing is written."
    found, after = ways_to_fit(planner, memory)
    if not after.fits(after.sizes, memory):
        raise UserError(f"--fit {amount(memory)}: {ways_out(planner, memory)}")

    # Later changes of a setting stand for earlier ones
    settings: _Settings = {}
    for way in found:
        settings |= way.settings
    note = (
        f"# {file}, changed to fit {amount(memory)} by goose-lora plan; it needs {amount(after.needed())}.\n"
    )
    return note + written_into(text, settings), ", then ".join(str(way) for way in found)


def written_into(text: str, settings: Mapping[str, Any]) -> str:
    """Return the text of a YAML file with other values of ``settings``; all else stays as it is."""
    lines, left = text.rstrip("\n").split("\n"), dict(settings)
    for number, line in enumerate(lines):
        # A setting of a recipe stands at the beginning of a line
        name = line.partition(":")[0]
        if name in left and line.startswith(f"{name}:"):
            lines[number] = f"{name}: {_written(left.pop(name))}"
    return "\n".join([*lines, *(f"{name}: {_written(value)}" for name, value in left.items())]) + "\n"


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
