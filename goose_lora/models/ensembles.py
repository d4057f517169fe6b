"""Several reward models on one base that score as one: ``members.json`` beside the first of them.

The folder is the first member itself, which loads alone as any reward model does; the file names
where the others are, and on which scale all of them are compared.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from goose_lora.errors import UserError
from goose_lora.files import file_sha256, is_number, read_json_object, write_json
from goose_lora.functional import Aggregation, aggregate_scores, disagreement
from goose_lora.models.roles import REWARD_ROLES

MEMBERS_FILE = "members.json"
MOST_MEMBERS = len(REWARD_ROLES)
MEMBERS_FORMAT = 1
MemberKind = Literal["adapters", "heads"]
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Member:
    """A reward model of an ensemble.

    Attributes:
        folder: where it is, from the folder of ``members.json``; ``.`` for that folder itself.
        sha256: of its weights.
        origin: the score, less the member's own bias, that counts as 0 among the members: its mean
            over the best held-out replies, or 0 where there are references.
        spread: the standard deviation of its scores of those replies.
        seed: that it was trained with.
        augmented: whether it has seen the pairs of ``augment_pairs``.
    """

    folder: str
    sha256: str
    origin: float
    spread: float
    seed: int = 0
    augmented: bool = False


@dataclass(frozen=True)
class RewardEnsemble:
    """The members of an ensemble, and the scale on which they score as one.

    A score is ``shift + scale * aggregate((score_k - origin_k) / spread_k)``: each member is
    counted in its own spread, and the result in their mean spread, so that K equal members score as
    one.

    Attributes:
        kind: adapters: each member has LoRA of its own; heads: all have the first one's.
        aggregation, uncertainty_coef: of ``functional.aggregate_scores``.
    """

    kind: MemberKind
    scale: float
    shift: float
    members: tuple[Member, ...]
    aggregation: Aggregation = "mean"
    uncertainty_coef: float = 1.0

    def aligned(self, place: int, scores: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Return a member's scores, less its own bias, in the units of all."""
        member = self.members[place]
        return self.shift + self.scale * (scores - member.origin) / member.spread

    def score(self, scores: Sequence[Float[Tensor, " B"]]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return the score of all members, and their disagreement in units of their spread."""
        aligned = torch.stack([self.aligned(place, own) for place, own in enumerate(scores)])
        whole = aggregate_scores(
            aligned, aggregation=self.aggregation, uncertainty_coef=self.uncertainty_coef
        )
        return whole, disagreement(aligned) / self.scale

    def by(self, aggregation: Aggregation | None, uncertainty_coef: float | None) -> "RewardEnsemble":
        """Return the same members under another aggregation, where one is given."""
        coef = self.uncertainty_coef if uncertainty_coef is None else uncertainty_coef
        return replace(self, aggregation=aggregation or self.aggregation, uncertainty_coef=coef)

    def write_beside(self, first: Path, names: Sequence[str]) -> None:
        """Write ``members.json`` into the folder of the first member; the others lie beside it."""
        members = [
            replace(
                member,
                folder=f"../{name}" if place else ".",
                sha256=file_sha256(first.parent / name / _WEIGHTS),
            )
            for place, (member, name) in enumerate(zip(self.members, names, strict=True))
        ]
        replace(self, members=tuple(members)).write(first)

    def write(self, folder: str | Path) -> None:
        """Write ``members.json``."""
        content = {
            "format": MEMBERS_FORMAT,
            **asdict(self),
            "members": [asdict(member) for member in self.members],
        }
        write_json(Path(folder) / MEMBERS_FILE, content)


def read_ensemble(folder: str | Path) -> RewardEnsemble | None:
    """Return the ensemble in ``folder``; None where it is one reward model, or none.

    Raises:
        UserError: ``members.json`` is damaged, a member is missing, or its weights are others.
    """
    path = Path(folder) / MEMBERS_FILE
    if not path.is_file():
        return None
    found = _read(path, read_json_object(path))
    for member in found.members:
        weights = path.parent / member.folder / _WEIGHTS
        if not weights.is_file():
            raise UserError(f"{path}: the member {member.folder} has no {_WEIGHTS}. {_WAY_OUT}")
        if file_sha256(weights) != member.sha256:
            raise UserError(
                f"{path}: {weights} is not the one that it was written with, so that the members' scale is"
                f" not known. {_WAY_OUT}"
            )
    return found


def member_folders(folder: str | Path) -> list[str]:
    """Return where the further members of an ensemble are to be, from its folder; [] for none.

    Raises:
        UserError: ``members.json`` is damaged.
    """
    path = Path(folder) / MEMBERS_FILE
    if not path.is_file():
        return []
    return [member.folder for member in _read(path, read_json_object(path)).members[1:]]


_WAY_OUT = (
    "Copy the whole folder again, train it again, or give one member's folder in its place, such as member_0."
)


def _read(path: Path, content: dict[str, Any]) -> RewardEnsemble:
    """Return what ``members.json`` says, if it can be."""
    try:
        members = tuple(Member(**member) for member in content["members"])
        settings = {name: value for name, value in content.items() if name not in ("format", "members")}
        found = RewardEnsemble(members=members, **settings)
        numbers = [found.scale, found.shift, found.uncertainty_coef]
        numbers += [number for member in members for number in (member.origin, member.spread)]
        spreads = [found.scale, *(member.spread for member in members)]
        sound = (
            content["format"] == MEMBERS_FORMAT
            and found.kind in get_args(MemberKind)
            and found.aggregation in get_args(Aggregation)
            and 2 <= len(members) <= MOST_MEMBERS
            and all(map(is_number, numbers))
            and min(spreads) > 0
            and members[0].folder == "."
            and len({Path(member.folder).name for member in members}) == len(members)
            and all(isinstance(member.sha256, str) and _is_near(member.folder) for member in members)
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(
            f"{path}: damaged, or of another version (this one reads format {MEMBERS_FORMAT}). {_WAY_OUT}"
        )
    return found


def _is_near(folder: str) -> bool:
    """Return whether a member lies in the folder, or beside it as in the result of PPO."""
    parts = Path(folder).parts
    name = parts[-1] if parts else "."
    inside = folder == "." or parts == (name,) or parts == ("..", name)
    return inside and name not in ("..", "/")
