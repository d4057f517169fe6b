"""Base, SFT and PPO of a finished run, found by its lineage, put on one shared base again, and
asked."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from goose_lora.data.tokenization import left_pad, prompt_ids
from goose_lora.errors import UserError
from goose_lora.generation.sampling import generation_config, sample
from goose_lora.generation.stopping import StopStrings
from goose_lora.models.adapters import CONFIG, local_folder, read_lineage
from goose_lora.models.arguments import ModelArguments, arguments_of
from goose_lora.models.compatibility import check_fit
from goose_lora.models.dense_copy import dense_copy
from goose_lora.models.loading import load_base, tokenizer_of
from goose_lora.models.roles import ADAPTERS, Role
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.config import PPOConfig
from goose_lora.sharing.lineage import hub_name

Prompt = str | list[dict[str, Any]]


@dataclass
class SampledReply:
    """One reply: its text, length (tokens), whether it ended by itself, and the reward model's
    score where the run has one."""

    text: str
    tokens: int
    ended: bool
    score: float | None

    def facts(self) -> str:
        score = "" if self.score is None else f"score {self.score:.3f}, "
        return (
            f"{score}{self.tokens} token{'s' if self.tokens != 1 else ''},"
            f" {'ended' if self.ended else 'cut off'}"
        )


@dataclass
class RunInfo:
    """What is there of a run, before any weights are loaded.

    ``roles``: what can be asked, ``base``, ``sft`` and ``ppo``, as roles of the shared base.
    ``chat``: whether the run was trained on chat
    messages. ``settings``: those of the run that are not defaults.
    """

    folder: Path
    arguments: ModelArguments
    tokenizer: PreTrainedTokenizerBase
    roles: dict[str, Role]
    reference: Path | None
    reward: Path | None
    chat: bool
    settings: dict[str, Any]

    def check(self, *, tokens: int | None = None) -> None:
        """Raise ValueError unless the adapters fit the base, and texts of ``tokens`` its
        context."""
        adapters = {
            "policy_adapter": self.folder,
            "sft_adapter": self.reference,
            "reward_adapter": self.reward,
        }
        named = {name: str(folder) if folder else None for name, folder in adapters.items()}
        check_fit(self.arguments, self.tokenizer, named, tokens=tokens, chat=self.chat)

    def prompt_after(self, turns: Sequence[dict[str, Any]], line: str) -> tuple[Prompt, str]:
        """What a role is asked when ``line`` comes after ``turns``, and what of it stands before
        the reply: a text that is gone on from."""
        return ([*turns, {"role": "user", "content": line}], "") if self.chat else (line, line)

    def describe(self, names: Sequence[str]) -> str:
        """Who answers, in one line."""
        quantized = "" if self.arguments.quantization == "none" else f" in {self.arguments.quantization}"
        return f"{', '.join(names)} of {self.folder} on {self.arguments.model_name_or_path}{quantized}."

    @property
    def response_tokens(self) -> int:
        """Most tokens of a reply in the run."""
        return self.settings.get("response_length", PPOConfig.response_length)

    @property
    def temperature(self) -> float:
        return self.settings.get("temperature", PPOConfig.temperature)


def inspect_run(run: str | Path, *, base: str | None = None) -> RunInfo:
    """Look at the policy that recipes/ppo.py or own_loop.py left, or recipes/sft.py; a folder, or
    user/repo[@revision] on the Hub.

    SFT and reward adapter are those beside the policy, or else those that it started from, where
    they still are.

    Args:
        base: where the base is, if not where the run had it.

    Raises:
        ValueError: no run, one that is no policy, or of which the base's quantization is not known;
            its base is gone.
    """
    folder = local_folder(run)
    if not folder.is_dir():
        raise UserError(
            f"{run}: no such run. Give the output_dir of recipes/ppo.py or recipes/sft.py, or user/repo on"
            " the Hub."
        )
    lineage = read_lineage(folder)
    if "base" not in lineage:
        raise UserError(
            f"{run} has no goose_lora.json that tells its base and how that was quantized. Give the"
            " output_dir of a stage."
        )
    stage = lineage.get("stage")
    if stage not in ("sft", "ppo", "own_loop") or not (folder / CONFIG).is_file():
        raise UserError(
            f"{run} is what {stage} left, and no policy's adapter. Give the output_dir of recipes/ppo.py or"
            " recipes/sft.py."
        )
    arguments = arguments_of(lineage["base"], base)
    reference = reward = None
    roles: dict[str, Role] = {"base": "base", "sft": "policy"}
    if stage != "sft":
        reference, reward = (_adapter_of(folder, lineage, role) for role in ("reference", "reward"))
        roles = (
            {"base": "base", "sft": "reference", "ppo": "policy"}
            if reference
            else {"base": "base", "ppo": "policy"}
        )
    chat = any(row.get("chat") for row in lineage.get("data", []))
    tokenizer = tokenizer_of(folder, arguments)
    return RunInfo(
        folder,
        arguments,
        tokenizer,
        roles,
        reference,
        reward,
        chat and bool(tokenizer.chat_template),
        lineage.get("settings", {}),
    )


def _adapter_of(folder: Path, lineage: dict[str, Any], role: Role) -> Path | None:
    name, at, revision = hub_name(folder).partition("@")
    parent = lineage.get("parents", {}).get("policy" if role == "reference" else role)
    for place in (f"{name}/{ADAPTERS[role]}{at}{revision}", parent and parent["name"]):
        if place:
            try:
                found = local_folder(place)
            except ValueError:  # neither here nor on the Hub
                continue
            if (found / CONFIG).is_file():
                return found
    return None


class Pieces(TextStreamer):
    """Hands a reply on as it is written, in whole words, decoded as what follows its prompt: by
    itself a first word has no space before it."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.write = write

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            return super().put(value)
        self.next_tokens_are_prompt = False
        self.token_cache = value[0].tolist()
        self.print_len = len(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.write(text)


class PolicySession:
    """The models of a run on one shared base. Threads may ask at once; they are answered one after
    the other.

    Args:
        temperature: of the sampling; 0 for greedy replies, the run's own if unset.
        max_new_tokens: most tokens of a reply; the run's own if unset.
    """

    def __init__(self, info: RunInfo, *, temperature: float | None = None, max_new_tokens: int | None = None):
        self.info, self.tokenizer = info, info.tokenizer
        base = load_base(info.arguments, self.tokenizer)
        self.shared = SharedBase.build(
            base, info.folder, reward=info.reward, reference=info.reference or "base"
        )
        # As rollouts are sampled, and the name whose adapter is merged in
        self.dense, self._merged = dense_copy(self.shared, "auto"), ""
        temperature = info.temperature if temperature is None else temperature
        tokenizer: Any = self.tokenizer
        self.sampling = generation_config(
            response_tokens=max_new_tokens or info.response_tokens,
            temperature=temperature or 1.0,
            do_sample=temperature > 0,
            eos_token_ids=[tokenizer.eos_token_id, *(info.settings.get("stop_token_ids") or [])],
            pad_token_id=tokenizer.pad_token_id,
        )
        self._one_at_a_time = threading.Lock()

    @torch.no_grad()
    def reply(
        self,
        name: str,
        prompt: Prompt,
        *,
        seed: int,
        count: int = 1,
        write: Callable[[str], None] | None = None,
    ) -> list[SampledReply]:
        """``count`` replies of ``name`` to ``prompt``, a text to go on from or chat messages. The
        same ``seed`` gives the same replies.

        ``write`` gets the text of one reply, piece by piece, while it is written.

        Raises:
            ValueError: the prompt is empty, or leaves no room for a reply in the base's context.
        """
        ids = prompt_ids(prompt, self.tokenizer)
        self._check_room(len(ids))
        core: Any = self.shared.get_base_model()
        tokens, mask = left_pad(
            [ids] * count, self.tokenizer.pad_token_id, core.get_output_embeddings().weight.device
        )
        strings = self.info.settings.get("stop_strings")
        with self._one_at_a_time:
            torch.manual_seed(seed)
            stop = StopStrings(self.tokenizer, strings, len(ids)) if strings else None
            streamer = Pieces(self.tokenizer, write) if write else None
            if self.dense is not None and self._merged != name:
                self.dense.become(self.info.roles[name])
                self._merged = name
            how = {"role": self.info.roles[name], "dense": self.dense, "stop": stop, "streamer": streamer}
            rollout = sample(self.shared, tokens, mask, self.sampling, **how)
            scores: Sequence[float | None] = [None] * count
            if self.shared.has("reward"):
                closed = rollout.closes_with(self.tokenizer.eos_token_id)
                scores = self.shared.scores(rollout.input_ids, rollout.attention_mask, None, closed).tolist()
        texts = [self._text(ids, reply, follows=isinstance(prompt, str)) for reply in rollout.response_ids()]
        facts = zip(texts, rollout.lengths.tolist(), rollout.ended.tolist(), scores, strict=True)
        return [SampledReply(*reply) for reply in facts]

    def _check_room(self, tokens: int) -> None:
        core: Any = self.shared.get_base_model()
        config = core.config.get_text_config().to_dict()
        context = config.get("max_position_embeddings") or config.get("n_positions")
        if tokens == 0:
            raise UserError("there is nothing to answer: the prompt has no tokens.")
        if context is not None and tokens + self.sampling.max_new_tokens > context:
            raise UserError(
                f"the prompt is {tokens} tokens long, and with a reply of {self.sampling.max_new_tokens} it"
                f" does not fit the base's context of {context}. Begin anew, or lower --max_new_tokens."
            )

    def _text(self, prompt: list[int], reply: list[int], *, follows: bool) -> str:
        """A reply decoded; with ``follows`` as it goes on from its prompt, with the space before
        its first word."""
        alone, before, whole = self.tokenizer.batch_decode(
            [reply, prompt, prompt + reply], skip_special_tokens=True
        )
        return whole[len(before) :] if follows and whole.startswith(before) else alone


def check_sampling(temperature: float | None, max_new_tokens: int | None, *, greedy: bool = True) -> None:
    """Raise ValueError for a temperature or a length that nobody can sample with; ``greedy``:
    whether 0 will do."""
    if temperature is not None and not (0 <= temperature < float("inf") and (greedy or temperature > 0)):
        raise UserError(
            f"--temperature {temperature:g}: must be a number above"
            f" 0{', or 0 for greedy replies' if greedy else ''}."
        )
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: must be 1 or more.")
