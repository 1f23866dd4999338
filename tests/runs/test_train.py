"""A whole run: what it prints, what it leaves behind, what it compiles, and what it never waits for."""

import gzip
import json
import math
import os
import platform
import re
import signal
import time
from pathlib import Path

import jax
import pytest

from tests.helpers import QUIET, RATES, TINY, batch, metrics, run_code, saved_steps, script, tiny


def test_as_a_script_from_another_folder(tmp_path):
    """The first lines name the versions and the device, the last ones what came out. Nothing imports tensorflow, which
    Colab has: neither TensorBoard's writer nor the profiler."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("import os; os._exit(9)")
    settings = TINY | dict(num_iterations=4, profile_start=2, profile_steps=2, log_interval=1, run_dir="run")
    done = script("02_train.py", cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, **settings)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"runs on jax {jax.__version__}, Python {platform.python_version()}"
    assert re.fullmatch(r"device  cpu \(.+, \d+ cores\), (bfloat16|float32), peak n/a", lines[1])
    for words in ("this model", "xz -9e", "zstd -19", "first step after", "least surprising", "tensorboard --logdir"):
        assert words in done.stdout
    losses = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert abs(losses[0] / math.log(4096) - 1) < 0.01  # a head that starts near zero guesses uniformly
    assert losses[-1] < losses[0] and list(tmp_path.glob("run/profile/plugins/profile/*/*.xplane.pb"))


@pytest.mark.parametrize("notebook", ["02_train.py", "03_worker.py", "04_maxtext.py"])
def test_a_jax_that_is_too_old_is_refused_in_a_line(notebook, tmp_path):
    (tmp_path / "jax.py").write_text("__version__, __version_info__ = '0.6.2', (0, 6, 2)")
    done = script(notebook, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: jax 0.6.2 is too old: tpuchat needs 0.7.2 or newer; pip install")


def test_the_run_folder_holds_what_it_should(finished):
    config, summary = finished
    run = Path(config.run_dir)
    assert summary["run_dir"] == str(run) and summary["step"] == 12
    names = {path.name.split(".")[0] for path in run.iterdir()}
    assert names == {"config", "metrics", "events", "samples", "loss", "profile", "checkpoints", "tokenizer", "spent"}
    assert json.loads((run / "config.json").read_text())["n_head"] == 2
    assert [row["step"] for row in metrics(run) if "loss" in row] == [0, 2, 4, 6, 8, 10]
    assert [row["step"] for row in metrics(run) if "val_loss" in row] == [4, 8, 12]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000009", "step_00000012"]
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (run / "samples.txt").read_text().count("--- step") == 2


def test_tensorboard_has_scalars_norms_samples_and_the_config(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from tensorboard.util.tensor_util import make_ndarray

    config, _ = finished
    events = EventAccumulator(config.run_dir)
    events.Reload()
    written = {event.step: float(make_ndarray(event.tensor_proto)) for event in events.Tensors("loss")}
    assert written == {row["step"]: pytest.approx(row["loss"]) for row in metrics(config.run_dir) if "loss" in row}
    parts = {f"{kind}_norm/{part}" for kind in ("param", "update") for part in ("embed", "attn", "mlp", "lm_head")}
    other = {"val_loss", "val_bpb", "learning_rate", "grad_norm", "tokens_per_second", "data_wait_seconds"}
    assert parts | other | {"samples"} <= set(events.Tags()["tensors"])
    texts = [[x.decode() for x in make_ndarray(event.tensor_proto)] for event in events.Tensors("samples")]
    assert len(texts) == 2 and all(len(group) == 3 for group in texts) and texts[1][0].startswith("It is a truth")
    (data,) = (events.summary_metadata["_hparams_/session_start_info"].plugin_data,)
    saved = HParamsPluginData.FromString(data.content).session_start_info.hparams
    assert saved["n_head"].number_value == 2 and saved["dataset"].string_value == "embedded"


def test_the_profile_has_the_traced_steps_and_names(nb, finished):
    """Of the steps that the Config says; every component of the program has a scope of its name."""
    config, _ = finished
    (trace,) = Path(config.run_dir).glob("profile/plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train" and "args" in event}
    assert {int(step) for step in steps} == {4, 5, 6}
    text = nb.train_step.lower(config, nb.init_train_state(config), *batch(config)).as_text(debug_info=True)
    for scope in ("embed", "layer_00/attn", "layer_01/mlp", "lm_head", "loss", "optimizer"):
        assert scope.split("/")[0] in text and scope.split("/")[-1] in text


def test_the_summary(nb, finished, capsys):
    config, summary = finished
    nb.show_summary(summary)
    out = capsys.readouterr().out
    assert f"{nb.count_params(config)['total'] / 1e6:.1f}M parameters (embed" in out
    assert f"tokens  {12 * 256:,} in 12 steps" in out and "waiting for data" in out and "best " in out
    times = summary["times"]
    assert {"steps", "start", "compiling", "evaluation", "samples", "saving", "tracing", "drawing"} == set(times)
    assert all(seconds > 0 for seconds in times.values())
    assert sum(times.values()) == pytest.approx(summary["seconds"])


def test_the_best_is_of_the_evaluations_that_can_be_compared(nb, tmp_path, monkeypatch):
    """The last one reads other tokens: it counts only where it is the only one. The checkpoint of the best step stays,
    and a resumed run knows it."""
    losses = iter([2.0, 3.0, 1.0, 3.0, 0.5, 0.25])  # the second time it goes on from the best, at step 4
    monkeypatch.setattr(nb, "evaluate", lambda *args: {"loss": next(losses), "bpb": 1.0})
    config = tiny(nb, tmp_path / "run", save_interval=4, keep_checkpoints=1)

    def kept(run):
        metas = {path: json.loads((path / "meta.json").read_text()) for path in nb.list_checkpoints(run)}
        return {meta["step"]: meta.get("val_loss") for meta in metas.values()}

    for last in (1.0, 0.5):
        summary = nb.train(config)
        assert summary["val_loss"] == last and summary["best"] == {"step": 4, "val_loss": 2.0, "val_bpb": 1.0}
        assert kept(tmp_path / "run") == {4: 2.0, 12: None}
        (tmp_path / "run/checkpoints/step_00000012/meta.json").unlink()
    summary = nb.train(config.replace(run_dir=str(tmp_path / "other"), eval_interval=0))
    assert summary["best"]["step"] == 12 and kept(tmp_path / "other") == {12: summary["val_loss"]}


# ---- compilation


def test_a_run_compiles_its_step_once(nb, tmp_path, monkeypatch):
    """Also the second step, whose state comes from the first, and the steps of a run that goes on from a checkpoint:
    arrays that are bound to a device, and ones that are not, would make two programs of one. Nor does a run with
    another seed and schedule compile."""
    config, before = tiny(nb, tmp_path / "run", seq_len=48, num_iterations=4, **QUIET), nb.train_step._cache_size()
    traced, loss_and_grads = [], nb.loss_and_grads
    monkeypatch.setattr(nb, "loss_and_grads", lambda *args: traced.append(args) or loss_and_grads(*args))
    nb.train(config.replace(save_interval=2, learning_rate=0.1))
    (tmp_path / "run/checkpoints/step_00000004/meta.json").unlink()
    assert nb.train(config.replace(learning_rate=0.1))["step"] == 4
    assert nb.train(config.replace(run_dir=str(tmp_path / "other"), num_iterations=3, seed=1))["step"] == 3
    assert len(traced) == 1 and nb.train_step._cache_size() == before + 1


def test_a_second_process_finds_the_compiled_step(tmp_path):
    """The persistent cache: the second start compiles no train step anew."""
    code = """
