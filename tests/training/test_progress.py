"""What a run shows while it goes."""

import io
import re
import subprocess
import sys

import pytest
from tiny_runs import trainer
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from goose_lora import terminal
from goose_lora.training.progress import SAMPLE_EVERY, Progress, duration


@pytest.fixture
def shown(capsys, tmp_path):
    """A run of 40 steps with its rows: call with (step, log), get all lines so far."""
    progress = Progress(every=4, unit="rollout")
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    state = TrainerState(max_steps=40, is_world_process_zero=True)
    progress.on_train_begin(args, state, TrainerControl())

    def log(step, figures):
        state.global_step = step
        progress.on_log(args, state, TrainerControl(), logs=figures)
        return capsys.readouterr().out.splitlines()

    log.progress, log.args, log.state = progress, args, state
    return log


ROLLOUT = {
    "loss": 0.1,
    "objective/score": 0.5,
    "objective/raw_score": 3.25,
    "objective/kl": 1.5,
    "rollout/response_tokens": 20.04,
    "rollout/eos_rate": 0.75,
    "learning_rate": 1e-4,
    "policy/clip_fraction": 0.01,
}


def test_a_rollout_is_one_row_of_its_main_figures(shown):
    header, row = shown(4, ROLLOUT)
    assert header.split() == ["rollout", "score", "KL", "tokens", "ended", "seconds", "left"]
    assert row.split()[:5] == ["1/10", "3.250", "1.50", "20.0", "75%"]
    assert len(shown(8, ROLLOUT)) == 1, "the header stands once"


def test_held_out_prompts_have_a_row_of_their_own(shown):
    shown(4, ROLLOUT)
    header, row = shown(4, {"eval_score": 0.4, "eval_kl": 0.2, "eval_eos_rate": 1.0, "eval_objective": 0.39})
    assert header.split() == ["rollout", "score", "KL", "ended"]
    assert row.split() == ["held-out", "0.400", "0.20", "100%"]


def test_figures_of_fine_tuning_and_of_a_reward_model(shown):
    header, row = shown(4, {"loss": 2.0, "mean_token_accuracy": 0.5, "learning_rate": 2e-5, "epoch": 1})
    assert header.split() == ["rollout", "loss", "accuracy", "learning", "rate", "seconds", "left"]
    assert row.split()[1:4] == ["2.000", "0.500", "2e-05"]
    header, _ = shown(8, {"loss": 0.6, "accuracy": 0.7, "margin": 0.1, "learning_rate": 2e-5})
    assert "margin" in header


@pytest.mark.parametrize(
    "odd", [{}, None, {"epoch": 1.0}, {"loss": None}, {"loss": "much"}, {"train_runtime": 3.0}]
)
def test_a_log_that_has_nothing_to_show_ends_no_run(shown, odd):
    assert shown(4, odd) == []


def test_time_left_counts_the_steps_of_this_process(shown, monkeypatch):
    # Resumed at 20 of 40: 10 steps in 30 s leave another 30 s, whatever came before
    now = [1000.0]
    monkeypatch.setattr("goose_lora.training.progress.time.monotonic", lambda: now[0])
    shown.state.global_step = 20
    shown.progress.on_train_begin(shown.args, shown.state, TrainerControl())
    now[0] += 30
    *_, row = shown(30, ROLLOUT)
    assert row.split()[-2:] == ["30.0", "0:30"]


def test_another_process_says_nothing(shown):
    shown.state.is_world_process_zero = False
    shown.progress.on_train_begin(shown.args, shown.state, TrainerControl())
    shown.progress.phase("calibrating", long=True)
    shown.progress.sample("a", "b")
    assert shown(4, ROLLOUT) == []


def test_a_sample_is_shown_now_and_then_on_one_line(shown, capsys):
    for _ in range(SAMPLE_EVERY + 1):
        shown.progress.sample("What is\n\nthis? " * 20, "A \x1b[31mgoose.\n" * 50)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "-> A \\x1b[31mgoose." in lines[0] and lines[0].endswith(" ...") and len(lines[0]) < 200


def test_a_pipe_gets_whole_lines(shown, capsys):
    assert shown.progress.bar is None, "no bar where there is no terminal"
    shown.progress.phase("calibrating scores", long=True)
    shown.progress.phase("generating")
    out, err = capsys.readouterr()
    assert out == "calibrating scores\n" and err == ""


def test_a_terminal_gets_one_bar_with_phase_and_time(shown, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    console = Terminal()
    monkeypatch.setattr(sys, "stderr", console)
    progress = Progress()
    progress.on_train_begin(shown.args, shown.state, TrainerControl())
    progress.phase("generating")
    shown.state.global_step = 10
    progress.on_step_end(shown.args, shown.state, TrainerControl())
    progress.phase("scoring")
    progress.close()
    assert "generating:   0%" in console.getvalue()
    assert re.search(r"scoring:  25% .* 10/40 \[\S+, \S+ left\]", console.getvalue())
    assert progress.bar is None


@pytest.mark.parametrize(
    "seconds, text", [(None, "-"), (0.4, "0:00"), (65, "1:05"), (3599.6, "1:00:00"), (7384, "2:03:04")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_callbacks_of_transformers_are_gone(tmp_path):
    kinds = [type(callback) for callback in trainer(tmp_path).callback_handler.callbacks]
    assert kinds.count(Progress) == 1
    assert not {PrinterCallback, ProgressCallback} & set(kinds)


def test_what_is_said_is_in_the_log_with_its_time_and_no_secret(tmp_path, capsys, caplog):
    import logging

    path = tmp_path / "log.txt"
    terminal.log_into(path, anew=True)
    terminal.say("first\nof two, hub_token=verysecretvalue")
    logging.getLogger("goose_lora.somewhere").warning("look: \x1b[2J")
    terminal.log_into(None)
    terminal.say("later")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and "verysecretvalue" not in path.read_text() + capsys.readouterr().out
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO    first", lines[0])
    assert lines[2].endswith("WARNING look: \\x1b[2J")
    # A resumed run goes on with it, a new one begins anew
    terminal.log_into(path)
    terminal.say("resumed")
    terminal.log_into(path, anew=True)
    terminal.log_into(None)
    assert path.read_text() == ""


def test_a_full_disk_costs_a_line_of_the_log_alone(tmp_path, capsys):
    terminal.log_into(tmp_path / "log.txt", anew=True)

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    terminal._file.stream.close()
    terminal._file.stream = Full()
    terminal.say("goes on")
    terminal.log_into(None)
    assert capsys.readouterr().out == "goes on\n"


SHOWN_AND_LOGGED = """
import logging, pathlib, sys
from goose_lora import terminal
path = pathlib.Path(sys.argv[1])
warn = logging.getLogger("goose_lora.somewhere").warning
for number, log in enumerate([path, path, None, path]):
    terminal.log_into(log)
    warn("warning %d", number)
"""


def test_warnings_are_shown_once_on_the_console_also_while_they_are_logged(tmp_path):
    # In a process of its own: pytest's handlers at the root would show nothing of this
    done = subprocess.run(
        [sys.executable, "-c", SHOWN_AND_LOGGED, tmp_path / "log.txt"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stderr.splitlines() == [f"warning {number}" for number in range(4)]
    logged = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[-1] for line in logged] == ["0", "1", "3"]
