"""goose_lora.generation.sampling: replies come from the distribution whose log-probabilities are
computed, and end where they end."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from goose_lora.generation.sampling import TokenSampler, generation_config, response_mask, sample
from goose_lora.models.loading import load_base, load_tokenizer

FILTERS = {
    "top_p": 0.3,
    "top_k": 2,
    "min_p": 0.4,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.04,
    "eta_cutoff": 0.1,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 3.0,
    "min_length": 16,
    "min_new_tokens": 5,
    "temperature": 0.2,
    "num_beams": 3,
    "num_return_sequences": 2,
    "max_length": 12,
    "suppress_tokens": list(range(5, 30)),
    "begin_suppress_tokens": list(range(5, 30)),
    "bad_words_ids": [[token] for token in range(5, 30)],
    "sequence_bias": [[[31], 9.0]],
    "forced_eos_token_id": 7,
    "forced_bos_token_id": 7,
    "exponential_decay_length_penalty": [1, 3.0],
    "guidance_scale": 3.0,
    "top_h": 0.2,
    "penalty_alpha": 0.6,
}


def config(**changes):
    return generation_config(
        **{"response_tokens": 6, "temperature": 0.7, "eos_token_ids": [tiny.EOS], "pad_token_id": tiny.PAD}
        | changes
    )


def prompts():
    return tiny.batch((7, 4, 5))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "mistral"])
def test_a_greedy_rollout_amid_training_is_that_of_a_freshly_loaded_model(architecture, tmp_path):
    folder = tiny.save_base(tmp_path / "base", architecture)
    shared = tiny.shared(AutoModelForCausalLM.from_pretrained(folder), critic="adapter")
    shared.save_pretrained(tmp_path / "policy")
    shared.train()
    shared.activation_checkpointing_enable({"use_reentrant": False})
    shared.get_base_model().generation_config = GenerationConfig(
        **{"top_k": 2, "repetition_penalty": 3.0, "min_length": 30}
    )
    ids, mask = prompts()
    rollout = sample(shared, ids, mask, config(do_sample=False))
    fresh = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "policy"
    ).eval()
    with torch.no_grad():
        want = fresh.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=2,
        )
        with fresh.disable_adapter():
            other = fresh.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=2,
            )
    assert torch.equal(rollout.input_ids, want)
    assert not torch.equal(want, other), "the adapter must matter"
    assert len(set(want[:, 7:].flatten().tolist())) > 4, "one token over and over would prove nothing"
    assert shared.training and any(
        m.gradient_checkpointing for m in shared.modules() if hasattr(m, "gradient_checkpointing")
    )


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [(name, "none") for name in tiny.ARCHITECTURES] + [("llama", "nf4"), ("llama", "int8")],
)
@torch.no_grad()
def test_log_probabilities_are_those_that_tokens_were_drawn_with(
    architecture, quantization, tiny_base, monkeypatch
):
    args = tiny.arguments(tiny_base, quantization=quantization)
    shared = tiny.shared(
        tiny.base(architecture) if quantization == "none" else load_base(args, load_tokenizer(args))
    )
    tiny.randomise(shared, std=0.1)  # with more, rounding alone comes to 2e-5
    ids, mask = prompts()
    logits = []
    choose = TokenSampler.__call__
    monkeypatch.setattr(
        TokenSampler,
        "__call__",
        lambda self, ids, given: logits.append(given.clone()) or choose(self, ids, given),
    )
    rollout = sample(shared, ids, mask, config())
    given = torch.stack(logits[: rollout.response_mask.shape[1]], dim=1)
    assert torch.isfinite(given).all(), "a filter removed tokens"
    want = (given / 0.7).log_softmax(-1).gather(-1, rollout.input_ids[:, 7:, None]).squeeze(-1)
    torch.testing.assert_close(
        rollout.sampling_logprobs, torch.where(rollout.response_mask, want, 0.0), rtol=0, atol=1e-5
    )
    shared.train()  # as in the update
    hidden = shared.hidden("policy", rollout.input_ids, rollout.attention_mask)
    got, _ = shared.logprobs(hidden, rollout.input_ids, rollout.response_mask, temperature=0.7)
    torch.testing.assert_close(got[rollout.response_mask], want[rollout.response_mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FILTERS)
@torch.no_grad()
def test_what_the_model_ships_as_generation_config_has_no_say(name):
    shared = tiny.shared(tiny.base())
    ids, mask = prompts()
    torch.manual_seed(0)
    want = sample(shared, ids, mask, config())
    polluted = GenerationConfig(pad_token_id=9, eos_token_id=[11, 13])
    setattr(polluted, name, FILTERS[name])
    core = shared.get_base_model()
    core.generation_config = polluted
    torch.manual_seed(0)
    got = sample(shared, ids, mask, config())
    assert torch.equal(got.input_ids, want.input_ids)
    assert core.generation_config is polluted


def test_the_filters_of_this_test_would_show():
    """Power: given to generate itself, most of them change what is drawn."""
    model, (ids, mask) = tiny.base(), prompts()

    def draw(**settings):
        torch.manual_seed(0)
        tokens = {"max_new_tokens": 6, "pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS}
        return model.generate(input_ids=ids, attention_mask=mask, do_sample=True, **tokens, **settings)

    plain = draw(top_k=0)
    powerful = [
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "temperature",
        "bad_words_ids",
        "sequence_bias",
    ]
    assert [
        name for name in powerful if not torch.equal(plain, draw(**{"top_k": 0, name: FILTERS[name]}))
    ] == powerful


@pytest.mark.parametrize(("vocabulary", "temperature"), [(7, 1.0), (256, 0.5), (600, 2.0), (768, 1.0)])
def test_tokens_are_drawn_with_their_probabilities(vocabulary, temperature):
    """Pearson's chi-square against softmax(logits / T), over vocabularies of less than a block, of
    whole blocks and of a part."""
    torch.manual_seed(3)
    logits = torch.randn(vocabulary) * 2
    logits[5] = -1e30  # never
    draws = torch.cat([TokenSampler(temperature)(None, logits.repeat(4000, 1)).argmax(-1) for _ in range(20)])
    want = (logits.double() / temperature).softmax(-1) * len(draws)
    got = draws.bincount(minlength=vocabulary).double()
    assert got[5] == 0
    usual = want >= 5
    squares = ((got - want).square() / want)[usual]
    assert abs(squares.sum() - len(squares)) < 4.5 * (2 * len(squares)) ** 0.5
    rare = want[~usual].sum()
    assert abs(got[~usual].sum() - rare) < 5 * rare.sqrt() + 1
    assert torch.equal(TokenSampler(None)(None, logits.repeat(2, 1)).argmax(-1), logits.argmax().repeat(2))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("vocabulary", [9, 300])
def test_broken_logits_are_named_and_end_all_rows(vocabulary, broken):
    logits = torch.zeros(3, vocabulary)
    logits[1, 4] = broken
    sampler = TokenSampler(1.0)
    assert sampler(None, logits).argmax(-1).max() < vocabulary
    assert sampler.until_broken(torch.zeros(3, 1), None).tolist() == [True, True, True]
    with pytest.raises(ValueError, match="logits are not finite in 1 of 3 rows"):
        sampler.require_finite()


@pytest.mark.parametrize("do_sample", [True, False])
def test_a_rollout_ends_at_the_first_logits_that_are_not_finite(do_sample, monkeypatch):
    shared = tiny.shared(tiny.base())
    ids, mask = prompts()
    steps = []
    choose = TokenSampler.__call__

    def breaking(self, ids, logits):
        steps.append(len(steps))
        if len(steps) == 3:
            logits[1, 4] = float("nan")
        return choose(self, ids, logits)

    monkeypatch.setattr(TokenSampler, "__call__", breaking)
    with pytest.raises(ValueError, match="logits are not finite in 1 of 3 rows: training has diverged"):
        sample(shared, ids, mask, config(eos_token_ids=[tiny.VOCABULARY - 1], do_sample=do_sample))
    assert len(steps) == 3


@torch.no_grad()
def test_a_pad_token_inside_a_reply_does_not_end_it():
    shared = tiny.shared(tiny.base())
    ids, mask = prompts()
    want = sample(shared, ids, mask, config(do_sample=False))
    inside = want.input_ids[0, 7 + 2].item()  # what the first reply says third, taken for the pad token
    got = sample(shared, ids, mask, config(do_sample=False, pad_token_id=inside))
    assert inside != tiny.EOS and want.response_mask[0, 3]
    assert torch.equal(got.response_mask, want.response_mask)
    assert torch.equal(got.input_ids[got.attention_mask.bool()], want.input_ids[want.attention_mask.bool()])
    assert inside in got.response_ids()[0]


@torch.no_grad()
def test_replies_end_at_their_first_end_of_text_token_and_say_so():
    shared = tiny.shared(tiny.base())
    ids, mask = prompts()
    free = sample(shared, ids, mask, config(do_sample=False, eos_token_ids=[]))
    assert not free.ended.any() and free.response_mask.all()
    replies = free.input_ids[:, 7:]
    ends = [replies[0, 1].item(), replies[1, 4].item()]  # two tokens that end a reply
    rollout = sample(shared, ids, mask, config(do_sample=False, eos_token_ids=ends))
    for row in range(3):
        where = [k for k, token in enumerate(replies[row].tolist()) if token in ends]
        length = where[0] + 1 if where else 6
        assert rollout.response_ids()[row] == replies[row, :length].tolist()
        assert rollout.ended[row].item() == bool(where)
    assert rollout.lengths[0] == 2
    assert torch.equal(rollout.attention_mask[:, :7], mask)
    assert torch.equal(rollout.attention_mask[:, 7:].bool(), rollout.response_mask)


def test_a_rollout_can_be_drawn_under_every_role():
    shared = tiny.shared(tiny.base())
    ids, mask = prompts()
    greedy = config(do_sample=False)
    policy, reference = sample(shared, ids, mask, greedy), sample(shared, ids, mask, greedy, role="reference")
    bare = tiny.base().generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    assert torch.equal(reference.input_ids, bare)
    assert not torch.equal(policy.input_ids, bare)


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=4),
    st.sets(st.integers(0, 4), max_size=3),
)
def test_the_mask_is_true_up_to_the_first_end(rows, ends):
    mask, ended = response_mask(torch.tensor(rows), sorted(ends))
    for row, tokens in enumerate(rows):
        counted = []
        for token in tokens:
            counted.append(True)
            if token in ends:
                break
        assert mask[row].tolist() == counted + [False] * (5 - len(counted))
        assert ended[row].item() == (not ends.isdisjoint(tokens))


def test_the_head_gets_whole_rows_and_the_hook_that_sees_to_it_is_gone_afterwards():
    shared = tiny.shared(tiny.base())
    head = shared.get_base_model().get_output_embeddings()
    seen = []
    hook = head.register_forward_hook(lambda module, args, output: seen.append(args[0].is_contiguous()))
    ids, mask = tiny.batch()
    sample(
        shared,
        ids,
        mask,
        generation_config(
            response_tokens=3, temperature=1.0, eos_token_ids=[tiny.EOS], pad_token_id=tiny.PAD
        ),
    )
    hook.remove()
    assert seen and all(seen)
    assert not head._forward_pre_hooks
