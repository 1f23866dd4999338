"""What a run survives: signals, damaged checkpoints, a full disk, a backup that fails, numbers that are none."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.hub_server import Fault, HubServer

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(
    n_head=1, head_dim=32, aspect_ratio=32, seq_len=32, device_batch_size=2, num_iterations=12, log_interval=2,
    eval_interval=4, save_interval=3, sample_interval=6, eval_tokens=1024, final_eval_tokens=1024, profile_steps=0,
    compute_dtype="bfloat16",  # a script's default is the CPU's
)  # fmt: skip
TIMED = {"tokens_per_second", "mfu", "data_wait_seconds"}


def tiny(nb, folder, **changes):
    return nb.Config.demo().replace(run_dir=str(folder), **{**TINY, **changes})


def rows(run):
    """The lines of a run's metrics, without the rates."""
    lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def steps(run):
    return [int(path.name[5:]) for path in sorted((Path(run) / "checkpoints").glob("step_*"))]


def last_state(run):
    return (Path(run) / "checkpoints" / "step_00000012" / "state.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(nb, tmp_path_factory):
    """The folder of a run of 12 steps that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    nb.train(tiny(nb, folder))
    return folder


def same_end(run, whole):
    assert last_state(run) == last_state(whole)
    assert rows(run) == rows(whole)
    assert (run / "samples.txt").read_text() == (whole / "samples.txt").read_text()


# ---- checkpoints beside the training


def test_a_save_does_not_wait_for_the_disk(nb, tmp_path, monkeypatch):
    """save() comes back while the files are being written, from a copy: the state may be donated at once. The next
    save waits, and both end up whole."""
    config, gate = tiny(nb, tmp_path), threading.Event()
    write = nb.write_checkpoint
    monkeypatch.setattr(nb, "write_checkpoint", lambda *args: gate.wait(10) and write(*args))
    state = nb.init_train_state(config)
    before = np.array(state.params["embed"])
    saver = nb.Checkpointer(config, tmp_path)
    saver.save(state, loader={})
    tokens = jnp.zeros((2, 32), jnp.int32)
    state, _ = nb.train_step(config, state, tokens, tokens)
    jax.block_until_ready(state)
    assert not nb.list_checkpoints(tmp_path)
    gate.set()
    saver.save(state, loader={})
    saver.close()
    assert steps(tmp_path) == [0, 1]
    loaded, _ = nb.load_checkpoint(tmp_path / "checkpoints" / "step_00000000", config)
    np.testing.assert_array_equal(loaded.params["embed"], before)


def test_a_full_disk_is_said_and_the_old_checkpoint_stays(nb, tmp_path, monkeypatch):
    """The third file that is written meets a full disk: the run ends with the error, and goes on when there is room."""
    import safetensors.numpy

    save_file, calls = safetensors.numpy.save_file, []

    def full(arrays, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_file(arrays, path)

    config = tiny(nb, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(nb.InputError, match=r"cannot write .*step_00000006.*No space left.*untouched"):
            nb.train(config)
    assert steps(tmp_path / "run") == [3]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_00000003"]
    assert nb.train(config)["step"] == 12


def damaged_run(nb, whole, tmp_path, damage):
    """A copy of `whole` as of step 9, whose newest checkpoint `damage` has been at; and what train prints on it."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newest = run / "checkpoints" / "step_00000012"
    meta = json.loads((newest / "meta.json").read_text())
    meta["finished"] = False  # or the next start would take a new folder, if nothing were wrong
    (newest / "meta.json").write_text(json.dumps(meta))
    damage(newest)
    return run


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(checkpoint, **values):
    meta = json.loads((checkpoint / "meta.json").read_text())
    (checkpoint / "meta.json").write_text(json.dumps({**meta, **values}))


DAMAGE = {
    "truncated": (lambda c: os.truncate(c / "state.safetensors", 1000), "damaged: its bytes is 1000, not"),
    "one bit": (lambda c: flip(c / "state.safetensors", -1), "state.safetensors is damaged: its sha256 is"),
    "a bit of the metrics": (lambda c: flip(c / "metrics.jsonl", 3), "metrics.jsonl is damaged"),
    "missing": (lambda c: (c / "state.safetensors").unlink(), "No such file"),
    "no meta": (lambda c: (c / "meta.json").unlink(), "No such file"),
    "half of the meta": (lambda c: os.truncate(c / "meta.json", 100), "passed over"),
    "an empty meta": (lambda c: (c / "meta.json").write_text(""), "passed over"),
    "another's meta": (lambda c: (c / "meta.json").write_text("[1, 2]"), "not that of a checkpoint"),
    "a loader of another type": (lambda c: edit(c, loader=[1, 2]), r"meta.json says loader \[1, 2\]"),
    "a Config of another type": (lambda c: edit(c, config="demo"), "meta.json says config 'demo'"),
    "a best loss of another type": (
        lambda c: edit(c, best={"step": 9, "val_loss": "2", "val_bpb": 1.0}), "meta.json says best {'step': 9",
    ),
    "a file elsewhere": (
        lambda c: (c / "meta.json").write_text(
            json.dumps({"step": 12, "config": {}, "files": {"state.safetensors": {}, "../../config.json": {}}})
        ),
        r"names the files \['../../config.json', .* not those of a checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(nb, whole, tmp_path, capsys, damage):
    """The one before it is used, and the end is that of a run that nothing happened to."""
    change, words = DAMAGE[damage]
    run = damaged_run(nb, whole, tmp_path, change)
    summary = nb.train(tiny(nb, run))
    out = capsys.readouterr().out
    assert "step_00000012 is not whole and is passed over" in out
    assert re.search(words, out)
    assert "resumed at step 9" in out and summary["run_dir"] == str(run)
    same_end(run, whole)


# ---- signals


def script(folder, *options, env=None, **changes):
    settings = {**TINY, "run_dir": str(folder), **changes}
    command = [sys.executable, str(ROOT / "02_train.py")]
    command += [f"--{name}={value}" for name, value in settings.items()] + list(options)
    return subprocess.Popen(
        command, cwd=folder.parent, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_metrics_come_back_from_the_checkpoint(nb, whole, tmp_path):
    """Whatever has become of the file that was being written when the machine died."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    (run / "metrics.jsonl").write_bytes(b"\0" * 300)
    (run / "config.json").write_text("")
    nb.train(tiny(nb, run))
    assert rows(run) == rows(whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_start_goes_on(nb, tmp_path, number, status):
    """After the step that runs, with a checkpoint of it; the end is bit for bit that of an uninterrupted run."""
    long = dict(num_iterations=400, save_interval=0, eval_interval=0, sample_interval=0)
    process = script(tmp_path / "run", **long)
    for line in process.stdout:
        if line.startswith("first step"):
            break
    time.sleep(0.2)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == status, out
    (stopped,) = steps(tmp_path / "run")
    assert f"{number.name}: stopped after step {stopped};" in out and f"stopped by {number.name}" in out
    assert nb.train(tiny(nb, tmp_path / "run", **long))["step"] == 400
    nb.train(tiny(nb, tmp_path / "whole", **long))
    one, two = (tmp_path / run / "checkpoints/step_00000400/state.safetensors" for run in ("run", "whole"))
    assert one.read_bytes() == two.read_bytes()
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_notebook_goes_on_after_its_stop_button(nb, tmp_path, monkeypatch):
    """In the same process: train comes back, the model can be evaluated and sampled, and train goes on. The handlers of
    before are back."""
    config, before = tiny(nb, tmp_path / "run"), signal.getsignal(signal.SIGINT)
    train_step = nb.train_step

    def press_stop(config, state, *batch):
        if int(state.step) == 4:
            signal.raise_signal(signal.SIGINT)
        return train_step(config, state, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(nb, "train_step", press_stop)
        summary = nb.train(config)
    assert (summary["step"], summary["stopped"]) == (5, "SIGINT") and steps(tmp_path / "run") == [3, 5]
    nb.show_summary(summary)
    state, _ = nb.load_checkpoint(nb.list_checkpoints(tmp_path / "run")[-1], config)
    tokenizer = nb.load_tokenizer(ROOT / "data/embedded/tokenizer")
    assert nb.generate(config, state.params, tokenizer, "It is", max_new_tokens=3).startswith("It is")
    assert signal.getsignal(signal.SIGINT) == before
    assert nb.train(config)["stopped"] == ""


def test_a_second_stop_interrupts_at_once(nb):
    with pytest.raises(KeyboardInterrupt), nb.stop_requests() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked == ["SIGINT"]
        signal.raise_signal(signal.SIGINT)


def test_training_in_a_thread_leaves_signals_alone(nb):
    def use():
        with nb.stop_requests() as asked:
            return asked

    assert nb.in_background(use).result() == []


# ---- off the machine


def test_a_new_machine_goes_on_from_a_folder(nb, whole, tmp_path):
    """As after a runtime was taken away: the run folder is gone, the mounted Drive is not."""
    config = tiny(nb, tmp_path / "one" / "run", backup=str(tmp_path / "drive"))
    train_step = nb.train_step

    def die(config, state, *batch):
        if int(state.step) == 7:
            raise RuntimeError("the runtime is gone")
        return train_step(config, state, *batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="gone"):
        patch.setattr(nb, "train_step", die)
        nb.train(config)
    shutil.rmtree(tmp_path / "one")
    assert steps(tmp_path / "drive" / "run") == [3, 6]
    nb.train(config.replace(run_dir=str(tmp_path / "two" / "run")))
    same_end_but_samples = last_state(tmp_path / "two" / "run") == last_state(whole)
    assert same_end_but_samples and rows(tmp_path / "two" / "run") == rows(whole)
    assert steps(tmp_path / "drive" / "run")[-1] == 12


TOKEN = "hf_" + "plantedSecret123"


def test_a_new_machine_goes_on_from_the_hub(nb, whole, tmp_path):
    """A run of two processes on two 'machines', with a Hub on loopback between them. The secret is nowhere: not in what
    is printed, not in what is written, not in what is uploaded."""
    with HubServer({}) as hub:
        env = hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN}
        long = dict(backup="hub", hf_repo_id="me/model")
        first = script(tmp_path / "run", env=env, **long)
        printed, _ = first.communicate(timeout=180)
        assert first.returncode == 0, printed
        folder = "/me/model/resolve/main/checkpoints/run/"
        files = {path.removeprefix(folder): data for path, data in hub.files.items()}
        assert set(files) == {"meta.json", "metrics.jsonl", "state.safetensors"}
        assert files["state.safetensors"] == last_state(whole)
        meta = json.loads(files["meta.json"])
        meta["finished"] = False  # as if there were more to do
        hub.files[folder + "meta.json"] = json.dumps(meta).encode()
        (tmp_path / "other").mkdir()
        env = hub.environment(tmp_path / "home2") | {"HF_TOKEN": TOKEN}
        more = subprocess.run(
            [sys.executable, "-c", f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from tools.notebooks import load
nb = load({str(ROOT / "02_train.py")!r})
config = nb.Config.demo().replace(**{dict(TINY, run_dir="run", **long)!r})
run, checkpoint = nb.open_run(config)
print(run, checkpoint, nb.load_checkpoint(checkpoint, config)[1]["step"])
"""], cwd=tmp_path / "other", env=env, capture_output=True, text=True, timeout=120)  # fmt: skip
        assert "run run/checkpoints/step_00000012 12" in more.stdout, more.stderr
    assert last_state(tmp_path / "other" / "run") == last_state(whole)
    everything = [printed.encode(), more.stdout.encode(), more.stderr.encode(), *hub.files.values()]
    for home in ("run", "other"):
        everything += [path.read_bytes() for path in (tmp_path / home).rglob("*") if path.is_file()]
    assert len(everything) > 15 and not any(TOKEN.encode() in data for data in everything)


def test_a_failed_backup_does_not_stop_the_run(nb, tmp_path, monkeypatch, capsys):
    """A folder that cannot be written any more: said with its reason, tried again, and the run ends well."""
    monkeypatch.setattr(nb, "BACKUP_PAUSES", (0.01,))
    monkeypatch.setattr(
        nb, "copy_checkpoint", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "the Drive is gone"))
    )
    summary = nb.train(tiny(nb, tmp_path / "run", backup=str(tmp_path / "drive")))
    out = capsys.readouterr().out
    assert summary["step"] == 12 and steps(tmp_path / "run") == [9, 12]
    assert "backup of step_00000012" in out and "the Drive is gone" in out and "training goes on" in out


