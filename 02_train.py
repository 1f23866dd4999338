# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V6E1
#     machine_shape: hm
#     provenance: []
#     toc_visible: true
#   jupytext:
#     cell_metadata_filter: title,tags,cellView,-all
#     comment_magics: false
#     notebook_metadata_filter: accelerator,colab,kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Pretrain a GPT on one chip
#
# This notebook trains a small language model from scratch, in raw JAX. Press *Run all*: you get a loss curve, samples,
# a checkpoint, and a profile that TensorBoard can open. On a Colab TPU v6e it trains the reference model, 268M
# parameters, on 2.7B tokens of FineWeb-Edu: 3.3 hours at the compiler's estimate of 35.7 ms a step. On a free CPU
# runtime it trains a demo of 3.7M parameters in a few minutes.
#
# - **Part I, the model and its training**: config → model → attention → loss → optimizer → train step → data →
#   evaluation → sampling → the loop. Most sections end with a cell that tries what they defined. Part I has 1,550 words
#   of text, and 840 lines of code that are shown.
# - **Part II, infrastructure**: the fused attention kernel, files, the Hub, checkpoints, logs, hosts. Its cells are
#   collapsed; open the one that you need.
# - **Part III, run**: configure, check the memory, train, look at the result.
#
# | letter | is | | letter | is | | letter | is |
# |---|---|---|---|---|---|---|---|
# | **B** | sequences of a microbatch, on all devices | | **N** | query heads | | **F** | hidden units of the MLP |
# | **T** | tokens a sequence | | **K** | key/value heads | | **L** | layers |
# | **D** | width of the model | | **H** | width of a head | | **V** | tokens in the vocabulary |
# | **A** | microbatches of a step | | | | | | |
#
# The letters are those of [How to Scale Your Model](https://jax-ml.github.io/scaling-book/).

# %% [markdown]
# ## Setup
#
# The first cell installs what the runtime lacks and never replaces its jax. No account is needed: `HF_TOKEN`, as a
# Colab secret or an environment variable, only raises the Hub's rate limits. The collapsed cells define what every cell
# below relies on: imports, errors, and the settings of XLA that must precede the first computation.

# %% Install what is missing cellView="form" tags=["shared"]
# @title Install what is missing
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile


def install(*packages):
    """Installs, in a notebook, the packages that the runtime lacks. Pins all installed versions: pip replaces none."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if not missing or "get_ipython" not in globals():
        return
    print("installing", *missing)
    pins = {}
    for package in importlib.metadata.distributions():
        name, version = package.name, package.version
        # pip refuses versions such as Debian's own 2.22.1ubuntu1.
        if name and re.fullmatch(r"[\d.]+(?:(?:a|b|rc|\.post|\.dev)\d+)*(?:\+[\w.]+)?", version or ""):
            pins.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)  # the first in the path is the one in use
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as constraints:
        constraints.write("".join(f"{name}=={version}\n" for name, version in pins.items()))
        constraints.flush()
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints.name, *missing]
        subprocess.run(command, check=True)


# %% Install tags=["run"]
install(
    "jax", "numpy", "tiktoken", "rustbpe", "pyarrow", "huggingface_hub", "datasets", "safetensors", "tensorboard",
    "matplotlib", "tqdm",
)  # fmt: skip

# %% Environment cellView="form" tags=["shared"]
# @title Environment
import argparse
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import threading
import time
import urllib.request
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from tqdm import tqdm

GITHUB = "tpuchat/tpuchat"
IN_NOTEBOOK = "get_ipython" in globals()
warnings.filterwarnings("ignore", "IProgress not found")  # huggingface_hub looks for ipywidgets
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # shards arrive beside the training, whose bar they break
# A container may run a user without a home folder; Docker then says that it is /.
if (home := os.path.expanduser("~")) == "~" or (home == "/" and not os.access("/", os.W_OK)):
    os.environ["HOME"] = os.path.join(tempfile.gettempdir(), f"home-{os.getuid()}")
SAID = set()


class InputError(ValueError):
    """A wrong input: a Config value, a file, a checkpoint. The message is one line: what was wrong, the value, and what
    to do. A script prints it to stderr and exits with status 2."""


@functools.cache
def get_secret(name):
    """Returns a secret, or None: from Colab's secrets panel, else from the environment. It is read once, at the start,
    in the main thread: Colab asks the browser, and a background thread would wait for a closed tab without an end."""
    try:
        from google.colab import userdata

        value = userdata.get(name)
    except Exception:  # not in Colab, not granted, or not there: Colab raises a different class for each
        value = os.environ.get(name)
    return (value or "").strip() or None  # it may have been pasted with the end of its line


def keep_writable(name):
    """Makes a script's stdout or stderr take any text in any locale, and lead nowhere once nobody reads it: a closed
    pipe, or a terminal that is gone, must not stop a run."""
    if getattr(sys, name) is None:  # closed before the start
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    stream = getattr(sys, name)

    def guarded(call):
        def attempt(*args):
            try:
                return call(*args)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

        return attempt

    stream.reconfigure(errors="backslashreplace")
    stream.write, stream.flush = guarded(stream.write), guarded(stream.flush)


if __name__ == "__main__" and not IN_NOTEBOOK:
    keep_writable("stdout"), keep_writable("stderr")


def progress_bar(*args, **options):
    """Returns a tqdm bar, silent in a log file. A notebook shows stderr in red, so there the bar goes to stdout."""
    shown = IN_NOTEBOOK or sys.stderr.isatty()
    return tqdm(*args, disable=not shown, file=sys.stdout if IN_NOTEBOOK else sys.stderr, **options)


def cache_dir():
    """Returns ~/.cache/tpuchat: tokenizers, downloads, compiled programs."""
    return Path.home() / ".cache" / "tpuchat"


def say_once(kind, line):
    """Prints a line, above a progress bar, unless one of its kind was printed before."""
    if kind not in SAID:
        SAID.add(kind)
        with contextlib.suppress(OSError, ValueError):  # a thread that reads data goes on without stdout
            tqdm.write(line)


def first_line(error):
    """Returns the first line of an exception's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_background(function):
    """Returns a Future of function(), run in a daemon thread: unlike a pool's, it does not keep the process alive."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="background", daemon=True).start()
    return future


# %% JAX and XLA cellView="form" tags=["shared"]
# @title JAX and XLA
import bisect
import copy
import ctypes
import datetime
import html
import importlib.machinery
import math
import netrc
import platform
import queue
import resource
import shlex
import shutil
import signal
import types

import jax

if jax.__version_info__ < (0, 7, 2):  # Colab's in August 2026, and the oldest that the tests run with
    upgrade = "pip install --upgrade 'jax[tpu]', on a GPU 'jax[cuda13]', on a CPU jax"
    raise SystemExit(f"error: jax {jax.__version__} is too old: tpuchat needs 0.7.2 or newer; {upgrade}")

import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils, multihost_utils
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Below jax 0.8.2, XLA for CPUs ignores bfloat16 instructions, and XNNPACK fails on some matmuls that XLA hands to it:
# "Unsupported element type for DotThunk".
CPU_USES_BFLOAT16, XLA_FLAGS = jax.__version_info__ >= (0, 8, 2), os.environ.get("XLA_FLAGS", "")
if not CPU_USES_BFLOAT16 and "xnnpack" not in XLA_FLAGS and XLA_FLAGS[:1] in ("", "-"):  # it may name a file of flags
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_xnnpack=false {XLA_FLAGS}".strip()

# Where libtpu is installed without a TPU, it queries a metadata server and prints warnings. These variables stop that.
TPUS = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
}  # fmt: skip
if not TPUS:
    os.environ.update(NO_TPU | os.environ)

# On a CPU, XLA allocates its temporaries in every step, and glibc returns such large blocks to the kernel, which zeroes
# their pages again: 22% of the demo's CPU time (measured, 2 cores). One malloc arena that keeps its memory avoids it.
if (
    sys.platform == "linux"
    and not TPUS
    and not Path("/dev/nvidiactl").exists()
    and hasattr(ctypes.CDLL(None), "mallopt")
):
    for parameter, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(parameter, value)

# jax takes 75% of a GPU's memory: of a T4's 15 GiB 11.25, where the reference model needs 11.2 (estimated by XLA).
if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")

# Compiled programs are kept between processes. JAX_COMPILATION_CACHE_DIR wins if it is set.
if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # small programs, too: there are dozens

# The numbers must not depend on what the environment says. (Dtypes are written down: x64 changes nothing.)
for name, value in {
    "jax_default_prng_impl": "threefry2x32", "jax_threefry_partitionable": True, "jax_random_seed_offset": 0,
    "jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow", "jax_transfer_guard": "allow",
    "jax_disable_jit": False, "jax_raise_persistent_cache_errors": False,
}.items():  # fmt: skip
    jax.config.update(name, value)


def cpu_fact(name):
    """Returns a line of Linux's /proc/cpuinfo for the first core, such as 'model name' or 'flags'; else ''."""
    path = Path("/proc/cpuinfo")
    line = re.search(rf"^{name}\s*: (.*)", path.read_text() if path.exists() else "", re.M)
    return line[1] if line else ""


# %% [markdown]
# # Part I: the model and its training
#
# ## Config
#
# One frozen dataclass holds every option. It is a *static* JAX type: `jax.jit` hashes it like a shape, and compiles a
# program for each value. A sweep over learning rates must not compile each time, so most fields are not in the hash.
# The function that declares a field decides whether a change compiles, and whether a resumed run may differ.
#
# | declared by | changing it | a resumed run |
# |---|---|---|
# | `option`, such as `n_head` | compiles a new program | must have the same |
# | `runtime`, such as `attn_impl` | compiles a new program | may change it, but not the tokens of a step |
# | `free`, such as `learning_rate` | compiles nothing | must have the same |
# | `host`, such as `log_interval` | compiles nothing | may change it |
#
# Those `free` fields that the step needs reach it as traced scalars, `state.hyper`. **Never read one from `config`
# inside a jitted function**: Configs that differ in it alone are equal, so the program would keep the value of its
# first call. To add a hyper-parameter, declare it with `free`, add it to `hyperparams`, and read `state.hyper[name]` in
# `train_step`. `loss_fn` does not get it: pass it on, and keep it out of `token_losses`, which evaluation shares.


# %% Options cellView="form" tags=["shared"]
# @title Options
def option(default, help, rule=("", lambda value: True), *, compiled=True, resume=False):
    """Returns a dataclass field of a Config. `rule`: a sentence, and a function that says whether a value obeys it.
    `compiled=False`: changing it compiles nothing. `resume`: a resumed run may change it."""
    metadata = {"help": help, "rule": rule, "resume": resume}
    return dataclasses.field(default=default, compare=compiled, metadata=metadata)


free = functools.partial(option, compiled=False)
runtime = functools.partial(option, resume=True)
host = functools.partial(option, compiled=False, resume=True)

POSITIVE = "must be positive", lambda value: value > 0
POSITIVE_OR_AUTO = "must be positive, or -1 for the default rule", lambda value: value > 0 or value == -1
NOT_NEGATIVE = "must not be negative", lambda value: value >= 0
BELOW_ONE = "must lie in [0, 1)", lambda value: 0 <= value < 1
SHARE = "must lie in [0, 1]", lambda value: 0 <= value <= 1


def one_of(*choices):
    """Returns the rule that a value is one of `choices`."""
    return f"must be one of {', '.join(choices)}", lambda value: value in choices


def at_least(least, why):
    """Returns the rule that a value is at least `least`."""
    return f"must be at least {least}: {why}", lambda value: value >= least


def require(ok, name, value, rule):
    """Raises an InputError that names the field, its value and the rule that it breaks, unless `ok`."""
    if not ok:
        raise InputError(f"{name}={value!r}: {rule}")


def check_options(config):
    """Raises InputError for a field that is not of its type (an int serves as a float) or breaks its rule."""
    for field in dataclasses.fields(config):
        value, kinds = getattr(config, field.name), (int, float) if field.type is float else field.type
        rule = f"must be of type {getattr(field.type, '__name__', field.type)}, not {type(value).__name__}"
        fits = isinstance(value, kinds) and isinstance(value, bool) == (field.type is bool)
        require(fits, field.name, value, rule)
        if field.type is float:
            require(abs(value) <= 3.4e38, field.name, value, "must be a finite number that float32 holds")  # no NaN
            object.__setattr__(config, field.name, float(value))
        sentence, holds = field.metadata["rule"]
        require(holds(value), field.name, value, sentence)


def suggest(name, known):
    """Returns ', did you mean X?', or ''."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


# %% Checks of options cellView="form" tags=["shared"]
# @title Checks of options
def check_block_size(block_size, seq_len):
    """Raises InputError unless the TPU kernels can tile a sequence of `seq_len` by `block_size`."""
    require(seq_len % 128 == 0, "seq_len", seq_len, "must be a multiple of 128 for the splash and pallas kernels")
    block = min(block_size, seq_len)
    require(
        block % 128 == 0 and seq_len % block == 0, "splash_block_size", block_size,
        f"must be a multiple of 128 that divides seq_len={seq_len}",
    )  # fmt: skip


def cuda_capability(device):
    """Returns the compute capability of an NVIDIA GPU: 7.5 of a T4, 8.0 of an A100, 9.0 of an H100; else 0."""
    capability = str(getattr(device, "compute_capability", ""))
    return float(capability) if re.fullmatch(r"\d+\.\d+", capability) else 0


def fits_vmem(T, H):
    """Whether the fused kernel can take sequences of T tokens and heads of H: whole ones must fit the chip's VMEM."""
    return T % 128 == 0 and H % 128 == 0 and T * H <= 4096 * 128


def one_length(config, changes):
    """Returns changes of a Config, in which a new num_iterations, hours or credits unsets the two others.
    Raises InputError if two of them are new."""
    unset = {"num_iterations": -1, "hours": 0.0, "credits": 0.0}
    new = [name for name in unset if changes.get(name, unset[name]) not in (unset[name], getattr(config, name))]
    if len(new) > 1:
        require(False, new[0], changes[new[0]], f"{new[1]} sets the length of the run, too; give one")
    return changes | {name: value for name, value in unset.items() if new and name not in new}


def check_attention(config):
    """Raises InputError if config.attn_impl names a kernel that cannot take the shapes of config."""
    impl = config.attn_impl
    if impl in ("splash", "pallas"):
        check_block_size(config.splash_block_size, config.seq_len)
    if impl == "pallas":
        rule = "is causal only: set window_pattern='L', or attn_impl='splash'"
        require(min(config.windows) >= config.seq_len, "attn_impl", impl, rule)
    if impl == "fused":
        rule = f"needs seq_len={config.seq_len} and head_dim={config.head_dim} to be multiples of 128, of a product of "
        rule += "at most 4096·128; or set attn_impl='splash'"
        require(fits_vmem(config.seq_len, config.head_dim), "attn_impl", impl, rule)


# %% Options of every run tags=["shared"]
IMPLS = "auto", "einsum", "jax", "splash", "pallas", "fused"
FINEWEB = "karpathy/fineweb-edu-100b-shuffle"
EVEN = "must be positive and even: RoPE rotates pairs", lambda value: value > 0 and value % 2 == 0
LETTERS = (
    "must be made of S (short window) and L (the whole context)",
    lambda value: set(value) in ({"S"}, {"L"}, {*"SL"}),
)
PROJECT = r"must not hold one of /\\#?%:", lambda value: not set(value) & {*r"/\\#?%:"}
SOFTCAP = "must be positive and at most 70: the loss takes exp of the logits", lambda value: 0 < value <= 70
AUTO = "must not be negative, or -1 for the default rule", lambda value: value >= -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options that do not depend on the architecture. The class Config below adds n_embd, mlp_dim and depth."""

    n_head: int = option(8, "query heads, N", POSITIVE)
    n_kv_head: int = option(-1, "key/value heads, K, each for N/K query heads; -1 = N", POSITIVE_OR_AUTO)
    head_dim: int = option(128, "width of a head, H", EVEN)
    vocab_size: int = option(32768, "vocabulary size, V", at_least(257, "a token for each byte, and BOS"))
    seq_len: int = option(2048, "tokens of a sequence, T", at_least(2, "a token, and the one after it"))
    window_pattern: str = option(
        "SSSL", "one letter per layer: S sees T/2 tokens back, L all; the last layer sees all", LETTERS
    )
    softcap: float = option(15.0, "logits are softcap·tanh(logits/softcap)", SOFTCAP)

    # How the step runs
    attn_impl: str = runtime(
        "auto", "attention kernel; auto = fused on a TPU, jax on a GPU, einsum on a CPU", one_of(*IMPLS)
    )
    splash_block_size: int = runtime(1024, "tile size of the splash and pallas kernels", POSITIVE)
    compute_dtype: str = runtime("bfloat16", "dtype of activations and matmuls", one_of("bfloat16", "float32"))
    mesh: str | tuple = runtime("auto", "devices (data, fsdp), such as 1x8; fsdp splits the state; auto = (all, 1)")
    device_batch_size: int = runtime(4, "sequences of a forward and backward pass on each device", POSITIVE)
    total_batch_size: int = runtime(-1, "tokens per optimizer step; -1 = one pass; more accumulates", POSITIVE_OR_AUTO)
    grad_clip: float = runtime(0.0, "largest norm of the gradient; 0 = no clipping, which is faster", NOT_NEGATIVE)
    nonfinite: str = runtime(
        "stop", "after a NaN or infinite gradient: stop, or skip the update but count the step", one_of("stop", "skip")
    )

    # Optimization: traced scalars on the device
    learning_rate: float = free(
        3e-4, "peak learning rate of most weights; the section Optimizer has the others", POSITIVE
    )
    weight_decay: float = free(0.1, "weight decay of the matrices, times their learning rate", NOT_NEGATIVE)
    beta1: float = free(0.9, "AdamW's decay of the first moment", BELOW_ONE)
    beta2: float = free(0.95, "AdamW's decay of the second moment", BELOW_ONE)
    eps: float = free(1e-8, "AdamW's epsilon", at_least(1e-30, "float32 would divide by zero"))
    warmup_ratio: float = free(0.02, "share of the steps with a rising learning rate", NOT_NEGATIVE)
    warmdown_ratio: float = free(0.5, "share of the steps with a falling learning rate", NOT_NEGATIVE)
    final_lr_frac: float = free(0.0, "learning rate after the last step, over the peak", SHARE)
    num_iterations: int = free(-1, "optimizer steps; -1 = by target_param_data_ratio", POSITIVE_OR_AUTO)
    target_param_data_ratio: float = free(10.0, "training tokens for each parameter", POSITIVE)
    hours: float = free(0.0, "time of the run, which then decides how many steps it has; 0 = no limit", NOT_NEGATIVE)
    credits: float = free(0.0, "price of the run, Colab's compute units, in place of hours; 0 = no limit", NOT_NEGATIVE)

    # Data and run: the host's
    dataset: str = free(FINEWEB, "'embedded', a file or folder of text, or a dataset of the Hub, owner/name")
    text_column: str = free("text", "the column of the texts")
    document_separator: str = free("", "what ends a document of a text file, such as '\\n\\n'; '' = the file is one")
    skip_bad_rows: bool = free(False, "leave broken rows out, and count them")
    shuffle: int = free(
        -1, "shuffle shards, and blocks of so many documents; -1 = 1,000 for your own data, else 0", AUTO
    )
    num_shards: int = free(50, "train on at most so many shards; -1 = all", POSITIVE_OR_AUTO)
    seed: int = free(0, "seed of the initial weights and of the shuffle", NOT_NEGATIVE)
    hf_repo_id: str = host("", "your own Hub repo, owner/name: for a tokenizer, and for backups")
    run_dir: str = host("runs/train", "the folder for everything that the run writes")
    resume: str = host("auto", "auto = go on with an unfinished run; never = a new folder", one_of("auto", "never"))
    log_interval: int = host(10, "steps between two lines of the log; 0 = never", NOT_NEGATIVE)
    eval_interval: int = host(500, "steps between two evaluations; 0 = only the last", NOT_NEGATIVE)
    sample_interval: int = host(2000, "steps between two samples; 0 = only the last", NOT_NEGATIVE)
    save_interval: int = host(5000, "steps between two checkpoints; 0 = only the last", NOT_NEGATIVE)
    keep_checkpoints: int = host(2, "how many of the newest stay; the best stays as well", POSITIVE)
    backup: str = host("", "copy each checkpoint to a folder, such as a mounted Drive, or to 'hub' = hf_repo_id")
    profile_start: int = host(15, "the first step of the XProf trace", NOT_NEGATIVE)
    profile_steps: int = host(5, "how many steps are traced; 0 = none", NOT_NEGATIVE)
    wandb_mode: str = host("auto", "auto = online if there is a key", one_of("auto", "online", "offline", "disabled"))
    wandb_project: str = host("tpuchat", "wandb project", PROJECT)
    eval_tokens: int = host(524_288, "validation tokens of an evaluation during training", POSITIVE)
    final_eval_tokens: int = host(16_777_216, "validation tokens of the last evaluation; -1 = all", POSITIVE_OR_AUTO)


# %% Derived sizes tags=["shared"]
class Sizes(Options):
    """What follows from the options."""

    @property
    def kv_heads(self):  # K
        return self.n_head if self.n_kv_head == -1 else self.n_kv_head

    @property
    def shuffle_block(self):
        """Documents in a block that is shuffled; 0 = the order of the files."""
        shuffled_already = self.dataset == "embedded" or self.dataset in HUB_SHARDS
        default = 0 if shuffled_already else 1000
        return default if self.shuffle == -1 else self.shuffle

    @property
    def windows(self):
        """How many tokens back each layer sees: T // 2 for S, T for L. The last layer always sees everything."""
        letters = itertools.islice(itertools.cycle(self.window_pattern), self.depth - 1)
        return [self.seq_len // 2 if letter == "S" else self.seq_len for letter in letters] + [self.seq_len]

    @property
    def mesh_shape(self):
        """The number of devices along each axis of the mesh, (data, fsdp)."""
        return (jax.device_count(), 1) if self.mesh == "auto" else self.mesh

    @property
    def devices(self):
        return math.prod(self.mesh_shape)

    @property
    def tokens_per_pass(self):
        """Tokens of one forward and backward pass, on all devices."""
        return self.device_batch_size * self.seq_len * self.devices

    @property
    def tokens_per_step(self):
        return self.tokens_per_pass if self.total_batch_size == -1 else self.total_batch_size

    @property
    def grad_accum_steps(self):  # A
        return self.tokens_per_step // self.tokens_per_pass

    @property
    def batch_shape(self):
        """(A, B, T): a step takes A microbatches of B sequences of T tokens."""
        return self.grad_accum_steps, self.device_batch_size * self.devices, self.seq_len

    @property
    def total_steps(self):
        """Optimizer steps of the run."""
        if self.num_iterations != -1:
            return self.num_iterations
        tokens = self.target_param_data_ratio * count_params(self)["total"]
        return max(1, round(tokens / self.tokens_per_step))


# %% Checks of a Config cellView="form" tags=["shared"]
# @title Checks of a Config
class BaseConfig(Sizes):
    """Options that are checked, changed by `replace`, and chosen for a device."""

    def __post_init__(self):
        if isinstance(self.mesh, str) and (match := re.fullmatch(r"\(?\s*(\d+)\s*[x,]\s*(\d+)\s*\)?", self.mesh)):
            object.__setattr__(self, "mesh", (int(match[1]), int(match[2])))
        elif isinstance(self.mesh, list):
            object.__setattr__(self, "mesh", tuple(self.mesh))
        check_options(self)
        require(self.n_head % self.kv_heads == 0, "n_kv_head", self.n_kv_head, f"must divide n_head={self.n_head}")
        ratios = self.warmup_ratio + self.warmdown_ratio
        require(ratios <= 1, "warmup_ratio + warmdown_ratio", ratios, "must be at most 1: they are shares of one run")
        require(not self.hours or not self.credits, "hours", self.hours, "give hours or credits, not both")
        hub = self.backup != "hub" or self.hf_repo_id
        require(hub, "backup", self.backup, "needs hf_repo_id, a Hub repo of your own")
        pair = isinstance(self.mesh, tuple) and len(self.mesh) == 2 and all(type(n) is int and n > 0 for n in self.mesh)
        require(self.mesh == "auto" or pair, "mesh", self.mesh, "must be auto, or two positive numbers, such as (2, 4)")
        self.check_architecture()
        check_attention(self)
        require(
            self.total_batch_size == -1 or self.total_batch_size % self.tokens_per_pass == 0, "total_batch_size",
            self.total_batch_size, f"must be a multiple of device_batch_size·seq_len·devices = {self.tokens_per_pass}",
        )  # fmt: skip

    def replace(self, **changes):
        """Returns a copy with some fields changed, validated again."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise InputError(f"unknown Config field {name!r}{suggest(name, known)}")
        return dataclasses.replace(self, **one_length(self, changes))

    @classmethod
    def for_device(cls):
        """Returns the demo on a CPU; elsewhere the notebook's model, its step in passes that fit the device.

        Raises InputError if jax cannot have the device that is there, or the one that it was told to take.
        """
        asked = os.environ.get("JAX_PLATFORMS", "")
        try:
            backend = jax.default_backend()
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"JAX_PLATFORMS={asked}: {first_line(error)}; unset it to take what is here") from error
        rule = "is there, but jax does not have it: end the process that holds it (restart the runtime), or install "
        rule += "jax[tpu]; JAX_PLATFORMS=cpu trains the demo without it"
        require(backend != "cpu" or not TPUS or "cpu" in asked, "TPU", str(TPUS[0] if TPUS else ""), rule)
        if backend == "cpu":
            # Without bfloat16 instructions XLA converts each operand to float32, and back.
            fast = CPU_USES_BFLOAT16 and "_bf16" in cpu_fact("flags")
            return cls.demo().replace(compute_dtype="bfloat16" if fast else "float32")
        config, device = cls(), jax.local_devices()[0]
        memory = (device.memory_stats() or {}).get("bytes_limit", 0)
        if 0 < cuda_capability(device) < 8:  # no bfloat16 matmuls; float16 would need a scaled loss
            config = config.replace(compute_dtype="float32")
        rows = DEVICE_BATCH.get(device.device_kind, 4 if memory > 40e9 else 1)
        if rows == config.device_batch_size:
            return config
        return config.replace(device_batch_size=rows, total_batch_size=config.tokens_per_step)


# %% [markdown]
# One field, `n_head`, scales the model. The width is D = N·H, and the depth follows the width at a constant aspect
# ratio. So `n_head=4, 8, 12` is a family of similar models, the idea of
# [nanochat](https://github.com/karpathy/nanochat)'s single depth knob.

# %% Config tags=["shared"]
# Sequences that fit a chip, by device_kind (05_preflight.py, benchmarks/cuda.py).
DEVICE_BATCH = {"TPU v6 lite": 4, "TPU v5 lite": 4, "NVIDIA L4": 4, "NVIDIA A100-SXM4-40GB": 4}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """All choices of a run. `Config()` is the reference model. Raises InputError (a ValueError) for a wrong value."""

    notebook = "02_train.py"  # no field: where a checkpoint's model is defined
    aspect_ratio: int = option(64, "width over depth, D / L", POSITIVE)

    def check_architecture(self):
        require(self.depth > 0, "aspect_ratio", self.aspect_ratio, f"is above n_embd={self.n_embd}: no layer is left")

    @property
    def n_embd(self):  # D
        return self.n_head * self.head_dim

    @property
    def depth(self):  # L
        return self.n_embd // self.aspect_ratio

    @property
    def mlp_dim(self):  # F
        return 4 * self.n_embd

    @classmethod
    def demo(cls):
        """Returns a model of 3.7M parameters on the embedded corpus: minutes on two CPU cores."""
        return cls(
            n_head=4, head_dim=64, aspect_ratio=128, vocab_size=4096, seq_len=256, device_batch_size=8,
            learning_rate=2e-3, num_iterations=500, dataset="embedded", num_shards=-1, run_dir="runs/demo",
            log_interval=5, eval_interval=100, sample_interval=250, save_interval=250,
            eval_tokens=32_768, final_eval_tokens=-1,
        )  # fmt: skip


# %% Try it: sizes tags=["run"]
if IN_NOTEBOOK:
    tiny = Config(n_head=2, head_dim=32, aspect_ratio=16, vocab_size=512, seq_len=64, device_batch_size=4, mesh=(1, 1))
    for name, c in {"reference": Config(mesh=(1, 1)), "demo": Config.demo().replace(mesh=(1, 1)), "tiny": tiny}.items():
        print(f"{name:10} D {c.n_embd} = N {c.n_head} × H {c.head_dim}, L {c.depth}, F {c.mlp_dim}, V {c.vocab_size}")
        print(f"{'':10} {c.tokens_per_step:,} tokens a step; the first layers see {c.windows[:4]} tokens back")

# %% [markdown]
# ## Data parallelism and FSDP
#
# A step on eight chips is the same step. jax shards arrays over a *mesh* of devices, and XLA's SPMD partitioner derives
# the program of one device, with all communication. The code only states how arrays are sharded. The mesh has two axes,
# and both split the batch:
#
# - **data**: the state is replicated. Gradients are summed over the devices.
# - **fsdp** ([ZeRO](https://arxiv.org/abs/1910.02054)): weights, moments and gradients are sharded. A layer's weights
#   are all-gathered in bfloat16 when it runs, and a TPU reduce-scatters gradients. On n devices the state takes 1/n of
#   the memory.
#
# `mesh="auto"` is pure data parallelism. Five functions are collapsed below, and do nothing on one device: `constrain`
# says how an activation is sharded, `shard_weights` how weights and gradients are, `gather_weights` all-gathers them,
# `per_device` is a `shard_map`, and `ROWS` names the axes that split the batch.

# %% Mesh cellView="form" tags=["shared"]
# @title Mesh
ROWS = ("data", "fsdp")  # the axis of sequences, or of tokens, is sharded over all devices


def sharding(config, *spec, mesh=None):
    """Returns a NamedSharding over the mesh ('data', 'fsdp'). Without `mesh` it names no devices: enough to trace."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = mesh or jax.sharding.AbstractMesh(config.mesh_shape, ("data", "fsdp"), axis_types=auto)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def weight_spec(config, shape):
    """Returns the PartitionSpec of a weight, as a tuple: its longest axis that fsdp divides is sharded."""
    fsdp = config.mesh_shape[1]
    axes = [axis for axis, n in enumerate(shape) if n % fsdp == 0]
    longest = max(axes, key=lambda axis: (shape[axis], -axis), default=None)
    return tuple("fsdp" if axis == longest and fsdp > 1 else None for axis in range(len(shape)))


def constrain(config, x, *spec):
    """Returns x with a sharding constraint; on one device x itself, so that the program is that of one device."""
    return x if config.devices == 1 else jax.lax.with_sharding_constraint(x, sharding(config, *spec))


def shard_weights(config, tree):
    """Returns weights, moments or gradients, sharded as weight_spec says."""
    return jax.tree.map(lambda w: constrain(config, w, *weight_spec(config, w.shape)), tree)


def gather_weights(config, tree):
    """Returns the weights replicated on every device: an all-gather of what fsdp shards."""
    return jax.tree.map(lambda w: constrain(config, w), tree) if config.mesh_shape[1] > 1 else tree


def per_device(config, function):
    """Returns `function` mapped over the devices, each with its rows of every argument (shard_map)."""
    if config.devices == 1:
        return function
    mesh, rows = sharding(config).mesh, jax.sharding.PartitionSpec(ROWS)
    return jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)


