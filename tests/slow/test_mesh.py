"""More than one device, eight of a CPU: the same numbers as on one, whatever is split, and one device pays nothing."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import ROOT
from tools.notebooks import load


@functools.cache
def eight_devices(*command):
    """What tests/several_devices.py finds."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.several_devices", *command], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- ten steps


PARITY = {
    "einsum": ("02_train.py", {}),
    "jax": ("02_train.py", {"attn_impl": "jax"}),
    "splash": ("02_train.py", {"attn_impl": "splash"}),
    "pallas": ("02_train.py", {"attn_impl": "pallas", "window_pattern": "L"}),
    "fused": ("02_train.py", {"attn_impl": "fused", "head_dim": 128, "aspect_ratio": 128, "n_kv_head": 2}),
    "accumulated": ("02_train.py", {"passes": 2, "grad_clip": 0.5, "nonfinite": "skip"}, "(2, 4)"),
    "04, chunked": ("04_maxtext.py", {"loss_chunks": 2, "remat": "minimal", "window_pattern": "L"}, "(2, 4)"),
    "04, scanned": ("04_maxtext.py", {"layers": "scanned", "remat": "full", "window_pattern": "L"}, "(1, 8)"),
}


@pytest.mark.parametrize("name", PARITY)
def test_ten_steps_equal_those_of_one_device(name):
    """Losses and parameters, with data parallel, fsdp and both. What differs is the order of float32 sums over tokens,
    6e-8 an operation; measured 8e-8 of the loss and 4e-8 of a parameter, which moves by up to 0.05. One program."""
    notebook, changes, *meshes = PARITY[name]
    found = eight_devices("parity", notebook, json.dumps(changes), *meshes)
    assert set(found) == {"(1, 1)", *(meshes or ("(8, 1)", "(1, 8)", "(2, 4)"))}
    for mesh, result in found.items():
        assert result["loss"] < 1e-6 and result["params"] < 1e-6, (mesh, result)
        assert result["moved"] > 0.02 and result["programs"] == 1, (mesh, result)
        data, fsdp = eval(mesh)
        assert result["devices"] == [data * fsdp]
        assert result["whole"] / fsdp <= result["held"] < 1.01 * result["whole"] / fsdp, mesh


def test_the_kernels_stay_kernels(nb):
    """Under shard_map, with no einsum in their place: a program for eight TPUs has the Pallas calls of one for one."""
    calls = {}
    for impl in ("splash", "pallas", "fused"):
        for mesh in ((1, 1), (2, 4)):
            config = nb.Config(
                n_head=2, head_dim=128, aspect_ratio=128, vocab_size=512, seq_len=256, splash_block_size=128,
                window_pattern="L" if impl == "pallas" else "SL", attn_impl=impl, device_batch_size=1, mesh=mesh,
            )  # fmt: skip
            state, tokens = nb.abstract_step(config, None)
            text = nb.train_step.trace(config, state, tokens, tokens).lower(lowering_platforms=("tpu",)).as_text()
            calls[mesh] = text.count("@tpu_custom_call"), len(re.findall(r"sdy.manual_computation", text))
        assert calls[1, 1][0] == calls[2, 4][0] >= 3 and calls[1, 1][1] == 0 < calls[2, 4][1], (impl, calls)


# ---- one device


def lowered(nb, config):
    state, tokens = nb.abstract_step(config, None)
    return nb.train_step.lower(config, state, tokens, tokens).as_text()


