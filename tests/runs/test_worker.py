"""03_worker.py: its search, its trials, and the real wandb agent against a server on loopback."""

import ast
import dataclasses
import gc
import itertools
import json
import math
import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT, contents, one_line, output_of, read_until, script, started, until, without_hub
from tests.wandb_server import KEY, WandbServer

TRIAL = dict(
    n_head=8, head_dim=4, aspect_ratio=16, seq_len=32, device_batch_size=4, eval_tokens=512, final_eval_tokens=512
)


@pytest.fixture
def base(worker, tmp_path):
    return worker.base_config().replace(**TRIAL, num_iterations=20, run_dir=str(tmp_path / "sweep"))


def agent(home, environment, **options):
    """A worker that takes part in a sweep."""
    home.mkdir(exist_ok=True)
    keep = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return started("03_worker.py", cwd=home, env=keep | environment, run_dir="runs", **TRIAL | options)


def trials(home):
    """{name: its row} of the trials that ended in this folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in (home / "runs").glob("*/trial.json")}


# ---- the search


@pytest.mark.parametrize("kind", ["demo", "reference"])
def test_every_suggestion_is_a_config(worker, kind):
    """All corners of the space, for both bases: nothing impossible can be suggested, and all cost the same."""
    base = worker.base_config()
    if kind == "reference":
        base = worker.SearchConfig().replace(num_iterations=8000, run_dir="runs/sweep")
    definition = worker.sweep_definition(base.replace(runs=7))
    assert definition["run_cap"] == 7 and definition["metric"] == {"name": "val_bpb", "goal": "minimize"}
    parameters = definition["parameters"]
    assert parameters == worker.search_space(base)
    known = {field.name for field in dataclasses.fields(worker.nb.Config)} | {"n_embd", "heads_per_kv"}
    assert set(parameters) <= known
    shapes = {name: p["values"] for name, p in parameters.items() if "values" in p}
    ends = [{name: p[end] for name, p in parameters.items() if end in p} for end in ("min", "max")]
    sizes, largest = set(), worker.nb.count_params(base)["total"]
    for values, rest in itertools.product(itertools.product(*shapes.values()), ends):
        config = worker.trial_config(base, {**dict(zip(shapes, values, strict=True)), **rest}, "x")
        assert worker.nb.count_params(config)["total"] <= largest
        assert config.device_batch_size <= base.device_batch_size
        flops = config.total_steps * config.tokens_per_step * worker.nb.flops_per_token(config)
        assert flops == pytest.approx(worker.trial_flops(base), rel=0.5 / 200)  # a whole number of steps, at least 200
        sizes.add(worker.nb.count_params(config)["total"])
    assert len(sizes) > 3


def test_draws_are_within_their_ranges(worker, base):
    rng = random.Random(1)
    for name, parameter in worker.search_space(base).items():
        values = [worker.draw(parameter, rng) for _ in range(400)]
        low, high = min(values), max(values)
        if "values" in parameter:
            assert set(values) == set(parameter["values"]), name
        else:
            assert parameter["min"] <= low < high <= parameter["max"]
            middle = sorted(values)[200]
            mean = (parameter["min"] + parameter["max"]) / 2
            if parameter["distribution"].startswith("log"):
                mean = math.sqrt(parameter["min"] * parameter["max"])
            assert middle == pytest.approx(mean, rel=0.2), name  # 4 standard deviations of a median of 400


def test_a_base_whose_half_cannot_be_is_refused(worker, base):
    with pytest.raises(worker.InputError, match="no layer is left"):
        worker.sweep_definition(base.replace(aspect_ratio=32))


@pytest.mark.parametrize(
    ("suggestion", "words"),
    [
        (dict(heads_per_kv=3), "heads_per_kv=3: must divide 8"),
        (dict(head_dim=12), "n_embd=32: must be a multiple of head_dim=12"),
        (dict(heads_per_kv=0), "heads_per_kv=0"),
        (dict(head_dim=1, n_embd=4), "head_dim=1: must be positive and even"),
        (dict(learning_rate=-1.0), "learning_rate=-1.0: must be positive"),
        (dict(learning_rte=1.0), "did you mean 'learning_rate'"),
    ],
)
def test_a_suggestion_that_cannot_be(worker, base, suggestion, words):
    with pytest.raises(worker.InputError, match=re.escape(words)):
        worker.trial_config(base, suggestion, "x")


def test_in_04_the_shape_stays(worker, mt):
    """Its width does not follow from the heads: the search is over rates, the schedule and the batch."""
    base = mt.Config.demo()
    space = worker.search_space(base)
    assert {"learning_rate", "device_batch_size"} < {*space} and not {"n_embd", "head_dim", "heads_per_kv"} & {*space}
    assert worker.base_suggestion(base) == {name: getattr(base, name) for name in space}
    config = worker.suggested_config(base, {"learning_rate": 0.5})
    assert config == base.replace(learning_rate=0.5) and config.learning_rate == 0.5


def test_the_subject_is_any_notebook(tmp_path):
    """06 as a .ipynb of another name, as a person would save one; what is no notebook is a line."""
    mine = json.loads((ROOT / "06_recipe.ipynb").read_text())
    mine["cells"].append({"cell_type": "code", "metadata": {}, "source": ["%pip list\n", "MINE = 1\n"]})
    (tmp_path / "mine.ipynb").write_text(json.dumps(mine))
    options = TRIAL | dict(head_dim=8, trials=1, num_iterations=20, run_dir="runs")
    options = [f"--{name}={value}" for name, value in options.items()]
    done = script("03_worker.py", "mine.ipynb", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CHANGES = {" in done.stdout and not done.stderr
    (tmp_path / "broken.ipynb").write_text("[]")
    (tmp_path / "binary.py").write_bytes(b"\xff\x00")
    words = {"nosuch.py": "there is no such file here", "broken.ipynb": "is no notebook", "binary.py": "is no notebook"}
    for name, said in words.items():
        done = script("03_worker.py", name, cwd=tmp_path, env=without_hub(tmp_path))
        assert (done.returncode, done.stdout) == (2, "")
        assert one_line(done.stderr.strip(), f"error: notebook={name!r}: ", said)


# ---- trials


def test_a_search_without_an_account(worker, base, capsys):
    """Three trials, one of which cannot be: it has a reason and no loss, and the others are compared."""
    rows = worker.local_search(base.replace(trials=2))
    failed = worker.run_trial(base, worker.wandb.init(mode="offline", dir=base.run_dir), dict(heads_per_kv=7))
    worker.wandb.finish()
    assert failed["val_bpb"] is None and "heads_per_kv=7: must divide 8" in failed["failure"]
    assert rows[0]["learning_rate"] == base.learning_rate and not rows[0]["failure"]
    folder = Path(base.run_dir)
    for row in rows:
        assert row["val_bpb"] > 1 and not (folder / row["name"] / "checkpoints").exists()
        assert json.loads((folder / row["name"] / "trial.json").read_text()) == row
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 3  # for wandb sync

    rows = worker.add_curves(base, [*rows, failed])
    for row in rows[:2]:  # ten evaluations, or one or two fewer where ten do not divide the steps
        assert 8 <= len(row["curve"]) <= 10 and row["curve"][-1] == (row["steps"], row["val_bpb"])
    assert rows[2]["curve"] == []
    best = worker.ranked(rows)
    assert len(best) == 2 and best[0]["val_bpb"] <= best[1]["val_bpb"]
    space = worker.search_space(base)
    capsys.readouterr()
    worker.show_table(rows, space)
    worker.show_winner(base, rows)
    out = capsys.readouterr().out
    assert f"{best[0]['val_bpb']:.4f}" in out and "1 of 3 trials were stopped or failed" in out
    changes = ast.literal_eval(out[out.index("CHANGES = ") :].removeprefix("CHANGES = "))
    config = worker.nb.Config.for_device().replace(**changes)
    trial = worker.trial_config(base, {name: best[0][name] for name in space}, "x")
    same = ("n_head", "kv_heads", "head_dim", "n_embd", "depth", "seq_len", "vocab_size", "dataset", "learning_rate")
    same += ("weight_decay", "warmup_ratio", "warmdown_ratio", "device_batch_size", "tokens_per_step")
    assert [getattr(config, name) for name in same] == [getattr(trial, name) for name in same]
    worker.plot_curves(rows, folder / "a.png")
    worker.plot_parameters(rows, space, folder / "b.png")
    assert all((folder / name).stat().st_size > 5000 for name in ("a.png", "b.png"))


def test_a_trial_without_memory_fails_and_frees_the_device(worker, base, monkeypatch):
    """A step that the device cannot hold: the trial has a reason, and the next one finds the memory free."""

    def train_step(config, state, tokens, targets):
        raise worker.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    def held():
        gc.collect()
        return sum(x.nbytes for x in worker.jax.live_arrays())

    monkeypatch.setattr(worker.nb, "train_step", train_step)
    run = worker.wandb.init(mode="offline", dir=base.run_dir, reinit="finish_previous")
    before = held()
    row = worker.run_trial(base, run, worker.base_suggestion(base))
    run.finish()
    assert row["val_bpb"] is None and "out of memory: RESOURCE_EXHAUSTED" in row["failure"]
    assert held() <= before + 1000  # the state is 100 times that


def test_a_stop_that_was_swallowed_is_seen_at_the_next_line_of_the_log(worker, base, monkeypatch):
    """wandb.agent raises an Exception wherever the trial is; jax's compilation cache turns it into a warning."""
    monkeypatch.setattr(threading.current_thread(), "_terminated", True, raising=False)
    run = worker.wandb.init(mode="offline", dir=base.run_dir, reinit="finish_previous")
    row = worker.run_trial(base, run, worker.base_suggestion(base))
    run.finish()
    assert (row["val_bpb"], row["failure"]) == (None, "stopped by the sweep")


