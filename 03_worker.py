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
# # Sweep hyper-parameters, on as many chips as you like
#
# Which learning rate? How long a warmdown? Wide heads or many? This notebook answers by trying. It defines a search
# over the Config of `02_train.py`, and is then a *worker*: it asks [wandb](https://wandb.ai) for a suggestion, trains
# it, reports, and asks again. Open it in a second Colab tab, give it the id of the same sweep, and there are two
# workers.
#
# | you have | what *Run all* does |
# |---|---|
# | no account | a search of a few trials on this machine, logged offline: `wandb sync` can send it later |
# | a wandb key (secret or environment variable `WANDB_API_KEY`) | creates a sweep, prints its id, and works for it |
# | a key, and a sweep's id in `SWEEP_ID` | joins that sweep |
#
# Model, data, step and loop are the cells of `02_train.py`, unchanged; they come first, since a notebook is one file.
# What is new begins at *The search*.

# %% [markdown]
# ## Setup

# %% Install what is missing cellView="form" tags=["shared"]
# @title Install what is missing
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile


def install(*packages):
    """In a notebook, installs those of the packages that the runtime lacks. A constraints file pins every installed
    version, so that pip replaces none."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if not missing or "get_ipython" not in globals():
        return
    print("installing", *missing)
    here = {}
    for package in importlib.metadata.distributions():
        name, version = package.name, package.version
        # pip refuses versions such as Debian's own 2.22.1ubuntu1.
        if name and re.fullmatch(r"[\d.]+(?:(?:a|b|rc|\.post|\.dev)\d+)*(?:\+[\w.]+)?", version or ""):
            here.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)  # of two, the first in the path is in use
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("".join(f"{name}=={version}\n" for name, version in here.items()))
        constraints.flush()
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints.name, *missing]
        subprocess.run(command, check=True)


# %% Install tags=["run"]
install(
    "jax", "numpy", "tiktoken", "rustbpe", "pyarrow", "huggingface_hub", "safetensors", "tensorboard", "matplotlib",
    "tqdm", "wandb",
)  # fmt: skip

# %% Imports cellView="form" tags=["shared"]
# @title Imports
import argparse
import base64
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import functools
import hashlib
import html
import importlib.machinery
import importlib.metadata
import importlib.util
import itertools
import json
import lzma
import math
import netrc
import os
import platform
import queue
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import NamedTuple

import jax

OLDEST_JAX = (0, 7, 2)  # Colab's in August 2026; the suite runs with it
if jax.__version_info__ < OLDEST_JAX:  # before the imports below, of which an old jax lacks some
    needed = ".".join(map(str, OLDEST_JAX))
    message = f"jax {jax.__version__} is too old: tpuchat needs {needed} or newer; "
    message += "pip install --upgrade 'jax[tpu]', on a GPU 'jax[cuda13]', on a CPU jax"
    if "get_ipython" in globals():
        raise ImportError(message)
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)

import jax.export
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils, multihost_utils
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from tqdm import tqdm

# %% wandb
import random
import traceback

import wandb

# %% Environment cellView="form" tags=["shared"]
# @title Environment
GITHUB = "tpuchat/tpuchat"
IN_NOTEBOOK = "get_ipython" in globals()
warnings.filterwarnings("ignore", "IProgress not found")  # huggingface_hub's bars look for ipywidgets, and do without


class InputError(ValueError):
    """Something that a person gave is wrong: a Config value, a file, a checkpoint. The message is one line that says
    what was wrong, the value, and what to do. As a script, it is printed to stderr and the exit status is 2."""


def get_secret(name):
    """A secret by name, or None: Colab's secrets panel first, then the environment. Never required."""
    try:
        from google.colab import userdata

        value = userdata.get(name)
    except Exception:  # not in Colab, not granted, or not there: Colab raises a different class for each
        value = os.environ.get(name)
    return (value or "").strip() or None  # it may have been pasted with the end of its line


def someone_watches():
    """Whether a progress bar has a reader: a notebook or a terminal, not a log file."""
    return IN_NOTEBOOK or sys.stderr.isatty()


def bar_file():
    """Where a progress bar is written to: a notebook shows what comes on stderr in red."""
    return sys.stdout if IN_NOTEBOOK else sys.stderr


def cache_dir():
    """Where what takes long to make or to get stays between runs."""
    return Path.home() / ".cache" / "tpuchat"


def format_time(seconds):
    """'1:02:03' or '2:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def in_background(function):
    """A Future of function(), run in a daemon thread: unlike a pool's, it does not keep a finished process waiting."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="background", daemon=True).start()
    return future


# %% What an old jax needs cellView="form" tags=["shared"]
# @title What an old jax needs
# Colab's jax is older than the newest. What an old one needs from us is decided here, with the version that ends it.
#
# Below 0.8.2, XLA does not use a CPU's bfloat16 instructions, but hands some bfloat16 matmuls with float32 results to
# XNNPACK where there are such instructions, and XNNPACK refuses them: "Unsupported element type for DotThunk".
CPU_USES_BFLOAT16 = jax.__version_info__ >= (0, 8, 2)
NO_XNNPACK, XLA_FLAGS = "--xla_cpu_use_xnnpack=false", os.environ.get("XLA_FLAGS", "")
if not CPU_USES_BFLOAT16 and NO_XNNPACK not in XLA_FLAGS and XLA_FLAGS[:1] in ("", "-"):  # it may name a file of flags
    os.environ["XLA_FLAGS"] = f"{NO_XNNPACK} {XLA_FLAGS}".strip()

# How long a process that is done waits for the others: for the last upload of the first one, a day. Below 0.8.1 jax
# takes no such argument, and waits for five minutes.
SHUTDOWN_TIMEOUT = {"shutdown_timeout_seconds": 24 * 3600} if jax.__version_info__ >= (0, 8, 1) else {}

# The libtpu of jax 0.7.2 does not know this flag, and ends the process; that of 0.10 does.
SCATTER_ASIDE = ("enable_sparse_core_collective_offload_nd_reduce_scatter",) if jax.__version_info__ >= (0, 10) else ()

# %% Beside the runtime cellView="form" tags=["shared"]
# @title Beside the runtime
def install_aside(package, *options):
    """Returns the folder in ~/.cache/tpuchat into which pip has put `package`, for a process of its own. The runtime
    stays as it is. InputError if pip fails."""
    name = re.sub(r"[^\w.]+", "-", package).strip(".-")  # libtpu==0.0.42.* → libtpu-0.0.42
    folder = cache_dir() / f"{name}-py{sys.version_info.major}.{sys.version_info.minor}"
    if folder.exists():
        return folder
    print(f"installing {package} into {folder}, beside the runtime", flush=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", partial, *options, package]
    try:
        done = subprocess.run(command, env=os.environ | {"PIP_USER": "0"}, capture_output=True, text=True)
        if done.returncode:
            words = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise InputError(f"cannot install {package} ({words}); check the network: pip download {package!r}")
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


# TensorBoard and, below jax 0.9, jax's profiler import tensorflow where it is installed, as on Colab's CPU and GPU
# runtimes: for nothing that we use, seconds and memory. Where it is not, that profiler complains in red.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))  # TensorBoard's own switch


@contextlib.contextmanager
def without_tensorflow():
    """In this context the profiler finds an empty tensorflow, unless one is loaded already."""
    names = () if "tensorflow" in sys.modules else ("tensorflow", "tensorflow.python.profiler.trace")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)  # find_spec in other threads reads it
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


# %% XLA on this machine cellView="form" tags=["shared"]
# @title XLA on this machine
def cpu_fact(name):
    """What Linux says of this machine's first core, by a name of /proc/cpuinfo ('model name', 'flags'); else ''."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"^{name}\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1]
    return ""


def cpu_dtype():
    """The faster dtype of matmuls on this CPU. Without bfloat16 instructions each operand is converted to float32."""
    return "bfloat16" if CPU_USES_BFLOAT16 and "_bf16" in cpu_fact("flags") else "float32"


# XLA on a CPU asks malloc for its temporaries anew in each step, and glibc hands such large blocks back to the kernel,
# which zeroes every page that is touched again: 22% of the demo's CPU time. One arena that keeps what it has ends that.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
        ctypes.CDLL(None).mallopt(option, value)

# Compiled programs are kept between processes: a restart skips XLA. JAX_COMPILATION_CACHE_DIR wins if it is set.
if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # small programs, too: there are dozens

# Where libtpu is installed for its compiler alone, it asks which TPU this is, and worries at length if nobody answers.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
}  # fmt: skip
TPUS = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
if not TPUS:
    os.environ.update({name: value for name, value in NO_TPU.items() if name not in os.environ})

# Between several chips of a v6e, what they send each other runs on its SparseCores, beside the arithmetic; without the
# first three, arithmetic waits for all of it. Without the last two, 64 chips sum whole gradients where each needs 1/64,
# and gather small weights by a sum. LOG.md has what each is worth. A v5e, which has no SparseCores, does as without.
COLLECTIVES_ASIDE = " ".join(
    f"--xla_tpu_{flag}=true"
    for flag in (
        "enable_sparse_core_collective_offload_all_gather", "enable_sparse_core_collective_offload_reduce_scatter",
        "enable_sparse_core_collective_offload_all_reduce", *SCATTER_ASIDE, "prefer_async_allgather_to_allreduce",
    )
)  # fmt: skip


def libtpu_flags(*flags):
    """What LIBTPU_INIT_ARGS should be: `flags`, and after them your own, which win."""
    return " ".join([*flags, os.environ.get("LIBTPU_INIT_ARGS", "")]).strip()


if len(TPUS) > 1 and COLLECTIVES_ASIDE not in libtpu_flags():
    os.environ["LIBTPU_INIT_ARGS"] = libtpu_flags(COLLECTIVES_ASIDE)

# %% [markdown]
# ## From 02_train.py
#
# Config, tokenizer, data, model, loss, optimizer, evaluation, checkpoints, log and loop: read them there, with the
# reasons.


# %% Together cellView="form" tags=["shared"]
# @title Together
def is_first():
    """Whether this is the process that logs, writes metadata and uploads."""
    return jax.process_index() == 0


def from_all_processes(tree):
    """numpy's arrays on each process, from those whose parts lie on all, or from one of each, joined along the first
    axis. All processes call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def on_first(function):
    """function() of the first process, as JSON, on all of them; so is its InputError. All processes call it."""
    if jax.process_count() == 1:
        return function()
    found = {}
    if is_first():
        try:
            found = {"value": function()}
        except InputError as error:
            found = {"error": str(error)}
    text = np.frombuffer(json.dumps(found).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = multihost_utils.broadcast_one_to_all(text if is_first() else np.zeros(size, np.uint8))
    found = json.loads(bytes(text))
    if "error" in found:
        raise InputError(found["error"])
    return found["value"]


def check_alike(facts):
    """InputError on all processes that names those of `facts`, {name: value}, which are not the same on all: what
    differs now would be a wrong sum later."""
    digests = [hashlib.sha256(repr(value).encode()).digest()[:4] for value in facts.values()]
    found = from_all_processes(np.frombuffer(b"".join(digests), np.int32)[None])  # [processes, facts]
    others = [name for name, column in zip(facts, found.T, strict=True) if (column != column[0]).any()]
    if others:
        raise InputError(f"several hosts: {', '.join(others)} must be the same on all; start all alike")


def first_process_first(function):
    """function() of each process: what the first may have to make, a tokenizer or a download, the others then find. Its
    InputError is raised on all."""
    found = []

    def call():
        found.append(function())

    on_first(call)
    return found[0] if found else function()


# %% Config helpers cellView="form" tags=["shared"]
# @title Config helpers
def free(default):
    """A Config field that is not part of the compiled program: changing it compiles nothing."""
    return dataclasses.field(default=default, compare=False)


def require(ok, name, value, rule):
    """Raises an InputError that names the Config field, its value and the rule that it breaks, unless `ok`."""
    if not ok:
        raise InputError(f"{name}={value!r}: {rule}")


def type_name(field):
    """'int', or 'str | tuple'."""
    return getattr(field.type, "__name__", str(field.type))


def check_types(config):
    """Every field has its declared type (an int serves as a float), and a device has numbers as large."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kinds = (int, float) if field.type is float else field.type
        require(
            isinstance(value, kinds) and not isinstance(value, bool), field.name, value,
            f"must be of type {type_name(field)}, not {type(value).__name__}",
        )  # fmt: skip
        if field.type is int:
            require(abs(value) < 2**63, field.name, value, "must be below 2^63")
        if field.type is float:
            largest = float(np.finfo(np.float32).max)
            require(abs(value) <= largest, field.name, value, f"must be a finite number up to {largest:.1e}")  # no NaN
            object.__setattr__(config, field.name, float(value))


# %% Choices of every model cellView="form" tags=["shared"]
# @title Choices of every model
def as_mesh(value):
    """(2, 4) of (2, 4), [2, 4], '2x4', '2,4' or '(2, 4)'; 'auto', and what is no mesh, as it is."""
    if isinstance(value, str) and (match := re.fullmatch(r"\(?\s*(\d+)\s*[x,]\s*(\d+)\s*\)?", value)):
        return int(match[1]), int(match[2])
    return tuple(value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """What the models of all notebooks have in common. A Config adds its architecture: n_embd, mlp_dim and depth, and
    check_architecture, which is called before anything is computed from them."""

    # Compiled: the architecture
    n_head: int = 8  # N
    n_kv_head: int = -1  # K: each key/value head serves N/K query heads; -1 = n_head
    head_dim: int = 128  # H
    vocab_size: int = 32768  # V
    seq_len: int = 2048  # T
    window_pattern: str = "SSSL"  # layer i takes letter i mod len: S sees T/2 tokens back, L all; the last layer is L
    softcap: float = 15.0  # logits are softcap·tanh(logits/softcap)

    # Compiled: how the step runs
    attn_impl: str = "auto"  # einsum | jax | splash | pallas | fused; auto = fused on TPU, jax on GPU, einsum on CPU
    splash_block_size: int = 1024  # tile of the splash and pallas kernels, at most T
    compute_dtype: str = "bfloat16"  # of activations and matmuls; master weights and moments are always float32
    mesh: str | tuple = "auto"  # (data, fsdp) devices: the state is split over fsdp; auto = (all, 1)
    device_batch_size: int = 4  # sequences per forward and backward pass, on each device
    total_batch_size: int = -1  # tokens per optimizer step; -1 = one pass on all devices, larger accumulates gradients
    grad_clip: float = 0.0  # the gradient's norm is cut to it; 0 = never, and AdamW can run beside the matmuls
    nonfinite: str = (
        "stop"  # a loss or gradient that is no number: stop, or skip the step, which costs what clipping does
    )

    # Free: optimization, traced scalars on the device
    learning_rate: float = free(3e-4)
    weight_decay: float = free(0.1)
    beta1: float = free(0.9)
    beta2: float = free(0.95)
    eps: float = free(1e-8)
    warmup_ratio: float = free(0.02)  # of the steps: linear from 0 to the full learning rate
    warmdown_ratio: float = free(0.5)  # of the steps: linear down to final_lr_frac of it
    final_lr_frac: float = free(0.0)
    num_iterations: int = free(-1)  # optimizer steps; -1 = target_param_data_ratio tokens for each parameter
    target_param_data_ratio: float = free(10.0)

    # Free: the host
    dataset: str = free("karpathy/fineweb-edu-100b-shuffle")  # 'embedded', a folder of parquet shards, or a Hub id
    num_shards: int = free(50)  # use at most so many training shards, from the first; -1 = all
    hf_repo_id: str = free("")  # your own Hub repo, where a tokenizer may wait
    run_dir: str = free("runs/train")
    resume: str = free("auto")  # auto = go on with an unfinished run in run_dir; never = always a new folder
    seed: int = free(0)
    log_interval: int = free(10)  # steps; for this and the next three, 0 = never
    eval_interval: int = free(500)
    sample_interval: int = free(2000)
    save_interval: int = free(5000)
    keep_checkpoints: int = free(2)  # the newest ones; the best is kept as well
    backup: str = free("")  # where each checkpoint is copied: a folder, such as a mounted Drive, or 'hub' = hf_repo_id
    profile_start: int = free(15)  # the first step that is traced for XProf
    profile_steps: int = free(5)  # how many are; 0 = none
    wandb_mode: str = free("auto")  # online | offline | disabled; auto = online if there is a key, else disabled
    wandb_project: str = free("tpuchat")
    eval_tokens: int = free(524_288)  # validation tokens of a periodic evaluation
    final_eval_tokens: int = free(16_777_216)  # and of the last one; -1 = the whole shard

    def __post_init__(self):
        object.__setattr__(self, "mesh", as_mesh(self.mesh))
        check_types(self)
        positive = (
            "n_head", "head_dim", "seq_len", "softcap", "splash_block_size", "device_batch_size", "learning_rate",
            "eps", "target_param_data_ratio", "eval_tokens",
        )  # fmt: skip
        for name in positive:
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        require(self.seq_len > 1, "seq_len", self.seq_len, "must be at least 2: a token, and the one after it")
        require(
            self.softcap <= 70,
            "softcap",
            self.softcap,
            "must be at most 70: the loss takes exp of the logits as they are",
        )
        for name in (
            "log_interval",
            "eval_interval",
            "sample_interval",
            "save_interval",
            "profile_start",
            "profile_steps",
            "seed",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        for name in ("n_kv_head", "total_batch_size", "num_iterations", "num_shards", "final_eval_tokens"):
            value = getattr(self, name)
            require(value == -1 or value > 0, name, value, "must be positive, or -1 for the default rule")
        require(self.keep_checkpoints > 0, "keep_checkpoints", self.keep_checkpoints, "must be positive")
        require(self.grad_clip >= 0, "grad_clip", self.grad_clip, "must be positive, or 0 for no clipping")
        require(self.nonfinite in ("stop", "skip"), "nonfinite", self.nonfinite, "must be stop or skip")
        require(
            self.backup != "hub" or self.hf_repo_id, "backup", self.backup, "needs hf_repo_id, a Hub repo of your own"
        )
        require(self.eps >= 1e-30, "eps", self.eps, "must be at least 1e-30, or float32 may divide by zero")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must lie in [0, 1)")
        for name in ("weight_decay", "warmup_ratio", "warmdown_ratio", "final_lr_frac"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(self.final_lr_frac <= 1, "final_lr_frac", self.final_lr_frac, "must be at most 1")
        ratios = self.warmup_ratio + self.warmdown_ratio
        require(ratios <= 1, "warmup_ratio + warmdown_ratio", ratios, "must be at most 1: they are shares of one run")

        require(self.n_head % self.kv_heads == 0, "n_kv_head", self.n_kv_head, f"must divide n_head={self.n_head}")
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even: RoPE rotates pairs")
        require(
            self.vocab_size > 256, "vocab_size", self.vocab_size, "must be above 256: a token for each byte, and BOS"
        )
        require(
            self.window_pattern and set(self.window_pattern) <= {"S", "L"}, "window_pattern", self.window_pattern,
            "must be made of the letters S (short window) and L (the whole context)",
        )  # fmt: skip
        self.check_architecture()

        impls, dtypes = ("auto", "einsum", "jax", "splash", "pallas", "fused"), ("bfloat16", "float32")
        require(self.attn_impl in impls, "attn_impl", self.attn_impl, f"must be one of {', '.join(impls)}")
        require(
            self.compute_dtype in dtypes, "compute_dtype", self.compute_dtype, f"must be one of {', '.join(dtypes)}"
        )
        require(self.resume in ("auto", "never"), "resume", self.resume, "must be auto or never")
        modes = ("auto", "online", "offline", "disabled")
        require(self.wandb_mode in modes, "wandb_mode", self.wandb_mode, f"must be one of {', '.join(modes)}")
        if self.attn_impl in ("splash", "pallas"):
            check_block_size(self.splash_block_size, self.seq_len)
        if self.attn_impl == "fused":
            check_fits_vmem(self.seq_len, self.head_dim)
        if self.attn_impl == "pallas":
            require(
                all(window >= self.seq_len for window in self.windows), "attn_impl", "pallas",
                f"is causal only and cannot honour window_pattern={self.window_pattern!r}: "
                "set window_pattern='L', or attn_impl='splash'",
            )  # fmt: skip
        pair = isinstance(self.mesh, tuple) and len(self.mesh) == 2 and all(type(n) is int and n > 0 for n in self.mesh)
        require(self.mesh == "auto" or pair, "mesh", self.mesh, "must be auto, or two positive numbers, such as (2, 4)")
        require(
            self.total_batch_size == -1 or self.total_batch_size % self.tokens_per_pass == 0, "total_batch_size",
            self.total_batch_size, f"must be a multiple of device_batch_size·seq_len·devices = {self.tokens_per_pass}",
        )  # fmt: skip

    @property
    def kv_heads(self):  # K
        return self.n_head if self.n_kv_head == -1 else self.n_kv_head

    @property
    def windows(self):
        """How many tokens back each layer sees: T // 2 for S, T for L. The last layer always sees everything."""
        letters = itertools.islice(itertools.cycle(self.window_pattern), self.depth - 1)
        return [self.seq_len // 2 if letter == "S" else self.seq_len for letter in letters] + [self.seq_len]

    @property
    def mesh_shape(self):
        """(data, fsdp): how many devices there are along each axis of the mesh."""
        return (jax.device_count(), 1) if self.mesh == "auto" else self.mesh

    @property
    def devices(self):
        return math.prod(self.mesh_shape)

    @property
    def tokens_per_pass(self):
        """Of one forward and backward pass, on all devices."""
        return self.device_batch_size * self.seq_len * self.devices

    @property
    def tokens_per_step(self):
        return self.tokens_per_pass if self.total_batch_size == -1 else self.total_batch_size

    @property
    def grad_accum_steps(self):
        return self.tokens_per_step // self.tokens_per_pass

    @property
    def total_steps(self):
        """Optimizer steps of the run."""
        if self.num_iterations != -1:
            return self.num_iterations
        tokens = self.target_param_data_ratio * count_params(self)["total"]
        return max(1, round(tokens / self.tokens_per_step))

    def replace(self, **changes):
        """A copy with some fields changed, validated again."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise InputError(f"unknown Config field {name!r}{suggest(name, known)}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def for_device(cls):
        """The demo on a CPU; elsewhere the model of the notebook, its step in passes that fit the device."""
        if jax.default_backend() == "cpu":
            return cls.demo().replace(compute_dtype=cpu_dtype())
        config, device = cls(), jax.local_devices()[0]
        memory = (device.memory_stats() or {}).get("bytes_limit", 0)
        rows = DEVICE_BATCH.get(device.device_kind, 4 if memory > 40e9 else 1)
        return config.replace(device_batch_size=rows, total_batch_size=config.tokens_per_step)


# %% Config cellView="form" tags=["shared"]
# @title Config
# Sequences of a pass that fit a chip, by jax's device_kind: preflight's word. Other devices go by their memory.
DEVICE_BATCH = {"TPU v6 lite": 4, "TPU v5 lite": 4}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """All choices of a run. `Config()` is the reference model; wrong values raise InputError (a ValueError)."""

    aspect_ratio: int = 64  # D / L. Compiled. The scaling knob is n_head: D = N·H, L = D / aspect_ratio

    def check_architecture(self):
        require(self.aspect_ratio > 0, "aspect_ratio", self.aspect_ratio, "must be positive")
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
        """A few million parameters on the embedded corpus: minutes on two CPU cores."""
        return cls(
            n_head=4, head_dim=64, aspect_ratio=128, vocab_size=4096, seq_len=256, device_batch_size=8,
            learning_rate=4e-3, num_iterations=500, dataset="embedded", num_shards=-1, run_dir="runs/demo",
            log_interval=5, eval_interval=100, sample_interval=250, save_interval=250,
            eval_tokens=32_768, final_eval_tokens=-1,
        )  # fmt: skip


# %% Config from the command line cellView="form" tags=["shared"]
# @title Config from the command line
def suggest(name, known):
    """', did you mean X?', or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def parse_args(argv, config, epilog=""):
    """`--field value` pairs on top of `config`. An unknown field or a bad value raises InputError; --help lists all."""
    parser = argparse.ArgumentParser(
        description="Every option is a Config field; without options the Config fits the machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, epilog=epilog,
    )  # fmt: skip

    def refuse(message):  # argparse would print the usage, a screenful
        raise InputError(f"{message} (--help lists the fields)")

    parser.error = refuse
    fields = dataclasses.fields(config)
    for field in fields:
        parser.add_argument(f"--{field.name}", default=getattr(config, field.name), help=type_name(field))
    given, rest = parser.parse_known_args(argv)
    if rest:
        name = rest[0].lstrip("-").split("=")[0]
        raise InputError(
            f"unknown option {rest[0]!r}{suggest(name, [f.name for f in fields])} (--help lists the fields)"
        )
    changes = {}
    for field in fields:
        value = getattr(given, field.name)
        if isinstance(value, str) and field.type in (int, float):
            try:
                value = field.type(value)
            except ValueError:
                raise InputError(f"{field.name}={value!r}: must be of type {field.type.__name__}") from None
        changes[field.name] = value
    return config.replace(**changes)


@contextlib.contextmanager
def one_line_errors():
    """As a script, an InputError is one line on stderr and exit status 2; in a notebook it is raised as it is."""
    try:
        yield
    except InputError as error:
        if IN_NOTEBOOK:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        if seconds := os.environ.get("TPUCHAT_LEAVE_AFTER"):  # one of several hosts: a proper end waits for all others
            time.sleep(float(seconds))
            os._exit(2)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if IN_NOTEBOOK:
            raise
        print("interrupted; the same command goes on from the newest checkpoint, if there is one", file=sys.stderr)
        raise SystemExit(130) from None


# %% Mesh cellView="form" tags=["shared"]
# @title Mesh
def sharding(config, *spec, mesh=None):
    """A NamedSharding over config's mesh, ('data', 'fsdp'); without `mesh` of no particular devices, for a trace."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = mesh or jax.sharding.AbstractMesh(config.mesh_shape, ("data", "fsdp"), axis_types=auto)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def weight_spec(config, shape):
    """The longest axis that fsdp divides is split over it: as a tuple for PartitionSpec."""
    fsdp = config.mesh_shape[1]
    axes = [axis for axis, n in enumerate(shape) if n % fsdp == 0]
    longest = max(axes, key=lambda axis: (shape[axis], -axis), default=None)
    return tuple("fsdp" if axis == longest and fsdp > 1 else None for axis in range(len(shape)))


ROWS = ("data", "fsdp")  # sequences, or tokens, are split over all devices


def arrange(config, devices):
    """The devices of the mesh, np.array [data, fsdp], each group of them close together in the TPU's torus.

    InputError if there are not as many as config.mesh says.
    """
    require(len(devices) == config.devices, "mesh", config.mesh_shape, f"there are {len(devices)} devices")
    return mesh_utils.create_device_mesh(config.mesh_shape, list(devices), allow_split_physical_axes=True)


def device_mesh(config):
    """The mesh of this job's devices. InputError if there are too few of them, or if some hosts would have none."""
    count = jax.device_count()
    enough = config.devices <= count if jax.process_count() == 1 else config.devices == count
    require(enough, "mesh", config.mesh, f"is of {config.devices} devices, and here are {count}")
    return jax.sharding.Mesh(arrange(config, jax.devices()[: config.devices]), ("data", "fsdp"))


# %% Arrays on the mesh cellView="form" tags=["shared"]
# @title Arrays on the mesh
def put_whole(config, x, *spec):
    """An array that every process has as a whole, on the devices, split as `spec` says; on one device, as it is."""
    if config.devices == 1:
        return x
    x, place = np.asarray(x), sharding(config, *spec, mesh=device_mesh(config))
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])


