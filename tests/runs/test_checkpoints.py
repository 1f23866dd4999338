"""Checkpoints: bit-exact, resumed as if never stopped, whole or not there, and refused in words that help."""

import ast
import errno
import os
import re
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def small_config(nb, **changes):
    config = nb.Config(
        n_head=2, head_dim=16, aspect_ratio=32, vocab_size=300, seq_len=32, compute_dtype="float32", num_iterations=6,
        device_batch_size=2, attn_impl="einsum",
    )  # fmt: skip
    return config.replace(**changes)


def random_state(nb, config, step, seed=0):
    """Arrays of random bits, NaNs with payloads, infinities and negative zeros among them."""
    rng = np.random.default_rng(seed)

    def random_bits(x):
        return jnp.asarray(rng.integers(0, 2**32, x.shape, np.uint32).view(np.float32))

    state = nb.init_train_state(config)
    params, mu, nu = (jax.tree.map(random_bits, state.params) for _ in range(3))
    return state._replace(step=jnp.int32(step), params=params, mu=mu, nu=nu)


def bits(tree):
    """{path: (dtype, shape, bytes)}: equal where every bit is."""
    return {
        jax.tree_util.keystr(path): (x.dtype.name, x.shape, np.asarray(x).tobytes())
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture
def saved(nb, tmp_path):
    """(config, state, path) of a checkpoint at step 7."""
    config = small_config(nb)
    state = random_state(nb, config, step=7)
    return config, state, nb.save_checkpoint(tmp_path, config, state, best_loss=1.5, loader={"row": 3})


def test_what_is_loaded_is_what_was_saved(nb, saved, tmp_path):
    """Every bit, dtype and shape; and the rest as JSON."""
    config, state, path = saved
    assert path == tmp_path / "checkpoints" / "step_00000007"
    assert sorted(file.name for file in path.iterdir()) == ["meta.json", "state.safetensors"]
    loaded, meta = nb.load_checkpoint(path, config)
    assert bits(loaded) == bits(state)
    assert not any(x.weak_type for x in jax.tree.leaves(loaded))
    assert (meta["step"], meta["best_loss"], meta["loader"]) == (7, 1.5, {"row": 3})
    assert nb.Config(**meta["config"]) == config and meta["config"]["seed"] == config.seed


def test_the_schedule_comes_from_the_config(nb, saved):
    """A free field may be changed between sessions; the arrays do not know."""
    config, state, path = saved
    loaded, _ = nb.load_checkpoint(path, config.replace(learning_rate=0.5))
    assert float(loaded.hyper["learning_rate"]) == 0.5
    assert bits(loaded._replace(hyper={})) == bits(state._replace(hyper={}))


def test_resume_is_bit_exact(nb, tmp_path):
    """Six steps, against three, a checkpoint, and three in what could be another process: a new loader over the real
    embedded corpus, a new state. Batches, losses, parameters and moments are equal to the last bit."""
    config = small_config(nb, vocab_size=4096, dataset="embedded", num_shards=-1, seq_len=64, learning_rate=0.01)
    shards, _ = nb.list_shards(config)
    tokenizer = nb.find_tokenizer(config, shards[0]())

    def steps(state, loader, count):
        seen = []
        for _ in range(count):
            tokens, targets = next(loader)
            state, metrics = nb.train_step(config, state, tokens, targets)
            seen.append((np.asarray(tokens).tobytes(), np.asarray(targets).tobytes(), bits(metrics)))
        return state, seen

    with nb.PrefetchDataLoader(config, tokenizer, shards) as loader:
        state, first = steps(nb.init_train_state(config), loader, 3)
        path = nb.save_checkpoint(tmp_path, config, state, loader=loader.state_dict())
        whole, rest = steps(state, loader, 3)
    resumed, meta = nb.load_checkpoint(path, config)
    with nb.PrefetchDataLoader(config, tokenizer, shards) as loader:
        loader.load_state_dict(meta["loader"])
        resumed, again = steps(resumed, loader, 3)
    assert again == rest
    assert bits(resumed) == bits(whole)
    assert len({tokens for tokens, *_ in first + rest}) == 6  # and not one batch over and over


# What cannot be loaded


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"vocab_size": 400}, ["vocab_size 300 → 400"]), ({"n_head": 4}, ["n_head 2 → 4"]),
     ({"n_kv_head": 1, "aspect_ratio": 16}, ["n_kv_head -1 → 1", "aspect_ratio 32 → 16"])],
)  # fmt: skip
def test_another_model_is_refused_by_the_fields_that_differ(nb, saved, changes, named):
    """And by no others: where the run's folder or its logging differ is not the reason."""
    config, _, path = saved
    with pytest.raises(nb.InputError, match="of another Config") as error:
        nb.load_checkpoint(path, config.replace(run_dir="elsewhere", log_interval=1, **changes))
    assert str(path) in str(error.value)
    assert re.findall(r"\w+ \S+ → [^,]+", str(error.value)) == named


def test_a_missing_checkpoint_or_file(nb, saved):
    config, _, path = saved
    with pytest.raises(nb.InputError, match="step_00000099.* cannot be read: .*No such file"):
        nb.load_checkpoint(path.with_name("step_00000099"), config)
    for name in ("meta.json", "state.safetensors"):
        content = (path / name).read_bytes()
        (path / name).unlink()
        with pytest.raises(nb.InputError, match=rf"cannot be read: .*{name}"):
            nb.load_checkpoint(path, config)
        (path / name).write_bytes(content)
    nb.load_checkpoint(path, config)


