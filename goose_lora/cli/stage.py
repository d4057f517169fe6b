"""A stage of a run, from its settings to what it leaves behind."""

import copy
import logging
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from goose_lora import terminal
from goose_lora.data.demonstrations import Learning, tokenize_demonstrations, tokenize_texts
from goose_lora.data.hints import tell_hints
from goose_lora.data.rows import DataArguments, RowSet, row_lines
from goose_lora.data.tokenization import tokenize_prompts
from goose_lora.embedded import resolve
from goose_lora.errors import UserError
from goose_lora.files import read_jsonl
from goose_lora.generation.vllm import require_vllm
from goose_lora.models.adapter_kinds import plain_config
from goose_lora.models.adapters import load_weights
from goose_lora.models.arguments import ModelArguments, usable_dtype
from goose_lora.models.compatibility import check_fit
from goose_lora.models.dates import template_date
from goose_lora.models.dense_copy import free_bytes
from goose_lora.models.endings import ends_text, require_tokens
from goose_lora.models.folders import AdapterFolder
from goose_lora.models.loading import (
    adapters_to_fp32,
    change_ends,
    load_base,
    load_reward_base,
    lora_config,
    tokenizer_of,
)
from goose_lora.models.roles import ADAPTERS
from goose_lora.ownership import begin_in, claim, release
from goose_lora.planning import ways
from goose_lora.planning.memory import plan_run
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.sampler import RolloutBatches
from goose_lora.ppo.trainer import PPOTrainer
from goose_lora.reporting import html_report
from goose_lora.reporting.diagnosis import diagnose, diagnosis_text
from goose_lora.reporting.observing import only_looks
from goose_lora.reporting.plots import plot_curves
from goose_lora.reporting.run_files import write_stage
from goose_lora.sharing import hub, lineage, model_card
from goose_lora.sharing.export import save_policy
from goose_lora.training.checkpoints import Facts, SettingRules, kept
from goose_lora.training.cost import cost
from goose_lora.training.hardware import device_lines, require_supported
from goose_lora.training.launch import (
    compute_by_dtype,
    processes_here,
    require_all_processes,
    require_ddp,
    smallest_anywhere,
)
from goose_lora.training.resume import given_facts, starting_point

logger = logging.getLogger(__name__)

LOG_FILE = "log.txt"  # what a run has said
OF_PPO = ("ppo", "own_loop")
# Of the last rollout, for card and lineage; the raw score is the one that a run prints
FIGURES = ("objective/raw_score", "objective/score", "objective/kl", "rollout/eos_rate")


@dataclass(frozen=True)
class Prompts:
    """Tokenized prompts, to train on and held out, and pretraining text."""

    train: Dataset
    held_out: Dataset | None = None
    pretraining: Dataset | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        # Held-out prompts are answered by the same code, so they count
        found = [self.train] if self.held_out is None else [self.train, self.held_out]
        return max(len(ids) for prompts in found for ids in prompts["input_ids"])

    @property
    def example(self) -> Any:
        """The first prompt: text, or a list of chat messages."""
        return self.train[0]["prompt"]

    @property
    def chat(self) -> bool:
        """Whether the prompts are chat messages."""
        return not isinstance(self.example, str)


