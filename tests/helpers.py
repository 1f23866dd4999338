"""Small models and batches, a tiny run and what it leaves, notebooks as scripts, and code in a process of its own."""

import functools
import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax.experimental.pallas import tpu as pltpu

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "data" / "embedded"
SECONDS = 120  # a hang is a failure

# ---- models

SMALL = dict(n_head=4, n_kv_head=2, head_dim=16, aspect_ratio=21, vocab_size=300, seq_len=32, window_pattern="SL")
ALIGNED = dict(n_head=2, n_kv_head=1, n_embd=256, n_layer=2, mlp_dim=256, vocab_size=512, seq_len=256)


def small_config(nb, **changes):
    """Three layers with D = 64 and the windows T/2, T, T; K = 2 of N = 4 heads. Of 04: two 256-aligned layers."""
    config = dict(ALIGNED if nb.__name__ == "nb_04_maxtext" else SMALL)
    config |= dict(compute_dtype="float32", attn_impl="einsum", device_batch_size=2, num_iterations=20)
    config |= dict(total_batch_size=-1)  # 06 has another default
    return nb.Config(**config | dict(learning_rate=0.01, warmup_ratio=0.2) | changes)


def shaken(nb, config, seed=0, head=0.1):
    """Parameters in which no weight is zero or one, so that every part of the model has a say in the logits."""
    rng, params = np.random.default_rng(seed), nb.init_params(config, jax.random.key(seed))
    noise = {"o": 0.1, "down": 0.05, "resid_scale": 0.3, "x0_scale": 0.3, "lm_head": head}
    noise |= {"value_gate": 0.3, "smear_gate": 0.3, "smear_scale": 1.0}  # of 06

    def shake(path, x):
        return x + noise.get(path[-1].key, 0) * jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(shake, params)


def shaken_state(nb, config):
    """A state before step 0 in which every weight has a gradient."""
    return nb.init_train_state(config)._replace(params=shaken(nb, config))


def sequences(config, seed=0):
    """(tokens, targets) of a step as sequences [rows, T]; the targets are the next tokens, as in a text."""
    shape = (config.tokens_per_step // config.seq_len, config.seq_len + 1)
    stream = jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)
    return stream[:, :-1], stream[:, 1:]


def batch(config, seed=0):
    """(tokens, targets) as train_step takes them: [A, B, T]."""
    return tuple(x.reshape(config.batch_shape) for x in sequences(config, seed))


def take_steps(nb, config, steps, state=None, **fixed):
    """(state, losses) after some steps, each on a batch of its own; with `seed`, on the same one."""
    state, losses = state or nb.init_train_state(config), []
    for step in range(steps):
        state, metrics = nb.train_step(config, state, *batch(config, fixed.get("seed", step)))
        losses.append(float(metrics["loss"]))
    return state, losses


def leaves(tree):
    """{path: leaf}."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def bits(tree):
    """{path: (dtype, shape, bytes)}: equal where every bit is."""
    return {name: (x.dtype.name, x.shape, np.asarray(x).tobytes()) for name, x in leaves(tree).items()}


def differ(a, b):
    """The largest difference, over the largest value of b."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


def interpreted():
    """Where Pallas kernels are interpreted; wraps the whole computation, the backward pass too.

    True is the plain interpreter: that of TPUs, the default, cannot take a kernel under vmap, as splash is.
    """
    return pltpu.force_tpu_interpret_mode(True)


# ---- text


def documents(seed, count, low=1, high=60):
    """`count` seeded documents of a few words, with what is hard about text in some of them."""
    rng = random.Random(seed)
    words = ["the", "President", " of", "1862", "\n\n", "naïve", "日本語", "🙂", "<|bos|>", "<|output_end|>", "  ", "x"]
    return [" ".join(rng.choices(words, k=rng.randint(low, high))) for _ in range(count)]


def write_shard(path, texts, **options):
    """The path of a shard of texts; row groups of 5 rows, unless `options` say otherwise."""
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, **({"row_group_size": 5} | options))
    return path


def shard(nb, path, **how):
    """A Shard of one file, of any format that 08_data reads."""
    if not hasattr(nb, "READERS"):
        nb.execute_part_one("08_data.py")
    return nb.Shard(str(path), (Path(path),), **how | {"reader": nb.READERS[nb.kind_of(path)]})


def fetcher(nb, path, **how):
    """What list_shards returns for one file."""
    found = shard(nb, path, **how)
    return functools.partial(nb.open_own_shard, found)


# ---- runs