def put_rows(config, tree):
    """Arrays whose first axis is split over the devices, from this process's rows of each."""
    if config.devices == 1:
        return jax.device_put(tree)
    place = sharding(config, ROWS, mesh=device_mesh(config))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), tree)


# %% Where parts lie cellView="form" tags=["shared"]
# @title Where parts lie
def constrain(config, x, *spec):
    """x, with where its parts lie said to the compiler; on one device there is nothing to say."""
    return x if config.devices == 1 else jax.lax.with_sharding_constraint(x, sharding(config, *spec))


def split_weights(config, tree):
    """Weights, moments or gradients, each split as weight_spec says."""
    return jax.tree.map(lambda w: constrain(config, w, *weight_spec(config, w.shape)), tree)


def whole_weights(config, tree):
    """Weights on every device as a whole: what fsdp has split is gathered."""
    return jax.tree.map(lambda w: constrain(config, w), tree) if config.mesh_shape[1] > 1 else tree


def in_parts(config, x, n):
    """[rows, …] → [n, rows/n, …]: parts to be taken one after the other, each of rows of every device."""
    if config.devices > 1:
        x = x.reshape(config.devices, n, -1, *x.shape[1:]).swapaxes(0, 1)
        x = constrain(config, x, None, ROWS).reshape(n, -1, *x.shape[3:])
        return constrain(config, x, None, ROWS)
    return x.reshape(n, -1, *x.shape[1:])


def from_parts(config, x):
    """What in_parts gave, put together again."""
    if config.devices > 1:
        x = x.reshape(x.shape[0], config.devices, -1, *x.shape[2:]).swapaxes(0, 1)
        x = constrain(config, x, ROWS).reshape(-1, *x.shape[3:])
        return constrain(config, x, ROWS)
    return x.reshape(-1, *x.shape[2:])


def on_each_device(config, function):
    """function, called on each device with its rows: no array inside it is another device's business."""
    if config.devices == 1:
        return function
    mesh, rows = sharding(config).mesh, jax.sharding.PartitionSpec(ROWS)
    return jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)


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


def check_vocab_size(vocab_size):
    """InputError if there is no room for a token for each byte and the special tokens."""
    least = 256 + len(SPECIAL_TOKENS)
    require(vocab_size >= least, "vocab_size", vocab_size, f"must be at least {least}: bytes and specials")


def make_tokenizer(ranks, pattern=SPLIT_PATTERN, special_tokens=SPECIAL_TOKENS):
    """A tiktoken.Encoding from `ranks` (bytes → rank, 0 … n-1); the special tokens take the ids from n on."""
    special = {token: len(ranks) + i for i, token in enumerate(special_tokens)}
    return tiktoken.Encoding("tpuchat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def save_tokenizer(tokenizer, folder):
    """Writes tokenizer.tiktoken and, last and at once, tokenizer.json to `folder`: without the second there is none."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = sorted((rank, token) for token, rank in tokenizer._mergeable_ranks.items())
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks]
    (folder / "tokenizer.tiktoken").write_text("".join(lines))
    special = sorted(tokenizer._special_tokens, key=tokenizer._special_tokens.get)
    meta = {"pattern": tokenizer._pat_str, "special_tokens": special}
    (folder / "tokenizer.json.part").write_text(json.dumps(meta, indent=2) + "\n")
    os.replace(folder / "tokenizer.json.part", folder / "tokenizer.json")


# Characters of all kinds, spaces and line ends in company: what a pattern does not match would be lost without a word.
PROBE = "It's  2026 —\r\n\n\tdef f(x): \n  return x! 東京🙂 " + "".join(map(chr, range(0x3000)))


def load_tokenizer(folder):
    """Reads what save_tokenizer wrote. InputError if a file is missing or is not what it should be."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "tokenizer.json").read_text())
        pairs = [line.split() for line in (folder / "tokenizer.tiktoken").read_text().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        if sorted(ranks.values()) != list(range(len(pairs))) or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("the ranks must be 0 … n-1, one a token, with all 256 single bytes among them")
        special = meta["special_tokens"]
        if "<|bos|>" not in special or len(set(special)) < len(special):
            raise ValueError("the special tokens must be different, with <|bos|> among them")
        tokenizer = make_tokenizer(ranks, meta["pattern"], special)
        if tokenizer.decode(tokenizer.encode_ordinary(PROBE)) != PROBE:
            raise ValueError("its pattern leaves characters out")
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tiktoken panics, which is no Exception, if a pattern matches the empty string
        raise InputError(f"tokenizer in {folder}: {error}; delete the folder to train it anew") from error


def token_bytes(tokenizer):
    """UTF-8 bytes that each token id stands for, int32 `[n_vocab]`; special tokens stand for none."""
    lengths = np.zeros(tokenizer.n_vocab, np.int32)
    for token, rank in tokenizer._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


# %% Train a tokenizer cellView="form" tags=["shared"]
# @title Train a tokenizer
def train_tokenizer(texts, vocab_size, max_chars=2_000_000_000, doc_chars=10_000, expected_chars=None):
    """Byte-level BPE of `vocab_size` tokens, the special ones included, on at most `max_chars` characters.

    Of each document only the first `doc_chars` characters are used, so that one long document does not weigh more
    than a hundred short ones. The texts stream through: what grows is the table of different words and their counts.
    `expected_chars`, of whole documents, is where the progress bar ends. InputError if there is too little text.
    """
    import rustbpe

    check_vocab_size(vocab_size)
    merges = vocab_size - len(SPECIAL_TOKENS)
    bar = tqdm(
        total=expected_chars, desc="reading", unit=" chars", unit_scale=True, leave=False,
        disable=not someone_watches(), file=bar_file(),
    )

    def stream():
        left = max_chars
        for text in texts:
            bar.update(len(text))
            text = text[: min(doc_chars, left)]
            left -= len(text)
            yield text
            if left == 0:
                break
        bar.set_description("merging")

    with bar:
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(stream(), merges, buffer_size=1024, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < merges:
        raise InputError(
            f"vocab_size={vocab_size}: this text yields only {len(ranks)} tokens; give more text or ask for fewer"
        )
    return make_tokenizer(ranks)


# %% Where a tokenizer lies cellView="form" tags=["shared"]
# @title Where a tokenizer lies
def tokenizer_folder(config, first_shard):
    """The folder, of this machine, for the tokenizer that 01_tokenizer.py trains for config.dataset."""
    source = config.dataset if on_hub(config.dataset) else str(Path(first_shard).resolve().parent)
    return cache_dir() / "tokenizers" / f"{source.strip('/').replace('/', '--')}-{config.vocab_size}"


# %% Find the tokenizer cellView="form" tags=["shared"]
# @title Find the tokenizer
def hub_tokenizer(repo_id):
    """The local folder of a Hub repo's tokenizer, or None if the repo has none."""
    try:
        for name in ("tokenizer.tiktoken", "tokenizer.json"):
            folder = hub_download(repo_id, f"tokenizer/{name}", repo_type="model").parent
        return folder
    except MissingFileError:
        return None


def find_tokenizer(config, first_shard):
    """The tokenizer of config.dataset: a local one (beside the shards, or from 01_tokenizer.py), else that of the Hub
    repo config.hf_repo_id, else one trained on `first_shard`, and kept.

    InputError if it has more tokens than the model has rows for.
    """

    def there(folder):
        return folder is not None and (folder / "tokenizer.json").exists()

    made = tokenizer_folder(config, first_shard)
    folder = next(filter(there, (first_shard.parent / "tokenizer", made)), None)
    if not folder and config.hf_repo_id:
        folder = hub_tokenizer(config.hf_repo_id)
    if not folder:  # its name has the size of the shard: another shard, another tokenizer
        folder = made.with_name(f"{made.name}-first-shard-{first_shard.stat().st_size}")
    if there(folder):
        tokenizer = load_tokenizer(folder)
    else:
        print(f"training a tokenizer of {config.vocab_size} tokens on {first_shard.name}", flush=True)
        texts = (text for _, text in read_documents(first_shard))
        tokenizer = train_tokenizer(texts, config.vocab_size, expected_chars=count_chars(first_shard))
        try:
            save_tokenizer(tokenizer, folder)
        except OSError as error:
            raise InputError(
                f"cannot keep the tokenizer in {folder}: {error}; set HOME to a folder to write to"
            ) from error
    if tokenizer.n_vocab > config.vocab_size:
        raise InputError(
            f"vocab_size={config.vocab_size}: the tokenizer of {config.dataset} has {tokenizer.n_vocab} tokens; "
            f"set vocab_size to at least that"
        )
    return tokenizer


# %% Hub cellView="form" tags=["shared"]
# @title Hub
HUB_SHARDS = {"karpathy/fineweb-edu-100b-shuffle": 1823, "karpathy/climbmix-400b-shuffle": 6543}  # the last validates


class MissingFileError(InputError):
    """A Hub repo is there, and has no such file."""


def hub_token():
    """The user's token, or None. Of a bad one the HTTP library would complain by quoting it."""
    token = get_secret("HF_TOKEN")
    if token and not re.fullmatch("[!-~]+", token):
        raise InputError("HF_TOKEN: holds a space, a line end or another character that no token has; copy it again")
    return token


def is_intact(path, etag=""):
    """Whether a file of huggingface_hub's cache is what the Hub has: large files are stored under their SHA-256, and
    where there are no symbolic links to tell it, it is `etag`."""
    digest = Path(os.readlink(path)).name if path.is_symlink() else etag
    if len(digest) != 64:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def explain(error, repo_id, repo_type):
    """(what a failed request to the Hub means, what to do about it)."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # what went wrong before the cache was asked
    status = getattr(getattr(error, "response", None), "status_code", 0)
    page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
    if isinstance(error, errors.HFValidationError):
        return f"{repo_id!r} is not the name of a repo", "a name has the form owner/name"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return (
            f"access is refused ({status})",
            f"accept its terms on {page} and set HF_TOKEN to a token that may read it",
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        hint = "" if repo_id in HUB_SHARDS else suggest(repo_id, HUB_SHARDS)
        remedy = f"check the name{hint}; a private repo wants a valid HF_TOKEN"
        return f"there is no such {repo_type} repo, or it is private ({status})", remedy
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return "the repo has no such file (404)", f"look for it on {page}"
    if status == 429:
        return "it limits the rate of requests (429)", "wait some minutes, or set HF_TOKEN: accounts have higher limits"
    if status >= 500:
        return f"it is in trouble ({status})", "try again later; what has been downloaded is kept"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set", f"it is not in the cache, {constants.HF_HUB_CACHE}: unset it and download once"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full ({error.strerror})", f"make room, or move {constants.HF_HOME}: set HF_HOME elsewhere"
    if isinstance(error, OSError) and error.errno:
        return reason, "set HF_HOME to a folder to write to"
    return f"no connection, or a broken one ({reason})", "check the network, or use dataset='embedded'"


def may_pass(error):
    """Whether it makes sense to ask again: not where the Hub refuses, nothing is found, or a disk is full."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", 0)
    final = isinstance(error, (errors.EntryNotFoundError, errors.HFValidationError)) or 400 <= status < 500
    return not final and not getattr(error, "errno", None)  # EntryNotFoundError includes a HEAD tried often enough


def ask_hub(what, repo_id, repo_type, call, attempts=1):
    """call(), again if the reason for its failure may pass. InputError that names `what`, the cause and the remedy."""
    from huggingface_hub import errors

    for attempt in range(attempts):
        try:
            return call()
        except InputError:
            raise
        except Exception as error:  # its client raises its own, those of its HTTP library, and OSError
            if may_pass(error) and attempt < attempts - 1:
                time.sleep(2**attempt)  # its client has its own patience with connections, not with a 500
                continue
            cause, remedy = explain(error, repo_id, repo_type)
            missing = isinstance(error, errors.EntryNotFoundError) and "404" in cause
            raise (MissingFileError if missing else InputError)(
                f"cannot get {what} of {repo_id} from the Hugging Face Hub: {cause}; {remedy}"
            ) from error


def hub_download(repo_id, filename, repo_type="dataset"):
    """The local path of a file of a Hub repo, in huggingface_hub's cache; downloaded if it is not there or outdated."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    def download():
        watched = threading.current_thread() is threading.main_thread() and someone_watches()
        (enable_progress_bars if watched else disable_progress_bars)()  # one bar at a time: in the background, none
        path, etag = Path(hf_hub_download(repo_id, filename, repo_type=repo_type, token=hub_token())), ""
        if not path.is_symlink():
            with contextlib.suppress(Exception):  # no network: then it is what an earlier process has checked
                etag = get_hf_file_metadata(hf_hub_url(repo_id, filename, repo_type=repo_type), token=hub_token()).etag
        if not is_intact(path, etag):
            if path.is_symlink():
                (path.parent / os.readlink(path)).unlink()
            path.unlink()
            raise ConnectionError("the SHA-256 of what arrived is not the Hub's")
        return path

    return ask_hub(filename, repo_id, repo_type, download, attempts=5)


def hub_shard(repo_id, filename):
    """The local path of a shard: a shard that is there and whole is used without asking the Hub."""
    path = cached_shard(repo_id, filename)
    return path if path and is_intact(path) else hub_download(repo_id, filename)


def cached_shard(repo_id, filename):
    """The path of a shard in the cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo_id, filename, repo_type="dataset")
    return Path(path) if isinstance(path, str) else None


# %% Shards cellView="form" tags=["shared"]
# @title Shards
EMBEDDED_SHARDS = 5


def on_hub(dataset):
    """Whether `dataset` names one of the Hub: one of ours, or neither 'embedded' nor a folder."""
    return dataset in HUB_SHARDS or not (dataset == "embedded" or (dataset and Path(dataset).is_dir()))


def embedded_folder():
    """data/embedded of the repository: beside this file, else fetched from GitHub (a lone notebook in Colab)."""
    here = Path(globals().get("__file__", "notebook")).resolve().parent / "data" / "embedded"
    if here.exists():
        return here
    folder = cache_dir() / "embedded"
    names = [f"shard_{i:05d}.parquet" for i in range(EMBEDDED_SHARDS)]
    for name in [*names, "tokenizer/tokenizer.tiktoken", "tokenizer/tokenizer.json"]:
        if not (folder / name).exists():
            url = f"https://raw.githubusercontent.com/{GITHUB}/main/data/embedded/{name}"
            try:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                partial, _ = urllib.request.urlretrieve(url, folder / f"{name}.part")
            except OSError as error:
                raise InputError(
                    f"cannot get the embedded corpus from {url}: {error}; clone the repository instead"
                ) from error
            os.replace(partial, folder / name)
    return folder


def hub_listing(dataset):
    """(repo, [file name of each shard]) of a Hub dataset. The list is kept, for when the Hub cannot be reached."""
    repo_id, folder = "/".join(dataset.split("/")[:2]), "/".join(dataset.split("/")[2:])
    if dataset in HUB_SHARDS:
        return dataset, [f"shard_{i:05d}.parquet" for i in range(HUB_SHARDS[dataset])]
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+(/.+)?", dataset):
        raise InputError(
            f"dataset={dataset!r}: must be 'embedded', a folder of parquet shards, or a dataset of the Hugging Face "
            f"Hub: owner/name, such as {next(iter(HUB_SHARDS))}"
        )
    from huggingface_hub import HfApi

    def ask():
        api = HfApi(token=hub_token())
        tree = api.list_repo_tree(repo_id, folder or None, recursive=True, repo_type="dataset")
        return sorted(entry.path for entry in tree if entry.path.endswith(".parquet"))

    kept = cache_dir() / "listings" / f"{dataset.replace('/', '--')}.json"
    try:
        names = ask_hub(f"the list of shards{folder and ' in '}{folder}", repo_id, "dataset", ask)
    except InputError:
        with contextlib.suppress(OSError, ValueError):
            return repo_id, json.loads(kept.read_text())
        raise
    with contextlib.suppress(OSError):  # a home that cannot be written to costs no more than this
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(names))
    return repo_id, names