# %% [markdown]
# ## Model
#
# A decoder-only transformer:
#
# - Norm: [RMSNorm](https://arxiv.org/abs/1910.07467) without weights, before each part, and on queries and keys
#   (*QK-norm*).
# - Position: [RoPE](https://arxiv.org/abs/2104.09864). MLP: [ReLU²](https://arxiv.org/abs/2109.08668).
# - Attention: [grouped-query](https://arxiv.org/abs/2305.13245). Three layers of four see half the context, the last
#   one sees all of it.
# - *x0 residuals*: each layer mixes the embedding back in, x ← a·x + b·x0, with its own learned a and b.
# - Embedding and head are not tied. Logits are [soft-capped](https://arxiv.org/abs/2408.00118).
#
# x0 residuals and most initial values follow [modded-nanogpt](https://github.com/KellerJordan/modded-nanogpt) and
# nanochat; those of the embedding are smaller here.


# %% Initial values tags=["shared"]
def init_params(config, key):
    """Returns float32 master parameters: {'embed': [V, D], 'layers': [...], 'lm_head': [D, V]}.

    | weight                | shape                  | initial value                                            |
    |-----------------------|------------------------|----------------------------------------------------------|
    | embed                 | [V, D]                 | normal, std 0.01; a norm follows, so a row is a          |
    |                       |                        | direction, and Adam's steps turn a short row faster      |
    | q, k, v, up           | [D, N or K, H], [D, F] | uniform, std 1/√D: unit variance in, unit variance out   |
    | o, down               | [N, H, D], [F, D]      | zero: at step 0 attention and MLP add nothing            |
    | lm_head               | [D, V]                 | normal, std 0.001: logits ≈ 0, loss ≈ ln V               |
    | resid_scale, x0_scale | []                     | 1 and 0.1                                                |
    """
    V, D, N, K, H, F = config.vocab_size, config.n_embd, config.n_head, config.kv_heads, config.head_dim, config.mlp_dim
    keys = iter(jax.random.split(key, 2 + 8 * config.depth))  # more than are drawn now

    def uniform(*shape):
        bound = (3 / D) ** 0.5  # of a uniform distribution with std 1/√D
        return jax.random.uniform(next(keys), shape, jnp.float32, -bound, bound)

    def normal(std, *shape):
        return std * jax.random.normal(next(keys), shape, jnp.float32)

    def layer():
        return {
            "q": uniform(D, N, H), "k": uniform(D, K, H), "v": uniform(D, K, H), "o": jnp.zeros((N, H, D), jnp.float32),
            "up": uniform(D, F), "down": jnp.zeros((F, D), jnp.float32),
            "resid_scale": jnp.ones((), jnp.float32), "x0_scale": jnp.full((), 0.1, jnp.float32),
        }  # fmt: skip

    return {
        "embed": normal(0.01, V, D),
        "lm_head": normal(0.001, D, V),
        "layers": [layer() for _ in range(config.depth)],
    }


# %% Norm and RoPE tags=["shared"]
def rms_norm(x):
    """Returns x / rms(x) over the last axis, reduced in float32, in the dtype of x."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def rope_tables(seq_len, head_dim):
    """Returns cos and sin, float32 [T, H/2]: pair i of position t is rotated by t / 10000^(2i/H). numpy constants."""
    frequencies = 10_000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(seq_len)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def norm_and_rope(x, cos, sin):
    """Returns x [B, N, T, H] after QK-norm and RoPE on the pairs (x[i], x[i + H/2]): one float32 pass, one rounding."""
    first, second = jnp.split(rms_norm(x.astype(jnp.float32)), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def split_heads(x, T, H):
    """[B·T, N·H] → [B, N, T, H]."""
    return x.reshape(-1, T, x.shape[1] // H, H).swapaxes(1, 2)


def merge_heads(y):
    """[B, N, T, H] → [B·T, N·H]."""
    B, N, T, H = y.shape
    return y.swapaxes(1, 2).reshape(B * T, N * H)


# %% [markdown]
# ### Attention
#
# A query at t sees the keys from t − window to t. `attn_impl="auto"` takes `fused` on a TPU, `jax` on a GPU and
# `einsum` on a CPU, where the shape allows it.
#
# | `attn_impl` | device | what it is |
# |---|---|---|
# | `einsum` | all | the reference implementation; writes the T×T scores to memory |
# | `jax` | all | jax.nn's; on NVIDIA GPUs cuDNN's [flash attention](https://arxiv.org/abs/2205.14135) |
# | `splash` | TPU | the kernel that ships with jax; skips blocks outside the window |
# | `pallas` | TPU | jax's older kernel, without windows |
# | `fused` | TPU | our own (Part II): QK-norm, RoPE and attention in one kernel |


# %% Attention by definition tags=["shared"]
def einsum_attention(q, k, v, window):
    """Attention as it is defined. q: [B, N, T, H]; k, v: [B, K, T, H]. Returns [B, N, T, H]."""
    N, T, H = q.shape[1:]
    K, scale = k.shape[1], H**-0.5
    q = q.reshape(q.shape[0], K, N // K, T, H)
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    t, s = np.arange(T)[:, None], np.arange(T)[None, :]
    probs = jax.nn.softmax(jnp.where((s <= t) & (t - s <= window), scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgts,bksh->bkgth", probs.astype(v.dtype), v)
    return out.reshape(-1, N, T, H)


# %% Attention by libraries cellView="form" tags=["shared"]
# @title Attention by libraries
def jax_attention(q, k, v, window):
    """jax.nn.dot_product_attention; by cuDNN where this machine has a GPU that it supports."""
    (T, H), capability = q.shape[2:], cuda_capability(jax.devices()[0])
    cudnn = capability >= 8 and q.dtype == jnp.bfloat16 and H % 8 == 0 and H <= (256 if capability == 9 else 128)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # it wants [B, T, N, H]
    local = (window, 0) if window < T else None
    y = jax.nn.dot_product_attention(
        q, k, v, scale=H**-0.5, is_causal=True, local_window_size=local, implementation="cudnn" if cudnn else None
    )
    return jnp.swapaxes(y, 1, 2)


@functools.lru_cache
def splash_kernel(N, T, window, block):
    """Returns the splash attention kernel for [N, T, H] queries; layers with the same window share it."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = splash.CausalMask((T, T)) if window >= T else splash.LocalMask((T, T), window_size=(window, 0), offset=0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    with jax.ensure_compile_time_eval():  # its mask tables must be arrays, not tracers of the first layer that asks
        return splash.make_splash_mha(
            splash.MultiHeadMask([mask] * N), block_sizes=sizes, head_shards=1, q_seq_shards=1
        )


def splash_attention(q, k, v, window, block):
    """jax's splash kernel, in tiles of `block`; arguments and result as einsum_attention's."""
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # splash leaves the scale to its caller
    return jax.vmap(splash_kernel(*q.shape[1:3], window, block))(q, k, v)


def pallas_attention(q, k, v, block):
    """jax's older flash kernel, causal, in tiles of `block`."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))  # it wants K = N
    sizes = flash.BlockSizes(
        block_b=1, block_q=block, block_k_major=block, block_k=block, block_q_major_dkv=block, block_q_dkv=block,
        block_k_major_dkv=block, block_k_dkv=block, block_q_dq=block, block_k_major_dq=block, block_k_dq=block,
    )  # fmt: skip
    return flash.flash_attention(q, k, v, causal=True, sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes)


# %% Attention tags=["shared"]
def attention(q, k, v, *, window, impl="einsum", block_size=1024):
    """Causal softmax attention with grouped key/value heads; scores are scaled by 1/√H.

    q: [B, N, T, H]; k, v: [B, K, T, H], where query head n reads key/value head n // (N/K). Returns [B, N, T, H].
    A query at t sees keys t − window … t; window ≥ T is full causal attention. `block_size` tiles the TPU kernels,
    which run elsewhere under `pltpu.force_tpu_interpret_mode(True)`. `fused` is not among them: it includes QK-norm and
    RoPE (see `attend`). Raises InputError for shapes that `impl` cannot take.
    """
    N, T, K = q.shape[1], q.shape[2], k.shape[1]
    impls = ("einsum", "jax", "splash", "pallas")
    require(impl in impls, "impl", impl, f"must be one of {', '.join(impls)}")
    require(N % K == 0, "k.shape[1]", K, f"must divide the {N} query heads")
    if impl == "einsum":
        return einsum_attention(q, k, v, window)
    if impl == "jax":
        return jax_attention(q, k, v, window)
    check_block_size(block_size, T)
    if impl == "splash":
        return splash_attention(q, k, v, window, min(block_size, T))
    require(window >= T, "window", window, f"the pallas kernel is causal only: give window >= T = {T}, or use splash")
    return pallas_attention(q, k, v, min(block_size, T))


def choose_attention(config, platform):
    """Returns the implementation that config.attn_impl means on platform 'tpu', 'gpu' or 'cpu'."""
    T, H = config.seq_len, config.head_dim
    if config.attn_impl != "auto":
        return config.attn_impl
    if platform == "tpu":
        tiles = T % 128 == 0 and T % min(config.splash_block_size, T) == 0
        return "fused" if fits_vmem(T, H) else "splash" if tiles else "jax"
    return "jax" if platform == "gpu" else "einsum"


def attend(config, q, k, v, T, window):
    """QK-norm, RoPE and causal attention between the projections: q [B·T, N·H], k and v [B·T, K·H] → [B·T, N·H]."""
    H, impl = config.head_dim, choose_attention(config, jax.default_backend())

    def on_one_device(q, k, v):
        if impl == "fused":
            return fused_attention(q, k, v, T, H, window)
        (q, k, v), tables = (split_heads(x, T, H) for x in (q, k, v)), rope_tables(T, H)
        q, k = norm_and_rope(q, *tables), norm_and_rope(k, *tables)
        return merge_heads(attention(q, k, v, window=window, impl=impl, block_size=config.splash_block_size))

    return per_device(config, on_one_device)(q, k, v)


# %% Try it: the attentions agree tags=["run"]
if IN_NOTEBOOK:
    q, *kv = jax.random.normal(jax.random.key(0), (3, 2, 4, 128, 128), jnp.bfloat16)
    k, v = (x[:, :2] for x in kv)  # four query heads, two key/value heads
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)), window=64)
    for impl in ["einsum", "jax"] + ["splash"] * (jax.default_backend() == "tpu"):
        error = jnp.abs(attention(q, k, v, window=64, impl=impl) - exact).max()
        print(
            f"{impl:7} in bfloat16 is within {error:.4f} of einsum in float32; values reach {jnp.abs(exact).max():.2f}"
        )

# %% [markdown]
# ### Layers and the forward pass
#
# The residual stream is `[B·T, D]`: only attention needs to know where a sequence ends, so every matmul has two axes.
# (As `[B, T, D]`, XLA on a CPU copied both operands of each weight gradient: the demo's step took 1.8 times as long,
# measured on 2 cores.) Weights keep explicit head dims, `q: [D, N, H]`. The layers are unrolled, not scanned: each has
# its own name in the profile, and XLA schedules across them. The named scopes are what you will see in XProf.


# %% Layers tags=["shared"]
def embed(config, params, tokens):
    """Tokens of any shape → [B·T, D]. Rows are cast after the gather, so that their gradient is summed in float32."""
    table = gather_weights(config, params["embed"])
    return rms_norm(table[tokens.reshape(-1)]).astype(config.compute_dtype)


def project_qkv(layer, x):
    """[B·T, D] → q [B·T, N·H], k and v [B·T, K·H]."""
    x = rms_norm(x)
    return [x @ layer[name].reshape(x.shape[1], -1) for name in "qkv"]


def project_out(layer, y):
    """[B·T, N·H] → [B·T, D]."""
    return y @ layer["o"].reshape(y.shape[1], -1)


def lm_head(config, params, x):
    """[B·T, D] → logits [B·T, V], float32, softcapped."""
    head = gather_weights(config, params["lm_head"])
    logits = jnp.einsum("sd,dv->sv", rms_norm(x), head, preferred_element_type=jnp.float32)
    return config.softcap * jnp.tanh(logits / config.softcap)


# %% Residual and MLP tags=["shared"]
def mix_residual(layer, x, x0):
    """a·x + b·x0, [B·T, D], in float32: in bfloat16 a learned 1.001 would be 1."""
    mixed = layer["resid_scale"] * x.astype(jnp.float32) + layer["x0_scale"] * x0.astype(jnp.float32)
    return mixed.astype(x.dtype)


def mlp(layer, x):
    """[B·T, D] → [B·T, D] through F = 4D units of ReLU²."""
    units = jnp.einsum("sd,df->sf", rms_norm(x), layer["up"])
    return jnp.einsum("sf,fd->sd", jnp.square(jax.nn.relu(units)), layer["down"])


# %% All layers tags=["shared"]
def trunk(config, weights, tokens):
    """Returns the residual stream after the last layer, [B·T, D]. tokens: int32 [B, T]."""
    with jax.named_scope("embed"):
        x = x0 = constrain(config, embed(config, weights, tokens), ROWS)
    for i, (layer, window) in enumerate(zip(weights["layers"], config.windows, strict=True)):
        with jax.named_scope(f"layer_{i:02d}"):
            layer = gather_weights(config, layer)
            with jax.named_scope("attn"):
                x = mix_residual(layer, x, x0)
                q, k, v = project_qkv(layer, x)
                x = x + project_out(layer, attend(config, q, k, v, tokens.shape[1], window))
            with jax.named_scope("mlp"):
                x = constrain(config, x + mlp(layer, x), ROWS)
    return x


# %% Parts tags=["shared"]
def part_of(path):
    """Returns the part of the model, embed, attn, mlp or lm_head, of a parameter, by its path in the tree. Its name
    decides: what nothing below names counts as attn."""
    name = path[-1].key
    if name == "lm_head":
        return name
    return "embed" if "embed" in name else "mlp" if name in ("gate", "up", "down") else "attn"


# %% Forward pass tags=["shared"]
def cast_weights(config, params):
    """Returns the matmul weights in compute_dtype. The embedding and the scalars stay float32. Weights that are
    already cast come back as they are."""

    def cast(path, weight):
        keep = weight.ndim == 0 or part_of(path) == "embed"
        return weight if keep else weight.astype(config.compute_dtype)

    return shard_weights(config, jax.tree_util.tree_map_with_path(cast, params))


def forward(config, params, tokens):
    """Returns next-token logits, float32 [B, T, V]. tokens: int32 [B, T]; params: masters, or cast weights."""
    weights = cast_weights(config, params)
    x = trunk(config, weights, tokens)
    with jax.named_scope("lm_head"):
        return lm_head(config, weights, x).reshape(*tokens.shape, -1)


# %% Try it: an untrained model tags=["run"]
if IN_NOTEBOOK:
    params = init_params(tiny, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 65), 0, tiny.vocab_size)
    logits = jax.jit(forward)(tiny, params, tokens[:, :-1])
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()
    print(f"logits {logits.shape} {logits.dtype}; loss {loss:.4f}, ln V = {math.log(tiny.vocab_size):.4f}")

# %% [markdown]
# ### Parameters and FLOPs
#
# A matmul weight costs 2 FLOPs a token forward and 4 backward. Attention adds two T×T matmuls a layer, of which a
# causal window needs only the visible part. Only visible keys are counted, also where a kernel computes more.


# %% Counts tags=["shared"]
def count_params(config):
    """Returns exact parameter counts by part, and their total. 'attn' includes the residual scalars of each layer."""
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    sizes = collections.Counter()
    for path, weight in jax.tree_util.tree_leaves_with_path(params):
        sizes[part_of(path)] += weight.size
    return {part: sizes[part] for part in ("embed", "attn", "mlp", "lm_head")} | {"total": sizes.total()}


def flops_per_token(config):
    """Training FLOPs per token: 6 for each matmul weight (attn, mlp, lm_head; the embedding is a lookup), plus
    12·N·H for each key that a query sees, averaged over the sequence: a full causal layer counts (T+1)/2 keys, half of
    the T×T convention, and a window of w tokens at most w + 1. Norms, softmax and the optimizer are not counted."""
    counts = count_params(config)
    matmuls = counts["attn"] + counts["mlp"] + counts["lm_head"]
    t = np.arange(config.seq_len)
    keys = sum(float(np.mean(np.minimum(t, window) + 1)) for window in config.windows)
    return 6 * matmuls + 12 * config.n_head * config.head_dim * keys


# Dense bfloat16 FLOP/s by the vendors' data sheets (T4: float32), by a part of jax's device_kind; first match wins.
PEAK_FLOPS = {
    "v6 lite": 918e12, "v6e": 918e12, "v5 lite": 197e12, "v5e": 197e12, "v5p": 459e12, "v5": 459e12,  # plain v5 is v5p
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "T4": 8.1e12,
}  # fmt: skip


def peak_flops(device_kind):
    """Returns the peak FLOP/s of a chip, or None if it is not in the table: MFU is then n/a, not a guess."""
    words = f" {device_kind.replace('-', ' ')} "
    return next((peak for name, peak in PEAK_FLOPS.items() if f" {name} " in words), None)


# %% Try it: parameters by part tags=["run"]
if IN_NOTEBOOK:
    for name, c in {"reference": Config(mesh=(1, 1)), "demo": Config.demo().replace(mesh=(1, 1))}.items():
        parts = ", ".join(f"{part} {count / 1e6:.1f}M" for part, count in count_params(c).items())
        print(f"{name:10} {parts}; {flops_per_token(c) / 1e6:,.0f} MFLOPs a token")

# %% [markdown]
# ## Loss
#
# Cross-entropy is the log of the sum of exponentials, minus the target's logit, in float32. A head that starts near
# zero gives ln V at step 0, the loss of a uniform guess. The softcap bounds the logits, so no maximum is subtracted.
# The target's logit is a masked sum, which XLA fuses into the same pass. Indexing would need a gather, and a scatter in
# the backward pass.
#
# The logits `[B·T, V]` are the largest array of the step: 1 GiB in float32 for the reference. Autodiff would keep them.
# The hand-written gradient keeps them in compute_dtype. In bfloat16 that saved 2.0 of 40.4 ms on a v6e (estimated, with
# another attention kernel; LOG.md).


# %% Loss, plainly tags=["shared"]
def plain_loss(x, head, targets, softcap):
    """Cross-entropy as it is defined. x: [B·T, D]; head: [D, V]; targets: [B·T]. Returns nats, float32 [B·T]."""
    logits = softcap * jnp.tanh(jnp.einsum("sd,dv->sv", x, head, preferred_element_type=jnp.float32) / softcap)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


# %% Loss tags=["shared"]
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def softcap_losses(x, head, targets, softcap):
    """plain_loss with a gradient written by hand: the logits never reach memory in float32."""
    return softcap_forward(x, head, targets, softcap)[0]


def softcap_forward(x, head, targets, softcap):
    """Returns (losses [B·T], what the backward pass needs). The losses are computed before anything is rounded."""
    capped = jnp.tanh(jnp.einsum("sd,dv->sv", x, head, preferred_element_type=jnp.float32) / softcap)
    is_target = jnp.arange(head.shape[1]) == targets[:, None]
    lse = jnp.log(jnp.sum(jnp.exp(softcap * capped), axis=-1))
    losses = lse - softcap * jnp.sum(jnp.where(is_target, capped, 0), axis=-1)
    # Without the barrier XLA would keep float32 and round when it reads: twice the bytes.
    stored = jax.lax.optimization_barrier(capped.astype(x.dtype))
    return losses, (x, head, targets, stored, lse)


def softcap_backward(softcap, saved, g):
    """Returns the gradients of x, head and targets (None) from g, that of the losses [B·T]."""
    x, head, targets, capped, lse = saved
    capped = capped.astype(jnp.float32)
    is_target = jnp.arange(head.shape[1]) == targets[:, None]
    gradient = (jnp.exp(softcap * capped - lse[:, None]) - is_target) * g[:, None]  # of the capped logits
    gradient = (gradient * (1 - capped * capped)).astype(x.dtype)  # of the logits before the softcap
    dx = jnp.einsum("sv,dv->sd", gradient, head)
    dhead = jnp.einsum("sd,sv->dv", x, gradient)
    return dx, dhead, None


softcap_losses.defvjp(softcap_forward, softcap_backward)


def token_losses(config, params, tokens, targets):
    """Returns the cross-entropy of each target, nats, float32 [B, T]. tokens, targets: int32 [B, T]."""
    weights = cast_weights(config, params)
    x = trunk(config, weights, tokens)
    with jax.named_scope("loss"):
        head = gather_weights(config, weights["lm_head"])
        losses = softcap_losses(rms_norm(x), head, targets.reshape(-1), config.softcap)
        return losses.reshape(targets.shape)


# %% Mean loss tags=["shared"]
def loss_fn(config, params, tokens, targets):
    """Returns the mean cross-entropy, nats per token. tokens, targets: int32 [B, T]."""
    return jnp.mean(token_losses(config, params, tokens, targets))


# %% Try it: the gradient written by hand tags=["run"]
if IN_NOTEBOOK:
    x = rms_norm(jax.random.normal(jax.random.key(0), (64, 32)))
    head, targets = jax.random.normal(jax.random.key(1), (32, 512)), jnp.arange(64)
    by_jax = jax.grad(lambda x, head: plain_loss(x, head, targets, 15.0).mean(), argnums=(0, 1))(x, head)
    by_hand = jax.grad(lambda x, head: softcap_losses(x, head, targets, 15.0).mean(), argnums=(0, 1))(x, head)
    for name, a, b in zip(("x", "head"), by_jax, by_hand):
        print(f"gradient of {name:4} differs by {jnp.abs(a - b).max():.1e}; its values reach {jnp.abs(a).max():.1e}")

# %% [markdown]
# ## Optimizer and learning rate schedule
#
# [AdamW](https://arxiv.org/abs/1711.05101) with a trapezoid for the learning rate: linear warmup, constant, linear
# warmdown. The loss falls clearly once more in the warmdown. Weight decay applies to the matrices, not to the embedding
# (a rare token's row would shrink between its occurrences) nor to the scalars. The head learns at four times the rate
# of the other weights: the two want different rates, and one rate for both cost the demo 0.04 bits per byte
# (docs/recipe.md).
#
# Each number of the schedule is a traced scalar in the train state. `hours` and `credits` assume the trapezoid: with
# another schedule, set `num_iterations`. The weights that AdamW updates (*masters*) and the moments are float32. The
# forward pass reads a bfloat16 copy of the matrices, which `cast_weights` makes once a step.


# %% Schedule tags=["shared"]
class TrainState(NamedTuple):
    """All that a step changes. It is donated: the new state takes the old one's memory."""

    step: jax.Array  # int32, optimizer steps done
    params: dict  # float32 masters
    mu: dict  # first moment, float32
    nu: dict  # second moment, float32
    hyper: dict  # the schedule's float32 scalars: the step reads them without being compiled for them