def test_a_value_that_cannot_be_is_refused_in_a_line(worker, base, tmp_path):
    """By the command line, and by the space: half of the model must be a model, too. Nothing is written."""
    for option, words in {"--runs=x": "--runs: invalid int value: 'x'", "--sweepid=a": "mean 'sweep_id'?"}.items():
        with pytest.raises(worker.InputError, match=re.escape(words)):
            worker.nb.parse_args([option], base)
    for option, words in {"--trials=0": "trials=0: must be positive", "--n_head=4": "must be a multiple of 8"}.items():
        done = script("03_worker.py", "--run_dir=runs", option, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "") and one_line(done.stderr.strip(), "error: ", words), done
        assert not any(tmp_path.iterdir())


def test_free_parameters_compile_nothing(worker, base):
    """The step is compiled once for trials that differ in learning rate, weight decay and schedule."""
    base = base.replace(seq_len=16)  # no other test's shape
    before = worker.nb.train_step._cache_size()
    for rate in (1e-3, 2e-3, 3e-3):
        run = worker.wandb.init(mode="offline", dir=base.run_dir, reinit="finish_previous")
        assert worker.run_trial(base, run, dict(learning_rate=rate, weight_decay=rate, warmdown_ratio=0.3))["val_bpb"]
        run.finish()
    assert worker.nb.train_step._cache_size() == before + 1