def list_shards(config):
    """(fetchers of the training shards, fetcher of the validation shard); a fetcher returns the shard's local path."""
    if on_hub(config.dataset):
        repo_id, names = hub_listing(config.dataset)
        fetchers = [functools.partial(hub_shard, repo_id, name) for name in names]
    else:
        folder = embedded_folder() if config.dataset == "embedded" else Path(config.dataset)
        fetchers = [functools.partial(Path, path) for path in sorted(folder.glob("*.parquet"))]
    if len(fetchers) < 2:
        raise InputError(
            f"dataset={config.dataset!r}: has {len(fetchers)} parquet shards; it takes at least two, "
            "the last one for validation"
        )
    *train, validation = fetchers
    return train[: None if config.num_shards == -1 else config.num_shards], validation


def announce_downloads(config, fetchers):
    """Prints how much is to be downloaded, where to, and about how long that takes; nothing if all of it is here."""
    if not on_hub(config.dataset):
        return
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    absent = [fetch for fetch in fetchers if not cached_shard(*fetch.args)]
    if not absent or constants.HF_HUB_OFFLINE:
        return
    repo_id, name = absent[0].args
    url = hf_hub_url(repo_id, name, repo_type="dataset")
    with contextlib.suppress(Exception):  # a courtesy: whatever is wrong, the download itself will say
        size = get_hf_file_metadata(url, token=hub_token(), timeout=10).size
        total = size * len(absent)
        print(f"data    {len(absent)} of {len(fetchers)} shards of {repo_id} are not here, {size / 1e6:,.0f} MB each")
        print(f"        {total / 1e9:,.1f} GB, {format_time(total * 8 / 100e6)} at 100 Mbit/s, fetched ahead of use")
        print(f"        into {constants.HF_HUB_CACHE}", flush=True)


# %% Read documents cellView="form" tags=["shared"]
# @title Read documents
DAMAGED_PARQUET = pa.ArrowException, OSError, UnicodeDecodeError  # what pyarrow raises


def check_shard(path):
    """`path`, if it is a whole shard: InputError that names the shard and what is wrong with it otherwise.

    Only the parquet footer is read: its statistics tell whether a text is null (null_count) or empty (the minimum).
    """
    try:
        shard = pq.ParquetFile(path)
        groups = [shard.metadata.row_group(g) for g in range(shard.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        statistics = [chunk.statistics for chunk in chunks if chunk.path_in_schema == "text" and chunk.statistics]
        doubtful = any(s.null_count or (s.has_min_max and s.min in ("", b"")) for s in statistics)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such shard") from None
    except DAMAGED_PARQUET as error:
        raise InputError(
            f"{path}: not a whole parquet file ({str(error).splitlines()[0]}); delete it and get it again"
        ) from error
    columns = shard.schema_arrow.names
    if "text" not in columns:
        raise InputError(f"{path}: has no `text` column, only {', '.join(columns)}")
    kind = shard.schema_arrow.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"{path}: its `text` column holds {kind}, not strings")
    if shard.metadata.num_rows == 0:
        raise InputError(f"{path}: holds no documents")
    if doubtful:
        for _ in read_documents(path):  # raises at the row in question
            pass
    return path


def count_chars(path):
    """Bytes of text in a shard, from its footer: about its characters."""
    metadata = pq.read_metadata(path)
    columns = [
        metadata.row_group(g).column(i) for g in range(metadata.num_row_groups) for i in range(metadata.num_columns)
    ]
    lengths = 4 * metadata.num_rows  # parquet puts its length before each text
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "text") - lengths


def read_documents(path, start=0, step=1):
    """Yields (row, text) of rows start, start + step, …, with one row group in memory at a time."""
    shard, row = pq.ParquetFile(path), 0
    for group in range(shard.num_row_groups):
        rows = shard.metadata.row_group(group).num_rows
        wanted = range(start - row if start > row else (start - row) % step, rows, step)
        if wanted:
            try:
                column = shard.read_row_group(group, columns=["text"]).column("text")
                texts = (column.take(pa.array(wanted)) if len(column) == rows and step > 1 else column).to_pylist()
            except DAMAGED_PARQUET as error:
                raise InputError(
                    f"{path}: row group {group} is damaged ({str(error).splitlines()[0]}); delete it and get it again"
                ) from error
            if len(column) != rows:
                raise InputError(
                    f"{path}: row group {group} has {len(column)} rows, not {rows}; delete it and get it again"
                )
            for i, text in zip(wanted, texts if step > 1 else texts[wanted.start :], strict=True):
                if not text:
                    raise InputError(
                        f"{path}: the text of row {row + i} is null or empty; drop such rows from the shard"
                    )
                yield row + i, text
        row += rows


# %% Encode cellView="form" tags=["shared"]
# @title Encode
PIECE_CHARS = 20_000  # a longer document is encoded in pieces: bounds the latency and memory of one call
GROUP_CHARS = 50_000  # short documents are encoded in groups: a thread's task should be worth its overhead


def encode_document(tokenizer, text):
    """BOS and the tokens of `text`, uint32. Text that looks like a special token is encoded as ordinary text."""
    pieces = [text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)]
    tokens = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return np.concatenate([np.array([tokenizer.encode_single_token("<|bos|>")], np.uint32), *tokens])


# %% Loader cellView="form" tags=["shared"]
# @title Loader
class Position(NamedTuple):
    """Where a token stands: `offset` tokens into document `row` of training shard `shard`, in pass `epoch`."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    offset: int = 0


def split_streams(positions, processes):
    """The positions of S streams → of as many as `processes` can share equally: lcm(S, processes). Where a stream is
    split, each of its documents from its position on falls to one of the new ones, by its row."""
    old, new = len(positions), math.lcm(len(positions), processes)
    found = [positions[s % old] for s in range(new)]
    return [
        place if place.row % new == s else place._replace(row=place.row + (s - place.row) % new, offset=0)
        for s, place in enumerate(found)
    ]


class PrefetchDataLoader:
    """Iterates over (tokens, targets), int32 `[total_batch_size / T, T]` on the devices, from background threads.

    `shards` are the fetchers that list_shards returns. The next shard is fetched while one is read. An exception in a
    thread is raised by the next `next(loader)`. Use it in a `with` block, or call close().

    Of S streams, stream s has the documents of rows s, s + S, … of every shard, and fills rows of the batch of its own.
    Each of the `processes` reads some of them: one, unless a run goes on with fewer processes than it had.
    """

    def __init__(self, config, tokenizer, shards, *, threads=None, depth=4, process=None, processes=None):
        self.config, self.tokenizer, self.shards = config, tokenizer, shards
        self.threads, self.depth = threads or os.cpu_count(), depth
        self.process = jax.process_index() if process is None else process
        self.processes = processes or jax.process_count()
        rows = config.tokens_per_step // config.seq_len
        require(rows % self.processes == 0, "total_batch_size", rows * config.seq_len,
                f"must give each of {self.processes} processes as many sequences")  # fmt: skip
        self.rows = rows // self.processes  # of a batch, that this process fills
        self.wait_seconds = 0.0  # how long the training loop has waited for data
        self._start([Position()])

    def _start(self, positions):
        everywhere = split_streams(positions, self.processes)
        each = len(everywhere) // self.processes
        own = range(self.process * each, (self.process + 1) * each)
        self.streams, self.positions = len(everywhere), [everywhere[s] for s in own]
        self.ready = collections.deque()
        self.queue, self.stop = queue.Queue(self.depth), threading.Event()
        work = list(zip(own, self.positions, strict=True)), self.queue, self.stop
        self.thread = threading.Thread(target=self._produce, args=work, daemon=True)
        self.thread.start()

    @property
    def position(self):
        """The place of the next token of this process's first stream."""
        return self.positions[0]

    def _documents(self, stream, start, stop):
        """Yields (place of the document, text), forever, and (None, "") at the end of each shard."""
        place, empty = start, 0

        def fetch(shard):
            return in_background(lambda: check_shard(self.shards[shard]()))

        here = fetch(place.shard)
        while True:
            if place != start and here.done() and here.exception():
                here = fetch(place.shard)  # it failed ahead of use: a network has had a whole shard's time to recover
            while not here.done():
                concurrent.futures.wait([here], timeout=0.1)
                if stop.is_set():
                    return
            path = here.result()
            rows = pq.read_metadata(path).num_rows
            if place == start and place.row and place.row - (self.streams - 1) >= rows:
                raise InputError(f"{path}: has no row {place.row}, where the run is to go on; was the shard changed?")
            following = (place.shard + 1) % len(self.shards)
            here = fetch(following)
            for row, text in read_documents(path, place.row, self.streams):
                yield place._replace(row=row, offset=0), text
            yield None, ""
            empty = empty + 1 if place.row >= rows else 0
            if empty > len(self.shards):
                raise InputError(f"{path}: no shard has a document for each of {self.streams} streams; use fewer hosts")
            place = Position(place.epoch + (following == 0), following, row=stream)

    def _encoded(self, stream, start, pool, stop):
        """Yields groups of documents, [(place of the first token, tokens), …], in order, encoded some groups ahead."""

        def encode(group):
            encoded = [(place, encode_document(self.tokenizer, text)) for place, text in group]
            if encoded and encoded[0][0] == start._replace(offset=0):  # a resumed run starts within a document
                tokens = encoded[0][1][start.offset :]
                if len(tokens) == 0:
                    raise InputError(f"loader position {start}: the document has fewer tokens; was it changed?")
                encoded[0] = (start, tokens)
            return encoded

        ahead, group, chars = collections.deque(), [], 0
        for place, text in self._documents(stream, start, stop):
            if place:
                group.append((place, text))
                chars += len(text)
            if chars >= GROUP_CHARS or not place:
                ahead.append(pool.submit(encode, group))
                group, chars = [], 0
            # At the end of a shard nothing is held back: the next one may not be there yet.
            while len(ahead) > (2 * self.threads if place else 0):
                yield ahead.popleft().result()

    def _rows(self, stream, start, pool, stop):
        """Yields what each group of documents completes of a stream's rows: [(tokens, targets, place of the token
        after)]."""
        shape = self.rows // len(self.positions), self.config.seq_len
        n = math.prod(shape)
        held, parts = 0, collections.deque()
        for group in self._encoded(stream, start, pool, stop):
            parts.extend(group)
            held += sum(len(tokens) for _, tokens in group)
            ready = []
            while held > n:  # enough for n inputs and the target of the last
                taken, left = [], n
                while len(parts[0][1]) <= left:
                    taken.append(parts.popleft()[1])
                    left -= len(taken[-1])
                place, tokens = parts[0]
                taken = np.concatenate([*taken, tokens[: left + 1]]).astype(np.int32)
                parts[0] = (place._replace(offset=place.offset + left), tokens[left:])
                held -= n
                tokens, targets = (part.reshape(shape) for part in (taken[:-1], taken[1:]))
                ready.append((tokens, targets, parts[0][0]))
            if ready:
                yield ready

    def _batches(self, work, pool, stop):
        """Yields the batches that are complete: [(tokens, targets, places of the tokens after, one a stream)]."""
        streams = [self._rows(stream, start, pool, stop) for stream, start in work]
        if len(streams) == 1:
            for ready in streams[0]:
                yield [(tokens, targets, [place]) for tokens, targets, place in ready]
        for parts in zip(*map(itertools.chain.from_iterable, streams)):
            tokens, targets, places = zip(*parts)
            yield [(np.concatenate(tokens), np.concatenate(targets), list(places))]

    def _produce(self, work, batches, stop):
        def put(item):
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    return batches.put(item, timeout=0.1)

        pool = concurrent.futures.ThreadPoolExecutor(self.threads)
        try:
            for ready in self._batches(work, pool, stop):
                # One call, and one hand-over, for all that is ready: small batches are otherwise half as fast.
                arrays = put_rows(self.config, [(tokens, targets) for tokens, targets, _ in ready])
                put(list(zip(arrays, [places for *_, places in ready], strict=True)))
                if stop.is_set():
                    break
        except BaseException as error:
            put(error)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def __iter__(self):
        return self

    def __next__(self):
        if self.stop.is_set():
            raise RuntimeError("the loader is closed")
        if not self.ready:
            started = time.perf_counter()
            item = self.queue.get()
            self.wait_seconds += time.perf_counter() - started
            if isinstance(item, BaseException):
                self.queue.put(item)  # whoever asks again hears the same
                raise item
            self.ready.extend(item)
        batch, self.positions = self.ready.popleft()
        return batch

    def state_dict(self):
        """The place of the first token of the next batch in each stream, of all processes, for JSON. All call it."""
        places = from_all_processes(np.array(self.positions, np.int32))
        places = [Position(*place)._asdict() for place in places.tolist()]
        return places[0] if len(places) == 1 else {"streams": places}

    def load_state_dict(self, state):
        """Goes on from where state_dict was taken, with as many processes or others. InputError if that is not a place
        in these shards."""
        places = state["streams"] if isinstance(state, dict) and set(state) == {"streams"} else [state]
        try:
            positions = [Position(**place) for place in places]
            whole = positions and all(type(number) is int and number >= 0 for place in positions for number in place)
        except TypeError:
            whole = False
        if not whole or any(place.shard >= len(self.shards) for place in positions):
            raise InputError(f"loader position {state}: not one in {len(self.shards)} training shards")
        self.close()
        self._start(positions)

    def close(self):
        """Stops the threads. Batches that were ready are dropped; the position stays."""
        self.stop.set()
        self.thread.join(timeout=10)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


# %% Initial values cellView="form" tags=["shared"]
# @title Initial values
def init_params(config, key):
    """Float32 master parameters: {'embed': [V, D], 'layers': [...], 'lm_head': [D, V]}.

    | weight                | shape                  | initial value                                            |
    |-----------------------|------------------------|----------------------------------------------------------|
    | embed                 | [V, D]                 | normal, std 0.1; a norm follows, so only its direction   |
    |                       |                        | matters, and Adam turns a short row faster than a long   |
    | q, k, v, up           | [D, N or K, H], [D, F] | uniform, std 1/√D: unit variance in, unit variance out   |
    | o, down               | [N, H, D], [F, D]      | zero: at step 0 every layer is the identity              |
    | lm_head               | [D, V]                 | normal, std 0.001: logits ≈ 0, loss ≈ ln V               |
    | resid_scale, x0_scale | []                     | 1 and 0.1                                                |
    """
    V, D, N, K, H, F = config.vocab_size, config.n_embd, config.n_head, config.kv_heads, config.head_dim, config.mlp_dim
    keys = iter(jax.random.split(key, 2 + 4 * config.depth))

    def uniform(*shape):
        bound = (3 / D) ** 0.5  # of a uniform distribution with std 1/√D
        return jax.random.uniform(next(keys), shape, jnp.float32, -bound, bound)

    def normal(std, *shape):
        return std * jax.random.normal(next(keys), shape, jnp.float32)

    def layer():
        return {
            "q": uniform(D, N, H), "k": uniform(D, K, H), "v": uniform(D, K, H), "o": jnp.zeros((N, H, D)),
            "up": uniform(D, F), "down": jnp.zeros((F, D)),
            "resid_scale": jnp.ones(()), "x0_scale": jnp.full((), 0.1, jnp.float32),
        }  # fmt: skip

    return {
        "embed": normal(0.1, V, D),
        "lm_head": normal(0.001, D, V),
        "layers": [layer() for _ in range(config.depth)],
    }


# %% Norm and RoPE cellView="form" tags=["shared"]
# @title Norm and RoPE
def rms_norm(x):
    """x / rms(x) over the last axis, reduced in float32. No learned weight."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def rope_tables(seq_len, head_dim):
    """cos and sin, float32 [T, H/2]: pair i of position t turns by t / 10000^(2i/H). Constants of the trace."""
    frequencies = 10_000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(seq_len)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def norm_and_rope(x, cos, sin):
    """QK-norm, then RoPE on the pairs (x[i], x[i + H/2]): one float32 pass, one rounding. x: [B, N, T, H]."""
    first, second = jnp.split(rms_norm(x.astype(jnp.float32)), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


# %% Heads cellView="form" tags=["shared"]
# @title Heads
def split_heads(x, T, H):
    """[B·T, N·H] → [B, N, T, H]."""
    return x.reshape(-1, T, x.shape[1] // H, H).swapaxes(1, 2)


def merge_heads(y):
    """[B, N, T, H] → [B·T, N·H]."""
    B, N, T, H = y.shape
    return y.swapaxes(1, 2).reshape(B * T, N * H)


# %% Attention cellView="form" tags=["shared"]
# @title Attention
def check_block_size(block_size, seq_len):
    """InputError unless the TPU kernels can tile a sequence of `seq_len` by `block_size`."""
    require(seq_len % 128 == 0, "seq_len", seq_len, "must be a multiple of 128 for the splash and pallas kernels")
    block = min(block_size, seq_len)
    require(
        block % 128 == 0 and seq_len % block == 0, "splash_block_size", block_size,
        f"must be a multiple of 128 that divides seq_len={seq_len}",
    )  # fmt: skip


def attention(q, k, v, *, window, impl="auto", block_size=1024):
    """Causal softmax attention with grouped key/value heads; scores are scaled by 1/√H.

    q: [B, N, T, H]; k, v: [B, K, T, H], where query head n reads key/value head n // (N/K). Returns [B, N, T, H].
    A query at t sees keys t − window … t; window ≥ T is full causal attention. `block_size` tiles the TPU kernels.
    """
    N, T, H = q.shape[1:]
    K, scale = k.shape[1], H**-0.5
    impls = ("auto", "einsum", "jax", "splash", "pallas")
    require(impl in impls, "impl", impl, f"must be one of {', '.join(impls)}")
    require(N % K == 0, "k.shape[1]", K, f"must divide the {N} query heads")
    if impl == "auto":
        tiles = T % 128 == 0 and T % min(block_size, T) == 0
        call = functools.partial(attention, window=window, block_size=block_size)
        return jax.lax.platform_dependent(
            q, k, v, tpu=functools.partial(call, impl="splash" if tiles else "jax"),
            cuda=functools.partial(call, impl="jax"), default=functools.partial(call, impl="einsum"),
        )  # fmt: skip
    if impl == "einsum":
        q = q.reshape(q.shape[0], K, N // K, T, H)
        scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
        t, s = np.arange(T)[:, None], np.arange(T)[None, :]
        probs = jax.nn.softmax(jnp.where((s <= t) & (t - s <= window), scores, -jnp.inf), axis=-1)
        out = jnp.einsum("bkgts,bksh->bkgth", probs.astype(v.dtype), v)
        return out.reshape(-1, N, T, H)
    if impl == "jax":
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # it wants [B, T, N, H]
        local = (window, 0) if window < T else None
        call = functools.partial(jax.nn.dot_product_attention, scale=scale, is_causal=True, local_window_size=local)
        if cudnn_takes(q):  # jax.nn never takes it by itself
            cudnn = functools.partial(call, implementation="cudnn")
            return jnp.swapaxes(jax.lax.platform_dependent(q, k, v, cuda=cudnn, default=call), 1, 2)
        return jnp.swapaxes(call(q, k, v), 1, 2)

    check_block_size(block_size, T)
    block = min(block_size, T)
    if impl == "splash":
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # splash leaves it to its caller
        return on_tpu_or_interpreted(functools.partial(splash_attention, window=window, block=block), q, k, v)
    if impl == "pallas":
        require(
            window >= T, "window", window, f"the pallas kernel is causal only: give window >= T = {T}, or use splash"
        )
        k, v = (jnp.repeat(x, N // K, axis=1) for x in (k, v))  # it wants as many key/value as query heads
        return on_tpu_or_interpreted(functools.partial(flash_attention, block=block, scale=scale), q, k, v)


def cudnn_takes(q):
    """Whether this machine has a GPU for cuDNN's flash attention, and q [B, T, N, H] is of a kind that it takes."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # '8.0' is an A100, '9.0' an H100
    if not re.fullmatch(r"\d+\.\d+", capability) or q.dtype != jnp.bfloat16:
        return False
    return float(capability) >= 8 and q.shape[-1] % 8 == 0 and q.shape[-1] <= (256 if float(capability) >= 9 else 128)


