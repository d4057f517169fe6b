"""Uploads to the Hub.

The right to write is checked before a run, and a named list of files goes up after it. A failed
upload is a warning. Trainer's own uploads are off: they would send whatever lies in the output
folder, and end a run that has only lost its connection.
"""

import copy
import json
import logging
import shlex
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from goose_lora.errors import FailedWriteError, UserError
from goose_lora.files import read_json
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.ensembles import MEMBERS_FILE
from goose_lora.models.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LINEAGE,
    NAMED_TEMPLATES,
    base_place,
    write_lineage,
)
from goose_lora.models.roles import ADAPTERS
from goose_lora.reporting.run_files import Lineage, lineage_of
from goose_lora.sharing import model_card

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings", bound=TrainingArguments)

# What goes up, and nothing else: no checkpoint, no optimizer, no pickle, and not samples.jsonl,
# whose prompts may be nobody else's business.
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, LINEAGE, "verdict.json")
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    f"{NAMED_TEMPLATES}/*.jinja",
)
RUN_FILES = ("README.md", "stage.json", "metrics.jsonl", "evaluation.json", "curves.png")
# The end of each message about a broken connection.
_LATER = "Try again, or upload later with goose-lora push."
# Roles that --include can name: each has a folder of its own below the policy's.
OTHER_ROLES = tuple(role for role in ADAPTERS if role != "policy")


# ---- Before a run ----


def check_upload(config: TrainingArguments, model: ModelArguments) -> None:
    """Check that the upload at the end of a run can succeed, before anything is loaded.

    Makes the repository if there is none. Does nothing without ``push_to_hub``.

    Raises:
        UserError: no repository is named, the base is a folder, the token is not valid or may not
            write, or the Hub is out of reach.
    """
    if not config.push_to_hub:
        return
    if config.hub_model_id is None:
        raise UserError("push_to_hub: true needs the repository's name: hub_model_id: user/name.")
    # Checkpoints have the optimizer's state, which is of no use to others
    strategy = HubStrategy(config.hub_strategy)
    if strategy not in (HubStrategy.EVERY_SAVE, HubStrategy.END):
        raise UserError(
            f"hub_strategy: {strategy.value}: checkpoints are never uploaded; the result is, once, at the"
            " end. Leave it out."
        )
    require_hub_base(model.base_hub_id or model.model_name_or_path)
    authorize(config.hub_model_id, token=config.hub_token, private=config.hub_private_repo)


def without_trainers_push(config: Settings) -> Settings:
    """Return the settings for a Trainer, with its own uploads off."""
    # A copy, since the run's own settings still ask for the upload
    quiet = copy.copy(config)
    quiet.push_to_hub = False
    return quiet


def require_hub_base(base: str, *, is_folder: bool = False) -> None:
    """Raise UserError if ``base`` is a folder: who downloads the adapter does not have it.

    ``is_folder`` says so of one that is not here.
    """
    if is_folder or Path(base).exists() or Path(base).is_absolute():
        raise UserError(
            f"the base is the folder {base}, which nobody else has. Say what it is on the Hub: --base_hub_id"
            " user/model."
        )


