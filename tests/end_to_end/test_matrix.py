"""One PPO step on every architecture, quantization, dtype, critic and reference, with checkpointing
and without.

``--full`` runs all 480 cells; otherwise two of each base are run, which hold every pair of
settings.
"""

import gc
import itertools

import matrix
import pytest
from matrix import assert_step

from goose_lora.models import loading


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
        metafunc.parametrize(
            "cell",
            cells,
            ids=["-".join([*cell[:-1], "checkpointing" if cell[-1] else "plain"]) for cell in cells],
        )


def test_a_step_is_finite_trains_policy_and_critic_alone_and_its_views_are_those_of_plain_models(
    cell, base_of, tmp_path
):
    *kind, critic, reference, checkpointing = cell
    assert_step(base_of(*kind), critic, reference, checkpointing, tmp_path)


def test_the_cells_of_the_normal_suite_hold_every_pair_of_settings():
    few, every = matrix.cells(False), matrix.cells(True)
    assert len(few) == 120 and len(every) == len(set(every)) == 480
    for one, other in itertools.combinations(range(6), 2):
        assert {(cell[one], cell[other]) for cell in few} == {(cell[one], cell[other]) for cell in every}
