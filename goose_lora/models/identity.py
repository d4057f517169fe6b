"""Whether two names mean the same base: by what is in it, or, where it is not here, by its names.

A base is named by a folder, a link to one, a snapshot in the Hub's cache, or its name on the Hub.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

# A folder of the Hub's cache: models--OWNER--NAME/snapshots/COMMIT, and what lies below it.
HUB_SNAPSHOT = re.compile(
    r"models--(?:(?P<owner>[^/\\]+?)--)?(?P<name>[^/\\]+)"
    r"[/\\]snapshots[/\\](?P<commit>[0-9a-f]+)(?P<rest>[/\\].*)?$"
)
_PLACE, _CONTENT = "_goose_lora_place", "_goose_lora_content"  # noted on a loaded model
_SAMPLE = 256  # bytes of each tensor that are read: fine-tuned weights have the shapes of their base


class BaseName(NamedTuple):
    """A base as settings or a lineage name it.

    ``content`` is ``base_content`` as it was when the base was used; None if that was not noted.
    """

    name: str
    hub_id: str | None = None
    content: str | None = None
    revision: str | None = None


def base_content(name: str, revision: str | None = None) -> str | None:
    """Return a hash of the base's tensors: names, dtypes, shapes, and the first bytes of each.

    How they are spread over files has no say. None if the weights are not on this machine, or
    cannot be read; nothing is downloaded.
    """
    # Only what is here can be compared by content
    folder = _folder(name, revision)
    if folder is None:
        return None
    tensors: dict[str, list[Any]] = {}
    try:
        for path in _weight_files(folder):
            with open(path, "rb") as file:
                # A safetensors file: the size of its head, the head, then the numbers
                size = int.from_bytes(file.read(8), "little")
                head = json.loads(file.read(size)) if size <= path.stat().st_size else {}
                for tensor, facts in head.items():
                    if tensor == "__metadata__":
                        continue
                    first, end = facts["data_offsets"]
                    file.seek(8 + size + first)
                    sample = file.read(min(end - first, _SAMPLE)).hex()
                    tensors[tensor] = [facts["dtype"], facts["shape"], sample]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # damaged: whoever loads it says so
    if not tensors:
        return None
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


def note_place(model: PreTrainedModel, name: str, revision: str | None) -> None:
    """Note on a loaded model where it came from: transformers keeps its name, and no revision."""
    vars(model)[_PLACE] = (name, revision)


def content_of(model: PreTrainedModel) -> str | None:
    """Return ``base_content`` of what a loaded model came from; it is computed once."""
    noted = vars(model)
    if _CONTENT not in noted:
        noted[_CONTENT] = base_content(*noted.get(_PLACE, (str(model.config.name_or_path), None)))
    return noted[_CONTENT]


def _folder(name: str, revision: str | None) -> Path | None:
    """Return where the base lies on this machine, None if it does not."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name that the Hub could have
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers loads: others may hold the same weights again."""
    # The index comes first, as it does for transformers
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    return sorted(folder.glob("*.safetensors"))


def same_base(one: BaseName, other: BaseName) -> bool:
    """Return whether both mean the same base.

    Where the contents of both are known, they decide; else a name that both have; else, for a base
    that is not here any more, the last part of its path, since bases are moved about.
    """
    # Content decides, where both sides have it
    contents = [each.content or base_content(each.name, each.revision) for each in (one, other)]
    if None not in contents:
        return contents[0] == contents[1]
    if _names(one) & _names(other):
        return True
    # Nothing can be compared: the name without its place must do
    moved = any(_folder(each.name, each.revision) is None for each in (one, other))
    return moved and last_part(one) == last_part(other)


def _names(base: BaseName) -> set[str]:
    """Return the names that mean this base: as given, the folder that it is, and its Hub id."""
    # A trailing slash and a link change nothing of what it is
    # With and without a slash, by link and by folder
    given = base.name.rstrip("/\\") or base.name
    found = {given, *([base.hub_id] if base.hub_id else [])}
    if Path(given).exists():
        found.add(str(Path(given).resolve()))
    return found | {repository for name in tuple(found) if (repository := _repository(name))}


def _repository(path: str) -> str | None:
    """Return the name on the Hub of a snapshot in the Hub's cache, None for any other folder."""
    match = HUB_SNAPSHOT.search(path)
    if match is None:
        return None
    return "/".join(part for part in (match["owner"], match["name"]) if part)


def last_part(base: BaseName) -> str:
    """Return the last part of the base's name: of its Hub id, if it has one."""
    names = [base.hub_id] if base.hub_id else []
    names += [name for name in sorted(_names(base)) if _repository(name)]
    chosen = names[0] if names else base.name
    return Path(_repository(chosen) or chosen).name
