"""InstructGOOSE's way of working: its README loop as it stands, and each defect of instruct-goose
0.0.7 as a test that it would fail."""

import copy
import dataclasses
import gc
import weakref
from statistics import fmean, pstdev
from typing import Any

import pytest
import reference as slow
import tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor, optim
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from goose_lora.errors import UserError
from goose_lora.instruct import (
    Agent,
    PairwiseLoss,
    RewardModel,
    RLHFConfig,
    RLHFTrainer,
    create_reference_model,
)
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo import first_step_checks

SHAPES = ("gpt2", "llama")
Batch = dict[str, Tensor]


def agent(shape: str = "llama", *, stirred: bool = True, critic: str = "shared", **settings: Any) -> Agent:
    """On a tiny base; stirred, its adapters and its value head are random, so that it is not its
    reference, which was made before."""
    made = Agent(tiny.base(shape), policy=None, critic=critic, **settings)
    vars(made)["untrained"] = create_reference_model(made)
    if stirred:
        tiny.stir(made, std=0.05)
    return made


def trainer_of(made: Agent, **settings: Any) -> RLHFTrainer:
    reference = vars(made).get("untrained") or create_reference_model(made)
    return RLHFTrainer(made, reference, RLHFConfig(**settings))


def replies(
    prompts: tuple[int, ...] = (5, 3, 4), lengths: tuple[int, ...] = (6, 6, 6), *, side: str = "left"
) -> Batch:
    """Unequal prompts padded on ``side``, replies without an end-of-text token, and rewards: the
    arguments of compute_loss."""
    query_ids, query_mask = tiny.batch(prompts, side=side)
    response_ids, response_mask = tiny.batch(lengths, side="right", seed=5)
    rewards = torch.tensor([1.5, -2.0, 0.25])[: len(prompts)]
    names = ("query_ids", "query_attention_mask", "response_ids", "response_attention_mask", "rewards")
    return dict(zip(names, (query_ids, query_mask, response_ids, response_mask, rewards), strict=True))


def row(batch: Batch, index: int) -> Batch:
    """One row of ``batch`` with no padding at all."""
    one = {name: x[index : index + 1] for name, x in batch.items()}
    for part in ("query", "response"):
        keep = one[f"{part}_attention_mask"][0].bool()
        one[f"{part}_ids"], one[f"{part}_attention_mask"] = (
            one[f"{part}_ids"][:, keep],
            one[f"{part}_attention_mask"][:, keep],
        )
    return one


def gradients(made: Agent, loss: Tensor) -> Tensor:
    """d loss / d everything that trains, in one line."""
    trained = [p for p in made.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(trained, found, strict=True)
        ]
    )


def logprobs(made: Agent, role: str, batch: Batch, *, temperature: float = 1.0) -> list[Tensor]:
    """From the definition: log_softmax of the transformers model's logits at each counted token,
    one unpadded row at a time."""
    found = []
    for index in range(len(batch["rewards"])):
        one = row(batch, index)
        with torch.no_grad(), made.shared.role(role) as core:
            logits = core(torch.cat([one["query_ids"], one["response_ids"]], dim=1)).logits[0] / temperature
        start = one["query_ids"].shape[1]
        predicted = logits[start - 1 : -1].log_softmax(-1)
        found.append(predicted.gather(-1, one["response_ids"][0][:, None])[:, 0])
    return found


def states(made: Agent, batch: Batch, role: str = "policy") -> list[Tensor]:
    """Hidden states before each counted token of the replies, one unpadded row at a time."""
    found = []
    for index in range(len(batch["rewards"])):
        one = row(batch, index)
        with torch.no_grad(), made.shared.role(role) as core:
            ids = torch.cat([one["query_ids"], one["response_ids"]], dim=1)
            found.append(
                core(ids, output_hidden_states=True).hidden_states[-1][0, one["query_ids"].shape[1] - 1 : -1]
            )
    return found


def entropies(made: Agent, batch: Batch) -> list[float]:
    core = made.shared.get_base_model()
    with torch.no_grad(), made.shared.role("policy"):
        return [slow.entropy(core.lm_head(state).tolist()) for rows in states(made, batch) for state in rows]


# ---- The README's loop ----


TEXTS = [{"text": ["good ba be", "ba", "bi bo bu da"]}, {"text": ["do", "fa fe fi", "fo fu"]}]


