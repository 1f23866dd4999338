"""Training is killed at random moments, and ends as a run that nothing happened to: to the bit.

A small run as a script, with a backup folder; SIGKILL after a random time, so that it falls into steps, evaluations,
the writing of checkpoints or their copies; the same start goes on. At some kills the run folder is deleted as well, as
with a runtime that is taken away: then the backup is all there is.
"""

import random
import shutil
import time

import pytest

from tests.helpers import SECONDS, TINY, output_of, read_until, same_end, saved_steps, started

SETTINGS = {name: value for name, value in TINY.items() if name != "num_iterations"} | dict(
    log_interval=5, eval_interval=25, sample_interval=0, save_interval=4, final_eval_tokens=2048, run_dir="run",
    backup="backup",
)  # fmt: skip


def moment(folder):
    """What lies around after a kill: unfinished checkpoints and copies tell where it fell."""
    writing = list(folder.glob("run/checkpoints/.*.tmp"))
    copying = list(folder.glob("backup/run/checkpoints/.*.tmp"))
    return "writing a checkpoint" if writing else "copying it to the backup" if copying else "a step or an evaluation"


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, kills):
    rng, steps = random.Random(kills), 200 + 100 * kills
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def start(folder):
        folder.mkdir(exist_ok=True)
        return started("02_train.py", cwd=folder, num_iterations=steps, **SETTINGS)

    out = output_of(process := start(whole), 5 * SECONDS)
    assert process.returncode == 0, out
    for kill in range(1, kills + 1):
        process = start(broken)
        read_until(process, "first step")  # imports and the first step are always the same: the kill comes after them
        time.sleep(rng.uniform(0, 2))
        process.kill()
        output_of(process)
        assert process.returncode == -9, f"the run ended after {kill} kills: give it more steps"
        lost = kill % 5 == 3
        print(f"kill {kill}: {moment(broken)}, checkpoints {saved_steps(broken / 'run')}{', folder deleted' * lost}")
        if lost:
            shutil.rmtree(broken / "run")
    out = output_of(process := start(broken), 5 * SECONDS)
    assert process.returncode == 0, out
    assert same_end(broken / "run", whole / "run", steps)