@pytest.mark.parametrize("notebook", ["02_train.py", "04_maxtext.py"])
def test_one_device_costs_nothing(notebook, monkeypatch):
    """The program is what it is without any of the mesh's functions, and names no sharding; that for eight does."""
    nb = load(ROOT / notebook)
    config = nb.Config.demo().replace(total_batch_size=2 * nb.Config.demo().tokens_per_step, attn_impl="einsum")
    for changes in ({}, {"total_batch_size": -1}):
        text = lowered(nb, config.replace(**changes))
        assert not re.search(r"shard|sdy\.|mesh|num_partitions = [^1]", text, re.I)
        assert lowered(nb, config.replace(mesh=(1, 1), **changes)) == text
        jax.clear_caches()
        with monkeypatch.context() as patch:
            for name in ("constrain", "split_weights", "whole_weights"):
                patch.setattr(nb, name, lambda config, tree, *spec: tree)
            patch.setattr(nb, "on_each_device", lambda config, function: function)
            patch.setattr(nb, "in_parts", lambda config, x, n: x.reshape(n, -1, *x.shape[1:]))
            assert lowered(nb, config.replace(**changes)) == text
        jax.clear_caches()
    eight = config.replace(mesh=(2, 4), total_batch_size=-1)
    state, tokens = nb.abstract_step(eight, None)
    text = nb.train_step.trace(eight, state, tokens, tokens).lower(lowering_platforms=("tpu",)).as_text()
    assert re.search(r"sdy\.sharding_constraint", text) and "num_partitions = 8" in text


# ---- Config


def test_mesh_as_it_may_be_written(nb):
    for written in ((2, 4), [2, 4], "2x4", "2,4", "(2, 4)"):
        config = nb.Config(mesh=written)
        assert config.mesh == config.mesh_shape == (2, 4) and config.devices == 8
        assert config == nb.Config(mesh=(2, 4)) and hash(config) == hash(nb.Config(mesh=(2, 4)))
    assert nb.parse_args(["--mesh", "1,8"], nb.Config.demo()).mesh == (1, 8)
    assert nb.Config().mesh_shape == (jax.device_count(), 1)


def test_tokens_of_a_step(nb):
    """device_batch_size is a device's: a mesh multiplies it, unless total_batch_size holds the step to what it was."""
    config = nb.Config(mesh=(2, 4))
    assert config.tokens_per_step == 8 * nb.Config().tokens_per_step and config.grad_accum_steps == 1
    assert config.replace(total_batch_size=2**17).grad_accum_steps == 2
    with pytest.raises(nb.InputError, match="total_batch_size=8192: must be a multiple of .*devices = 65536"):
        config.replace(total_batch_size=8192)


def test_more_devices_than_there_are(nb):
    config = nb.Config.demo().replace(mesh=(2, 4))
    with pytest.raises(nb.InputError, match=r"mesh=\(2, 4\): is of 8 devices, and here are 1"):
        nb.train(config)


def test_weight_spec(nb):
    """The longest axis that divides; a small or odd weight stays whole."""
    config = nb.Config(mesh=(1, 8))
    for shape, spec in {
        (1024, 4096): (None, "fsdp"), (4096, 1024): ("fsdp", None), (1024, 8, 128): ("fsdp", None, None),
        (8, 128, 1024): (None, None, "fsdp"), (): (), (3, 5): (None, None), (12, 8): (None, "fsdp"),
    }.items():  # fmt: skip
        assert nb.weight_spec(config, shape) == spec, shape
        assert nb.weight_spec(nb.Config(mesh=(8, 1)), shape) == (None,) * len(shape)


def test_parts_of_every_device(nb):
    """in_parts takes of each device's rows, and from_parts puts them back."""
    for mesh in ((1, 1), (1, 4)):
        config, x = nb.Config(mesh=mesh), jnp.arange(48).reshape(24, 2)
        there = jax.jit(lambda x, config=config: nb.in_parts(config, x, 3))
        again = jax.jit(lambda x, config=config: nb.from_parts(config, nb.in_parts(config, x, 3)))
        text = jax.jit(again).trace(x).lower(lowering_platforms=("cpu",)).as_text()
        assert ("sharding_constraint" in text) == (mesh == (1, 4))
        if mesh == (1, 1):
            np.testing.assert_array_equal(again(x), x)
            assert there(x).shape == (3, 8, 2)


# ---- checkpoints, and what else uses a model


def test_a_checkpoint_loads_on_any_mesh():
    """Saved in four parts on 2 × 4 devices; on 1, 4 and 8 devices every bit is the same, and so is the next loss."""
    found = eight_devices("checkpoints")
    files = found.pop("files")
    assert files == ["meta.json", *(f"state-0000{i}-of-00004.safetensors" for i in range(4))]
    whole = found["(1, 1)"]["held"]
    for mesh, result in found.items():
        assert result["equal"], mesh
        assert result["loss"] == pytest.approx(found["(1, 1)"]["loss"], rel=1e-6), mesh
        assert result["held"] < 1.01 * whole / eval(mesh)[1], mesh


