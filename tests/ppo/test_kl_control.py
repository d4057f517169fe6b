import ast
import json
import logging
import math
import pathlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goose_lora.ppo import kl_control
from goose_lora.ppo.kl_control import AdaptiveKL, FixedKL

NOT_FINITE = [math.nan, math.inf, -math.inf]


def adaptive(**changes):
    return AdaptiveKL(**({"init_coef": 0.5, "target": 4.0, "horizon": 100} | changes))


def updated(kl, n_sequences, **changes):
    control = adaptive(**changes)
    control.update(kl, n_sequences)
    return control.coef


def test_a_fixed_coefficient_never_moves():
    control = FixedKL(0.05)
    for kl in (0.0, 1e9, -3.0, *NOT_FINITE):
        control.update(kl, 64)
    assert control.coef == 0.05


def test_an_adaptive_coefficient_starts_where_it_is_told():
    assert adaptive().coef == 0.5


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (4.0, 1.0),  # on target
        (4.4, 1.01),  # 10 % above, 10 of 100 sequences
        (3.6, 0.99),
        (4.8, 1.02),  # where the clip begins
        (400.0, 1.02),
        (0.0, 0.98),
        (-1.0, 0.98),  # k1 may be negative
    ],
)
def test_the_coefficient_follows_ziegler_et_al(kl, factor):
    assert updated(kl, 10) == pytest.approx(0.5 * factor, rel=1e-12)


@given(st.floats(-100, 100), st.integers(1, 10**6), st.integers(1, 10**5))
def test_it_rises_above_the_target_and_falls_below_and_never_by_more_than_20_percent(
    kl, n_sequences, horizon
):
    coef = updated(kl, n_sequences, horizon=horizon)
    assert (coef > 0.5) <= (kl > 4) and (coef < 0.5) <= (kl < 4)
    assert 0.5 * 0.8 - 1e-12 <= coef <= 0.5 * 1.2 + 1e-12
    if abs(kl - 4) > 0.01:
        assert coef != 0.5


def test_a_rollout_longer_than_the_horizon_counts_as_one_horizon():
    # 1 - 0.2 * 600 / 100 = -0.2 would pay the policy for leaving the reference.
    assert updated(0.0, 600) == updated(0.0, 100) == pytest.approx(0.4, rel=1e-12)
    assert updated(99.0, 600) == pytest.approx(0.6, rel=1e-12)


def test_updates_compound():
    control = adaptive()
    control.update(400.0, 50)
    control.update(400.0, 50)
    assert control.coef == pytest.approx(0.5 * 1.1 * 1.1, rel=1e-12)


@pytest.mark.parametrize("kl", NOT_FINITE)
def test_a_kl_that_is_not_finite_leaves_the_coefficient_and_says_so(kl, caplog):
    control = adaptive()
    with caplog.at_level(logging.WARNING):
        control.update(kl, 10)
    assert control.coef == 0.5
    assert f"{kl}" in caplog.text and "stays at 0.5" in caplog.text


@pytest.mark.parametrize("n_sequences", [0, -1])
def test_an_update_by_no_sequences_is_an_error(n_sequences):
    with pytest.raises(ValueError, match=f"n_sequences={n_sequences}.*over all ranks"):
        adaptive().update(4.0, n_sequences)


@pytest.mark.parametrize("coef", [-0.1, *NOT_FINITE])
def test_a_fixed_coefficient_must_be_finite_and_not_negative(coef):
    with pytest.raises(ValueError, match=f"kl_coef={coef} .*Use 0 for no penalty"):
        FixedKL(coef)


def test_a_fixed_coefficient_may_be_zero():
    assert FixedKL(0.0).coef == 0


@pytest.mark.parametrize("value", [0, -1, *NOT_FINITE])
@pytest.mark.parametrize(
    ("name", "way_out"),
    [("init_coef", r"FixedKL\(0.0\)"), ("target", "6.0 is usual"), ("horizon", "10000 is usual")],
)
def test_adaptive_settings_must_be_positive_and_finite(name, way_out, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be positive.*{way_out}"):
        adaptive(**{name: value})


@pytest.mark.parametrize("make", [adaptive, lambda: FixedKL(0.05)])
def test_a_state_restores_the_coefficient_bit_for_bit_through_json(make):
    before, after = make(), make()
    before.coef = 0.1 + 0.2
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.coef == before.coef
    before.update(7.0, 3)
    after.update(7.0, 3)
    assert after.coef == before.coef and after.state_dict() == before.state_dict()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"value": 0.1},
        {"coef": 0.1, "target": 6.0},
        *({"coef": x} for x in (-0.1, True, "0.1", *NOT_FINITE)),
    ],
)
@pytest.mark.parametrize("make", [adaptive, lambda: FixedKL(0.5)])
def test_a_damaged_state_is_refused_and_changes_nothing(make, state):
    control = make()
    with pytest.raises(ValueError, match="resume from another"):
        control.load_state_dict(state)
    assert control.coef == 0.5


def test_zero_is_a_state_of_the_fixed_coefficient_only():
    fixed = FixedKL(0.5)
    fixed.load_state_dict({"coef": 0.0})
    assert fixed.coef == 0
    with pytest.raises(ValueError, match="finite and positive"):
        adaptive().load_state_dict({"coef": 0.0})


def test_kl_control_imports_the_standard_library_only():
    tree = ast.parse(pathlib.Path(kl_control.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {"." * node.level + (node.module or "") for node in imports if isinstance(node, ast.ImportFrom)}
    assert names and {name.split(".")[0] for name in names} <= sys.stdlib_module_names
