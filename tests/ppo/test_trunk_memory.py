"""Where the states of a rollout wait for the update: on the device, or in the host's memory."""

import pytest
import tiny
import tiny_runs
import torch
from tiny_runs import trained_parameters, trainer

from goose_lora.models.trunk import Capture, decoder_layers
from goose_lora.ppo import collector


def ends_at(folder, **changes):
    run = trainer(folder, **changes)
    run.train()
    return trained_parameters(run.shared)


def test_a_run_from_the_hosts_memory_is_the_run(tmp_path):
    want = ends_at(tmp_path / "device", trunk_memory="device")
    got = ends_at(tmp_path / "host", trunk_memory="host")
    assert all(torch.equal(parameter, want[name]) for name, parameter in got.items()) and len(got) > 10


@pytest.mark.gpu
def test_on_a_gpu_the_states_wait_on_the_host_and_the_run_is_the_same(tmp_path):
    want = ends_at(tmp_path / "device", trunk_memory="device", use_cpu=False)
    run = trainer(tmp_path / "host", trunk_memory="host", use_cpu=False)
    evaluate, places = run.collector.evaluate, []
    run.collector.evaluate = lambda *args, **kwargs: places.append(evaluate(*args, **kwargs)) or places[-1]
    run.train()
    assert {seen.trunk.device.type for seen in places} == {"cpu"} and {
        seen.logprobs.device.type for seen in places
    } == {"cuda"}
    for name, parameter in trained_parameters(run.shared).items():
        torch.testing.assert_close(parameter, want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "share", "want"),
    [("device", 2.0, "meta"), ("auto", 0.6, "cpu"), ("auto", 0.4, "meta"), ("host", 0.0, "cpu")],
)
def test_auto_takes_the_host_where_the_states_need_more_than_half_of_what_is_left(
    setting, share, want, tmp_path, monkeypatch
):
    run = trainer(tmp_path, trunk_memory=setting).collector
    # Rows, columns, hidden size, bytes, and a trunk each for policy and critic
    need = 4 * 10 * tiny.HIDDEN * 4 * 2
    run.shared.kept_trunks = lambda: 2
    monkeypatch.setattr(collector, "free_bytes", lambda device: need / share if share else 10**12)
    run.shared.get_base_model().to("meta")
    assert run._keep_on(4, 10).type == want


def test_trunks_that_are_kept_are_counted():
    shared = tiny_runs.fresh()
    assert (
        shared.kept_trunks()
        == len({id(x) for x in shared.trunks(*tiny.batch(), ["policy", "value"]).values()})
        == 1
    )
    assert tiny_runs.fresh(layers="all").kept_trunks() == 0


def test_states_are_noted_where_they_are_to_wait():
    layers = decoder_layers(tiny.base())
    capture = Capture(layers, 2, 8, keep_on=torch.device("meta"))
    capture.note(layers[1], (), torch.ones(2, 3, tiny.HIDDEN))
    assert capture.states.device.type == "meta" and capture.states.shape == (2, 8, tiny.HIDDEN)


def test_states_that_leave_the_device_are_those_that_stay(monkeypatch):
    layers, parts = decoder_layers(tiny.base()), torch.randn(3, 9, tiny.HIDDEN).split([4, 1, 1, 3], dim=1)
    stay, leave = Capture(layers, 2, 7), Capture(layers, 2, 7, keep_on=torch.device("cpu", 0))
    for part in parts:
        stay.note(layers[1], (), part)
        leave.note(layers[1], (), part)
    leave.wait()
    assert leave._from == torch.device("cpu"), "another name of the device stands for another device"
    assert torch.equal(leave.states, stay.states) and stay.states.any(-1).all()
    assert not leave.states.is_contiguous()