@dataclass
class Stage:
    """What the recipes of all stages have in common: their beginning and their end.

    ``Stage.begin`` makes one. ``others`` are the recipe's own settings, as dataclasses;
    ``checkpoint`` is the folder that the run goes on from, if it does.
    """

    name: str
    config: TrainingArguments
    model: ModelArguments
    data: DataArguments
    others: tuple[Any, ...] = ()
    command: Sequence[str] | None = None
    checkpoint: str | None = None
    given: Facts = field(default_factory=dict)  # for checkpoints: what the recipe was given
    _adapters: dict[str, AdapterFolder] = field(default_factory=dict)
    _row_sets: list[RowSet] = field(default_factory=list)
    _tokenizer: PreTrainedTokenizerBase | None = None
    _chosen: dict[str, Any] = field(default_factory=dict)  # by the plan, by name of the setting

    @classmethod
    def begin(
        cls,
        name: str,
        config: TrainingArguments,
        model: ModelArguments,
        data: DataArguments,
        *others: Any,
        command: Sequence[str] | None = None,
    ) -> "Stage":
        """See that the launcher fits, and that the result can be saved and uploaded.

        Random numbers begin at ``seed`` here: fresh adapters and heads are made before Trainer sets
        it. ``command`` has the words of the command, where they are not the process's own.

        Raises:
            UserError: one of these fails, or the checkpoint to resume from is not whole or of
                another run.
        """
        # The launcher first: a wrong one would do all that follows several times
        require_all_processes(config)
        require_supported(config.device)
        dtype = usable_dtype(model, config.device).dtype
        require_ddp(config, model.quantization, roles=name in OF_PPO, dtype=dtype)
        if config.process_index == 0:
            lines = device_lines(config.device, model.dtype, asked_for_cpu=config.use_cpu)
            print("\n".join(lines), flush=True)
        model = replace(model, dtype=dtype)
        if dtype == "float16":
            compute_by_dtype(config)
        if isinstance(config, PPOConfig) and config.rollout_engine == "vllm":
            if model.embeddings == "host":
                raise UserError(
                    "embeddings: host leaves the table out of what rollout_engine: vllm reads. Leave one of"
                    " them out."
                )
            require_vllm()
        # From here on the base has one name, wherever it is read
        model = replace(model, model_name_or_path=resolve(model.model_name_or_path))
        stage = cls(name, config, model, data, others, command)
        # The folder: beside all inputs, this process's alone, with nothing of others in the way
        output_dir = config.output_dir or "."
        begin_in(output_dir, name, config, model, data, *others, writes=config.process_index == 0)
        # What is to be resumed, and where the result goes
        parents = {setting: stage.adapter(setting) for setting in ("policy_adapter", "reward_adapter")}
        stage.given = given_facts(config, model, data, *others, parents=parents)
        # Members of an ensemble go on from folders of their own
        alone = replace(config, resume_from_checkpoint=None) if stage.has_members else config
        stage.checkpoint = starting_point(
            alone,
            name,
            model,
            stage.given,
            parents["reward_adapter" if name == "reward" else "policy_adapter"],
            rules=config.resume_rules if isinstance(config, PPOConfig) else SettingRules(),
        )
        if config.process_index == 0:
            terminal.log_into(Path(output_dir) / LOG_FILE, anew=stage.checkpoint is None, later=True)
        # An upload that cannot succeed is told before the training, not after it
        hub.check_upload(config, model)
        set_seed(config.seed)
        return stage

    @property
    def has_members(self) -> bool:
        """Whether the stage trains several reward models, one after another."""
        return vars(self.data).get("num_members", 1) > 1

    # ---- What can be known before a weight is read ----

    def adapter(self, setting: str) -> AdapterFolder | None:
        """Open the adapter that a setting of the recipe names; None if it names none.

        Raises:
            UserError: no whole LoRA adapter there, or one for another base.
        """
        # Opened once: everything that asks later reads the same folder
        settings = (self.data, *self.others)
        named = next((vars(each)[setting] for each in settings if setting in vars(each)), None)
        if named is not None and setting not in self._adapters:
            self._adapters[setting] = AdapterFolder.open(
                setting,
                named,
                base=self.model.model_name_or_path,
                base_hub_id=self.model.base_hub_id,
            )
        return self._adapters.get(setting)

    def demonstrations(self) -> dict[str, Dataset]:
        """Read and tokenize the rows of fine-tuning: ``train``, and ``eval`` where they are named.

        Raises:
            UserError: as the rows' reader, or settings that ask for held-out rows that nobody
                names, or for another column of text.
        """
        # Settings that the rows must follow, as TRL's trainer would
        column = vars(self.config)["dataset_text_field"]
        if column != "text":
            raise UserError(
                f"dataset_text_field={column}: name the column with column_mapping: [{column}=text]."
            )
        if self.config.eval_strategy != "no" and self.data.eval_dataset_name is None:
            strategy = IntervalStrategy(self.config.eval_strategy).value
            raise UserError(
                f"eval_strategy: {strategy} needs held-out rows: name them with eval_dataset_name."
            )

        # Rows first: a broken file is told before the tokenizer is looked for.
        found = {"train": self.data.train("sft")}
        if (held_out := self.data.held_out("sft")) is not None:
            found["eval"] = held_out
        rows = {key: self._noted(row_set) for key, row_set in found.items()}
        learning = Learning.of(self.config)
        self.tell_hints(found["train"])
        self.tell_overlap(found["train"], held_out)
        return {
            key: tokenize_demonstrations(
                rows[key],
                self.tokenizer(),
                name=row_set.name,
                learning=learning,
                numbers=row_set.numbers,
            )
            for key, row_set in found.items()
        }

    def tell_hints(self, row_set: RowSet) -> None:
        """Tell what in a set of rows may be meant otherwise: one process does, of several."""
        if self.config.process_index == 0:
            tell_hints(
                row_set.rows,
                self.tokenizer(),
                name=row_set.name,
                as_chat=self.data.as_chat,
                numbers=row_set.numbers,
            )

    def tell_overlap(self, train: RowSet, held_out: RowSet | None) -> None:
        """Tell where held-out rows are among those to train on: one process does, of several."""
        if held_out is None or self.config.process_index != 0:
            return
        kept = Counter(row_lines(held_out.rows))
        seen = {line for line in row_lines(train.rows) if line in kept}
        if seen:
            logger.warning(
                "%s: %d of %d held-out rows are in %s too, and what is found on them is too good. Take them"
                " out of one of the two",
                *(held_out.name, sum(kept[line] for line in seen), len(held_out), train.name),
            )

    def _noted(self, row_set: RowSet) -> Dataset:
        self._row_sets.append(row_set)
        return row_set.rows

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, once, and tell at which tokens replies end.

        It is the one that the policy's or the reward model's stage saved, else the base's; with
        ``chat_template_path`` and ``eos_token`` where the settings have them.

        Raises:
            UserError: these two cannot be used.
        """
        if self._tokenizer is None:
            # What the stage before was trained with comes before what the base ships
            parents = [self.adapter("policy_adapter"), self.adapter("reward_adapter")]
            self._tokenizer = tokenizer_of(
                *(parent.path for parent in parents if parent),
                args=self.model,
                trust_remote_code=self._trusts_code,
            )
            self._check_tokens(self._tokenizer)
            own = vars(self.config)
            change_ends(self._tokenizer, own.get("chat_template_path"), own.get("eos_token"))
            self._tell_other_days(self._tokenizer, *parents)
            if self.config.process_index == 0:
                terminal.say(ends_text(self._tokenizer, own.get("stop_token_ids")))
        return self._tokenizer

    def _tell_other_days(self, tokenizer: PreTrainedTokenizerBase, *parents: AdapterFolder | None) -> None:
        """Tell which adapter was trained under another day than the chat template writes here."""
        day = template_date(tokenizer)
        for parent in parents:
            before = None if parent is None else parent.lineage.get("template_date")
            if None not in (day, before) and before != day:
                logger.warning(
                    "%s was trained under a chat template that writes %s; this stage writes %s",
                    *(parent, before, day),
                )

    def _check_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError for a token among the settings that the tokenizer does not have."""
        settings, known = vars(self.config), tokenizer.get_vocab()
        for name in ("pad_token", "eos_token"):
            token = settings.get(name)
            if token is not None and token not in known:
                raise UserError(
                    f"{name}={token!r}: the tokenizer of {self.model.model_name_or_path} has no such token."
                    " Use one that it has, or leave it out."
                )
        require_tokens(tokenizer, settings.get("stop_token_ids"), self.model.model_name_or_path)

    def prompts(
        self,
        *,
        held_out: bool = True,
        pretraining: str | None = None,
        pretraining_length: int = 512,
    ) -> Prompts:
        """Read and tokenize the prompts of PPO, and the text of PPO-ptx.

        Raises:
            UserError: rows that cannot be read, held-out prompts or text that settings ask for and
                nobody names, or fewer prompts than a rollout needs.
        """
        config = self.config
        assert isinstance(config, PPOConfig)
        # Settings that need each other
        if (config.ptx_coef > 0) != (pretraining is not None):
            raise UserError(
                f"ptx_coef={config.ptx_coef:g}: PPO-ptx needs a weight above 0 and pretraining text: set"
                " ptx_dataset_name too."
            )
        if held_out and config.eval_strategy != "no" and self.data.eval_dataset_name is None:
            strategy = IntervalStrategy(config.eval_strategy).value
            raise UserError(
                f"eval_strategy: {strategy} needs held-out prompts: name them with eval_dataset_name."
            )

        # Rows first: a broken file is told before the tokenizer is looked for.
        train = self.data.train("ppo")
        others = self.data.held_out("ppo") if held_out else None
        tokenizer = self.tokenizer()
        self.tell_hints(train)
        self.tell_overlap(train, others)
        prompts = self._tokenized(train, config.max_prompt_tokens)
        evaluation = None if others is None else self._tokenized(others, config.max_prompt_tokens)
        texts = None
        if pretraining is not None:
            texts = tokenize_texts(
                self.data.beside(pretraining).rows,
                tokenizer,
                name=pretraining,
                max_length=pretraining_length,
            )

        # Are there enough for one rollout?
        size = config.rollout_batch_size // config.num_generations
        RolloutBatches(len(prompts), size, 1, seed=0, num_processes=config.world_size)
        return Prompts(prompts, evaluation, texts)

    def _tokenized(self, row_set: RowSet, limit: int) -> Dataset:
        rows = self._noted(row_set)
        return tokenize_prompts(
            rows,
            self.tokenizer(),
            name=row_set.name,
            max_prompt_tokens=limit,
            numbers=row_set.numbers,
        )

    def check_fit(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *adapters: AdapterFolder | None,
        tokens: int | None = None,
        chat: bool = False,
    ) -> None:
        """Compare adapters, tokenizer and lengths with the base's configuration."""
        check_fit(
            self.model,
            tokenizer,
            adapters,
            tokens=tokens,
            chat=chat,
            trust_remote_code=self._trusts_code,
        )

    def memory_plan(
        self,
        policy: AdapterFolder | None,
        reward: AdapterFolder | None,
        *,
        prompt_tokens: int,
        pretraining_length: int,
        force: bool,
    ) -> None:
        """Print what the run takes, phase by phase.

        Raises:
            UserError: it does not fit, and ``force`` is not set.
        """
        config = self.config
        assert isinstance(config, PPOConfig)
        # All processes decide alike, and those on a CPU have one memory
        memory = free_bytes(config.device)
        if config.device.type == "cpu":
            memory //= processes_here(config)
        memory = smallest_anywhere(memory, config)
        # A run that goes on keeps what it chose before, whatever the card
        if self.checkpoint is not None:
            self._chosen = kept(self.checkpoint, self.given["settings"])
            told = [f"{name}: {value}" for name, value in self._chosen.items() if vars(config)[name] != value]
            if told:
                self.say(f"kept from the checkpoint: {', '.join(told)}")
        try:
            plan = plan_run(
                self.model,
                self._with_chosen(config),
                policy=policy,
                reward=reward,
                prompt_tokens=prompt_tokens,
                ptx_tokens=pretraining_length,
                memory=memory,
                device=config.device.type,
            )
        except UserError as error:
            if not force:
                raise
            terminal.say(f"{error} It is set.")
            return
        # All processes count alike; one of them tells
        if config.process_index == 0:
            terminal.say(plan.report(memory))
        if not force:
            ways.check(plan, memory)
        # The trainer sees what is free for a copy, and not what the run needs beside it
        self._chosen = {
            "rollout_weights": plan.rollout_weights,
            "local_rollout_forward_batch_size": plan.sizes.rollout_rows,
        }

    def _with_chosen(self, config: PPOConfig) -> PPOConfig:
        """Return the settings with what was chosen for those that leave it to the memory."""
        # A copy: the checkpoint and the lineage note what was asked
        config = copy.copy(config)
        for name, value in self._chosen.items():
            setattr(config, name, value)
        return config

    # ---- The base ----

    def base(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Load the frozen base as a causal language model."""
        self._say_loading()
        base = load_base(
            self.model, tokenizer, device=self.config.device, trust_remote_code=self._trusts_code
        )
        self._open_log()
        return base

    def reward_base(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Load the same base as a sequence classifier with one output."""
        self._say_loading()
        base = load_reward_base(
            self.model, tokenizer, device=self.config.device, trust_remote_code=self._trusts_code
        )
        self._open_log()
        return base

    def _open_log(self) -> None:
        """Begin the file of the log: a run that is refused before leaves its folder as it was."""
        if self.config.process_index == 0:
            claim(self.config.output_dir or ".", LOG_FILE)
            terminal.open_log()

    def lora(self, base: PreTrainedModel, start: AdapterFolder | None) -> LoraConfig:
        """Return the configuration of the adapter that SFT or the reward model trains.

        It is that of the adapter to go on from, else a fresh one's as the settings say.
        """
        task = "SEQ_CLS" if self.name == "reward" else "CAUSAL_LM"
        if start is None:
            return lora_config(
                self.model, base, task, modules_to_save=["score"] if task == "SEQ_CLS" else None
            )
        # Its own rank and layers; the settings are for fresh adapters, which is told
        config = plain_config(start)
        config.task_type = task
        given = {"lora_r": self.model.lora_r, "lora_alpha": self.model.lora_alpha}
        own = {"lora_r": config.r, "lora_alpha": config.lora_alpha}
        usual = {each.name: each.default for each in fields(ModelArguments)}
        for name, value in given.items():
            if value not in (own[name], usual[name]):
                logger.warning(
                    "%s=%s is for fresh adapters; %s goes on with %s", name, value, start, own[name]
                )
        return config

    def start_from(self, trainer: Trainer, start: AdapterFolder | None) -> None:
        """Put a trainer's adapter into fp32, and give it the weights to go on from.

        TRL rounds adapters on a quantized base to bf16 as it is made, so saved weights come after.
        """
        adapters_to_fp32(trainer.model)
        if start is not None:
            load_weights(cast(PeftModel, trainer.model), "policy", start)

    def say(self, text: str) -> None:
        """Print lines for the user, and log them: one process does, of several."""
        if self.config.process_index == 0:
            terminal.say(text)

    def _say_loading(self) -> None:
        model = self.model
        self.say(f"loading {model.model_name_or_path}, {model.quantization}, {model.dtype}")

    @property
    def trainer_config(self) -> Any:
        """The settings for the trainer, whose own uploads are off: this class uploads."""
        config: Any = hub.without_trainers_push(self.config)
        # ``tokenizer`` has put the template on it; TRL would add a folder's tokens to the base
        if vars(config).get("chat_template_path"):
            config.chat_template_path = None
        # These orders go by a column that the collator of pairs does not read
        if self.name == "reward" and config.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            config.remove_unused_columns = False
        return self._with_chosen(config)

    @property
    def _trusts_code(self) -> bool:
        return bool(vars(self.config).get("trust_remote_code"))

    # ---- The end ----

    @property
    def _left(self) -> list[str]:
        """Names of what is written beside the adapter, and beside those of its roles."""
        names = ["goose_lora.json", "README.md", "stage.json"]
        if self.name in OF_PPO:
            names.append("report.html")
            folder = Path(self.config.output_dir or ".")
            names += [f"{role}/goose_lora.json" for role in ADAPTERS.values() if (folder / role).is_dir()]
        return names

    def finish(
        self,
        trainer: Trainer,
        *,
        parents: Mapping[str, AdapterFolder | None] | None = None,
        figures: Mapping[str, Any] | None = None,
        data: Sequence[Mapping[str, Any]] | None = None,
        history: list[dict[str, Any]] | None = None,
    ) -> None:
        """Leave what the stage has made, on one process: see ``leave``. PPO saves its policy here.

        Args:
            parents: the adapters that the stage started from, by role.
            figures: the stage's own; those of recipes/ppo.py are read from its metrics.
            data: fingerprints of the rows; those that this stage has read if not given.
            history: the rows of the log; the trainer's own if not given.
        """
        if not trainer.is_world_process_zero():
            return
        folder = Path(self.config.output_dir or ".")
        # What Trainer has is what was trained with
        tokenizer: Any = trainer.processing_class
        history = history or trainer.state.log_history
        findings: list[str] | None = None
        said = ""
        # PPO: the policy beside its roles; SFT and reward model were saved by their recipes
        if isinstance(trainer, PPOTrainer):
            save_policy(trainer.shared, tokenizer, folder)
            history = None  # metrics.jsonl has it
        if self.name == "ppo":
            claim(folder, "curves.png")
            figures, findings, said = _read_metrics(folder)
        self.leave(
            tokenizer,
            figures=figures or {},
            data=data or [row_set.fingerprint for row_set in self._row_sets],
            parents=parents or {},
            findings=findings,
            chosen=trainer.chosen() if isinstance(trainer, PPOTrainer) else None,
            history=history,
        )
        # Last: what a console cannot show costs no result
        if said:
            terminal.say(f"\n{said}")
        terminal.say(_what_next(self.name, folder))
        terminal.log_into(None)

    def record(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        figures: Mapping[str, Any],
        data: Sequence[Mapping[str, Any]],
        parents: Mapping[str, AdapterFolder | None] | None = None,
        **facts: object,
    ) -> None:
        """Write the lineage of an adapter of this stage, in whichever folder it is."""
        lineage.record(
            folder,
            self.name,
            model=self.model,
            tokenizer=tokenizer,
            settings=[self.config, self.data, *self.others],
            data=data,
            parents={role: parent and parent.path for role, parent in (parents or {}).items()},
            command=lineage.recorded_command(self.name, self.command),
            figures=figures,
            **facts,
        )

    def leave(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        figures: Mapping[str, Any],
        data: Sequence[Mapping[str, Any]],
        parents: Mapping[str, AdapterFolder | None],
        findings: Sequence[str] | None = None,
        chosen: Facts | None = None,
        history: list[dict[str, Any]] | None = None,
    ) -> None:
        """Write lineage, card, page and ``stage.json`` beside what is saved; upload if asked to.

        The lineage comes before the card, which reads it, and ``stage.json`` last: it says that all
        is there.
        """
        folder = Path(self.config.output_dir or ".")
        # Lineage: where the result comes from, and what it took
        claim(folder, *self._left, *([] if history is None else ["metrics.jsonl"]))
        everything = {**figures, **cost()}
        facts = {"findings": findings, "chosen": chosen}
        facts = {name: value for name, value in facts.items() if value is not None}
        self.record(folder, tokenizer, figures=everything, data=data, parents=parents, **facts)
        # For readers: a card, and a page of a PPO run
        with only_looks("README.md"):
            model_card.write_card(folder)
        if self.name in OF_PPO:
            with only_looks("report.html"):
                html_report.write_report(folder)
        # Last, what says that all is there; and only what is whole is uploaded
        write_stage(str(folder), self.name, everything, history)
        hub.push_result(self.config, self.model)
        release(folder)


def _what_next(stage: str, folder: Path) -> str:
    """Return the lines that end a stage: where its result is, and what to do with it."""
    lines = [f"\nSaved in {folder}"]
    if stage in OF_PPO:
        talk = shlex.join(["goose-lora", "chat", str(folder)])
        lines += [f"Report:  {folder / 'report.html'}", f"Talk:    {talk}"]
    return "\n".join(lines)


def _read_metrics(folder: Path) -> tuple[dict[str, float], list[str], str]:
    """Draw the curves of a PPO run; return its figures, its findings and its diagnosis as text."""
    metrics = read_jsonl(folder / "metrics.jsonl")
    # Weights are saved by now, and what only shows them must not cost their lineage
    findings: list[str] = []
    text = ""
    with only_looks("curves.png"):
        plot_curves(metrics, str(folder / "curves.png"))
    with only_looks("the diagnosis"):
        text = diagnosis_text(metrics, brief=True)
        findings = [str(finding) for finding in diagnose(metrics) if finding.level != "ok"]
    # Rows of held-out prompts have no score of a rollout
    last = next((row for row in reversed(metrics) if "objective/score" in row), {})
    return {name: last[name] for name in FIGURES if name in last}, findings, text