TINY = dict(
    n_head=2, head_dim=32, aspect_ratio=32, seq_len=64, device_batch_size=4, num_iterations=12, log_interval=2,
    eval_interval=4, save_interval=3, sample_interval=6, eval_tokens=2048, final_eval_tokens=4096, profile_start=4,
    profile_steps=0, compute_dtype="float32",
)  # fmt: skip
QUIET = dict(eval_interval=0, save_interval=0, sample_interval=0)  # nothing but steps, and what comes at the end
RATES = {"tokens_per_second", "mfu", "data_wait_seconds"}


def tiny(nb, folder, **changes):
    """The demo, so small that a step takes milliseconds."""
    return nb.Config.demo().replace(run_dir=str(folder), **TINY | changes)


def metrics(run):
    """The lines of a run's metrics, without what is measured in seconds."""
    lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in RATES} for line in lines]


def contents(folder):
    """{relative path: bytes} of all files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def saved_steps(run):
    return [int(path.name[5:]) for path in sorted((Path(run) / "checkpoints").glob("step_*"))]


def state_file(run, step=12):
    """The bytes of a checkpoint's weights and moments."""
    return (Path(run) / "checkpoints" / f"step_{step:08d}" / "state.safetensors").read_bytes()


def same_end(run, whole, step=12):
    """Whether two runs have come to the same end, to the bit, by the same way."""
    assert state_file(run, step) == state_file(whole, step)
    assert metrics(run) == metrics(whole)
    return True


# ---- processes


def started(notebook, *words, cwd, env=None, **settings):
    """A notebook that runs as a script; `settings` are its options. All that it prints is in stdout."""
    command = [sys.executable, str(ROOT / notebook), *(f"--{name}={value}" for name, value in settings.items()), *words]
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def script(notebook, *words, cwd, env=None, **settings):
    """A notebook that has run as a script: returncode, stdout, stderr."""
    command = [sys.executable, str(ROOT / notebook), *(f"--{name}={value}" for name, value in settings.items()), *words]
    return subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=300)


def read_until(process, start):
    """Reads what a process prints until a line begins so."""
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith(start):
            return
    pytest.fail("".join(printed))


def output_of(process, seconds=SECONDS):
    """What is left of what a process prints; it is killed if it does not end."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()


PROLOGUE = """
import hashlib, json, os, sys, threading, time
from pathlib import Path
from tools.notebooks import load

nb, answers = load("02_train.py"), {}

def message(call):
    "What an InputError says; other errors and values are told apart from it."
    try:
        return f"no error, but {call()}"
    except nb.InputError as error:
        return str(error)
    except BaseException as error:
        return f"not an InputError, but {error!r}"

def sha(path):
    "Of a file, or of that of a Shard."
    return hashlib.sha256(Path(getattr(path, "files", [path])[0]).read_bytes()).hexdigest()

def hub_shard(repo, name):
    return nb.open_shard(nb.Shard(name, (nb.HubFile(repo, name),)))
"""


def started_code(code, env=None):
    """A process of its own that runs `code` with 02_train as `nb`, and tells what it puts into `answers`."""
    command = [sys.executable, "-c", f"{PROLOGUE}\n{code}\nprint(json.dumps(answers))"]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answers_of(process):
    """(what `code` has put into `answers`, the lines that it printed before)."""
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    *printed, answers = output.splitlines()
    return json.loads(answers), printed


def run_code(code, env=None):
    return answers_of(started_code(code, env))


# ---- waiting


def run_notebook(name, folder, **settings):
    """(text, outputs) of an .ipynb in a real kernel; `settings` are of its Config, or of its forms."""
    import nbclient
    import nbformat

    from tools import colab

    notebook = nbformat.read(ROOT / name, 4)
    colab.change(notebook, name, [f"{field}={value}" for field, value in settings.items()])
    notebook = nbformat.from_dict(notebook)
    (folder / name).write_text(nbformat.writes(notebook))
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs), outputs


# ---- waiting


def within(call, seconds=20):
    """call() or the exception that it raises; a failure if it takes longer."""
    box = queue.Queue()

    def target():
        try:
            box.put((call(), None))
        except BaseException as error:
            box.put((None, error))

    threading.Thread(target=target, daemon=True).start()
    try:
        value, error = box.get(timeout=seconds)
    except queue.Empty:
        pytest.fail(f"hangs: no answer within {seconds} s")
    if error is not None:
        raise error
    return value


def until(happened, *processes):
    """Waits for happened(), and not for ever; nor for processes that have ended."""
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)


def one_line(message, *words):
    """Whether a message is one line with these words."""
    assert "\n" not in message and all(word in message for word in words), message
    return True


def without_hub(home):
    """An environment in which nobody answers: neither the Hub nor anything else beyond this machine."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    nowhere = "http://127.0.0.1:9"  # the discard port: refused at once
    return mine | {"HOME": str(home), "HF_ENDPOINT": nowhere, "https_proxy": nowhere, "http_proxy": nowhere}
