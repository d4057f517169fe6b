"""PPO in one file takes the steps of PPOTrainer: its replies, losses, gradients and weights."""

import ast
import importlib.util
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import AutoModelForSequenceClassification

from goose_lora.data.rows import load_rows
from goose_lora.data.tokenization import tokenize_prompts
from goose_lora.files import read_jsonl
from goose_lora.models.loading import load_base, load_tokenizer, lora_config
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.trainer import PPOTrainer

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "ppo_in_one_file.py"
# 20 prompts, 8 a rollout: the third rollout begins a second epoch.
PPO = {
    "num_rollouts": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "max_prompt_tokens": 9,
    "response_length": 7,
    "temperature": 0.9,
    "kl_coef": 0.3,
    "gamma": 0.97,
    "lam": 0.9,
    "cliprange": 0.1,
    "cliprange_value": 0.05,
    "vf_coef": 0.5,
    "learning_rate": 1e-2,
    "value_learning_rate": 2e-2,
    "max_grad_norm": 1.5,
    "seed": 5,
}
MODEL = {"quantization": "none", "dtype": "float32", "lora_r": 3, "lora_alpha": 6, "lora_layers": "top-3"}
# What the script leaves out. Other values change the trainer's numbers, or round them otherwise.
LEFT_OUT = {
    "score_normalization": "none",
    "critic": "adapter",
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch",
    "reuse_trunk": False,
    "rollout_weights": "shared",
}
STEPS = PPO["num_rollouts"] * PPO["num_ppo_epochs"] * PPO["num_mini_batches"]
REPLIES = 8
TENSORS = ("input_ids", "attention_mask", "response_mask", "logprobs", "values")


@dataclass
class Run:
    """Hold what a run did: forwards of policy and critic, optimizer steps, scores, figures."""

    folder: Path
    forwards: list
    steps: list
    scores: torch.Tensor
    losses: list
    shared: SharedBase | None = field(default=None, repr=False)


