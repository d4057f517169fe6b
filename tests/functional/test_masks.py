"""What holds of every function with a mask: padding, microbatches, precision and shapes."""

import inspect
import math
import pathlib
import subprocess
import sys

import pytest
import reference
import torch
from closeness import close, tensor
from hypothesis import given
from strategies import JUNK, ragged

import goose_lora.functional as F
from goose_lora.functional import (
    Moments,
    entropy,
    exact_kl,
    explained_variance,
    gae,
    gather_logprobs,
    kl_per_token,
    masked_mean,
    masked_sum,
    merge_moments,
    moments,
    pairwise_loss,
    policy_loss,
    sampling_weights,
    token_rewards,
    value_loss,
    weighted_kl,
    whiten,
)

# Every function with a mask, as functions of four tensors and that mask; each uses the tensors it
# needs.
MASKED = {
    "masked_sum": lambda a, b, c, d, mask, **_: masked_sum(a, mask),
    "masked_mean": lambda a, b, c, d, mask, **share: masked_mean(a, mask, **share),
    "moments": lambda a, b, c, d, mask, **_: tuple(moments(a, mask))[1:],
    "whiten": lambda a, b, c, d, mask, **_: whiten(a, mask),
    "gae": lambda a, b, c, d, mask, **_: gae(a, b, mask, gamma=0.9, lam=0.8),
    "policy_loss": lambda a, b, c, d, mask, **share: policy_loss(
        a, b, c, mask, cliprange=0.2, weights=d, **share
    ),
    "value_loss": lambda a, b, c, d, mask, **share: value_loss(a, b, c, mask, cliprange_value=0.5, **share),
    "token_rewards": lambda a, b, c, d, mask, **_: token_rewards(
        a.new_ones(len(a)), a, mask, kl_coef=0.1, by_token=b
    ),
    "weighted_kl": lambda a, b, c, d, mask, **_: weighted_kl(a, b, c, mask, estimator="k3"),
    "sampling_weights": lambda a, b, c, d, mask, **_: sampling_weights(
        a, b, mask, correction="truncate", cap=2.0
    ),
    "explained_variance": lambda a, b, c, d, mask, **_: explained_variance(a, b, mask),
}
SHARED = ("masked_mean", "policy_loss", "value_loss")
every_masked_function = pytest.mark.parametrize("name", MASKED)


