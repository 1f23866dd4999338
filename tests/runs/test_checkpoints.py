"""Checkpoints: bit-exact, whole or not there, kept in number, and refused in words that help."""

import errno
import os
import re
import resource
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import batch, bits, contents, saved_steps, small_config


def at(state, step):
    return state._replace(step=jnp.int32(step))


@pytest.fixture
def saved(nb, tmp_path):
    """(config, state, path) of a checkpoint at step 7: arrays of random bits, NaNs with payloads, infinities and
    negative zeros among them."""
    config, rng = small_config(nb, aspect_ratio=64), np.random.default_rng(0)
    state = nb.init_train_state(config)

    def random_bits(x):
        return jnp.asarray(rng.integers(0, 2**32, x.shape, np.uint32).view(np.float32))

    params, mu, nu = (jax.tree.map(random_bits, state.params) for _ in range(3))
    state = at(state, 7)._replace(params=params, mu=mu, nu=nu)
    return config, state, nb.save_checkpoint(tmp_path, config, state, best_loss=1.5, loader={"row": 3})


def test_what_is_loaded_is_what_was_saved(nb, saved, tmp_path):
    """Every bit, dtype and shape; and the rest as JSON. Free fields may have changed: the schedule comes from the
    Config."""
    config, state, path = saved
    assert path == tmp_path / "checkpoints" / "step_00000007"
    assert sorted(file.name for file in path.iterdir()) == ["meta.json", "state.safetensors"]
    loaded, meta = nb.load_checkpoint(path, config)
    assert bits(loaded) == bits(state)
    assert not any(x.weak_type for x in jax.tree.leaves(loaded))
    assert (meta["step"], meta["best_loss"], meta["loader"]) == (7, 1.5, {"row": 3})
    assert nb.Config(**meta["config"]) == config and meta["config"]["seed"] == config.seed
    loaded, _ = nb.load_checkpoint(path, config.replace(learning_rate=0.5))
    assert float(loaded.hyper["learning_rate"]) == 0.5
    assert bits(loaded._replace(hyper={})) == bits(state._replace(hyper={}))


# What cannot be loaded


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"vocab_size": 400}, ["vocab_size 300 → 400"]),
     ({"n_kv_head": 1, "aspect_ratio": 16}, ["n_kv_head 2 → 1", "aspect_ratio 64 → 16"])],
)  # fmt: skip
def test_another_model_is_refused_by_the_fields_that_differ(nb, saved, changes, named):
    """And by no others: where the run's folder or its logging differ is not the reason."""
    config, _, path = saved
    with pytest.raises(nb.InputError, match="of another Config") as error:
        nb.load_checkpoint(path, config.replace(run_dir="elsewhere", log_interval=1, **changes))
    assert str(path) in str(error.value)
    assert re.findall(r"\w+ \S+ → [^,]+", str(error.value)) == named


def flipped(content, bit):
    content = bytearray(content)
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


