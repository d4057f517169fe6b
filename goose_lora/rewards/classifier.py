"""A reward model of any other origin: a sequence classifier with its own tokenizer."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from goose_lora.data.tokenization import apply_template, chat_options
from goose_lora.errors import UserError
from goose_lora.files import import_function
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.folders import context_of, reading, require_model
from goose_lora.models.loading import read_weights, spare_token
from goose_lora.rewards.group_judge import GroupJudge
from goose_lora.rewards.named import READY, ReadyReward
from goose_lora.rewards.pairwise_judge import SERVED
from goose_lora.rewards.sources import RewardFunction, RewardMix, RewardSource

PREFIX = "model:"
OF_TEMPLATES = ("tools", "chat_template_kwargs")  # columns that a chat template reads
Turns = str | list[dict[str, object]]


class ClassifierReward:
    """A reward source that scores texts by one output of a sequence classifier.

    It is called like any function: ``f(prompts=, completions=, **columns)``.

    Texts are decoded replies, so that its tokenizer may be another than the policy's. A prompt of
    text and its completion are joined as they are; chat messages and the reply go through the
    classifier's own chat template. What is too long loses its beginning.

    Args:
        spec: ``model:NAME`` with a folder or Hub id; ``model:NAME#LABEL`` for one output of a
            classifier with several labels.
        batch_size: texts at a time.

    Raises:
        UserError: not a classifier, a label that it does not have, or several labels and none
            named. Weights are not loaded for that.
    """

    def __init__(self, spec: str, *, batch_size: int = 32, trust_remote_code: bool = False):
        self.name, _, label = spec.removeprefix(PREFIX).partition("#")
        self.batch_size, self.trust_remote_code = batch_size, trust_remote_code
        # Is it a classifier, by its configuration?
        require_model(self.name)
        with reading("its configuration", self.name):
            self.config: Any = AutoConfig.from_pretrained(self.name, trust_remote_code=trust_remote_code)
        if not any(
            "ForSequenceClassification" in architecture for architecture in self.config.architectures or []
        ):
            found = ", ".join(self.config.architectures or ["unknown"])
            raise UserError(
                f"{spec}: a reward model is a sequence classifier, and this is {found}. Give one that was"
                " saved with its score head."
            )
        # Which of its outputs is the score?
        labels = self.config.label2id
        if (label and label not in labels) or (not label and self.config.num_labels > 1):
            raise UserError(
                f"{spec}: the classifier has the labels {', '.join(labels)}. Name one of them:"
                f" {PREFIX}{self.name}#{next(iter(labels))}"
            )
        self.output = labels[label] if label else 0
        # A long text is cut on its left: the reply stands at the end. Padding there would move the
        # positions, which GPT-2 and BERT count from the first column
        with reading("the tokenizer", self.name):
            self.tokenizer = AutoTokenizer.from_pretrained(
                self.name,
                trust_remote_code=trust_remote_code,
                truncation_side="left",
                padding_side="right",
            )
        self._choose_padding()
        self.__name__ = self.name.rstrip("/").rpartition("/")[2]
        self.model: Any = None

    def _choose_padding(self) -> None:
        """Pad with what the model itself takes for padding, else with what no text contains.

        A decoder reads its score from the last token that is not its configuration's padding. With
        the tokenizer's in its place, a text that ends in that token would be read too early.
        """
        own = self.config.get_text_config()
        known = getattr(own, "pad_token_id", None)
        if known is not None and 0 <= known < len(self.tokenizer):
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(known)
        elif self.tokenizer.pad_token_id in (None, self.tokenizer.eos_token_id):
            self.tokenizer.pad_token = spare_token(self.tokenizer)
        own.pad_token_id = self.tokenizer.pad_token_id

    def check(self, prompt: object) -> None:
        """Raise UserError if it cannot read prompts such as ``prompt``.

        Chat messages need a tokenizer with a chat template.
        """
        if not isinstance(prompt, str) and self.tokenizer.chat_template is None:
            raise UserError(
                f"{PREFIX}{self.name}: the prompts are chat messages, and its tokenizer has no chat template."
                " Use text prompts."
            )

    def load(self, args: ModelArguments, device: torch.device) -> "ClassifierReward":
        """Put the weights on ``device``, quantized and in the dtype as ``args`` says.

        For this model's own settings give it own arguments.
        """
        own = {"config": self.config, "trust_remote_code": self.trust_remote_code}
        model = read_weights(AutoModelForSequenceClassification, self.name, args, device, **own)
        self.model = model.requires_grad_(False).eval()
        return self

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: object) -> list[float]:
        # The classifier's own tokens, from texts, with each row's tools and template keywords
        own = {name: cast("list[object]", columns[name]) for name in OF_TEMPLATES if name in columns}
        texts = [
            self._text(prompt, completion, **chat_options({name: own[name][row] for name in own}))
            for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            rows = texts[start : start + self.batch_size]
            # A template writes the special tokens itself.
            special = isinstance(prompts[0], str)
            batch = self.tokenizer(
                rows, padding=True, add_special_tokens=special, return_tensors="pt", **self._cut
            )
            scores += self.model(**batch.to(self.model.device)).logits[:, self.output].float().tolist()
        return scores

    def encode(self, prompt: Turns | None, reply: Turns, **template: object) -> list[int]:
        """Return a prompt and a reply, text or messages, in its own tokens, as a call reads them.

        ``template`` has keywords for the chat template. What is too long loses its beginning.
        """
        text, special = self._text(prompt, reply, **template), isinstance(reply, str)
        return self.tokenizer(text, add_special_tokens=special, **self._cut)["input_ids"]

    @torch.no_grad()
    def score_tokens(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return the scores of rows of ``encode``."""
        scores: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            own = {"input_ids": [list(row) for row in rows[start : start + self.batch_size]]}
            batch = self.tokenizer.pad(own, return_tensors="pt").to(self.model.device)
            scores += self.model(**batch).logits[:, self.output].float().tolist()
        return scores

    def _text(self, prompt: Turns | None, reply: Turns, **template: object) -> Any:
        """Return a prompt, text or messages, and a reply to it as one text."""
        if isinstance(prompt or "", str) and isinstance(reply, str):
            return f"{prompt or ''}{reply}"
        turns = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
        return apply_template(self.tokenizer, [*(prompt or []), *turns], tokenize=False, **template)

    @cached_property
    def _cut(self) -> dict[str, int]:
        """What the tokenizer is told about texts that are too long; nothing if none can be."""
        with reading("its configuration", self.name), torch.device("meta"):
            empty = AutoModelForSequenceClassification.from_config(
                self.config, trust_remote_code=self.trust_remote_code
            )
        # RoBERTa and its kin count positions from beyond the padding's
        bounds = [self.tokenizer.model_max_length, context_of(self.config) or VERY_LARGE_INTEGER]
        bounds += [
            part.num_embeddings - part.padding_idx - 1
            for name, part in empty.named_modules()
            if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None
        ]
        longest = min(bounds)
        return {} if longest >= VERY_LARGE_INTEGER else {"truncation": True, "max_length": longest}