def readme_loop(folder: str, **quantized: Any) -> tuple[Agent, list[float]]:
    """The README's lines as they stand, but for the model's and the data's name; the imports are
    this module's."""
    model_base = AutoModelForCausalLM.from_pretrained(folder, **quantized)
    reward_model = RewardModel(folder)

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token

    model = Agent(model_base)
    ref_model = create_reference_model(model)

    max_new_tokens = 20
    generation_kwargs = {
        "min_length": -1,
        "top_k": 0.0,
        "top_p": 1.0,
        "do_sample": True,
        "pad_token_id": tokenizer.eos_token_id,
        "max_new_tokens": max_new_tokens,
    }

    config = RLHFConfig()
    trainer = RLHFTrainer(model, ref_model, config)
    optimizer = optim.SGD(model.parameters(), lr=1e-3)

    losses = []
    for batch in TEXTS:
        inputs = tokenizer(batch["text"], padding=True, truncation=True, return_tensors="pt")
        response_ids = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], **generation_kwargs
        )

        response_ids = response_ids[:, -max_new_tokens:]
        response_attention_mask = torch.ones_like(response_ids)

        with torch.no_grad():
            text_input_ids = torch.stack(
                [torch.concat([q, r]) for q, r in zip(inputs["input_ids"], response_ids)],  # noqa: B905
                dim=0,
            )
            rewards = reward_model(text_input_ids)

        loss = trainer.compute_loss(
            query_ids=inputs["input_ids"],
            query_attention_mask=inputs["attention_mask"],
            response_ids=response_ids,
            response_attention_mask=response_attention_mask,
            rewards=rewards,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("shape", SHAPES)
def test_readme_loop_runs_unchanged_and_trains_policy_and_critic_alone(shape, tmp_path):
    folder = tiny.save_base(tmp_path, shape)
    torch.manual_seed(0)
    model, losses = readme_loop(folder)
    assert len(losses) == 2 and torch.isfinite(torch.tensor(losses)).all()
    first_step_checks.check_gradients(model.shared.named_parameters())
    trained = {name: p for name, p in model.shared.named_parameters() if p.requires_grad}
    moved = [
        name
        for name, p in trained.items()
        if ("lora_B" in name or ".score." in name) and bool(p.detach().abs().max() > 0)
    ]
    assert len(moved) == len(trained) // 2 + 1  # every B, and the value head, from 0
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p
        for name, p in model.shared.state_dict().items()
    }
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_readme_loop_runs_on_a_4_bit_base(tmp_path):
    folder = tiny.save_base(
        tmp_path, "llama", hidden_size=64, head_dim=32, num_attention_heads=2, intermediate_size=64
    )
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model, losses = readme_loop(folder, quantization_config=nf4, dtype=torch.float32)
    assert torch.isfinite(torch.tensor(losses)).all()
    first_step_checks.check_gradients(model.shared.named_parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_ten_steps_on_a_toy_reward_raise_it(shape):
    torch.manual_seed(1)
    model = agent(shape, stirred=False)
    trainer, optimizer = trainer_of(model), optim.Adam(model.parameters(), lr=1e-2)
    queries, mask = tiny.batch((3, 5, 4, 5) * 32)

    def sampled() -> tuple[Tensor, Tensor]:
        response_ids = model.generate(queries, mask, max_new_tokens=4, pad_token_id=tiny.PAD)[:, -4:]
        return response_ids, (response_ids > tiny.VOCABULARY // 2).float().mean(-1)

    before = sampled()[1].mean().item()
    for _ in range(10):
        response_ids, rewards = sampled()
        loss = trainer.compute_loss(
            query_ids=queries,
            query_attention_mask=mask,
            response_ids=response_ids,
            response_attention_mask=torch.ones_like(response_ids),
            rewards=rewards,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = sampled()[1].mean().item()
    assert after > before + 0.2  # from about 0.45 to 0.75 and more, with any seed


# ---- The loss ----


@pytest.mark.parametrize("critic", ("shared", "adapter"))
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_ppo_from_its_definition(shape, critic):
    """Rows of unequal prompts and replies, a policy that has moved since it sampled, and a
    reference that is neither."""
    made, batch = agent(shape, critic=critic), replies(lengths=(6, 2, 4))
    settings = {
        "epsilon": 0.07,
        "ent_coef": 0.3,
        "vf_coef": 0.7,
        "cliprange_value": 0.1,
        "gamma": 0.9,
        "lam": 0.8,
        "kl_coef": 0.5,
    }
    trainer = trainer_of(made, **settings)
    head, role = made.shared.score_head("value").weight, "value" if critic == "adapter" else "policy"

    def values() -> list[list[float]]:
        return [(hidden @ head[0]).tolist() for hidden in states(made, batch, role)]

    old_logprobs, ref_logprobs, old_values = (
        logprobs(made, "policy", batch),
        logprobs(made, "reference", batch),
        values(),
    )
    old = trainer.snapshot(**batch)
    tiny.stir(made, std=0.02, seed=4)
    new_logprobs, new_values = logprobs(made, "policy", batch), values()

    advantages, returns = [], []
    for index, score in enumerate(batch["rewards"].tolist()):
        rewards = (-0.5 * (old_logprobs[index] - ref_logprobs[index])).tolist()
        rewards[-1] += score
        found = slow.gae_row(rewards, old_values[index], 0.9, 0.8)
        advantages += found
        returns += [a + v for a, v in zip(found, old_values[index], strict=True)]
    whitened = [(a - fmean(advantages)) / pstdev(advantages) for a in advantages]
    policy = slow.policy_loss(
        torch.cat(new_logprobs).tolist(), torch.cat(old_logprobs).tolist(), whitened, 0.07
    )
    value = slow.value_loss(
        [v for row in new_values for v in row], [v for row in old_values for v in row], returns, 0.1
    )
    expected = policy["loss"] + 0.7 * value["loss"] - 0.3 * fmean(entropies(made, batch))

    assert 0 < policy["policy/clip_fraction"] < 1 and 0 < value["value/clip_fraction"] < 1
    assert trainer.compute_loss(**batch, old=old).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_ratio_is_one_at_the_first_call(shape):
    made, batch = agent(shape), replies()
    trainer = trainer_of(made, whiten_advantages=False, vf_coef=0.0, ent_coef=0.0)
    advantages = trainer.snapshot(**batch).advantages
    assert trainer.compute_loss(**batch).item() == pytest.approx(-advantages.mean().item(), rel=1e-5)


def test_gradient_at_the_first_call_is_that_of_the_policy_gradient():
    made, batch = agent(), replies()
    trainer = trainer_of(made, vf_coef=0.0, ent_coef=0.0)
    advantages = trainer.snapshot(**batch).advantages
    policy_gradient = -(advantages * made.evaluate(trainer._rollout(**batch))[0]).mean()
    torch.testing.assert_close(
        gradients(made, trainer.compute_loss(**batch)), gradients(made, policy_gradient), rtol=1e-4, atol=1e-7
    )


def test_ratio_is_against_the_old_policy_and_not_the_reference():
    made, batch = agent(), replies()
    with_another_reference = RLHFTrainer(
        made, create_reference_model(agent("llama", temperature=3.0)), RLHFConfig(kl_coef=0.0)
    )
    trainer = trainer_of(made, kl_coef=0.0)
    old = trainer.snapshot(**batch)
    tiny.stir(made, seed=4)
    assert (
        trainer.compute_loss(**batch, old=old).item()
        == with_another_reference.compute_loss(**batch, old=old).item()
    )
    assert trainer.compute_loss(**batch, old=old).item() != trainer.compute_loss(**batch).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reward", (1.0, -1.0))
def test_a_good_reply_becomes_likelier_and_a_bad_one_less_likely(shape, reward):
    made, batch = agent(shape, stirred=False), replies((5,), (6,))
    batch["rewards"] = torch.tensor([reward])
    trainer = trainer_of(made, whiten_advantages=False, ent_coef=0.0)
    before = trainer.snapshot(**batch).logprobs.sum().item()
    optimizer = optim.SGD(made.parameters(), lr=1e-3)
    trainer.compute_loss(**batch).backward()
    optimizer.step()
    after = trainer.snapshot(**batch).logprobs.sum().item()
    assert (after - before) * reward > 1e-4


def test_entropy_bonus_raises_entropy():
    made, batch = agent(), replies() | {"rewards": torch.zeros(3)}
    trainer = trainer_of(made, ent_coef=1.0, vf_coef=0.0, kl_coef=0.0, whiten_advantages=False)
    with torch.no_grad():
        made.shared.score_head("value").weight.zero_()  # no advantage anywhere: the entropy is all there is
    before = fmean(entropies(made, batch))
    optimizer = optim.SGD(made.parameters(), lr=1e-2)
    trainer.compute_loss(**batch).backward()
    optimizer.step()
    assert fmean(entropies(made, batch)) > before + 1e-3


def test_each_response_token_has_an_advantage_of_its_own():
    """With gamma = lam = 1 and no KL it is what the reply earned, less what was expected of it
    before that token."""
    made, batch = agent(), replies()
    trainer = trainer_of(made, lam=1.0, kl_coef=0.0, whiten_advantages=False)
    old = trainer.snapshot(**batch)
    assert old.advantages.shape == (3, 6) and len(old.values.unique()) == 18
    torch.testing.assert_close(old.advantages, batch["rewards"][:, None] - old.values)


def test_advantages_run_over_the_tokens_of_a_reply_and_not_over_the_batch():
    trainer, batch = trainer_of(agent(), whiten_advantages=False), replies(lengths=(6, 2, 4))
    together = trainer.snapshot(**batch).advantages
    for index, length in enumerate((6, 2, 4)):
        torch.testing.assert_close(
            trainer.snapshot(**row(batch, index)).advantages[0],
            together[index, :length],
            rtol=1e-4,
            atol=1e-5,
        )


def test_kl_to_the_reference_is_in_the_reward():
    made, batch = agent(), replies()
    trainer = trainer_of(made, lam=1.0, kl_coef=0.5, whiten_advantages=False)
    kl = torch.stack(logprobs(made, "policy", batch)) - torch.stack(logprobs(made, "reference", batch))
    assert kl.abs().max() > 0.1
    still_to_pay = kl.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(
        trainer.snapshot(**batch).returns,
        batch["rewards"][:, None] - 0.5 * still_to_pay,
        rtol=1e-4,
        atol=1e-4,
    )


def test_further_passes_use_the_old_policy_and_clip_what_left_the_range():
    made, batch = agent(), replies()
    trainer = trainer_of(made, vf_coef=0.0, ent_coef=0.0)
    old = trainer.snapshot(**batch)
    # Every ratio has left it in its advantage's favour
    favoured = dataclasses.replace(old, logprobs=old.logprobs - old.advantages.sign())
    assert gradients(made, trainer.compute_loss(**batch, old=old)).abs().max() > 0
    assert gradients(made, trainer.compute_loss(**batch, old=favoured)).abs().max() == 0


def test_minibatches_of_one_snapshot_add_up_to_the_whole():
    made, batch = agent(), replies(lengths=(6, 2, 4))
    trainer = trainer_of(made)
    old = trainer.snapshot(**batch)
    tiny.stir(made, std=0.01, seed=4)
    parts = []
    for rows in ([0], [1, 2]):
        minibatch = {name: x[rows] for name, x in batch.items()}
        parts.append(6 * trainer.compute_loss(**minibatch, old=old.rows(torch.tensor(rows))).item())
    assert sum(parts) / 12 == pytest.approx(trainer.compute_loss(**batch, old=old).item(), rel=1e-4)


# ---- Which tokens count, and where ----


@pytest.mark.parametrize("temperature", (1.0, 0.7))
@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_are_log_softmax_of_the_sampled_tokens(shape, temperature):
    made, batch = agent(shape, temperature=temperature), replies()
    expected = torch.stack(logprobs(made, "policy", batch, temperature=temperature))
    trainer = trainer_of(made)
    torch.testing.assert_close(trainer.snapshot(**batch).logprobs, expected, rtol=1e-4, atol=1e-5)
    of_reference = torch.stack(logprobs(made, "reference", batch, temperature=temperature))
    torch.testing.assert_close(
        trainer.ref_model.logprobs(trainer._rollout(**batch)), of_reference, rtol=1e-4, atol=1e-5
    )


def test_logprobs_are_the_same_at_each_call_in_training_mode_too():
    made, batch = Agent(tiny.base("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)), replies()
    trainer = trainer_of(made)
    first = trainer.snapshot(**batch).logprobs
    made.train()
    assert torch.equal(trainer.snapshot(**batch).logprobs, first)


@pytest.mark.parametrize("position", range(6))
def test_each_response_token_changes_the_loss_the_first_too(position):
    trainer, batch = trainer_of(agent()), replies()
    before = trainer.compute_loss(**batch).item()
    batch["response_ids"] = batch["response_ids"].clone()
    batch["response_ids"][0, position] = (batch["response_ids"][0, position] - 4 + 1) % 50 + 4
    assert abs(trainer.compute_loss(**batch).item() - before) > 1e-5


@pytest.mark.parametrize("after", (tiny.EOS, tiny.PAD, 17, -100))
@pytest.mark.parametrize("masked", (False, True))
def test_nothing_after_the_end_has_a_say(after, masked):
    """Whether the mask has it or not: the README's mask is all ones."""
    made, batch = agent(), replies()
    trainer = trainer_of(made)
    short = {name: x.clone() for name, x in batch.items()}
    short["response_ids"][:, 3] = tiny.EOS
    whole = {name: x.clone() for name, x in short.items()}
    short["response_ids"], short["response_attention_mask"] = (
        short["response_ids"][:, :4],
        short["response_attention_mask"][:, :4],
    )
    whole["response_ids"][:, 4:] = after
    if masked:
        whole["response_attention_mask"][:, 4:] = 0
    loss, expected = trainer.compute_loss(**whole), trainer.compute_loss(**short)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(made, loss), gradients(made, expected), rtol=1e-4, atol=1e-6)


def test_an_end_of_text_id_in_padding_is_no_end():
    batch = replies(lengths=(6, 2, 4))
    batch["response_ids"][batch["response_attention_mask"] == 0] = tiny.EOS
    batch["response_ids"][0, 5] = tiny.EOS
    rollout = trainer_of(agent())._rollout(**batch)
    assert rollout.lengths.tolist() == [6, 2, 4] and rollout.ended.tolist() == [True, False, False]


def test_the_end_itself_is_trained_on():
    batch = replies()
    batch["response_ids"][:, 3] = tiny.EOS
    assert (trainer_of(agent()).snapshot(**batch).logprobs != 0).sum(-1).tolist() == [4, 4, 4]


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_of_unequal_prompts_equals_its_rows_one_by_one(shape, side):
    made, batch = agent(shape), replies(side=side)
    trainer = trainer_of(made, whiten_advantages=False)
    alone = [trainer.compute_loss(**row(batch, index)) for index in range(3)]
    loss = trainer.compute_loss(**batch)
    assert loss.item() == pytest.approx(fmean(x.item() for x in alone), rel=1e-4)
    torch.testing.assert_close(gradients(made, loss), gradients(made, sum(alone) / 3), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ("query_ids", "response_ids"))
def test_ids_in_padding_have_no_say(name):
    trainer, batch = trainer_of(agent()), replies(lengths=(6, 2, 4))
    before = trainer.compute_loss(**batch).item()
    mask = batch[name.replace("ids", "attention_mask")].bool()
    assert trainer.compute_loss(**batch | {name: torch.where(mask, batch[name], -100)}).item() == before


# ---- The reference ----


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_copies_no_weight(shape):
    made = agent(shape, stirred=False)
    owned = {p.data_ptr() for p in made.parameters()}
    reference = create_reference_model(made)
    parameters = list(reference.parameters())
    assert len(parameters) == len(list(tiny.base(shape).parameters()))
    assert {p.data_ptr() for p in parameters} <= owned and not any(p.requires_grad for p in parameters)
    assert {p.data_ptr() for p in made.parameters()} == owned and not reference.state_dict()


def test_reference_gets_no_gradient_and_stays_as_training_goes_on():
    made, batch = agent(stirred=False), replies()
    trainer, optimizer = trainer_of(made), optim.SGD(made.parameters(), lr=0.5)
    rollout = trainer._rollout(**batch)
    before, policy_before = trainer.ref_model.logprobs(rollout), trainer.snapshot(**batch).logprobs
    torch.testing.assert_close(before, policy_before)
    for _ in range(2):
        trainer.compute_loss(**batch).backward()
        optimizer.step()
    assert not trainer.ref_model.logprobs(rollout).requires_grad
    assert all(p.grad is None for p in trainer.ref_model.parameters())
    assert all(
        p.grad is None for name, p in made.named_parameters() if "lora" not in name and ".score." not in name
    )
    assert torch.equal(trainer.ref_model.logprobs(rollout), before)
    assert not torch.equal(trainer.snapshot(**batch).logprobs, policy_before)


@pytest.mark.parametrize("kind", ["plain", "agent"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_answers_as_the_untrained_model_also_after_training(kind, shape):
    """Compared with a copy of all weights, as InstructGOOSE makes one, by transformers itself."""
    model = tiny.base(shape)
    ids, mask = tiny.batch(side="left")
    copied = copy.deepcopy(model).eval()
    made = model if kind == "plain" else Agent(model)
    reference, batch = create_reference_model(made), replies()
    trainer = RLHFTrainer(made, reference, RLHFConfig())
    optimizer = optim.SGD(made.parameters(), lr=0.5)
    greedy = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    greedy["pad_token_id"] = tiny.PAD
    for _ in range(3):
        with torch.no_grad():
            want = copied(ids, attention_mask=mask).logits
            torch.testing.assert_close(reference(ids, attention_mask=mask).logits, want)
            assert torch.equal(reference.generate(ids, **greedy), copied.generate(ids, **greedy))
        trainer.compute_loss(**batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert not torch.allclose(model(ids, attention_mask=mask).logits, want), "it was trained"
    assert reference.config.vocab_size == copied.config.vocab_size
    theirs = [p.data for p in copied.parameters()]
    ours = list(reference.parameters())
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    assert {p.data_ptr() for p in ours} <= {p.data_ptr() for p in model.parameters()}
    assert not any(p.requires_grad for p in ours)


def test_a_plain_model_answers_as_before_when_it_has_a_reference():
    model = tiny.base("gpt2")
    ids, mask = tiny.batch()
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        create_reference_model(model)
        assert torch.equal(model(ids, attention_mask=mask).logits, want)
        create_reference_model(model)
        assert torch.equal(model(ids, attention_mask=mask).logits, want)


def test_a_model_has_one_agent():
    model = tiny.base("llama")
    create_reference_model(model)
    with pytest.raises(ValueError, match=r"has an agent already.*Give RLHFTrainer the model"):
        Agent(model)


def test_a_plain_model_without_an_agent_is_refused():
    reference = create_reference_model(agent())
    with pytest.raises(ValueError, match=r"without an agent.*create_reference_model\(model\)"):
        RLHFTrainer(tiny.base("llama"), reference, RLHFConfig())


def peft_model(shape: str, **settings: Any) -> PeftModel:
    """What plain PEFT makes of a tiny base, its adapter random."""
    targets = ["c_attn"] if shape == "gpt2" else ["q_proj", "v_proj", "up_proj"]
    config = {"r": 3, "target_modules": targets, "fan_in_fan_out": shape == "gpt2"}
    peft = get_peft_model(tiny.base(shape), LoraConfig(task_type="CAUSAL_LM", **config | settings))
    tiny.stir(peft, std=0.1)
    return peft.eval()


MADE = {
    "plain": lambda shape: tiny.base(shape),
    "PEFT": lambda shape: peft_model(shape),
    "DoRA": lambda shape: peft_model(shape, use_dora=True),
    "agent": lambda shape: Agent(tiny.base(shape)),
    "agent of PEFT": lambda shape: Agent(peft_model(shape), critic="adapter"),
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("shape", SHAPES)
def test_references_made_at_different_times_answer_as_the_model_did_at_each(kind, shape):
    """Compared with deep copies, which transformers and PEFT run, all along."""
    ids, mask = tiny.batch(side="left")
    greedy = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": tiny.PAD}
    model, batch, made = MADE[kind](shape), replies(), []
    weights = {p.data_ptr() for n, p in model.named_parameters() if "lora_" not in n}

    def core(of: Any) -> Any:
        return of.shared.core if isinstance(of, Agent) else of

    for at in range(3):
        copied = copy.deepcopy(core(model)).eval()
        reference = create_reference_model(model)
        made.append((copied, reference))
        trainer = RLHFTrainer(model, reference, RLHFConfig(kl_coef=0.1 * at))
        optimizer = optim.SGD(model.parameters(), lr=0.5)
        before = trainer.snapshot(**batch).logprobs
        torch.testing.assert_close(reference.logprobs(trainer._rollout(**batch)), before)
        for _ in range(2):
            trainer.compute_loss(**batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.allclose(trainer.snapshot(**batch).logprobs, before, atol=1e-3), "it trains"
        with torch.no_grad():
            for theirs, ours in made:
                want = theirs(input_ids=ids, attention_mask=mask).logits
                torch.testing.assert_close(ours(ids, attention_mask=mask).logits, want)
                said, want = ours.generate(ids, **greedy), theirs.generate(input_ids=ids, **greedy)
                if kind.startswith("agent"):  # an agent pads to max_new_tokens, transformers may stop before
                    want = F.pad(want, (0, ids.shape[1] + 4 - want.shape[1]), value=tiny.PAD)
                assert torch.equal(said, want)
                assert ours.config.to_dict() == theirs.config.to_dict()
                large = [p for n, p in ours.named_parameters() if "lora_" not in n]
                assert {p.data_ptr() for p in large if p.dim() > 1} <= weights, "the base is not copied"
                assert not any(p.requires_grad for p in ours.parameters())


def test_a_model_of_peft_goes_on_as_itself(tmp_path):
    """Its parameters, and what it says and saves, are those of the agent's policy."""
    peft, (ids, mask) = peft_model("llama"), tiny.batch()
    optimizer = optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.5)
    with torch.no_grad():
        want = peft(input_ids=ids, attention_mask=mask).logits
        trainer = RLHFTrainer(peft, create_reference_model(peft), RLHFConfig())
        torch.testing.assert_close(peft(input_ids=ids, attention_mask=mask).logits, want)
    trainer.compute_loss(**replies()).backward()
    optimizer.step()
    with torch.no_grad():
        trained = peft(input_ids=ids, attention_mask=mask).logits
        assert not torch.allclose(trained, want, atol=1e-3), "an optimizer made before trains it"
        peft.save_pretrained(tmp_path, selected_adapters=["default"])
        again = PeftModel.from_pretrained(tiny.base("llama"), tmp_path).eval()
        torch.testing.assert_close(again(input_ids=ids, attention_mask=mask).logits, trained)


def test_adapters_of_peft_that_cannot_be_a_policy_are_refused_and_left_alone():
    ids, mask = tiny.batch()
    vera = get_peft_model(tiny.base(), VeraConfig(target_modules=["q_proj", "up_proj"], r=3))
    two = peft_model("llama")
    two.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    refused = {
        "PISSA|pissa": peft_model("llama", init_lora_weights="pissa"),
        "VERA": vera.eval(),
        "default, second": two,
        "bias=": peft_model("llama", bias="lora_only"),
    }
    for named, peft in refused.items():
        with torch.no_grad():
            want = peft(input_ids=ids, attention_mask=mask).logits
            with pytest.raises(UserError, match=named):
                create_reference_model(peft)
            assert torch.equal(peft(input_ids=ids, attention_mask=mask).logits, want)


def test_a_base_with_adapters_of_its_own_is_refused():
    model = tiny.base()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    for make in (create_reference_model, lambda base: SharedBase.build(base, tiny.lora(tiny.base()))):
        with pytest.raises(UserError, match="has adapters already"):
            make(model)


def test_a_reference_whose_base_has_been_written_to_says_so():
    model, (ids, _) = tiny.base(), tiny.batch()
    reference = create_reference_model(model)
    reference(ids)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    with pytest.raises(UserError, match="have changed since its reference was made"):
        reference(ids)


CHANGES = {
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "one weight to float64": lambda model: model.lm_head.double(),
    "more words": lambda model: model.resize_token_embeddings(80),
    "another head": lambda model: setattr(model, "lm_head", torch.nn.Linear(tiny.HIDDEN, tiny.VOCABULARY)),
    "a norm less": lambda model: setattr(model.base_model, "norm", torch.nn.Identity()),
    "a bias more": lambda model: setattr(
        model.lm_head, "bias", torch.nn.Parameter(torch.ones(tiny.VOCABULARY))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_reference_whose_base_is_another_now_says_so(change):
    """And one that is made afterwards answers as the changed model does."""
    model, (ids, _) = tiny.base(), tiny.batch()
    reference, rollout = create_reference_model(model), trainer_of(agent())._rollout(**replies())
    reference(ids)
    CHANGES[change](model)
    for answer in (
        lambda: reference(ids),
        lambda: reference.generate(ids),
        lambda: reference.logprobs(rollout),
    ):
        with pytest.raises(
            UserError, match=r"have changed since .* call create_reference_model\(model\) again"
        ):
            answer()
    if change != "one weight to float64":
        with torch.no_grad():
            assert torch.equal(create_reference_model(model)(ids).logits, model(ids).logits)


def test_what_changes_no_weight_of_the_base_leaves_the_reference_as_it_is():
    model, (ids, _) = tiny.base(), tiny.batch()
    reference = create_reference_model(model)
    want = reference(ids).logits
    model.train()
    model.requires_grad_(True)
    model.to("cpu", torch.float32)
    another = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    reference.agent.shared.add_adapter("another", another)
    assert torch.equal(reference(ids).logits, want)


def test_a_reference_reads_embeddings_as_its_model_does():
    model, (ids, mask) = tiny.base(), tiny.batch()
    reference = create_reference_model(model)
    given = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    greedy = {"do_sample": False, "max_new_tokens": 4}
    with torch.no_grad():
        assert torch.equal(reference(**given).logits, model(**given).logits)
        assert torch.equal(reference.generate(**given, **greedy), model.generate(**given, **greedy))
    with pytest.raises(UserError, match="continues token ids"):
        create_reference_model(agent()).generate(**given)


def test_the_references_settings_of_generation_are_those_of_its_making():
    model, (ids, mask) = tiny.base(), tiny.batch()
    reference = create_reference_model(model)
    want = reference.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=3)
    model.generation_config.repetition_penalty = 50.0
    assert torch.equal(reference.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=3), want)
    assert model.generation_config.repetition_penalty == 50.0


def test_freezing_the_reference_leaves_what_trains_alone():
    made = agent()
    trainable = sum(p.requires_grad for p in made.parameters())
    for flag in (False, True):
        create_reference_model(made).eval().requires_grad_(flag)
        assert sum(p.requires_grad for p in made.parameters()) == trainable > 0


def test_a_policy_from_an_adapter_has_that_adapter_as_its_reference(tmp_path):
    trained = agent()
    trained.shared.save_pretrained(tmp_path, selected_adapters=["default"])
    made, batch = Agent(tiny.base("llama"), policy=str(tmp_path)), replies()
    rollout = trainer_of(made)._rollout(**batch)
    expected = torch.stack(logprobs(trained, "policy", batch))
    torch.testing.assert_close(create_reference_model(made).logprobs(rollout), expected, rtol=1e-4, atol=1e-5)


# ---- Agent ----


def test_only_adapter_and_value_head_train():
    made = agent("llama", critic="adapter")
    wrong = [
        n
        for n, p in made.shared.named_parameters()
        if p.requires_grad != (".default." in n or ".value." in n)
    ]
    assert not wrong


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_gives_an_action_with_its_own_logprob_entropy_and_value(shape):
    made, batch = agent(shape), replies(prompts=(5, 3, 4), side="right")
    action, found, entropy, value = made(batch["query_ids"], batch["query_attention_mask"])
    one = batch | {
        "response_ids": action[:, None],
        "response_attention_mask": torch.ones_like(action)[:, None],
    }
    torch.testing.assert_close(found, torch.cat(logprobs(made, "policy", one)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, torch.tensor(entropies(made, one)), rtol=1e-4, atol=1e-5)
    head = made.shared.score_head("value").weight
    torch.testing.assert_close(
        value, torch.stack([hidden[0] @ head[0] for hidden in states(made, one)]), rtol=1e-4, atol=1e-5
    )


def test_the_readme_slice_is_the_reply_even_if_all_end_early():
    model = tiny.base("llama")
    # Every reply ends with its first token
    model.generation_config.eos_token_id = list(range(tiny.VOCABULARY))
    queries, mask = tiny.batch()
    out = Agent(model).generate(queries, mask, max_new_tokens=7, pad_token_id=tiny.PAD)
    assert out.shape == (3, queries.shape[1] + 7) and torch.equal(out[:, :-7], queries)
    assert (out[:, -6:] == tiny.PAD).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_replies_do_not_depend_on_padding(shape):
    made = agent(shape)
    (left, mask), (right, right_mask) = (tiny.batch((5, 3, 4), side=side) for side in ("left", "right"))
    right[right_mask == 0] = 7
    settings = {"do_sample": False, "max_new_tokens": 6}
    found, same = made.generate(left, mask, **settings), made.generate(right, right_mask, **settings)
    assert torch.equal(found[:, :-6], left) and torch.equal(same[:, :-6], right)
    assert torch.equal(found[:, -6:], same[:, -6:])
    assert torch.equal(found[1, -6:], made.generate(right[1:2, :3], **settings)[0, -6:])


def test_replies_of_the_reference_are_those_of_the_bare_base():
    made, (queries, mask) = agent(), tiny.batch()
    plain = tiny.base("llama").generate(queries, attention_mask=mask, do_sample=False, max_new_tokens=6)
    of_reference = made.generate(
        queries, mask, do_sample=False, max_new_tokens=6, role="reference", pad_token_id=tiny.PAD
    )
    assert torch.equal(of_reference[:, : plain.shape[1]], plain)
    assert not torch.equal(
        of_reference, made.generate(queries, mask, do_sample=False, max_new_tokens=6, pad_token_id=tiny.PAD)
    )


@pytest.mark.parametrize(
    "setting",
    (
        {"top_k": 50},
        {"top_p": 0.9},
        {"temperature": 0.5},
        {"min_length": 3},
        {"repetition_penalty": 1.2},
        {"eos_token_id": 9},
    ),
)
def test_settings_under_which_replies_are_not_the_policys_are_refused(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}.*not be samples of the policy"):
        agent().generate(torch.tensor([[5, 6]]), **setting)


def test_a_model_without_an_end_of_text_token_is_refused():
    model = tiny.base("llama", eos_token_id=None)
    with pytest.raises(ValueError, match=r"cannot end\. Set model\.generation_config\.eos_token_id"):
        Agent(model)


# ---- Optimizers, checkpointing and folders of transformers ----


@pytest.mark.parametrize("kind", ["plain", "agent"])
@pytest.mark.parametrize("mixed", [False, True])
def test_an_optimizer_made_before_the_model_was_frozen_is_refused_at_its_first_step(kind, mixed):
    model, other = tiny.base("gpt2"), torch.nn.Linear(3, 3)
    optimizer = optim.AdamW(
        [*model.parameters(), *other.parameters()] if mixed else model.parameters(), lr=1e-2
    )
    made = model if kind == "plain" else Agent(model)
    trainer = RLHFTrainer(made, create_reference_model(made), RLHFConfig())
    trainer.compute_loss(**replies()).backward()
    with pytest.raises(UserError, match=r"AdamW .* Make the optimizer after create_reference_model"):
        optimizer.step()
    # The way out, which trains
    before = trainer.snapshot(**replies()).logprobs
    optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    assert not torch.allclose(trainer.snapshot(**replies()).logprobs, before)


def test_an_optimizer_that_has_stepped_before_the_model_was_frozen_is_refused_too():
    model, (ids, _) = tiny.base("gpt2"), tiny.batch()
    optimizer = optim.SGD(model.parameters(), lr=1e-2)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    reference = create_reference_model(model)
    want = reference(ids).logits
    with pytest.raises(UserError, match="Make the optimizer after"):
        optimizer.step()  # the gradients are there still, and would change the frozen weights
    assert torch.equal(reference(ids).logits, want)


def test_other_optimizers_are_left_alone_and_looked_at_once(monkeypatch):
    made, other = agent(), torch.nn.Linear(3, 3)
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, optimizer = other.weight.detach().clone(), optim.SGD(other.parameters(), lr=1.0)
    optimizer.step()
    looks = []
    monkeypatch.setattr(Agent, "parameters", lambda self: looks.append(self) or iter(()))
    for _ in range(3):
        optimizer.step()
    assert not looks
    torch.testing.assert_close(other.weight.detach(), before - 4)
    optimizer.add_param_group({"params": made.shared.score_head("value").weight})
    optimizer.step()
    assert looks


def test_a_watched_agent_goes_when_its_model_goes():
    model = tiny.base()
    gone = weakref.ref(create_reference_model(model).agent)
    optim.SGD([p for p in model.parameters() if p.requires_grad]).step()
    del model
    gc.collect()
    assert gone() is None


CHECKPOINTED = {
    "plain": lambda model: (model, model),
    "agent": lambda model: (Agent(model), model),
    "agent with two adapters": lambda model: (Agent(model, critic="adapter"), model),
}


@pytest.mark.parametrize("kind", CHECKPOINTED)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_checkpointing_of_the_model_changes_no_gradient(shape, first, kind):
    """Enabled before the reference is made or afterwards, and the reference asked before
    backward."""
    found, recomputed = [], []
    for on in (False, True):
        base = tiny.base(shape)
        if on and first:
            base.gradient_checkpointing_enable()
        made, model = CHECKPOINTED[kind](base)
        reference = create_reference_model(made)
        tiny.stir(reference.agent, std=0.05)
        if on and not first:
            model.gradient_checkpointing_enable()
        made.train()
        trainer, calls = RLHFTrainer(made, reference, RLHFConfig()), []
        reference.agent.shared.layers[2].register_forward_hook(lambda *_, calls=calls: calls.append("layer"))
        inside = next(m for m in reference.agent.shared.layers[2].modules() if hasattr(m, "base_layer"))
        inside.register_forward_hook(lambda *_, calls=calls: calls.append("inside"))
        loss = trainer.compute_loss(**replies(lengths=(6, 2, 4)))
        reference(tiny.batch()[0])
        forward = calls.count("inside")
        loss.backward()
        recomputed.append(calls.count("inside") > forward)
        trained = [p for p in reference.agent.parameters() if p.requires_grad]
        found.append([p.grad for p in trained])
    assert recomputed == [False, True]
    assert all(grad is not None and grad.any() for grad in found[0])
    torch.testing.assert_close(found[1], found[0])


def test_checkpointing_that_cannot_know_roles_is_refused():
    for options in ({"use_reentrant": True}, {"use_reentrant": False, "context_fn": tuple}):
        model = tiny.base()
        trainer = RLHFTrainer(model, create_reference_model(model), RLHFConfig())
        model.gradient_checkpointing_enable(options)
        with pytest.raises(UserError, match=r"Call model\.gradient_checkpointing_enable"):
            trainer.compute_loss(**replies())
        model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.compute_loss(**replies()).backward()


def test_a_model_with_checkpointing_generates_what_it_did():
    model, (ids, mask) = tiny.base(), tiny.batch()
    greedy = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6}
    want = model.generate(ids, **greedy)
    reference = create_reference_model(model)
    model.train()
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(ids, **greedy), want)
    assert torch.equal(reference.generate(ids, **greedy), want)
    assert model.training and model.is_activation_checkpointing


@pytest.mark.parametrize("critic", ["shared", "adapter"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_an_agent_saves_is_loaded_by_transformers_and_peft_and_goes_on(shape, critic, tmp_path):
    base, folder = tiny.save_base(tmp_path / "base", shape), tmp_path / "saved"
    made, (ids, mask) = Agent(AutoModelForCausalLM.from_pretrained(base), critic=critic), tiny.batch()
    tiny.stir(made, std=0.05)
    made.save_pretrained(folder)
    with torch.no_grad():
        want = made.shared.core(ids, attention_mask=mask).logits
        bare = AutoModelForCausalLM.from_pretrained(base)
        assert not torch.allclose(bare(ids, attention_mask=mask).logits, want, atol=1e-3)
        for again in (AutoModelForCausalLM.from_pretrained(folder), PeftModel.from_pretrained(bare, folder)):
            torch.testing.assert_close(again.eval()(input_ids=ids, attention_mask=mask).logits, want)
    # The critic too
    onward = Agent(AutoModelForCausalLM.from_pretrained(base), policy=str(folder), critic=critic)
    onward.shared.load_role("value", folder / "value")
    rollout = trainer_of(made)._rollout(**replies())
    torch.testing.assert_close(onward.evaluate(rollout), made.evaluate(rollout))


def loaded(folder: Any, ids: Tensor) -> Tensor:
    """Logits of the model in ``folder``, which must be whole, by transformers alone."""
    model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    with torch.no_grad():
        return model(ids).logits


def same_but_for_rounding(merged: Tensor, want: Tensor) -> None:
    """Weights are added before the product instead of after it, in logits of about 10."""
    torch.testing.assert_close(merged, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "agent", "PEFT"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_is_saved_whole_as_it_was_trained(shape, tied, kind, tmp_path):
    """Its base too, which is in no folder: it was made in memory."""
    model, ids = tiny.base(shape, tie_word_embeddings=tied), tiny.batch()[0]
    targets = ["c_attn"] if shape == "gpt2" else ["q_proj"]
    peft = LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
    made = {
        "plain": lambda: model,
        "agent": lambda: Agent(model),
        "PEFT": lambda: get_peft_model(model, peft),
    }
    trained = made[kind]()
    trainer = RLHFTrainer(trained, create_reference_model(trained), RLHFConfig())
    trainer.compute_loss(**replies()).backward()
    before = model(ids).logits
    optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.5).step()
    copied = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    with torch.no_grad():
        want = model(ids).logits
        assert not torch.allclose(want, before, atol=1e-3)
        same_but_for_rounding(loaded(tmp_path / "saved", ids), want)
        assert torch.equal(model(ids).logits, want)
        trainer.ref_model(ids)  # no weight of the base was written to
        # A copy saves itself
        tiny.stir(copied, std=0.05)
        copied.save_pretrained(tmp_path / "copied")
        same_but_for_rounding(loaded(tmp_path / "copied", ids), copied(ids).logits)


def test_adapted_embeddings_that_were_tied_are_saved_beside_the_head(tmp_path):
    model, ids = tiny.base("gpt2", tie_word_embeddings=True), tiny.batch()[0]
    tiny.stir(Agent(model, policy=LoraConfig(target_modules=["wte", "c_attn"])), std=0.05)
    model.save_pretrained(tmp_path)
    same_but_for_rounding(loaded(tmp_path, ids), model(ids).logits.detach())


def test_a_model_on_a_4_bit_base_is_saved_dense(tmp_path):
    widths = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "intermediate_size": 64}
    base, ids = tiny.save_base(tmp_path / "base", "llama", **widths), tiny.batch()[0]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=torch.float32)
    tiny.stir(create_reference_model(model).agent, std=0.05)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        same_but_for_rounding(loaded(tmp_path / "saved", ids), model(ids).logits)


def test_a_model_that_cannot_be_saved_whole_says_how_its_adapter_is(tmp_path, monkeypatch):
    way_out = r"create_reference_model\(model\)\.agent\.save_pretrained\(FOLDER\)"
    model, dora = tiny.base(), Agent(tiny.base(), policy=LoraConfig(target_modules=["q_proj"], use_dora=True))
    create_reference_model(model)
    with pytest.raises(UserError, match=f"plain LoRA only.*{way_out}"):
        dora.shared.core.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match=f"takes no state_dict.*{way_out}"):
        model.save_pretrained(tmp_path / "saved", state_dict=model.state_dict())
    monkeypatch.setattr("goose_lora.instruct.free_bytes", lambda device: 10)
    with pytest.raises(UserError, match=f"0.0 GB are free.*{way_out}"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    create_reference_model(model).agent.save_pretrained(tmp_path / "saved")
    PeftModel.from_pretrained(tiny.base(), tmp_path / "saved")


# ---- Rewards ----


def test_pairwise_loss_is_one_mean_and_finite_at_any_difference():
    chosen, rejected = torch.tensor([1.0, 0.5, -2.0, 3.0]), torch.tensor([0.0, 0.5, 1.0, -1.0])
    expected = slow.pairwise_loss(chosen.tolist(), rejected.tolist(), [0.0] * 4)
    assert PairwiseLoss()(chosen, rejected).item() == pytest.approx(expected)
    assert PairwiseLoss()(chosen[:, None], rejected[:, None]).item() == pytest.approx(expected)
    assert PairwiseLoss()(torch.tensor([-200.0]), torch.tensor([0.0])).item() == 200.0
    with pytest.raises(ValueError, match="not pairs"):
        PairwiseLoss()(chosen, rejected[:1])


@pytest.fixture(scope="module", params=SHAPES)
def scorer(request, tmp_path_factory) -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(tiny.save_base(tmp_path_factory.mktemp(request.param), request.param))


def test_scores_are_those_of_the_sequence_classifier_and_do_not_depend_on_padding(scorer):
    left, right = (scorer(*tiny.batch((9, 5, 7), side=side)) for side in ("left", "right"))
    ids, mask = tiny.batch((9, 5, 7), side="right")
    alone = [scorer.model(input_ids=x[None, : m.sum()]).logits[0, 0] for x, m in zip(ids, mask, strict=True)]
    assert isinstance(scorer.model, type(AutoModelForSequenceClassification.from_config(scorer.model.config)))
    torch.testing.assert_close(left, torch.stack(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(right, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_scores_are_not_bounded(scorer):
    before = scorer(*tiny.batch())
    with torch.no_grad():
        scorer.model.score.weight.mul_(1000.0)
        after = scorer(*tiny.batch())
        scorer.model.score.weight.div_(1000.0)
    assert after.abs().max() > 10
    torch.testing.assert_close(after, 1000 * before, rtol=1e-4, atol=1e-3)  # fp32, in the thousands


def test_values_are_not_bounded():
    made, batch = agent(), replies()
    trainer = trainer_of(made)
    before = trainer.snapshot(**batch).values
    with torch.no_grad():
        made.shared.score_head("value").weight.mul_(1000.0)
    assert trainer.snapshot(**batch).values.abs().max() > 10
    torch.testing.assert_close(trainer.snapshot(**batch).values, 1000 * before, rtol=1e-4, atol=1e-3)


def test_reward_model_learns_from_pairs(scorer):
    chosen, rejected = tiny.batch(seed=7), tiny.batch(seed=8)
    optimizer = optim.Adam(scorer.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = PairwiseLoss()(scorer(*chosen), scorer(*rejected))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ---- What is refused ----


@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({"rewards": torch.ones(2)}, "must be"),
        ({"rewards": torch.ones(3, 1)}, "must be"),
        ({"query_attention_mask": torch.ones(3, 4)}, "must be"),
        ({"response_attention_mask": torch.ones(3, 11)}, "must be"),
        ({"response_ids": torch.ones(2, 6).long(), "response_attention_mask": torch.ones(2, 6)}, "must be"),
        ({"query_ids": torch.ones(5).long(), "query_attention_mask": torch.ones(5)}, "must be"),
        ({"rewards": torch.tensor([1.0, float("nan"), 0.0])}, "not finite"),
        ({"query_attention_mask": torch.zeros(3, 5)}, "no token that counts"),
        ({"response_attention_mask": torch.zeros(3, 6)}, "no token that counts"),
        ({"response_attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]] * 3)}, "1 after a 0"),
    ),
)
def test_tensors_that_do_not_belong_together_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(agent()).compute_loss(**replies() | changed)


def test_a_snapshot_of_other_rows_is_refused():
    trainer, batch = trainer_of(agent()), replies()
    with pytest.raises(ValueError, match=r"old\.rows"):
        trainer.compute_loss(**row(batch, 0), old=trainer.snapshot(**batch))


def no_causal_models() -> dict[str, Any]:
    llama = AutoConfig.for_model("llama", **tiny.ARCHITECTURES["llama"])
    bert = {"hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 7}
    scorer = AutoModelForSequenceClassification.from_config(llama)
    return {
        "str": "gpt2",
        "NoneType": None,
        "Linear": torch.nn.Linear(3, 3),
        "BertModel": AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=61, **bert)),
        "LlamaModel": AutoModel.from_config(llama),
        "LlamaForSequenceClassification": scorer,
    }


@pytest.mark.parametrize("kind", no_causal_models())
def test_what_is_no_causal_language_model_is_refused(kind):
    given, reference = no_causal_models()[kind], create_reference_model(agent())
    for take in (create_reference_model, Agent, lambda model: RLHFTrainer(model, reference, RLHFConfig())):
        with pytest.raises(
            UserError, match=rf"of type {kind}, and must be a causal language model\. Load one"
        ):
            take(given)


def test_a_classifier_of_peft_is_refused():
    config = AutoConfig.for_model("llama", **tiny.ARCHITECTURES["llama"])
    scorer = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(UserError, match="LlamaForSequenceClassification, and must be a causal"):
        create_reference_model(get_peft_model(scorer, LoraConfig(task_type="SEQ_CLS")))


def test_a_copied_reference_is_refused():
    made = agent()
    with pytest.raises(ValueError, match="create_reference_model"):
        RLHFTrainer(made, made, RLHFConfig())


def test_config_keeps_instructgooses_names_and_defaults():
    assert dataclasses.astuple(RLHFConfig())[:3] == (0.1, 0.01, 0.1)
    assert RLHFConfig(epsilon=0.3) == RLHFConfig(cliprange=0.3) and RLHFConfig(cliprange=0.3).epsilon == 0.3
    assert RLHFConfig(ent_coef=0.0) == RLHFConfig(entropy_coef=0.0)
    with pytest.raises(ValueError, match="one setting"):
        RLHFConfig(epsilon=0.2, cliprange=0.3)


@pytest.mark.parametrize(
    "wrong", ({"epsilon": 1.5}, {"gamma": 1.1}, {"lam": -0.1}, {"kl_coef": -1.0}, {"cliprange_value": -0.2})
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must lie between"):
        RLHFConfig(**wrong)
