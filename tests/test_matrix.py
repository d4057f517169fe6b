"""One PPO step on every architecture, quantization, dtype, critic and reference, with checkpointing and without.

``--full`` runs all 480 cells; otherwise two of each base are run, which hold every pair of settings.
"""

import gc
import itertools

import matrix
import pytest
import tiny
import torch

from goose_lora import loading
from goose_lora.views import before_response

# float32 sums in another order; bf16 has three digits, and the plain models round the heads' output to it too.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """Makes a base where it is not the last that was asked for."""
    architectures, last, tried = {}, {}, loading.cpu_multiplies_bf16
    loading.cpu_multiplies_bf16 = lambda: True  # takes longer to find out than to load so small a model

    def get(name, quantization, dtype):
        if name not in architectures:
            architectures[name] = matrix.Architecture(tmp_path_factory.mktemp(name), name)
        if (name, quantization, dtype) not in last:
            last.clear()
            last[name, quantization, dtype] = matrix.Base(architectures[name], quantization, dtype)
            gc.freeze()  # Trainer collects garbage at its start, for longer than it trains
        return last[name, quantization, dtype]

    yield get
    loading.cpu_multiplies_bf16 = tried
    gc.unfreeze()


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        cells = matrix.cells(metafunc.config.getoption("--full"))
        metafunc.parametrize("cell", cells, ids=["-".join([*cell[:-1], "checkpointing" if cell[-1] else "plain"]) for cell in cells])


def test_a_step_is_finite_trains_policy_and_critic_alone_and_its_views_are_those_of_plain_models(cell, base_of, tmp_path):
    *kind, critic, reference, checkpointing = cell
    assert_step(base_of(*kind), critic, reference, checkpointing, tmp_path)


def assert_step(base, critic, reference, checkpointing, folder):
    """One cell; returns the shared base after its step."""
    shared = base.step(folder, critic, reference, checkpointing)
    step = base.steps[critic, reference, checkpointing]
    assert all(torch.tensor(value).isfinite() for value in step.logged.values())
    assert_gradients(shared, step, fresh=reference == "base")
    other = base.steps.get((critic, reference, not checkpointing))
    if other is not None:
        assert step.gradients.keys() == other.gradients.keys()
        for name, gradient in step.gradients.items():
            torch.testing.assert_close(gradient, other.gradients[name], rtol=0, atol=1e-5 * max(1.0, gradient.abs().max().item()))
    shared.save_pretrained(folder / "saved")
    base.read(folder / "saved", reference, critic)
    assert_views(shared, base, critic, reference)
    return shared


def assert_gradients(shared, step, *, fresh):
    """Of policy and critic, all of them and no other; and what has one, and nothing else, is changed."""
    trained = {name for role in ("policy", "value") for name, _ in shared.role_parameters(role)}
    assert step.gradients.keys() == trained
    assert all(gradient.isfinite().all() for gradient in step.gradients.values())
    still = {name for name, gradient in step.gradients.items() if not gradient.any()}
    # B is 0 in a fresh adapter: no gradient reaches A before B has moved.
    assert still == ({name for name in trained if "lora_A.default" in name} if fresh else set())
    assert step.changed == trained - still


def assert_views(shared, base, critic, reference):
    ids, mask, response = (x.to(base.device) for x in (*tiny.batch((9, 6, 8)), tiny.response_mask((4, 4, 4))))
    tolerance = TOLERANCE[base.dtype]
    seen = {}
    with torch.no_grad():
        for role, adapter in (("policy", "policy"), ("reference", "reference" if reference == "copy" else None)):
            got, _ = shared.logprobs(shared.hidden(role, ids, mask), ids, response)
            seen[role] = got[response]
            close(seen[role], base.logprobs(adapter, ids, mask, response), tolerance)
        seen["reward"] = shared.scores(ids, mask)
        close(seen["reward"], base.scores("reward", ids, mask), tolerance)
        values = shared.values(shared.hidden(shared.value_states, ids, mask), response)
        if critic == "adapter":  # the last value is read where the score of the text without its last token is
            close(values[:, -1], base.scores("value", ids[:, :-1], mask[:, :-1]), tolerance)
        else:
            states = before_response(base.plain("policy", ids, mask).hidden_states[-1], response)
            close(values, states.float() @ base.head, tolerance)
    assert (seen["policy"] - seen["reference"]).abs().max() > 3 * tolerance, "the step must show"
    assert (values[:, -1] - seen["reward"]).abs().max() > 3 * tolerance, "critic and reward model must differ"


def close(got, want, tolerance):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_the_cells_of_the_normal_suite_hold_every_pair_of_settings():
    few, every = matrix.cells(False), matrix.cells(True)
    assert len(few) == 120 and len(every) == len(set(every)) == 480
    for one, other in itertools.combinations(range(6), 2):
        assert {(cell[one], cell[other]) for cell in few} == {(cell[one], cell[other]) for cell in every}