def hyperparams(config):
    """Returns the free optimization fields of config as float32 scalars, numpy."""
    total = config.total_steps
    values = {
        "learning_rate": config.learning_rate, "weight_decay": config.weight_decay, "beta1": config.beta1,
        "beta2": config.beta2, "eps": config.eps, "final_lr_frac": config.final_lr_frac, "total_steps": total,
        "warmup_steps": round(config.warmup_ratio * total), "warmdown_steps": round(config.warmdown_ratio * total),
    }  # fmt: skip
    return {name: np.array(value, np.float32) for name, value in values.items()}


def scheduled_lr(hyper, step):
    """Returns the learning rate of step 0, 1, …: linear warmup, constant, linear warmdown to final_lr_frac of it."""
    up = (step + 1) / jnp.maximum(hyper["warmup_steps"], 1)
    down = (hyper["total_steps"] - step) / jnp.maximum(hyper["warmdown_steps"], 1)
    frac = hyper["final_lr_frac"]
    return hyper["learning_rate"] * jnp.minimum(jnp.minimum(up, 1), frac + (1 - frac) * jnp.clip(down, 0, 1))


# %% Try it: the schedule tags=["run"]
if IN_NOTEBOOK:
    hyper = hyperparams(tiny.replace(num_iterations=20, warmup_ratio=0.2, final_lr_frac=0.1))
    for step in range(0, 20, 2):
        rate = float(scheduled_lr(hyper, step))
        print(f"step {step:2} {rate:.1e} " + "█" * round(1e5 * rate))


# %% Adam tags=["shared"]
def adam_direction(hyper, t, mu, nu):
    """Returns Adam's bias-corrected update, before the learning rate, from the moments after update t = 1, 2, …."""
    return (mu / (1 - hyper["beta1"] ** t)) / (jnp.sqrt(nu / (1 - hyper["beta2"] ** t)) + hyper["eps"])


# %% Optimizer tags=["shared"]
HEAD_RATE = 4  # the head's learning rate over config.learning_rate


def rate_share(path):
    """Returns the learning rate of a parameter over config.learning_rate."""
    return HEAD_RATE if part_of(path) == "lm_head" else 1


def is_decayed(path, p):
    """Whether weight decay applies to parameter p: to matrices, not to the embedding nor to scalars."""
    return p.ndim > 1 and part_of(path) != "embed"


def init_moments(config, params):
    """Returns the moments before the first update, float32."""
    return jax.tree.map(jnp.zeros_like, (params, params))


def update_params(config, state, grads, learning_rate):
    """Returns (params, mu, nu) after one AdamW update, all float32; grads may be bfloat16."""
    hyper, t = state.hyper, state.step + 1
    b1, b2 = hyper["beta1"], hyper["beta2"]
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
    nu = jax.tree.map(lambda n, g: b2 * n + (1 - b2) * g * g, state.nu, grads)

    def update(path, p, m, n):
        direction = adam_direction(hyper, t, m, n)
        if is_decayed(path, p):
            direction += hyper["weight_decay"] * p
        return p - rate_share(path) * learning_rate * direction

    return jax.tree_util.tree_map_with_path(update, state.params, mu, nu), mu, nu


# %% Train state tags=["shared"]
@jax.jit
def new_state(config, key_data, hyper):
    """Returns the TrainState before step 0, sharded as it stays."""
    params = init_params(config, jax.random.wrap_key_data(key_data, impl="threefry2x32"))
    state = shard_weights(config, (params, *init_moments(config, params)))
    return TrainState(constrain(config, jnp.zeros((), jnp.int32)), *state, hyper)


def seed_and_hyper(config):
    """Returns the arguments of new_state: the seed and the schedule are free, so they are arrays."""
    return np.asarray(jax.random.key_data(jax.random.key(config.seed, impl="threefry2x32"))), hyperparams(config)


def init_train_state(config):
    """Returns the TrainState before step 0, on the devices."""
    return new_state(config, *put(config, seed_and_hyper(config)))


def state_shapes(config):
    """Returns the TrainState as jax.ShapeDtypeStructs: no arrays, no devices."""
    return jax.eval_shape(new_state, config, *seed_and_hyper(config))


def put(config, tree, *spec):
    """Returns arrays that are equal on all processes as jax.Arrays on the devices, sharded by `spec`."""
    if config.devices == 1:
        return jax.device_put(tree)
    place = sharding(config, *spec, mesh=device_mesh(config))
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index]), tree)


# %% Devices of the mesh cellView="form" tags=["shared"]
# @title Devices of the mesh
def arrange(config, devices):
    """Returns the devices of the mesh, np.array [data, fsdp], each group close together in the TPU's torus.

    Raises InputError if there are not as many as config.mesh says.
    """
    require(len(devices) == config.devices, "mesh", config.mesh_shape, f"there are {len(devices)} devices")
    return mesh_utils.create_device_mesh(config.mesh_shape, list(devices), allow_split_physical_axes=True)


def device_mesh(config):
    """Returns the Mesh of this job's devices. Raises InputError if there are too few, or if a host has none."""
    count = jax.device_count()
    enough = config.devices <= count if jax.process_count() == 1 else config.devices == count
    require(enough, "mesh", config.mesh, f"is of {config.devices} devices, and here are {count}")
    return jax.sharding.Mesh(arrange(config, jax.devices()[: config.devices]), ("data", "fsdp"))


# %% [markdown]
# ## Train step
#
# The weights are cast once, before the microbatches. Gradients of several microbatches are added in float32. The state
# is donated, so parameters and moments are updated in place. The function below *is* the compiled one:
# `train_step.lower(...)` gives its program. Clipping and skipping are off by default because they cost time: both need
# the norm of the whole gradient before the first weight is updated. Without them XLA updates a weight in the matmul
# that makes its gradient.


# %% Train step tags=["shared"]
def loss_and_grads(config, weights, tokens, targets):
    """Returns the mean loss and the gradients of A microbatches. tokens, targets: int32 [A, B, T]."""
    value_and_grad = jax.value_and_grad(functools.partial(loss_fn, config))
    n = config.grad_accum_steps
    if n == 1:
        loss, grads = value_and_grad(weights, tokens[0], targets[0])
        return loss, shard_weights(config, grads)

    def add_microbatch(total, batch):
        loss, grads = value_and_grad(weights, *batch)
        new = loss, shard_weights(config, grads)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, new), None

    zeros = shard_weights(config, jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights))
    total, _ = jax.lax.scan(add_microbatch, (jnp.zeros((), jnp.float32), zeros), (tokens, targets))
    return jax.tree.map(lambda x: x / n, total)


def global_norm(tree):
    """Returns the square root of the sum of all squares, float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


@functools.partial(jax.jit, donate_argnames="state")
def train_step(config, state, tokens, targets):
    """Returns (the new state, metrics as device scalars) after one optimizer step.

    tokens, targets: int32 [A, B, T], config.batch_shape; on one device also [A·B, T].
    """
    tokens, targets = (x.reshape(config.batch_shape) for x in (tokens, targets))
    weights = cast_weights(config, state.params)
    loss, grads = loss_and_grads(config, weights, tokens, targets)
    with jax.named_scope("optimizer"):
        norm, learning_rate = global_norm(grads), scheduled_lr(state.hyper, state.step)
        if config.grad_clip:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1, config.grad_clip / norm), grads)
        new = update_params(config, state, grads, learning_rate)
        if config.nonfinite == "skip":
            fine, old = jnp.isfinite(loss) & jnp.isfinite(norm), (state.params, state.mu, state.nu)
            new = jax.tree.map(lambda n, o: jnp.where(fine, n, o), new, old)
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate}
    return TrainState(state.step + 1, *shard_weights(config, new), state.hyper), metrics


# %% Try it: overfit one batch tags=["run"]
if IN_NOTEBOOK:
    c = tiny.replace(learning_rate=1e-2, num_iterations=20, warmdown_ratio=0.0)
    batch, losses = jax.random.randint(jax.random.key(1), (*c.batch_shape[:2], 65), 0, c.vocab_size), []
    state = init_train_state(c)
    for _ in range(20):
        state, metrics = train_step(c, state, batch[..., :-1], batch[..., 1:])
        losses.append(float(metrics["loss"]))
    for i in range(0, 20, 3):
        print(f"step {i:2} {losses[i]:.3f} " + "█" * round(8 * losses[i]))

# %% [markdown]
# ### Weight and update norms
#
# How large are the weights of each part (`param_norm`), and how far did the last step move them (`update_norm`)? A
# sudden change of the second over the first is the first sign of trouble; in the demo this ratio is 0.002 to 0.02 for
# attention (measured). The update is recomputed from the moments, on logged steps only.


# %% Norms cellView="form" tags=["shared"]
# @title Norms
@jax.jit
def state_norms(state):
    """Returns {'param_norm/attn': …, 'update_norm/attn': …}: of each part after a step, and of the update it made."""
    hyper, learning_rate, squares = state.hyper, scheduled_lr(state.hyper, state.step - 1), collections.Counter()
    leaves = (jax.tree.leaves(tree) for tree in (state.mu, state.nu))
    for (path, p), m, n in zip(jax.tree_util.tree_leaves_with_path(state.params), *leaves, strict=True):
        rate = rate_share(path) * learning_rate
        decay = rate * hyper["weight_decay"] if is_decayed(path, p) else 0.0
        step = rate * adam_direction(hyper, state.step, m, n)
        update = step + decay * (p + step) / (1 - decay)  # p + update is what the weight was
        squares[f"param_norm/{part_of(path)}"] += jnp.sum(jnp.square(p))
        squares[f"update_norm/{part_of(path)}"] += jnp.sum(jnp.square(update))
    return {name: jnp.sqrt(value) for name, value in squares.items()}


# %% [markdown]
# ## Data
#
# Documents become one endless stream of tokens, each document opened by BOS. The stream is cut every T tokens; targets
# are the same stream, one token later. So every token is predicted once, none is dropped or padded. Attention is not
# masked between documents. **Your own data**: `CHANGES = {"dataset": "mine.csv", "text_column": "body"}` in Part III; a
# dataset is a file, a folder, or a name of the Hub (docs/data.md). Its documents are shuffled in blocks of 1,000; the
# order of a block follows from seed, epoch, shard and number of the block.
#
# Three generators make the batches: `document_groups` reads, `encoded_groups` encodes in threads (tiktoken releases the
# GIL), `packed_batches` cuts. Each batch carries the position of the token after it. A resumed run starts there,
# whatever the threads had read ahead.


# %% Documents tags=["shared"]
PIECE_CHARS = 20_000  # a longer document is encoded in pieces: bounds the latency and memory of one call
GROUP_CHARS = 50_000  # short documents are encoded in groups: a thread's task should be worth its overhead


class Position(NamedTuple):
    """Where a token stands: `offset` tokens into document `row` of training shard `shard`, in epoch `epoch`."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    offset: int = 0


def encode_document(tokenizer, text):
    """Returns BOS and the tokens of `text`, uint32. Special tokens in the text are encoded as ordinary text."""
    pieces = [text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)]
    tokens = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return np.concatenate([np.array([tokenizer.encode_single_token("<|bos|>")], np.uint32), *tokens])


def document_groups(shards, start, process=0, processes=1, shuffle=0, seed=0):
    """Yields lists of (Position, text), forever, about GROUP_CHARS each, and an empty list at the end of each shard.

    `shards` are functions that return a Shard; the next one is called in the background while one is read. `shuffle`:
    each epoch takes the shards in another order, and the documents of a shard in blocks of so many, shuffled.
    Of several processes, each takes every n-th row. Raises InputError if `start` is not in its shard.
    """

    def fetch(place):
        order = np.random.default_rng((seed, place.epoch)).permutation(len(shards)) if shuffle else range(len(shards))
        return in_background(shards[order[place.shard]])

    place, ahead = start, fetch(start)
    while True:
        if ahead.done() and ahead.exception() and place != start:
            ahead = fetch(place)  # it failed ahead of use: a network may have recovered
        shard, last = ahead.result(), place.shard + 1 == len(shards)
        following = Position(place.epoch + last, 0 if last else place.shard + 1)
        ahead, group, chars, documents = fetch(following), [], 0, 0
        for row, text in shuffled(shard, place, shuffle, seed) if shuffle else read_documents(shard, place.row):
            documents += 1
            if row % processes == process:
                group.append((place._replace(row=row, offset=place.offset if row == place.row else 0), text))
                chars += len(text)
            if chars >= GROUP_CHARS:
                yield group
                group, chars = [], 0
        if documents == 0 or (place.row == 0 and documents < processes):
            raise InputError(f"{shard.name}: has no document from row {place.row} on for each of {processes} processes")
        if group:
            yield group
        yield []
        place = following


# %% Encode and pack tags=["shared"]
def encoded_groups(tokenizer, groups, pool, ahead):
    """Yields [(Position, tokens), …] for each group of documents, encoded by the pool, `ahead` groups in advance."""

    def encode(group):
        encoded = [(place, encode_document(tokenizer, text)[place.offset :]) for place, text in group]
        if any(len(tokens) == 0 for _, tokens in encoded):
            raise InputError(f"loader position {group[0][0]}: the document has fewer tokens; was the shard changed?")
        return encoded

    pending = collections.deque()
    for group in groups:
        if group:
            pending.append(pool.submit(encode, group))
        # At the end of a shard nothing is held back: the next shard may not be there yet.
        while len(pending) > (ahead if group else 0):
            yield pending.popleft().result()


def packed_batches(groups, shape):
    """Yields [(tokens, targets, Position of the token after), …], int32 of `shape`: the batches a group completes.

    Raises InputError if a batch would hold all documents and more."""
    n, held, parts = math.prod(shape), 0, collections.deque()
    for group in groups:
        parts.extend(group)
        held += sum(len(tokens) for _, tokens in group)
        if held <= n and parts[-1][0].epoch - parts[0][0].epoch > 1:
            raise InputError(f"the documents for training have fewer tokens than a batch, {n:,}; give more text")
        batches = []
        while held > n:  # enough for n inputs and the target of the last
            taken, left = [], n
            while len(parts[0][1]) <= left:
                taken.append(parts.popleft()[1])
                left -= len(taken[-1])
            place, tokens = parts[0]
            stream = np.concatenate([*taken, tokens[: left + 1]]).astype(np.int32)
            parts[0] = (place._replace(offset=place.offset + left), tokens[left:])
            held -= n
            batches.append((stream[:-1].reshape(shape), stream[1:].reshape(shape), parts[0][0]))
        if batches:
            yield batches


# %% Try it: a packed row tags=["run"]
if IN_NOTEBOOK:
    one_byte_each = tiktoken.Encoding(
        "bytes", pat_str=r"(?s:.)", mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={"<|bos|>": 256}
    )
    texts = ["A document.", "Another one, which goes on in the next row.", "The last."]
    group = [(Position(row=row), encode_document(one_byte_each, text)) for row, text in enumerate(texts)]
    tokens, targets, place = next(packed_batches([group], (2, 32)))[0]
    for name, rows in (("tokens", tokens), ("targets", targets)):
        print(*(f"{name:8} {one_byte_each.decode(row).replace('<|bos|>', '▮')}" for row in rows), sep="\n")
    print("the next batch begins with", place)

# %% [markdown]
# ### The loader
#
# A thread runs the generators and puts batches on the devices, a few steps ahead of the training loop.


# %% Loader tags=["shared"]
class PrefetchDataLoader:
    """Iterates over (tokens, targets), int32 [A, B, T] on the devices, made ahead of use in background threads.

    `shards`: functions that return a Shard, as list_shards gives them. An exception in a thread is raised by
    `next(loader)`. `wait_seconds`: how long next() has waited. Use the loader in a `with` block, or call close().
    """

    def __init__(self, config, tokenizer, shards, *, threads=None, depth=4, process=None, processes=None):
        self.config, self.tokenizer, self.shards = config, tokenizer, shards
        self.threads, self.depth, self.wait_seconds = threads or os.cpu_count(), depth, 0.0
        self.process = jax.process_index() if process is None else process
        self.processes = processes or jax.process_count()
        A, B, T = config.batch_shape
        rule = f"must give each of {self.processes} processes as many sequences"
        require(B % self.processes == 0, "device_batch_size", config.device_batch_size, rule)
        self.shape = A, B // self.processes, T  # of the part of a batch that this process makes
        self._start(Position())

    def _start(self, position):
        self.position = position  # of the next token
        self.ready, self.queue, self.stopping = collections.deque(), queue.Queue(self.depth), threading.Event()
        work = position, self.queue, self.stopping
        self.thread = threading.Thread(target=self._produce, args=work, daemon=True)
        self.thread.start()

    def _produce(self, start, batches, stopping):
        def hand_over(item):
            while not stopping.is_set():
                with contextlib.suppress(queue.Full):
                    return batches.put(item, timeout=0.1)

        pool = concurrent.futures.ThreadPoolExecutor(self.threads)
        try:
            how = self.process, self.processes, self.config.shuffle_block, self.config.seed
            groups = document_groups(self.shards, start, *how)
            for made in packed_batches(encoded_groups(self.tokenizer, groups, pool, 2 * self.threads), self.shape):
                # One transfer for all that is ready: with one for each, small batches were half as fast.
                arrays = put_local(self.config, [(tokens, targets) for tokens, targets, _ in made], None, ROWS)
                hand_over([(*pair, place) for pair, (*_, place) in zip(arrays, made, strict=True)])
                if stopping.is_set():
                    break
        except BaseException as error:
            hand_over(error)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def __iter__(self):
        return self

    def __next__(self):
        if self.stopping.is_set():
            raise RuntimeError("the loader is closed")
        if not self.ready:
            started = time.perf_counter()
            item = self.queue.get()
            self.wait_seconds += time.perf_counter() - started
            if isinstance(item, BaseException):
                self.queue.put(item)  # the next call raises it, too
                raise item
            self.ready.extend(item)
        tokens, targets, self.position = self.ready.popleft()
        return tokens, targets

    def state_dict(self):
        """Returns the position of the next token, for JSON; of several processes a list. All processes call it."""
        places = [Position(*place)._asdict() for place in all_gather(np.array([self.position], np.int32)).tolist()]
        return places[0] if len(places) == 1 else {"processes": places}

    def load_state_dict(self, state):
        """Continues from a state_dict. With another number of processes some documents are read again, or left out.

        Raises InputError if it is not a position in these shards.
        """
        places = state.get("processes", [state]) if isinstance(state, dict) else [state]
        try:
            positions = [Position(**place) for place in places]
            valid = all(type(n) is int and n >= 0 for place in positions for n in place) and positions
        except TypeError:
            valid = False
        if not valid or any(place.shard >= len(self.shards) for place in positions):
            raise InputError(f"loader position {state}: not one in {len(self.shards)} training shards")
        self.close()
        if len(positions) == self.processes:
            return self._start(positions[self.process])
        lowest = min(positions)._replace(offset=0)
        print(f"data    resumed by {self.processes} processes after {len(positions)}: some documents are read again")
        self._start(lowest)

    def close(self):
        """Stops the threads. Batches that were ready are dropped; the position stays."""
        self.stopping.set()
        self.thread.join(timeout=0.5)  # a download may stand still: the thread dies with the process

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


