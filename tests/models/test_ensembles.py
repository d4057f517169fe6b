"""The manifest of reward models that score as one."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from goose_lora.errors import UserError
from goose_lora.files import file_sha256
from goose_lora.models.ensembles import MEMBERS_FILE, Member, RewardEnsemble, read_ensemble

MEMBERS = (Member(".", "", 1.0, 2.0, 0, True), Member("member_1", "", -3.0, 4.0, 1))
ENSEMBLE = RewardEnsemble("adapters", 3.0, -1.0, MEMBERS, "min", 0.5)


def written(folder, ensemble=ENSEMBLE):
    members = []
    for place, member in enumerate(ensemble.members):
        path = folder / member.folder / "adapter_model.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"weights {place}")
        members.append(replace(member, sha256=file_sha256(path)))
    replace(ensemble, members=tuple(members)).write(folder)
    return folder


def test_what_was_written_is_read(tmp_path):
    assert read_ensemble(tmp_path) is None
    found = read_ensemble(written(tmp_path))
    assert replace(found, members=MEMBERS) == ENSEMBLE
    assert [member.folder for member in found.members] == [".", "member_1"]


def test_members_are_counted_in_their_own_spread_and_the_whole_in_their_mean():
    scores = [torch.tensor([1.0, 5.0]), torch.tensor([1.0, -3.0])]
    whole, apart = ENSEMBLE.score(scores)  # (0, 2) and (1, 0) spreads
    assert whole.tolist() == [-1.0, -1.0]
    assert apart.tolist() == [0.5, 1.0]
    assert replace(ENSEMBLE, aggregation="mean").score(scores)[0].tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"kind": "trees"},
        {"aggregation": "median"},
        {"scale": 0},
        {"scale": "3"},
        {"shift": float("nan")},
        {"members": []},
        {"members": [{"folder": "."}]},
        {"members": [asdict(MEMBERS[0]), asdict(MEMBERS[1]), asdict(MEMBERS[1])]},
        {"surplus": 1},
        {"members": 3},
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, change):
    path = written(tmp_path) / MEMBERS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"members\.json: damaged, or of another version"):
        read_ensemble(tmp_path)


@pytest.mark.parametrize("folder", ["/etc", "../../other", "member_1/below", "..", "."])
def test_a_member_lies_in_the_folder_or_beside_it(tmp_path, folder):
    path = written(tmp_path) / MEMBERS_FILE
    content = json.loads(path.read_text())
    content["members"][1]["folder"] = folder
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged"):
        read_ensemble(tmp_path)
