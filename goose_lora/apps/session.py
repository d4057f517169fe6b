"""A finished run to talk to: base, SFT and PPO of it on one shared base again.

``inspect_run`` finds them by the run's lineage, before a weight is read; ``PolicySession`` loads
them and replies.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from goose_lora.data.tokenization import left_pad, prompt_ids
from goose_lora.errors import UserError
from goose_lora.generation.sampling import generation_config, sample
from goose_lora.generation.stopping import StopStrings
from goose_lora.models.arguments import ModelArguments, arguments_of
from goose_lora.models.compatibility import check_fit
from goose_lora.models.dense_copy import make_dense_copy
from goose_lora.models.endings import reply_ends
from goose_lora.models.folders import (
    ADAPTER_CONFIG,
    AdapterFolder,
    context_of,
    local_folder,
    read_lineage,
)
from goose_lora.models.loading import load_base, tokenizer_of
from goose_lora.models.roles import ADAPTERS, Role
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.config import PPOConfig
from goose_lora.sharing.lineage import hub_name

# A chat message, and what a role is asked: a text that it continues, or the turns of a chat.
Turn = dict[str, Any]
Prompt = str | list[Turn]


@dataclass
class SampledReply:
    """One reply: text, length in tokens, whether it ended by itself, and its score.

    The score is the reward model's, None where the run has no reward model.
    """

    text: str
    tokens: int
    ended: bool
    score: float | None

    def facts(self) -> str:
        """Return score, length and ending in a few words."""
        unit = "token" if self.tokens == 1 else "tokens"
        ending = "ended" if self.ended else "cut off"
        facts = f"{self.tokens} {unit}, {ending}"
        if self.score is not None:
            facts = f"score {self.score:.3f}, {facts}"
        return facts


# ---- Before a weight is read ----


@dataclass
class RunInfo:
    """What is known of a run before any weights are loaded.

    ``roles`` has what can be asked, ``base``, ``sft`` and ``ppo``, as roles of the shared base.
    ``chat`` says whether the run was trained on chat messages. ``settings`` are those of the run
    that are not defaults.
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
        """Raise UserError unless the adapters fit the base, and texts of ``tokens`` its context."""
        named = {
            "policy_adapter": self.folder,
            "sft_adapter": self.reference,
            "reward_adapter": self.reward,
        }
        adapters = [AdapterFolder.of(name, folder) for name, folder in named.items() if folder]
        check_fit(self.arguments, self.tokenizer, adapters, tokens=tokens, chat=self.chat)

    def prompt_after(self, turns: Sequence[Turn], line: str) -> tuple[Prompt, str]:
        """Return what a role is asked when ``line`` follows ``turns``, and what stands before it.

        The latter is empty in a chat. Otherwise it is ``line`` itself, which the reply continues.
        """
        if self.chat:
            return [*turns, {"role": "user", "content": line}], ""
        return line, line

    def describe(self, names: Sequence[str]) -> str:
        """Return who answers, in one line."""
        base = self.arguments.model_name_or_path
        if self.arguments.quantization != "none":
            base += f" in {self.arguments.quantization}"
        return f"{', '.join(names)} of {self.folder} on {base}."

    @property
    def response_tokens(self) -> int:
        """The most tokens of a reply in the run."""
        return self.settings.get("response_length", PPOConfig.response_length)

    @property
    def temperature(self) -> float:
        return self.settings.get("temperature", PPOConfig.temperature)


def inspect_run(run: str | Path, *, base: str | None = None) -> RunInfo:
    """Look at the policy that recipes/ppo.py, own_loop.py or sft.py left.

    ``run`` is its folder, or user/repo[@revision] on the Hub. SFT and reward adapter are those
    beside the policy, or else those that it started from, where they still are.

    Args:
        base: where the base is, if not where the run had it.

    Raises:
        UserError: there is no run, it is no policy, or its base is gone or was quantized in a way
            that is not known.
    """
    # Is it a policy whose base can be loaded as it was in training?
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
    if stage not in ("sft", "ppo", "own_loop") or not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{run} is what {stage} left, and no policy's adapter. Give the output_dir of recipes/ppo.py or"
            " recipes/sft.py."
        )
    arguments = arguments_of(folder, lineage["base"], base)

    # Who can be asked. After PPO the adapter it started from is a role of its own
    reference = reward = None
    roles: dict[str, Role] = {"base": "base", "sft": "policy"}
    if stage != "sft":
        reference = _adapter_of(folder, lineage, "reference")
        reward = _adapter_of(folder, lineage, "reward")
        roles = {"base": "base", "ppo": "policy"}
    if reference:
        roles = {"base": "base", "sft": "reference", "ppo": "policy"}

    # Chats need a template, to be asked as the run was trained
    tokenizer = tokenizer_of(folder, args=arguments)
    trained_on_chat = any(row.get("chat") for row in lineage.get("data", []))
    return RunInfo(
        folder=folder,
        arguments=arguments,
        tokenizer=tokenizer,
        roles=roles,
        reference=reference,
        reward=reward,
        chat=trained_on_chat and bool(tokenizer.chat_template),
        settings=lineage.get("settings", {}),
    )