# %% [markdown]
# ## Evaluate
#
# Nats per token depend on the tokenizer. **Bits per byte** can be compared between tokenizers: the total cost of the
# validation text in bits over its length in bytes. 8 is no compression. BOS stands for no byte, but predicting it costs
# bits, and they are counted. The validation shard is printed when a run starts, and is never trained on.


# %% Evaluate tags=["shared"]
def validation_batches(config, tokenizer, shard, max_tokens=-1):
    """Returns [(tokens, targets, bytes of each target)] of a shard, int32 [B, T], padded by targets of −1."""
    _, B, T = config.batch_shape
    stream, held = [], 0
    for _, text in read_documents(shard):
        stream.append(encode_document(tokenizer, text))
        held += len(stream[-1])
        if 0 <= max_tokens < held:
            break
    stream = np.concatenate(stream).astype(np.int32)[: None if max_tokens == -1 else max_tokens + 1]
    count = len(stream) - 1
    padded = math.ceil(count / (B * T)) * B * T
    tokens, targets = np.zeros(padded, np.int32), np.full(padded, -1, np.int32)
    tokens[:count], targets[:count] = stream[:-1], stream[1:]
    n_bytes = np.where(targets < 0, 0, token_bytes(tokenizer)[targets])
    return list(zip(*(x.reshape(-1, B, T) for x in (tokens, targets, n_bytes)), strict=True))


evaluation_weights = jax.jit(cast_weights)  # once for all batches


@jax.jit
def evaluation_step(config, params, tokens, targets):
    """Returns the summed loss at each position, nats, float32 [T], and of each target, [B, T]; 0 where it is −1."""
    losses = jnp.where(targets < 0, 0, token_losses(config, params, tokens, jnp.maximum(targets, 0)))
    return constrain(config, losses.sum(axis=0)), constrain(config, losses)


def evaluate(config, params, batches):
    """Returns {'loss': nats per token, 'bpb': bits per byte, 'by_position': loss at each position, [T]} on batches of
    validation_batches."""
    weights, sums = evaluation_weights(config, params), []
    for tokens, targets, _ in batches:
        sums.append(evaluation_step(config, weights, *put(config, (tokens, targets), ROWS))[0])
        # Two in flight keep the device busy, and a stop request waits for no more. (39 deadlocked several CPU devices.)
        jax.block_until_ready(sums[-2:][0])
    nats = sum(x.astype(np.float64) for x in jax.device_get(sums))
    count = sum((targets >= 0).sum(axis=0) for _, targets, _ in batches)
    n_bytes = sum(int(lengths.sum()) for *_, lengths in batches)
    by_position = np.where(count, nats / np.maximum(count, 1), np.nan)
    return {"loss": nats.sum() / count.sum(), "bpb": nats.sum() / math.log(2) / n_bytes, "by_position": by_position}


# %% [markdown]
# ## Sampling with a KV cache
#
# One compiled loop serves all prompts of a batch size. At each position the model reads one token, appends its keys and
# values to the KV cache, and predicts the next. There is no separate prefill: inside the prompt, the prompt's next
# token replaces the prediction. Temperature 0 takes the likeliest token. Else one of the `top_k` likeliest is drawn, of
# which only as many stay as make up `top_p` of the probability ([nucleus sampling](https://arxiv.org/abs/1904.09751)).


# %% Decode tags=["shared"]
def decode_token(config, weights, cache, tokens, position):
    """Returns (logits [B, V] after tokens [B, T] at `position`, the KV cache with them: a pair [B·K, T, H] a layer)."""
    T = config.seq_len
    cos, sin = (jax.lax.dynamic_slice_in_dim(table, position, 1) for table in rope_tables(T, config.head_dim))
    x = x0 = embed(config, weights, tokens[:, position])
    s, new_cache = jnp.arange(T), []
    for layer, window, (keys, values) in zip(weights["layers"], config.windows, cache, strict=True):
        x = mix_residual(layer, x, x0)
        q, k, v = (split_heads(y, 1, config.head_dim) for y in project_qkv(layer, x))
        q, k = norm_and_rope(q, cos, sin), norm_and_rope(k, cos, sin)
        # With B and K as two axes the loop copied the cache: 2.1 times the time (CPU, measured).
        k, v = (y.reshape(-1, 1, config.head_dim) for y in (k, v))
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k, position, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, v, position, axis=1)
        new_cache.append((keys, values))
        q = q.reshape(k.shape[0], -1, config.head_dim)  # [B·K, N/K, H]
        scores = jnp.einsum("ngh,nsh->ngs", q, keys, preferred_element_type=jnp.float32) * config.head_dim**-0.5
        seen = (s <= position) & (position - s <= window)
        probs = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(values.dtype)
        y = jnp.einsum("ngs,nsh->ngh", probs, values).reshape(x.shape[0], -1)
        x = x + project_out(layer, y)
        x = x + mlp(layer, x)
    return lm_head(config, weights, x), new_cache


# %% Sample tags=["shared"]
def pick_token(key, logits, temperature, top_k, top_p):
    """Draws ids [B] from logits [B, V] over the temperature, among the top_k likeliest, and of these among the smallest
    set whose probability reaches top_p. Temperature 0 takes the likeliest."""

    def draw():
        scaled = logits / temperature
        ordered = -jnp.sort(-scaled, axis=-1)
        probs = jax.nn.softmax(jnp.where(jnp.arange(logits.shape[-1]) < top_k, ordered, -jnp.inf), axis=-1)
        kept = jnp.sum((jnp.cumsum(probs, axis=-1) - probs < top_p) & (probs > 0), axis=-1, keepdims=True)
        least = jnp.take_along_axis(ordered, kept - 1, axis=-1)
        return jax.random.categorical(key, jnp.where(scaled < least, -jnp.inf, scaled))

    return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1)).astype(jnp.int32)


@jax.jit
def sample_tokens(config, params, tokens, lengths, end, stop, key, temperature, top_k, top_p):
    """Continues prompts of `lengths` [B] in tokens [B, T], each to position `end` [B] or its first `stop` token."""
    weights = gather_weights(config, cast_weights(config, params))
    shape = (tokens.shape[0] * config.kv_heads, config.seq_len, config.head_dim)
    cache = [(jnp.zeros(shape, config.compute_dtype),) * 2 for _ in range(config.depth)]

    def unfinished(carry):
        position, _, _, done = carry
        return (position + 1 < jnp.max(end)) & ~jnp.all(done)

    def step(carry):
        position, tokens, cache, done = carry
        logits, cache = decode_token(config, weights, cache, tokens, position)
        following = pick_token(jax.random.fold_in(key, position), logits, temperature, top_k, top_p)
        in_prompt = position + 1 < lengths
        following = jnp.where(in_prompt, tokens[:, position + 1], jnp.where(done, stop, following))
        done = done | (((following == stop) | (position + 2 >= end)) & ~in_prompt)
        return position + 1, tokens.at[:, position + 1].set(following), cache, done

    start = (jnp.zeros((), jnp.int32), tokens, cache, jnp.zeros(tokens.shape[0], bool))
    return constrain(config, jax.lax.while_loop(unfinished, step, start)[1])


# %% Generate tags=["shared"]
def generate(
    config, params, tokenizer, prompt, *, max_new_tokens=128, temperature=0.8, top_k=50, top_p=1.0, seed=0, speed=False
):
    """Returns the prompt and its continuation, up to BOS or max_new_tokens. A list of prompts runs as one batch.

    BOS, the prompt and the new tokens must fit the T tokens of the context, else InputError. `speed` prints tokens/s.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    require(prompts, "prompt", prompt, "must be a text, or a list of at least one")
    require(max_new_tokens > 0, "max_new_tokens", max_new_tokens, "must be positive")
    require(temperature >= 0, "temperature", temperature, "must not be negative")
    require(top_k > 0, "top_k", top_k, "must be positive")
    require(0 < top_p <= 1, "top_p", top_p, "must be above 0 and at most 1")
    started, stop = time.perf_counter(), tokenizer.encode_single_token("<|bos|>")
    ids = [[stop, *tokenizer.encode_ordinary(text)] for text in prompts]
    longest, T = max(map(len, ids)), config.seq_len
    rule = f"must be at most {T - longest}: the prompt takes {longest} of the context's {T} tokens"
    require(longest + max_new_tokens <= T, "max_new_tokens", max_new_tokens, rule)
    tokens = np.array([row + [stop] * (T - len(row)) for row in ids], np.int32)
    lengths = np.array([len(row) for row in ids], np.int32)
    out = sample_tokens(
        config, params, tokens, lengths, lengths + np.int32(max_new_tokens), stop,
        jax.random.key(seed, impl="threefry2x32"),
        np.float32(temperature), np.int32(min(top_k, config.vocab_size)), np.float32(top_p),
    )  # fmt: skip
    new = [row[n : n + max_new_tokens].tolist() for row, n in zip(np.asarray(out), lengths, strict=True)]
    new = [list(itertools.takewhile(lambda token: token != stop, row)) for row in new]
    if speed:
        count, seconds = sum(map(len, new)), time.perf_counter() - started
        print(f"{count:,} new tokens in {seconds:.1f} s: {count / seconds:,.0f} tok/s; the first call compiles")
    texts = [
        text + tokenizer.decode([token for token in row if token < tokenizer.n_vocab])
        for text, row in zip(prompts, new, strict=True)
    ]
    return texts[0] if isinstance(prompt, str) else texts


# %% Try it: the KV cache against the forward pass tags=["run"]
if IN_NOTEBOOK:
    exact = tiny.replace(compute_dtype="float32")
    noisy = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape), params)
    logits, cache = forward(exact, noisy, tokens := jnp.arange(64)[None]), [(jnp.zeros((2, 64, 32)),) * 2] * exact.depth
    for t in range(8):
        step, cache = decode_token(exact, noisy, cache, tokens, t)
        print(f"position {t}: differs by {jnp.abs(step - logits[:, t]).max():.1e} of {jnp.abs(step).max():.1f}")
    print(repr(generate(tiny, params, one_byte_each, "An untrained model babbles:", max_new_tokens=30)))

# %% [markdown]
# ## Training loop
#
# The host takes a ready batch, dispatches a step, and goes on. **Metrics are read one log interval late**: while the
# host waits for the loss of step 90, later steps are queued, at most a second's worth, so the device never waits. When
# that loss arrives, step 90 is done; throughput is measured between two such moments. Only an evaluation, a sample, a
# save, a trace or a new plan for a budget lets the queue run empty. That time is not counted as training.
#
# `Training` (Part II) is all that surrounds the loop: data, run folder, log, checkpoints, trace. Between steps
# `training.state` is whole: whatever is raised there, `Training` saves it first.


# %% Train tags=["shared"]
def due(step, interval):
    """Whether `step` is a multiple of `interval`; never if that is 0."""
    return interval > 0 and step % interval == 0


def train(config, report=None):
    """Trains from the start, or from the newest checkpoint of an unfinished run. Returns the final metrics, a dict.

    `report(step, values)` gets each line of metrics.jsonl; what it raises ends the training. SIGTERM, SIGHUP and SIGINT
    end it after the running step; `stopped` in the result names the signal. Whatever is raised, the state is saved
    before it leaves this function.
    """
    with Training(config, report) as training:
        training.work()  # what the run that is resumed has left undone after its last step
        for step in training.steps():
            training.trace(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                tokens, targets = training.next_batch(step)
                training.state, metrics = train_step(training.config, training.state, tokens, targets)
            training.todo = work_after(training.config, step + 1)
            training.log_step(step, metrics)
            training.work()
        training.finish()
    return training.summary


# %% [markdown]
# # Part II: infrastructure
#
# The model and the optimizer are complete. What they need around them follows, each cell collapsed behind its title.

# %% [markdown]
# ## The fused attention kernel
#
# The library kernels must serve every model. This model allows more. QK-norm gives queries and keys of length √H, so a
# score, q·k/√H, never exceeds √H = 11.3 (H = 128): the softmax needs no running maximum, and no sum is rescaled. At T =
# 2048 all keys and values of a head fit the chip's vector memory (VMEM, 128 MiB): a tile of queries meets all its keys
# at once, without a loop over blocks. The kernel also does what precedes attention: it reads the projections as the
# matmuls leave them, `[B·T, N·H]`, normalizes and rotates a head (x·[c, c] + roll(x, H/2)·[−s, s]), and writes its
# result in the same form. XLA would copy for these steps: half a head is half a register wide.
#
# One kernel runs forward, one backward, a program for each head of a sequence. Between them only the kernels' inputs
# and outputs are kept, and for each row the log of its sum of exponentials. The backward kernel computes the scores
# again, transposed (keys × queries), so that a query's statistics are a row of lanes; only dq needs a transpose. On a
# v6e the reference needs 0.44 ms a layer, and 1.1 ms with splash and XLA's copies (estimated by the compiler; LOG.md).

# %% Fused attention: arithmetic cellView="form" tags=["shared"]
# @title Fused attention: arithmetic
VMEM_LIMIT = 64 * 2**20  # bytes that a program may use of a chip's 128 MiB


def query_tiles(T, size, window):
    """Returns [(rows, keys)]: slices of at most `size` queries, and of the keys, in tiles of 128, that they see."""
    size = next(s for s in (size, 256, 128) if T % s == 0)
    return [(slice(t, t + size), slice(max(0, t - window) // 128 * 128, t + size)) for t in range(0, T, size)]


def visible(rows, keys, window, query_axis):
    """Returns the mask, bool [rows, keys], or [keys, rows] where query_axis is 1: a query at t sees t − window … t."""
    queries, others = rows.stop - rows.start, keys.stop - keys.start
    shape = (queries, others) if query_axis == 0 else (others, queries)
    t = rows.start + jax.lax.broadcasted_iota(jnp.int32, shape, query_axis)
    s = keys.start + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
    return (s <= t) & (t - s <= window)


def contract(a, b, axis_a, axis_b):
    """Returns the matmul over an axis of each, float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def rotate(x, cos, sin):
    """Rotates the pairs (x[i], x[i + H/2]) of x [t, H] by cos = [c, c] and sin = [−s, s]; −sin rotates back."""
    return x * cos + pltpu.roll(x, x.shape[-1] // 2, 1) * sin


def normalize_and_rotate(x, cos, sin):
    """Returns norm_and_rope of x [t, H], float32, and 1/rms(x) [t, 1]."""
    x = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return rotate(x * inverse, cos, sin), inverse


def gradient_before(g, rotated, inverse, cos, sin):
    """Returns the gradient of x from g, that of `rotated`, both of normalize_and_rotate(x)."""
    return inverse * rotate(g - rotated * jnp.mean(g * rotated, axis=-1, keepdims=True), cos, -sin)


def fold_lanes(x):
    """Sums [t, n·128] to [t, 128]: one sum across lanes is left."""
    return sum(x[:, i : i + 128] for i in range(0, x.shape[1], 128))


def wide_tables(T, H):
    """Returns rope_tables as `rotate` takes them: [c, c] and [−s, s], float32 [T, H]."""
    cos, sin = rope_tables(T, H)
    return np.concatenate([cos, cos], axis=1), np.concatenate([-sin, sin], axis=1)


# %% Fused attention: kernels cellView="form" tags=["shared"]
# @title Fused attention: kernels
def forward_kernel(q_ref, k_ref, v_ref, cos_ref, sin_ref, y_ref, lse_ref, keys_ref, *, window, group):
    """One head of one sequence. q, k, v, y: [T, H]; lse: [1, 1, T]; keys: VMEM for the rotated keys."""
    T, H = q_ref.shape

    def rotate_keys(rows):
        keys_ref[rows] = normalize_and_rotate(k_ref[rows], cos_ref[rows], sin_ref[rows])[0].astype(k_ref.dtype)

    if group > 1:  # the first query head rotates the keys for its group
        pl.when(pl.program_id(2) == 0)(lambda: rotate_keys(slice(0, T)))
    for rows, keys in query_tiles(T, 256, window):
        if group == 1:  # beside the matmuls: as a step of its own it would cost 5 to 11% (estimated)
            rotate_keys(rows)
        q = normalize_and_rotate(q_ref[rows], cos_ref[rows], sin_ref[rows])[0] * H**-0.5
        scores = contract(q.astype(k_ref.dtype), keys_ref[keys], 1, 1)
        p = jnp.where(visible(rows, keys, window, 0), jnp.exp(scores), 0)
        y, sums = contract(p.astype(v_ref.dtype), v_ref[keys], 1, 0), fold_lanes(p)
        y_ref[rows] = (y / jnp.sum(sums, axis=1, keepdims=True)).astype(y_ref.dtype)
        lse_ref[0, :, rows] = jnp.log(jnp.sum(sums.T, axis=0, keepdims=True))


def backward_kernel(
    q_ref, k_ref, v_ref, y_ref, g_ref, lse_ref, cos_ref, sin_ref, dq_ref, dk_ref, dv_ref, keys_ref, dk_sum, dv_sum,
    *, window, group,
):  # fmt: skip
    """The gradients dq, dk, dv [T, H] of the forward kernel's inputs from g, that of y. `…_sum`: float32 VMEM."""
    T, H = q_ref.shape
    tiles = query_tiles(T, 512, window)

    def rotate_keys(rows):
        keys_ref[rows] = normalize_and_rotate(k_ref[rows], cos_ref[rows], sin_ref[rows])[0].astype(k_ref.dtype)
        dk_sum[rows] = dv_sum[rows] = jnp.zeros((rows.stop - rows.start, H), jnp.float32)

    def finish_keys():
        for rows, _ in tiles:
            rotated = normalize_and_rotate(k_ref[rows], cos_ref[rows], sin_ref[rows])
            dk_ref[rows] = gradient_before(dk_sum[rows], *rotated, cos_ref[rows], sin_ref[rows]).astype(dk_ref.dtype)
            dv_ref[rows] = dv_sum[rows].astype(dv_ref.dtype)

    if group > 1:
        pl.when(pl.program_id(2) == 0)(lambda: rotate_keys(slice(0, T)))
    for rows, keys in tiles:
        if group == 1:
            rotate_keys(rows)
        cos, sin, g, k = cos_ref[rows], sin_ref[rows], g_ref[rows], keys_ref[keys]
        rotated, inverse = normalize_and_rotate(q_ref[rows], cos, sin)
        q = (rotated * H**-0.5).astype(k.dtype)
        p = jnp.where(visible(rows, keys, window, 1), jnp.exp(contract(k, q, 1, 1) - lse_ref[0, :, rows]), 0)
        dv_sum[keys] += contract(p.astype(g.dtype), g, 1, 0)
        gy = fold_lanes(g.astype(jnp.float32) * y_ref[rows].astype(jnp.float32))
        ds = p * (contract(v_ref[keys], g, 1, 1) - jnp.sum(gy.T, axis=0, keepdims=True))
        ds = ds.astype(k.dtype)
        dk_sum[keys] += contract(ds, q, 1, 0)
        dq_ref[rows] = gradient_before(contract(ds, k, 0, 0) * H**-0.5, rotated, inverse, cos, sin).astype(dq_ref.dtype)
    if group > 1:
        pl.when(pl.program_id(2) == group - 1)(finish_keys)
    else:
        finish_keys()


def fused_call(kernel, inputs, outputs, tables, window, scratch):
    """Calls a kernel for each (sequence, key/value head, query head of its group). Arrays are [B·T, N·H or K·H], and
    [B·N, 1, T]; tables [T, H]; `scratch`: the dtypes of [T, H] in VMEM."""
    (T, H), N = tables[0].shape, inputs[0].shape[1] // tables[0].shape[1]
    B, K = inputs[0].shape[0] // T, inputs[1].shape[1] // H
    group = N // K

    def spec(x):
        if x.ndim == 3:
            return pl.BlockSpec((1, 1, T), lambda b, k, i: (b * N + k * group + i, 0, 0))
        if x.shape[1] == N * H:
            return pl.BlockSpec((T, H), lambda b, k, i: (b, k * group + i))
        return pl.BlockSpec((T, H), lambda b, k, i: (b, k))

    table = pl.BlockSpec((T, H), lambda b, k, i: (0, 0))
    call = pl.pallas_call(
        functools.partial(kernel, window=window, group=group), grid=(B, K, group),
        in_specs=[*map(spec, inputs), table, table], out_specs=[*map(spec, outputs)], out_shape=outputs,
        scratch_shapes=[pltpu.VMEM((T, H), dtype) for dtype in scratch], name=f"attention_{kernel.__name__}",
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT),
    )  # fmt: skip
    with jax.named_scope(f"attention_{kernel.__name__}"):  # an old jax names the kernel by its scope, not by `name`
        return call(*inputs, *tables)


# %% Fused attention cellView="form" tags=["shared"]
# @title Fused attention
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def fused_attention(q, k, v, T, H, window):
    """QK-norm, RoPE and causal attention: q [B·T, N·H], k and v [B·T, K·H] → [B·T, N·H]."""
    return fused_forward(q, k, v, T, H, window)[0]