def test_evaluation_generation_and_norms():
    found = eight_devices("whatever_uses_a_model")
    alone = found["(1, 1)"]
    assert len(alone["text"]) > len("She said") and alone["bits"] > 50
    text = alone["text"]
    for mesh, result in found.items():
        assert result.pop("text") == text, mesh
        assert result == pytest.approx(found["(1, 1)"], rel=2e-6), mesh


def test_damaged_parts_are_refused(nb, tmp_path):
    """A part that lacks, doubles or moves what another has is named; nothing is made up."""
    config = nb.Config(n_head=2, head_dim=16, aspect_ratio=32, vocab_size=300, seq_len=32, attn_impl="einsum")
    state = nb.init_train_state(config)
    arrays = {name: np.array(x) for name, x in nb.named_arrays(state).items()}

    def halves(first, second):
        files = {"state-00000-of-00002.safetensors": {}, "state-00001-of-00002.safetensors": {}}
        for name, x in arrays.items():
            if name == "params.embed":
                files["state-00000-of-00002.safetensors"][name] = [first, 0], x[:150]
                files["state-00001-of-00002.safetensors"][name] = [second, 0], x[150:]
            else:
                files["state-00000-of-00002.safetensors"][name] = [0] * x.ndim, x
        return files

    path = nb.write_checkpoint(tmp_path, config, 0, halves(0, 150), {})
    loaded, _ = nb.load_checkpoint(path, config)
    assert np.array_equal(loaded.params["embed"], arrays["params.embed"])
    for first, second in ((0, 0), (0, 151), (-1, 150)):
        path = nb.write_checkpoint(tmp_path, config, 0, halves(first, second), {})
        with pytest.raises(nb.InputError, match="cannot be read"):
            nb.load_checkpoint(path, config)
    files = halves(0, 150)
    del files["state-00001-of-00002.safetensors"]
    with pytest.raises(nb.InputError, match="params.embed is there with 4800 of its 9600 numbers"):
        nb.load_checkpoint(nb.write_checkpoint(tmp_path, config, 0, files, {}), config)


def test_the_whole_script_on_four_devices(tmp_path):
    """Every cell, with the samples and pictures after the training; then it goes on where it was, on two devices."""
    options = (
        "--n_head=1 --head_dim=64 --aspect_ratio=64 --seq_len=64 --device_batch_size=2 --eval_tokens=2000 "
        "--final_eval_tokens=4000 --eval_interval=4 --profile_start=2 --profile_steps=2 --log_interval=2"
    ).split()
    env = {**os.environ, "HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "NPROC": "64"}

    def script(devices, *more):
        done = subprocess.run(
            [sys.executable, ROOT / "02_train.py", "--run_dir=run", *options, *more], cwd=tmp_path, text=True,
            env=env | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    out = script(4, "--mesh=2,2", "--num_iterations=6")
    assert re.search(r"device  4 × cpu \(.*, \d+ cores\), \w+, peak n/a each; mesh: data 2, fsdp 2", out)
    assert "work    6 steps × 512 tokens" in out
    assert "traced steps" in out and "least surprising" in out and "tok/s; the first call compiles" in out
    parts = sorted(path.name for path in (tmp_path / "run/checkpoints/step_00000006").iterdir())
    assert parts == ["meta.json", "metrics.jsonl", *(f"state-0000{i}-of-00002.safetensors" for i in range(2))]

    meta = tmp_path / "run/checkpoints/step_00000006/meta.json"
    meta.write_text(meta.read_text().replace('"finished": true', '"finished": false'))
    wrong = subprocess.run(
        [
            sys.executable,
            ROOT / "02_train.py",
            "--run_dir=run",
            *options,
            "--num_iterations=6",
            "--total_batch_size=256",
        ],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2 and "total_batch_size=256: the run to go on with has steps of 512" in wrong.stderr