# %% Attention kernels cellView="form" tags=["shared"]
# @title Attention kernels
def on_tpu_or_interpreted(kernel, q, k, v):
    """kernel(q, k, v, interpret=False) where the program is lowered for a TPU, interpret=True elsewhere."""
    return jax.lax.platform_dependent(
        q, k, v, tpu=functools.partial(kernel, interpret=False), default=functools.partial(kernel, interpret=True)
    )


@functools.lru_cache
def splash_kernel(N, T, window, block, interpret):
    """The splash attention kernel for [N, T, H] queries; layers with the same window share it."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = splash.CausalMask((T, T)) if window >= T else splash.LocalMask((T, T), window_size=(window, 0), offset=0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    with jax.ensure_compile_time_eval():  # its mask tables must be arrays, not tracers of the first layer that asks
        return splash.make_splash_mha(
            splash.MultiHeadMask([mask] * N), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )


def splash_attention(q, k, v, *, window, block, interpret):
    return jax.vmap(splash_kernel(*q.shape[1:3], window, block, interpret))(q, k, v)


def flash_attention(q, k, v, *, block, scale, interpret):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    sizes = flash.BlockSizes(
        block_b=1, block_q=block, block_k_major=block, block_k=block, block_q_major_dkv=block, block_q_dkv=block,
        block_k_major_dkv=block, block_k_dkv=block, block_q_dq=block, block_k_major_dq=block, block_k_dq=block,
    )  # fmt: skip
    kernel = functools.partial(flash.flash_attention, causal=True, sm_scale=scale, block_sizes=sizes)
    if not interpret:
        return kernel(q, k, v)

    # The kernel has no interpret argument, and its backward pass is traced later than this line: wrap both. True is
    # the interpreter without callbacks: their ordering tokens would not lower beside the TPU's branch.
    @jax.custom_vjp
    def interpreted(q, k, v):
        return forward(q, k, v)[0]

    def forward(q, k, v):
        with pltpu.force_tpu_interpret_mode(True):
            return jax.vjp(kernel, q, k, v)

    def backward(vjp, gradient):
        with pltpu.force_tpu_interpret_mode(True):
            return vjp(gradient)

    interpreted.defvjp(forward, backward)
    return interpreted(q, k, v)


# %% Fused attention cellView="form" tags=["shared"]
# @title Fused attention
VMEM_LIMIT = 64 * 2**20  # bytes that a program may use of a chip's 128 MiB


def fits_vmem(T, H):
    """Whether fused_attention can take sequences of T tokens and heads of H: whole ones must fit."""
    return T % 128 == 0 and H % 128 == 0 and T * H <= 4096 * 128


def check_fits_vmem(seq_len, head_dim):
    """InputError unless fused_attention can take them."""
    require(
        fits_vmem(seq_len, head_dim), "attn_impl", "fused",
        f"needs seq_len={seq_len} and head_dim={head_dim} to be multiples of 128, of a product of at most 4096·128; "
        "or set attn_impl='splash'",
    )  # fmt: skip


def query_tiles(T, size, window):
    """[(rows, keys)]: slices of at most `size` queries, and of the keys in whole tiles of 128 that some of them see."""
    size = next(s for s in (size, 256, 128) if T % s == 0)
    return [(slice(t, t + size), slice(max(0, t - window) // 128 * 128, t + size)) for t in range(0, T, size)]


def visible(rows, keys, window, query_axis):
    """Boolean [rows, keys], or [keys, rows] where query_axis is 1: a query at t sees the keys t − window … t."""
    sizes = [rows.stop - rows.start, keys.stop - keys.start]
    t, s = (
        jax.lax.broadcasted_iota(jnp.int32, sizes[:: 1 - 2 * query_axis], axis) for axis in (query_axis, 1 - query_axis)
    )
    age = t - s + (rows.start - keys.start)
    return (age >= 0) & (age <= window)


def dot(a, b, axis_a, axis_b):
    """Contracts an axis of each; float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def turn(x, cos, sin):
    """Rotates the pairs (x[i], x[i + H/2]) of x [t, H] by cos = [c, c] and sin = [−s, s]; by −sin it turns back."""
    return x * cos + pltpu.roll(x, x.shape[-1] // 2, 1) * sin


def normed_and_turned(x, cos, sin):
    """norm_and_rope of x [t, H], float32, and 1/rms(x) [t, 1]."""
    x = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return turn(x * inverse, cos, sin), inverse


def turned_back(g, turned, inverse, cos, sin):
    """The gradient of x from g, that of turned, both of normed_and_turned(x)."""
    return inverse * turn(g - turned * jnp.mean(g * turned, axis=-1, keepdims=True), cos, -sin)


def fold_lanes(x):
    """[t, n·128] → [t, 128], by adding: what is left is one sum across lanes."""
    return sum(x[:, i : i + 128] for i in range(0, x.shape[1], 128))


def forward_kernel(q_ref, k_ref, v_ref, cos_ref, sin_ref, y_ref, lse_ref, keys_ref, *, window, group):
    """One head of one sequence. q, k, v, y: [T, H]; lse: [1, 1, T]; keys: VMEM for the turned keys."""
    T, H = q_ref.shape

    def turn_keys(rows):
        keys_ref[rows] = normed_and_turned(k_ref[rows], cos_ref[rows], sin_ref[rows])[0].astype(k_ref.dtype)

    if group > 1:  # the first query head turns the keys for all of its group
        pl.when(pl.program_id(2) == 0)(lambda: turn_keys(slice(0, T)))
    for rows, keys in query_tiles(T, 256, window):
        if group == 1:  # beside the matmuls: as a step of its own it would cost 5 to 11%
            turn_keys(rows)
        q = normed_and_turned(q_ref[rows], cos_ref[rows], sin_ref[rows])[0] * H**-0.5
        scores = dot(q.astype(k_ref.dtype), keys_ref[keys], 1, 1)
        p = jnp.where(visible(rows, keys, window, 0), jnp.exp(scores), 0)
        y, sums = dot(p.astype(v_ref.dtype), v_ref[keys], 1, 0), fold_lanes(p)
        y_ref[rows] = (y / jnp.sum(sums, axis=1, keepdims=True)).astype(y_ref.dtype)
        lse_ref[0, :, rows] = jnp.log(jnp.sum(sums.T, axis=0, keepdims=True))


def backward_kernel(
    q_ref, k_ref, v_ref, y_ref, g_ref, lse_ref, cos_ref, sin_ref, dq_ref, dk_ref, dv_ref, keys_ref, dk_sum, dv_sum,
    *, window, group,
):  # fmt: skip
    """The gradients dq, dk, dv [T, H] of what the forward kernel read, from g, that of y. `…_sum`: float32 VMEM."""
    T, H = q_ref.shape
    tiles = query_tiles(T, 512, window)

    def turn_keys(rows):
        keys_ref[rows] = normed_and_turned(k_ref[rows], cos_ref[rows], sin_ref[rows])[0].astype(k_ref.dtype)
        dk_sum[rows] = dv_sum[rows] = jnp.zeros((rows.stop - rows.start, H), jnp.float32)

    def finish_keys():
        for rows, _ in tiles:
            turned = normed_and_turned(k_ref[rows], cos_ref[rows], sin_ref[rows])
            dk_ref[rows] = turned_back(dk_sum[rows], *turned, cos_ref[rows], sin_ref[rows]).astype(dk_ref.dtype)
            dv_ref[rows] = dv_sum[rows].astype(dv_ref.dtype)

    if group > 1:
        pl.when(pl.program_id(2) == 0)(lambda: turn_keys(slice(0, T)))
    for rows, keys in tiles:
        if group == 1:
            turn_keys(rows)
        cos, sin, g, k = cos_ref[rows], sin_ref[rows], g_ref[rows], keys_ref[keys]
        turned, inverse = normed_and_turned(q_ref[rows], cos, sin)
        q = (turned * H**-0.5).astype(k.dtype)
        p = jnp.where(visible(rows, keys, window, 1), jnp.exp(dot(k, q, 1, 1) - lse_ref[0, :, rows]), 0)
        dv_sum[keys] += dot(p.astype(g.dtype), g, 1, 0)
        gy = fold_lanes(g.astype(jnp.float32) * y_ref[rows].astype(jnp.float32))
        ds = p * (dot(v_ref[keys], g, 1, 1) - jnp.sum(gy.T, axis=0, keepdims=True))
        ds = ds.astype(k.dtype)
        dk_sum[keys] += dot(ds, q, 1, 0)
        dq_ref[rows] = turned_back(dot(ds, k, 0, 0) * H**-0.5, turned, inverse, cos, sin).astype(dq_ref.dtype)
    pl.when(pl.program_id(2) == group - 1)(finish_keys) if group > 1 else finish_keys()


def fused_call(kernel, inputs, outputs, tables, window, scratch, interpret):
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
        functools.partial(kernel, window=window, group=group), grid=(B, K, group), interpret=interpret,
        in_specs=[*map(spec, inputs), table, table], out_specs=[*map(spec, outputs)], out_shape=outputs,
        scratch_shapes=[pltpu.VMEM((T, H), dtype) for dtype in scratch], name=f"attention_{kernel.__name__}",
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT),
    )  # fmt: skip
    with jax.named_scope(f"attention_{kernel.__name__}"):  # an old jax names the kernel by its scope, not by `name`
        return call(*inputs, *tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def fused_attention(q, k, v, T, H, window, interpret):
    """QK-norm, RoPE and causal attention: q [B·T, N·H], k and v [B·T, K·H] → [B·T, N·H]."""
    return fused_forward(q, k, v, T, H, window, interpret)[0]


def full_tables(T, H):
    """rope_tables as `turn` wants them: [c, c] and [−s, s], float32 [T, H]."""
    cos, sin = rope_tables(T, H)
    return np.concatenate([cos, cos], axis=1), np.concatenate([-sin, sin], axis=1)


def fused_forward(q, k, v, T, H, window, interpret):
    lse = jax.ShapeDtypeStruct((q.size // (T * H), 1, T), jnp.float32)
    outputs = jax.typeof(q), lse
    outputs = fused_call(forward_kernel, (q, k, v), outputs, full_tables(T, H), window, [k.dtype], interpret)
    y, lse = (checkpoint_name(x, "attention") for x in outputs)  # for a remat policy to keep
    return y, (q, k, v, y, lse)


def fused_backward(T, H, window, interpret, saved, g):
    q, k, v, y, lse = saved
    outputs, scratch = (jax.typeof(q), jax.typeof(k), jax.typeof(v)), [k.dtype, jnp.float32, jnp.float32]
    return tuple(
        fused_call(backward_kernel, (q, k, v, y, g, lse), outputs, full_tables(T, H), window, scratch, interpret)
    )


fused_attention.defvjp(fused_forward, fused_backward)


# %% Attend cellView="form" tags=["shared"]
# @title Attend
def attend(config, q, k, v, T, window):
    """QK-norm, RoPE and causal attention between projections: q [B·T, N·H], k and v [B·T, K·H] → [B·T, N·H]."""
    H = config.head_dim

    def plain(q, k, v):
        (q, k, v), tables = (split_heads(x, T, H) for x in (q, k, v)), rope_tables(T, H)
        q, k, impl = norm_and_rope(q, *tables), norm_and_rope(k, *tables), config.attn_impl
        return merge_heads(attention(q, k, v, window=window, impl=impl, block_size=config.splash_block_size))

    def fused(q, k, v, interpret=False):
        return fused_attention(q, k, v, T, H, window, interpret)

    def chosen(q, k, v):
        if config.attn_impl == "fused":
            return on_tpu_or_interpreted(fused, q, k, v)
        if config.attn_impl == "auto" and fits_vmem(T, H):
            return jax.lax.platform_dependent(q, k, v, tpu=fused, default=plain)
        return plain(q, k, v)

    return on_each_device(config, chosen)(q, k, v)


# %% Layers cellView="form" tags=["shared"]
# @title Layers
def embed(config, params, tokens):
    """Tokens of any shape → [B·T, D]. The rows are cast after the gather: so their gradient is summed in float32."""
    table = whole_weights(config, params["embed"])
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
    head = whole_weights(config, params["lm_head"])
    logits = jnp.einsum("sd,dv->sv", rms_norm(x), head, preferred_element_type=jnp.float32)
    return config.softcap * jnp.tanh(logits / config.softcap)


# %% Residual and MLP cellView="form" tags=["shared"]
# @title Residual and MLP
def mix_residual(layer, x, x0):
    """a·x + b·x0 in float32: in bfloat16 a learned 1.001 would be 1."""
    mixed = layer["resid_scale"] * x.astype(jnp.float32) + layer["x0_scale"] * x0.astype(jnp.float32)
    return mixed.astype(x.dtype)


def mlp(layer, x):
    """[B·T, D] → [B·T, D] through F = 4D units of ReLU²."""
    hidden = jnp.einsum("sd,df->sf", rms_norm(x), layer["up"])
    return jnp.einsum("sf,fd->sd", jnp.square(jax.nn.relu(hidden)), layer["down"])


# %% All layers cellView="form" tags=["shared"]
# @title All layers
def hidden(config, weights, tokens):
    """What the last layer leaves on the residual stream, [B·T, D]. tokens: int32 [B, T]."""
    with jax.named_scope("embed"):
        x = x0 = constrain(config, embed(config, weights, tokens), ROWS)
    for i, (layer, window) in enumerate(zip(weights["layers"], config.windows, strict=True)):
        with jax.named_scope(f"layer_{i:02d}"):
            layer = whole_weights(config, layer)
            with jax.named_scope("attn"):
                x = mix_residual(layer, x, x0)
                q, k, v = project_qkv(layer, x)
                x = x + project_out(layer, attend(config, q, k, v, tokens.shape[1], window))
            with jax.named_scope("mlp"):
                x = constrain(config, x + mlp(layer, x), ROWS)
    return x


# %% Forward pass cellView="form" tags=["shared"]
# @title Forward pass
def cast_weights(config, params):
    """Matmul weights in compute_dtype. The embedding stays float32 (see `embed`), and so do the scalars."""

    def cast(path, weight):
        keep = weight.ndim == 0 or path[0].key == "embed"
        return weight if keep else weight.astype(config.compute_dtype)

    return split_weights(config, jax.tree_util.tree_map_with_path(cast, params))


def forward(config, params, tokens):
    """Next-token logits, float32 [B, T, V], softcapped. tokens: int32 [B, T]; params: masters, or cast weights."""
    weights = cast_weights(config, params)
    x = hidden(config, weights, tokens)
    with jax.named_scope("lm_head"):
        return lm_head(config, weights, x).reshape(*tokens.shape, -1)


# %% Counts cellView="form" tags=["shared"]
# @title Counts
def part_of(path):
    """The part of the model, embed, attn, mlp or lm_head, that a parameter belongs to, by its path in the tree."""
    name = path[-1].key
    return name if name in ("embed", "lm_head") else "mlp" if name in ("gate", "up", "down") else "attn"


def count_params(config):
    """Exact parameter counts by part. 'attn' includes the two residual scalars of each layer."""
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


# Dense bfloat16 FLOP/s by the vendors' data sheets (T4: float16), by a part of jax's device_kind; first match wins.
PEAK_FLOPS = {
    "v6 lite": 918e12, "v6e": 918e12, "v5 lite": 197e12, "v5e": 197e12, "v5p": 459e12, "v5": 459e12,  # plain v5 is v5p
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "T4": 65e12,
}  # fmt: skip


def peak_flops(device_kind):
    """Peak FLOP/s of a chip, or None if it is not in the table: MFU is then n/a, not a guess."""
    words = f" {device_kind.replace('-', ' ')} "
    return next((peak for name, peak in PEAK_FLOPS.items() if f" {name} " in words), None)


# %% Loss cellView="form" tags=["shared"]
# @title Loss
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def softcap_losses(x, head, targets, softcap):
    """Cross-entropy, nats, float32 [S], of targets [S] under logits softcap·tanh(x @ head / softcap).

    x: [S, D], head: [D, V]. The logits themselves never reach memory in float32.
    """
    return softcap_forward(x, head, targets, softcap)[0]


def softcap_forward(x, head, targets, softcap):
    capped = jnp.tanh(jnp.einsum("sd,dv->sv", x, head, preferred_element_type=jnp.float32) / softcap)
    is_target = jnp.arange(head.shape[1]) == targets[:, None]
    lse = jnp.log(jnp.sum(jnp.exp(softcap * capped), axis=-1))
    losses = lse - softcap * jnp.sum(jnp.where(is_target, capped, 0), axis=-1)
    # Without the barrier XLA would keep float32 and round when it reads: twice the bytes.
    stored = jax.lax.optimization_barrier(capped.astype(x.dtype))
    return losses, (x, head, targets, stored, lse)


def softcap_backward(softcap, saved, g):
    x, head, targets, capped, lse = saved
    capped = capped.astype(jnp.float32)
    is_target = jnp.arange(head.shape[1]) == targets[:, None]
    gradient = (jnp.exp(softcap * capped - lse[:, None]) - is_target) * g[:, None]  # of the capped logits
    gradient = (gradient * (1 - capped * capped)).astype(x.dtype)  # of those before
    dx = jnp.einsum("sv,dv->sd", gradient, head)
    dhead = jnp.einsum("sd,sv->dv", x, gradient)
    return dx, dhead, None


softcap_losses.defvjp(softcap_forward, softcap_backward)


def token_losses(config, params, tokens, targets):
    """Cross-entropy of each target, nats, float32 [B, T]."""
    weights = cast_weights(config, params)
    x = hidden(config, weights, tokens)
    with jax.named_scope("loss"):
        head = whole_weights(config, weights["lm_head"])
        losses = softcap_losses(rms_norm(x), head, targets.reshape(-1), config.softcap)
        return losses.reshape(targets.shape)


# %% Mean loss cellView="form" tags=["shared"]
# @title Mean loss
def loss_fn(config, params, tokens, targets):
    """Mean cross-entropy, nats per token. tokens, targets: int32 [B, T]."""
    return jnp.mean(token_losses(config, params, tokens, targets))


# %% Optimizer cellView="form" tags=["shared"]
# @title Optimizer
class TrainState(NamedTuple):
    """All that a step changes. It is donated: the new state takes the old one's memory."""

    step: jax.Array  # int32, optimizer steps done
    params: dict  # float32 masters
    mu: dict  # first moment, float32
    nu: dict  # second moment, float32
    hyper: dict  # the schedule's scalars: config values that the step reads, without being compiled for them


def hyperparams(config):
    """The free optimization fields of config, as float32 scalars."""
    total = config.total_steps
    values = {
        "learning_rate": config.learning_rate, "weight_decay": config.weight_decay, "beta1": config.beta1,
        "beta2": config.beta2, "eps": config.eps, "final_lr_frac": config.final_lr_frac, "total_steps": total,
        "warmup_steps": round(config.warmup_ratio * total), "warmdown_steps": round(config.warmdown_ratio * total),
    }  # fmt: skip
    return {name: jnp.array(np.float32(value)) for name, value in values.items()}


def put_hyper(config, hyper):
    """The schedule's scalars on all devices."""
    return {name: put_whole(config, value) for name, value in hyper.items()}


def scheduled_lr(hyper, step):
    """Learning rate of step 0, 1, …: linear warmup, constant, linear warmdown to final_lr_frac of it."""
    up = (step + 1) / jnp.maximum(hyper["warmup_steps"], 1)
    down = (hyper["total_steps"] - step) / jnp.maximum(hyper["warmdown_steps"], 1)
    frac = hyper["final_lr_frac"]
    return hyper["learning_rate"] * jnp.minimum(jnp.minimum(up, 1), frac + (1 - frac) * jnp.clip(down, 0, 1))


def adam_direction(hyper, t, mu, nu):
    """Adam's step of size 1 down the gradient, from the moments after update t = 1, 2, …."""
    return (mu / (1 - hyper["beta1"] ** t)) / (jnp.sqrt(nu / (1 - hyper["beta2"] ** t)) + hyper["eps"])


def is_decayed(path, p):
    """Weight decay is for matrices, not for the embedding and not for scalars."""
    return p.ndim > 1 and path[0].key != "embed"


def adamw(hyper, state, grads, learning_rate):
    """(params, mu, nu) after one AdamW update, all float32; grads may be bfloat16."""
    b1, b2, t = hyper["beta1"], hyper["beta2"], state.step + 1
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
    nu = jax.tree.map(lambda n, g: b2 * n + (1 - b2) * g * g, state.nu, grads)

    def update(path, p, m, n):
        direction = adam_direction(hyper, t, m, n)
        if is_decayed(path, p):
            direction += hyper["weight_decay"] * p
        return p - learning_rate * direction

    return jax.tree_util.tree_map_with_path(update, state.params, mu, nu), mu, nu


@jax.jit
def init_arrays(config, key):
    """Step 0, the parameters, and two trees of zeros for the moments, made by one program."""
    params = init_params(config, key)
    mu, nu = jax.tree.map(jnp.zeros_like, (params, params))
    return constrain(config, jnp.zeros((), jnp.int32)), *split_weights(config, (params, mu, nu))


def init_train_state(config):
    """The state before step 0. The seed and the schedule are free: they are read here, outside any compiled program."""
    key, hyper = jax.random.key(config.seed), hyperparams(config)
    if config.devices > 1 and not isinstance(key, jax.core.Tracer):  # where the key is, there the state will be
        key = jax.random.wrap_key_data(put_whole(config, jax.random.key_data(key)))
        hyper = put_hyper(config, hyper)
    return TrainState(*init_arrays(config, key), hyper)


# %% Train step cellView="form" tags=["shared"]
# @title Train step
def loss_and_grads(config, weights, tokens, targets):
    """Mean loss and gradients of [total_batch, T] tokens, device_batch_size sequences at a time."""
    value_and_grad = jax.value_and_grad(functools.partial(loss_fn, config))
    n = config.grad_accum_steps
    if n == 1:
        loss, grads = value_and_grad(weights, tokens, targets)
        return loss, split_weights(config, grads)

    def add_microbatch(total, batch):
        loss, grads = value_and_grad(weights, *batch)
        new = loss, split_weights(config, grads)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, new), None

    zeros = split_weights(config, jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights))
    batches = tuple(in_parts(config, x, n) for x in (tokens, targets))
    total, _ = jax.lax.scan(add_microbatch, (jnp.zeros((), jnp.float32), zeros), batches)
    return jax.tree.map(lambda x: x / n, total)


def global_norm(tree):
    """Square root of the sum of all squares, float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


@functools.partial(jax.jit, donate_argnames="state")
def train_step(config, state, tokens, targets):
    """One optimizer step on int32 [total_batch, T] tokens and targets: (new state, metrics as device scalars)."""
    weights = cast_weights(config, state.params)
    loss, grads = loss_and_grads(config, weights, tokens, targets)
    with jax.named_scope("optimizer"):
        norm, learning_rate = global_norm(grads), scheduled_lr(state.hyper, state.step)
        if config.grad_clip:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1, config.grad_clip / norm), grads)
        params, mu, nu = new = adamw(state.hyper, state, grads, learning_rate)
        if config.nonfinite == "skip":
            fine, old = jnp.isfinite(loss) & jnp.isfinite(norm), (state.params, state.mu, state.nu)
            params, mu, nu = jax.tree.map(lambda n, o: jnp.where(fine, n, o), new, old)
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate}
    params, mu, nu = split_weights(config, (params, mu, nu))
    return TrainState(state.step + 1, params, mu, nu, state.hyper), metrics


def abstract_step(config, mesh):
    """(state, tokens) as train_step takes them: shapes, and where their parts lie on a mesh, or on one of no particular
    devices."""
    state = jax.eval_shape(lambda: init_train_state(config))
    tokens = jax.ShapeDtypeStruct((config.tokens_per_step // config.seq_len, config.seq_len), jnp.int32)
    if config.devices == 1:
        return state, tokens

    def place(x, *spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(config, *spec, mesh=mesh))

    state = jax.tree.map(lambda x: place(x, *weight_spec(config, x.shape)), state)  # of scalars the spec is empty
    return state, place(tokens, ROWS)


# %% Norms cellView="form" tags=["shared"]
# @title Norms
@jax.jit
def state_norms(state):
    """{'param_norm/attn': …, 'update_norm/attn': …} of each part after a step, and of the update that it was."""
    hyper, learning_rate, squares = state.hyper, scheduled_lr(state.hyper, state.step - 1), collections.Counter()
    leaves = (jax.tree.leaves(tree) for tree in (state.mu, state.nu))
    for (path, p), m, n in zip(jax.tree_util.tree_leaves_with_path(state.params), *leaves, strict=True):
        decay = learning_rate * hyper["weight_decay"] if is_decayed(path, p) else 0.0
        step = learning_rate * adam_direction(hyper, state.step, m, n)
        update = step + decay * (p + step) / (1 - decay)  # p + update is what the weight was
        squares[f"param_norm/{part_of(path)}"] += jnp.sum(jnp.square(p))
        squares[f"update_norm/{part_of(path)}"] += jnp.sum(jnp.square(update))
    return {name: jnp.sqrt(value) for name, value in squares.items()}


# %% Evaluate cellView="form" tags=["shared"]
# @title Evaluate
def validation_batches(config, tokenizer, path, max_tokens=-1):
    """[(tokens, targets, bytes of each target)] of the validation shard, int32 [B, T] each, B what fits the devices.

    The last batch is padded with targets of −1, which count for nothing.
    """
    B, T = config.device_batch_size * config.devices, config.seq_len
    stream, held = [], 0
    for _, text in read_documents(path):
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
    """Loss of each target, nats, float32 [B, T]; 0 where the target is −1."""
    losses = token_losses(config, params, tokens, jnp.maximum(targets, 0))
    return jnp.where(targets < 0, 0, losses)


def evaluate(config, params, batches):
    """{'loss': nats per token, 'bpb': bits per byte, 'by_position': loss at each place in the context, [T]} on the
    batches of validation_batches."""
    weights = evaluation_weights(config, params)
    losses = []
    for tokens, targets, _ in batches:
        loss = evaluation_step(config, weights, *(put_whole(config, x, ROWS) for x in (tokens, targets)))
        # Steps that do not wait for each other may wait for each other's sums: on several CPUs 39 in flight hung.
        losses.append(loss if jax.process_count() == 1 else from_all_processes(loss))
    nats = sum(loss.sum(axis=0, dtype=np.float64) for loss in jax.device_get(losses))
    count = sum((targets >= 0).sum(axis=0) for _, targets, _ in batches)
    n_bytes = sum(int(lengths.sum()) for *_, lengths in batches)
    by_position = nats / np.maximum(count, 1)
    return {"loss": nats.sum() / count.sum(), "bpb": nats.sum() / math.log(2) / n_bytes, "by_position": by_position}


# %% Decode cellView="form" tags=["shared"]
# @title Decode
def decode_token(config, weights, cache, tokens, position):
    """(logits [B, V] after `tokens` [B] at `position`, the cache with them in it: a pair of [B·K, T, H] a layer)."""
    T = config.seq_len
    cos, sin = (jax.lax.dynamic_slice_in_dim(table, position, 1) for table in rope_tables(T, config.head_dim))
    x = x0 = embed(config, weights, tokens)
    s, new_cache = jnp.arange(T), []
    for layer, window, (keys, values) in zip(weights["layers"], config.windows, cache, strict=True):
        x = mix_residual(layer, x, x0)
        q, k, v = (split_heads(y, 1, config.head_dim) for y in project_qkv(layer, x))
        q, k = norm_and_rope(q, cos, sin), norm_and_rope(k, cos, sin)
        k, v = (y.reshape(-1, 1, config.head_dim) for y in (k, v))  # with B and K apart the loop copied the cache: 2.1x
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


# %% Sample cellView="form" tags=["shared"]
# @title Sample
def pick_token(key, logits, temperature, top_k, top_p):
    """Samples [B] ids from logits [B, V] over the temperature; the likeliest where that is 0.

    Kept are the top_k likeliest, and of them those before which less than top_p of the probability lies (nucleus
    sampling, Holtzman et al. 2020).
    """

    def draw():
        scaled = logits / temperature
        ordered = -jnp.sort(-scaled, axis=-1)
        probs = jax.nn.softmax(jnp.where(jnp.arange(logits.shape[-1]) < top_k, ordered, -jnp.inf), axis=-1)
        kept = jnp.sum((jnp.cumsum(probs, axis=-1) - probs < top_p) & (probs > 0), axis=-1, keepdims=True)
        least = jnp.take_along_axis(ordered, kept - 1, axis=-1)
        return jax.random.categorical(key, jnp.where(scaled < least, -jnp.inf, scaled))

    return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1))


@jax.jit
def sample_tokens(config, params, tokens, lengths, end, stop, key, temperature, top_k, top_p):
    """Continues prompts of `lengths` [B] in tokens [B, T], each to position `end` [B] or its first `stop` token."""
    weights = whole_weights(config, cast_weights(config, params))
    shape = (tokens.shape[0] * config.kv_heads, config.seq_len, config.head_dim)
    cache = [(jnp.zeros(shape, config.compute_dtype),) * 2 for _ in range(config.depth)]

    def unfinished(carry):
        position, _, _, done = carry
        return (position + 1 < jnp.max(end)) & ~jnp.all(done)

    def step(carry):
        position, tokens, cache, done = carry
        logits, cache = decode_token(config, weights, cache, tokens[:, position], position)
        following = pick_token(jax.random.fold_in(key, position), logits, temperature, top_k, top_p)
        in_prompt = position + 1 < lengths
        following = jnp.where(in_prompt, tokens[:, position + 1], jnp.where(done, stop, following))
        done = done | ((following == stop) | (position + 2 >= end)) & ~in_prompt
        return position + 1, tokens.at[:, position + 1].set(following), cache, done

    start = (jnp.zeros((), jnp.int32), tokens, cache, jnp.zeros(tokens.shape[0], bool))
    return constrain(config, jax.lax.while_loop(unfinished, step, start)[1])


def generate_tokens(config, params, prompts, stop, *, max_new_tokens, temperature, top_k, top_p, seed):
    """The new tokens of each prompt, lists of ids: up to `stop` (left out) or max_new_tokens. See generate."""
    T, key, new = config.seq_len, jax.random.key(seed), [[] for _ in prompts]
    left = [max_new_tokens] * len(prompts)
    for window in itertools.count():
        tokens, spans = np.full((len(prompts), T), stop, np.int32), []
        for row, prompt, more, count in zip(tokens, prompts, new, left, strict=True):
            ids = [stop, *prompt, *more]
            ids = ids if len(ids) < T else [stop, *ids[-(T // 2) :]]
            row[: len(ids)] = ids
            spans.append((len(ids), min(len(ids) + count, T)))
        lengths, ends = np.array(spans, np.int32).T
        out = sample_tokens(
            config, params, tokens, lengths, ends, stop, jax.random.fold_in(key, window), np.float32(temperature),
            np.int32(min(top_k, config.vocab_size)), np.float32(top_p),
        )  # fmt: skip
        for i, (row, (start, end)) in enumerate(zip(np.asarray(out), spans, strict=True)):
            ids = list(itertools.takewhile(lambda token: token != stop, row[start:end].tolist()))
            new[i] += ids
            left[i] = left[i] - len(ids) if len(ids) == end - start else 0
        if not any(left):
            return new


def generate(
    config, params, tokenizer, prompt, *, max_new_tokens=128, temperature=0.8, top_k=50, top_p=1.0, seed=0, speed=False
):
    """The prompt and its continuation, up to BOS or max_new_tokens. A list of prompts is continued as one batch.

    temperature 0 is greedy. A context holds T tokens. When it is full, generation goes on in a new one that begins with
    BOS and the last T/2 tokens, and what came before is forgotten; of a prompt that fills it, the same part is read.
    `speed` prints the new tokens per second.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    require(prompts, "prompt", prompt, "must be a text, or a list of at least one")
    require(max_new_tokens > 0, "max_new_tokens", max_new_tokens, "must be positive")
    require(temperature >= 0, "temperature", temperature, "must not be negative")
    require(top_k > 0, "top_k", top_k, "must be positive")
    require(0 < top_p <= 1, "top_p", top_p, "must be above 0 and at most 1")
    started = time.perf_counter()
    new = generate_tokens(
        config, params, [tokenizer.encode_ordinary(text) for text in prompts],
        tokenizer.encode_single_token("<|bos|>"), max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, seed=seed,
    )  # fmt: skip
    if speed:
        count, seconds = sum(len(ids) for ids in new), time.perf_counter() - started
        print(f"{count:,} new tokens in {seconds:.1f} s: {count / seconds:,.0f} tok/s; the first call compiles")
    texts = [
        text + tokenizer.decode([token for token in ids if token < tokenizer.n_vocab])
        for text, ids in zip(prompts, new, strict=True)
    ]
    return texts[0] if isinstance(prompt, str) else texts


# %% Checkpoints cellView="form" tags=["shared"]
# @title Checkpoints
def named_arrays(state):
    """{'params.layers.0.q': array, …} of a TrainState, without the schedule's scalars: they come from the Config."""
    leaves = jax.tree_util.tree_leaves_with_path(state._replace(hyper={}))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def host_parts(config, state):
    """{file name: {array name: (start of the part along each axis, part)}}: what this process writes of the state, as
    numpy's own: the next step may take the device's bytes. There is a file for each part that fsdp makes of it."""
    shards = [
        (name, x.shape, shard)
        for name, x in named_arrays(state).items()
        for shard in x.addressable_shards
        if shard.replica_id == 0  # of equal parts on several devices, one is written
    ]
    n, files = config.mesh_shape[1], collections.defaultdict(dict)
    for (name, shape, shard), part in zip(shards, jax.device_get([shard.data for *_, shard in shards]), strict=True):
        start = [index.start or 0 for index in shard.index]
        i = max((n * first // size for first, size in zip(start, shape, strict=True)), default=0)
        file = "state.safetensors" if n == 1 else f"state-{i:05d}-of-{n:05d}.safetensors"
        files[file][name] = start, np.array(part, order="C")
    return files


def file_facts(path):
    """{'bytes', 'sha256'} of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def file_size(path):
    return {"bytes": path.stat().st_size}


def flush_to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


PART_SECONDS = 600  # that a process waits for the others' parts of a checkpoint


def save_checkpoint(run_dir, config, state, **meta):
    """Writes run_dir/checkpoints/step_N, atomically, and drops the old ones. Returns its path.

    `meta`: whatever else a resumed run needs, as JSON: the loader's position. Where `val_loss` is in it, the checkpoint
    with the lowest is kept. InputError if it cannot be written; the checkpoints before it are untouched.
    """
    return write_checkpoint(run_dir, config, int(state.step), host_parts(config, state), meta)


def write_parts(folder, files):
    """Writes files of host_parts, several at a time. Returns {file name: its facts}."""
    from safetensors.numpy import save_file

    def write(name):
        parts = files[name]
        arrays = {array: part for array, (_, part) in parts.items()}
        starts = {"start": json.dumps({array: start for array, (start, _) in parts.items()})} if "-of-" in name else {}
        save_file(arrays, folder / name, *filter(None, [starts]))
        flush_to_disk(folder / name)
        return file_facts(folder / name)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(files, pool.map(write, files), strict=True))


def all_parts(folder, files):
    """{file name: facts} of what all processes have written to `folder`, on the first one; the others tell it what they
    have, and wait until it has finished the checkpoint. Seen in the file system: the devices are busy."""
    started, found = time.monotonic(), dict(files)
    reports = [folder / f".part-{i}" for i in range(1, jax.process_count())]

    def wait(done, what):
        while not done():
            if time.monotonic() - started > PART_SECONDS:
                raise OSError(f"{what} for {PART_SECONDS} s; is run_dir on storage that all hosts share?")
            time.sleep(0.05)

    if not is_first():
        report = reports[jax.process_index() - 1]
        report.with_suffix(".tmp").write_text(json.dumps(files))
        os.replace(report.with_suffix(".tmp"), report)
        wait(lambda: not folder.exists(), "the first process has not finished it")
    else:
        for i, report in enumerate(reports, 1):
            wait(report.exists, f"process {i} has not written its part")
            found |= json.loads(report.read_text())
            report.unlink()
    return found


def write_checkpoint(run_dir, config, step, files, meta):
    """save_checkpoint of parts that are on the host already."""
    from safetensors import SafetensorError

    final = Path(run_dir) / "checkpoints" / f"step_{step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        if jax.process_count() == 1:
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=True)
        files = all_parts(temporary, write_parts(temporary, files))
        if not is_first():
            return final
        if (Path(run_dir) / "metrics.jsonl").exists():
            shutil.copyfile(Path(run_dir) / "metrics.jsonl", temporary / "metrics.jsonl")
            files["metrics.jsonl"] = file_facts(temporary / "metrics.jsonl")
        meta = {
            "step": step, "config": dataclasses.asdict(config), "tokens_per_step": config.tokens_per_step, **meta,
            "files": files,
        }  # fmt: skip
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        for path in [temporary / "meta.json", temporary]:
            flush_to_disk(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        flush_to_disk(final.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {final}: {error}; the checkpoints before it are untouched") from error
    finally:
        if is_first():
            shutil.rmtree(temporary, ignore_errors=True)  # gone by now, unless something failed
    drop_old_checkpoints(final.parent, config.keep_checkpoints)
    return final


def list_checkpoints(run_dir):
    """The checkpoints of a run folder, oldest first."""
    return sorted(path for path in Path(run_dir).glob("checkpoints/step_*") if path.name[5:].isdigit())


def drop_old_checkpoints(folder, keep):
    """Leaves the newest `keep`, and the one with the lowest val_loss; and nothing that a killed process left behind."""
    found, losses = list_checkpoints(folder.parent), {}
    for path in found:
        with contextlib.suppress(OSError, ValueError):
            losses[path] = json.loads((path / "meta.json").read_text()).get("val_loss")
    best = min((path for path in losses if losses[path]), key=losses.get, default=None)
    old = [(path, path.with_name(f".{path.name}.tmp")) for path in found[:-keep] if path != best]
    for path, hidden in old:
        os.replace(path, hidden)  # or a kill now would leave a part of it
    # Another process may be writing the next one already.
    for rest in folder.glob(".*.tmp") if jax.process_count() == 1 else [hidden for _, hidden in old]:
        shutil.rmtree(rest, ignore_errors=True)


# %% Load a checkpoint cellView="form" tags=["shared"]
# @title Load a checkpoint
# How the step runs, not what it computes: a checkpoint may be loaded with other values of these compiled fields.
RUNTIME_FIELDS = (
    "attn_impl", "splash_block_size", "compute_dtype", "mesh", "device_batch_size", "total_batch_size", "grad_clip",
    "nonfinite",
)  # fmt: skip


def differences(saved, config, ignore):
    """'n_head 4 → 8, …': the fields, but those to ignore, in which a saved Config, a dict, differs from config."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    changed = [name for name in values if name not in ignore and saved.get(name) != values[name]]
    return ", ".join(f"{name} {saved.get(name)!r} → {values[name]!r}" for name in changed)


META_TYPES = {
    "step": int, "config": dict, "files": dict, "tokens_per_step": int, "loader": dict, "finished": bool,
    "best": (dict, type(None)), "wandb": (str, type(None)),
}  # fmt: skip


STATE_FILE = re.compile(r"state(-\d{5}-of-\d{5})?\.safetensors")


def is_checkpoint_file(name):
    return name == "metrics.jsonl" or bool(STATE_FILE.fullmatch(name))


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_meta(path):
    """meta.json of a checkpoint whose files are what it says they are, else ValueError or OSError."""
    meta = json.loads((path / "meta.json").read_text())
    if not isinstance(meta, dict) or not {"step", "config", "files"} <= set(meta):
        raise ValueError("meta.json is not that of a checkpoint")
    for name in META_TYPES.keys() & meta.keys():
        if not isinstance(meta[name], META_TYPES[name]):
            raise ValueError(f"meta.json says {name} {meta[name]!r}")
    if meta["step"] != int(path.name.removeprefix("step_")):
        raise ValueError(f"meta.json says step {meta['step']}")
    if meta.get("best") and not all(is_number(meta["best"].get(name)) for name in ("step", "val_loss", "val_bpb")):
        raise ValueError(f"meta.json says best {meta['best']!r}")
    if meta.get("wandb") and not re.fullmatch(r"[\w-]{1,64}", meta["wandb"]):
        raise ValueError(f"meta.json says wandb {meta['wandb']!r}")
    if not any(map(STATE_FILE.fullmatch, meta["files"])) or not all(map(is_checkpoint_file, meta["files"])):
        raise ValueError(f"meta.json names the files {sorted(meta['files'])}, which are not those of a checkpoint")
    facts_of = file_facts if is_first() else file_size  # one process reads all, the others what they need
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found_facts = pool.map(lambda name: facts_of(path / name), meta["files"])
    for (name, facts), found in zip(meta["files"].items(), found_facts, strict=True):
        if found != {what: facts.get(what) for what in found}:
            what = "bytes" if found["bytes"] != facts.get("bytes") else "sha256"
            raise ValueError(f"{name} is damaged: its {what} is {found[what]}, not {facts.get(what)}")
    return meta


def newest_checkpoint(run_dir):
    """(path, meta) of the newest whole checkpoint of a run folder, or None; says which damaged ones it passes over."""
    for path in reversed(list_checkpoints(run_dir)):
        try:
            return path, read_meta(path)
        except (OSError, ValueError, AttributeError) as error:
            print(f"checkpoint {path} is not whole and is passed over: {error}", flush=True)
    return None


def part_index(path, names):
    """{array name: [(start, shape, slice of a safetensors file)]} of the state files of a checkpoint."""
    from safetensors import safe_open

    found = collections.defaultdict(list)
    for name in names:
        file = safe_open(path / name, "numpy")
        starts = json.loads((file.metadata() or {}).get("start", "{}"))
        for array in file.keys():
            part = file.get_slice(array)
            found[array].append((starts.get(array) or [0] * len(part.get_shape()), part.get_shape(), part))
    return found


def check_parts(parts, wanted):
    """ValueError unless the parts are the whole arrays, named as in `wanted`, each once."""
    if set(parts) != set(wanted):
        raise ValueError("its arrays are not those of its Config")
    for name, x in wanted.items():
        ranges, size = set(), 0
        for start, shape, part in parts[name]:
            fits = len(start) == len(shape) == x.ndim and all(
                0 <= first and first + length <= whole
                for first, length, whole in zip(start, shape, x.shape, strict=True)
            )
            if not fits or part.get_dtype() != {"float32": "F32", "int32": "I32"}[x.dtype.name]:
                raise ValueError("its arrays are not those of its Config")
            ranges.add(tuple(start))
            size += math.prod(shape)
        if size != x.size or len(ranges) < len(parts[name]):
            raise ValueError(f"{name} is there with {size} of its {x.size} numbers")


def read_range(parts, shape, index):
    """The slice `index` of an array of `shape`, put together from its parts; only what it needs is read."""
    ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    out = None
    for start, sizes, part in parts:
        both = [range(max(r.start, at), min(r.stop, at + n)) for r, at, n in zip(ranges, start, sizes, strict=True)]
        if not all(both):
            continue
        inside = tuple(slice(b.start - at, b.stop - at) for b, at in zip(both, start, strict=True))
        values = part[inside or ...]
        if both == ranges:
            return values
        if out is None:
            out = np.empty([len(r) for r in ranges], values.dtype)
        out[tuple(slice(b.start - r.start, b.stop - r.start) for b, r in zip(both, ranges, strict=True))] = values
    return out


def load_array(config, x, parts):
    """An array of the state, of the shape of `x`, on the devices of config's mesh: each reads what it is to hold."""
    if config.devices == 1:
        return jnp.asarray(read_range(parts, x.shape, (slice(None),) * x.ndim))
    place = sharding(config, *weight_spec(config, x.shape), mesh=device_mesh(config))
    seen = {}

    def read(index):
        key = str(index)
        if key not in seen:
            seen[key] = read_range(parts, x.shape, index)
        return seen[key]

    return jax.make_array_from_callback(x.shape, place, read)


def load_checkpoint(path, config):
    """(TrainState, meta) from a checkpoint of config's model, on any mesh; how it was trained, and on what, may differ.

    InputError that names the fields that differ if it is of another model, or what is wrong with the files.
    """
    from safetensors import SafetensorError

    path = Path(path)
    wanted = jax.eval_shape(lambda: init_train_state(config))
    names = named_arrays(wanted)
    free_fields = [field.name for field in dataclasses.fields(config) if not field.compare]
    try:
        meta = read_meta(path)
        changed = differences(meta["config"], config, ignore=(*free_fields, *RUNTIME_FIELDS))
        if changed:
            raise InputError(f"checkpoint {path} is of another Config: {changed}")
        parts = part_index(path, filter(STATE_FILE.fullmatch, meta["files"]))
        check_parts(parts, names)
        arrays = [load_array(config, x, parts[name]) for name, x in names.items()]
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"checkpoint {path} cannot be read: {error}; delete it to use the one before it") from error
    state = jax.tree.unflatten(jax.tree.structure(wanted._replace(hyper={})), arrays)
    return state._replace(hyper=put_hyper(config, hyperparams(config))), meta


# %% Backup cellView="form" tags=["shared"]
# @title Backup
BACKUP_PAUSES = 1, 10, 60  # seconds before a copy is tried again


def copy_checkpoint(source, target):
    """Copies the files of a checkpoint to the folder `target`, which is there as a whole or not at all."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in ("meta.json", *json.loads((source / "meta.json").read_text())["files"]):
        shutil.copyfile(source / name, temporary / name)
        flush_to_disk(temporary / name)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def hub_folder(run):
    """Where the checkpoint of a run lies in the Hub repo: one, always the newest."""
    return f"checkpoints/{run.name}"


def back_up(config, run, path):
    """Copies the checkpoint `path` to config.backup, once. Exceptions of the file system or the Hub pass through."""
    if config.backup != "hub":
        target = Path(config.backup) / run.name / "checkpoints" / path.name
        copy_checkpoint(path, target)
        drop_old_checkpoints(target.parent, config.keep_checkpoints)
        return
    from huggingface_hub import HfApi

    HfApi(token=hub_token()).upload_folder(  # one commit: whoever looks sees a whole checkpoint
        repo_id=config.hf_repo_id, folder_path=path, path_in_repo=hub_folder(run), commit_message=path.name
    )


def open_backup(config):
    """InputError, before any work is done, if no checkpoint could be copied to config.backup."""
    if config.backup == "hub":
        from huggingface_hub import HfApi

        require(hub_token(), "backup", "hub", "needs the secret or environment variable HF_TOKEN, with write access")
        create = functools.partial(HfApi(token=hub_token()).create_repo, private=True, exist_ok=True)
        ask_hub("the backups", config.hf_repo_id, "model", lambda: create(config.hf_repo_id), attempts=3)
    elif config.backup:
        try:
            Path(config.backup).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=config.backup).close()
        except OSError as error:
            raise InputError(f"backup={config.backup!r}: cannot write there: {error}") from error


def fetch_backup(config, run, folder):
    """Brings the checkpoint of this run from the Hub into folder/checkpoints, if there is one."""
    try:
        meta = hub_download(config.hf_repo_id, f"{hub_folder(run)}/meta.json", "model")
    except MissingFileError:
        return
    with contextlib.suppress(ValueError, KeyError, TypeError):  # without a number no checkpoint is made, nor found
        facts = json.loads(meta.read_text())
        copy = Path(folder) / "checkpoints" / f"step_{int(facts['step']):08d}"
        copy.mkdir(parents=True)
        shutil.copyfile(meta, copy / "meta.json")
        for name in filter(is_checkpoint_file, facts["files"]):
            shutil.copyfile(hub_download(config.hf_repo_id, f"{hub_folder(run)}/{name}", "model"), copy / name)


def restore_backup(config, run):
    """Brings the newest whole checkpoint of this run from config.backup, if it has one, into the empty folder `run`."""
    with tempfile.TemporaryDirectory() as folder:
        if config.backup == "hub":
            fetch_backup(config, run, folder)
        found = newest_checkpoint(folder if config.backup == "hub" else Path(config.backup) / run.name)
        if not found:
            return
        path, meta = found
        print(f"going on from the backup of {path.name} in {config.backup}", flush=True)
        copy_checkpoint(path, run / "checkpoints" / path.name)
    (run / "config.json").write_text(json.dumps(meta["config"], indent=2) + "\n")


# %% Checkpointer cellView="form" tags=["shared"]
# @title Checkpointer
class Checkpointer:
    """Writes checkpoints beside the training and copies them to config.backup, the newest first.

    save() waits for the copy of the state to host memory, and for the checkpoint before to be written, not for the
    disk. An error of the disk is raised by the next save(), check() or close(); one of a backup is only said.
    """

    def __init__(self, config, run, say=print):
        self.config, self.run, self.say = config, run, say
        self.writing = self.copying = self.newest = None

    def save(self, state, **meta):
        if self.writing:
            self.writing.result()
        step, files = int(state.step), host_parts(self.config, state)
        self.writing = in_background(lambda: self._write(step, files, meta))

    def check(self):
        """Raises what went wrong with a checkpoint, as soon as it is known."""
        if self.writing and self.writing.done():
            self.writing.result()

    def _write(self, step, files, meta):
        if (
            sys.platform == "linux"
        ):  # there a thread has a priority of its own: where cores are few, the step comes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        self.newest = write_checkpoint(self.run, self.config, step, files, meta)
        if self.config.backup and is_first() and (self.copying is None or self.copying.done()):
            self.copying = in_background(self._copy)

    def _copy(self):
        copied = None
        while copied != self.newest:  # what was written meanwhile
            for pause in (*BACKUP_PAUSES, None):
                path = self.newest  # an older one may be gone by the next attempt
                try:
                    back_up(self.config, self.run, path)
                    break
                except Exception as error:  # of any file system, HTTP library or Hub: a backup never stops training
                    reason = explain(error, self.config.hf_repo_id, "model")[0]
                    again = f"again in {pause} s" if pause else "training goes on; the next checkpoint will try again"
                    self.say(f"backup of {path.name} to {self.config.backup} failed: {reason}; {again}")
                    if pause:
                        time.sleep(pause)
            copied = path

    def close(self):
        """Waits for what is being written and copied."""
        if self.writing:
            self.writing.result()
        if self.copying:
            self.copying.result()


# %% Run folder cellView="form" tags=["shared"]
# @title Run folder
# These do not change what is learned, but for the last three: a run may go on where the CPU suits another dtype, and
# grad_clip or nonfinite may save it.
HOST_FIELDS = (
    "attn_impl", "splash_block_size", "run_dir", "resume", "hf_repo_id", "log_interval", "eval_interval",
    "sample_interval", "save_interval", "profile_start", "profile_steps", "eval_tokens", "final_eval_tokens",
    "keep_checkpoints", "backup", "wandb_mode", "wandb_project", "mesh", "device_batch_size", "total_batch_size",
    "compute_dtype", "grad_clip", "nonfinite",
)  # fmt: skip


def step_size(meta):
    """Tokens of an optimizer step in the run of a checkpoint."""
    saved = meta["config"]
    given, one_pass = saved["total_batch_size"], saved["device_batch_size"] * saved["seq_len"]
    return meta.get("tokens_per_step", one_pass if given == -1 else given)  # older checkpoints lack it


def keep_step_size(config, meta):
    """config, with steps of as many tokens as the run that it goes on with has: on other devices as well."""
    if config.tokens_per_step == step_size(meta):
        return config
    require(
        config.total_batch_size == -1, "total_batch_size", config.total_batch_size,
        f"the run to go on with has steps of {step_size(meta)} tokens; leave it at -1, or set resume='never'",
    )  # fmt: skip
    require(
        step_size(meta) % config.tokens_per_pass == 0, "device_batch_size", config.device_batch_size,
        f"the run to go on with has steps of {step_size(meta) // config.seq_len} sequences, which {config.devices} "
        "devices cannot share in passes of as many; change it, or mesh",
    )  # fmt: skip
    return config.replace(total_batch_size=step_size(meta))


def open_run(config):
    """(run folder, checkpoint to resume from or None): config.run_dir, or the first of run_dir-2, -3, … that is free.

    A folder with an unfinished run of the same Config is resumed, an empty one from its backup if there is one.
    InputError if its Config is another one, naming the fields, or if the folder cannot be written or holds something
    else.
    """
    for number in itertools.count(1):
        run = Path(config.run_dir if number == 1 else f"{config.run_dir}-{number}")
        try:
            run.mkdir(parents=True, exist_ok=True)
            if config.resume == "auto" and config.backup and not any(run.iterdir()):
                restore_backup(config, run)
            if not any(run.iterdir()):
                (run / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
                return run, None
            if not (run / "config.json").exists():
                raise InputError(f"run_dir={config.run_dir!r}: {run} is not empty and holds no run; name a new folder")
            (run / "metrics.jsonl").open("a").close()
            newest = newest_checkpoint(run)
        except OSError as error:
            raise InputError(
                f"run_dir={config.run_dir!r}: cannot use {run} ({error}); name a folder that can be written"
            ) from error
        if config.resume == "never" or not newest or newest[1].get("finished"):
            continue
        changed = differences(newest[1]["config"], config, ignore=HOST_FIELDS)
        if changed:
            raise InputError(
                f"run_dir={config.run_dir!r}: {run} holds an unfinished run of another Config ({changed}); "
                "name another run_dir, or set resume='never' to start in a new folder"
            )
        keep_step_size(config, newest[1])  # it can be kept, or is refused now
        return run, newest[0]


def read_metrics(run):
    """The lines of a run's metrics.jsonl, as dicts; a last one that was cut short is left out. InputError otherwise."""
    path, rows = Path(run) / "metrics.jsonl", []
    try:
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
                if not is_number(rows[-1]["step"]) or not all(x is None or is_number(x) for x in rows[-1].values()):
                    raise ValueError("a value is no number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: line {len(rows)} cannot be read: {error}; delete or mend that line") from error
    return rows


def plot_loss(run):
    """Writes loss.png (training loss, its moving average, validation loss) and returns the figure."""
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = np.array(train).T
        span = max(1, len(losses) // 10)
        sums = np.concatenate([np.zeros(span + 1), np.cumsum(losses)])
        smooth = (sums[span + 1 :] - sums[: -span - 1]) / np.minimum(np.arange(len(losses)) + 1, span + 1)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training loss")
        axes.plot(steps, smooth, color="tab:blue", label=f"mean of {span + 1} points")
    if validation:
        axes.plot(*np.array(validation).T, "o-", color="tab:orange", markersize=4, label="validation loss")
    axes.set(xlabel="step", ylabel="nats per token", title=str(run))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(run) / "loss.png", dpi=110)
    return figure


# %% Meter cellView="form" tags=["shared"]
# @title Meter
def due(step, interval):
    """Whether `step` is a multiple of `interval`; never if that is 0."""
    return interval > 0 and step % interval == 0


def peak_memory():
    """Bytes: the accelerator's peak where jax knows it, else this process's peak resident memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """Throughput of the training steps alone, from the moments at which the host saw a step's result."""

    def __init__(self, config):
        self.tokens_per_step, self.flops = config.tokens_per_step, flops_per_token(config)
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak = peak and peak * config.devices
        self.seconds, self.steps = 0.0, 0  # of training, in all
        self.restart()

    def restart(self):
        """Something else than training took the time: a compilation, an evaluation. Begin with the next result."""
        self.since = None

    def seen(self, step):
        """The result of `step` steps has just been read. Returns the rates since the result before it."""
        now, seconds, steps = time.perf_counter(), 0.0, 0
        if self.since is not None:
            seconds, steps = now - self.since, step - self.step
        self.since, self.step = now, step
        self.seconds, self.steps = self.seconds + seconds, self.steps + steps
        return self.rates(steps, seconds)

    def rates(self, steps, seconds):
        """{'tokens_per_second', 'mfu'}; None where there is nothing to divide, or no known peak."""
        rate = self.tokens_per_step * steps / seconds if steps else None
        return {"tokens_per_second": rate, "mfu": rate and self.peak and self.flops * rate / self.peak}


def show_rates(tokens_per_second, mfu):
    """'12,345 tok/s, MFU 41.2%', with n/a for None."""
    rate = "n/a" if tokens_per_second is None else f"{tokens_per_second:,.0f}"
    return f"{rate} tok/s, MFU {'n/a' if mfu is None else f'{mfu:.1%}'}"


# %% Log to wandb cellView="form" tags=["shared"]
# @title Log to wandb
def wandb_url():
    import wandb

    return wandb.setup().settings.base_url


def wandb_key():
    """The key of wandb, or None: Colab's secret or environment variable WANDB_API_KEY, else what `wandb login` left."""
    key, url = get_secret("WANDB_API_KEY"), os.environ.get("WANDB_BASE_URL")
    hosts = [url.split("//")[-1].strip("/")] if url else ["api.forge.coreweave.com", "api.wandb.ai"]  # new and old
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc()
        key = next(filter(None, [key, *((known.authenticators(host) or "   ")[2].strip() for host in hosts)]), None)
    return key


def ask_wandb(what, call):
    """call(), with what goes wrong at wandb as an InputError."""
    import wandb

    try:
        return call()
    except (wandb.Error, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"wandb: cannot {what} at {wandb_url()}: {reason}") from error


def log_in(key):
    """InputError, within seconds, if wandb cannot be reached or does not know the key."""
    import wandb

    try:
        urllib.request.urlopen(wandb_url(), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers, if only that this is no page
    except OSError as error:
        raise InputError(f"wandb: cannot reach {wandb_url()}: {error}") from error
    os.environ.setdefault("WANDB_API_KEY", key)  # for wandb's own process
    ask_wandb("log in", lambda: wandb.login(key=key, verify=True, relogin=True))


def open_wandb(config, run, name):
    """The wandb run `name`, or a new one for None, that goes with a run folder; None where wandb_mode is disabled.

    With 'auto', what is wrong with wandb is said, and training goes on without it; with 'online' it is an InputError.
    """
    key, mode = wandb_key(), config.wandb_mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "online" if key else "disabled")
    if mode == "disabled":
        return None
    try:
        require(importlib.util.find_spec("wandb"), "wandb_mode", mode, "needs the package: pip install wandb")
        if mode == "online":
            require(key, "wandb_mode", mode, "needs a key: set WANDB_API_KEY, or run `wandb login`, or choose offline")
            log_in(key)
    except InputError as error:
        if config.wandb_mode != "auto":
            raise
        print(f"{error}; training goes on without it", flush=True)
        return None
    import wandb

    live = wandb.init(
        mode=mode, project=config.wandb_project, id=name, resume="allow", name=run.name, dir=run,
        config=dataclasses.asdict(config), settings=wandb.Settings(silent=mode == "offline"),
    )  # fmt: skip
    live.define_metric("*", step_metric="step")
    return live


@contextlib.contextmanager
def wandb_run(config, run, name):
    """open_wandb, closed in the end; marked as failed if an error ends it. None on all processes but the first."""
    live = open_wandb(config, run, name) if is_first() else None
    try:
        yield live
    except BaseException:
        if live:
            live.finish(exit_code=1)
        raise
    if live:
        live.finish()


def log_files(live, run, checkpoint):
    """Sends the loss curve, and the last checkpoint as an artifact, to a wandb run."""
    import wandb

    live.log({"loss curve": wandb.Image(str(run / "loss.png"))})
    if checkpoint:
        artifact = wandb.Artifact(f"{run.name}-checkpoint", type="model")
        artifact.add_dir(str(checkpoint), policy="immutable")  # not copied first: nobody writes to it any more
        live.log_artifact(artifact)


# %% Run log cellView="form" tags=["shared"]
# @title Run log
def cut_samples(path, step):
    """Drops from samples.txt what a run that goes on from `step` will write again."""
    if path.exists():
        parts = re.split(r"(?m)^(?=--- step \d+$)", path.read_text())
        path.write_text("".join(part for part in parts[1:] if int(part.split()[2]) <= step))


def show_in_place(handle, content):
    """Displays content in a notebook, in place of what `handle` shows unless that is None. Returns the handle."""
    from IPython.display import display

    if handle is None:
        return display(content, display_id=True)
    handle.update(content)
    return handle


class Diverged(InputError):
    """The loss or the gradient of a step is not a finite number."""


class RunLog:
    """Metrics of a run, to metrics.jsonl, TensorBoard, wandb if it is given, and a progress line that a reader sees
    change in place; plain lines where nobody watches. In a notebook the loss curve is drawn anew from time to time.
    Of several processes the first one writes; the others read their metrics for what is no number."""

    def __init__(self, config, run, step, report=None, wandb_run=None):
        from tensorboard.plugins.hparams import summary_v2 as hparams
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.report, self.wandb = report or (lambda step, values: None), wandb_run
        self.run, self.interval, self.total, self.done = run, config.log_interval, config.total_steps, step
        self.skips = config.nonfinite == "skip"
        if is_first():
            rows = read_metrics(run) if (run / "metrics.jsonl").exists() else []
            kept = [row for row in rows if row["step"] < step + ("val_loss" in row)]  # the others will be written again
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
            self.file = (run / "metrics.jsonl").open("a", buffering=1)
            cut_samples(run / "samples.txt", step)
            self.events = EventFileWriter(str(run), flush_secs=10)
            settings = dataclasses.asdict(config) | {"mesh": str(config.mesh)}
            self.add_event(hparams.hparams_pb(settings), 0)
        self.live = someone_watches() and is_first()
        self.bar = tqdm(
            total=self.total, initial=step, disable=IN_NOTEBOOK or not self.live,
            bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}{postfix}",
        )  # fmt: skip
        self.meter = Meter(config)
        self.times = collections.Counter()  # seconds of what is not training
        self.unread = collections.deque()  # (step, metrics on the device, its batch, seconds waited), of every step
        self.due = 0  # how many of them are to be read the next time
        self.last, self.waited, self.smooth, self.weight = {}, 0.0, 0.0, 0.0
        self.alone = report is None  # a search draws and prints for all of its runs
        self.draws = IN_NOTEBOOK and self.alone
        self.line = self.picture = None  # what a notebook shows, and writes over
        self.shown = self.drawn = time.perf_counter()
        self.drawing = 0.1  # seconds that the curve takes

    def add_event(self, summary, step):
        from tensorboard.compat.proto.event_pb2 import Event

        self.events.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def write(self, step, **values):
        """One line of metrics.jsonl, and a scalar for each value that is not None."""
        from tensorboard.plugins.scalar import summary_v2 as scalar

        if not is_first():
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.report(step, values)
        if self.wandb:
            self.wandb.log({"step": step, **values})
        for name, value in values.items():
            if value is not None:
                self.add_event(scalar.scalar_pb(name, np.float32(value)), step)

    def draw(self):
        """The loss curve so far, to loss.png and, in a notebook, in place of the one before."""
        if not is_first():
            return
        started = time.perf_counter()
        plot_loss(self.run)
        if self.draws:
            from IPython.display import Image

            self.picture = show_in_place(self.picture, Image(str(self.run / "loss.png")))
        self.drawn = time.perf_counter()
        self.drawing = self.drawn - started
        self.times["drawing"] += self.drawing

    def say(self, text):
        tqdm.write(text)
        sys.stdout.flush()

    def train_step(self, step, metrics, batch="", waited=0.0):
        """Takes the metrics of step 0, 1, …, without waiting for them; reads those of the log interval before.

        `batch`: the words for its documents, should its loss not be a number: Diverged is raised then, or it is said.
        `waited`: seconds of waiting for data, of all steps so far.
        """
        self.done = step + 1
        self.bar.update()
        self.unread.append((step, metrics, batch, waited))
        if due(step, self.interval or 100):
            self._read(self.due)
            self.due = len(self.unread)

    def _read(self, count):
        entries = [self.unread.popleft() for _ in range(count)]
        values = jax.device_get([metrics for _, metrics, *_ in entries])
        bad = 0
        for (step, _, batch, waited), metrics in zip(entries, values, strict=True):
            metrics = {name: float(x) for name, x in metrics.items()}
            if not math.isfinite(sum(metrics.values())):
                bad += 1
                self._not_finite(step, metrics, batch, stop=not self.skips or bad == len(entries) > 1)
                continue
            self.smooth, self.weight = 0.95 * self.smooth + 0.05 * metrics["loss"], 0.95 * self.weight + 0.05
            if due(step, self.interval):
                self._show(step, metrics, waited)
        self.due = 0

    def _not_finite(self, step, metrics, batch, stop):
        what = f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, on {batch}"
        if not stop:
            self.say(f"{what}: skipped")
            return
        raise Diverged(what)

    def _show(self, step, metrics, waited):
        rates = self.meter.seen(step + 1)
        self.last = {**metrics, **rates, "data_wait_seconds": waited - self.waited}  # since the line before
        self.waited = waited
        self.write(step, **self.last)
        if self.draws and time.perf_counter() - self.drawn > 200 * self.drawing:  # half a percent of the time
            self.draw()
        if rates["tokens_per_second"]:
            left = format_time(self.meter.seconds / self.meter.steps * (self.total - step - 1))
            loss = f"loss {metrics['loss']:.3f}, smoothed {self.smooth / self.weight:.3f}"
            line = f"{loss}, lr {metrics['learning_rate']:.1e}, {show_rates(**rates)}, {left} left"
            self.progress(line)
            if not self.live and due(step // self.interval, math.ceil(self.total / self.interval / 20)):
                self.say(f"{self.at(step)}  {line}")

    def progress(self, line):
        """The progress line, in place: a terminal's bar, or an output of the notebook, twice a second at most."""
        self.bar.set_postfix_str(line, refresh=False)
        if IN_NOTEBOOK and (time.perf_counter() - self.shown > 0.5 or self.done == self.total):
            from IPython.display import Pretty

            share = self.done / self.total
            bar = f"{share:4.0%} |{'█' * int(30 * share):30}| {self.done}/{self.total}, {line}"
            self.line, self.shown = show_in_place(self.line, Pretty(bar)), time.perf_counter()

    def at(self, step):
        return f"step {step:>{len(str(self.total))}}/{self.total}"

    @contextlib.contextmanager
    def paused(self, state, what):
        """Waits for the device to finish its steps. What happens inside is counted as `what`, not as training."""
        self._read(self.due)  # first, so that its moment is its own
        self._read(len(self.unread))
        jax.block_until_ready(state.step)
        self.meter.seen(self.done)
        started = time.perf_counter()
        with jax.profiler.TraceAnnotation(what):
            yield
        self.times[what] += time.perf_counter() - started
        self.meter.restart()

    def validation(self, result):
        self.write(self.done, val_loss=result["loss"], val_bpb=result["bpb"])
        if self.alone:
            self.say(f"{self.at(self.done)}  validation loss {result['loss']:.4f}, {result['bpb']:.4f} bits per byte")

    def samples(self, texts):
        if not is_first():
            return
        with (self.run / "samples.txt").open("a") as file:
            file.write(f"--- step {self.done}\n" + "".join(f"{text}\n\n" for text in texts))
        from tensorboard.plugins.text import summary_v2 as text_summary

        self.add_event(text_summary.text_pb("samples", texts), self.done)
        if self.wandb:
            import wandb

            paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in texts)
            self.wandb.log({"step": self.done, "samples": wandb.Html(paragraphs, inject=False)})
        if self.alone:
            self.say(f"{self.at(self.done)}  sample: {texts[0]!r}")

    def close(self):
        self.bar.close()
        if is_first():
            self.file.close()
            self.events.close()


# %% Chips and prices cellView="form" tags=["shared"]
# @title Chips and prices
class Chip(NamedTuple):
    """What preflight must know of a TPU."""

    kind: str  # jax's device_kind
    hbm: float  # bytes that a program can use
    bandwidth: float  # bytes/s
    clock: float  # Hz, of the compiler's cycles
    credits: float | None  # Colab compute units for an hour
    link: float  # bytes/s to a neighbouring chip, one way ("How to Scale Your Model", 2025)


CHIPS = {
    "v6e": Chip("TPU v6 lite", 31.25 * 2**30, 1.6e12, 1.75e9, 3.71, 9e10),
    "v5e": Chip("TPU v5 lite", 15.75 * 2**30, 0.82e12, 1.5e9, None, 4.5e10),
}
DOLLARS_PER_CREDIT = 50 / 600
SLICES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}  # chips: shape
HOP = 1e-6  # seconds for the first byte to the next chip (the same book)