def fused_forward(q, k, v, T, H, window):
    """Returns (y, what the backward pass needs)."""
    lse = jax.ShapeDtypeStruct((q.size // (T * H), 1, T), jnp.float32)
    outputs = fused_call(forward_kernel, (q, k, v), (jax.typeof(q), lse), wide_tables(T, H), window, [k.dtype])
    y, lse = (checkpoint_name(x, "attention") for x in outputs)  # for a remat policy to keep
    return y, (q, k, v, y, lse)


def fused_backward(T, H, window, saved, g):
    """Returns the gradients of q, k and v from g, that of y."""
    q, k, v, y, lse = saved
    outputs, scratch = (jax.typeof(q), jax.typeof(k), jax.typeof(v)), [k.dtype, jnp.float32, jnp.float32]
    return tuple(fused_call(backward_kernel, (q, k, v, y, g, lse), outputs, wide_tables(T, H), window, scratch))


fused_attention.defvjp(fused_forward, fused_backward)

# %% [markdown]
# ## Tokenizer and data files
#
# The tokenizer is byte-level BPE; `01_tokenizer.py` trains and explains it. A dataset is FineWeb-Edu from the Hub, or
# the embedded corpus, 12 MB of public-domain English: parquet files, of which **the last one validates**, whatever
# `num_shards` is. A shard of the Hub counts only when its SHA-256 is the one that names it in the cache. Any other
# dataset is read by [08_data](https://github.com/tpuchat/tpuchat/blob/main/08_data.py), whose Part I is executed here.

# %% Tokenizer format cellView="form" tags=["shared"]
# @title Tokenizer format
# GPT-4's split pattern, but with at most two digits a token: a small vocabulary has no room for 1,000 numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
)  # fmt: skip


def make_tokenizer(ranks, pattern=SPLIT_PATTERN, special_tokens=SPECIAL_TOKENS):
    """Returns a tiktoken.Encoding of `ranks` (bytes → rank, 0 … n-1); the special tokens take the ids from n on."""
    special = {token: len(ranks) + i for i, token in enumerate(special_tokens)}
    return tiktoken.Encoding("tpuchat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def save_tokenizer(tokenizer, folder):
    """Writes tokenizer.tiktoken and then, atomically, tokenizer.json: a folder without the second has no tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = sorted((rank, token) for token, rank in tokenizer._mergeable_ranks.items())
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks]
    (folder / "tokenizer.tiktoken").write_text("".join(lines), encoding="utf-8")
    special = sorted(tokenizer._special_tokens, key=tokenizer._special_tokens.get)
    meta = {"pattern": tokenizer._pat_str, "special_tokens": special}
    (folder / "tokenizer.json.part").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    os.replace(folder / "tokenizer.json.part", folder / "tokenizer.json")


# What a pattern does not match would be lost without a word.
PROBE = "It's  2026 —\r\n\n\tdef f(x): \n  return x! 東京🙂 " + "".join(map(chr, range(0x3000)))


def load_tokenizer(folder):
    """Returns the tokenizer that save_tokenizer wrote. Raises InputError if a file is missing or damaged."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        lines = (folder / "tokenizer.tiktoken").read_text(encoding="utf-8").splitlines()
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in map(str.split, lines)}
        if sorted(ranks.values()) != list(range(len(lines))) or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("the ranks must be 0 … n-1, one a token, with all 256 single bytes among them")
        special = meta["special_tokens"]
        if "<|bos|>" not in special or len(set(special)) < len(special):
            raise ValueError("the special tokens must differ, with <|bos|> among them")
        tokenizer = make_tokenizer(ranks, meta["pattern"], special)
        if tokenizer.decode(tokenizer.encode_ordinary(PROBE)) != PROBE:
            raise ValueError("its pattern leaves characters out")
        return tokenizer
    except BaseException as error:  # tiktoken panics, which is no Exception, if a pattern matches the empty string
        if isinstance(error, KeyboardInterrupt):
            raise
        raise InputError(f"tokenizer in {folder}: {error}; delete the folder to train it anew") from error


def token_bytes(tokenizer):
    """Returns the UTF-8 bytes that each token id stands for, int32 [n_vocab]; special tokens stand for none."""
    lengths = np.zeros(tokenizer.n_vocab, np.int32)
    for token, rank in tokenizer._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


# %% Train a tokenizer cellView="form" tags=["shared"]
# @title Train a tokenizer
def train_tokenizer(texts, vocab_size, max_chars=2_000_000_000, doc_chars=10_000):
    """Returns a byte-level BPE of `vocab_size` tokens, special ones included, trained on at most `max_chars`.

    Only the first `doc_chars` characters of a document count, so that a long one does not outweigh a hundred others.
    Raises InputError if there is too little text.
    """
    import rustbpe

    merges, least = vocab_size - len(SPECIAL_TOKENS), 256 + len(SPECIAL_TOKENS)
    require(vocab_size >= least, "vocab_size", vocab_size, f"must be at least {least}: bytes and specials")

    def stream():
        left = max_chars
        for text in texts:
            text = text[: min(doc_chars, left)]
            left -= len(text)
            yield text
            if left == 0:
                break

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(stream(), merges, buffer_size=1024, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    most = len(ranks) + len(SPECIAL_TOKENS)
    hint = f"this text yields only {most} tokens; set vocab_size={most}, or give more text"
    require(len(ranks) >= merges, "vocab_size", vocab_size, hint)
    return make_tokenizer(ranks)


def tokenizer_folders(config):
    """Returns where the tokenizer of config.dataset may be, the first first: beside local data, and on this machine
    where 01_tokenizer.py saves it."""
    local = None if on_hub(config.dataset) else local_path(config.dataset).resolve()
    name = str(local or config.dataset) + (f":{config.text_column}" if config.text_column != "text" else "")
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]  # two folders may have the same name
    mine = cache_dir() / "tokenizers" / f"{Path(local or config.dataset).name[:40]}-{digest}-{config.vocab_size}"
    return [(local if local.is_dir() else local.parent) / "tokenizer", mine] if local else [mine]


# %% Find the tokenizer cellView="form" tags=["shared"]
# @title Find the tokenizer
def find_tokenizer(config, first_shard):
    """Returns the tokenizer of config.dataset: a local one (beside the shards, or from 01_tokenizer.py), else that of
    the Hub repo config.hf_repo_id, else one trained on `first_shard`, and kept.

    Raises InputError if it has more tokens than the model has rows for.
    """
    folders = tokenizer_folders(config)
    digest = hashlib.sha256(identity(first_shard).encode()).hexdigest()[:8]  # another shard, another tokenizer
    trained = folders[-1].with_name(f"{folders[-1].name}-first-shard-{digest}")
    folder = next((folder for folder in folders if (folder / "tokenizer.json").exists()), None)
    if not folder and config.hf_repo_id:
        with contextlib.suppress(MissingFileError):
            hub_download(config.hf_repo_id, "tokenizer/tokenizer.tiktoken", repo_type="model")
            folder = hub_download(config.hf_repo_id, "tokenizer/tokenizer.json", repo_type="model").parent
    if not folder and not (trained / "tokenizer.json").exists():
        print(f"training a tokenizer of {config.vocab_size} tokens on {Path(first_shard.name).name}", flush=True)
        tokenizer = train_tokenizer(beginning(first_shard, 2**28), config.vocab_size)
        try:
            save_tokenizer(tokenizer, trained)
        except OSError as error:
            hint = "make room, or set the environment variable HOME to a folder that you may write to"
            raise InputError(f"cannot keep the tokenizer in {trained}: {error}; {hint}") from error
    tokenizer = load_tokenizer(folder or trained)
    rule = f"the tokenizer of {config.dataset} has {tokenizer.n_vocab} tokens; set vocab_size to at least that"
    require(tokenizer.n_vocab <= config.vocab_size, "vocab_size", config.vocab_size, rule)
    return tokenizer


# %% Hub cellView="form" tags=["shared"]
# @title Hub
HUB_SHARDS = {"karpathy/fineweb-edu-100b-shuffle": 1823, "karpathy/climbmix-400b-shuffle": 6543}  # the last validates


class MissingFileError(InputError):
    """A repository of the Hub exists, and has no such file."""


class RefusedError(InputError):
    """The Hub asks for a token, or refuses the one that it got: 401 or 403."""


def hub_token():
    """Returns HF_TOKEN, else the token that `hf auth login` has left, else None. Raises InputError on whitespace in
    HF_TOKEN: the HTTP library would print the token."""
    from huggingface_hub import get_token

    token = get_secret("HF_TOKEN")
    if token and not re.fullmatch("[!-~]+", token):
        raise InputError("HF_TOKEN: holds a space, a line end or another character that no token has; copy it again")
    return token or get_token()


def hub_api():
    """Returns huggingface_hub's HfApi with the user's token."""
    from huggingface_hub import HfApi

    return HfApi(token=hub_token())


def cannot_pass(error):
    """Whether a further attempt would fail alike: a package is missing, as for a SOCKS proxy, or a value is wrong."""
    lasting = isinstance(error, ImportError | TypeError | ValueError) and not isinstance(error, json.JSONDecodeError)
    return lasting or type(error).__name__ in ("InvalidURL", "UnsupportedProtocol")


def ask_hub(what, call):
    """Returns call(), tried again after a failure that may pass: no connection, or a server error.

    Raises InputError with the first line of huggingface_hub's own error and one hint: RefusedError on 401 and 403,
    MissingFileError if a repository lacks the file.
    """
    from huggingface_hub import errors

    for pause in (1, 2, 4, 8, 0):  # seconds before the next attempt
        try:
            return call()
        except InputError:
            raise
        except Exception as error:  # huggingface_hub raises its own, those of its HTTP library, and OSError
            # Its client has tried several times before it wraps an error so.
            wrapped = isinstance(error, errors.LocalEntryNotFoundError) or type(error) is ValueError
            cause = error.__cause__ if wrapped and error.__cause__ else error
            status = getattr(getattr(cause, "response", None), "status_code", 0)
            disk = getattr(cause, "errno", 0) in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
            refused = 400 <= status < 500 and status != 429 or isinstance(cause, errors.HFValidationError)
            if pause and cause is error and not (refused or disk or cannot_pass(cause)):
                time.sleep(pause)
                continue
            page = str(getattr(getattr(cause, "response", None), "url", ""))
            page = re.sub(r"(/api)?(/datasets)?/([^/]+/[^/]+)/(resolve|revision|tree)/.*", r"\2/\3", page)
            token = "one is set" if hub_token() else "none is set"
            gated = isinstance(cause, errors.GatedRepoError)
            hints = {
                f"accept its conditions at {page}, and give that account's token: HF_TOKEN ({token})": gated,
                "make room, or set HF_HOME": disk,
                "wait, or set HF_TOKEN: accounts have higher limits": status == 429,
                "check the name, and that HF_TOKEN may read (for an upload: write) it": refused,
                "pip install 'httpx[socks]' for a SOCKS proxy, or unset ALL_PROXY, HF_ENDPOINT": cannot_pass(cause),
                "check the network, or use dataset='embedded'": True,
            }
            hint = next(hint for hint, fits in hints.items() if fits)
            kind = RefusedError if status in (401, 403) else InputError
            kind = MissingFileError if status == 404 and isinstance(cause, errors.EntryNotFoundError) else kind
            raise kind(f"the Hugging Face Hub: cannot {what}: {first_line(cause)}; {hint}") from error


def read_hub(what, call):
    """Returns call(HfApi) by ask_hub; where the Hub refuses the token, without it: public data need none."""
    from huggingface_hub import HfApi, constants

    token = ask_hub(what, hub_token) or False  # False: the client looks for none itself
    source = "HF_TOKEN" if get_secret("HF_TOKEN") else constants.HF_TOKEN_PATH
    try:
        return ask_hub(what, lambda: call(HfApi(token=token)))
    except RefusedError as error:
        if not token:
            raise
        try:
            found = ask_hub(what, lambda: call(HfApi(token=False)))
        except RefusedError:
            raise InputError(f"{error}; the token is that of {source}") from error
        say_once("token", f"data    the Hub refuses the token of {source}; public data is read without it")
        return found


def file_sha256(path):
    """Returns the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path):
    """Whether a file of huggingface_hub's cache has the SHA-256 that names it; small files have none, and count."""
    digest = Path(os.readlink(path)).name if path.is_symlink() else ""
    return len(digest) != 64 or file_sha256(path) == digest


def hub_download(repo_id, filename, repo_type="dataset", revision=None):
    """Returns the local path of a file of the Hub, downloaded if it is absent, and fetched anew if it is damaged."""
    damaged = []

    def download(api):
        # Forced, the client also replaces a file in the store that repositories share.
        options = {"repo_type": repo_type, "revision": revision, "force_download": bool(damaged)}
        path = Path(api.hf_hub_download(repo_id, filename, **options))
        if is_intact(path):
            return path
        damaged.append(path)
        path.resolve().unlink()
        path.unlink()
        raise ConnectionError("the SHA-256 of the file that arrived is not the Hub's")

    return read_hub(f"download {filename} of {repo_id}", download)


def hub_file(repo_id, filename, revision=None):
    """Returns the checked local path of a file of a dataset. One that is in the cache and intact costs no request."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, filename, repo_type="dataset", revision=revision)
    here = isinstance(cached, str) and is_intact(Path(cached))
    return Path(cached) if here else hub_download(repo_id, filename, revision=revision)


# %% Shards cellView="form" tags=["shared"]
# @title Shards
DAMAGED = pa.ArrowException, OSError, UnicodeDecodeError, KeyError  # what pyarrow raises
ALL = (0, 2**32)


class HubFile(NamedTuple):
    """A file of a dataset of the Hub. `oid`: its SHA-256, or git's hash of a small file; '' where it is not known."""

    repo_id: str
    name: str
    revision: str | None = None
    size: int = 0
    oid: str = ""

    def __str__(self):
        return self.name


def parquet_rows(shard, start):
    """Yields (row, text) of a parquet file. A row group, compressed, is in memory."""
    file, row, column = pq.ParquetFile(shard.files[0]), 0, shard.column
    for group in range(file.num_row_groups):
        found = file.metadata.row_group(group)
        stop = row + found.num_rows
        # In batches of 16 MiB: a row group may hold more than the 2 GiB of an Arrow array.
        size = min(4096, 1 + found.num_rows * 2**24 // max(1, found.total_byte_size))
        for batch in file.iter_batches(size, [group], [column]) if stop > start else ():
            texts = batch.column(column).to_pylist()
            yield from enumerate(texts, row)
            row += len(texts)
        if start < stop != row:
            raise OSError(f"row group {group} ends with row {row}")
        row = stop


class Shard(NamedTuple):
    """Documents in a fixed order: the rows of a file, or text files. read_documents reads them from any row on."""

    name: str
    files: tuple  # paths or HubFiles: one, or any number of text files
    column: str = "text"
    separator: str = ""  # between the documents of a text file
    skip_bad_rows: bool = False
    part: tuple = ALL  # [low, high): only texts whose CRC-32 lies there
    reader: Callable = parquet_rows  # (shard, start) → (row, text, or a ValueError that says what is wrong with it), …


def read_documents(shard, start=0):
    """Yields (row, text) from row `start` on. Leaves out empty and null texts, and the other part of a divided file.

    Raises InputError for a damaged file, for a bad row unless `skip_bad_rows`, and if all texts are empty."""
    row, empty, bad, damaged = start - 1, 0, 0, DAMAGED  # a name of its own: at the exit of Python globals are gone
    try:
        for row, text in shard.reader(shard, start):
            if row < start:
                continue
            if isinstance(text, ValueError):
                if not shard.skip_bad_rows:
                    raise InputError(f"{text}; mend it, or set skip_bad_rows")
                say_once("bad", f"data    {text}: skipped")
                bad += 1
            elif not text:
                empty += 1
            elif shard.part == ALL or shard.part[0] <= zlib.crc32(text.encode()) < shard.part[1]:
                yield row, text
    except damaged as error:
        what = f"{shard.name}: cannot be read from row {row + 1:,} on: {first_line(error)}"
        raise InputError(f"{what}; if it is damaged, get it again") from error
    if start == 0 and empty + bad == row + 1:
        raise InputError(f"{shard.name}: none of its {row + 1:,} rows has a text; leave it out")
    if bad:
        say_once(("bad", shard.name), f"data    {bad:,} bad rows of {shard.name} were skipped")
    if empty:
        say_once("empty", f"data    {empty:,} of {row + 1:,} documents of {Path(shard.name).name} are empty: skipped")


def shuffled(shard, place, size, seed):
    """Yields (row, text) as read_documents does, the documents of each block of `size` rows in an order of its own."""
    start = place.row // size * size
    for block, rows in itertools.groupby(read_documents(shard, start), lambda document: document[0] // size):
        texts, rng = [text for _, text in rows], np.random.default_rng((seed, place.epoch, place.shard, block))
        drawn = enumerate(rng.permutation(len(texts)).tolist(), block * size)
        yield from ((row, texts[source]) for row, source in drawn if row >= place.row)
        del texts  # before the next block is read


def beginning(shard, chars=2**24, least=20):
    """Yields the first texts of a shard: up to so many characters, but `least` texts."""
    left = chars
    for count, (_, text) in enumerate(read_documents(shard), 1):
        yield text
        left -= len(text)
        if left < 0 and count >= least:
            return


def on_hub(dataset):
    """Whether `dataset` is one of the Hub: neither 'embedded' nor a file or folder."""
    return dataset in HUB_SHARDS or not (dataset == "embedded" or os.path.exists(os.path.expanduser(dataset)))


def local_path(dataset):
    """Returns the file or folder of a dataset that is not on the Hub."""
    return embedded_folder() if dataset == "embedded" else Path(dataset).expanduser().absolute()


def find_here(name, above=False):
    """Returns a file of our repository: beside this file or the script, in the working folder or above it; or None."""
    names = globals()  # of this file: Python, VS Code and Jupyter each have one
    here = names.get("__file__") or names.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME", "notebook")
    beside = [Path(file).resolve().parent for file in (here, sys.argv[0])]
    places = *beside, Path.cwd(), *(Path.cwd().parents if above else ())
    return next((place / name for place in places if (place / name).exists()), None)


def fetch_ours(name, hint):
    """Returns the bytes of a file of our repository, from GitHub. Raises InputError with a hint."""
    url = f"https://raw.githubusercontent.com/{GITHUB}/main/{name}"
    try:
        return urllib.request.urlopen(url, timeout=30).read()
    except (OSError, ValueError) as error:
        hint = f"start in a clone of https://github.com/{GITHUB}, or {hint}"
        raise InputError(f"cannot get {url}: {error}; {hint}") from error


def embedded_folder():
    """Returns data/embedded: here, else fetched from GitHub."""
    if found := find_here("data/embedded/tokenizer/tokenizer.json", above=True):
        return found.parents[1]
    folder = cache_dir() / "embedded"
    names = [f"shard_{i:05d}.parquet" for i in range(5)]
    for name in [*names, "tokenizer/tokenizer.tiktoken", "tokenizer/tokenizer.json"]:
        if not (folder / name).exists():
            content = fetch_ours(f"data/embedded/{name}", "set dataset to your own folder")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.part").write_bytes(content)
            os.replace(folder / f"{name}.part", folder / name)
    return folder


def execute_part_one(name):
    """Executes Part I of another notebook of ours, but for shared cells and those that run, as if it stood here."""
    path = find_here(name)
    try:
        text = path.read_text(encoding="utf-8") if path else fetch_ours(name, f"put {name} beside this file").decode()
    except (OSError, UnicodeDecodeError):
        text = ""
    start, end = text.find("\n# # Part I:"), text.find("\n# # Part II")
    require(0 < start < end, name, str(path), "is not the notebook of this name: move it away")
    say_once(name, f"data    read by {path or f'{name} of GitHub'}")
    cells = re.split(r"^(?=# %%)", text[start:end], flags=re.M)
    code = "".join("\n" * cell.count("\n") if re.match(r"# %%.* tags=\[", cell) else cell for cell in cells)
    code = "\n" * text[:start].count("\n") + code  # line numbers stay
    exec(compile(code, str(path or name), "exec", dont_inherit=True), globals())


def list_own_shards(config):
    """Returns what list_shards does, of your own data. 08_data.py reads them, and defines this function anew."""
    execute_part_one("08_data.py")
    return list_own_shards(config)


def list_shards(config):
    """Returns ([a function that returns a training Shard, ready to read, …], the same for validation).

    The last shard of FineWeb-Edu, and of the embedded corpus, validates, whatever num_shards is."""
    dataset = config.dataset
    if on_hub(dataset):
        with contextlib.suppress(Exception):  # the first request raises it
            # In the main thread, with the tab still open: shards are fetched in other threads, wandb is opened later.
            get_secret("WANDB_API_KEY"), hub_token()
    if dataset in HUB_SHARDS:
        files = [HubFile(dataset, f"shard_{i:05d}.parquet") for i in range(HUB_SHARDS[dataset])]
    elif dataset == "embedded":
        files = sorted(embedded_folder().glob("*.parquet"))
    else:
        return list_own_shards(config)
    require(not config.document_separator, "document_separator", config.document_separator, "is for text files")
    *train, validation = [Shard(str(file), (file,), config.text_column) for file in files]
    train = train[: None if config.num_shards == -1 else config.num_shards]
    return [functools.partial(open_shard, shard) for shard in train], functools.partial(open_shard, validation)


def open_parquet(shard):
    """Returns (the Shard on disk, downloaded if it is of the Hub, its ParquetFile). Raises InputError if it is damaged
    or has no rows."""
    if isinstance(file := shard.files[0], HubFile):
        shard = shard._replace(files=(hub_file(file.repo_id, file.name, file.revision),))
    try:
        found = pq.ParquetFile(shard.files[0])
    except DAMAGED as error:
        raise InputError(f"{shard.name}: cannot be read as parquet ({first_line(error)}); get it again") from error
    if found.metadata.num_rows == 0:
        raise InputError(f"{shard.name}: has no rows; leave it out")
    return shard, found


def open_shard(shard):
    """Returns a parquet Shard whose documents can be read. Raises InputError without its column of strings."""
    shard, found = open_parquet(shard)
    kinds = {field.name: str(field.type) for field in found.schema_arrow}
    if kinds.get(shard.column) not in ("string", "large_string", "string_view"):
        columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise InputError(f"{shard.name}: must have a `{shard.column}` column of strings; its columns: {columns}")
    return shard


def size_of(file):
    """Returns the bytes of a file on disk or on the Hub; 1 where they are not known."""
    return file.stat().st_size if isinstance(file, Path) else file.size or 1


def identity(shard):
    """Returns what tells a shard from others: of files of the Hub their hashes, of local ones size, beginning, end."""
    files, digest = shard.files, hashlib.sha256()
    if len(files) == 1 and isinstance(files[0], HubFile):
        return f"{files[0].name} {files[0].oid[:8]}".strip()
    names = [os.fsencode(Path(str(file)).name) for file in files]
    for name, file in zip(names, files):
        digest.update(name if len(files) > 1 else b"")
        if isinstance(file, HubFile):
            digest.update(file.oid.encode())
            continue
        with file.open("rb") as opened:
            digest.update(opened.read(2**20))
            opened.seek(max(opened.tell(), size_of(file) - 2**20))  # of parquet it has the footer: sizes of all columns
            digest.update(opened.read())
    name = names[0].decode(errors="replace") if len(files) == 1 else f"{len(files)} files"
    return f"{name}, {sum(map(size_of, files))} bytes, {digest.hexdigest()[:8]}"


def count_documents(shard, enough=2**24):
    """Returns (documents, bytes of text, share of the shard that was read, whether that is all of it).

    It stops when there is `enough` text in 100 documents."""
    documents = size = row = 0
    reading = read_documents(shard)  # its name keeps the file open
    for row, text in reading:  # noqa: B007
        documents, size = documents + 1, size + len(text.encode())
        if size > enough and documents >= 100:
            return documents, size, (row + 1) / pq.read_metadata(shard.files[0]).num_rows, False
    return documents, size, 1.0, True


def describe_data(shards, validation):
    """Prints what list_shards has chosen: documents and bytes for training, and what validates. Returns the bytes.

    Both are counted in the first 16 MiB of text, 100 documents at least. If there is more, they are projected by the
    sizes of the files."""
    sizes, documents, size, seen = [sum(map(size_of, fetch.args[0].files)) for fetch in shards], 0, 0, 0
    held_out, last = validation.args[0], shards[-1].args[0]
    for fetch, on_disk in zip(shards if isinstance(last.files[0], Path) else shards[:1], sizes):
        count, n_bytes, share, whole = count_documents(fetch(), 2**24 - size)
        documents, size, seen = documents + count, size + n_bytes, seen + share * on_disk
        if not whole:
            break
    ratio = max(1, sum(sizes) / seen)
    about = "about " if ratio > 1.001 else "" if whole else "more than "
    place = f"{len(shards):,} training shards" if len(shards) > 1 else last.name
    part = f"{held_out.part[1] / ALL[1]:.1%} of the documents, by the hash of their text"
    part = held_out.name if held_out.part == ALL else part
    amount = f"{documents * ratio:,.0f} documents, {size * ratio / 1e6:,.1f} MB of text"
    print(f"data    {about}{amount} in {place}; validation: {part}", flush=True)
    return size * ratio


# %% [markdown]
# ## Several hosts
#
# A slice of more than a few chips has several hosts, and each runs this same file. They are asked for, not detected:
# `TPUCHAT_HOSTS=many`, which cloud/host.sh sets, calls
# [`jax.distributed.initialize`](https://docs.jax.dev/en/latest/multi_process.html). All processes do the same work in
# the same order; the first one logs, writes and uploads.


# %% Several hosts cellView="form" tags=["shared"]
# @title Several hosts
def join_hosts():
    """Joins the processes of all hosts where TPUCHAT_HOSTS=many asks for it, before jax looks for devices."""
    if os.environ.get("TPUCHAT_HOSTS") != "many":
        return
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given = {name: int(os.environ[variable]) for name, variable in names.items() if variable in os.environ}
    if jax.__version_info__ >= (0, 8, 1):  # the others wait for the last upload of the first; before, five minutes
        given["shutdown_timeout_seconds"] = 24 * 3600
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=30)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"several hosts: they did not find each other ({first_line(error)})") from error
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")
    sys.excepthook = leave_at_once


def leave_at_once(*exception):
    """Prints a traceback and exits at once: the other hosts are blocked in a collective and will not come."""
    sys.__excepthook__(*exception)
    sys.stderr.flush()
    os._exit(1)


def is_first():
    """Whether this is the process that logs, writes and uploads."""
    return jax.process_index() == 0


def all_gather(tree):
    """Returns numpy arrays, gathered from all processes; process-local ones are concatenated on axis 0. Collective."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def put_local(config, tree, *spec):
    """Returns jax.Arrays sharded by `spec`, from the part of each that this process has."""
    if config.devices == 1:
        return jax.device_put(tree)
    place = sharding(config, *spec, mesh=device_mesh(config))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), tree)


def check_alike(*values):
    """Raises InputError on all processes if `values` differ between them: a difference would be a wrong sum later."""
    digest = np.frombuffer(hashlib.sha256(repr(values).encode()).digest(), np.int32)[None]
    digests = all_gather(digest)
    if (digests != digests[0]).any():
        raise InputError("several hosts: Config or tokenizer differ; start all hosts alike")


# %% [markdown]
# ## Checkpoints and the run folder
#
# Colab takes the machine away without asking. A checkpoint is a folder: `state.safetensors` (parameters and moments by
# name), `meta.json` (Config, step, the loader's position, SHA-256 of the files), the tokenizer, and the metrics and
# samples so far. It is written under a temporary name, flushed to disk and renamed. Only arrays and JSON are read back,
# so no checkpoint can run code. It loads on any mesh: each device reads its shard.
#
# A run folder holds `config.json`, `metrics.jsonl`, TensorBoard's events, `samples.txt`, `loss.png`, `profile/` and
# `checkpoints/`. Start an unfinished run again and it goes on; a finished one is left, and `runs/demo-2` is next.

# %% Checkpoints cellView="form" tags=["shared"]
# @title Checkpoints
LOGS = "metrics.jsonl", "samples.txt"  # a checkpoint has them as they were: a resumed run writes on from there
TOKENIZER = "tokenizer.tiktoken", "tokenizer.json"  # a checkpoint has them, too: without them its ids mean nothing


def named_arrays(state):
    """Returns {'params.layers.0.q': array, …} of a TrainState, without the schedule: it comes from the Config."""
    leaves = jax.tree_util.tree_leaves_with_path(state._replace(hyper={}))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def host_copy(run_dir, state):
    """Returns (named numpy arrays, bytes of the logs): the next step may reuse the devices' memory, and log more."""
    arrays = named_arrays(state)
    for x in arrays.values():
        x.copy_to_host_async()
    arrays = {name: np.array(all_gather(x)) for name, x in arrays.items()}  # one by one: the largest bounds the memory
    logs = {}
    for name in (*LOGS, *TOKENIZER):
        with contextlib.suppress(OSError):  # it is not there yet, or cannot be read: no reason not to save
            logs[name] = (run_dir / name).read_bytes()
    return arrays, logs


def save_checkpoint(run_dir, config, state, **meta):
    """Writes run_dir/checkpoints/step_N, atomically, and drops the old ones. Returns its path.

    `meta`: what else a resumed run needs, as JSON: the loader's position. The checkpoint with the lowest `val_loss` is
    kept. Raises InputError if it cannot be written; the checkpoints before it are untouched.
    """
    return write_checkpoint(Path(run_dir), config, *host_copy(Path(run_dir), state), meta)


def write_checkpoint(run_dir, config, arrays, logs, meta, busy=lambda: None):
    """save_checkpoint of a host_copy. `busy()`: the checkpoint that is being copied, which stays."""
    from safetensors.numpy import save_file

    facts = {"notebook": config.notebook, "config": dataclasses.asdict(config)}
    facts |= {"tokens_per_step": config.tokens_per_step, **meta}

    def fill(folder):
        save_file(arrays, folder / "state.safetensors")
        for name, content in logs.items():
            (folder / name).write_bytes(content)
        files = {path.name: file_sha256(path) for path in folder.iterdir()}
        text = json.dumps({"step": int(arrays["step"]), **facts, "files": files}, indent=2)
        (folder / "meta.json").write_text(text, encoding="utf-8")

    final = write_folder(run_dir / "checkpoints" / f"step_{int(arrays['step']):08d}", fill)
    drop_old_checkpoints(final, config.keep_checkpoints, busy)
    return final


def write_folder(final, fill):
    """Returns the folder `final`, filled by fill(folder): complete or absent, also after a kill or a power cut."""
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        for path in [*temporary.iterdir(), temporary]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        shutil.rmtree(final, ignore_errors=True)
        return temporary.rename(final)
    except Exception as error:  # OSError, or safetensors' own
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"cannot write {final}: {error}; see that there is room, and that one may write there"
        ) from error