# name: (file, what becomes of its content; None deletes it)
DAMAGE = {
    "no meta": ("meta.json", lambda content: None),
    "no state": ("state.safetensors", lambda content: None),
    "empty meta": ("meta.json", lambda content: b""),
    "half of the meta": ("meta.json", lambda content: content[: len(content) // 2]),
    "a meta file of something else": ("meta.json", lambda content: b"[]"),
    "not UTF-8": ("meta.json", lambda content: b"\xff\xfe"),
    "truncated": ("state.safetensors", lambda content: content[:-3]),
    "no header": ("state.safetensors", lambda content: content[:7]),
    "a bit of the size of the header": ("state.safetensors", lambda content: flipped(content, 5)),
    "a bit of the header": ("state.safetensors", lambda content: flipped(content, 8 * 200 + 1)),
    "the last bit": ("state.safetensors", lambda content: flipped(content, 8 * len(content) - 1)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_its_name(nb, saved, damage):
    config, _, path = saved
    name, change = DAMAGE[damage]
    content = (path / name).read_bytes()
    (path / name).unlink()
    if (changed := change(content)) is not None:
        (path / name).write_bytes(changed)
    with pytest.raises(nb.InputError, match=r"step_00000007"):
        nb.load_checkpoint(path, config)
    (path / name).write_bytes(content)
    nb.load_checkpoint(path, config)


# What cannot be saved


@pytest.mark.parametrize("fault", ["fsync", "rename", "a full disk"])
def test_nothing_is_left_of_a_checkpoint_that_could_not_be_written(nb, saved, monkeypatch, fault):
    """Whichever call fails: an error with the reason, no partial folder, hidden or not, and the old one as it was. The
    full disk is not simulated: the system refuses to let the file of arrays grow."""
    config, state, path = saved
    before = contents(path.parents[1])
    words = "cannot write .*step_00000008.*No space left on device"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fault == "a full disk":
        words = "cannot write .*step_00000008.*File too large"
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    else:
        monkeypatch.setattr(os, fault, fail)
    try:
        with pytest.raises(nb.InputError, match=words):
            nb.save_checkpoint(path.parents[1], config, at(state, 8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert contents(path.parents[1]) == before


def test_what_a_killed_process_left_is_no_checkpoint(nb, saved):
    """Its folder has another name until it is whole. It is not listed, not in the way of the next attempt, and gone
    after it: a backup has no other start to clean it up."""
    config, state, path = saved
    partial, older = (path.with_name(f".step_0000000{step}.tmp") for step in (8, 6))
    for folder in (partial, older):
        (folder / "more").mkdir(parents=True)
        (folder / "state.safetensors").write_bytes(b"half")
    assert nb.list_checkpoints(path.parents[1]) == [path]
    new = nb.save_checkpoint(path.parents[1], config, at(state, 8))
    assert nb.list_checkpoints(path.parents[1]) == [path, new] == sorted(path.parent.iterdir())
    assert bits(nb.load_checkpoint(new, config)[0].params) == bits(state.params)


def test_the_newest_and_the_best_are_kept(nb, tmp_path):
    """In the order of their steps, not of the digits' first letters; the same step again replaces itself. The one with
    the lowest validation loss stays, however old."""
    config = small_config(nb, aspect_ratio=64)
    state = nb.init_train_state(config)

    def save(step, keep=2, **meta):
        nb.save_checkpoint(tmp_path, config.replace(keep_checkpoints=keep), at(state, step), **meta)
        assert len(list((tmp_path / "checkpoints").iterdir())) == len(nb.list_checkpoints(tmp_path))
        return [int(path.name.removeprefix("step_")) for path in nb.list_checkpoints(tmp_path)]

    assert [save(step) for step in (2, 9, 10, 10, 100)] == [[2], [2, 9], [9, 10], [9, 10], [10, 100]]
    assert [save(step, keep=3) for step in (200, 1000)] == [[10, 100, 200], [100, 200, 1000]]
    assert save(1001, val_loss=2.0) == [1000, 1001] and save(1002, val_loss=3.0) == [1001, 1002]
    assert save(1003) == [1001, 1002, 1003] and save(1004) == [1001, 1003, 1004]
    assert save(1005, val_loss=1.5) == [1004, 1005] and save(1006, keep=1) == [1005, 1006]


def test_a_save_does_not_wait_for_the_disk(nb, tmp_path, monkeypatch):
    """save() comes back while the files are being written, from a copy: the state may be donated at once, and the
    metrics go on. Both end up whole."""
    config, gate = small_config(nb), threading.Event()
    write = nb.write_checkpoint
    monkeypatch.setattr(nb, "write_checkpoint", lambda *args: gate.wait(120) and write(*args))
    state = nb.init_train_state(config)
    before = np.array(state.params["embed"])
    saver = nb.Checkpointer(config, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("of step 0")
    saver.save(state, loader={})
    (tmp_path / "metrics.jsonl").write_text("of step 1")
    state, _ = nb.train_step(config, state, *batch(config))
    jax.block_until_ready(state)
    assert not nb.list_checkpoints(tmp_path)
    gate.set()
    saver.writing.result()
    saver.save(state, loader={})
    saver.close()
    assert saved_steps(tmp_path) == [0, 1]
    loaded, _ = nb.load_checkpoint(tmp_path / "checkpoints" / "step_00000000", config)
    np.testing.assert_array_equal(loaded.params["embed"], before)
    logs = [path.read_text() for path in sorted(tmp_path.glob("checkpoints/*/metrics.jsonl"))]
    assert logs == ["of step 0", "of step 1"]


def test_no_file_of_ours_pickles(root):
    """Unpickling runs what a file says. No import of a module that can, and no option that allows it, in any .py."""
    modules = "pickle|cPickle|_pickle|cloudpickle|dill|joblib|shelve|marshal|torch"
    forbidden = re.compile(rf"^\s*(import|from)\s+({modules})\b|\ballow_pickle\s*=|\.({modules})\.", re.M)
    places = ("*.py", "tools/*.py", "tests/**/*.py", "benchmarks/*.py", "data/*/*.py")
    files = [path for place in places for path in root.glob(place)]
    assert {"02_train.py", "notebooks.py", "test_checkpoints.py"} <= {path.name for path in files}
    assert forbidden.search("    import pickle\n") and forbidden.search("np.load(path, allow_pickle=True)")
    found = {path.name for path in files if forbidden.search(path.read_text(encoding="utf-8"))}
    assert found <= {Path(__file__).name, "torch_step.py"}  # the second computes with torch
    assert not re.search(r"torch\.(load|save)", (root / "benchmarks" / "torch_step.py").read_text(encoding="utf-8"))
