"""A run on two processes of which one is killed, or both: the other ends soon, and what goes on
from the checkpoint ends as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
import time

import forks
import psutil
import pytest
from forks import Moment, assert_same_leavings, kill, kill_all
from ranks import free_port
from recipe_runs import ROOT, options

KINDS = ("rollout", "forward", "update", "file")
WHO = ([0], [1], [0, 1])
CHANGES = {
    "kl_target": 1.0,
    "kl_horizon": 50,
    "score_normalization": "running",
    "ema_decay": 0.9,
    "save_total_limit": 2,
}
SAYS = "error: another process of this run has ended, so that this one cannot go on"
BOUND = 30  # seconds in which the process that is left must have ended


@pytest.mark.timeout(900)
def test_a_run_of_two_processes_that_are_killed_again_and_again_ends_where_it_would_have_ended(
    given, tmp_path, request, capsys
):
    settings = given["ppo"] | CHANGES
    straight, _ = forks.run_ranks("ppo", tmp_path / "straight", {}, **settings)
    assert [ended.code for ended in straight] == [0, 0], (
        straight[0].output[-3000:] + straight[1].output[-3000:]
    )
    generator, kills = random.Random(11), 48 if request.config.getoption("--full") else 12
    killed, done, waits = [], 0, []
    while len(killed) < kills or done == 0:
        broken, moments = tmp_path / f"broken-{done}", {}
        if len(killed) < kills:
            who, kind = WHO[len(killed) % 3], KINDS[len(killed) % 4]
            at = generator.choice(who)
            count = generator.randint(1, max(1, straight[at].counts[kind] // 2))
            moments = {at: Moment(kind, count, kill_all if len(who) == 2 else kill)}
        ended, wait = forks.run_ranks("ppo", broken, moments, **settings, resume_from_checkpoint="latest")
        codes = [one.code for one in ended]
        if codes == [0, 0]:
            done += 1
            assert_same_leavings(tmp_path / "straight", broken)
        else:
            assert all((code == -9) == (rank in who) for rank, code in enumerate(codes)) and 0 not in codes, (
                moments,
                codes,
            )
            told = [one.output for rank, one in enumerate(ended) if rank not in who]
            assert kind == "file" or all(SAYS in text and "Traceback" not in text for text in told), told
            killed.append((who, kind))
            waits.append(wait)
    assert max(waits) < BOUND
    with capsys.disabled():
        print(
            f"\n{len(killed)} kills, {done} runs that ended, at most {max(waits):.1f} s from the kill to the"
            " end of the other process"
        )
    assert all((who, kind) in killed for who in WHO for kind in KINDS)


@pytest.mark.timeout(900)
def test_under_torchrun_the_launcher_ends_and_the_same_command_goes_on(given, tmp_path, request):
    if not request.config.getoption("--full"):
        pytest.skip("four starts of torchrun: with --full")
    settings, log = given["ppo"] | CHANGES, tmp_path / "log"

    def start(folder):
        meet = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
        recipe = [
            str(ROOT / "recipes" / "ppo.py"),
            *options(**settings, output_dir=folder, resume_from_checkpoint="latest"),
        ]
        environment = os.environ | {
            "TORCH_COMPILE_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        }
        with open(log, "w") as output:
            command = [sys.executable, "-m", "torch.distributed.run", *meet, *recipe]
            return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    assert start(tmp_path / "straight").wait(240) == 0, log.read_text()[-3000:]
    for victim in range(2):
        launcher = start(tmp_path / "broken")
        while not list((tmp_path / "broken").glob(f"checkpoint-{2 + 2 * victim}/checkpoint.json")):
            assert launcher.poll() is None, log.read_text()[-3000:]
            time.sleep(0.02)
        workers = sorted(psutil.Process(launcher.pid).children(), key=lambda process: process.pid)
        os.kill(workers[victim].pid, signal.SIGKILL)
        killed = time.monotonic()
        assert launcher.wait(2 * BOUND + 30) not in (0, None)  # it gives the other 30 s
        assert time.monotonic() - killed < BOUND + 30
    assert start(tmp_path / "broken").wait(240) == 0, log.read_text()[-3000:]
    assert_same_leavings(tmp_path / "straight", tmp_path / "broken")