def list_checkpoints(run_dir):
    """Returns the checkpoints of a run folder, oldest first."""
    return sorted(path for path in Path(run_dir).glob("checkpoints/step_*") if path.name[5:].isdigit())


def drop_old_checkpoints(final, keep, busy=lambda: None):
    """Leaves the checkpoint `final`, the `keep` - 1 before it, and the one with the lowest val_loss. A newer one was
    found damaged, or another thread is writing it."""
    paths, losses = [path for path in list_checkpoints(final.parents[1]) if path.name <= final.name], {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # damaged
            losses[path] = float(json.loads((path / "meta.json").read_text(encoding="utf-8")).get("val_loss"))
    best = min(losses, key=losses.get, default=None)
    for path in paths[:-keep]:
        if path not in (best, busy()):
            path.rename(path.with_name(f".{path.name}.tmp"))  # a kill while files are removed would leave some
    for rest in final.parent.glob(".*.tmp"):  # also of a process that was killed
        if rest.name < f".{final.name}":
            shutil.rmtree(rest, ignore_errors=True)


WORK = "evaluate", "sample", "save", "move_end"  # what train does between steps
NUMBER, NOTHING = (int, float), type(None)
META = {  # what meta.json holds, and of which types
    "step": int, "notebook": str, "config": dict, "files": dict, "tokens_per_step": int, "finished": bool,
    "todo": list, "data": dict, "best": (dict, NOTHING), "val_loss": (*NUMBER, NOTHING), "loader": (dict, NOTHING),
    "wandb": (str, NOTHING), "plan": (dict, NOTHING), "spent": NUMBER,
}  # fmt: skip


def warmdown_step(config):
    """Returns after how many steps a run with a budget begins its warmdown."""
    return max(32, config.total_steps - round(config.warmdown_ratio * config.total_steps))


def due_at_warmdown(config):
    """Returns what is done when the warmdown of a run with a budget begins: one of each is measured."""
    return [name for name in WORK if name != "evaluate" or config.eval_interval]


def work_after(config, done):
    """Returns what is due after `done` steps, in this order: evaluate, sample, save, move_end."""
    intervals = config.eval_interval, config.sample_interval, config.save_interval
    if (config.hours or config.credits) and done == warmdown_step(config) < config.total_steps:
        return due_at_warmdown(config)
    return [name for name, interval in zip(WORK, intervals) if due(done, interval) or done == config.total_steps]


def read_meta(path):
    """Returns meta.json of a checkpoint. Raises ValueError unless its files are those that were written."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        wrong = [name for name, kind in META.items() if name in meta and not isinstance(meta[name], kind)]
        numbers = [meta["best"][name] for name in ("step", "val_loss", "val_bpb")] if meta.get("best") else []
        wrong += ["best"] * (not all(isinstance(x, NUMBER) for x in numbers))
        wrong += ["todo"] * (not set(meta.get("todo", [])) <= {*WORK}) + ["config"] * ("config" not in meta)
        if wrong or meta["step"] != int(path.name.removeprefix("step_")) or "state.safetensors" not in meta["files"]:
            raise ValueError(f"meta.json is not that of this checkpoint {wrong or ''}".strip())
        for name, digest in meta["files"].items():
            if Path(name).name != name or file_sha256(path / name) != digest:
                raise ValueError(f"{name} is damaged: its SHA-256 is not the one in meta.json")
        return meta
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error


def newest_checkpoint(run_dir):
    """Returns (path, meta) of the newest undamaged checkpoint of a run folder, or None. Prints which ones it skips."""
    for path in reversed(list_checkpoints(run_dir)):
        try:
            return path, read_meta(path)
        except ValueError as error:
            print(f"skipping damaged checkpoint {path}: {error}", flush=True)


def differences(saved, config, fixed):
    """Returns 'n_head 4 → 8, …': the fields for which `fixed(field)`, and in which a saved Config, a dict, differs."""
    pairs = [
        (f.name, saved.get(f.name, f.default), getattr(config, f.name)) for f in dataclasses.fields(config) if fixed(f)
    ]
    return ", ".join(f"{name} {old!r} → {new!r}" for name, old, new in pairs if old != new)


def load_checkpoint(path, config):
    """Returns (TrainState, meta) of a checkpoint of config's model, on config's mesh.

    Raises InputError that names the compiled fields that differ, or what is wrong with the files.
    """
    from safetensors import SafetensorError, safe_open

    path, shapes = Path(path), state_shapes(config)
    mesh, wanted = device_mesh(config), {name: x.shape for name, x in named_arrays(shapes).items()}

    def read(name, shape):
        if config.devices == 1 or not shape:
            return put(config, file.get_tensor(name))
        part, place = file.get_slice(name), sharding(config, *weight_spec(config, shape), mesh=mesh)
        return jax.make_array_from_callback(shape, place, lambda index: part[index])  # each device reads its shard

    try:
        meta = read_meta(path)
        changed = differences(meta["config"], config, lambda field: field.compare and not field.metadata["resume"])
        with safe_open(path / "state.safetensors", "numpy") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            if changed or stored != wanted:
                raise ValueError(f"it is of another Config: {changed or 'its arrays differ'}")
            arrays = [read(name, shape) for name, shape in wanted.items()]
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"checkpoint {path} cannot be loaded: {error}") from error
    state = jax.tree.unflatten(jax.tree.structure(shapes._replace(hyper={})), arrays)
    return state._replace(hyper=put(config, hyperparams(config))), meta


# %% Checkpoints in the background cellView="form" tags=["shared"]
# @title Checkpoints in the background
class Checkpointer:
    """Writes checkpoints, and copies them to config.backup, in the background.

    An error of the disk is raised by the next save(), check() or close(). A failed copy is printed.
    """

    def __init__(self, config, run, say=print):
        self.config, self.run, self.say, self.step, self.newest, self.copied = config, run, say, None, None, None
        self.writing = self.copying = in_background(lambda: None)
        self.lock, self.source, self.seconds = threading.Lock(), None, 0.0  # that the last one took to write

    def save(self, state, **meta):
        """Waits for the copy of the state to the host, not for the disk. What is being written goes on beside it."""
        arrays, logs = host_copy(self.run, state)
        if is_first():
            self.writing = in_background(lambda: self.write(arrays, logs, meta))
        self.step = int(arrays["step"])

    def write(self, arrays, logs, meta):
        if sys.platform == "linux":  # there a thread has a priority of its own: the training comes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        started = time.perf_counter()
        path = write_checkpoint(self.run, self.config, arrays, logs, meta, lambda: self.source)
        self.seconds = time.perf_counter() - started
        self.newest = max(path, self.newest or path)  # one that a stop has overtaken ends later
        if self.config.backup and self.copying.done():
            self.copying = in_background(self.back_up)

    def back_up(self):
        """Copies the newest checkpoint, one copy at a time. An error is printed: it never stops training."""
        config, run = self.config, self.run.name
        with self.lock:
            if (path := self.newest) == self.copied:
                return
            self.source = path
            try:
                if config.backup == "hub":  # one commit replaces the checkpoint before
                    where = {"folder_path": path, "path_in_repo": f"checkpoints/{run}", "repo_id": config.hf_repo_id}
                    ask_hub("store the checkpoint", lambda: hub_api().upload_folder(**where))
                else:
                    final = copy_checkpoint(path, Path(config.backup).expanduser() / run)
                    drop_old_checkpoints(final, config.keep_checkpoints)
                self.copied = path
            except Exception as error:  # of a file system, an HTTP library or the Hub
                self.say(f"backup of {path.name} to {config.backup} failed: {first_line(error)}; training goes on")
            self.source = None

    def check(self):
        """Raises the error of a checkpoint as soon as it is known."""
        if self.writing.done():
            self.writing.result()

    def close(self):
        """Waits for the checkpoint that is being written. Returns the Future of the copy of the newest."""
        self.writing.result()
        if self.config.backup:
            self.copying = in_background(self.back_up)
        return self.copying


def copy_checkpoint(path, run_dir):
    """Copies a checkpoint folder to another run folder. Returns its path."""
    return write_folder(run_dir / "checkpoints" / path.name, lambda new: shutil.copytree(path, new, dirs_exist_ok=True))


def open_backup(config):
    """Raises InputError, before any work is done, if no checkpoint could be copied to config.backup."""
    if config.backup == "hub":
        require(hub_token(), "backup", "hub", "needs the secret or environment variable HF_TOKEN, with write access")
        ask_hub(
            f"write to {config.hf_repo_id}",
            lambda: hub_api().create_repo(config.hf_repo_id, private=True, exist_ok=True),
        )
    elif config.backup:
        make_folder(config.backup, "backup")


def restore_backup(config, run):
    """Copies the newest undamaged checkpoint of this run from config.backup, if any, to the empty folder `run`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(config.backup).expanduser() / run.name
        if config.backup == "hub":
            source, names = Path(folder), f"checkpoints/{run.name}/*"
            options = {"repo_id": config.hf_repo_id, "allow_patterns": names, "local_dir": folder}
            ask_hub("read the backup", lambda: hub_api().snapshot_download(**options))
            for meta in source.glob(f"{names[:-1]}meta.json"):  # there it has the name of the run, here of its step
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged: as if it were absent
                    step = json.loads(meta.read_text(encoding="utf-8"))["step"]
                    meta.parent.rename(source / "checkpoints" / f"step_{step:08d}")
        if newest := newest_checkpoint(source):
            print(f"going on from the backup of {newest[0].name} in {config.backup}", flush=True)
            copy_checkpoint(newest[0], run)
            write_config(run, newest[1]["config"])


# %% Run folder cellView="form" tags=["shared"]
# @title Run folder
def keep_step_size(config, meta):
    """Returns config with steps of as many tokens as those of the run that it resumes, also on other devices."""
    saved = meta.get("tokens_per_step", config.tokens_per_step)
    if config.tokens_per_step == saved:
        return config
    rule = f"the run to go on with has steps of {saved} tokens; leave it at -1, or set resume='never'"
    require(config.total_batch_size == -1, "total_batch_size", config.total_batch_size, rule)
    return config.replace(total_batch_size=saved)


def make_folder(folder, name):
    """Returns the Path of `folder`, made if it is absent. Raises InputError, with field `name`, if it is read-only."""
    try:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        return path
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder that ~ could stand for
        raise InputError(f"{name}={str(folder)!r}: cannot write there ({error}); name another folder") from error


def write_config(run, fields):
    """Writes config.json, which marks a run folder."""
    try:
        (run / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
    except OSError as error:
        raise InputError(f"run_dir={str(run)!r}: cannot write there ({error}); make room, or name another") from error


def lock_folder(run):
    """Returns an ExitStack that holds the kernel's lock (flock) of a folder, or None if another process holds it. The
    lock goes with its process, however that ends."""
    lock, folder = contextlib.ExitStack(), os.open(run, os.O_RDONLY)
    lock.callback(os.close, folder)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return lock.close()
    except OSError as error:  # some network storage has no locks
        print(f"run     {run} cannot be locked ({error}): start no second training in it", flush=True)
    return lock


def tokenizer_digest(tokenizer):
    """Returns a hash of all that the ids of a tokenizer depend on."""
    facts = tokenizer._mergeable_ranks, tokenizer._pat_str, tokenizer._special_tokens
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def data_of(shards, validation, tokenizer):
    """Returns the data that a checkpoint depends on, for its meta.json: the shards by `identity`, and a hash of the
    tokenizer."""
    names = [identity(fetch.args[0]) for fetch in (*shards, validation)]
    digest = tokenizer_digest(tokenizer)
    return {"training shards": names[:-1], "validation shard": names[-1], "tokenizer": digest}


def changed_data(saved, data):
    """Returns 'validation shard a → b, …': what differs between the data of a checkpoint and of a run (data_of)."""
    words = []
    for name, new in data.items():
        old = saved.get(name, new)
        if old != new and isinstance(new, list):
            only = {"gone": [x for x in old if x not in new], "new": [x for x in new if x not in old]}
            listed = "".join(f"; {word}: {', '.join(some[:3])}" for word, some in only.items() if some)
            words.append(f"{len(old)} {name} → {len(new)}{listed}")
        elif old != new:
            words.append(f"{name} {old} → {new}")
    return ", ".join(words)


def open_run(config, data=None):
    """Returns (run folder, checkpoint to resume from or None, lock) of config.run_dir, or of run_dir-2, -3, … if a run
    has ended there.

    An unfinished run of the same Config and `data` (data_of) is resumed, an empty folder from its backup if there is
    one. Raises InputError if they differ, naming what does, if another process trains in the folder, or if it cannot be
    written or holds something else.
    """
    for number in itertools.count(1):
        run = make_folder(config.run_dir if number == 1 else f"{config.run_dir}-{number}", "run_dir")
        mine = not any(run.iterdir()) or (run / "config.json").exists() or list_checkpoints(run)
        require(mine, "run_dir", config.run_dir, f"{run} is not empty and holds no run; name a new folder")
        if (lock := lock_folder(run)) is None:
            rule = f"another process is training in {run}; wait, stop it, or name another folder"
            require(config.resume == "never", "run_dir", config.run_dir, rule)
            continue
        with contextlib.ExitStack() as unused:
            unused.push(lock)
            if config.resume == "auto" and config.backup and not any(run.iterdir()):
                restore_backup(config, run)
            newest = newest_checkpoint(run)
            if not newest and not (run / LOGS[0]).exists():  # new, or of a run that failed before its first step
                write_config(run, dataclasses.asdict(config))
                return run, None, unused.pop_all()
            if config.resume == "never" or not newest or newest[1].get("finished"):
                continue
            path, meta = newest
            changed = differences(meta["config"], config, lambda field: not field.metadata["resume"])
            rule = f"{run} holds an unfinished run of another Config ({changed}); set these back, or resume='never'"
            require(not changed, "run_dir", config.run_dir, rule)
            changed = changed_data(meta.get("data", {}), data or {})
            rule = f"{run} holds an unfinished run on other data ({changed}); give it the old data, or resume='never'"
            require(not changed, "run_dir", config.run_dir, rule)
            keep_step_size(config, meta)  # it can be kept, or is refused now
            return run, path, unused.pop_all()


def open_run_together(config, data=None):
    """open_run by the first process, for all. Raises InputError if another one does not see the folder."""
    run, checkpoint, lock = open_run(config, data) if is_first() else ("", None, contextlib.ExitStack())
    if jax.process_count() > 1:
        text = json.dumps([str(run), checkpoint and str(checkpoint)]).encode().ljust(4096)
        text = multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))
        run, checkpoint = (path and Path(path) for path in json.loads(bytes(text)))
        there = all_gather(np.array([(run / "config.json").exists()]))
        require(there.all(), "run_dir", config.run_dir, "must be a folder on storage that all hosts share")
    return run, checkpoint, lock


def read_metrics(run):
    """Returns the lines of metrics.jsonl as dicts, without a last line that was cut short. Raises InputError."""
    path = Path(run) / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; delete or mend the line") from error


def plot_loss(run):
    """Writes loss.png: training loss, its moving average, validation loss."""
    from matplotlib.figure import Figure

    rows, figure = read_metrics(run), Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train := [(row["step"], row["loss"]) for row in rows if "loss" in row]:
        steps, losses = np.array(train).T
        span = max(1, len(losses) // 10)
        smooth = [losses[max(0, i - span) : i + 1].mean() for i in range(len(losses))]
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training loss")
        axes.plot(steps, smooth, color="tab:blue", label=f"mean of {span + 1} points")
    if validation := [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]:
        axes.plot(*np.array(validation).T, "o-", color="tab:orange", markersize=4, label="validation loss")
    axes.set(xlabel="step", ylabel="nats per token", title=str(run))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(run) / "loss.png", dpi=110)


# %% [markdown]
# ## Log
#
# The log is a list of *sinks*, functions of (step, values): files always, TensorBoard, and [wandb](https://wandb.ai)
# with a key. Unless it was asked for by name, wandb never stops a run. The name of its run is in each checkpoint, so a
# resumed run goes on with it, on whatever machine.


# %% Sinks cellView="form" tags=["shared"]
# @title Sinks
def file_sink(run):
    """Returns a sink that appends to metrics.jsonl and samples.txt."""

    def write(step, values):
        samples = "".join(f"{text}\n\n" for text in values.get("samples", ()))
        line = f"--- step {step}\n{samples}" if samples else json.dumps({"step": step, **values}) + "\n"
        with (run / LOGS[bool(samples)]).open("a", encoding="utf-8") as file:
            file.write(line)

    return write


# TensorBoard imports tensorflow where it is installed, as on Colab: for nothing that we use, seconds and memory.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))  # its own switch


def tensorboard_sink(config, run, stack):
    """Returns a sink that writes TensorBoard's events: the Config as hyper-parameters, scalars, and samples as text."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams import summary_v2 as hparams
    from tensorboard.plugins.scalar import summary_v2 as scalar
    from tensorboard.plugins.text import summary_v2 as text
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    events = EventFileWriter(str(run), flush_secs=10)

    def add(step, summary):
        events.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def write(step, values):
        for name, value in values.items():
            if value is not None:
                samples = name == "samples"
                add(step, text.text_pb(name, value) if samples else scalar.scalar_pb(name, np.float32(value)))

    stack.callback(events.close)
    add(0, hparams.hparams_pb(dataclasses.asdict(config) | {"mesh": str(config.mesh)}))
    return write


def wandb_key():
    """Returns wandb's key or None: the secret or environment variable WANDB_API_KEY, else what `wandb login` left."""
    if key := get_secret("WANDB_API_KEY"):
        os.environ["WANDB_API_KEY"] = key  # wandb reads it there
        return key
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    with contextlib.suppress(OSError, RuntimeError, netrc.NetrcParseError):
        logins = netrc.netrc().hosts
        hosts = url.split("//")[-1].strip("/"), "api.forge.coreweave.com"
        return next((logins[name][2] for name in hosts if name in logins), None)


def open_wandb(config, run, name):
    """Returns the wandb run `name`, or a new one for None; None where wandb_mode, or no key, says so.

    With wandb_mode 'auto' an error of wandb is printed and training goes on; else it is raised as InputError.
    """
    mode = config.wandb_mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb_key() else "disabled")
    if mode == "disabled":
        return None
    try:
        known = mode in ("online", "offline", "dryrun", "run")
        require(known, "WANDB_MODE", mode, "must be online, offline or disabled here; unset it for the default")
        key = mode == "offline" or wandb_key()
        require(key, "wandb_mode", mode, "needs a key: set WANDB_API_KEY, or run `wandb login`, or choose offline")
        import wandb

        live = wandb.init(
            mode=mode, project=config.wandb_project, id=name, resume="allow", name=run.name, dir=run,
            config=dataclasses.asdict(config), settings=wandb.Settings(silent=mode == "offline", init_timeout=30),
        )  # fmt: skip
        live.define_metric("*", step_metric="step")
        return live
    except Exception as error:  # wandb's own, those of its service, and our InputError
        if config.wandb_mode != "auto":
            raise InputError(f"wandb: {first_line(error)}") from error
        print(f"wandb: {first_line(error)}; training goes on without it", flush=True)


def wandb_sink(live):
    """Returns a sink that logs to a wandb run."""

    def write(step, values):
        if "samples" in values:
            import wandb

            values = {"samples": wandb.Html("<hr>".join(map(html.escape, values["samples"])), inject=False)}
        live.log({"step": step, **values})

    return write


# %% Log cellView="form" tags=["shared"]
# @title Log
class Diverged(InputError):
    """The loss or the gradient of a step is NaN or infinite."""