def outputs(result):
    """All tensors of a result, the stats' included, in one line."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, dict):
        return list(result.values())
    return [x for part in result for x in outputs(part)]


def outputs_and_gradients(function, tensors):
    """What a function gives, and the gradient of the weighted sum of that in each of the tensors
    (zero where none flows)."""
    tensors = [x.clone().requires_grad_() for x in tensors]
    results = outputs(function(*tensors))
    total = sum(
        (x * torch.arange(1, x.numel() + 1).reshape(x.shape)).sum() for x in results if x.requires_grad
    )
    if isinstance(total, torch.Tensor):
        # A NaN on the way back is an error, even if a later step would drop it
        with torch.autograd.set_detect_anomaly(True):
            total.backward()
    return [x.detach() for x in results], [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]


def test_the_table_names_every_function_with_a_mask():
    functions = inspect.getmembers(F, inspect.isfunction)
    with_mask = {n for n, f in functions if n[0] != "_" and "mask" in inspect.signature(f).parameters}
    assert with_mask == set(MASKED) | {"last_counted"}  # which has no tensor beside its mask


@every_masked_function
@given(batch=ragged(tensors=4, holes=True), junk=JUNK)
def test_padding_has_no_say_in_value_or_gradient(name, batch, junk):
    mask, *tensors = batch

    def function(*xs):
        return MASKED[name](*xs, mask)

    want, want_gradients = outputs_and_gradients(function, tensors)
    got, gradients = outputs_and_gradients(function, [torch.where(mask, x, junk) for x in tensors])
    for x, y in zip(got + gradients, want + want_gradients, strict=True):
        close(x, y, rtol=0, atol=0)
    for gradient in gradients:
        assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("name", ["whiten", "gae", "weighted_kl"])
@given(batch=ragged(tensors=4, holes=True), junk=JUNK)
def test_what_is_outside_the_mask_comes_back_as_zero(name, batch, junk):
    mask, *tensors = batch
    assert (MASKED[name](*(torch.where(mask, x, junk) for x in tensors), mask)[~mask] == 0).all()


@given(ragged(holes=True))
def test_whiten_without_shift_and_with_given_statistics_is_zero_outside_the_mask(batch):
    mask, x = batch
    statistics = Moments(torch.tensor(7), tensor(5.0).squeeze(), tensor(2.0).squeeze())
    assert (whiten(x, mask, shift_mean=False, statistics=statistics)[~mask] == 0).all()


@pytest.mark.parametrize(
    "name", sorted(set(MASKED) - {"masked_sum", "gae", "token_rewards", "weighted_kl", "sampling_weights"})
)
def test_an_empty_mask_is_an_error_that_says_the_way_out(name):
    x, nothing = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(2, 3\) selects no token.*Drop empty responses.*num_tokens"):
        MASKED[name](x, x, x, x, nothing)


def test_the_sum_over_an_empty_mask_is_zero():
    assert masked_sum(torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)) == 0


def test_gae_of_rows_without_a_token_is_zero():
    mask = torch.tensor([[False, False], [True, False]])
    close(
        gae(torch.ones(2, 2).double(), torch.zeros(2, 2).double(), mask, gamma=0.9, lam=0.8), [[0, 0], [1, 0]]
    )
    assert gae(
        torch.ones(2, 0), torch.ones(2, 0), torch.ones(2, 0, dtype=torch.bool), gamma=0.9, lam=0.8
    ).shape == (2, 0)


@given(ragged(holes=True))
def test_masked_sum_and_mean_are_those_of_the_counted_tokens(batch):
    mask, x = batch
    (counted,) = reference.tokens(mask, x)
    close(masked_sum(x, mask), math.fsum(counted))
    close(masked_mean(x, mask), math.fsum(counted) / len(counted))


@pytest.mark.parametrize("name", SHARED)
def test_microbatches_add_up_to_the_token_mean_and_its_gradient(name):
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([[5], [1]])
    tensors = [torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(4)]

    def means(*xs, rows=slice(0, 2), **share):
        return MASKED[name](*(x[rows] for x in xs), mask[rows], **share)

    def added(*xs):
        parts = [outputs(means(*xs, rows=slice(i, i + 1), num_tokens=6)) for i in range(2)]
        return [sum(column) for column in zip(*parts, strict=True)]

    want, want_gradients = outputs_and_gradients(means, tensors)
    got, gradients = outputs_and_gradients(added, tensors)
    for x, y in zip(got + gradients, want + want_gradients, strict=True):
        close(x, y)
    mean_of_means = sum(outputs(means(*tensors, rows=slice(i, i + 1)))[0] for i in range(2)) / 2
    assert abs(mean_of_means - want[0]) > 0.01  # else this test could not fail


def test_the_mean_of_two_uneven_rows_is_that_of_their_tokens():
    x, mask = tensor(1, 1, 1, 1, 9, 0, 0, 0).reshape(2, 4), torch.arange(4) < torch.tensor([[4], [1]])
    close(masked_mean(x, mask), 13 / 5)
    close(masked_mean(x[:1], mask[:1], num_tokens=5) + masked_mean(x[1:], mask[1:], num_tokens=5), 13 / 5)


@pytest.mark.parametrize("name", SHARED)
def test_an_empty_microbatch_of_a_minibatch_with_tokens_adds_nothing(name):
    x = torch.full((2, 3), math.nan)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    results, gradients = outputs_and_gradients(lambda *xs: MASKED[name](*xs, nothing, num_tokens=7), [x] * 4)
    for y in results + gradients:
        assert (y == 0).all()


@pytest.mark.parametrize("name", SHARED)
def test_num_tokens_may_be_a_tensor(name):
    x, mask = (
        [torch.randn(2, 3, generator=torch.Generator().manual_seed(i)) for i in range(4)],
        torch.ones(2, 3, dtype=torch.bool),
    )
    got, want = (outputs(MASKED[name](*x, mask, num_tokens=count)) for count in (torch.tensor(11), 11))
    assert got == want


@pytest.mark.parametrize("num_tokens", [0, -3, torch.tensor(0)])
@pytest.mark.parametrize("name", SHARED)
def test_a_token_count_that_is_not_positive_is_an_error(name, num_tokens):
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=rf"num_tokens={int(num_tokens)}.*over all micro-batches and ranks"):
        MASKED[name](x, x, x, x, x.bool(), num_tokens=num_tokens)


def results_of_all_functions(x):
    """Every public function of ppo_math on four (3, 5) tensors."""
    mask, ids = torch.arange(5) < torch.tensor([[5], [2], [3]]), torch.tensor([0, 4, 2])
    return {name: outputs(function(*x, mask)) for name, function in MASKED.items()} | {
        "k1": [kl_per_token(x[0], x[1], estimator="k1")],
        "k2": [kl_per_token(x[0], x[1], estimator="k2")],
        "k3": [kl_per_token(x[0], x[1], estimator="k3")],
        "exact_kl": [exact_kl(x[0], x[1])],
        "entropy": [entropy(x[0])],
        "gather_logprobs": [gather_logprobs(x[0], ids, temperature=0.7)],
        "merge_moments": list(merge_moments([moments(y, mask) for y in x]))[1:],
        "pairwise_loss": [pairwise_loss(x[0][0], x[1][0], x[2][0])],
    }


@pytest.mark.parametrize(
    ("given_dtype", "computed_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_everything_computes_in_fp32_or_float64(given_dtype, computed_dtype):
    x = [torch.randn(3, 5, generator=torch.Generator().manual_seed(i)).to(given_dtype) for i in range(4)]
    upcast_first = results_of_all_functions([y.to(computed_dtype) for y in x])
    for name, got in results_of_all_functions(x).items():
        for y, want in zip(got, upcast_first[name], strict=True):
            assert y.dtype == computed_dtype, name
            close(y, want, rtol=0, atol=0)


def test_wrong_shapes_are_caught_under_test():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for call in (
        lambda: gae(x, torch.zeros(2, 4), mask, gamma=1.0, lam=1.0),
        lambda: policy_loss(x, x, torch.zeros(2), mask, cliprange=0.2),
        lambda: masked_mean(x, mask.float()),
        lambda: gather_logprobs(x, torch.zeros(3, dtype=torch.long)),
    ):
        with pytest.raises(Exception, match=r"[Tt]ype-check"):
            call()


def test_importing_it_pulls_in_no_training_library():
    code = (
        "import sys, goose_lora.functional; print(*sorted({'transformers', 'peft', 'trl', 'accelerate',"
        " 'datasets'} & set(sys.modules)))"
    )
    root = pathlib.Path(F.__file__).parents[2]
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        == ""
    )