def test_a_hub_that_fails_is_tried_again(nb, tmp_path):
    """An upload answered 500 once; and a Hub that refuses each: training ends well all the same."""
    commit = "/api/models/me/model/commit/main"
    with HubServer({}, {commit: [Fault("POST", 500), Fault("POST", 503)]}) as hub:
        env = hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN}
        options = dict(backup="hub", hf_repo_id="me/model", save_interval=0, eval_interval=0, sample_interval=0)
        process = script(tmp_path / "run", env=env, num_iterations=2, **{k: v for k, v in options.items()})
        out, _ = process.communicate(timeout=180)
    assert process.returncode == 0 and TOKEN not in out, out
    assert any(path.endswith("checkpoints/run/state.safetensors") for path in hub.files), out


def test_a_backup_that_cannot_be_is_refused_before_any_work(nb, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(nb.InputError, match=r"backup='.*file/drive': cannot write there: .*Not a directory"):
        nb.train(tiny(nb, tmp_path / "run", backup=str(tmp_path / "file" / "drive")))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(nb.InputError, match="backup='hub': needs .*HF_TOKEN"):
        nb.train(tiny(nb, tmp_path / "run", backup="hub", hf_repo_id="me/model"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", ["../../../evil", -1, None, 10**12, "12"])
def test_a_backup_cannot_leave_the_run_folder(nb, tmp_path, monkeypatch, step):
    """A step that is a path, from a repo that someone else wrote: nothing is written outside, nothing is used."""
    files = {"meta.json": json.dumps({"step": step, "files": {"state.safetensors": {}}, "config": {}}).encode()}
    files |= {"state.safetensors": b"x", "metrics.jsonl": b""}
    (tmp_path / "hub").mkdir()

    def download(repo, name, kind):
        (tmp_path / "hub" / "file").write_bytes(files[name.rpartition("/")[2]])
        return tmp_path / "hub" / "file"

    monkeypatch.setattr(nb, "hub_download", download)
    config = tiny(nb, tmp_path / "here" / "run", backup="hub", hf_repo_id="me/model")
    (tmp_path / "here" / "run").mkdir(parents=True)
    nb.restore_backup(config, tmp_path / "here" / "run")
    assert not list((tmp_path / "here" / "run").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "hub"]


# ---- numbers that are none


def test_a_run_that_diverges_says_where(nb, tmp_path):
    """The step, its documents, the last good checkpoint, and what to do; no bad checkpoint is left behind."""
    config = tiny(nb, tmp_path / "run", log_interval=5)
    train_step = nb.train_step

    def poison(config, state, *batch):
        state, metrics = train_step(config, state, *batch)
        if int(state.step) == 8:  # step 7 has gone wrong; it is no step that is logged
            metrics = metrics | {"loss": jnp.float32(np.nan)}
            state = state._replace(params=jax.tree.map(lambda x: x * np.float32(np.nan), state.params))
        return state, metrics

    with pytest.MonkeyPatch.context() as patch, pytest.raises(nb.Diverged) as error:
        patch.setattr(nb, "train_step", poison)
        nb.train(config)
    words = str(error.value)
    assert words.startswith("step 7: loss nan, gradient norm ") and "\n" not in words
    assert "of training shard 0 to document" in words and "step_00000006. Lower learning_rate" in words
    assert steps(tmp_path / "run") == [3, 6]
    assert nb.train(config)["step"] == 12  # the same steps again, and this time nothing is wrong


def test_a_step_that_is_skipped_changes_nothing(nb, tmp_path, capsys):
    """nonfinite='skip': an infinite gradient leaves weights and moments as they are, to the bit; the step counts."""
    config = tiny(nb, tmp_path, nonfinite="skip", compute_dtype="float32")
    state = nb.init_train_state(config)
    tokens = jnp.zeros((2, 32), jnp.int32)
    bad = state._replace(params={**state.params, "lm_head": state.params["lm_head"].at[0, 0].set(np.inf)})
    before = jax.tree.map(np.array, bad)
    after, metrics = nb.train_step(config, bad, tokens, tokens)
    assert not np.isfinite(float(metrics["loss"]) + float(metrics["grad_norm"]))
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.mu, after.nu), before[1:4])
    assert int(after.step) == 1
    fine, _ = nb.train_step(config, nb.init_train_state(config), tokens, tokens)
    plain, _ = nb.train_step(config.replace(nonfinite="stop"), nb.init_train_state(config), tokens, tokens)
    jax.tree.map(np.testing.assert_array_equal, fine, plain)
    log = nb.RunLog(config, tmp_path, 0)
    for step in range(6):
        log.train_step(
            step, {"loss": np.nan if step in (1, 3) else 1.0, "grad_norm": 1.0, "learning_rate": 1.0}, f"batch {step}"
        )
    assert "step 1: loss nan" in (out := capsys.readouterr().out) and "on batch 1: skipped" in out
    with pytest.raises(nb.Diverged, match=r"^step \d+: loss nan"):  # all steps of an interval: that does not pass
        for step in range(6, 12):
            log.train_step(step, {"loss": np.nan, "grad_norm": 1.0, "learning_rate": 1.0}, "")
    log.close()


def test_clipping_against_optax(nb):
    """The gradient scaled to its norm, or left as it is when it is shorter: 5 steps of AdamW beside optax; eps is
    not small beside the rounding of gradients, which Adam would otherwise blow up to a full update on some CPUs."""
    for clip in (0.05, 1e9):
        config = nb.Config.demo().replace(**{**TINY, "grad_clip": clip, "compute_dtype": "float32", "weight_decay": 0.0,
                                             "eps": 1e-4, "warmup_ratio": 0.0, "warmdown_ratio": 0.0})  # fmt: skip
        state = nb.init_train_state(config)
        tokens = jax.random.randint(jax.random.key(0), (2, 33), 0, 4096)
        batch = tokens[:, :-1], tokens[:, 1:]
        rule = optax.chain(
            optax.clip_by_global_norm(clip),
            optax.adamw(config.learning_rate, config.beta1, config.beta2, config.eps, weight_decay=0.0),
        )
        params = jax.tree.map(jnp.array, state.params)
        memory, clipped = rule.init(params), 0
        for _ in range(5):
            state, metrics = nb.train_step(config, state, *batch)
            grads = jax.grad(lambda p, c=config, b=batch: nb.loss_fn(c, p, *b))(params)
            clipped += float(metrics["grad_norm"]) > clip
            updates, memory = rule.update(grads, memory, params)
            params = optax.apply_updates(params, updates)
        assert clipped == (5 if clip < 1 else 0)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(a, b, atol=5e-6)


# ---- what is left behind


def test_leaving_early_leaks_nothing(nb):
    """Fifty loaders, each left after a batch: no thread and no file handle more than before."""
    config = nb.Config.demo().replace(**TINY)
    shards, _ = nb.list_shards(config)
    tokenizer = nb.load_tokenizer(ROOT / "data/embedded/tokenizer")

    def left(expected=None):
        for _ in range(100):  # a thread that was told to stop may take a moment
            now = threading.active_count(), len(os.listdir("/dev/fd"))
            if expected is None or now <= expected:
                break
            time.sleep(0.1)
        return now

    def use():
        with nb.PrefetchDataLoader(config, tokenizer, shards) as loader:
            next(loader)

    use()
    before = left()
    for _ in range(50):
        use()
    threads, files = left(before)
    assert threads <= before[0] and files <= before[1]


def test_samples_are_not_written_twice(nb, tmp_path):
    path = tmp_path / "samples.txt"
    path.write_text("--- step 4\nfour\n\n--- step 8\neight\n\n--- step 12\ntwelve\n\n")
    nb.cut_samples(path, 8)
    assert path.read_text() == "--- step 4\nfour\n\n--- step 8\neight\n\n"
    nb.cut_samples(tmp_path / "none", 3)