class RunLog:
    """Metrics of a run to its sinks, one log interval late, and a progress bar; in a notebook also the loss curve.

    `sinks`: {name: function}. `report`: that of a search, which prints for all of its runs. Of several processes the
    first has sinks; all check for NaN. Throughput is that of the training steps alone, from the moments at which the
    host saw a result.
    """

    def __init__(self, config, run, step, sinks, report=None):
        self.config, self.run, self.sinks, self.report, self.done = config, run, sinks, report, step
        self.queued = collections.deque()  # a loss of each step that the device may still have to do
        self.failed = set()  # names of what watches, and has failed
        self.total = config.total_steps
        self.flops, peak = flops_per_token(config), peak_flops(jax.devices()[0].device_kind)
        self.peak = peak and peak * config.devices
        layout = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}{postfix}"
        self.bar = progress_bar(total=self.total, initial=step, bar_format=layout, mininterval=0.5)
        self.previous, self.current = [], []  # (step, metrics on the device, batch, seconds waited) of two intervals
        self.seen, self.steps, self.seconds = None, 0, 0.0  # (step, moment) of the last result; training in all
        self.times = collections.Counter()  # seconds of all that is not training
        self.last, self.waited, self.smooth = {}, 0.0, None
        self.picture, self.drawn, self.drawing = None, time.perf_counter(), 0.1

    @contextlib.contextmanager
    def watching(self, name):
        """Wraps what only watches the training: an error in it is printed once, and the training goes on."""
        try:
            yield
        except Exception as error:
            if name not in self.failed:
                self.failed.add(name)
                self.say(f"{name} failed: {first_line(error)}; training goes on without it")

    def write(self, step, **values):
        for name, sink in self.sinks.items():
            if name not in self.failed:
                with self.watching(name):
                    sink(step, values)
        if self.report and "samples" not in values:
            self.report(step, values)

    def say(self, text, step=None):
        tqdm.write(f"step {step:>{len(str(self.total))}}/{self.total}  {text}" if step is not None else text)
        sys.stdout.flush()

    def train_step(self, step, metrics, batch="", waited=0.0):
        """Takes the metrics of a step without waiting for them, and reads those of the log interval before.

        `batch` names the documents of the step, `waited` the seconds of waiting for data since the start. Raises
        Diverged for a loss or gradient that is not finite, unless config.nonfinite says skip.
        """
        self.done = step + 1
        self.queued.append(metrics["loss"])
        if len(self.queued) > max(2, self.steps / (self.seconds or 1)):  # a second's worth: no stop waits for more
            jax.block_until_ready(self.queued.popleft())
        if not self.bar.disable:
            with self.watching("progress bar"):
                self.bar.update()
        self.current.append((step, metrics, batch, waited))
        if due(step, self.config.log_interval or 100):
            self.read(self.previous)
            self.previous, self.current = self.current, []

    def read(self, entries):
        """Waits for the metrics of `entries`; checks all of them and shows those of logged steps."""
        values, skipped, count = jax.device_get([metrics for _, metrics, *_ in entries]), 0, len(entries)
        for metrics in values:
            step, _, batch, waited = entries.pop(0)  # an error from here on must not bring its line twice
            metrics = {name: float(x) for name, x in metrics.items()}
            if not math.isfinite(sum(metrics.values())):
                skipped += 1
                words = f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, on {batch}"
                if self.config.nonfinite == "stop" or skipped == count > 1:  # a whole interval of skipped steps
                    raise Diverged(words)
                self.say(f"{words}: skipped")
            elif due(step, self.config.log_interval):
                self.show(step, metrics, waited)

    def rates(self, steps, seconds):
        """Returns {'tokens_per_second', 'mfu'}; None where there is nothing to divide, or no known peak."""
        rate = self.config.tokens_per_step * steps / seconds if steps else None
        return {"tokens_per_second": rate, "mfu": rate and self.peak and self.flops * rate / self.peak}

    def measure(self, done):
        """Notes that the result of `done` steps has just been read. Returns the rates since the result before."""
        before, self.seen = self.seen or (done, time.perf_counter()), (done, time.perf_counter())
        steps, seconds = self.seen[0] - before[0], self.seen[1] - before[1]
        self.steps, self.seconds = self.steps + steps, self.seconds + seconds
        return self.rates(steps, seconds)

    def show(self, step, metrics, waited):
        """Writes a line of metrics to the sinks and the progress bar, or to stdout where nobody sees a bar."""
        rates, interval, total = self.measure(step + 1), self.config.log_interval, self.total
        self.last = {**metrics, **rates, "data_wait_seconds": waited - self.waited}  # since the line before
        self.waited = waited
        self.write(step, **self.last)
        # Drawing takes 0.5% of the time.
        if IN_NOTEBOOK and not self.report and time.perf_counter() - self.drawn > 200 * self.drawing:
            with self.watching("loss curve"):
                self.draw()
        self.smooth = metrics["loss"] if self.smooth is None else 0.8 * self.smooth + 0.2 * metrics["loss"]
        if self.steps:
            if not rates["tokens_per_second"]:  # the first line after a pause: the mean of the run
                rates = self.rates(self.steps, self.seconds)
            left = datetime.timedelta(seconds=round(self.seconds / self.steps * (total - step - 1)))
            line = f"loss {metrics['loss']:.3f}, smoothed {self.smooth:.3f}, lr {metrics['learning_rate']:.1e}, "
            line += f"{show_rates(**rates)}, {left} left"
            self.bar.set_postfix_str(line, refresh=False)
            if self.bar.disable and due(step // interval, math.ceil(total / interval / 20)):  # 20 lines a run
                self.say(line, step)

    def draw(self):
        """Writes loss.png, and shows it in a notebook in place of the one before."""
        started = time.perf_counter()
        plot_loss(self.run)
        if IN_NOTEBOOK and not self.report:
            from IPython.display import Image, display

            self.picture = self.picture or display(display_id=True)
            self.picture.update(Image(str(self.run / "loss.png")))
        self.drawn = time.perf_counter()
        self.drawing = self.drawn - started
        self.times["drawing"] += self.drawing

    @contextlib.contextmanager
    def paused(self, state, what):
        """Waits for the device to finish its steps. The time inside counts as `what`, not as training."""
        for entries in (self.previous, self.current):  # one after the other, so that each moment is its own
            self.read(entries)
        jax.block_until_ready(state.step)
        self.measure(self.done)
        started = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation(what):
                yield
        finally:
            self.times[what] += time.perf_counter() - started
            self.seen = None


def show_rates(tokens_per_second, mfu):
    """Returns '12,345 tok/s, MFU 41.2%', with n/a for None."""
    rate = "n/a" if tokens_per_second is None else f"{tokens_per_second:,.0f}"
    return f"{rate} tok/s, MFU {'n/a' if mfu is None else f'{mfu:.1%}'}"


# %% Time and price cellView="form" tags=["shared"]
# @title Time and price
# Colab's prices, as of November 2026. Its panel Runtime > View resources shows what your runtime takes an hour.
UNITS = {"TPU v6 lite": 3.71}  # compute units an hour, by device_kind
UNIT_DOLLARS = 50 / 600  # Pro+: 600 units for $50 a month


def units_per_hour():
    """Returns Colab's compute units of an hour of all devices; None if the price of such a device is not known."""
    price = UNITS.get(jax.devices()[0].device_kind)
    return price and price * jax.device_count()


def budget_seconds(config):
    """Returns the seconds that a run may take, 0 without a budget. Raises InputError for a device without a price."""
    rule = f"nobody has noted what an hour of a {jax.devices()[0].device_kind!r} costs; give hours, or add it to UNITS"
    require(not config.credits or units_per_hour(), "credits", config.credits, rule)
    return 3600 * (config.credits / units_per_hour() if config.credits else config.hours)


def seconds_per_step(config):
    """Returns the seconds of a training step without its compilation. The steps train a state that is dropped."""
    state, seconds = init_train_state(config), []
    batch = put(config, (np.zeros(config.batch_shape, np.int32),) * 2, None, ROWS)
    for _ in range(6):  # as many on all processes
        started = time.perf_counter()
        state, _ = train_step(config, state, *batch)
        jax.block_until_ready(state.step)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[2]  # the first one compiles


def agreed(number):
    """Returns an integer, that of the first process on all of them."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)) if jax.process_count() > 1 else number)


# %% Budget cellView="form" tags=["shared"]
# @title Budget
class Budget:
    """The part of Training that sets its last step where hours or credits limit the run, and moves it: docs/budget.md.

    `plan` is all that a resumed run needs: the seconds of a step, of the work between steps and after the last one, the
    length in steps, and the step at which the warmdown began."""

    def spent(self):
        """Returns the seconds of the run, those of earlier sessions included."""
        return self.before + time.perf_counter() - self.started

    def first_plan(self):
        """Sets how many steps the budget pays, from the speed of a few; an evaluated token costs a third of one."""
        config, pace = self.config, seconds_per_step(self.config)
        third = pace / 3 / config.tokens_per_step
        if config.final_eval_tokens == -1:
            self.last_batches = self.read_batches(-1)
        tokens = sum(batch[0].size for batch in self.last_batches or ()) or config.final_eval_tokens
        last = third * max(tokens, config.eval_tokens)
        took = {"evaluate": third * config.eval_tokens}
        self.plan = {"pace": pace, "took": took, "last": last, "rest": 0.0, "falls": 0}
        steps, name = self.steps_left(), "credits" if config.credits else "hours"
        needed = f"to start, 20 steps and an evaluation take {self.spent() + 20 * pace + last:.0f} s"
        require(steps >= 20, name, getattr(config, name), f"is {self.budget:.1f} s, and {needed}; give more")
        print(
            f"budget  {self.budget:.0f} s, for about {steps:,} steps of {1e3 * pace:.1f} ms, and all else", flush=True
        )
        self.plan["length"] = {"num_iterations": steps}

    def hyper(self):
        """Returns the scalars of the schedule on the devices, with those that the budget has set."""
        planned = (self.plan or {}).get("hyper", {})
        return put(self.config, hyperparams(self.config) | {name: np.float32(x) for name, x in planned.items()})

    def steps_left(self, done=0):
        """Returns how many steps, with the work between them, fit what is left of the budget but for 0.2% of it."""
        config, plan = self.config, self.plan
        left = 0.998 * self.budget - self.spent() - plan["last"] - plan["rest"]
        every = [config.eval_interval, config.sample_interval, config.save_interval]
        work = [(plan["took"].get(name, 0), n) for name, n in zip(WORK, every) if n]

        def seconds(steps):  # after the last of them comes the work of `last` and `rest`
            return steps * plan["pace"] + sum(took * ((done + steps - 1) // n - done // n) for took, n in work)

        return max(1, agreed(bisect.bisect_right(range(1, 2**31), left, key=seconds)))

    def measure(self):
        """Notes in the plan what the work takes, and what a step has taken since the look before: 30 steps or more."""
        self.plan["took"] |= self.took
        done, seconds = self.log.done - self.first_step, time.perf_counter() - self.started - self.log.times.total()
        if before := [x for x in self.measured if x[0] <= done - 30]:
            self.plan["pace"] = (seconds - before[-1][1]) / (done - before[-1][0])
        self.measured.append((done, seconds))

    def rehearse(self):
        """Reads the tokens of the last evaluation, and notes in the plan what comes after the last step."""
        self.saver.writing.result()
        took = self.plan["took"]
        took["write"] = self.saver.seconds or took.get("write", 0)  # a session that was resumed has not written
        self.plan["rest"] = sum(took.get(name, 0) for name in ("sample", "save", "write"))
        self.last_batches = self.last_batches or self.read_batches(self.config.final_eval_tokens)
        some = self.last_batches[:32]
        evaluate(self.config, self.state.params, some[:1])  # compiles
        started = time.perf_counter()
        evaluate(self.config, self.state.params, some)
        self.plan["last"] = (time.perf_counter() - started) * len(self.last_batches) / len(some)

    def move_end(self, least=0.0):
        """Sets the last step anew, by what this run has measured, if the pace has changed by this share at least. The
        next look is after an eighth of the steps until the warmdown, or in it until the end, 32 at least. In the
        warmdown, the learning rate falls from where it is to its end along one line."""
        log, config, done, total = self.log, self.config, self.log.done, self.config.total_steps
        if done == total:
            return
        with log.paused(self.state, "planning"), self.interruptible():
            before, until = self.plan["pace"], total if self.plan["falls"] else warmdown_step(config)
            self.next_look = done + max(32, (until - done) // 8)
            self.measure()
            if least and agreed(abs(self.plan["pace"] / before - 1) < least):
                self.plan["pace"] = before
                return
            end = done + self.steps_left(done)
            begins = min(warmdown_step(config), end - round(config.warmdown_ratio * end))
            falls = bool(self.plan["falls"]) or done >= begins
            if falls and not self.plan["falls"] and not {"sample", "save"} <= self.plan["took"].keys():
                this = self.todo[: "move_end" in self.todo]  # work() ends it; a look is not in the list
                self.todo = this + due_at_warmdown(config)  # earlier than planned: measure them first
                return
            if falls:
                self.plan["falls"] = self.plan["falls"] or done
                if not least:
                    self.rehearse()
                    end = done + self.steps_left(done)
        hyper, length = {name: float(x) for name, x in self.state.hyper.items()}, {"num_iterations": end}
        falling = round(config.warmdown_ratio * end)
        if falls:
            falling = (end - done) / min(1, (total - done) / max(1, hyper["warmdown_steps"]))
            length["warmdown_ratio"] = min(falling / end, 1 - config.warmup_ratio)
        self.plan["length"], self.config = length, dataclasses.replace(config, **length)
        self.plan["hyper"] = {"warmup_steps": hyper["warmup_steps"], "warmdown_steps": falling}
        self.state = self.state._replace(hyper=self.hyper())
        log.total = log.bar.total = end
        if falls and not least or abs(end - total) > 0.05 * total:
            begins = "the warmdown begins, and " * (done == self.plan["falls"])
            log.say(f"{begins}{end - done:,} steps fit the budget; {total - done:,} were planned", done)


# %% Training cellView="form" tags=["shared"]
# @title Training
SAMPLE_PROMPTS = ("It is a truth", "The people of the United States", "She said that")


class Stopped(BaseException):
    """A signal asked the training loop to stop."""


@contextlib.contextmanager
def xprof_trace(run):
    """Traces into run/profile. Below jax 0.9 the profiler imports tensorflow: it finds an empty module."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's call stack would be most of the trace, and slow the host
    names = () if "tensorflow" in sys.modules else ("tensorflow", "tensorflow.python.profiler.trace")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)  # find_spec in other threads reads it
    try:
        with jax.profiler.trace(str(run / "profile"), profiler_options=options):
            yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


def find_data(config):
    """Returns (training shards, validation shard, tokenizer): shards are functions; the first has been called."""
    shards, fetch_validation = list_shards(config)
    if not is_first():
        multihost_utils.sync_global_devices("data")  # the first process downloads and trains; the others find it
    for fetch in shards[:1] if on_hub(config.dataset) else [*shards, fetch_validation]:
        fetch()
    tokenizer = find_tokenizer(config, shards[0]())
    if jax.process_count() > 1 and is_first():
        multihost_utils.sync_global_devices("data")
    return shards, fetch_validation, tokenizer


def peak_memory():
    """Returns bytes: the accelerator's peak where jax knows it, else this process's peak resident memory."""
    if stats := jax.local_devices()[0].memory_stats():
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Training(Budget):
    """All that surrounds the training loop: data, run folder, log, checkpoints, trace. Use it in a `with` block.

    What can be wrong with the Config, the shards, the tokenizer or the run folder is raised before anything compiles.
    Whatever ends the block, the state after the last whole step is saved. A stop request ends it without an error.
    """

    def __init__(self, config, report=None):
        self.config, self.report, self.started = config, report, time.perf_counter()
        self.waiting = self.stepping = self.rescuing = self.finished = self.lost = False
        self.asked, self.todo, self.validated, self.took = [], [], {}, {}
        self.measured = [(1, 0.0)]  # after so many steps of this session, the seconds of training since the first
        self.taken = self.batches = self.last_batches = self.summary = None

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.open_data()
            try:
                self.open_state(stack)
            except jax.errors.JaxRuntimeError as error:
                if memory_is_out(error):
                    raise out_of_memory(error, self.config, self.report) from error
                raise
            self.open_log(stack)
            self.profile = stack.enter_context(contextlib.ExitStack())
            self.take_signals(stack)
            self.stack = stack.pop_all()
        self.log.times["start"] = time.perf_counter() - self.started
        return self

    def open_data(self):
        """Prints the machine, and finds shards and tokenizer."""
        config, backend = self.config, jax.default_backend()
        device_mesh(config)  # raises if there are too few devices
        self.budget = budget_seconds(config)
        here = backend == "tpu" or config.attn_impl not in ("splash", "pallas", "fused")
        require(here, "attn_impl", config.attn_impl, f"needs a TPU, and this is a {backend}; leave it at auto")
        if not self.report:  # a search has printed it once
            describe_machine(config)
        self.shards, self.fetch_validation, self.tokenizer = find_data(config)
        self.validation = in_background(self.fetch_validation)
        if not self.report:
            describe_data(self.shards, self.fetch_validation)
        if not self.report and self.tokenizer.n_vocab < config.vocab_size - 64:  # padding to a multiple is fine
            tokens = f"the tokenizer has {self.tokenizer.n_vocab} tokens"
            print(f"data    {tokens}: other rows of vocab_size={config.vocab_size} are never trained")

    def open_state(self, stack):
        """Opens the run folder, and loads the newest checkpoint or makes the first state."""
        config, self.data = self.config, data_of(self.shards, self.fetch_validation, self.tokenizer)
        check_alike(config, self.data)
        if is_first():
            open_backup(config)
        self.run, checkpoint, lock = open_run_together(config, self.data)
        if is_first():
            with contextlib.suppress(OSError):  # only 07_evaluate.py reads them
                save_tokenizer(self.tokenizer, self.run)
        self.resumed = checkpoint
        stack.enter_context(lock)
        self.state, self.meta = load_checkpoint(checkpoint, config) if checkpoint else (None, {"step": 0})
        self.config = self.given = config = keep_step_size(config, self.meta)
        self.before = self.meta.get("spent", 0.0)
        with contextlib.suppress(OSError, ValueError):  # steps that a kill has lost took time, too
            self.before = max(self.before, float((self.run / "spent").read_text()) if checkpoint else 0.0)
        self.plan = self.meta.get("plan")
        if self.budget:
            if not self.plan:
                self.first_plan()
            self.config = config = dataclasses.replace(config, **self.plan["length"])
            self.next_look = self.meta["step"] + (1 if self.plan["falls"] else 32)  # at the pace, and so at the end
        self.state = self.state or init_train_state(config)
        self.state = self.state._replace(hyper=self.hyper())  # it counts steps of the kept size
        for name in self.meta.get("files", ()) if is_first() else ():
            if name in LOGS:
                with contextlib.suppress(OSError):  # a log only watches
                    shutil.copyfile(checkpoint / name, self.run / name)
        self.first_step, self.best, self.todo = self.meta["step"], self.meta.get("best"), self.meta.get("todo", [])
        describe_run(config, self.run, self.first_step)
        stop = min(config.profile_start + config.profile_steps, config.total_steps - 1)
        traced = self.first_step <= config.profile_start < stop and is_first()
        self.traced = (config.profile_start, stop) if traced else ()

    def open_log(self, stack):
        """Starts the loader, the log with its sinks, and the writer of checkpoints."""
        config, run, first = self.config, self.run, self.first_step
        self.loader = stack.enter_context(PrefetchDataLoader(config, self.tokenizer, self.shards))
        if first:
            self.loader.load_state_dict(self.meta.get("loader"))
        self.log = log = RunLog(config, run, first, {}, self.report)
        self.saver = Checkpointer(self.given, run, log.say)
        self.wandb = open_wandb(config, run, self.meta.get("wandb")) if is_first() else None
        watchers = stack.enter_context(contextlib.ExitStack())
        stack.push(lambda kind, *_: self.close_log(watchers, failed=kind is not None))
        if is_first():
            log.sinks["metrics.jsonl"] = file_sink(run)
            with log.watching("TensorBoard"):
                log.sinks["TensorBoard"] = tensorboard_sink(config, run, watchers)
        if self.wandb:
            log.sinks["wandb"] = wandb_sink(self.wandb)

    def close_log(self, watchers, failed):
        """Closes what watches. An error of it, whatever it is, is printed."""
        for name, close in (
            ("progress bar", self.log.bar.close), ("TensorBoard", watchers.close),
            ("wandb", lambda: self.wandb and self.wandb.finish(exit_code=int(failed))),
        ):  # fmt: skip
            with self.log.watching(name):
                close()

    def take_signals(self, stack):
        """Replaces the usual effect of SIGINT (Ctrl-C, a notebook's stop button), SIGTERM and SIGHUP by `ask`. On
        several processes SIGTERM is jax's: they agree on a step."""
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                    stack.callback(signal.signal, number, signal.signal(number, self.ask))

    def ask(self, number, frame):
        """Notes a signal. Interrupts the main thread where it only waits; a third SIGINT interrupts it anywhere."""
        self.asked.append(signal.Signals(number).name)
        if self.waiting:
            self.stop()
        if len(self.asked) > 2 and number == signal.SIGINT and not self.rescuing and not self.stepping:
            self.rescuing = True
            raise KeyboardInterrupt

    def stop(self):
        """Ends the loop. From here until the state is saved no signal interrupts anything."""
        self.rescuing = True
        raise Stopped

    @contextlib.contextmanager
    def interruptible(self):
        """Lets a stop request interrupt what is inside: the state is whole, and the main thread only waits."""
        self.waiting = True
        try:
            if self.asked:
                self.stop()
            yield
        finally:
            self.waiting = False

    def __exit__(self, kind, error, traceback):
        words, stopped = "", isinstance(error, Stopped)
        try:
            if error is not None:
                words = self.rescue(error)
                if stopped:
                    self.finish()
        except Diverged as worse:  # the log was one interval late
            error, words, stopped = worse, self.rescue(worse), False
        finally:
            self.stack.__exit__(*((None,) * 3 if stopped else (kind, error, traceback)))
        if isinstance(error, Diverged):
            hint = "Lower learning_rate, or set grad_clip=1.0, or nonfinite='skip' to leave out such steps"
            raise Diverged(f"{error}; {words}. {hint}") from None
        if memory_is_out(error):
            raise out_of_memory(error, self.config, self.report) from error
        if stopped and self.lost:
            raise InputError(f"{self.asked[0]}: {words}")
        return stopped

    def rescue(self, error):
        """Saves the state of the last whole step, if no checkpoint has it. Returns, and prints, where the newest is."""
        words, self.rescuing = "", True
        try:
            if isinstance(error, Diverged) or jax.process_count() > 1 and not isinstance(error, Stopped):
                pass  # the state is spoilt, or the other processes will not come to gather it
            elif (step := int(self.state.step)) > self.first_step and step != self.saver.step:
                if self.taken[0] == step:  # a batch was taken, and its step not done
                    self.loader.position = self.taken[1]
                self.write_state()
            self.saver.writing.result()
        except Diverged:
            raise
        except BaseException as failure:  # a full disk, a device that is gone
            self.lost = self.log.done > self.first_step
            words = f"the last steps could not be saved ({first_line(failure)}); " if self.lost else ""
        newest = self.saver.newest or self.resumed
        words += f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        if not self.report:
            self.log.say(f"{self.asked[0] if self.asked else first_line(error).rstrip('.')}: {words}")
        if not isinstance(error, Stopped):
            self.end_saving()
        self.rescuing = False
        return words

    def end_saving(self):
        """Waits for the last checkpoint and for its copy. A further signal ends the wait for the copy."""
        with contextlib.suppress(Exception) if self.lost else contextlib.nullcontext():
            copy, signals = self.saver.close(), len(self.asked)
            if signals and not copy.done():
                self.log.say(f"copying the checkpoint to {self.config.backup}; one more signal ends that")
            while not copy.done() and len(self.asked) == signals:
                time.sleep(0.02)

    def trace(self, step):
        """Starts and ends the XProf trace of config.profile_steps steps."""
        if step in self.traced:
            with self.log.paused(self.state, "tracing"), self.log.watching("profiler"):
                if step == self.traced[0]:
                    self.profile.enter_context(xprof_trace(self.run))
                else:
                    self.profile.close()

    def steps(self):
        """Yields the steps that are left; the last one may move."""
        while self.log.done < self.config.total_steps:
            yield self.log.done

    def next_batch(self, step):
        """Returns (tokens, targets) of a step."""
        self.taken = step, self.loader.position
        with jax.profiler.TraceAnnotation("wait for data"), self.interruptible():
            batch = next(self.loader)
        self.stepping = True  # until log_step: the old state is donated, and the new one not there yet
        return batch

    def log_step(self, step, metrics):
        """Logs the metrics of a step, one interval late; waits for the first step, and prints when it was done."""
        self.stepping = False
        if due(step, self.config.log_interval):
            with self.log.watching("norms"):
                metrics |= state_norms(self.state)
        if step == self.first_step:
            jax.block_until_ready(self.state.step)
            seconds = time.perf_counter() - self.started
            self.log.times["compiling"] = seconds - self.log.times.total()
            self.log.say(f"first step after {seconds:.1f} s, compilation included; loss {float(metrics['loss']):.3f}")
        start, stop = self.taken[1], self.loader.position
        batch = f"document {start.row} (from token {start.offset}) of training shard {start.shard} "
        batch += f"to document {stop.row} of shard {stop.shard}, epoch {start.epoch}"
        self.log.train_step(step, metrics, batch, self.loader.wait_seconds)
        self.saver.check()
        if is_first() and (due(step, self.config.log_interval) or step == self.first_step):
            with self.log.watching("the time spent"):
                (self.run / ".spent").write_text(f"{self.spent():.1f}\n")
                (self.run / ".spent").replace(self.run / "spent")  # whole, also after a kill
        if self.budget and self.log.done >= self.next_look and "move_end" not in self.todo:
            resumed = step == self.first_step  # the steps that a kill has lost took time, too
            self.move_end(least=0.03 if self.plan["falls"] and not resumed else 0.0)

    def work(self):
        """Does what is due after the last step, unless a signal asks to stop; several processes agree on that step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self.log.done):
            self.asked.append("SIGTERM")
        while self.todo:
            started = self.log.times.total()  # not the steps that the device has yet to do
            getattr(self, self.todo[0])()
            self.took[self.todo[0]] = self.log.times.total() - started
            self.todo = self.todo[1:]
        if self.asked and not self.finished:
            self.stop()

    def read_batches(self, amount):
        """Returns the batches of so many validation tokens."""
        if self.validation.done() and self.validation.exception():
            self.validation = in_background(self.fetch_validation)  # a second chance
        return validation_batches(self.config, self.tokenizer, self.validation.result(), amount)

    def evaluate(self):
        """Evaluates on the validation shard, the last time on more of it."""
        done, last = self.log.done, self.log.done == self.config.total_steps
        with self.log.paused(self.state, "evaluation"), self.interruptible():
            if last or not self.batches:
                amount = self.config.final_eval_tokens if last else self.config.eval_tokens
                self.batches = last and self.last_batches or self.read_batches(amount)
            self.validated = evaluate(self.config, self.state.params, self.batches) | {"step": done}
        loss, bpb = self.validated["loss"], self.validated["bpb"]
        comparable = not last or self.config.final_eval_tokens == self.config.eval_tokens
        if not self.best or (comparable and loss < self.best["val_loss"]):
            self.best = {"step": done, "val_loss": loss, "val_bpb": bpb}
        if not self.report:
            self.log.say(f"validation loss {loss:.4f}, {bpb:.4f} bits per byte", done)
        self.log.write(done, val_loss=loss, val_bpb=bpb)

    def sample(self):
        """Continues SAMPLE_PROMPTS, in the log and on the screen, as far as the context reaches."""
        longest = max(len(self.tokenizer.encode_ordinary(prompt)) for prompt in SAMPLE_PROMPTS)
        work = self.config, self.state.params, self.tokenizer, SAMPLE_PROMPTS
        if (count := min(48, self.config.seq_len - longest - 1)) > 0:
            # In a thread of its own: a signal can interrupt Python's waits, not jax's.
            with self.log.paused(self.state, "samples"), self.interruptible():
                texts = in_background(lambda: generate(*work, max_new_tokens=count)).result()
            if not self.report:
                self.log.say(f"sample: {texts[0]!r}", self.log.done)
            self.log.write(self.log.done, samples=texts)

    def save(self):
        """Saves a checkpoint in the background, after the one before."""
        with self.interruptible():
            self.saver.writing.result()
        self.write_state()

    def write_state(self):
        """Starts to write a checkpoint of the state. `todo`: what was due after the last step, and is not done."""
        with self.log.paused(self.state, "saving"):
            todo = self.todo[1:] if self.todo[:1] == ["save"] else self.todo
            self.finished = self.log.done == self.config.total_steps and not todo
            meta = {"finished": self.finished, "todo": todo, "best": self.best, "data": self.data}
            if self.budget:
                self.plan["took"] |= self.took
            meta |= {"spent": self.spent(), "plan": copy.deepcopy(self.plan)}  # it is written later
            if self.best and self.best["step"] == self.log.done:
                meta["val_loss"] = self.validated["loss"]
            name = self.wandb and self.wandb.id
            self.saver.save(self.state, loader=self.loader.state_dict(), wandb=name, **meta)

    def finish(self):
        """Waits for the last checkpoint, draws the curve, and makes the summary of the run."""
        log, config, validated = self.log, self.config, self.validated
        if self.asked and log.done and not self.lost and not self.report:
            log.say(f"{self.asked[0]}: stopped after step {log.done}; its checkpoint is kept")
        with log.paused(self.state, "saving"):
            if not self.lost:
                self.saver.writing.result()
            spent = self.spent()  # not the copy to a backup
            self.end_saving()
        if is_first() and log.done:
            with log.watching("loss curve"):
                log.draw()
        if self.wandb:
            import wandb

            with log.watching("wandb"):
                self.wandb.log({"loss curve": wandb.Image(str(self.run / "loss.png"))})
                if self.saver.newest:
                    artifact = wandb.Artifact(f"{self.run.name}-checkpoint", type="model")
                    artifact.add_dir(str(self.saver.newest), policy="immutable")  # not copied first
                    self.wandb.log_artifact(artifact)
        seconds = time.perf_counter() - self.started
        self.summary = {
            "step": log.done, "loss": log.last.get("loss"), "val_loss": validated.get("loss"),
            "val_bpb": validated.get("bpb"), "by_position": validated.get("by_position"), "best": self.best,
            "stopped": self.asked[0] if self.asked else "", "finished": self.finished,
            "tokens": log.done * config.tokens_per_step, "parameters": count_params(config),
            **log.rates(log.steps, log.seconds), "seconds": seconds,
            "times": {"steps": seconds - log.times.total(), **log.times}, "wait_seconds": self.loader.wait_seconds,
            "peak_memory": peak_memory(), "run_dir": str(self.run), "budget": self.budget, "spent": spent,
        }  # fmt: skip


# %% Memory of a step cellView="form" tags=["shared"]
# @title Memory of a step
def memory_of_step(config):
    """Returns the bytes that train_step takes on a device, by its compiler: state, batch and temporaries."""
    mesh = device_mesh(config) if config.devices > 1 else None

    def placed(x, *spec):
        place = sharding(config, *spec, mesh=mesh) if mesh else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    state = jax.tree.map(lambda x: placed(x, *weight_spec(config, x.shape)), state_shapes(config))
    tokens = placed(jax.ShapeDtypeStruct(config.batch_shape, jnp.int32), None, ROWS)
    memory = train_step.lower(config, state, tokens, tokens).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def memory_is_out(error):
    """Whether an exception says that a device or the host has no memory left."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def out_of_memory(error, config, search=None):
    """Returns the InputError for such an exception, with the remedy; a search compiles nothing for a lost trial."""
    remedy = "lower device_batch_size" if search else batch_that_fits(config)
    return InputError(f"out of memory: {first_line(error)[:120]}; {remedy}")


