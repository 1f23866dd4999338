"""What a run survives, and what it says: full disks, lost shards, a backup or wandb that fails, NaNs."""

import errno
import functools
import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import QUIET, TINY, fetcher, one_line, run_code, saved_steps, tiny, write_shard
from tests.hub_server import Fault, HubServer
from tests.wandb_server import KEY, WandbServer


def test_a_full_disk_is_said_and_the_old_checkpoint_stays(nb, tmp_path, monkeypatch, capsys):
    """From its second checkpoint on, a run meets a full disk: it ends with the error, at once and not when its steps
    are done, says what is lost, and goes on when there is room."""
    import safetensors.numpy

    save_file, calls = safetensors.numpy.save_file, []

    def full(arrays, path, **options):
        calls.append(path)
        if len(calls) >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_file(arrays, path, **options)

    config = tiny(nb, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(nb.InputError, match=r"cannot write .*step_00000006.*No space left"):
            nb.train(config)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000003"]
    words = r"the last steps could not be saved \(cannot write .*No space.*the last good checkpoint is .*step_00000003"
    assert re.search(words, capsys.readouterr().out)
    assert nb.train(config)["step"] == 12


def test_a_shard_that_breaks_later_ends_the_run_with_its_error(nb, tokenizer, tmp_path, monkeypatch):
    """The loader's thread meets it; the loop raises it, and the checkpoint before it stays."""
    _, validation = nb.list_shards(nb.Config.demo())
    short = write_shard(tmp_path / "short.parquet", ["some words " * 100] * 40)

    def broken(shard):
        raise nb.InputError(f"{shard.name}: gone")

    gone = nb.Shard("shard 7", (nb.HubFile("me/x", "7.parquet"),))
    shards = [fetcher(nb, short), functools.partial(broken, gone)]
    monkeypatch.setattr(nb, "list_shards", lambda config: (shards, validation))
    monkeypatch.setattr(nb, "find_tokenizer", lambda *_: tokenizer)
    with pytest.raises(nb.InputError, match="shard 7: gone"):
        nb.train(tiny(nb, tmp_path / "run", dataset="karpathy/climbmix-400b-shuffle", num_iterations=1000))
    assert saved_steps(tmp_path / "run")


# ---- backups


def test_a_failed_backup_does_not_stop_the_run(nb, tmp_path, monkeypatch, capsys):
    """A folder that cannot be written any more: said with its reason, and the run ends well."""

    def fail(*args):
        raise OSError(errno.EIO, "the Drive is gone")

    monkeypatch.setattr(nb, "copy_checkpoint", fail)
    summary = nb.train(tiny(nb, tmp_path / "run", backup=str(tmp_path / "drive")))
    out = capsys.readouterr().out
    assert summary["step"] == 12 and saved_steps(tmp_path / "run") == [9, 12]
    assert "backup of step_00000012" in out and "the Drive is gone" in out and "training goes on" in out


def test_a_copy_that_takes_longer_than_the_saves_is_whole(nb, tmp_path, monkeypatch, capsys):
    """The checkpoint that is being copied stays, however many newer ones there are."""
    copytree = nb.shutil.copytree
    monkeypatch.setattr(nb.shutil, "copytree", lambda *a, **b: time.sleep(0.5) or copytree(*a, **b))
    nb.train(tiny(nb, tmp_path / "run", save_interval=1, keep_checkpoints=1, backup=str(tmp_path / "drive")))
    assert "failed" not in capsys.readouterr().out and saved_steps(tmp_path / "drive" / "run")[-1] == 12
    assert len(saved_steps(tmp_path / "run")) <= 3  # the newest, the best, and the one that was being copied


def test_a_hub_that_fails_does_not_stop_the_run(tmp_path):
    """An upload answered 500 and 503 is tried again; training ends well, and what it has made is there."""
    settings = TINY | QUIET | dict(backup="hub", hf_repo_id="me/model", num_iterations=2)
    code = f"config = nb.Config.demo().replace(**{settings!r}, run_dir=str(Path.home() / 'run'))\n"
    code += "answers['step'] = nb.train(config)['step']"
    faults = {"/api/models/me/model/commit/main": [Fault("POST", 500), Fault("POST", 503)]}
    with HubServer({}, faults) as hub:
        answers, _ = run_code(code, hub.environment(tmp_path) | {"HF_TOKEN": "hf_x"})
    assert answers["step"] == 2 and not any(hub.faults.values())
    assert any(path.endswith("checkpoints/run/state.safetensors") for path in hub.files)


def test_a_backup_that_cannot_be_is_refused_before_any_work(nb, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(nb.InputError, match=r"backup='.*file/drive': cannot write there .*Not a directory"):
        nb.train(tiny(nb, tmp_path / "run", backup=str(tmp_path / "file" / "drive")))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(nb.InputError, match="backup='hub': needs .*HF_TOKEN"):
        nb.train(tiny(nb, tmp_path / "run", backup="hub", hf_repo_id="me/model"))
    assert not (tmp_path / "run").exists()


# ---- NaN


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
    assert words.startswith("step 7: loss nan, gradient norm ")
    assert one_line(words, "of training shard 0 to document", "step_00000006", "learning_rate")
    assert saved_steps(tmp_path / "run") == [3, 6]
    assert nb.train(config)["step"] == 12  # the same steps again, and this time nothing is wrong


def test_skipped_steps_are_said(nb, tmp_path, capsys):
    """Each with its batch; where all steps of an interval are skipped, that does not pass: the run ends."""
    log = nb.RunLog(tiny(nb, tmp_path, nonfinite="skip"), tmp_path, 0, {})

    def step(number, loss):
        log.train_step(number, {"loss": loss, "grad_norm": 1.0, "learning_rate": 1.0}, f"batch {number}")

    for number in range(6):
        step(number, np.nan if number in (1, 3) else 1.0)
    assert "step 1: loss nan" in (out := capsys.readouterr().out) and "on batch 1: skipped" in out
    with pytest.raises(nb.Diverged, match=r"^step \d+: loss nan"):
        for number in range(6, 12):
            step(number, np.nan)
    log.bar.close()


# ---- wandb


def test_wandb_offline_and_again_after_an_interruption(nb, tmp_path):
    """The run has its lines, samples, the curve and an artifact; whoever goes on from a checkpoint goes on with it."""
    config = tiny(nb, tmp_path / "run", wandb_mode="offline", num_iterations=6)

    def runs():
        return sorted(path.name.split("-")[-1] for path in (tmp_path / "run" / "wandb").glob("offline-run-*"))

    nb.train(config)
    (name,) = runs()
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = record.read_bytes()
    for word in (b"val_bpb", b"param_norm/attn", b"samples", b"loss curve", b"run-checkpoint", b"learning_rate"):
        assert word in content, word
    (tmp_path / "run" / "checkpoints" / "step_00000006" / "meta.json").unlink()
    nb.train(config)
    assert runs() == [name, name]


def test_wandb_is_off_without_a_key(nb, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nb.open_wandb(tiny(nb, tmp_path), tmp_path, None) is None
    with pytest.raises(nb.InputError, match="wandb_mode='online': needs a key"):
        nb.open_wandb(tiny(nb, tmp_path, wandb_mode="online"), tmp_path, None)


@pytest.mark.parametrize("fault", ["nobody listens", "a bad key"])
def test_wandb_never_stops_a_run_that_did_not_ask_for_it(nb, tmp_path, monkeypatch, capsys, fault):
    """With a key there and wandb away, 'auto' says so and trains; 'online' refuses, before anything is trained."""
    import wandb

    wandb.teardown()  # it keeps the settings of the process's first run
    settings = wandb.Settings
    monkeypatch.setattr(wandb, "Settings", lambda **options: settings(**options | {"init_timeout": 5}))
    with WandbServer() as server:
        for name, value in {**server.environment(tmp_path), "WANDB_API_KEY": "f" * 40}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("WANDB_MODE")
        if fault == "nobody listens":
            monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        assert nb.open_wandb(tiny(nb, tmp_path), tmp_path, None) is None
        out = capsys.readouterr().out
        assert re.fullmatch("wandb: .+; training goes on without it\n", out)
        assert "f" * 40 not in out and KEY not in out
        with pytest.raises(nb.InputError, match="wandb: .+"):
            nb.open_wandb(tiny(nb, tmp_path, wandb_mode="online"), tmp_path, None)
