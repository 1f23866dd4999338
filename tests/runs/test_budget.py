"""A run with a budget: how long it becomes, and that it stays whole. How near it ends: benchmarks/budget.py."""

import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import TINY, one_line, same_end, saved_steps, script, started, tiny

STEP = 0.25  # seconds of a step, by the clock of these tests


@pytest.fixture
def budgeted(nb, monkeypatch):
    """A clock on which a step takes `pace` seconds, STEP by the first plan, and nothing else takes any."""

    def train(folder, budget, pace=STEP, later=None, rehearses=False, **changes):
        def spent(run):
            return run.before + pace * (run.log.done - run.first_step if hasattr(run, "log") else 0)

        def measure(run):
            run.plan.update(pace=later if later and run.log.done > 80 else pace, took=run.plan["took"] | run.took)

        def rehearse(run):
            run.plan |= {"last": 0.0, "rest": 0.0}

        monkeypatch.setattr(nb.Training, "spent", spent)
        monkeypatch.setattr(nb.Training, "measure", measure)
        if not rehearses:
            monkeypatch.setattr(nb.Training, "rehearse", rehearse)
        off = dict(log_interval=1, eval_interval=0, sample_interval=0, save_interval=0)
        config = tiny(nb, folder, **off | changes)
        return nb.train(config.replace(hours=budget / 3600))

    monkeypatch.setattr(nb, "seconds_per_step", lambda config: STEP)
    return train


def rates(run):
    lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [line["learning_rate"] for line in lines if "learning_rate" in line]