def parse_topology(name):
    """('v6e', (2, 4)) of 'v6e:2x4'; a chip alone is a slice of (1, 1). InputError if there is no such slice."""
    chip, _, slice_ = name.partition(":")
    known = chip in CHIPS and slice_ in ("", *SLICES.values())
    slices = ", ".join(f"v6e:{size}" for size in SLICES.values())
    require(known, "preflight", name, f"must be one of {', '.join(CHIPS)}, or all, or a slice of several: {slices}")
    return chip, tuple(int(n) for n in (slice_ or "1x1").split("x"))


def on_topology(config, topology):
    """config on the chips of a topology: mesh='auto' is (all, 1); a mesh that has not as many is an InputError."""
    chips = math.prod(parse_topology(topology)[1])
    config = config.replace(mesh=(chips, 1)) if config.mesh == "auto" else config
    require(config.devices == chips, "mesh", config.mesh, f"data · fsdp must be the {chips} chips of {topology}")
    return config


# %% Train cellView="form" tags=["shared"]
# @title Train
SAMPLE_PROMPTS = ("It is a truth", "The people of the United States", "She said that")


def trace_options():
    """XProf without Python's own call stack, which is most of a trace's size and slows the host that is to be seen."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options


@contextlib.contextmanager
def stop_requests():
    """Yields a list to which SIGTERM and SIGINT (Ctrl-C, or a notebook's stop button) add their names, in place of what
    they do elsewhere. A second SIGINT interrupts at once."""
    asked = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    if jax.process_count() > 1:  # SIGTERM is jax's there: it lets all processes know, and agree on a step
        numbers = ()
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def all_stop(step):
    """Whether one of several processes has been asked to stop, and `step` is the one after which all do."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def open_run_together(config):
    """open_run by the first process, for all. InputError if another one does not see the folder."""

    def open_first():
        run, checkpoint = open_run(config)
        for rest in (run / "checkpoints").glob(".*.tmp"):  # of processes that were killed while they wrote
            shutil.rmtree(rest, ignore_errors=True)
        return str(run), checkpoint and str(checkpoint)

    run, checkpoint = on_first(open_first)
    seen = from_all_processes(np.array([(Path(run) / "config.json").exists()]))
    require(seen.all(), "run_dir", config.run_dir, "must be a folder on storage that all hosts share")
    return Path(run), checkpoint and Path(checkpoint)


@contextlib.contextmanager
def advice_if_diverged(run, saver):
    """Adds the last good checkpoint, once it is written, and what may help to what Diverged says."""
    try:
        yield
    except Diverged as error:
        saver.close()
        checkpoints = list_checkpoints(run)
        last = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
        raise Diverged(
            f"{error}; {last}. Lower learning_rate, or set grad_clip=1.0, or nonfinite='skip' to leave out such steps"
        ) from None


def describe_batch(start, stop):
    """The documents between two positions of the loader, in words."""
    where = f"document {start.row} (from token {start.offset}) of training shard {start.shard}"
    return f"{where} to document {stop.row} of shard {stop.shard}, pass {start.epoch}"


def find_data(config):
    """(training shards, validation shard, tokenizer). Shards are fetchers; the first one is there."""
    shards, fetch_validation = list_shards(config)
    announce_downloads(config, [*shards, fetch_validation])
    for fetch in shards[:1] if on_hub(config.dataset) else [*shards, fetch_validation]:
        check_shard(fetch())
    return shards, fetch_validation, find_tokenizer(config, shards[0]())


def train(config, report=None):
    """Trains from the start, or from the newest checkpoint of an unfinished run. Returns the final metrics.

    `report(step, values)` gets each line of metrics.jsonl as it is written; what it raises ends the training.
    SIGTERM and KeyboardInterrupt end it after the step that runs, with a checkpoint; `stopped` names the signal then.
    """
    started = time.perf_counter()
    device_mesh(config)  # are there as many devices?
    if report is None:  # else a search has said it once
        describe_machine(config)
    check_alike(dataclasses.asdict(config))
    shards, fetch_validation, tokenizer = first_process_first(lambda: find_data(config))
    check_alike({"the tokenizers": tokenizer._mergeable_ranks})
    validation = in_background(lambda: check_shard(fetch_validation()))
    on_first(lambda: open_backup(config))
    run, checkpoint = open_run_together(config)
    if checkpoint:
        state, meta = load_checkpoint(checkpoint, config)
        config = keep_step_size(config, meta)
        state = state._replace(hyper=put_hyper(config, hyperparams(config)))  # the schedule counts steps
        if "metrics.jsonl" in meta["files"] and is_first():  # whole, whatever became of the file that was being written
            shutil.copyfile(checkpoint / "metrics.jsonl", run / "metrics.jsonl")
    else:
        state, meta = init_train_state(config), {"step": 0}
    first, total = meta["step"], config.total_steps
    describe_run(config, run, first)

    batches, result, best = None, {"loss": None, "bpb": None, "by_position": None}, meta.get("best")
    stop_tracing = min(config.profile_start + config.profile_steps, total)
    traced = range(config.profile_start, stop_tracing) if first <= config.profile_start and is_first() else ()
    with contextlib.ExitStack() as stack:
        loader = stack.enter_context(PrefetchDataLoader(config, tokenizer, shards))
        if checkpoint:
            loader.load_state_dict(meta.get("loader"))
        live = stack.enter_context(wandb_run(config, run, meta.get("wandb")))
        log = stack.enter_context(contextlib.closing(RunLog(config, run, first, report, live)))
        saver = stack.enter_context(contextlib.closing(Checkpointer(config, run, log.say)))
        stack.enter_context(advice_if_diverged(run, saver))
        trace = stack.enter_context(contextlib.ExitStack())
        asked = stack.enter_context(stop_requests())
        log.times["start"] = time.perf_counter() - started
        for step in range(first, total):
            if traced and step == traced.start:
                with log.paused(state, "tracing"), without_tensorflow():
                    trace.enter_context(jax.profiler.trace(str(run / "profile"), profiler_options=trace_options()))
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                place = loader.position
                with jax.profiler.TraceAnnotation("wait for data"):
                    tokens, targets = next(loader)
                state, metrics = train_step(config, state, tokens, targets)
                if due(step, config.log_interval):
                    metrics |= state_norms(state)
            if step == first:
                jax.block_until_ready(state.step)
                seconds, loss = time.perf_counter() - started, float(metrics["loss"])
                log.times["compiling"] = seconds - log.times["start"]
                log.say(f"first step after {seconds:.1f} s, compilation included; loss {loss:.3f}")
            log.train_step(step, metrics, describe_batch(place, loader.position), loader.wait_seconds)
            saver.check()
            if traced and step == traced[-1]:
                with log.paused(state, "tracing"), without_tensorflow():
                    trace.close()

            done, last, evaluated = step + 1, step + 1 == total, {}
            if all_stop(done):
                asked.append("SIGTERM")
            if last or due(done, config.eval_interval):
                with log.paused(state, "evaluation"):
                    if last or not batches:  # the last evaluation takes more of the shard
                        if validation.done() and validation.exception():
                            validation = in_background(lambda: check_shard(fetch_validation()))  # a second chance
                        amount = config.final_eval_tokens if last else config.eval_tokens
                        batches = validation_batches(config, tokenizer, validation.result(), amount)
                    result = evaluate(config, state.params, batches)
                    log.validation(result)
                    evaluated = {"val_loss": result["loss"]}
                    if not best or result["loss"] < best["val_loss"]:
                        best = {"step": done, "val_loss": result["loss"], "val_bpb": result["bpb"]}
            if last or due(done, config.sample_interval):
                with log.paused(state, "samples"):
                    log.samples(generate(config, state.params, tokenizer, SAMPLE_PROMPTS, max_new_tokens=48))
            if last or asked or due(done, config.save_interval):
                with log.paused(state, "saving"):
                    saver.save(
                        state, loader=loader.state_dict(), finished=last, best=best, wandb=live and live.id, **evaluated
                    )
            if asked:
                log.say(
                    f"{asked[0]}: stopped after step {done}; its checkpoint is kept, the same start goes on from it"
                )
                break
        with log.paused(state, "saving"):
            saver.close()
        log.draw()
        if live:
            log_files(live, run, saver.newest)
        seconds = time.perf_counter() - started
        summary = {
            "step": done, "loss": log.last.get("loss"), "val_loss": result["loss"], "val_bpb": result["bpb"],
            "by_position": result["by_position"], "best": best, "stopped": asked[0] if asked and not last else "",
            "tokens": done * config.tokens_per_step, "parameters": count_params(config),
            **log.meter.rates(log.meter.steps, log.meter.seconds), "seconds": seconds,
            "times": {"steps": seconds - log.times.total(), **log.times}, "wait_seconds": loader.wait_seconds,
            "peak_memory": peak_memory(), "run_dir": str(run),
        }  # fmt: skip
    return summary


# %% What is said before and after cellView="form" tags=["shared"]
# @title What is said before and after
def describe_params(counts):
    """'3.7M parameters (embed 1.0, …)' of what count_params returns."""
    parts = ", ".join(f"{part} {count / 1e6:.1f}" for part, count in counts.items() if part != "total")
    return f"{counts['total'] / 1e6:.1f}M parameters ({parts})"


def describe_machine(config):
    """Prints the versions and the device: every report of a fault begins with these two lines."""
    device = jax.devices()[0]
    versions = [f"jax {jax.__version__}", f"Python {platform.python_version()}"]
    if device.platform == "tpu":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.insert(1, f"libtpu {importlib.metadata.version('libtpu')}")
    elif cuda := re.search(r"cuda (\d+)", device.client.platform_version):  # 12080 is 12.8
        versions.insert(1, f"CUDA {int(cuda[1]) // 1000}.{int(cuda[1]) % 1000 // 10}")
    print(f"runs on {', '.join(versions)}")

    kind, data, fsdp = device.device_kind, *config.mesh_shape
    peak = f"{peak_flops(kind) / 1e12:.0f} TFLOP/s" if peak_flops(kind) else "n/a"
    if device.platform == "cpu":
        kind += f" ({cpu_fact('model name') or platform.machine()}, {os.cpu_count()} cores)"
    several = f"{config.devices} × " if config.devices > 1 else ""
    mesh = f" each; mesh: data {data}, fsdp {fsdp}" if several else ""
    print(f"device  {several}{kind}, {config.compute_dtype}, peak {peak}{mesh}", flush=True)
    if jax.process_count() > 1:
        print(f"hosts   {jax.process_count()}; the first one logs")


def describe_run(config, run, first):
    """Prints the model, the data and the folder of a run that begins at step `first`."""
    counts, steps = count_params(config), config.total_steps
    tokens = steps * config.tokens_per_step / 1e6
    print(f"model   {describe_params(counts)}")
    print(f"work    {steps:,} steps × {config.tokens_per_step:,} tokens = {tokens:,.1f}M tokens of {config.dataset}")
    print(f"run     {run}" + (f", resumed at step {first}" if first else ""), flush=True)


def show_summary(summary):
    """Prints what train returned, as a table."""
    files = ", ".join(sorted(path.name for path in Path(summary["run_dir"]).iterdir()))
    if summary["stopped"]:
        print(f"stopped by {summary['stopped']} after {summary['step']:,} steps; start the same again to go on")
    print(f"model   {describe_params(summary['parameters'])}")
    print(f"tokens  {summary['tokens']:,} in {summary['step']:,} steps")
    if summary["val_loss"]:
        best = summary["best"]
        print(f"loss    {summary['val_loss']:.4f} nats per token on the validation shard")
        print(f"bpb     {summary['val_bpb']:.4f} bits per byte; best {best['val_bpb']:.4f} at step {best['step']:,}")
    print(f"speed   {show_rates(summary['tokens_per_second'], summary['mfu'])}")
    times = ", ".join(f"{what} {seconds:.1f}" for what, seconds in summary["times"].items() if seconds >= 0.05)
    print(f"time    {format_time(summary['seconds'])} in all; seconds: {times}")
    print(f"        of the steps, {summary['wait_seconds']:.1f} s were spent waiting for data")
    print(f"memory  {summary['peak_memory'] / 2**30:.2f} GiB at its peak")
    print(f"files   {summary['run_dir']}: {files}")


# %% [markdown]
# ## The search
#
# A sweep is a space, a way to search it, and a rule for giving up on a trial. **Bayesian search** fits a Gaussian
# process to the results so far and suggests where it expects to win; several workers may ask it at once. **Hyperband**
# compares a trial that is under way with the others at the same evaluation, and stops it if it is not in the better
# half.
#
# | parameter | range | what it is |
# |---|---|---|
# | `learning_rate` | log-uniform, a quarter to three times the base's | matters most; its scale is a ratio |
# | `weight_decay` | 0 to 0.3 | a pull towards zero, scaled by the learning rate; matters more in long runs |
# | `warmup_ratio`, `warmdown_ratio` | 0 to 0.1, 0.2 to 0.9 | the shape of the schedule; together never above 1 |
# | `n_embd` | the base's and half of it | the model's width; depth follows width |
# | `head_dim` | the base's and twice that | many narrow heads or few wide ones: `n_head = n_embd / head_dim` |
# | `heads_per_kv` | 1 or 2 | query heads that share a key/value head: `n_kv_head = n_head / heads_per_kv` |
# | `device_batch_size` | the base's, half, a quarter | sequences a step: less noise in the gradient, or more steps |
#
# Nothing impossible can be suggested: heads follow from the width, so they always divide it, and no shape is larger
# than the base, which fits the device. Heads narrower than the base's are left out: a register of the TPU is 128 lanes
# wide, and preflight gives a model of width 512 with heads of 64 23.8 ms a step on a v6e, with heads of 128 6.5 ms.
# Changing the first four compiles nothing, since they are traced; each of the 2 × 2 × 2 × 3 shapes is compiled once.
#
# Every trial gets **the same compute** (FLOPs, not steps or tokens): a small model sees more tokens, a large one
# fewer, and the lowest bits per byte is what this budget buys. `base.num_iterations` steps of the base are the budget.


# %% Search space
def sweep_definition(base, runs):
    """wandb's definition of a sweep around the Config `base`, of at most `runs` trials.

    InputError if a shape in it cannot be: too few heads to be halved, or no layer left.
    """
    rule = "must be a multiple of 8: the search halves the width, doubles head_dim and pairs heads on a key/value head"
    require(base.n_head % 8 == 0, "n_head", base.n_head, rule)
    batches = {max(1, base.device_batch_size // part) for part in (1, 2, 4)}
    definition = {
        "name": f"around-{Path(base.run_dir).name}",
        "method": "bayes",
        "metric": {"name": "val_bpb", "goal": "minimize"},
        "early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 2},  # compared at evaluations 2, 4, 8 of 10
        "run_cap": runs,
        "parameters": {
            "learning_rate": {
                "distribution": "log_uniform_values", "min": base.learning_rate / 4, "max": base.learning_rate * 3,
            },
            "weight_decay": {"distribution": "uniform", "min": 0.0, "max": 0.3},
            "warmup_ratio": {"distribution": "uniform", "min": 0.0, "max": 0.1},
            "warmdown_ratio": {"distribution": "uniform", "min": 0.2, "max": 0.9},
            "n_embd": {"values": [base.n_embd // 2, base.n_embd]},
            "head_dim": {"values": [base.head_dim, 2 * base.head_dim]},
            "heads_per_kv": {"values": [1, 2]},
            "device_batch_size": {"values": sorted(batches)},
        },
    }  # fmt: skip
    values = {name: p["values"] for name, p in definition["parameters"].items() if "values" in p}
    for shape in itertools.product(*values.values()):
        trial_config(base, dict(zip(values, shape, strict=True)), "")
    return definition


# %% Base of the search
def base_config():
    """What the search starts from: the model of the device, for a trial of minutes (seconds of a CPU's demo)."""
    config = Config.for_device()
    if jax.default_backend() == "cpu":
        return config.replace(
            n_head=8, head_dim=16, aspect_ratio=32, num_iterations=60, eval_tokens=4096, final_eval_tokens=16_384,
            run_dir="runs/sweep-demo", profile_steps=0,
        )  # fmt: skip
    return config.replace(
        num_iterations=8000, eval_tokens=262_144, final_eval_tokens=2_097_152, run_dir="runs/sweep", profile_steps=0,
        total_batch_size=-1, num_shards=8,
    )  # fmt: skip


# %% [markdown]
# ### What it costs
#
# FLOPs are known before the first trial; time and credits follow where the chip's peak and price are known. The share
# of the peak is an assumption, 40%: preflight's word on the reference model is 46%, and smaller shapes reach less.

# %% Budget
ASSUMED_MFU = 0.4


def trial_flops(base):
    return base.total_steps * base.tokens_per_step * flops_per_token(base)


def describe_budget(base, runs):
    """Prints what `runs` trials will take, before anything is trained."""
    kind = jax.devices()[0].device_kind
    print(f"budget  {runs} trials of {trial_flops(base):.1e} FLOPs on {kind}", end="")
    if not peak_flops(kind):
        print(": minutes are not known here, since the peak is not; no credits")
        return
    minutes = trial_flops(base) / (ASSUMED_MFU * peak_flops(kind)) / 60
    hours = runs * minutes / 60
    print(f": about {minutes:.1f} minutes each at {ASSUMED_MFU:.0%} MFU, {hours:.1f} hours in all", end="")
    credits = next((chip.credits for chip in CHIPS.values() if chip.kind == kind and chip.credits), None)
    if credits:
        print(f", {hours * credits:.1f} credits, ${hours * credits * DOLLARS_PER_CREDIT:.2f}", end="")
    print("; evaluation and compilation not included, early stops not counted")


# %% [markdown]
# ## A trial
#
# A suggestion becomes a Config, and `train` does the rest: it is 02's, and hands every line of its metrics to
# `report`. A suggestion that cannot be raises an InputError. Then the run *fails*, with its reason in the summary, and
# reports no loss: a made-up one, however bad, would teach the Gaussian process a cliff that is not there.


# %% Trial
def base_suggestion(base):
    """The base as a suggestion."""
    names = "learning_rate", "weight_decay", "warmup_ratio", "warmdown_ratio", "n_embd", "head_dim", "device_batch_size"
    return {**{name: getattr(base, name) for name in names}, "heads_per_kv": base.n_head // base.kv_heads}


def trial_config(base, suggestion, name):
    """The Config of a suggestion, with as many steps as the budget of FLOPs allows. InputError if it cannot be."""
    changes = dict(suggestion)
    width, group = changes.pop("n_embd", base.n_embd), changes.pop("heads_per_kv", base.n_head // base.kv_heads)
    head_dim = changes.get("head_dim", base.head_dim)
    require(head_dim > 0 and width % head_dim == 0, "n_embd", width, f"must be a multiple of head_dim={head_dim}")
    heads = width // head_dim
    require(isinstance(group, int) and group > 0 and heads % group == 0, "heads_per_kv", group, f"must divide {heads}")
    config = base.replace(**changes, n_head=heads, n_kv_head=heads // group)
    steps = max(10, round(trial_flops(base) / (config.tokens_per_step * flops_per_token(config))))
    return config.replace(
        num_iterations=steps, run_dir=str(Path(base.run_dir) / name), eval_interval=math.ceil(steps / 10),
        log_interval=max(1, steps // 50), sample_interval=0, save_interval=0, resume="never", wandb_mode="disabled",
    )  # fmt: skip


def out_of_memory(error):
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def run_trial(base, run, suggestion):
    """Trains one suggestion for the wandb run `run`. Returns its row for the table; `failure` says what went wrong.

    Whatever ends it, nothing of its state stays on the device: an error is raised anew without the frames that hold it.
    """
    folder, failure = Path(base.run_dir) / run.id, None
    row = {"name": run.id, **base_suggestion(base), **suggestion, "val_bpb": None, "failure": ""}
    run.define_metric("*", step_metric="step")
    try:
        config = trial_config(base, suggestion, run.id)
        run.config.update({"trial": dataclasses.asdict(config)})
        summary = train(config, report=lambda step, values: run.log({"step": step, **values}))
        row |= {"val_bpb": summary["val_bpb"], "parameters": count_params(config)["total"], "steps": summary["step"]}
        if summary["stopped"]:
            raise KeyboardInterrupt
    except InputError as error:
        row["failure"] = str(error)
    except Exception as error:
        words = str(error).splitlines()[0] if str(error) else "stopped by the sweep"
        row["failure"] = f"{type(error).__name__}: {words}"
        if type(error) is not Exception and not out_of_memory(error):  # wandb stops a trial with a bare Exception
            traceback.print_exc()
            failure = row["failure"]
    finally:
        for checkpoints in folder.parent.glob(f"{run.id}*/checkpoints"):  # gigabytes: the winner is trained anew
            shutil.rmtree(checkpoints, ignore_errors=True)
    if folder.exists():
        (folder / "trial.json").write_text(json.dumps(row, indent=2) + "\n")
    if not row["failure"]:
        rate = row["learning_rate"]
        print(f"trial {run.id}: {row['val_bpb']:.4f} bits per byte, learning rate {rate:.1e}", flush=True)
    else:
        print(f"trial {run.id} failed: {row['failure']}", flush=True)
        run.summary["failure"] = row["failure"]
    if failure:
        raise RuntimeError(failure)
    return row


def check_data(base):
    """Fetches the first shard and the tokenizer: what is wrong with them is wrong with every trial: it is said here."""
    shards, _ = list_shards(base)
    find_tokenizer(base, check_shard(shards[0]()))


# %% [markdown]
# ## Work for a sweep
#
# `wandb.agent` asks the server for suggestions and calls a function for each, in a thread. When hyperband gives up on
# a trial, it raises an exception in that thread: the loader closes, the device's arrays go, and the next suggestion
# comes. If this worker dies, its trial is marked as crashed after some minutes without a sign of life, and the others
# go on; start the notebook again with the same `SWEEP_ID` and it takes the next one.


# %% Work for a sweep
def create_sweep(base, runs, project, entity):
    """Creates the sweep and returns its id."""
    definition = sweep_definition(base, runs)
    return ask_wandb("create a sweep", lambda: wandb.sweep(definition, project=project, entity=entity or None))


def work(base, sweep_id, project, entity, count=None):
    """Trains what the sweep suggests until it is done, or `count` trials. Returns the rows of this worker's trials."""
    rows = []

    def one():
        run = wandb.init(dir=base.run_dir)
        rows.append(run_trial(base, run, dict(run.config)))
        run.finish(exit_code=int(bool(rows[-1]["failure"])))

    Path(base.run_dir).mkdir(parents=True, exist_ok=True)
    join = functools.partial(wandb.agent, sweep_id, function=one, project=project, entity=entity or None, count=count)
    ask_wandb(f"join the sweep {sweep_id!r}", join)
    return rows


# %% [markdown]
# ## Search without an account
#
# The same definition, sampled at random: no Gaussian process, no early stops, but a fair answer from a few trials,
# since random search wastes nothing on parameters that do not matter. The first trial is the base itself: what is to
# be beaten.


# %% Search without an account
def draw(parameter, rng):
    """One value of a parameter of a sweep's definition."""
    if "values" in parameter:
        return rng.choice(parameter["values"])
    low, high = parameter["min"], parameter["max"]
    if parameter["distribution"] == "log_uniform_values":
        return math.exp(rng.uniform(math.log(low), math.log(high)))
    return rng.uniform(low, high)


def local_search(base, trials, project="tpuchat", seed=0):
    """Trains the base and `trials - 1` random suggestions, logged offline. Returns the rows, one a trial."""
    rng, parameters, rows = random.Random(seed), sweep_definition(base, trials)["parameters"], []
    Path(base.run_dir).mkdir(parents=True, exist_ok=True)
    for trial in range(trials):
        suggestion = {name: draw(parameter, rng) for name, parameter in parameters.items()}
        if trial == 0:
            suggestion = base_suggestion(base)
        run = wandb.init(
            mode="offline", project=project, group="local search", config=suggestion, dir=base.run_dir,
            reinit="finish_previous", settings=wandb.Settings(silent=True),
        )  # fmt: skip
        rows.append(run_trial(base, run, suggestion))
        run.finish(exit_code=int(bool(rows[-1]["failure"])))
    return rows


# %% [markdown]
# ## What came out


# %% Results
def fetch_rows(sweep_id, project, entity):
    """Rows of all trials of a sweep, of all workers, with the curve of each."""
    path = "/".join(part for part in (entity, project, sweep_id) if part)
    rows = []
    for run in ask_wandb("read the sweep", lambda: list(wandb.Api().sweep(path).runs)):
        curve = [(line["step"], line["val_bpb"]) for line in run.history(keys=["step", "val_bpb"], pandas=False)]
        suggestion = {name: value for name, value in run.config.items() if name != "trial"}
        failure = run.summary.get("failure", "" if run.state == "finished" else run.state)
        bpb = run.summary.get("val_bpb")
        rows.append({"name": run.id, **suggestion, "val_bpb": bpb, "failure": failure, "curve": curve})
    return rows


def add_curves(base, rows):
    """The curve of each trial that was run on this machine: [(step, val_bpb), …]."""
    for row in rows:
        folder = Path(base.run_dir) / row["name"]
        lines = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
        row["curve"] = [(line["step"], line["val_bpb"]) for line in lines if "val_bpb" in line]
    return rows


def ranked(rows):
    """The trials that came to their end, the best first."""
    return sorted((row for row in rows if row["val_bpb"] and not row["failure"]), key=lambda row: row["val_bpb"])


def show_table(rows, names, count=10):
    """Prints the best trials, and how many did not come to their end."""
    print("   ".join(f"{name:>17}" for name in ("val_bpb", *names)))
    for row in ranked(rows)[:count]:
        values = [f"{row[name]:.4g}" if name in row else "" for name in names]
        print("   ".join(f"{value:>17}" for value in (f"{row['val_bpb']:.4f}", *values)))
    others = len(rows) - len(ranked(rows))
    if others:
        print(f"{others} of {len(rows)} trials were stopped or failed")


def plot_parameters(rows, definition, path):
    """Writes a scatter of bits per byte against each parameter."""
    from matplotlib.figure import Figure

    parameters, best = definition["parameters"], ranked(rows)
    figure = Figure(figsize=(12, 6), layout="constrained")
    grid = figure.subplots(2, math.ceil(len(parameters) / 2), sharey=True)
    for axes, (name, parameter) in zip(grid.flat, parameters.items(), strict=False):
        axes.scatter([row[name] for row in best], [row["val_bpb"] for row in best], s=14, color="tab:blue", alpha=0.7)
        axes.scatter([best[0][name]], [best[0]["val_bpb"]], s=60, color="tab:orange", label="best")
        axes.set(xlabel=name, xscale="log" if parameter.get("distribution", "").startswith("log") else "linear")
        axes.grid(alpha=0.3)
    figure.supylabel("validation bits per byte")
    figure.savefig(path, dpi=110)


def plot_curves(rows, path):
    """Writes the validation curves of the five best and the five worst trials."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, best = figure.subplots(), ranked(rows)
    for group, color, label in ((best[5:][-5:], "tab:red", "five worst"), (best[:5], "tab:blue", "five best")):
        for i, row in enumerate(group):
            if row["curve"]:
                end = row["curve"][-1][0]
                steps, losses = np.array(row["curve"]).T
                axes.plot(steps / end, losses, color=color, alpha=0.8, label=label if i == 0 else None)
    axes.set(xlabel="share of the trial", ylabel="validation bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def show_winner(base, rows):
    """Prints the best trial's Config as code for 02_train.py: every field of the model, the data and the optimizer."""
    best = ranked(rows)[0]
    names = sweep_definition(base, 1)["parameters"]
    config = trial_config(base, {name: best[name] for name in names if name in best}, best["name"])
    print(f"{best['val_bpb']:.4f} bits per byte with")
    print("config = Config.for_device().replace(")
    for group in (
        ("n_head", "n_kv_head", "head_dim", "aspect_ratio", "vocab_size", "seq_len", "dataset"),
        ("device_batch_size", "total_batch_size"),
        ("learning_rate", "weight_decay", "warmup_ratio", "warmdown_ratio"),
    ):
        print("    " + ", ".join(f"{name}={getattr(config, name)!r}" for name in group) + ",")
    print(")")


# %% [markdown]
# # Run
#
# The first tab leaves `SWEEP_ID` empty and prints one; the others paste it. As a script: `python 03_worker.py
# --sweep_id abc123 --project tpuchat`, with any field of the base Config as another option.

# %% Configure tags=["run"]
SWEEP_ID = ""  # @param {type:"string"}
PROJECT = "tpuchat"  # @param {type:"string"}
ENTITY = ""  # @param {type:"string"}
RUNS = 40  # @param {type:"integer"}
LOCAL_TRIALS = 4  # @param {type:"integer"}

with one_line_errors():
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choices = dict(sweep_id=SWEEP_ID, project=PROJECT, entity=ENTITY, runs=RUNS, trials=LOCAL_TRIALS)
    for name, default in choices.items():
        options.add_argument(f"--{name}", default=default, type=type(default))
    options, rest = options.parse_known_args([] if IN_NOTEBOOK else sys.argv[1:])
    base = parse_args(rest, base_config(), "--sweep_id, --project, --entity, --runs: of a sweep; --trials: without one")
    describe_machine(base)
    key = wandb_key()
    describe_budget(base, options.runs if key else options.trials)

# %% [markdown]
# ### Create once, or join

# %% Create tags=["run"]
sweep_id = options.sweep_id
with one_line_errors():
    check_data(base)
if key:
    with one_line_errors():
        log_in(key)
        sweep_id = sweep_id or create_sweep(base, options.runs, options.project, options.entity)
    print(f"sweep   {sweep_id}: put it into SWEEP_ID of the next tab, or python 03_worker.py --sweep_id {sweep_id}")
else:
    print("no WANDB_API_KEY: a search on this machine, logged offline")

# %% Work tags=["run"]
with one_line_errors():
    rows = work(base, sweep_id, options.project, options.entity) if key else local_search(base, options.trials)

# %% [markdown]
# **What to look for.** In the scatter, a parameter that matters draws a valley, and one that does not draws a cloud. A
# best value at the end of its range says that the range was too narrow. Differences below the noise of a seed mean
# nothing: train the winner, and the base, with three seeds before you believe it.

# %% Results of the search tags=["run"]
rows = add_curves(base, rows)
if key:
    try:
        rows = fetch_rows(sweep_id, options.project, options.entity)
    except InputError as error:
        print(f"{error}; what follows is of this worker's trials alone")
if ranked(rows):
    definition = sweep_definition(base, options.runs)
    show_table(rows, definition["parameters"])
    plot_parameters(rows, definition, Path(base.run_dir) / "parameters.png")
    plot_curves(rows, Path(base.run_dir) / "curves.png")
    show_winner(base, rows)
else:
    print("no trial came to its end")

# %% Pictures tags=["run"]
if IN_NOTEBOOK and ranked(rows):
    from IPython.display import Image, display

    display(Image(str(Path(base.run_dir) / "parameters.png")), Image(str(Path(base.run_dir) / "curves.png")))

# %% [markdown]
# ## Give the machine back

# %% Release the runtime tags=["run"]
RELEASE = False  # @param {type:"boolean"}
if RELEASE and "google.colab" in sys.modules:
    from google.colab import runtime

    runtime.unassign()
