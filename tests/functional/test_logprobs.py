"""goose_lora.functional against the full logits that it never holds."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import goose_lora.functional as F
from goose_lora.functional import token_kl, token_logprobs

SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.9, "softcap": 3.0},
    {"softcap": 1.5},
]


def inputs(tokens=13, hidden=7, vocabulary=23, *, bias=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64).to(dtype)
    offset = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    return states, torch.randint(vocabulary, (tokens,), generator=generator), weight, offset


def reference(hidden, ids, weight, bias, *, temperature=1.0, softcap=None):
    """By the definition: softmax over all logits, one token at a time."""
    logprobs, entropies = [], []
    for state, token in zip(hidden, ids.tolist(), strict=True):
        logits = weight @ state
        if bias is not None:
            logits = logits + bias
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        p = logits.exp() / logits.exp().sum()
        logprobs.append(p[token].log())
        entropies.append(torch.special.entr(p).sum())
    return torch.stack(logprobs), torch.stack(entropies)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 512])
def test_values_and_gradients_are_those_of_the_full_softmax(bias, settings, chunk_tokens):
    given_inputs = inputs(bias=bias)
    hidden = given_inputs[0]
    weights = torch.linspace(-1, 2, 2 * len(hidden), dtype=torch.float64).view(2, -1)
    got = token_logprobs(*given_inputs, **settings, entropy_gradient=True, chunk_tokens=chunk_tokens)
    want = reference(*given_inputs, **settings)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)
    for losses in (weights * torch.tensor([[1], [0]]), weights * torch.tensor([[0], [1]]), weights):
        mine, theirs = (
            torch.autograd.grad((losses * torch.stack(out)).sum(), hidden, retain_graph=True)[0]
            for out in (got, want)
        )
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_agree_with_finite_differences(settings):
    hidden, ids, weight, bias = inputs(tokens=3, hidden=4, vocabulary=5)
    settings = settings | {"entropy_gradient": True, "chunk_tokens": 2}
    assert torch.autograd.gradcheck(lambda h: token_logprobs(h, ids, weight, bias, **settings), (hidden,))


@given(
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(2, 11),
    st.integers(1, 10),
    st.floats(0.3, 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_shapes_and_chunks_have_no_say(tokens, hidden, vocabulary, chunk_tokens, temperature, bias, seed):
    given_inputs = inputs(tokens, hidden, vocabulary, bias=bias, seed=seed)
    got = token_logprobs(*given_inputs, temperature=temperature, chunk_tokens=chunk_tokens)
    for mine, theirs in zip(got, reference(*given_inputs, temperature=temperature), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


def test_the_entropy_has_a_gradient_only_when_asked():
    given_inputs = inputs()
    logprobs, entropies = token_logprobs(*given_inputs)
    assert logprobs.requires_grad and not entropies.requires_grad
    (with_it,) = torch.autograd.grad(
        token_logprobs(*given_inputs, entropy_gradient=True)[0].sum(), given_inputs[0]
    )
    (without,) = torch.autograd.grad(logprobs.sum(), given_inputs[0])
    torch.testing.assert_close(with_it, without, rtol=0, atol=0)


def test_the_entropy_alone_can_be_the_loss():
    hidden, ids, weight, bias = inputs()
    got, want = (
        f(hidden, ids, weight, bias)[1].sum()
        for f in (lambda *x: token_logprobs(*x, entropy_gradient=True), reference)
    )
    mine, theirs = (torch.autograd.grad(loss, hidden)[0] for loss in (got, want))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


def test_no_gradient_is_prepared_where_none_is_wanted():
    hidden, ids, weight, bias = inputs()
    logprobs, entropies = token_logprobs(hidden.detach(), ids, weight, bias, entropy_gradient=True)
    assert not logprobs.requires_grad and not entropies.requires_grad
    with torch.no_grad():
        again, _ = token_logprobs(hidden, ids, weight, bias)
    torch.testing.assert_close(again, logprobs, rtol=0, atol=0)


def test_no_tokens_are_no_error():
    logprobs, entropies = token_logprobs(*inputs(tokens=0))
    assert logprobs.shape == entropies.shape == (0,)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_trainable_head_is_refused(which):
    hidden, ids, weight, bias = inputs()
    {"weight": weight, "bias": bias}[which].requires_grad_()
    with pytest.raises(ValueError, match="head is trainable, and would get no gradient"):
        token_logprobs(hidden, ids, weight, bias)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="must be positive"):
        token_logprobs(*inputs(), temperature=temperature)


@pytest.mark.parametrize("settings", SETTINGS)
def test_in_bf16_it_is_close_and_comes_out_in_fp32(settings):
    given_inputs = inputs(bias=False, dtype=torch.bfloat16)
    hidden = given_inputs[0]
    wide = (hidden.detach().double().requires_grad_(), given_inputs[1], given_inputs[2].double(), None)
    got, want = token_logprobs(*given_inputs, **settings), reference(*wide, **settings)
    assert got[0].dtype == got[1].dtype == torch.float32
    for mine, theirs in zip(got, want, strict=True):
        # bf16 keeps 8 bits: logits up to about 8 are rounded by up to 1/64, then divided by a
        # temperature of at least 0.7.
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=0.05)
    (mine,) = torch.autograd.grad(got[0].sum(), hidden)
    (theirs,) = torch.autograd.grad(want[0].sum(), wide[0])
    assert torch.nn.functional.cosine_similarity(mine.double().flatten(), theirs.flatten(), dim=0) > 0.9995


# ---- The exact KL ----


def two_states(**settings):
    """States of a policy, which want a gradient, and of a reference, with a head for both."""
    hidden, _, weight, bias = inputs(**settings)
    return hidden, inputs(**settings | {"seed": 5})[0].detach(), weight, bias


def full_logits(hidden, weight, bias, *, temperature=1.0, softcap=None):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 512])
def test_the_exact_kl_and_its_gradient_are_those_of_the_full_logits(bias, settings, chunk_tokens):
    hidden, ref_hidden, weight, offset = two_states(bias=bias)
    got = token_kl(hidden, ref_hidden, weight, offset, **settings, chunk_tokens=chunk_tokens)
    want = F.exact_kl(*(full_logits(states, weight, offset, **settings) for states in (hidden, ref_hidden)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)
    assert want.min() > 0.01
    weights = torch.linspace(-1, 2, len(hidden), dtype=torch.float64)
    mine, theirs = (torch.autograd.grad((weights * kl).sum(), hidden)[0] for kl in (got, want))
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_exact_kl_is_the_mean_of_k1_under_the_policy(settings):
    hidden, ref_hidden, weight, bias = two_states(tokens=3, vocabulary=5)
    exact = token_kl(hidden, ref_hidden, weight, bias, **settings)
    for row in range(3):
        every = torch.arange(5)
        policy, reference = (
            token_logprobs(states[row].expand(5, -1), every, weight, bias, **settings)[0].detach()
            for states in (hidden, ref_hidden)
        )
        assert (policy.exp() * (policy - reference)).sum().item() == pytest.approx(
            exact[row].item(), abs=1e-7
        )


def test_no_tokens_have_no_kl_and_no_gradient_reaches_the_reference():
    hidden, ref_hidden, weight, bias = two_states(tokens=0)
    assert token_kl(hidden, ref_hidden, weight, bias).shape == (0,)
    hidden, ref_hidden, weight, bias = two_states()
    token_kl(hidden, ref_hidden.requires_grad_(), weight, bias).sum().backward()
    assert hidden.grad.any() and ref_hidden.grad is None
    with torch.no_grad():
        assert not token_kl(hidden, ref_hidden, weight, bias).requires_grad


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_has_no_kl(temperature):
    with pytest.raises(ValueError, match="must be positive"):
        token_kl(*two_states(), temperature=temperature)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_shared_base_gives_the_exact_kl_of_its_policy_to_its_reference(architecture):
    """With the model's own head, which softens Gemma 2's logits."""
    changes = {"final_logit_softcapping": 2.0} if architecture == "gemma2" else {}
    shared = tiny.shared(tiny.base(architecture, **changes), reference="base")
    ids, mask = tiny.batch()
    response = tiny.response_mask()
    logits = []
    for role in ("policy", "reference"):
        with shared.role(role) as core, torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits.append(
                core(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -6:-1] / 0.7
            )
    hidden = shared.hidden("reference", ids, mask)[:, -6:-1]
    got = shared(ids, mask, response, ref_hidden=hidden.detach(), temperature=0.7).kl
    want = torch.where(response, F.exact_kl(*logits), 0.0)
    assert want[response].min() > 1e-3
    # fp32 logits, whose differences are summed over the vocabulary
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