def listed_sources(names: Sequence[str] | str | None) -> Sequence[str]:
    """Return what ``--reward_function`` names, one or several, as a list."""
    return [names] if isinstance(names, str) else names or []


def check_weights(weights: Sequence[float] | None, names: Sequence[str] | str | None) -> None:
    """Raise UserError unless there is one weight to each source of ``--reward_function``."""
    sources = listed_sources(names) or ["adapter"]
    if weights is not None and len(weights) != len(sources):
        raise UserError(
            f"reward_weights: {len(weights)} weights for {len(sources)} sources of reward"
            f" ({', '.join(sources)}); give one to each."
        )


def reward_sources(
    names: Sequence[str] | str | None,
    *,
    has_adapter: bool,
    trust_remote_code: bool = False,
    judge: Callable[[str], GroupJudge] | None = None,
) -> list[Any]:
    """Return what ``--reward_function`` names; weights are not loaded yet.

    A name is ``adapter``, ``module:function``, ``model:NAME``, ``trl:NAME`` or ``check:NAME``; or
    ``openai:MODEL``, of which ``judge`` makes a source.

    Raises:
        UserError: ``adapter`` is wanted, also by default, and there is none; a name that leads
            nowhere.
    """
    # By default the reward adapter alone
    listed = listed_sources(names) or ["adapter"]
    if not has_adapter and "adapter" in listed_sources(names):
        raise UserError(
            "reward_function: adapter is named, and there is none. Set reward_adapter to the output of"
            " recipes/reward.py, or leave it out."
        )
    if not has_adapter and "adapter" in listed:
        raise UserError(
            "nothing scores the replies: set reward_adapter to the output of recipes/reward.py, or"
            " reward_function to module:function or model:NAME."
        )
    twice = sorted({name for name in listed if name.startswith(SERVED) and listed.count(name) > 1})
    if twice:
        raise UserError(f"reward_function: {twice[0]} stands twice, and would be paid twice. Name it once.")
    # A model that is named twice is one model
    models = {
        name: ClassifierReward(name, trust_remote_code=trust_remote_code)
        for name in listed
        if name.startswith(PREFIX)
    }
    # Each name by what it begins with; functions are imported here
    made: list[Any] = []
    for name in listed:
        if name == "adapter":
            made.append(name)
        elif name.startswith(SERVED) and judge is not None:
            made.append(judge(name))
        else:
            made.append(models[name] if name in models else reward_function(name))
    return made


def reward_function(name: str) -> RewardFunction:
    """Return the function of ``module:function``, ``trl:NAME(...)`` or ``check:NAME(...)``.

    Raises:
        UserError: there is no such function.
    """
    if name.startswith(SERVED):
        raise UserError(
            f"{name}: a model behind a server compares pairs of replies, as judge of recipes/evaluate.py and"
            " reward_function of recipes/ppo.py. For a number a reply, ask it in a function of your own:"
            " module:function."
        )
    return ReadyReward(name) if name.startswith(READY) else import_function(name)


def check_sources(
    sources: Sequence[RewardSource],
    row: Mapping[str, Any],
    completion_ids: Sequence[int],
    *,
    timeout: float | None = None,
) -> None:
    """Ask all sources about one reply to a row of prompts, before any weights load.

    Python functions are called; a classifier is compared with the prompt.

    Args:
        row: a row of prompts, as PPO gives its columns to functions.
        completion_ids: tokens of the reply "ok".
        timeout: seconds that the functions may take together.

    Raises:
        UserError: one cannot be called, raised an error, or did not give a number.
    """
    classifiers = [source for source in sources if isinstance(source, ClassifierReward)]
    for classifier in classifiers:
        classifier.check(row["prompt"])
    functions = [source for source in sources if source not in classifiers and source != "adapter"]
    if functions:
        columns = {name: value for name, value in row.items() if name not in ("prompt", "input_ids")}
        RewardMix(functions, timeout=timeout).check(row["prompt"], columns, completion_ids)
