"""The whole job: 02_train.py as a script, as a notebook in a real Jupyter kernel, interrupted and resumed."""

import base64
import gzip
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import nbclient
import nbformat
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(
    n_head=2, head_dim=32, aspect_ratio=32, seq_len=64, device_batch_size=4, num_iterations=8, log_interval=1,
    eval_interval=4, save_interval=4, sample_interval=4, eval_tokens=2048, final_eval_tokens=4096, profile_start=4,
    profile_steps=3,
)  # fmt: skip


def tiny(nb, folder, **changes):
    return nb.Config.demo().replace(run_dir=str(folder), **{**TINY, **changes})


def script(folder, *options, **changes):
    settings = {**TINY, "run_dir": str(folder), **changes}
    command = [sys.executable, str(ROOT / "02_train.py")]
    command += [f"--{name}={value}" for name, value in settings.items()] + list(options)
    return subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(nb, tmp_path_factory):
    """A finished run of 8 steps: (its Config, what train returned)."""
    config = tiny(nb, tmp_path_factory.mktemp("runs") / "tiny")
    return config, nb.train(config)


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_as_a_script_from_another_folder(tmp_path):
    done = script(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for line in ("this model", "xz -9e", "zstd -19", "first step after", "tensorboard --logdir"):
        assert line in done.stdout
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert abs(losses[0] / math.log(4096) - 1) < 0.01  # a head that starts near zero guesses uniformly
    assert losses[-1] < losses[0]


def test_the_first_lines_name_the_versions_and_the_device(tmp_path):
    """And nothing imports tensorflow, which Colab has: neither TensorBoard's writer nor the profiler."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("import os; os._exit(9)")
    found = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "02_train.py", "--run_dir=run", *(f"--{k}={v}" for k, v in TINY.items())]
    done = subprocess.run(command, cwd=tmp_path, env=found, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"runs on jax {jax.__version__}, Python {platform.python_version()}"
    assert re.fullmatch(r"device  cpu \(.+, \d+ cores\), (bfloat16|float32), peak n/a", lines[1])
    assert list(tmp_path.glob("run/profile/plugins/profile/*/*.xplane.pb")) and "tensorflow" not in done.stderr


@pytest.mark.parametrize("notebook", ["02_train.py", "03_worker.py", "04_maxtext.py"])
def test_a_jax_that_is_too_old_is_refused_in_a_line(notebook, tmp_path):
    (tmp_path / "jax.py").write_text("__version__, __version_info__ = '0.6.2', (0, 6, 2)")
    found, command = os.environ | {"PYTHONPATH": str(tmp_path)}, [sys.executable, ROOT / notebook]
    done = subprocess.run(command, env=found, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        "error: jax 0.6.2 is too old: tpuchat needs 0.7.2 or newer; pip install --upgrade 'jax[tpu]', on a GPU "
        "'jax[cuda13]', on a CPU jax\n"
    )


def test_the_run_folder_holds_what_it_should(finished):
    config, summary = finished
    run = Path(config.run_dir)
    assert summary["run_dir"] == str(run) and summary["step"] == 8
    names = {path.name.split(".")[0] for path in run.iterdir()}
    assert names == {"config", "metrics", "events", "samples", "loss", "profile", "checkpoints"}
    assert json.loads((run / "config.json").read_text())["n_head"] == 2
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(8))
    assert [row["step"] for row in rows(run) if "val_loss" in row] == [4, 8]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000004", "step_00000008"]
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (run / "samples.txt").read_text().count("--- step") == 2


def test_a_run_compiles_its_step_once(nb, tmp_path):
    """Also the second step, whose state comes from the first, and the steps of a run that goes on from a checkpoint:
    arrays that are bound to a device, and ones that are not, make two programs of one."""
    config, before = tiny(nb, tmp_path / "run", seq_len=48, profile_steps=0), nb.train_step._cache_size()
    nb.train(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")
    assert nb.train(config)["step"] == 8
    assert nb.train_step._cache_size() == before + 1


def test_tensorboard_reads_the_scalars(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    config, _ = finished
    events = EventAccumulator(config.run_dir)
    events.Reload()
    written = {event.step: float(make_ndarray(event.tensor_proto)) for event in events.Tensors("loss")}
    assert written == {row["step"]: pytest.approx(row["loss"]) for row in rows(config.run_dir) if "loss" in row}
    assert {"val_loss", "val_bpb", "learning_rate", "grad_norm", "tokens_per_second"} <= set(events.Tags()["tensors"])


def test_the_profile_has_the_traced_steps(finished):
    config, _ = finished
    (trace,) = Path(config.run_dir).glob("profile/plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train" and "args" in event}
    assert {int(step) for step in steps} == {4, 5, 6}


def test_every_component_has_a_named_scope(nb, finished):
    config, _ = finished
    state, tokens = nb.init_train_state(config), np.zeros((4, 64), np.int32)
    text = nb.train_step.lower(config, state, tokens, tokens).as_text(debug_info=True)
    for scope in ("embed", "layer_00/attn", "layer_01/mlp", "lm_head", "loss", "optimizer"):
        assert scope.split("/")[0] in text and scope.split("/")[-1] in text


def test_a_finished_run_is_never_overwritten(nb, finished):
    config, _ = finished
    before = (Path(config.run_dir) / "metrics.jsonl").read_bytes()
    run, checkpoint = nb.open_run(config)
    assert (run.name, checkpoint) == ("tiny-2", None)
    assert (Path(config.run_dir) / "metrics.jsonl").read_bytes() == before


def test_an_interrupted_run_ends_as_if_it_had_not_been(nb, finished, tmp_path):
    """Delete the last checkpoint of a finished run: it is now one that died after step 8, last saved at step 4."""
    config, summary = finished
    folder = tmp_path / "interrupted"
    shutil.copytree(config.run_dir, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000008")
    again = nb.train(config.replace(run_dir=str(folder)))
    timed = {"tokens_per_second", "mfu", "data_wait_seconds"}
    for old, new in zip(rows(config.run_dir), rows(folder), strict=True):
        assert {k: v for k, v in old.items() if k not in timed} == {k: v for k, v in new.items() if k not in timed}
    assert again["val_loss"] == summary["val_loss"]
    one, two = (Path(run) / "checkpoints/step_00000008/state.safetensors" for run in (config.run_dir, folder))
    assert one.read_bytes() == two.read_bytes()


def test_an_unfinished_run_of_another_config_is_refused(nb, finished, tmp_path):
    config, _ = finished
    folder = tmp_path / "other"
    shutil.copytree(config.run_dir, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000008")
    with pytest.raises(ValueError, match=r"learning_rate 0\.\d+ → 0\.5.*resume='never'"):
        nb.train(config.replace(run_dir=str(folder), learning_rate=0.5))
    assert nb.open_run(config.replace(run_dir=str(folder), learning_rate=0.5, resume="never"))[0].name == "other-2"


def test_a_folder_that_is_not_a_run_is_left_alone(nb, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds no run"):
        nb.train(tiny(nb, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_folder_that_cannot_be_written(nb, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="run_dir=.*cannot use"):
        nb.train(tiny(nb, tmp_path / "file" / "run"))


def test_a_shard_that_breaks_later_ends_the_run_with_its_error(nb, tmp_path, monkeypatch):
    """The loader's thread meets it; the loop raises it, and the checkpoint before it stays."""
    shards, validation = nb.list_shards(nb.Config.demo())

    def broken():
        raise nb.InputError("shard 7: gone")

    def short_shard():
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = tmp_path / "short.parquet"
        pq.write_table(pa.table({"text": ["some words " * 100] * 40}), path)
        return path

    later = iter([broken, broken])  # the second shard: when it is fetched ahead of use, and when it is needed
    monkeypatch.setattr(
        nb, "list_shards", lambda config: ([short_shard, lambda: next(later, short_shard)()], validation)
    )
    monkeypatch.setattr(nb, "announce_downloads", lambda *_: None)
    monkeypatch.setattr(nb, "find_tokenizer", lambda *_: nb.load_tokenizer(ROOT / "data/embedded/tokenizer"))
    config = tiny(
        nb, tmp_path / "run", dataset="karpathy/fineweb-edu-100b-shuffle", num_iterations=1000, save_interval=2
    )
    with pytest.raises(ValueError, match="shard 7: gone"):
        nb.train(config)
    assert nb.list_checkpoints(tmp_path / "run")


def test_metrics_are_read_one_interval_late(nb, tmp_path):
    """The loss of the newest logged step is still on its way: asking for it would stall the device."""

    class OnItsWay:
        def __float__(self):
            raise AssertionError("the host waited for the device")

    config = tiny(nb, tmp_path, log_interval=2)
    log = nb.RunLog(config, tmp_path, 0)
    log.train_step(0, {"loss": 1.0})
    log.train_step(1, {"loss": OnItsWay()})  # not a log step
    log.train_step(2, {"loss": OnItsWay()})
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [0]


def test_a_run_that_logs_nothing(nb, tmp_path):
    """0 = never, for every interval; the run still ends, with its evaluation, checkpoint and picture."""
    never = dict.fromkeys(("log_interval", "eval_interval", "sample_interval", "save_interval", "profile_steps"), 0)
    summary = nb.train(tiny(nb, tmp_path / "run", num_iterations=1, **never))
    assert summary["loss"] is None and summary["val_loss"] > 0
    assert (tmp_path / "run" / "loss.png").exists() and nb.list_checkpoints(tmp_path / "run")


def test_a_metrics_line_cut_short_is_dropped(nb, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    nb.RunLog(tiny(nb, tmp_path), tmp_path, 5).close()
    assert rows(tmp_path) == [{"step": 0, "loss": 1.0}]


FEW = {
    name: value
    for name, value in TINY.items()
    if name.endswith(("_interval", "_tokens", "_iterations", "_start", "_steps"))
}
WIDE = dict(n_layer=1, mlp_dim=256, device_batch_size=2, **FEW)


@pytest.mark.parametrize(("name", "shape"), [("02_train.ipynb", TINY), ("04_maxtext.ipynb", WIDE)])
def test_the_notebook_runs_in_a_real_kernel(tmp_path, name, shape):
    """All cells top to bottom in Jupyter, with a Config of a few steps."""
    notebook = nbformat.read(ROOT / name, 4)
    (cell,) = (cell for cell in notebook.cells if "join_hosts()" in cell.source and "run" in cell.metadata.tags)
    changes = {**shape, "run_dir": str(tmp_path / "run"), "dataset": str(ROOT / "data" / "embedded")}
    cell.source += f"\nconfig = config.replace(**{changes!r})"
    (tmp_path / name).write_text(nbformat.writes(notebook))
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert "bits per byte" in text and "The people of the United States" in text
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    files = [(tmp_path / "run" / name).read_bytes() for name in ("loss.png", "loss_by_position.png")]
    assert [base64.b64decode(picture) for picture in pictures] == files  # the live curve ends as the file
    assert "traced steps of" in text and "new tokens in" in text
    (page,) = (output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))
    assert page.count("bits") > 50


def test_a_second_process_finds_the_compiled_step(tmp_path):
    """The persistent cache: the second start compiles no train step anew."""
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import jax, numpy as np
from tools.notebooks import load
nb = load({str(ROOT / "02_train.py")!r})
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
config = nb.Config.demo().replace(n_head=1, aspect_ratio=64, seq_len=32, device_batch_size=1)
tokens = np.zeros((1, 32), np.int32)
state, metrics = nb.train_step(config, nb.init_train_state(config), tokens, tokens)
print(float(metrics["loss"]), sum(name.endswith("/cache_misses") for name in events))
"""
    runs = [subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True) for _ in range(2)]
    assert all(run.returncode == 0 for run in runs), runs[-1].stderr
    (loss_1, misses_1), (loss_2, misses_2) = (run.stdout.split() for run in runs)
    assert loss_1 == loss_2
    assert int(misses_1) >= 2 and int(misses_2) == 0  # init_params and train_step, at least