import jax, tests.helpers
events, nb_config = [], tests.helpers.small_config(nb, seq_len=40)
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
state, metrics = nb.train_step(nb_config, nb.init_train_state(nb_config), *tests.helpers.batch(nb_config))
answers["loss"] = float(metrics["loss"])
answers["misses"] = sum(name.endswith("/cache_misses") for name in events)
"""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    first, second = (run_code(code, env)[0] for _ in range(2))
    assert first["loss"] == second["loss"]
    assert first["misses"] >= 2 and second["misses"] == 0  # init_params and train_step, at least


# ---- the log


def test_metrics_are_read_one_interval_late(nb, tmp_path):
    """The loss of the newest logged step is still on its way: asking for it would stall the device."""

    class OnItsWay:
        def __float__(self):
            raise AssertionError("the host waited for the device")

    lines = []
    log = nb.RunLog(
        tiny(nb, tmp_path), tmp_path, 0, {"lines": lambda step, values: lines.append((step, values["loss"]))}
    )
    log.train_step(0, {"loss": 1.0, "learning_rate": 0.1})
    log.train_step(1, {"loss": OnItsWay()})  # not a log step
    log.train_step(2, {"loss": OnItsWay()})
    log.bar.close()
    assert lines == [(0, 1.0)]


def test_a_run_that_logs_nothing(nb, tmp_path):
    """0 = never, for every interval; the run still ends, with its evaluation, checkpoint and picture."""
    summary = nb.train(tiny(nb, tmp_path / "run", num_iterations=1, log_interval=0, **QUIET))
    assert summary["loss"] is None and summary["val_loss"] > 0
    assert (tmp_path / "run" / "loss.png").exists() and nb.list_checkpoints(tmp_path / "run")


def test_a_line_that_was_cut_short_is_left_out(nb, tmp_path):
    """The last one, of a process that was killed; a damaged one in between is named."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    assert nb.read_metrics(tmp_path) == [{"step": 0, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "lo\n{"step": 1, "loss": 1.0}\n')
    with pytest.raises(nb.InputError, match="metrics.jsonl cannot be read: .*; delete or mend the line"):
        nb.read_metrics(tmp_path)


