"""What can go wrong in the middle of a run, made to happen: what is lost, what is said, and that
the run can go on."""

import multiprocessing
import os
import shutil
import signal
import time

import forks
import pytest
import tiny
import torch
from forks import RECIPES, Moment, assert_same_leavings, fill_the_disk, interrupt, terminate
from peft.utils import load_peft_weights
from recipe_runs import options
from tiny_runs import even_share, fresh, judged, logged, own, trained_parameters, trainer, turn
from transformers import TrainerCallback

from goose_lora import ownership
from goose_lora.files import read_jsonl
from goose_lora.ppo import update
from goose_lora.ppo.callbacks import RolloutState
from goose_lora.ppo.kl_control import FixedKL
from goose_lora.rewards.sources import RewardMix
from goose_lora.training import checkpoints, resume
from goose_lora.training.callbacks import MetricsFile, NotFinite
from goose_lora.training.resume import CheckpointKeeper
from goose_lora.training.signals import Stopped


@pytest.fixture(scope="module")
def straight(given, tmp_path_factory):
    """A run of ppo.py and one of sft.py that were left alone."""
    folder = tmp_path_factory.mktemp("straight")
    for name in ("ppo", "sft"):
        ended = forks.run(name, folder / name, **given[name])
        assert ended.code == 0, ended.output[-3000:]
    return folder


# ---- A stop on request ----


@pytest.mark.parametrize(
    ("name", "action", "kind", "code", "step"),
    [
        ("ppo", interrupt, "update", 130, 4),
        ("ppo", terminate, "rollout", 143, 4),
        ("sft", terminate, "update", 143, 3),
    ],
)
def test_a_signal_ends_in_a_checkpoint_and_the_command_that_goes_on(
    name, action, kind, code, step, given, straight, tmp_path
):
    settings = given[name] | {"save_steps": 100}
    ended = forks.run(name, tmp_path / "run", Moment(kind, 3, action), **settings)
    assert ended.code == code, ended.output[-3000:]
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{step}"}
    *_, last = ended.output.strip().splitlines()
    assert last.startswith(
        f"Stopped by {'SIGINT' if code == 130 else 'SIGTERM'}; saved in {tmp_path}/run/checkpoint-{step}."
        " Continue with: "
    )
    assert f"recipes/{name}.py --model_name_or_path" in last and last.endswith(
        "--resume_from_checkpoint latest"
    )
    assert not (tmp_path / "run" / "adapter_config.json").exists(), "what is half trained is no result"
    assert forks.run(name, tmp_path / "run", **settings, resume_from_checkpoint="latest").code == 0
    assert_same_leavings(straight / name, tmp_path / "run")


def test_a_finished_run_that_is_resumed_makes_no_step_more(given, straight, tmp_path):
    shutil.copytree(straight / "ppo", tmp_path / "ppo")
    ended = forks.run("ppo", tmp_path / "ppo", **given["ppo"], resume_from_checkpoint="latest")
    assert ended.code == 0 and ended.counts["update"] == ended.counts["rollout"] == 0, ended.output[-3000:]
    assert_same_leavings(straight / "ppo", tmp_path / "ppo")


def test_a_loop_of_ones_own_saves_and_stops_after_the_rollout_in_which_it_was_asked(tmp_path, request):
    before, own_handler = signal.default_int_handler, signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)  # the background jobs of a shell ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, own_handler))
    ppo = own(tmp_path, num_rollouts=3)
    assert ppo.start() == 0
    turn(ppo)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(Stopped, match=r"Stopped by SIGINT; saved in .*checkpoint-8"):
        turn(ppo)
    assert (
        checkpoints.newest(tmp_path)[0] == tmp_path / "checkpoint-8"
        and signal.getsignal(signal.SIGINT) is before
    )
    assert own(tmp_path, num_rollouts=3).start("latest") == 2


CONTROLS = ("should_save", "should_training_stop", "should_log", "should_evaluate")


def test_processes_stop_at_the_same_step_whichever_was_asked(tmp_path):
    class Trainer:
        args = type("Args", (), {"world_size": 2, "device": torch.device("cpu"), "save_strategy": "no"})()
        stop = type("Stop", (), {"asked": 0})()
        steps_between_resumable = 1

    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                torch.distributed.init_process_group(
                    "gloo", f"file://{tmp_path}/meet", rank=rank, world_size=2
                )
                keeper, control = (
                    CheckpointKeeper(Trainer, resumes=False),
                    type("Control", (), dict.fromkeys(CONTROLS, False))(),
                )
                for step in (1, 2):
                    Trainer.stop.asked = signal.SIGTERM if (step, rank) == (2, 1) else 0
                    keeper.on_step_end(Trainer.args, type("State", (), {"global_step": step})(), control)
                    assert control.should_save == control.should_training_stop == (step == 2)
                code = 0 if keeper.stopped_by == signal.SIGTERM else 2
            finally:
                os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