# ---- the real agent


def test_two_workers_share_a_sweep(tmp_path):
    """Both join, each suggestion is trained once, one that cannot be fails with its reason, and both exit when told."""
    suggestions = [dict(learning_rate=rate) for rate in (1e-3, 2e-3, 3e-3, 4e-3)]
    suggestions[1]["heads_per_kv"] = 3
    homes = [tmp_path / "a", tmp_path / "b"]
    with WandbServer(suggestions) as server:
        workers = [agent(home, server.environment(home), sweep_id="sweep01", num_iterations=200) for home in homes]
        out = [output_of(process) for process in workers]
    assert [process.returncode for process in workers] == [0, 0], out
    done = [trials(home) for home in homes]
    names = sorted([*done[0], *done[1]])
    assert set(names) | {"run1"} == {"run0", "run1", "run2", "run3"} and len(names) == len(set(names))
    assert sorted(server.handed) == ["run0", "run1", "run2", "run3"] and len(server.agents) == 2
    assert "trial run1 failed: heads_per_kv=3: must divide 8" in "".join(out)
    assert all(row["val_bpb"] > 1 for rows in done for name, row in rows.items() if name != "run1")
    assert KEY not in "".join(out) and not any(KEY.encode() in data for data in contents(tmp_path).values())


def test_a_sweep_is_created_stopped_and_survives_a_server_that_is_away(tmp_path):
    """The first trial is long and is stopped; the next one is trained though the server was away for a while."""
    home = tmp_path / "home"
    with WandbServer([dict(learning_rate=1e-3), dict(learning_rate=2e-3)]) as server:
        process = agent(home, server.environment(home), num_iterations=30_000, log_interval=5)
        metrics = home / "runs" / "run0" / "metrics.jsonl"
        until(lambda: metrics.exists() and metrics.stat().st_size, process)
        server.down = True
        time.sleep(8)  # a heartbeat or two fail
        assert process.poll() is None
        server.stop = {"run0", "run1"}
        server.down = False
        out = output_of(process)
    assert process.returncode == 0, out
    assert "sweep   created1" in out and json.loads(json.dumps(server.sweeps["created1"]))
    done = trials(home)
    for name in ("run0", "run1"):
        assert done[name]["val_bpb"] is None and "stopped by the sweep" in done[name]["failure"], out
        assert not (home / "runs" / name / "checkpoints").exists()
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] < 29_000  # it had begun
    assert "no trial came to its end" in out


