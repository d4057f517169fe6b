"""goose_lora.generation.static_cache: the tokens are those of a cache that grows, and what cannot
be compiled is told and left out."""

import logging
import shutil

import pytest
import tiny
import torch
import torch._dynamo
from tiny_runs import logged, trainer
from transformers import CompileConfig

from goose_lora.generation.sampling import generation_config, sample
from goose_lora.generation.static_cache import WORTH_STEPS, StaticCache, make_static_cache, why_not
from goose_lora.models.dense_copy import DenseCopy

# With the layers of the model; the second compiles C++, a quarter of a minute a layer
BACKENDS = {"aot_eager": 3} | ({"inductor": 1} if shutil.which("g++") else {})
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def everywhere(**how):
    """A compilation that transformers also takes on a CPU."""
    config = CompileConfig(dynamic=False, **how)
    config._compile_all_devices = True
    return config


def settings(**changes):
    return generation_config(
        **{"response_tokens": 7, "temperature": 0.7, "eos_token_ids": [tiny.EOS], "pad_token_id": tiny.PAD}
        | changes
    )


def copied(architecture="llama", **changes):
    shared = tiny.shared(tiny.base(architecture, **changes))
    tiny.randomise(shared, std=0.1)
    dense = DenseCopy(shared)
    dense.merge_role("policy")
    return shared, dense


def drawn(shared, dense, static, lengths=(7, 4, 5), **changes):
    torch.manual_seed(5)
    return sample(shared, *tiny.batch(lengths), settings(**changes), dense=dense, static=static)


def require_same(got, want):
    assert torch.equal(got.input_ids, want.input_ids) and torch.equal(got.ended, want.ended)
    torch.testing.assert_close(got.sampling_logprobs, want.sampling_logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_tokens_are_those_of_a_cache_that_grows(architecture, do_sample):
    shared, dense = copied(architecture)
    want = drawn(shared, dense, None, do_sample=do_sample)
    static = StaticCache()
    require_same(drawn(shared, dense, static, do_sample=do_sample), want)
    assert static.columns == 64
    assert len(set(want.input_ids[:, 7:].flatten().tolist())) > 3, "one token over and over proves nothing"


@pytest.mark.parametrize("backend", BACKENDS)
@torch._dynamo.config.patch(disable=False)
def test_compiled_tokens_are_those_of_a_cache_that_grows_also_after_the_policy_has_moved(backend):
    torch._dynamo.reset()
    shared, dense = copied(num_hidden_layers=BACKENDS[backend])
    static = StaticCache(everywhere(mode="default", backend=backend))
    compiled = 0
    for std in (0.1, 0.3):
        tiny.randomise(shared, std=std)
        dense.merge_role("policy")
        for lengths in ((7, 4, 5), (3, 9, 6)):
            want = drawn(shared, dense, None, lengths)
            require_same(drawn(shared, dense, static, lengths), want)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert graphs and graphs == (compiled or graphs), "compiled anew"
            compiled = graphs
    torch._dynamo.reset()


def test_a_run_with_the_cache_is_the_run_without(tmp_path):
    rows = []
    for static in (None, StaticCache()):
        run = trainer(tmp_path / str(static is None), rollout_weights="dense", reuse_trunk=False)
        run.collector.static = static
        run.train()
        rows.append(logged(tmp_path / str(static is None)))
    assert static.serves and static.columns == 64
    for one, other in zip(*rows, strict=True):
        for name in ("loss", "objective/score", "objective/kl", "rollout/response_tokens"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_what_cannot_be_compiled_is_told_once_and_the_tokens_stay(caplog):
    shared, dense = copied()
    want = drawn(shared, dense, None)
    asked = []

    def failing(static):
        asked.append(static)
        torch.manual_seed(5)
        rollout = sample(shared, *tiny.batch((7, 4, 5)), settings(), dense=dense)
        if static is not None:
            raise RuntimeError("no kernel image\nof many lines")
        return rollout

    static = StaticCache()
    with caplog.at_level(logging.WARNING):
        require_same(static.try_first(failing), want)
        require_same(static.try_first(failing), want)
    assert asked == [static, None, None]
    assert caplog.text.count("compiling failed (RuntimeError: no kernel image).") == 1


@pytest.mark.parametrize(("serves", "noted"), [(None, False), (True, False), (False, True)])
def test_the_trunk_is_noted_while_generating_unless_steps_are_compiled(serves, noted, tmp_path):
    run = trainer(tmp_path, rollout_weights="dense")
    run.collector.static = StaticCache()
    run.collector.static.serves = serves
    ids, mask = tiny.batch((7, 4, 5))
    assert (run.collector.generate(ids, mask, keep_trunk=True).trunk is not None) == noted


def test_random_numbers_of_a_failed_try_are_drawn_again():
    def failing(static):
        number = torch.rand(())
        if static is not None:
            raise RuntimeError("no compiler")
        return number

    torch.manual_seed(3)
    want = torch.rand(())
    torch.manual_seed(3)
    assert StaticCache().try_first(failing) == want


def test_short_memory_is_not_taken_for_a_failed_compilation():
    def short(static):
        raise torch.OutOfMemoryError("CUDA out of memory")

    static = StaticCache()
    with pytest.raises(torch.OutOfMemoryError):
        static.try_first(short)
    assert static.serves is None


def test_where_rollouts_are_not_compiled_and_why(caplog):
    _, dense = copied()
    assert make_static_cache(dense, "off", CUDA, steps=WORTH_STEPS) is None
    assert make_static_cache(dense, "auto", CPU, steps=WORTH_STEPS) is None
    assert not caplog.text
    assert make_static_cache(None, "auto", CUDA, steps=WORTH_STEPS) is None
    assert "not compiled to CUDA graphs: they are written by the shared weights" in caplog.text
    assert "is worth it from 10000" in why_not(dense, WORTH_STEPS - 1)
    assert why_not(dense, WORTH_STEPS) is None
    made = make_static_cache(dense, "auto", CUDA, steps=WORTH_STEPS)
    assert made.compile_config.mode == "reduce-overhead"
    type(dense.model)._can_compile_fullgraph, before = False, True
    try:
        assert "transformers does not say that LlamaForCausalLM can be" in why_not(dense, WORTH_STEPS)
    finally:
        type(dense.model)._can_compile_fullgraph = before


def test_it_serves_a_dense_copy_and_keeps_no_trunk():
    shared, dense = copied()
    for how in ({"dense": None}, {"dense": dense, "trunk_depth": 1}):
        with pytest.raises(ValueError, match="a static cache serves a dense copy, and keeps no trunk"):
            sample(shared, *tiny.batch((7, 4, 5)), settings(), static=StaticCache(), **how)
