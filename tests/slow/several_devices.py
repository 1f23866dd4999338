"""What test_mesh.py wants to know of eight devices: run in a process of its own, since jax counts its devices once.

python -m tests.slow.several_devices NAME ARGUMENT…      prints a JSON object
"""

import json
import os
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["NPROC"] = "64"  # XLA's threads: with as many as cores, devices that wait for each other's sums may take all

import jax  # noqa: E402
import numpy as np  # noqa: E402

from tests.helpers import ROOT, batch, interpreted, leaves, small_config  # noqa: E402
from tools.notebooks import load  # noqa: E402

MESHES = (1, 1), (8, 1), (1, 8), (2, 4)
STEPS = 5


def config_of(nb, mesh, passes=1, **changes):
    """16 sequences a step, on one device or on eight, in one pass or several. eps is large beside the rounding of
    gradients, which Adam would otherwise blow up to a full update where the gradient itself is nearly zero."""
    sizes = dict(num_iterations=STEPS, eps=1e-3, learning_rate=0.02, warmup_ratio=0.0, splash_block_size=128, mesh=mesh)
    sizes |= dict(device_batch_size=16 // (mesh[0] * mesh[1] * passes))
    if nb.__name__ == "nb_02_train":
        sizes |= dict(n_head=2, n_kv_head=1, head_dim=64, aspect_ratio=64, vocab_size=512, seq_len=128)  # two layers
    sizes |= changes
    config = small_config(nb, **sizes)
    return config.replace(total_batch_size=16 * config.seq_len)


def put_batch(nb, config, seed):
    """A step's batch on the devices of the mesh."""
    return nb.put(config, jax.device_get(batch(config, seed)), None, nb.ROWS)


def run(nb, config, steps=STEPS):
    """(state, losses, programs) of some steps."""
    before, state, losses = nb.train_step._cache_size(), nb.init_train_state(config), []
    for step in range(steps):
        with interpreted():
            state, metrics = nb.train_step(config, state, *put_batch(nb, config, step))
        losses.append(float(metrics["loss"]))
    return state, losses, nb.train_step._cache_size() - before


def largest_difference(one, other):
    one, other = (jax.tree.leaves(jax.device_get(tree)) for tree in (one, other))
    return max(float(np.abs(x - y).max()) for x, y in zip(one, other, strict=True))


def parity(notebook, changes, *meshes):
    """How far each mesh is from one device, after five steps."""
    nb, found, alone = load(ROOT / notebook), {}, None
    for mesh in MESHES:
        if meshes and str(mesh) not in meshes and mesh != (1, 1):
            continue
        config = config_of(nb, mesh, **json.loads(changes))
        if mesh == (1, 1):
            start = jax.device_get(nb.init_train_state(config).params)
        state, losses, programs = run(nb, config)
        alone = alone or (state, losses)
        found[str(mesh)] = {
            "loss": max(abs(x / y - 1) for x, y in zip(losses, alone[1], strict=True)), "programs": programs,
            "params": largest_difference(state.params, alone[0].params), "last": losses[-1],
            "moved": largest_difference(state.params, start),
            "devices": sorted({len(x.sharding.device_set) for x in jax.tree.leaves(state)}),
            "held": sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(state.mu)),
            "whole": sum(x.size for x in jax.tree.leaves(state.mu)),
        }  # fmt: skip
    return found


def checkpoints():
    """A state saved on 8 devices, loaded on meshes of 1, 4 and 8: equal to the bit, and it can be trained on."""
    nb, found = load(ROOT / "02_train.py"), {}
    state, _, _ = run(nb, config_of(nb, (2, 4)), steps=3)
    whole = leaves(jax.device_get((state.params, state.mu, state.nu)))
    with tempfile.TemporaryDirectory() as folder:
        path = nb.save_checkpoint(folder, config_of(nb, (2, 4)), state)
        for mesh in ((1, 1), (4, 1), (1, 4), (2, 2), (2, 4)):
            config = config_of(nb, mesh)
            again, _ = nb.load_checkpoint(path, config)
            arrays = leaves((again.params, again.mu, again.nu))
            equal = all(np.array_equal(whole[name], x) for name, x in arrays.items()) and int(again.step) == 3
            held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(again.params))
            again, metrics = nb.train_step(config, again, *put_batch(nb, config, 3))
            found[str(mesh)] = {"equal": equal, "loss": float(metrics["loss"]), "held": held}
    return found


def whatever_uses_a_model():
    """Evaluation, surprise and generation on eight devices and on one, with the embedded corpus."""
    nb, found = load(ROOT / "02_train.py"), {}
    for mesh in MESHES:
        config = config_of(nb, mesh, vocab_size=4096, dataset="embedded", num_shards=-1)
        shards, validation = nb.list_shards(config)
        tokenizer = nb.find_tokenizer(config, shards[0]())
        with nb.PrefetchDataLoader(config, tokenizer, shards) as loader:
            state = nb.init_train_state(config)
            for _ in range(3):
                state, _ = nb.train_step(config, state, *next(loader))
        result = nb.evaluate(config, state.params, nb.validation_batches(config, tokenizer, validation(), 20_000))
        text = nb.generate(config, state.params, tokenizer, "She said", max_new_tokens=20, temperature=0.0)
        bits = sum(cost for _, cost in nb.surprise(config, state.params, tokenizer, "It is a truth universally."))
        norms = {name: float(x) for name, x in nb.state_norms(state).items()}
        found[str(mesh)] = {"loss": result["loss"], "bpb": result["bpb"], "text": text, "bits": bits, **norms}
    return found


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