@pytest.mark.parametrize("name", ["meta.json", "state.safetensors"])
def test_a_truncated_file(nb, saved, name):
    config, _, path = saved
    content = (path / name).read_bytes()
    for length in (0, 1, 7, 8, 100, len(content) // 2, len(content) - 3):
        (path / name).write_bytes(content[:length])
        with pytest.raises(nb.InputError, match=r"step_00000007.*; delete it"):
            nb.load_checkpoint(path, config)


def test_a_flipped_bit_in_the_header(nb, saved):
    """Sizes, names, shapes, dtypes and offsets of the arrays stand there: whichever bit it is, the file is refused."""
    config, _, path = saved
    file = path / "state.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    assert end < 10_000
    for bit in [0, 5, 15, 40, 63, *np.random.default_rng(0).integers(64, 8 * end, 40).tolist()]:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(nb.InputError, match=r"step_00000007"):
            nb.load_checkpoint(path, config)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b'{"step": 7'])
def test_a_meta_file_of_something_else(nb, saved, content):
    config, _, path = saved
    (path / "meta.json").write_bytes(content)
    with pytest.raises(nb.InputError, match=r"step_00000007.* cannot be read"):
        nb.load_checkpoint(path, config)


# What cannot be saved


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_nothing_is_left_of_a_checkpoint_that_could_not_be_written(nb, saved, monkeypatch, broken):
    """Whichever call fails: an error with the reason, no partial folder, hidden or not, and the old one as it was."""
    config, state, path = saved
    before = contents(path.parents[1])

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(nb.InputError, match="cannot write .*step_00000008.*No space left on device"):
        nb.save_checkpoint(path.parents[1], config, state._replace(step=jnp.int32(8)))
    monkeypatch.undo()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert contents(path.parents[1]) == before


def test_a_full_disk(nb, saved):
    """Not a simulated one: the system refuses to let the file of arrays grow, as it does where space runs out."""
    config, state, path = saved
    before = contents(path.parents[1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(nb.InputError, match="cannot write .*step_00000008.*File too large"):
            nb.save_checkpoint(path.parents[1], config, state._replace(step=jnp.int32(8)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert contents(path.parents[1]) == before


def test_an_interrupt_leaves_nothing_behind(nb, saved, monkeypatch):
    """The stop button, while gigabytes are being written."""
    config, state, path = saved

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        nb.save_checkpoint(path.parents[1], config, state._replace(step=jnp.int32(8)))
    monkeypatch.undo()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_a_killed_process_left_is_no_checkpoint(nb, saved):
    """Its folder has another name until it is whole. It is not listed, and not in the way of the next attempt."""
    config, state, path = saved
    partial = path.with_name(".step_00000008.tmp")
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"half")
    (partial / "more").mkdir()
    assert nb.list_checkpoints(path.parents[1]) == [path]
    new = nb.save_checkpoint(path.parents[1], config, state._replace(step=jnp.int32(8)))
    assert nb.list_checkpoints(path.parents[1]) == [path, new] and not partial.exists()
    assert bits(nb.load_checkpoint(new, config)[0].params) == bits(state.params)


def test_a_run_folder_that_is_a_file(nb, tmp_path):
    config = small_config(nb)
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(nb.InputError, match="cannot write .*run.checkpoints.step_00000000"):
        nb.save_checkpoint(tmp_path / "run", config, nb.init_train_state(config))


def test_the_newest_and_the_best_are_kept(nb, tmp_path):
    """In the order of their steps, not of the digits' first letters; the same step again replaces itself. The one with
    the lowest validation loss stays, however old."""
    config = small_config(nb)
    state = random_state(nb, config, step=0)

    def save(step, keep=2, **meta):
        nb.save_checkpoint(
            tmp_path, config.replace(keep_checkpoints=keep), state._replace(step=jnp.int32(step)), **meta
        )
        assert len(list((tmp_path / "checkpoints").iterdir())) == len(nb.list_checkpoints(tmp_path))
        return [int(path.name.removeprefix("step_")) for path in nb.list_checkpoints(tmp_path)]

    assert [save(step) for step in (2, 9, 10, 10, 100)] == [[2], [2, 9], [9, 10], [9, 10], [10, 100]]
    assert [save(step, keep=3) for step in (200, 1000)] == [[10, 100, 200], [100, 200, 1000]]
    assert save(1001, val_loss=2.0) == [1000, 1001] and save(1002, val_loss=3.0) == [1001, 1002]
    assert save(1003) == [1001, 1002, 1003] and save(1004) == [1001, 1003, 1004]
    assert save(1005, val_loss=1.5) == [1004, 1005] and save(1006, keep=1) == [1005, 1006]


def test_no_file_of_ours_pickles(root):
    """Unpickling runs what a file says. No module that can, and no option that allows it, in any .py."""
    modules = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch"}
    places = ("*.py", "tools/*.py", "tests/*.py", "benchmarks/*.py", "data/*/*.py")
    files = [path for place in places for path in root.glob(place)]
    assert {"02_train.py", "notebooks.py", "test_checkpoint.py"} <= {path.name for path in files}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            assert not modules & set(names), f"{path}:{node.lineno}"
            used = [getattr(node, "attr", None), getattr(node, "arg", None), getattr(node, "id", None)]
            assert not {"allow_pickle", *modules} & set(used), f"{path}:{node.lineno}"