# ---- The disk ----


def test_a_full_disk_leaves_the_last_whole_checkpoint_and_says_so(given, straight, tmp_path):
    settings = given["ppo"] | {"save_total_limit": 1}
    ended = forks.run("ppo", tmp_path / "run", Moment("update", 4, fill_the_disk), **settings)
    assert ended.code == 2, ended.output[-3000:]
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2"}
    assert checkpoints.why_incomplete(tmp_path / "run" / "checkpoint-2") is None
    (line,) = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert "checkpoint-4 could not be saved (" in line and "MB free there)" in line
    assert (
        f"The last whole one is {tmp_path}/run/checkpoint-2: --resume_from_checkpoint latest goes on from it."
        in line
    )
    assert forks.run("ppo", tmp_path / "run", **settings, resume_from_checkpoint="latest").code == 0
    assert_same_leavings(straight / "ppo", tmp_path / "run")


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "own_loop"])
def test_an_output_folder_that_cannot_be_written_is_told_before_the_model_loads(name, given, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir: .*file is a file, not a folder\. Give another name"):
        RECIPES[name].main(
            options(
                **given[name] | {"model_name_or_path": "no/such/model"}, output_dir=tmp_path / "file" / "run"
            )
        )


def test_a_read_only_folder_counts_as_one(tmp_path):
    tmp_path.chmod(0o555)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                os.seteuid(65534)  # nobody: the administrator writes anywhere
            ownership.require_writable(tmp_path)
        except ValueError as error:
            code = 0 if "Permission denied" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    tmp_path.chmod(0o755)


LOG = [{"objective/kl": 0.5, "step": 2}, {"objective/kl": 0.25, "step": 4}, {"train_runtime": 1.0, "step": 4}]


def resume_files(folder, *, step=4):
    state = type("State", (), {"global_step": step, "is_world_process_zero": True, "log_history": LOG})()
    MetricsFile().on_train_begin(type("Args", (), {"output_dir": str(folder)})(), state, None)


def test_a_line_that_was_cut_off_is_dropped_and_so_is_what_the_checkpoint_does_not_know(tmp_path):
    rows = {"metrics": [{"step": 2}, {"step": 4}, {"step": 6}], "samples": [{"step": 2}, {"step": 4}]}
    ownership.claim(tmp_path, "metrics.jsonl", "samples.jsonl")
    for name, given in rows.items():
        tiny.write_rows(tmp_path / f"{name}.jsonl", given)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "objective/sc')
    resume_files(tmp_path)
    assert read_jsonl(tmp_path / "metrics.jsonl") == LOG[:2], "without the summary"
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"step": 2}], (
        "the rollout that begins at the checkpoint is written again"
    )


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (b"\0" * 700 + b"\n", "2"),
        (b"a note of mine\n", "2"),
        (b'[1, 2]\n{"step": 2, "rep', "2, 3"),
        (b"\xff\xfe\n", "2"),
        (b"[" * 100_000 + b"\n", "2"),
    ],
)
def test_a_line_that_is_none_of_the_runs_is_named_and_lost_rows_come_back_from_the_log(
    damage, line, tmp_path, caplog
):
    ownership.claim(tmp_path, "metrics.jsonl", "samples.jsonl")
    first = b'{"step": 2, "reply": "a\xe2\x80\xa8b\xe2\x80\xa9c\xc2\x85d"}\n'
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_bytes(first + damage)
    resume_files(tmp_path)
    assert read_jsonl(tmp_path / "metrics.jsonl") == LOG[:2]
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"step": 2, "reply": "a\u2028b\u2029c\x85d"}]
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert f"{tmp_path / name}: line {line} is no JSON object" in caplog.text
        assert (tmp_path / f"{name}.kept").read_bytes() == first + damage