def memory_limit():
    """Returns the bytes that a step may take on a device; of a CPU, those of the machine, or of `ulimit -v`."""
    if stats := jax.local_devices()[0].memory_stats():
        return stats["bytes_limit"]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed, taken = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if allowed == resource.RLIM_INFINITY or not taken.exists():
        return 0.9 * machine
    return 0.9 * min(machine, allowed - int(taken.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE"))


def batch_that_fits(config):
    """Returns the remedy of a step that does not fit: the largest device_batch_size that does, by the compiler."""
    total, rows = config.tokens_per_step, config.tokens_per_step // (config.seq_len * config.devices)
    sizes = [size for size in range(1, config.device_batch_size) if rows % size == 0]
    remedy = "lower device_batch_size (total_batch_size keeps the tokens of a step)"

    def memory(size):
        try:
            return memory_of_step(config.replace(device_batch_size=size, total_batch_size=total))
        except jax.errors.JaxRuntimeError:  # the compiler of a TPU refuses what does not fit
            return math.inf

    try:
        (a, b), limit = sizes[:2], memory_limit()
        least, slope = memory(a), (memory(b) - memory(a)) / (b - a)
        near = [size for size in sizes if least + slope * (size - a) <= limit]
        size = next(size for size in near[:-4:-1] if memory(size) <= limit)
        return f"set device_batch_size={size}, the largest that fits, and total_batch_size={total}, to keep the step"
    except Exception:  # too few sizes, or no memory for the question
        return f"{remedy}, or the model" if config.device_batch_size > 1 else "make the model or seq_len smaller"


# %% Banner and summary cellView="form" tags=["shared"]
# @title Banner and summary
def describe_params(counts):
    """Returns '3.7M parameters (embed 1.0, …)' of what count_params returns."""
    parts = ", ".join(f"{part} {count / 1e6:.1f}" for part, count in counts.items() if part != "total")
    return f"{counts['total'] / 1e6:.1f}M parameters ({parts})"


def describe_machine(config):
    """Prints the versions and the device: every report of a fault begins with these two lines."""
    device, (data, fsdp), versions = jax.devices()[0], config.mesh_shape, [f"jax {jax.__version__}"]
    kind, peak = device.device_kind, peak_flops(device.device_kind)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions += [f"libtpu {importlib.metadata.version('libtpu')}"] if device.platform == "tpu" else []
    if cuda := re.search(r"cuda (\d+)", device.client.platform_version):  # 12080 is 12.8
        versions.append(f"CUDA {int(cuda[1]) // 1000}.{int(cuda[1]) % 1000 // 10}")
    print(f"runs on {', '.join(versions)}, Python {platform.python_version()}")
    if device.platform == "cpu":
        kind += f" ({cpu_fact('model name') or platform.machine()}, {os.cpu_count()} cores)"
    mesh = f"; {config.devices} of them: data {data}, fsdp {fsdp}" if config.devices > 1 else ""
    mesh += f"; {jax.process_count()} hosts, the first one logs" if jax.process_count() > 1 else ""
    peak = f"{peak / 1e12:.0f} TFLOP/s" if peak else "n/a"
    why = " (it has no bfloat16 matmuls)" if 0 < cuda_capability(device) < 8 else ""
    print(f"device  {kind}, {config.compute_dtype}{why}, peak {peak}{mesh}", flush=True)


def describe_run(config, run, first):
    """Prints the model, the work and the folder of a run that begins at step `first`."""
    steps, size, attention = config.total_steps, config.tokens_per_step, choose_attention(config, jax.default_backend())
    print(f"model   {describe_params(count_params(config))}; attention {attention}")
    print(f"work    {steps:,} steps × {size:,} tokens = {steps * size:,} tokens of {config.dataset}")
    print(f"run     {run}" + (f", resumed at step {first}" if first else ""), flush=True)


def show_summary(summary):
    """Prints what train returned, as a table."""
    times = ", ".join(f"{what} {seconds:.1f}" for what, seconds in summary["times"].items() if seconds >= 0.05)
    files = ", ".join(sorted(path.name for path in Path(summary["run_dir"]).iterdir()))
    if summary["stopped"]:
        again = "" if summary["finished"] else "; start the same again to go on"
        print(f"stopped by {summary['stopped']} after {summary['step']:,} steps{again}")
    print(f"model   {describe_params(summary['parameters'])}")
    print(f"tokens  {summary['tokens']:,} in {summary['step']:,} steps")
    if summary["val_loss"]:
        best = summary["best"]
        print(f"loss    {summary['val_loss']:.4f} nats per token on the validation shard")
        print(f"bpb     {summary['val_bpb']:.4f} bits per byte; best {best['val_bpb']:.4f} at step {best['step']:,}")
    print(f"speed   {show_rates(summary['tokens_per_second'], summary['mfu'])}")
    print(f"time    {datetime.timedelta(seconds=round(summary['seconds']))} in all; seconds: {times}")
    print(f"        of the steps, {summary['wait_seconds']:.1f} s were spent waiting for data")
    hours, units = summary["spent"] / 3600, units_per_hour()
    of = f" of {summary['budget'] / 3600:.4f}" if summary["budget"] else ""
    price = f", {units * hours:.2f} credits, ${units * UNIT_DOLLARS * hours:.2f}" if units else ""
    print(f"cost    {hours:.4f}{of} hours{price}")
    print(f"memory  {summary['peak_memory'] / 2**30:.2f} GiB at its peak")
    print(f"files   {summary['run_dir']}: {files}")


# %% Command line cellView="form" tags=["shared"]
# @title Command line
def boolean(text):
    """Returns True for 'true', False for 'false'."""
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def parse_args(argv, config, epilog=""):
    """Returns `config` with the `--field value` pairs of argv. --help lists all. Raises InputError for a wrong one."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--FIELD VALUE ...]", epilog=epilog,
        description="Every option is a Config field; without options the Config fits the machine.",
        allow_abbrev=False, formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=28, width=120),
    )  # fmt: skip

    def refuse(message):  # argparse would print the usage, a screenful
        raise InputError(f"{message} (--help lists the fields)")

    parser.error = refuse
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name, field in fields.items():
        default, kind = getattr(config, name), field.type if field.type in (int, float, bool) else str
        sentence = "; ".join(filter(None, (field.metadata["help"], field.metadata["rule"][0])))
        text = f"{sentence} (here {default!r})".replace("%", "%%")
        how = {"nargs": "?", "const": True} if kind is bool else {}  # --flag alone is true
        convert = boolean if kind is bool else kind
        parser.add_argument(f"--{name}", default=default, help=text, type=convert, metavar=kind.__name__.upper(), **how)
    given, rest = parser.parse_known_args(argv)
    if rest and rest[0].startswith(("--preflight", "--scaling")):
        refuse(f"--preflight and --scaling have a notebook of their own: python 05_preflight.py {parser.prog} v6e")
    if rest:
        refuse(f"unknown option {rest[0]!r}{suggest(rest[0].lstrip('-').split('=')[0], fields)}")
    return config.replace(**vars(given))


@contextlib.contextmanager
def one_line_errors():
    """Turns an InputError of a script into one line on stderr and exit status 2; in a notebook it is raised."""
    try:
        yield
    except (InputError, KeyboardInterrupt) as error:
        if IN_NOTEBOOK:
            raise
        interrupted = "interrupted; the same command goes on from the newest checkpoint, if there is one"
        print(f"error: {error}" if isinstance(error, InputError) else interrupted, file=sys.stderr, flush=True)
        if sys.excepthook.__name__ == "leave_at_once":  # one of several hosts: an orderly exit would wait for all
            os._exit(2)
        raise SystemExit(2 if isinstance(error, InputError) else 130) from None


# %% [markdown]
# # Part III: run
#
# `Config.for_device()` is the reference model on a TPU or GPU, and the demo on a CPU. Change it in `CHANGES`. As a
# script, every field is an option: `python 02_train.py --n_head 4 --num_iterations 200`.

# %% Parameters tags=["parameters", "run"]
CHANGES = {}  # fields of Config, such as {"hours": 3.0, "dataset": "my_folder"}

# %% Configure tags=["run"]
with one_line_errors():
    options = [] if IN_NOTEBOOK else sys.argv[1:]
    join_hosts()
    config = parse_args(options, Config.for_device().replace(**CHANGES))

# %% [markdown]
# ## Does it fit?
#
# The compiler knows before the first step how much memory it takes. For a chip that is not here, and for time and
# price, open [05_preflight](https://github.com/tpuchat/tpuchat/blob/main/05_preflight.py): it runs on a free CPU
# runtime.

# %% Does it fit? tags=["run"]
if IN_NOTEBOOK:
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    of = f" of {limit / 2**30:.2f} GiB" if limit else ""
    try:
        needed = memory_of_step(config) / 2**30
    except jax.errors.JaxRuntimeError as error:  # the compiler of a TPU refuses what does not fit
        raise out_of_memory(error, config) from error
    print(f"a step takes {needed:.2f} GiB{of} on each device; the compiled program is kept")

# %% [markdown]
# ## Train
#
# **What to look for.** The loss starts at ln V. It falls steeply while the model learns token frequencies, then slowly.
# It falls again in the warmdown. If the end of the curve is still falling, more steps would pay.

# %% Train it tags=["run"]
with one_line_errors():
    summary = train(config)
show_summary(summary)
if summary["stopped"] and not IN_NOTEBOOK:
    raise SystemExit(128 + signal.Signals[summary["stopped"]])
if jax.process_count() > 1 or not list_checkpoints(summary["run_dir"]):
    raise SystemExit  # the cells below look at a checkpoint, on one host

# %% [markdown]
# ## Bits per byte, against xz and zstd
#
# A language model is a compressor: its bits per byte are the size to which an arithmetic coder driven by its
# predictions would shrink the text. Standard compressors are therefore a baseline. They see the first 5,000 documents
# of the validation shard, the model as many tokens as `final_eval_tokens` says. The comparison favours the model, which
# has read a training set. But a model that loses has learned nothing.


# %% Compare tags=["run"]
import lzma

shards, fetch_validation = list_shards(config)
documents = (text for _, text in read_documents(fetch_validation()))
sample = "\n\n".join(itertools.islice(documents, 5000)).encode()  # the whole embedded shard, a part of FineWeb-Edu's
packed = {"xz -9e": lzma.compress(sample, preset=9 | lzma.PRESET_EXTREME)}
packed["zstd -19"] = pa.Codec("zstd", compression_level=19).compress(sample, asbytes=True)
print(f"this model        {summary['val_bpb'] or math.nan:.3f} bits per byte")  # nan: it was not evaluated yet
for name, blob in packed.items():
    print(f"{name:18}{8 * len(blob) / len(sample):.3f} bits per byte")

# %% [markdown]
# ## Loss by position and by token
#
# **What to look for.** *Loss by position*: the first tokens of a context are guessed from nothing. The curve falls as
# far to the right as context still helps; where it is flat, a longer context would be wasted. *Surprise*: the bits that
# each token of a passage cost. Beginnings of names and of sentences are red, their ends are pale.


# %% Surprise of each token cellView="form" tags=["shared"]
# @title Surprise of each token
def surprise(config, params, tokenizer, text):
    """Returns [(bytes of a token, its bits)] of the first T tokens of a text, each given BOS and those before it."""
    ids = encode_document(tokenizer, text)[: config.seq_len + 1]
    _, B, T = config.batch_shape  # the shape of an evaluation: nothing is compiled
    tokens, targets = np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
    tokens[0, : len(ids) - 1], targets[0, : len(ids) - 1] = ids[:-1], ids[1:]
    weights, pair = evaluation_weights(config, params), put(config, (tokens, targets), ROWS)
    losses = np.asarray(evaluation_step(config, weights, *pair)[1])[0]
    pieces = [tokenizer.decode_single_token_bytes(token) for token in ids[1:]]
    return [(piece, float(loss) / math.log(2)) for piece, loss in zip(pieces, losses, strict=False)]


def surprise_html(costs):
    """Returns the costs of `surprise` as HTML: the redder a token, the more bits; the pointer shows how many.

    A character that is split between tokens is shown by the last of them, with the bits of all.
    """
    spans, held, bits = [], b"", 0.0
    for piece, cost in costs:
        held, bits = held + piece, bits + cost
        try:
            text = held.decode()
        except UnicodeDecodeError:
            if len(held) < 4:
                continue
            text = held.decode(errors="replace")
        color = f"rgba(220, 50, 30, {min(bits, 16) / 20:.2f})"
        words = html.escape(text).replace("\n", "↵<br>")
        spans.append(f'<span title="{bits:.1f} bits" style="background: {color}">{words}</span>')
        held, bits = b"", 0.0
    style = "font: 15px/1.7 Georgia, serif; color: #111; background: #fff; padding: 1em; max-width: 50em"
    return f'<div style="{style}">{"".join(spans)}</div>\n'


# %% Loss by position tags=["run"]
if summary["by_position"] is not None:
    edges = [0, *(2**i for i in range(config.seq_len.bit_length()))]
    for start, stop in itertools.pairwise(edge for edge in edges if edge <= config.seq_len):
        loss = np.nanmean(summary["by_position"][start:stop])
        print(f"tokens {start:5} to {stop - 1:5}  {loss:.3f} nats " + "█" * round(8 * loss))

# %% Surprise tags=["run"]
state, _ = load_checkpoint(list_checkpoints(summary["run_dir"])[-1], config)
tokenizer = find_tokenizer(config, shards[0]())
passage = max((text for _, text in itertools.islice(read_documents(fetch_validation()), 20)), key=len)
costs = surprise(config, state.params, tokenizer, passage)
page = '<meta charset="utf-8">\n' + surprise_html(costs)
(Path(summary["run_dir"]) / "surprise.html").write_text(page, encoding="utf-8")
ordered = sorted(costs, key=lambda pair: pair[1])
for words, some in (("least", ordered[:6]), ("most", ordered[:-7:-1])):
    print(f"{words} surprising:", ", ".join(f"{piece.decode(errors='replace')!r} {bits:.2f}" for piece, bits in some))
if IN_NOTEBOOK:
    from IPython.display import HTML, display

    display(HTML(surprise_html(costs)))

# %% [markdown]
# ## Generate text
#
# The checkpoint is what a later session would load. Type the beginning of a text, and read three continuations.

# %% Your prompt tags=["run"]
PROMPT = "In the beginning"  # @param {type:"string"}
TEMPERATURE = 0.8  # @param {type:"number"}
LENGTH = 60  # @param {type:"integer"}
with one_line_errors():
    room = max(1, config.seq_len - len(tokenizer.encode_ordinary(PROMPT)) - 1)
    choices = {"max_new_tokens": min(LENGTH, room), "temperature": TEMPERATURE, "top_p": 0.95}
    for text in generate(config, state.params, tokenizer, [PROMPT] * 3, speed=True, **choices):
        print(text, end="\n\n")

# %% [markdown]
# ## Profile with XProf
#
# The run has traced steps 15 to 19 for [XProf](https://openxla.org/xprof); it is in TensorBoard's *Profile* tab, under
# *Trace Viewer* (zoom with W and S, move with A and D). In a **good** trace the rows of the device are full, one step
# joins the next, and the host's `train` steps run ahead of the device. In a **bad** one the device is idle while the
# host is in `wait for data` or in Python, or small copies stand between the matmuls. `python 05_preflight.py
# 02_train.py v6e --trace runs/train` prints the time of each part as a table, beside the compiler's estimate.

# %% TensorBoard's server cellView="form" tags=["shared"]
# @title TensorBoard's server
# xprof needs a newer protobuf than Colab's, so pip installs it into a folder that only the server's process sees. To
# that process tensorflow is as if it were not installed.
TENSORBOARD = """#!{python}
import sys
sys.path[:0] = ["{folder}"]
sys.modules["tensorflow"] = None
from tensorboard.main import run_main
sys.exit(run_main())
"""


def show_tensorboard(run):
    """Opens TensorBoard with XProf's plugin below the cell in Colab; elsewhere prints the command that starts it."""
    if "google.colab" not in sys.modules:
        print(f"tensorboard --logdir {shlex.quote(str(run))}    # its Profile tab: pip install xprof")
        return
    from tensorboard import notebook

    folder, binary = cache_dir() / "xprof", cache_dir() / "tensorboard"
    if not folder.exists():
        print(f"installing xprof into {folder}, beside the runtime", flush=True)
        part = folder.with_suffix(".part")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", part, "xprof"]
        if subprocess.run(command, env=os.environ | {"PIP_USER": "0"}).returncode:
            print("xprof cannot be installed; TensorBoard will not show the trace")
        else:
            os.replace(part, folder)
    binary.write_text(TENSORBOARD.format(python=sys.executable, folder=folder), encoding="utf-8")
    binary.chmod(0o755)
    os.environ["TENSORBOARD_BINARY"] = str(binary)
    notebook.start(f"--logdir {shlex.quote(str(run))}")


# %% TensorBoard tags=["run"]
show_tensorboard(summary["run_dir"])

# %% [markdown]
# ## What does it know?
#
# [07_evaluate](https://github.com/tpuchat/tpuchat/blob/main/07_evaluate.py) asks a checkpoint the questions of CORE. In
# Colab each notebook has a runtime of its own: give 07 what `backup` has copied, a folder of your Drive, or the Hub's
# `owner/name`.

# %% Evaluate with 07 tags=["run"]
print(f"python 07_evaluate.py {shlex.quote(summary['run_dir'])}    # --tasks quick, core, hellaswag, ...")

# %% [markdown]
# ## Release the runtime
#
# A Colab runtime costs compute units until it is released, also when nothing runs. Tick the box before *Run all* for a
# long run. What is in `backup` stays; what is only on the runtime's disk goes.

# %% Release the runtime tags=["run"]
RELEASE = False  # @param {type:"boolean"}
if RELEASE and "google.colab" in sys.modules:
    from google.colab import runtime as colab_runtime

    colab_runtime.unassign()