def test_a_run_is_as_long_as_its_budget(nb, budgeted, tmp_path):
    """And as the same number of steps: the last step, the evaluation, the samples and the checkpoint are there."""
    before = nb.train_step._cache_size()
    summary = budgeted(tmp_path / "a", 20)
    steps = summary["step"]
    assert 0.9 * 20 / STEP <= steps <= 20 / STEP and summary["finished"]
    assert saved_steps(tmp_path / "a")[-1] == steps and summary["val_bpb"] and summary["budget"] == 20
    values = rates(tmp_path / "a")
    peak = max(values)
    falling = [peak - value for value in values[values.index(peak) + steps // 3 :]]
    assert len(values) == steps and sum(value < peak for value in values[5:]) == pytest.approx(steps / 2, abs=2)
    assert min(values[10:]) == values[-1] < 0.1 * peak and falling == sorted(falling)
    assert nb.train_step._cache_size() <= before + 1


@pytest.mark.parametrize("pace", [STEP / 2, 2 * STEP])
def test_the_end_moves_until_the_warmdown_begins(budgeted, tmp_path, capsys, pace):
    """A machine that turns out twice as fast does twice the steps, one half as fast half of them, its warmdown at once
    after step 32. Then the rate falls on one line."""
    summary = budgeted(tmp_path / "a", 20, pace=pace)
    lines = r"step +(\d+)/(\d+)  the warmdown begins, and (\d+) steps fit"
    moved = re.findall(lines, capsys.readouterr().out)
    assert len(moved) == 1
    done, total, left = map(int, moved[0])
    assert summary["step"] == total == done + left == int(0.998 * 20 / pace) and (done == 32 or pace < STEP)
    values = rates(tmp_path / "a")
    assert values[done] == max(values) > values[done + 1] and len({*values[10 : done + 1]}) == 1
    slopes = [a - b for a, b in itertools.pairwise(values[done:])]
    assert slopes == pytest.approx([max(values) / left] * (left - 1), rel=1e-3)


@pytest.mark.parametrize("changes", [dict(sample_interval=20, eval_interval=100), dict(save_interval=20), {}])
def test_a_warmdown_that_begins_early_measures_the_work_first(nb, budgeted, tmp_path, changes):
    """Half as fast as its first steps, the run falls at once after step 32: it samples and saves there."""
    summary = budgeted(tmp_path / "a", 20, pace=2 * STEP, rehearses=True, **changes)
    first = tmp_path / "a" / "checkpoints" / "step_00000032"
    assert summary["finished"] and json.loads((first / "meta.json").read_text())["todo"] == ["move_end"]
    end = json.loads((tmp_path / "a" / "checkpoints" / f"step_{summary['step']:08d}" / "meta.json").read_text())
    assert end["plan"]["falls"] == 32 and end["plan"]["rest"] > 0 and {"sample", "save"} <= end["plan"]["took"].keys()
    for step in saved_steps(tmp_path / "a")[1:]:  # as if it had been killed right after its save
        shutil.rmtree(tmp_path / "a" / "checkpoints" / f"step_{step:08d}")
    again = budgeted(tmp_path / "a", 20, pace=2 * STEP, rehearses=True, **changes)
    assert again["finished"] and again["run_dir"] == str(tmp_path / "a") and again["step"] > 32


def test_a_machine_that_becomes_slower_in_the_warmdown(budgeted, tmp_path):
    """The end moves again if the pace has changed by 3%, and the learning rate falls on to its end. A save after step
    85 does not hide that from the look after step 92."""
    ends = {}
    for slower in (1, 1.02, 1.5):
        saves = 85 if slower == 1.5 else 0
        ends[slower] = budgeted(tmp_path / f"{slower}", 30, later=slower * STEP, save_interval=saves)["step"]
        values = rates(tmp_path / f"{slower}")[60:]
        assert values == sorted(values, reverse=True) and values[-1] < 0.1 * values[0]
    assert ends[1] == ends[1.02] == int(0.998 * 30 / STEP) and 92 < ends[1.5] < 0.95 * ends[1]


def test_the_work_between_steps_is_counted(nb):
    """Whole evaluations and saves that will come, not a share of one for each step."""
    plan = {"pace": 1.0, "took": {"evaluate": 10.0, "save": 2.0}, "last": 20.0, "rest": 5.0}
    config = nb.Config.demo().replace(eval_interval=100, sample_interval=0, save_interval=50)
    for budget, done, steps in ((115, 0, 88), (125, 0, 98), (140, 0, 101), (140, 90, 101), (47, 195, 10), (10, 0, 1)):
        run = SimpleNamespace(config=config, plan=plan, budget=budget / 0.998, spent=lambda: 0.0)
        assert nb.Training.steps_left(run, done) == steps, (budget, done)


def test_the_newest_steps_count(nb, monkeypatch):
    """Those since the newest measurement that is 30 steps old: older ones say nothing of a machine that changed."""
    for done, pace in ((20, 9.0), (151, 45 / 50), (169, 45 / 68), (170, 45 / 30), (1000, 45 / 860)):
        log = SimpleNamespace(done=done, times=SimpleNamespace(total=lambda: 30.0))
        plan = {"pace": 9.0, "took": {}}
        run = SimpleNamespace(plan=plan, took={"save": 2.0}, log=log, first_step=0, started=0.0)
        run.measured = [(1, 0.0), (101, 100.0), (140, 100.0)]
        monkeypatch.setattr(nb.time, "perf_counter", lambda: 175.0)
        nb.Training.measure(run)
        monkeypatch.undo()
        assert plan == {"pace": pytest.approx(pace), "took": {"save": 2.0}}


@pytest.mark.parametrize("ratio", [0.0, 0.98])
def test_a_run_without_a_constant_rate(budgeted, tmp_path, ratio):
    """The warmdown is due before the speed is known, or never: the end moves all the same."""
    summary = budgeted(tmp_path / "a", 20, pace=STEP / 2, warmdown_ratio=ratio)
    values = rates(tmp_path / "a")
    assert 0.9 < summary["step"] / int(0.998 * 40 / STEP) <= 1 and summary["finished"]
    assert values[-1] == max(values) if ratio == 0 else values[-1] < 0.1 * max(values)
    assert max(abs(a - b) for a, b in itertools.pairwise(values[5:])) < 0.05 * max(values)


def test_a_machine_that_is_far_too_slow(budgeted, tmp_path):
    """Three times as slow as its first steps: after 32 steps nothing is left. One more step, and the end."""
    summary = budgeted(tmp_path / "a", 20, pace=3 * STEP)
    assert summary["step"] == 33 and summary["finished"] and summary["val_bpb"]


@pytest.mark.parametrize("notebook", ["nb", "mt"])
def test_the_saved_config_is_that_of_the_budget(nb, budgeted, tmp_path, notebook, request):
    """So that 05 and 07 can read it, and a start with the same options goes on."""
    budgeted(tmp_path / "a", 20)
    saved = json.loads((tmp_path / "a" / "config.json").read_text())
    assert saved["hours"] == 20 / 3600 and saved["num_iterations"] == -1
    assert nb.Config().replace(**saved) == nb.Config(**saved)
    config = request.getfixturevalue(notebook).Config.demo()
    assert config.replace(hours=2).num_iterations == -1 and config.replace(hours=2).replace(num_iterations=7).hours == 0
    assert config.replace(hours=2).replace(credits=3).hours == 0


def test_a_run_that_is_killed_in_its_warmdown_ends_on_time(tmp_path):
    """What the break and the lost steps took is missing at the end, and the learning rate falls from where it was."""
    settings = TINY | dict(hours=16 / 3600, log_interval=5, eval_interval=0, sample_interval=0, save_interval=200)
    del settings["num_iterations"]
    process = started("02_train.py", cwd=tmp_path, run_dir="run", **settings)
    read_until_moved(process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run, newest = tmp_path / "run", saved_steps(tmp_path / "run")[-1]
    lost = float((run / "spent").read_text())
    done = script("02_train.py", cwd=tmp_path, run_dir="run", **settings)
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {newest}" in done.stdout and "steps fit the budget" in done.stdout
    meta = json.loads((run / "checkpoints" / f"step_{saved_steps(run)[-1]:08d}" / "meta.json").read_text())
    assert meta["finished"] and meta["spent"] > lost
    assert meta["step"] == meta["plan"]["length"]["num_iterations"]
    values = rates(run)
    jumps = [a - b for a, b in itertools.pairwise(values[newest // 5 - 1 :])]
    assert 0 <= min(jumps) and max(jumps) < 0.2 * max(values) and values[-1] < 0.1 * max(values)


def read_until_moved(process):
    for line in process.stdout:
        if "the warmdown begins" in line:
            return process.stdout.readline()  # 20 lines of the log make a run


def test_what_cannot_be_is_refused_in_a_line(nb, tmp_path):
    wrong = {
        ("--hours=1", "--num_iterations=7"): "num_iterations=7: hours sets the length of the run, too; give one",
        ("--hours=1", "--credits=1"): "hours=1.0: credits sets the length of the run, too; give one",
        ("--hours=-1",): "hours=-1.0: must not be negative",
        ("--credits=1",): "credits=1.0: nobody has noted what an hour of a 'cpu' costs; give hours",
        ("--hours=0.0001",): "hours=0.0001: is 0.4 s, and to start, 20 steps and an evaluation take ",
    }
    for words, message in wrong.items():
        done = script("02_train.py", *words, "--run_dir=run", cwd=tmp_path)
        assert done.returncode == 2 and one_line(done.stderr.strip(), "error: ", message), done
    assert not list(tmp_path.rglob("metrics.jsonl"))
    for given in (dict(hours="3"), dict(hours=None), dict(num_iterations="200"), dict(credits=-1)):
        with pytest.raises(nb.InputError, match=next(iter(given))):
            nb.Config.demo().replace(**given)
    with pytest.raises(nb.InputError, match="give hours or credits, not both"):
        nb.Config(hours=1, credits=2)


def test_a_run_that_began_before_there_were_budgets_goes_on(nb, finished, tmp_path, capsys):
    """A field that a checkpoint's Config has not is at its default."""
    run = tmp_path / "run"
    shutil.copytree(finished[0].run_dir, run)
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    path = run / "checkpoints" / "step_00000009" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["config"]["hours"], meta["config"]["credits"], meta["plan"], meta["spent"]
    path.write_text(json.dumps(meta))
    assert nb.train(tiny(nb, run))["finished"] and "resumed at step 9" in capsys.readouterr().out
    assert same_end(run, finished[0].run_dir)