def test_a_worker_that_dies_is_replaced(tmp_path):
    """SIGKILL in a trial; the next start joins the same sweep and takes what is left."""
    home = tmp_path / "home"
    with WandbServer([dict(learning_rate=1e-3), dict(learning_rate=2e-3)]) as server:
        process = agent(home, server.environment(home), sweep_id="sweep01", num_iterations=2000)
        read_until(process, "first step")
        process.send_signal(signal.SIGKILL)
        output_of(process)
        again = agent(home, server.environment(home), sweep_id="sweep01", num_iterations=200)
        out = output_of(again)
    assert again.returncode == 0, out
    assert list(trials(home)) == ["run1"] and server.handed == {"run0": "agent0", "run1": "agent1"}


def test_the_rows_of_all_workers(worker, base, tmp_path, monkeypatch, capsys):
    """wandb.Api reads trials of other machines: those that ended are ranked, the others counted, with their reasons."""
    suggestion = worker.base_suggestion(base)
    ended_run = ("finished", {**suggestion, "trial": {}}, {"val_bpb": 1.5, "step": 20}, [(10, 2.0), (20, 1.5)])
    reason = {"failure": "heads_per_kv=3: must divide 8"}
    results = {
        "far": ended_run,
        "best": ("finished", {**suggestion, "learning_rate": 0.003}, {"val_bpb": 1.25}, [(20, 1.25)]),
        "bad": ("failed", {**suggestion, "heads_per_kv": 3}, reason, []),
        "dead": ("crashed", suggestion, {"val_bpb": 1.75}, [(10, 1.75)]),
    }
    with WandbServer(results=results) as server:
        for name, value in server.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        base = base.replace(sweep_id="sweep01", project="project", entity="me")
        rows = worker.fetch_rows(base)
        with pytest.raises(worker.InputError, match="wandb: cannot read the sweep"):
            worker.fetch_rows(base.replace(sweep_id="nosuch"))
    assert [row["name"] for row in rows] == list(results)
    assert [row["failure"] for row in rows] == ["", "", "heads_per_kv=3: must divide 8", "crashed"]
    assert rows[0]["curve"] == [(10, 2.0), (20, 1.5)] and "trial" not in rows[0]
    assert [row["name"] for row in worker.ranked(rows)] == ["best", "far"]
    worker.show_winner(base, rows)
    assert "'learning_rate': 0.003" in capsys.readouterr().out


NOBODY = "http://127.0.0.1:9"  # the discard port: refused at once
WRONG = {
    "a wrong id": ("nosuch", {}),
    "no network": (NOBODY, {"WANDB_BASE_URL": NOBODY, "WANDB_MODE": "online"}),
    "a bad key": ("cannot log in", {"WANDB_API_KEY": "f" * 40, "WANDB_MODE": "online"}),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_said_before_any_work(tmp_path, fault):
    words, environment = WRONG[fault]
    with WandbServer() as server:
        sweep = "nosuch" if fault == "a wrong id" else "sweep01"
        process = agent(tmp_path / "home", server.environment(tmp_path) | environment, sweep_id=sweep)
        out = output_of(process)  # wandb itself gives up after a while, later on a busy machine
    assert process.returncode == 2, out
    error = out.strip().splitlines()[-1]
    assert error.startswith("error: wandb: ") and words in error
    assert "f" * 40 not in out and KEY not in out