def _adapter_of(folder: Path, lineage: dict[str, Any], role: Role) -> Path | None:
    """Return the folder of a role's adapter: below the policy's, or the one it started from."""
    name, at, revision = hub_name(folder).partition("@")
    places = [f"{name}/{ADAPTERS[role]}{at}{revision}"]
    # The reference of PPO is the adapter that the policy started from
    parent = lineage.get("parents", {}).get("policy" if role == "reference" else role)
    if parent:
        places.append(parent["name"])
    for place in places:
        try:
            found = local_folder(place)
        except UserError:  # neither here nor on the Hub
            continue
        if (found / ADAPTER_CONFIG).is_file():
            return found
    return None


def check_sampling(temperature: float | None, max_new_tokens: int | None, *, greedy: bool = True) -> None:
    """Raise UserError for a temperature or a length that nobody can sample with.

    ``greedy`` says whether a temperature of 0 will do.
    """
    # NaN fails every comparison, and so is refused too
    if temperature is not None and not (0 <= temperature < float("inf") and (greedy or temperature > 0)):
        also = ", or 0 for greedy replies" if greedy else ""
        raise UserError(f"--temperature {temperature:g}: must be a number above 0{also}.")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: must be 1 or more.")


# ---- With the weights in memory ----


class Pieces(TextStreamer):
    """A streamer that hands a reply on as it is written, in whole words.

    The reply is decoded as what follows its prompt: by itself a first word has no space before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        super().__init__(cast(Any, tokenizer), skip_special_tokens=True)
        self.write = write

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            return super().put(value)
        # The prompt comes first. It stays in the cache as text that was printed already
        self.next_tokens_are_prompt = False
        self.token_cache = value[0].tolist()
        self.print_len = len(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.write(text)


class PolicySession:
    """The models of a run on one shared base.

    Threads may ask at once; they are answered one after the other.

    Args:
        temperature: of the sampling; 0 for greedy replies, the run's own if unset.
        max_new_tokens: most tokens of a reply; the run's own if unset.
    """

    def __init__(self, info: RunInfo, *, temperature: float | None = None, max_new_tokens: int | None = None):
        self.info, self.tokenizer = info, info.tokenizer
        self.shared = SharedBase.build(
            load_base(info.arguments, self.tokenizer),
            info.folder,
            reward=info.reward,
            reference=info.reference or "base",
        )
        # Replies are sampled as rollouts are: from a dense copy, which holds one role at a time
        self.dense, self._merged = make_dense_copy(self.shared, "auto"), ""
        # A temperature of 0 is greedy, and transformers takes no 0
        if temperature is None:
            temperature = info.temperature
        self.sampling = generation_config(
            response_tokens=max_new_tokens or info.response_tokens,
            temperature=temperature or 1.0,
            do_sample=temperature > 0,
            eos_token_ids=reply_ends(self.tokenizer, info.settings.get("stop_token_ids")),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        # A page has several tabs, and each asks in a thread of its own
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
        """Sample ``count`` replies of ``name`` to ``prompt``, a text to continue or chat messages.

        The same ``seed`` gives the same replies. ``write`` gets the text of one reply, piece by
        piece, while it is written.

        Raises:
            UserError: the prompt is empty, or leaves no room for a reply in the base's context.
        """
        # What is asked, as tokens, and where it stops
        ids = prompt_ids(prompt, self.tokenizer)
        self._check_room(len(ids))
        tokens, mask = left_pad([ids] * count, self.tokenizer.pad_token_id, self._head_device())
        strings = self.info.settings.get("stop_strings")
        stop = StopStrings(self.tokenizer, strings, len(ids)) if strings else None
        streamer = Pieces(self.tokenizer, write) if write else None

        # The dense copy, the roles and torch's generator are one for all threads
        with self._one_at_a_time:
            torch.manual_seed(seed)
            role = self.info.roles[name]
            if self.dense is not None and self._merged != name:
                self.dense.merge_role(role)
                self._merged = name
            rollout = sample(
                self.shared,
                tokens,
                mask,
                self.sampling,
                role=role,
                dense=self.dense,
                stop=stop,
                streamer=streamer,
            )
            scores: Sequence[float | None] = [None] * count
            if self.shared.has("reward"):
                closed = rollout.ends_with_token(reply_ends(self.tokenizer))
                scores = self.shared.scores(rollout.input_ids, rollout.attention_mask, None, closed).tolist()

        # Text that continues a prompt keeps the space before its first word
        texts = [self._text(ids, reply, follows=isinstance(prompt, str)) for reply in rollout.response_ids()]
        facts = zip(texts, rollout.lengths.tolist(), rollout.ended.tolist(), scores, strict=True)
        return [SampledReply(*reply) for reply in facts]

    def _core(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.shared.get_base_model())

    def _head_device(self) -> torch.device:
        return cast(nn.Linear, self._core().get_output_embeddings()).weight.device

    def _check_room(self, tokens: int) -> None:
        """Raise UserError for an empty prompt, or one that leaves no room for a reply."""
        context = context_of(self._core().config)
        longest = cast(int, self.sampling.max_new_tokens)
        if tokens == 0:
            raise UserError("there is nothing to answer: the prompt has no tokens.")
        if context is not None and tokens + longest > context:
            raise UserError(
                f"the prompt is {tokens} tokens long, and with a reply of {longest} it"
                f" does not fit the base's context of {context}. Begin anew, or lower --max_new_tokens."
            )

    def _text(self, prompt: list[int], reply: list[int], *, follows: bool) -> str:
        """Return a reply decoded; with ``follows`` as it continues its prompt."""
        alone, before, whole = self.tokenizer.batch_decode(
            [reply, prompt, prompt + reply],
            skip_special_tokens=True,
        )
        if follows and whole.startswith(before):
            return whole[len(before) :]
        return alone
