"""More than one device, eight of a CPU: the same numbers as on one, whatever is split, and one device pays nothing."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import QUIET, ROOT, TINY, script
from tools.notebooks import load


@functools.cache
def eight_devices(*command):
    """What several_devices.py finds."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.slow.several_devices", *command],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


PARITY = {
    "einsum": ("02_train.py", {}),
    "splash": ("02_train.py", {"attn_impl": "splash"}, "(2, 4)"),
    "fused": ("02_train.py", {"attn_impl": "fused", "head_dim": 128, "aspect_ratio": 128, "n_kv_head": 2}, "(2, 4)"),
    "accumulated": ("02_train.py", {"passes": 2, "grad_clip": 0.5, "nonfinite": "skip"}, "(2, 4)"),
    "04, chunked": ("04_maxtext.py", {"loss_chunks": 2, "remat": "minimal", "n_layer": 1}, "(2, 4)"),
    "06": ("06_recipe.py", {"total_batch_size": -1}, "(8, 1)", "(2, 4)"),
    "04, scanned": ("04_maxtext.py", {"layers": "scanned", "remat": "full"}, "(1, 8)"),
}


@pytest.mark.parametrize("name", PARITY)
def test_five_steps_equal_those_of_one_device(name):
    """Losses and parameters, with data parallel, fsdp and both. What differs is the order of float32 sums over tokens,
    6e-8 an operation; measured 8e-8 of the loss and 4e-8 of a parameter, which moves by up to 0.05. Muon's iterates are
    bfloat16, in which the last bit of the gradients can show: 6e-7 and 8e-4 there. One program."""
    notebook, changes, *meshes = PARITY[name]
    found = eight_devices("parity", notebook, json.dumps(changes), *meshes)
    assert set(found) == {"(1, 1)", *(meshes or ("(8, 1)", "(1, 8)", "(2, 4)"))}
    for mesh, result in found.items():
        assert result["loss"] < 1e-6 and result["params"] < (2e-3 if name == "06" else 1e-6), (mesh, result)
        assert result["moved"] > 0.02 and result["programs"] == 1, (mesh, result)
        data, fsdp = eval(mesh)
        assert result["devices"] == [data * fsdp]
        assert result["whole"] / fsdp <= result["held"] < 1.01 * result["whole"] / fsdp, mesh


def test_a_checkpoint_loads_on_any_mesh():
    """Saved on 2 × 4 devices; on 1, 4 and 8 devices every bit is the same, and so is the next loss."""
    found = eight_devices("checkpoints")
    whole = found["(1, 1)"]["held"]
    for mesh, result in found.items():
        assert result["equal"], mesh
        assert result["loss"] == pytest.approx(found["(1, 1)"]["loss"], rel=1e-6), mesh
        assert result["held"] < 1.01 * whole / eval(mesh)[1], mesh


def test_evaluation_generation_and_norms():
    found = eight_devices("whatever_uses_a_model")
    alone = found["(1, 1)"]
    text = alone["text"]
    assert len(text) > len("She said") and alone["bits"] > 50
    for mesh, result in found.items():
        assert result.pop("text") == text, mesh
        assert result == pytest.approx(alone, rel=2e-6), mesh


# ---- programs


def lowered(nb, config, platform="cpu"):
    def placed(x, *spec):
        place = nb.sharding(config, *spec) if config.devices > 1 else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    state = jax.tree.map(lambda x: placed(x, *nb.weight_spec(config, x.shape)), nb.state_shapes(config))
    tokens = placed(jax.ShapeDtypeStruct(config.batch_shape, jnp.int32), None, nb.ROWS)
    return nb.train_step.trace(config, state, tokens, tokens).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("impl", ["splash", "pallas", "fused"])
def test_the_kernels_stay_kernels(nb, impl):
    """Under shard_map, with no einsum in their place: a program for eight TPUs has the Pallas calls of one for one."""
    config = nb.Config(
        n_head=2, head_dim=128, aspect_ratio=128, vocab_size=512, seq_len=256, splash_block_size=128,
        window_pattern="L" if impl == "pallas" else "SL", attn_impl=impl, device_batch_size=1,
    )  # fmt: skip
    one, eight = (lowered(nb, config.replace(mesh=mesh), "tpu") for mesh in ((1, 1), (2, 4)))
    assert one.count("@tpu_custom_call") == eight.count("@tpu_custom_call") >= 3
    assert one.count("sdy.manual_computation") == 0 < eight.count("sdy.manual_computation")


@pytest.mark.parametrize("notebook", ["02_train.py", "04_maxtext.py"])
def test_one_device_costs_nothing(notebook):
    """Its program names no sharding, whether or not passes are accumulated; that for eight does."""
    nb = load(ROOT / notebook)
    config = nb.Config.demo().replace(total_batch_size=2 * nb.Config.demo().tokens_per_step, attn_impl="einsum")
    for changes in ({}, {"total_batch_size": -1}):
        text = lowered(nb, config.replace(**changes))
        assert not re.search(r"shard|sdy\.|mesh|num_partitions = [^1]", text, re.I)
        assert lowered(nb, config.replace(mesh=(1, 1), **changes)) == text
    text = lowered(nb, config.replace(mesh=(2, 4), total_batch_size=-1), "tpu")
    assert re.search(r"sdy\.sharding_constraint", text) and "num_partitions = 8" in text


# ---- a whole run


def test_the_whole_script_on_four_devices(tmp_path):
    """Every cell, with the samples and pictures after the training. Who goes on with another number of tokens a step is
    refused."""
    settings = TINY | QUIET | dict(n_head=1, head_dim=64, aspect_ratio=64, device_batch_size=2, profile_steps=2,
                                   profile_start=2, num_iterations=6, run_dir="run", mesh="2,2")  # fmt: skip
    env = os.environ | {"NPROC": "64", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = script("02_train.py", cwd=tmp_path, env=env, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    device = r"device  cpu \(.*, \d+ cores\), \w+, peak n/a; 4 of them: data 2, fsdp 2"
    assert re.search(device, done.stdout), done.stdout
    assert "work    6 steps × 512 tokens" in done.stdout
    assert "least surprising" in done.stdout and "tok/s; the first call compiles" in done.stdout

    meta = tmp_path / "run/checkpoints/step_00000006/meta.json"
    meta.write_text(meta.read_text().replace('"finished": true', '"finished": false'))
    wrong = script("02_train.py", cwd=tmp_path, env=env, total_batch_size=256, **settings | {"mesh": "1,1"})
    assert wrong.returncode == 2 and "total_batch_size=256: the run to go on with has steps of 512" in wrong.stderr