def authorize(repo: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Return the full name of ``repo``, to which this token may write; make it if it is not there.

    Raises:
        UserError: the name, the token, its rights or the connection will not do, with a way out.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(str(error)) from error
    if constants.is_offline_mode():
        raise UserError(
            "nothing can be uploaded with HF_HUB_OFFLINE=1. Unset it, or upload later with goose-lora push."
        )
    api = HfApi(token=token)
    user = _user_of_token(api)
    try:
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        api.auth_check(name, write=True)
    except HfHubHTTPError as error:
        # The Hub answers 404 for a repository that this token may not see
        if _status(error) in (401, 403, 404):
            raise UserError(
                f"{user}'s token may not write to {repo}. Use one with the right to write, or a repository of"
                f" {user}."
            ) from error
        raise UserError(f"{repo} could not be made ready for an upload ({_reason(error)}).") from error
    except Exception as error:  # whatever the HTTP library raises
        raise UserError(f"the connection to {api.endpoint} broke ({_reason(error)}). {_LATER}") from error
    return name


def _user_of_token(api: HfApi) -> str:
    """Return the name of the token's user; raise UserError for a token that will not do."""
    try:
        return api.whoami()["name"]
    except LocalTokenNotFoundError as error:
        raise UserError(
            "there is no Hub token. Make one that may write (https://huggingface.co/settings/tokens), then:"
            " hf auth login."
        ) from error
    except HfHubHTTPError as error:
        why = f"could not be checked ({_reason(error)})"
        if _status(error) == 401:
            why = "is not valid. Make a new one, then: hf auth login"
        raise UserError(f"the Hub token {why}.") from error
    except Exception as error:  # whatever the HTTP library raises
        raise UserError(
            f"the Hub could not be reached at {api.endpoint} ({_reason(error)}). {_LATER}"
        ) from error


# ---- After a run ----


def files_to_upload(folder: str | Path, include: Sequence[str] = ()) -> list[str]:
    """Return the paths below ``folder`` that an upload takes.

    They are the result at its root, and the roles of ``include`` in folders of their own.

    Raises:
        UserError: a role is unknown or not there, or ``folder`` has no adapter and no model.
    """
    folder = Path(folder)
    for role in include:
        if role not in OTHER_ROLES:
            raise UserError(f"--include {role}: no such role. There are {', '.join(OTHER_ROLES)}.")
        if not (folder / role / ADAPTER_CONFIG).is_file():
            raise UserError(f"--include {role}: {folder} has no adapter {role}/.")
        _refuse_members(folder / role)
    _refuse_members(folder)
    names: list[str] = []
    if folder.is_dir():
        files = [path for path in (*folder.iterdir(), *folder.glob(f"{NAMED_TEMPLATES}/*")) if path.is_file()]
        names = sorted(path.relative_to(folder).as_posix() for path in files)
    if ADAPTER_CONFIG not in names and "config.json" not in names:
        raise UserError(
            f"{folder} has no {ADAPTER_CONFIG} and no config.json: nothing to upload. Give the"
            " output_dir of a stage, run to its end."
        )
    # What is not named stays here
    allowed = (*ADAPTER_FILES, *TOKENIZER_FILES, *RUN_FILES, *MODEL_FILES)
    found = [name for name in names if any(fnmatch(name, pattern) for pattern in allowed)]
    return found + [
        f"{role}/{name}" for role in include for name in ADAPTER_FILES if (folder / role / name).is_file()
    ]


def _refuse_members(folder: Path) -> None:
    """Raise UserError for an ensemble, of which an upload would take the first member alone."""
    if (folder / MEMBERS_FILE).is_file():
        raise UserError(
            f"{folder} is an ensemble ({MEMBERS_FILE}), and goose-lora push takes one adapter. Push a member,"
            f" such as {folder / 'member_0'}, or all with hf upload user/repo {shlex.quote(str(folder))}: it"
            " loads as user/repo."
        )


def push(
    folder: str | Path,
    repo: str | None = None,
    *,
    include: Sequence[str] = (),
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    base_hub_id: str | None = None,
) -> str:
    """Upload the output in ``folder`` as one commit; return the repository's address.

    Lineage and card in ``folder`` note where it went.

    Raises:
        UserError: no repository is named, or what ``check_upload`` raises.
        OSError: the upload itself failed.
    """
    # What goes up, and where: all of it is known before the Hub is asked
    folder = Path(folder)
    paths = files_to_upload(folder, include)
    lineage = lineage_of(folder)
    repo = repo or model_card.hub_repo(lineage)
    if repo is None:
        raise UserError(f"{folder} was made without hub_model_id. Name the repository: --repo user/name.")
    noted_base = lineage.get("base")
    base = _base_of(folder, lineage)
    known = base_hub_id
    if not known and noted_base:
        known = noted_base.get("hub_id")
    if base is not None:
        # Seen from another directory, a relative folder looks like a name of the Hub
        moved = not known and noted_base and base_place(folder, noted_base) != noted_base["id"]
        require_hub_base(known or base, is_folder=bool(moved))
    name = authorize(repo, token=token, private=private)

    # The files here come to know the repository, before they are read for the upload
    if noted_base:
        write_lineage(folder, **{**lineage, "hub_repo": name, "base": {**noted_base, "hub_id": known}})
        model_card.refresh_card(folder)

    operations = [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=_for_the_hub(folder / path, base, known))
        for path in paths
    ]
    api = HfApi(token=token)
    try:
        api.create_commit(
            name,
            operations,
            commit_message=f"Upload of {folder.name} by goose_lora",
            revision=revision,
        )
    except Exception as error:  # the Hub's errors, those of its HTTP library, and RuntimeError around either
        raise FailedWriteError(f"the upload to {name} failed: {_reason(error)}") from error
    return f"{api.endpoint}/{name}"


def push_result(config: TrainingArguments, model: ModelArguments) -> str | None:
    """Upload a run's output if ``push_to_hub`` asks for it; return the repository's address.

    A failure is a warning, with the command that tries again.
    """
    if not config.push_to_hub:
        return None
    try:
        return push(
            str(config.output_dir),
            config.hub_model_id,
            base_hub_id=model.base_hub_id,
            private=config.hub_private_repo,
            token=config.hub_token,
            revision=config.hub_revision,
        )
    except (ValueError, OSError) as error:  # whatever it is, the run has its result
        reason = " ".join(str(error).split())
        logger.warning(
            "%s\nEverything is saved in %s. To upload it:\n  %s",
            reason,
            config.output_dir,
            _push_command(config, model),
        )
        return None


def _push_command(config: TrainingArguments, model: ModelArguments) -> str:
    words = ["goose-lora", "push", str(config.output_dir), "--repo", str(config.hub_model_id)]
    if config.hub_private_repo:
        words.append("--private")
    if config.hub_revision:
        words += ["--revision", config.hub_revision]
    if model.base_hub_id:
        words += ["--base_hub_id", model.base_hub_id]
    return shlex.join(words)


def _base_of(folder: Path, lineage: Lineage) -> str | None:
    """Return the base as the files name it, None for merged weights, which need none."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    return read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or lineage["base"]["id"]


def _for_the_hub(path: Path, base: str | None, hub_id: str | None) -> Path | bytes:
    """Return a file as it goes up: a base that is a folder here has the Hub's name there."""
    if not hub_id or not base or path.name not in (ADAPTER_CONFIG, LINEAGE):
        return path
    content = _with_replaced(read_json(path), base, hub_id)
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _with_replaced(content: object, old: str, new: str) -> object:
    """Return JSON in which each string ``old`` is ``new``, at any depth."""
    if isinstance(content, dict):
        return {key: _with_replaced(value, old, new) for key, value in content.items()}
    if isinstance(content, list):
        return [_with_replaced(value, old, new) for value in content]
    return new if content == old else content


def _status(error: HfHubHTTPError) -> int | None:
    return error.response.status_code if error.response is not None else None


def _reason(error: BaseException) -> str:
    """Return the first 200 characters of an error and of its cause, in one line."""
    lines = []
    for one in (error, error.__cause__):
        if one is not None:
            lines.append(" ".join(str(one).split())[:200] or type(one).__name__)
    return ": ".join(dict.fromkeys(lines))