def test_rows_that_are_gone_come_back_from_the_log(tmp_path):
    resume_files(tmp_path)
    assert read_jsonl(tmp_path / "metrics.jsonl") == LOG[:2]
    resume_files(tmp_path, step=0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"", "a run from the beginning has no rows yet"


# ---- Checkpoints that do not fit ----


@pytest.mark.parametrize(
    ("name", "source", "changes", "told"),
    [
        ("ppo", "sft", {}, "stage is sft there and ppo here"),
        ("own_loop", "ppo", {}, "stage is ppo there and own_loop here"),
        ("ppo", "ppo", {"lora_r": 5}, "r of the adapter default is 3 there and 5 here"),
        ("ppo", "ppo", {"model_name_or_path": "some/other"}, "base name is base there and other here"),
        ("ppo", "ppo", {"quantization": "nf4"}, "base quantization is none there and nf4 here"),
        ("ppo", "ppo", {"num_ppo_epochs": 1, "save_steps": 1}, "num_ppo_epochs is 2 there and 1 here"),
        ("ppo", "ppo", {"critic": "shared"}, "critic is None there and shared here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_before_the_model_loads(
    name, source, changes, told, given, straight, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "goose_lora.cli.stage.tokenizer_of", lambda *args, **kwargs: pytest.fail("the model loads")
    )
    folder = max((straight / source).glob("checkpoint-*"))
    with pytest.raises(
        ValueError,
        match=f"{folder.name} was saved by another run, and cannot be resumed by this one:.* {told}",
    ):
        RECIPES[name].main(
            options(**given[name] | changes, output_dir=tmp_path, resume_from_checkpoint=folder)
        )


def test_a_checkpoint_whose_roles_are_others_is_refused_before_it_is_loaded(tmp_path):
    trainer(tmp_path, num_rollouts=1, save_strategy="steps", save_steps=4).train()
    other = trainer(tmp_path, shared=fresh(reference="base"), num_rollouts=1)
    before = trained_parameters(other.shared)
    with pytest.raises(
        ValueError, match="adapters is default, reference, value there and default, value here"
    ):
        other.train(resume_from_checkpoint="latest")
    assert all(
        torch.equal(before[name], parameter) for name, parameter in trained_parameters(other.shared).items()
    )


def test_a_state_that_lacks_what_this_version_remembers_is_named():
    remembered = {
        "kl_control_state": {"coef": 0.1},
        "score_scale": None,
        "score_moments": None,
        "evaluation_scale": None,
        "best_objective": None,
    }
    state = type(
        "State", (), {"global_step": 4, "stateful_callbacks": {"RolloutState": {"attributes": remembered}}}
    )()
    with pytest.raises(
        ValueError, match="does not say what this version needs to go on from it: evaluations_without_gain"
    ):
        RolloutState(FixedKL(0.1)).on_train_begin(None, state, None)


def test_the_best_checkpoint_gives_back_the_critic_and_the_average_too(tmp_path, caplog):
    shared = fresh(average=True)
    ppo = judged(tmp_path, 1.0, 3.0, 2.0, shared=shared, load_best_model_at_end=True, ema_decay=0.9)
    ppo.train()
    for role, name in (("value", "value"), ("ema", "ema"), ("policy", "")):
        adapter = {"policy": "default"}.get(role, role)
        kept = {key.replace(f".{adapter}", ""): p for key, p in ppo.shared.role_parameters(role)}
        best, last = (
            load_peft_weights(str(tmp_path / folder / name), device="cpu")
            for folder in ("checkpoint-8", "checkpoint-12")
        )
        assert all(torch.equal(kept[key], tensor) for key, tensor in best.items() if key in kept), role
        assert sum(not torch.equal(last[key], tensor) for key, tensor in best.items() if key in kept) > 3, (
            role
        )
    assert "the run ends with policy, value, ema of" in caplog.text


# ---- Numbers that are not finite ----


class Weights(TrainerCallback):
    """Those of the policy and the critic after each step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append(trained_parameters(model))


def break_logits(ppo, monkeypatch, when):
    forward, calls = ppo.shared.forward, iter(range(1, 99))

    def broken(*args, **kwargs):
        output = forward(*args, **kwargs)
        return (
            output._replace(logprobs=output.logprobs * float("nan"))
            if torch.is_grad_enabled() and next(calls) in when
            else output
        )

    monkeypatch.setattr(ppo.shared, "forward", broken)


def break_loss(ppo, monkeypatch, when):
    total, calls = update.total_loss, iter(range(1, 99))

    def broken(*args, **kwargs):
        loss, stats = total(*args, **kwargs)
        return (loss * float("inf") if next(calls) in when else loss), stats

    monkeypatch.setattr(update, "total_loss", broken)


def break_gradient(ppo, monkeypatch, when):
    calls, parameter = (
        iter(range(1, 99)),
        next(p for name, p in ppo.shared.named_parameters() if "lora_B.default" in name),
    )
    parameter.requires_grad_(True).register_hook(
        lambda grad: grad * float("inf") if next(calls) in when else grad
    )


WAYS = [break_logits, break_loss, break_gradient]


@pytest.mark.parametrize("harm", WAYS)
def test_a_step_whose_gradient_is_not_finite_is_skipped_counted_and_told(harm, tmp_path, monkeypatch, caplog):
    weights = Weights()
    ppo = trainer(tmp_path, num_rollouts=3, gradient_accumulation_steps=1, callbacks=[weights])
    harm(ppo, monkeypatch, {3, 6, 7})
    ppo.train()
    moved = [
        any(not torch.equal(now[name], before[name]) for name in now)
        for before, now in zip(weights.after, weights.after[1:], strict=False)
    ]
    assert moved == [step not in (3, 6, 7) for step in range(2, 13)]
    assert all(parameter.isfinite().all() for parameter in weights.after[-1].values())
    rows = logged(tmp_path)
    assert [row["policy/not_finite"] for row in rows] == [0.25, 0.5, 0]
    assert all(torch.tensor(row["loss"]).isfinite() for row in rows)
    for step in (3, 6, 7):
        assert f"step {step} is skipped: its gradient is not finite" in caplog.text


@pytest.mark.parametrize("harm", WAYS)
def test_the_third_skipped_step_in_a_row_ends_the_run(harm, tmp_path, monkeypatch):
    ppo = trainer(tmp_path, num_rollouts=3, gradient_accumulation_steps=1)
    harm(ppo, monkeypatch, {4, 5, 6})
    with pytest.raises(NotFinite, match="step 6: the gradient is not finite for the 3rd time in a row"):
        ppo.train()
    assert all(parameter.isfinite().all() for parameter in trained_parameters(ppo.shared).values())


# ---- Reward functions, and processes that load data ----


def ask(function, timeout=None):
    replies = {"prompts": ["a"], "completions": ["b"], "completion_ids": [[5]]}
    return RewardMix([function], timeout=timeout)(None, **replies)


def raises(completions, **columns):
    return {"known": [1.0]}["unknown"]


async def raises_later(completions, **columns):
    return raises(completions)


@pytest.mark.parametrize("function", [raises, raises_later])
def test_a_reward_function_that_raises_is_named_with_the_line(function):
    line = raises.__code__.co_firstlineno + 1
    with pytest.raises(
        ValueError,
        match=(
            rf"the reward function {function.__name__} raised KeyError \(test_faults.py, line {line}\):"
            r" 'unknown'"
        ),
    ):
        ask(function)


def test_a_reward_function_that_hangs_ends_the_run_after_reward_timeout(tmp_path):
    def hangs(completion_ids, **columns):
        if len(asked := [*asked_before, 1]) > 2:
            time.sleep(60)
        asked_before[:] = asked
        return even_share(completion_ids)

    asked_before: list[int] = []
    ppo = trainer(tmp_path, reward=hangs, reward_timeout=0.5, save_strategy="steps", save_steps=4)
    with pytest.raises(
        TimeoutError, match=r"the reward function hangs has not answered for 0.5 s, which is reward_timeout"
    ):
        ppo.train()
    assert checkpoints.newest(tmp_path)[0] == tmp_path / "checkpoint-4"


def test_an_alarm_that_was_set_rings_when_it_would_have(monkeypatch):
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *args: rung.append(time.monotonic()))
    timer = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        assert ask(lambda completions, **columns: time.sleep(0.05) or [1.0], timeout=5).total.tolist() == [
            1.0
        ]
        assert not rung
        time.sleep(0.3)
        assert len(rung) == 1
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_a_process_that_loads_data_and_dies_is_one_clear_line(given, tmp_path):
    def kill_the_loader():
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.2)

    settings = given["sft"] | {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}
    ended = forks.run("sft", tmp_path / "run", Moment("update", 2, kill_the_loader), **settings)
    assert ended.code == 2, ended.output[-3000:]
    assert (
        "error: a process that loads data died, often for lack of memory: DataLoader worker" in ended.output
    )
    assert "Set dataloader_num_workers: 0, and go on with --resume_from_checkpoint latest." in ended.output


def test_the_hooks_that_are_overridden_are_public_and_have_trainers_signatures():
    import inspect

    from transformers import Trainer

    hooks = {"train", "get_batch_samples", "save_model", "training_step", "log"}
    own = {name for name, value in vars(resume.Resumable).items() if inspect.isfunction(value)} & set(
        dir(Trainer)
    )
    # The cards of Trainer and of TRL have other arguments: it takes any, and writes none
    assert own - {"__init__", "create_model_card"} == hooks
    for name in hooks:
        mine, theirs = (
            list(inspect.signature(getattr(owner, name)).parameters) for owner in (resume.Resumable, Trainer)
        )
        assert mine == theirs