def test_a_report_gets_the_lines_of_the_log_and_may_end_the_run(nb, finished, tmp_path):
    """Each line of metrics.jsonl; what it raises is raised, and the state is saved."""
    lines = []
    nb.train(tiny(nb, tmp_path / "run"), report=lambda step, values: lines.append({"step": step, **values}))
    kept = [{name: value for name, value in line.items() if name not in RATES} for line in lines]
    assert kept == metrics(tmp_path / "run") == metrics(finished[0].run_dir)

    def enough(step, values):
        if step >= 8:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        nb.train(tiny(nb, tmp_path / "stopped"), report=enough)
    assert saved_steps(tmp_path / "stopped")[-1] in (8, 9, 10)


def test_a_line_follows_each_pause(nb, tmp_path, capsys):
    """Where nobody sees a bar: after an evaluation there is no rate yet, and the line shows the mean of the run."""
    nb.train(tiny(nb, tmp_path / "run"))
    out = capsys.readouterr().out
    assert re.findall(r"^step +(\d+)/12  loss .* [\d,]+ tok/s", out, re.M) == ["2", "4", "6", "8", "10"]


def test_the_last_evaluation_may_be_the_best(nb, tmp_path):
    """If it is of the same tokens as those before."""
    summary = nb.train(tiny(nb, tmp_path / "run", final_eval_tokens=TINY["eval_tokens"], learning_rate=3e-4))
    losses = {row["step"]: row["val_loss"] for row in metrics(tmp_path / "run") if "val_loss" in row}
    assert summary["best"]["step"] == min(losses, key=losses.get) == 12


def test_a_stop_before_the_first_step(nb, tmp_path, monkeypatch, capsys):
    """There is nothing to save or to draw, and nothing is said to be kept."""

    def stopped(loader):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(nb.PrefetchDataLoader, "__next__", stopped)
    summary = nb.train(tiny(nb, tmp_path / "run"))
    out = capsys.readouterr().out
    assert (summary["stopped"], summary["step"]) == ("SIGTERM", 0) and not summary["finished"]
    assert "SIGTERM: there is no checkpoint yet" in out and "kept" not in out and "failed" not in out