def recipe():
    spec = importlib.util.spec_from_file_location("recipe_ppo_in_one_file", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def vowels(prompts, completions, completion_ids, theme, **columns):
    """Score by the text, the ids and a column of the data."""
    assert not columns
    return [
        completion.count("a") - 0.5 * completion.count(letter) + len(ids) / 10
        for completion, ids, letter in zip(completions, completion_ids, theme, strict=True)
    ]


def one_too_many(completions, **columns):
    return [0.0] * (len(completions) + 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Save prompts, a tiny base, and on it an SFT adapter and a reward model with an effect."""
    folder = tmp_path_factory.mktemp("one_file")
    base = tiny.base()
    with torch.no_grad():
        base.lm_head.weight[tiny.EOS] *= 4  # replies end, some early
    base.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    policy = get_peft_model(tiny.base(), tiny.lora(tiny.base()))
    tiny.randomise(policy, std=0.1)
    policy.save_pretrained(folder / "sft")
    judge = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    judge = get_peft_model(judge, tiny.lora(tiny.base(), task_type="SEQ_CLS"))
    tiny.randomise(judge, std=0.1, seed=2)
    judge.save_pretrained(folder / "reward")
    rows = [row | {"theme": "aeiou"[number % 5]} for number, row in enumerate(tiny.prompts(20))]
    tiny.write_rows(folder / "prompts.jsonl", rows)
    return folder


@contextmanager
def watched():
    """Note what each forward of policy and critic is given and gives, and each optimizer step."""
    forwards, steps = [], []
    forward = SharedBase.forward

    def watch(self, input_ids, attention_mask, response_mask, **options):
        output = forward(self, input_ids, attention_mask, response_mask, **options)
        forwards.append(
            {
                "trains": torch.is_grad_enabled(),
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "response_mask": response_mask,
                "logprobs": output.logprobs.detach(),
                "values": output.values.detach(),
            }
        )
        return output

    def parameters(optimizer):
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def before(optimizer, *_):
        gradients = [parameter.grad.clone() for parameter in parameters(optimizer)]
        steps.append({"rates": [group["lr"] for group in optimizer.param_groups], "gradients": gradients})

    def after(optimizer, *_):
        steps[-1]["weights"] = [parameter.detach().clone() for parameter in parameters(optimizer)]

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    SharedBase.forward = watch
    try:
        yield forwards, steps
    finally:
        SharedBase.forward = forward
        for hook in hooks:
            hook.remove()


def run_script(files, folder, roles, function):
    """Run the recipe's own main."""
    module = recipe()
    scores, losses = [], []
    score, update = module.score, module.update

    def watch_score(*args):
        scores.append(score(*args))
        return scores[-1]

    def watch_update(*args):
        figures = update(*args)
        losses.extend(figures)
        return figures

    module.score, module.update = watch_score, watch_update
    settings = PPO | MODEL | {name: files / path for name, path in roles.items()}
    settings |= {
        "model_name_or_path": files / "base",
        "dataset_name": files / "prompts.jsonl",
        "output_dir": folder,
    }
    if function:
        settings["reward_function"] = f"{__file__}:{function.__name__}"
    with watched() as (forwards, steps):
        module.main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    return Run(folder, forwards, steps, torch.stack(scores), losses)


def run_trainer(files, folder, roles, function):
    """Run PPOTrainer on the same base, adapters, prompts and settings."""
    args = PPOConfig(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        logging_steps=1, sample_rows=REPLIES, **PPO, **LEFT_OUT,
    )  # fmt: skip
    model = tiny.arguments(str(files / "base"), **MODEL)
    torch.manual_seed(PPO["seed"])
    tokenizer = load_tokenizer(model)
    rows = load_rows(str(files / "prompts.jsonl"), stage="ppo")
    prompts = tokenize_prompts(rows, tokenizer, name="prompts", max_prompt_tokens=PPO["max_prompt_tokens"])
    base = load_base(model, tokenizer, device=args.device)
    policy = files / roles["policy_adapter"] if "policy_adapter" in roles else lora_config(model, base)
    reward = files / roles["reward_adapter"] if "reward_adapter" in roles else None
    shared = SharedBase.build(base, policy, reward=reward, critic="adapter")
    trainer = PPOTrainer(shared, args, prompts, tokenizer, reward_function=function)
    with watched() as (forwards, steps):
        trainer.train()
    scores = torch.tensor([row["raw_score"] for row in read_jsonl(folder / "samples.jsonl")]).view(
        -1, REPLIES
    )
    losses = [row for row in trainer.state.log_history if "loss/policy" in row]
    return Run(folder, forwards, steps, scores, losses, shared)


ROLES = {
    "adapters": ({"policy_adapter": "sft", "reward_adapter": "reward"}, None),
    "function": ({}, vowels),
}


@pytest.fixture(scope="module", params=ROLES.values(), ids=ROLES.keys())
def runs(request, files, tmp_path_factory):
    """Run script and trainer: with SFT adapter and reward model, and with a function instead."""
    folder = tmp_path_factory.mktemp("runs")
    return (
        run_script(files, folder / "script", *request.param),
        run_trainer(files, folder / "trainer", *request.param),
    )


def assert_same(got, want, name=""):
    """Compare bit for bit: both sides make the same operations in the same order."""
    assert got.shape == want.shape, name
    assert torch.equal(got, want), f"{name}: differs by up to {(1.0 * got - 1.0 * want).abs().max():.3g}"


def test_every_forward_sees_the_trainers_tokens_and_gives_its_logprobs_and_values(runs):
    script, trainer = runs
    assert len(script.forwards) == len(trainer.forwards) == PPO["num_rollouts"] + 2 * STEPS
    for got, want in zip(script.forwards, trainer.forwards, strict=True):
        assert got["trains"] == want["trains"]
        for name in TENSORS:
            assert_same(got[name], want[name], name)


def test_the_scores_are_the_trainers(runs):
    script, trainer = runs
    assert script.scores.shape == (PPO["num_rollouts"], REPLIES) and len(script.scores.unique()) > 10
    assert_same(script.scores, trainer.scores)


def test_the_losses_of_each_optimizer_step_are_the_trainers(runs):
    script, trainer = runs
    assert len(script.losses) == len(trainer.losses) == STEPS
    for got, want in zip(script.losses, trainer.losses, strict=True):
        assert {"loss/policy", "loss/value", "policy/clip_fraction"} <= got.keys() <= want.keys()
        assert got == {name: want[name] for name in got}


def test_learning_rates_gradients_and_weights_of_each_optimizer_step_are_the_trainers(runs):
    script, trainer = runs
    assert len(script.steps) == len(trainer.steps) == STEPS
    for got, want in zip(script.steps, trainer.steps, strict=True):
        assert got["rates"] == want["rates"]
        for name in ("gradients", "weights"):
            assert len(got[name]) == len(want[name]) > 80
            for one, other in zip(got[name], want[name], strict=True):
                assert_same(one, other)


def test_the_figures_of_each_rollout_are_those_of_the_trainers_log(runs):
    script, trainer = runs
    got = read_jsonl(script.folder / "metrics.jsonl")
    want = [row for row in read_jsonl(trainer.folder / "metrics.jsonl") if "objective/score" in row]
    per_rollout = ("objective/score", "objective/kl", "rollout/response_tokens", "rollout/eos_rate")
    for one, other in zip(got, want, strict=True):
        for name in (*per_rollout, "value/explained_variance"):
            assert one[name] == other[name], name
    assert [row["step"] for row in got] == [4, 8, 12]


def test_the_result_is_the_trainers_policy_and_loads_with_plain_peft(runs, files):
    script, trainer = runs
    got = load_file(script.folder / "adapter_model.safetensors")
    trainer.shared.save_pretrained(str(trainer.folder / "saved"))
    want = load_file(trainer.folder / "saved" / "adapter_model.safetensors")
    assert got.keys() == want.keys()
    for name in got:
        assert_same(got[name], want[name])
    plain = PeftModel.from_pretrained(tiny.base(), script.folder)
    loaded = dict(plain.named_parameters())
    assert all(torch.equal(loaded[name.replace(".weight", ".default.weight")], got[name]) for name in got)


def test_the_comparison_has_what_it_compares(runs):
    """Find padding on both sides, ends, a KL, and clipping of policy, critic and gradient."""
    script, _ = runs
    rollouts = [forward for forward in script.forwards if not forward["trains"]]
    updates = [forward for forward in script.forwards if forward["trains"]]
    for rollout in rollouts:
        lengths = rollout["response_mask"].sum(-1)
        assert lengths.min() < lengths.max()
        assert rollout["attention_mask"][:, 0].min() == 0, "no padding on the left"
        assert rollout["input_ids"].shape[1] > min(update["input_ids"].shape[1] for update in updates)
    figures = read_jsonl(script.folder / "metrics.jsonl")
    assert any(0 < row["rollout/eos_rate"] < 1 for row in figures)
    assert figures[0]["objective/kl"] == 0 and all(row["objective/kl"] > 0.01 for row in figures[1:])
    for name in ("policy/clip_fraction", "value/clip_fraction"):
        assert 0.05 < sum(step[name] for step in script.losses) / STEPS < 0.95, name
    norms = [torch.stack([g.norm() for g in step["gradients"]]).norm() for step in script.steps]
    assert min(norms) < 0.99 * PPO["max_grad_norm"] and max(norms) == pytest.approx(
        PPO["max_grad_norm"], rel=1e-4
    )
    first_prompts = {tuple(row) for rollout in rollouts[:2] for row in rollout["input_ids"][:, :2].tolist()}
    assert len(first_prompts) > 1


def test_prompts_that_do_not_fill_a_rollout_are_refused():
    with pytest.raises(ValueError, match="3 prompts do not fill a rollout of 4"):
        next(recipe().prompt_batches([{}] * 3, 4, seed=0))


def test_an_answer_of_another_length_is_refused(files, tmp_path):
    with pytest.raises(RuntimeError, match="shape"):
        run_script(files, tmp_path, {}, one_too_many)


# ---- Form: what a reader is promised ----

MAY_IMPORT = {"cli", "data", "embedded", "errors", "files", "functional", "generation", "models"}
MAY_IMPORT |= {"training.launch"}  # which refuses several processes
MAY_IMPORT |= {"ownership", "sharing.export"}  # nothing of others in output_dir is lost


def test_it_is_short_and_stands_on_models_mathematics_generation_and_data_alone():
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    own = {name.removeprefix("goose_lora.") for name in modules if name.startswith("goose_lora")}
    assert len(own) > 10
    assert [name for name in own if not any(f"{name}.".startswith(f"{room}.") for room in MAY_IMPORT)] == []


def test_chapters_are_numbered_in_order_and_name_a_source():
    text = SCRIPT.read_text(encoding="utf-8")
    _, *parts = re.split(r"^# ---- (\d)\. .* ----$", text, flags=re.MULTILINE)
    assert parts[::2] == list("123456789")
    for number, chapter in zip(parts[::2], parts[1::2], strict=True):
        comment = "".join(line for line in chapter.splitlines() if line.startswith("#"))
        assert re.search(r"arXiv:\d{4}\.\d{5}|et al\. \d{4}|equation \d|PPO paper", comment), number
