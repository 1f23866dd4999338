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
# This notebook trains a small language model from nothing, in raw JAX, on whatever is under it: a Colab TPU v6e (the
# reference model, 268M parameters, on FineWeb-Edu), a GPU, or the two CPU cores of a free runtime (a demo of a few
# million parameters, on Jane Austen and a century of American presidents, in a few minutes). Press *Run all*. You get a
# loss curve, samples, a checkpoint, and a profile that TensorBoard can open.
#
# Every function that matters is on this page, in the order in which data flows through it: config → tokenizer → data →
# model → loss → optimizer → train step → evaluation and samples → checkpoint → log → the loop. Read it like an essay,
# then change a line and run it again.
#
# Shapes are written with the letters of [How to Scale Your Model](https://jax-ml.github.io/scaling-book/): **B** batch,
# **T** sequence, **D** model, **N** query heads, **K** key/value heads, **H** head dim, **F** MLP hidden, **L** layers,
# **V** vocabulary.

# %% [markdown]
# ## Setup
#
# The install cell adds only what the runtime lacks, and never replaces its jax: Colab's TPU image pairs jax with the
# libtpu of its chip. No account is needed. `HF_TOKEN`, as a Colab secret or an environment variable, only raises the
# Hub's rate limits.

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
    "jax", "numpy", "tiktoken", "rustbpe", "pyarrow", "huggingface_hub", "safetensors", "tensorboard",
    "matplotlib", "tqdm", "flatbuffers",
)  # fmt: skip

# %% Imports tags=["shared"]
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


# %% What an old jax needs tags=["shared"]
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

# %% Beside the runtime tags=["shared"]
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


# %% XLA on this machine tags=["shared"]
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
# ### Several hosts
#
# A slice of more than a few chips has several hosts, and each runs this same file: `jax.distributed` introduces the
# processes to each other, and from then on `jax.devices()` are the chips of all. Every process must do the same work
# in the same order; what only one may do, logs, names and uploads, the first one does.
#
# If a host dies, the others would wait for its part of a sum forever. So they ask each other for signs of life, and
# jax ends a process that has lost another. That is an abort, with a page of C++: as a script, the work is therefore
# done by a child process, and what is left says in a line what has happened and what to do.

# %% Several hosts tags=["shared"]
HOST_TIMEOUT = 30  # seconds without a sign of life after which a host counts as gone


def several_hosts():
    """Whether the environment says that this process is one of several: jax's own variables, those of a launcher, or
    the metadata of a Cloud TPU."""
    names = os.environ
    if "JAX_COORDINATOR_ADDRESS" in names or "MEGASCALE_COORDINATOR_ADDRESS" in names:
        return True
    if "SLURM_STEP_ID" in names and int(names.get("SLURM_NTASKS", 1)) > 1:  # by srun, not in a shell of salloc
        return True
    if int(names.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    if "TPU_WORKER_HOSTNAMES" in names:
        return "," in names["TPU_WORKER_HOSTNAMES"]
    if not TPUS or "google.colab" in sys.modules or "TPU_SKIP_MDS_QUERY" in names:
        return False
    url = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    with contextlib.suppress(OSError):
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        return b"," in urllib.request.urlopen(request, timeout=2).read()
    return False


def watch_over():
    """Runs this script again, in a child, and returns its exit status. If a signal has ended it, says why, most likely,
    and what to do."""
    environment, asked = os.environ | {"TPUCHAT_PARENT": str(os.getpid())}, []
    child = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment, start_new_session=True)

    def ask(number, frame):  # a terminal's Ctrl-C reaches only this process, and both signals mean: stop all hosts
        child.send_signal(signal.SIGKILL if asked and number == signal.SIGINT else signal.SIGTERM)
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    status = child.wait()
    if status == 1:  # jax 0.7.2 exits when a host is lost, 0.10 aborts
        print(
            "error: ended with exit status 1, see above; if another host is gone, start the same command on all hosts: "
            "it goes on from the newest checkpoint, if there is one",
            file=sys.stderr,
        )  # fmt: skip
    if status >= 0:
        return status
    name, again = signal.Signals(-status).name, "it goes on from the newest checkpoint, if there is one"
    if asked:
        print(f"stopped by {name}; start the same command on all hosts: {again}", file=sys.stderr)
    elif name == "SIGABRT":
        print(
            f"error: ended by {name}, most likely since another host is gone, or has not come (the words above say "
            f"which); start the same command on all hosts, the same or another number of them: {again}",
            file=sys.stderr,
        )  # fmt: skip
    else:
        print(f"error: killed by {name}, perhaps for its memory; start it on all hosts again: {again}", file=sys.stderr)
    return 128 - status


def end_with(parent):
    """This process is killed when its parent is: nobody would be left to say what became of it."""
    PR_SET_PDEATHSIG = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        raise SystemExit(1)


def join_hosts():
    """Joins the processes of all hosts, if there are several, before jax looks for devices. The first one prints."""
    if not several_hosts():
        return
    if not IN_NOTEBOOK:
        if "TPUCHAT_PARENT" not in os.environ:
            raise SystemExit(watch_over())
        end_with(int(os.environ["TPUCHAT_PARENT"]))
    given = {
        name: int(os.environ[variable])
        for name, variable in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID"))
        if variable in os.environ
    }
    # A host that is done waits for the first one's last upload; one that has failed leaves at once.
    limits = {"heartbeat_timeout_seconds": HOST_TIMEOUT} | SHUTDOWN_TIMEOUT
    print("hosts   waiting for the others, for five minutes", flush=True)
    try:
        jax.distributed.initialize(**given, **limits)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"several hosts: they did not find each other ({str(error).splitlines()[0]})") from error
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")
    if not IN_NOTEBOOK:  # whoever fails leaves, and does not wait for hosts that wait for it; the first one, on which
        os.environ["TPUCHAT_LEAVE_AFTER"] = "0" if jax.process_index() else "2"  # the others hang, two seconds later
        sys.excepthook = leave_with_traceback


def leave_with_traceback(*exception):
    sys.__excepthook__(*exception)
    sys.stderr.flush()
    time.sleep(float(os.environ["TPUCHAT_LEAVE_AFTER"]))
    os._exit(1)


# %% Together tags=["shared"]
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


# %% [markdown]
# ## Config
#
# One frozen dataclass holds every choice. It is a *static* JAX type: part of the program, hashed by `jax.jit` like a
# shape. That raises a question for the learning rate: a sweep over it must not compile a new program each time. So the
# fields come in two kinds. **Compiled** fields change shapes or code. **Free** fields (`compare=False`: they are not
# part of the hash) reach the device as traced scalars inside the train state, or stay on the host.
#
# The size of the model has one knob, `n_head`. Width is `n_head * head_dim`, and depth follows width at a constant
# aspect ratio, so that `n_head=4, 8, 12` is a family of similar models (the idea of nanochat's single depth knob).


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


# %% Choices of every model tags=["shared"]
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


# %% Config tags=["shared"]
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


# %% [markdown]
# ## More than one device
#
# A step on eight chips is the same step. jax keeps arrays in pieces on a *mesh* of devices, and XLA's SPMD partitioner
# writes from the program of the whole the program of one device, with all that the devices must send each other. What
# is left to say is where the pieces lie. The mesh has two axes, and each row of the batch is on one device of it:
#
# - **data**: copies of the state. Each device computes the gradient of its rows, and all of them are summed.
# - **fsdp** (fully sharded data parallel; ZeRO, Rajbhandari et al. 2020): weights, moments and gradients are split. A
#   layer's weights are gathered in bfloat16 when it runs, and of the sum of gradients a device gets the part that it
#   updates. As many bytes are sent as for copies, the state of 12 bytes a parameter takes 1/n of the memory, and AdamW
#   1/n of the time: on eight chips that pays for what communication costs (estimates in LOG.md).
#
# `mesh='auto'` is all devices as copies, which any model that fits one chip can do; `mesh=(1, 8)` splits the state over
# eight. Nothing here names a device: a trace needs the shape of the mesh only, so a laptop can compile for 64 chips.
# And on one device nothing is said at all: its program is the one that it was without a mesh.


# %% Mesh tags=["shared"]
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


# %% Arrays on the mesh tags=["shared"]
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


# %% Where parts lie tags=["shared"]
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


# %% [markdown]
# ## Tokenizer
#
# Byte-level BPE: text is split by a pattern into words, numbers and punctuation, and inside each piece the most
# frequent pair of neighbours is merged, again and again. Whatever the bytes, the round trip is exact. Training is
# `rustbpe`'s, encoding is `tiktoken`'s; the files are tiktoken's own text format (base64 token, rank) and a small
# JSON with the pattern and the special tokens. Nothing is pickled.
#
# A tokenizer is looked for in this order: on this machine (beside the shards, or where `01_tokenizer` left it), in your
# Hub repo, and else it is trained here, on the first shard.

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


# %% Find the tokenizer tags=["shared"]
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


# %% [markdown]
# ## Data: shards
#
# A dataset is a list of parquet shards with one `text` column. FineWeb-Edu comes from the Hugging Face Hub, already
# shuffled, about 250M characters a shard; the embedded corpus, 12 MB of public-domain English, lies in the repository;
# a folder of shards and any other Hub dataset (`owner/name`, or `owner/name/folder` for a part of it) work alike.
# **The last shard is validation**, whatever `num_shards` is: a number that moves when you train on more data is not a
# validation loss.
#
# Networks fail in ways that look like success: a proxy's error page saved as a shard, a cut connection, a file that is
# full length and wrong. So a shard counts only when its SHA-256 is the one that the Hub gives; what may pass (a 500, a
# cut) is tried again; and what does not pass ends in one line that names the shard, the cause and the remedy.

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


# %% [markdown]
# A row of a shard is a document. A shard that is not what it should be is refused by name before one of its tokens is
# used, not skipped: a training run that silently saw half of its data is worse than one that stopped.


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


# %% [markdown]
# ## Data: the loader
#
# Documents become one endless stream of tokens, each document opened by BOS, and the stream is cut into rows of T + 1:
# a row's last token is the next row's first, so every token is predicted once and none is dropped or padded. Threads
# encode ahead (tiktoken releases the GIL), one more thread packs batches and puts them on the device, and the training
# loop takes what is ready. The position of the *next* token travels with each batch, so a checkpoint that is taken
# after step n resumes with the first token that step n + 1 would have seen, whatever the threads had read ahead.
#
# Several processes share the documents by their rows: of S *streams*, stream s has rows s, s + S, … of each shard, and
# fills its own rows of the batch. A run begins with a stream for each process. If it goes on with fewer processes, each
# takes several streams, and the batches are what they would have been; with more, streams are split.

# %% Encode tags=["shared"]
PIECE_CHARS = 20_000  # a longer document is encoded in pieces: bounds the latency and memory of one call
GROUP_CHARS = 50_000  # short documents are encoded in groups: a thread's task should be worth its overhead


def encode_document(tokenizer, text):
    """BOS and the tokens of `text`, uint32. Text that looks like a special token is encoded as ordinary text."""
    pieces = [text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)]
    tokens = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return np.concatenate([np.array([tokenizer.encode_single_token("<|bos|>")], np.uint32), *tokens])


# %% Loader tags=["shared"]
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


# %% [markdown]
# ## Model
#
# A decoder-only transformer in the shape that small-model research has settled on:
#
# - **RMSNorm without weights** before attention and MLP, and once more on queries and keys (*QK-norm*), which bounds
#   the attention logits and lets the learning rate rise.
# - **RoPE**: positions rotate queries and keys; nothing is added to the residual stream.
# - **Grouped-query attention**: N query heads share K key/value heads; the KV cache shrinks by N/K.
# - **Sliding windows**: in the pattern SSSL three layers of four see only half the context; the last sees all of it.
# - **ReLU²** MLP: as good as GELU at this size, and sparse.
# - **x0 residuals**: each layer mixes the embedding back in, `x ← a·x + b·x0`, with its own learned a and b.
# - **Untied** embedding and head, and a **softcap** of 15 on the logits, `15·tanh(z/15)`, which bounds the loss.
#
# Sources: RMSNorm (Zhang & Sennrich 2019), RoPE (Su et al. 2021), GQA (Ainslie et al. 2023), ReLU² (So et al. 2021,
# Primer), softcap (Gemma 2), x0 residuals and the initial values (modded-nanogpt and nanochat).
#
# Weights keep explicit head dims, `q: [D, N, H]`, so that a matmul's einsum says what it does and nothing is reshaped.
# Every initial value stands in one place:


# %% Initial values tags=["shared"]
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


# %% Norm and RoPE tags=["shared"]
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


# %% Heads tags=["shared"]
def split_heads(x, T, H):
    """[B·T, N·H] → [B, N, T, H]."""
    return x.reshape(-1, T, x.shape[1] // H, H).swapaxes(1, 2)


def merge_heads(y):
    """[B, N, T, H] → [B·T, N·H]."""
    B, N, T, H = y.shape
    return y.swapaxes(1, 2).reshape(B * T, N * H)


# %% [markdown]
# ### Attention, four times
#
# One function, four ways to compute it. `einsum` is the definition: readable, and right by inspection. `jax` is
# `jax.nn.dot_product_attention`, on an NVIDIA GPU with cuDNN's flash attention. `splash` and `pallas` are the TPU
# kernels that ship with jax, which never write the T×T scores to memory; splash skips blocks outside the window, the
# older flash kernel is causal only. Off a TPU the two kernels run in interpret mode: slow, for tests.
#
# A query at t sees the keys from t − window to t. Which implementation `auto` takes is decided when the program is
# *lowered*, by the chip that it is lowered for, so that a laptop can compile the TPU's program.


# %% Attention tags=["shared"]
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


# %% Attention kernels tags=["shared"]
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


# %% [markdown]
# ### A fifth time, for this model
#
# Those kernels must serve every model. This one allows more. QK-norm gives queries and keys of length √H, so a score,
# q·k/√H, never exceeds √H = 11.3 (H = 128): the softmax needs no running maximum, and no sum is rescaled. At T = 2048
# all keys and values of a head fit the chip's vector memory (VMEM, 128 MiB), so a tile of queries meets all its keys at
# once, and no loop over blocks is left. And the kernel can begin with what comes before attention: it reads the
# projections as the matmuls leave them, `[B·T, N·H]`, norms and rotates a head when it is there (rotation needs no
# halves: x·[c, c] + roll(x, H/2)·[−s, s]), and writes its result in the same form. XLA would make copies of these
# steps: halves of a head are half a register wide, and heads must be moved in front of the tokens and back.
#
# One kernel forward, one backward, each with one program for a head of a sequence. Between the two lie the kernels'
# inputs and outputs and one number a row, the log of its sum of exponentials. Backward, the scores are computed again,
# transposed (keys × queries): what is subtracted from a query's scores is then a row of lanes, and only dq needs a
# transpose. For the reference on a v6e, splash and XLA's copies around it take 1.1 ms a layer, this takes 0.44, by the
# compiler's schedules (LOG.md). The plain functions above say what it computes, and compute it elsewhere than on a TPU.


# %% Fused attention tags=["shared"]
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


# %% Attend tags=["shared"]
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


# %% [markdown]
# ### The forward pass
#
# The residual stream is `[B·T, D]`: only attention needs to know where one sequence ends, so every matmul has two axes,
# which every compiler knows how to lay out. (As `[B, T, D]`, XLA on a CPU copies both operands of each weight gradient
# into another layout: the demo's step took 1.8 times as long.)
#
# The layers are unrolled, not scanned: each then has its own name in the profile, and XLA schedules across them. The
# named scopes (`embed`, `layer_03/attn`, `layer_03/mlp`, `lm_head`, …) are what you will see in XProf.


# %% Layers tags=["shared"]
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


# %% Residual and MLP tags=["shared"]
def mix_residual(layer, x, x0):
    """a·x + b·x0 in float32: in bfloat16 a learned 1.001 would be 1."""
    mixed = layer["resid_scale"] * x.astype(jnp.float32) + layer["x0_scale"] * x0.astype(jnp.float32)
    return mixed.astype(x.dtype)


def mlp(layer, x):
    """[B·T, D] → [B·T, D] through F = 4D units of ReLU²."""
    hidden = jnp.einsum("sd,df->sf", rms_norm(x), layer["up"])
    return jnp.einsum("sf,fd->sd", jnp.square(jax.nn.relu(hidden)), layer["down"])


# %% All layers tags=["shared"]
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


# %% Forward pass tags=["shared"]
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


# %% [markdown]
# ### How big, and how much work
#
# Two numbers that everything else is divided by. A matmul weight costs 2 FLOPs a token forward and 4 backward.
# Attention adds two T×T matmuls a layer, of which a causal window needs only the part below the diagonal: that part
# is what is counted here, whatever the implementation really computes.


# %% Counts tags=["shared"]
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


# %% [markdown]
# ## Loss
#
# Cross-entropy in float32: the log of the sum of exponentials, minus the target's logit. The softcap bounds the
# logits, so the usual pass that subtracts their maximum is not needed; and the target's logit is a masked sum, which
# XLA fuses into the same pass, where indexing would gather, and scatter in the backward pass. With a head that starts
# near zero the loss begins at ln V, that of a uniform guess: if step 0 says anything else, something is wrong.
#
# `[B·T, V]` is the largest array of the whole step, 1 GiB in float32 for the reference, and autodiff would keep it for
# the backward pass. So the gradient is written by hand, from what is kept in bfloat16: half the bytes, and both matmuls
# of the backward pass get bfloat16 operands (40.4 → 38.4 ms a step on a v6e by the compiler's estimate; LOG.md). The
# loss itself is computed before anything is rounded.


# %% Loss tags=["shared"]
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


# %% Mean loss tags=["shared"]
def loss_fn(config, params, tokens, targets):
    """Mean cross-entropy, nats per token. tokens, targets: int32 [B, T]."""
    return jnp.mean(token_losses(config, params, tokens, targets))


# %% [markdown]
# ## Optimizer
#
# AdamW (Loshchilov & Hutter 2017) with the learning rate rising linearly, staying, and falling linearly: the trapezoid
# needs no guess of a cosine's length, and most of the gain of a run comes in its warmdown. Weight decay applies to the
# matmul weights, not to the embedding (a rare token's row would shrink between its visits) nor to the scalars.
#
# Every number of the schedule is a traced scalar in the train state. A strongly typed float32 array times a bfloat16
# weight is where silent promotion to float32 begins: so masters and moments are float32 throughout, only the cast that
# the forward pass reads is bfloat16, and a test holds the dtypes of the state to what they were.


# %% Optimizer tags=["shared"]
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


# %% [markdown]
# ## Train step
#
# The weights are cast to bfloat16 once, before the microbatches. Each microbatch's gradient is added in float32. The
# state is donated, so parameters and moments are updated in place. The function below *is* the compiled one:
# `train_step.lower(...)` gives its program, for a chip that need not be here.
#
# Clipping and skipping are off by default, and not for free: both need the norm of the whole gradient before the first
# weight is updated. Without them XLA updates a weight in the matmul that makes its gradient.


# %% Train step tags=["shared"]
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


# %% [markdown]
# How large are the weights of each part, and how far did the last step move them? Their ratio is the first thing to
# look at when a run misbehaves: about 0.001 is healthy. The update is computed once more, from the moments that the
# step has left, so that only steps which are logged pay for it: a pass over three arrays, where a step makes dozens.


# %% Norms tags=["shared"]
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


# %% [markdown]
# ## Evaluate
#
# Nats per token depend on the tokenizer, so they cannot be compared between tokenizers. **Bits per byte** can: the
# total cost of the validation text in bits, over its length in bytes. It is also a compression rate: 8 is no
# compression. BOS stands for no byte, but predicting it costs bits, and they are counted.


# %% Evaluate tags=["shared"]
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


# %% [markdown]
# One number hides two things worth seeing. **Loss by position**: the first tokens of a context are guessed from
# nothing, later ones from what came before, and the curve shows how far back the model makes use of it. **Surprise**:
# the bits that each token of a passage cost.


# %% Beyond one number tags=["shared"]
def plot_positions(by_position, path):
    """Writes the loss at each position of the context, [T], averaged over stretches that grow with the position."""
    from matplotlib.figure import Figure

    edges = np.unique(np.geomspace(1, len(by_position) + 1, 25).astype(int)) - 1
    means = [by_position[a:b].mean() for a, b in itertools.pairwise(edges)]
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.stairs(means, edges + 1, baseline=None, color="tab:blue")
    axes.set(xscale="log", xlabel="position in the context", ylabel="nats per token")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def surprise(config, params, tokenizer, text):
    """[(bytes of a token, its bits)] of the first T tokens of a text, each given BOS and those before it."""
    ids = encode_document(tokenizer, text)[: config.seq_len + 1]
    shape = config.device_batch_size * config.devices, config.seq_len  # that of an evaluation: nothing is compiled
    tokens, targets = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    tokens[0, : len(ids) - 1], targets[0, : len(ids) - 1] = ids[:-1], ids[1:]
    tokens, targets = (put_whole(config, x, ROWS) for x in (tokens, targets))
    losses = from_all_processes(evaluation_step(config, evaluation_weights(config, params), tokens, targets))[0]
    pieces = [tokenizer.decode_single_token_bytes(token) for token in ids[1:]]
    return [(piece, float(loss) / math.log(2)) for piece, loss in zip(pieces, losses, strict=False)]


def surprise_html(found):
    """What surprise returned as HTML: the redder a token, the more bits; the pointer shows how many.

    A character that is split between tokens is shown by the last of them, with the bits of all.
    """
    spans, held, bits = [], b"", 0.0
    for piece, cost in found:
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


# %% [markdown]
# ## Sample
#
# One compiled loop serves every prompt: at each position the model reads one token, appends its keys and values to a
# cache, and predicts the next; as long as the prompt lasts, the prediction is replaced by the prompt's own token. So a
# prompt of any length costs no compilation. Which token follows is drawn: at temperature 0 the likeliest, else one of
# the `top_k` likeliest, of which only as many stay as make up `top_p` of the probability.


# %% Decode tags=["shared"]
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


# %% Sample tags=["shared"]
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


# %% [markdown]
# ## Checkpoints
#
# Colab takes the machine away without asking. A checkpoint is a folder: `state.safetensors` (parameters and moments by
# name), `meta.json` (Config, step, the loader's position, size and SHA-256 of the files) and the metrics so far. It is
# written under a temporary name, flushed to disk and renamed; one that is damaged all the same is named and passed
# over. Only arrays and JSON are ever read back, so no checkpoint can run code.
#
# Of a state that fsdp has split, each part is a file, `state-00003-of-00008.safetensors`, with where it begins in each
# array, and every process writes the parts that it holds. They load on any mesh: a device reads what it is to hold.


# %% Checkpoints tags=["shared"]
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


# %% Load a checkpoint tags=["shared"]
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


# %% [markdown]
# ### Off the machine
#
# What is on the disk of a Colab runtime is gone with it. `backup` names a second place for each checkpoint: a folder,
# such as a mounted Drive, or your own Hub repo. The copy is made in the background and tried again; if it fails, that
# is said, and training goes on. A new runtime that starts the same run finds the newest there and goes on from it.

# %% Backup tags=["shared"]
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


# %% Checkpointer tags=["shared"]
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


# %% [markdown]
# ## The run folder
#
# Everything that a run leaves behind is in one folder: `config.json`, `metrics.jsonl` (one object a line),
# TensorBoard's events, `samples.txt`, `loss.png`, `profile/` and `checkpoints/`. Start the same run again and it goes
# on from its newest checkpoint; when it is finished, the next start takes a new folder (`runs/demo-2`), so nothing is
# overwritten. (A run that died before its first checkpoint has nothing to go on from: it, too, gets a new folder.)

# %% Run folder tags=["shared"]
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


# %% [markdown]
# ## Log
#
# The host's job is to stay ahead of the device: it takes a batch that is already there, dispatches a step, and goes on.
# **Metrics are read one log interval late**: while the host waits for the loss of step 90, steps 91 to 100 are already
# queued, so the device never waits. The moment at which that loss is there tells when step 90 was done, and throughput
# is measured from one such moment to the next. Only an evaluation, a sample, a save or a trace lets the queue run
# empty, and that time is not counted as training.


# %% Meter tags=["shared"]
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


# %% [markdown]
# With a [wandb](https://wandb.ai) key the same numbers go there, too, with the samples, the curve and the last
# checkpoint. Its run is named in each checkpoint, so whoever goes on from one, on whatever machine, goes on with it.
# Unless it was asked for by name, wandb never stops a run: if it is away, that is said, and training begins.


# %% Log to wandb tags=["shared"]
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


# %% Run log tags=["shared"]
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


# %% [markdown]
# ## Preflight
#
# The TPU's compiler is a Python package, `libtpu`, and it compiles on any x86-64 Linux machine. So whether a step fits
# a chip, how fast it will be and what the run will cost are questions for a free CPU runtime, before a credit is spent:
# `preflight(Config(), "v6e")` compiles the exact train step for a chip that is not there, and reads the answer from
# the compiled program.
#
# Memory is the compiler's own figure, and it is exact: a program that is too large fails here as it would on the chip.
# Time is an estimate, made from the schedule, one instruction after the other:
#
# - the compiler writes its estimate, in cycles, beside each fusion; where the bytes that the fusion moves to and from
#   HBM would take longer at 90% of the bandwidth, that counts (the compiler is too optimistic about AdamW);
# - what it copies between HBM and VMEM meanwhile costs only what does not fit beside the arithmetic;
# - Pallas kernels carry no estimate. Splash attention is counted from the length of its own instruction schedule: so
#   many cycles for each active block, and half a microsecond at least for each step of its grid.
#
# `preflight(Config(mesh=(1, 8)), "v6e:2x4")` asks about a slice of eight chips, "v6e:8x8" about 64 on sixteen hosts.
# The program of one chip, which is the program of each, then holds what they send each other:
#
# - *the compiler's* are the collectives, how many bytes each moves among how many chips, around how many rings, where
#   in the schedule it begins and where its result is needed;
# - *published* is the speed of a link between neighbours, 90 GB/s one way on a v6e, 45 on a v5e ("How to Scale Your
#   Model"). In a ring of n chips each receives (n-1)/n of what is gathered, and twice that of a sum. A slice below
#   16×16 has an edge, and its corners have two links: they set the pace of all;
# - *assumed* are full links, a microsecond a hop, one collective at a time, and that none slows the arithmetic (though
#   they share HBM). Nothing of it was measured on chips.
#
# *Communication* in the table is only what arithmetic does not hide: a collective that begins early and is needed late
# costs nothing. `scaling(Config())` asks about 1, 8 and 64 chips, and draws what that gives.
#
# `benchmarks/preflight.py` compares this with published measurements on real chips: see the README for how far it is
# off. Trust it to the percent when two versions of a step are compared, and to that error when it names a price.


# %% Chips and prices tags=["shared"]
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


# %% Compile for a chip tags=["shared"]
# The compiler runs in a process of its own: it may crash (it has), and once it is loaded where there is no TPU, jax's
# profiler may crash, too. What travels there is the step as StableHLO, what comes back is the program and its memory.
COMPILER = """
import json, pathlib, sys
import jax
import jax.export
from jax.experimental import mesh_utils, topologies

folder, topology, donated, shape = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
step = jax.export.deserialize((folder / "step").read_bytes())
host = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
devices = topologies.get_topology_desc(topology, "tpu", **host).devices
small = jax.ShapeDtypeStruct((128, 128), "float32", sharding=jax.sharding.SingleDeviceSharding(devices[0]))
jax.jit(jax.lax.add).lower(small, small).compile()  # a libtpu that needs the chip to be there crashes here
(folder / "works").touch()
mesh = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)  # as arrange() does
mesh = jax.sharding.Mesh(mesh, ("data", "fsdp"))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
places = [place or whole for place in step.in_shardings_jax(mesh)]
args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x, place in zip(step.in_avals, places)]
results = [*places[:donated], *[whole] * (len(step.out_avals) - donated)] if donated else None
try:
    compiled = jax.jit(step.call, donate_argnums=range(donated), out_shardings=results).lower(*args).compile()
except jax.errors.JaxRuntimeError as error:
    (folder / "error").write_text(str(error))
else:
    memory = compiled.memory_analysis()
    names = "peak_memory_in_bytes", "argument_size_in_bytes", "alias_size_in_bytes"
    (folder / "memory").write_text(json.dumps([getattr(memory, name) for name in names]))
    (folder / "chips").write_text(json.dumps([[device.coords[:2] for device in row] for row in mesh.devices]))
    try:
        (folder / "program").write_text(compiled.as_text())
    except jax.errors.JaxRuntimeError:  # jax 0.10 has failed on what libtpu 0.0.52 compiles
        (folder / "error").write_text(f"jax {jax.__version__} and this libtpu do not match: pip install 'jax[tpu]'")
"""
COMPILER_ENVIRONMENT = {  # nobody is asked what TPU this is, and other processes may use the compiler, too
    "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **NO_TPU,
}  # fmt: skip


class Compiled(NamedTuple):
    """A train step compiled for one or several chips: the text of the program of each, and bytes of its HBM."""

    text: str
    peak: int
    arguments: int
    alias: int  # arguments whose bytes the results take
    chips: tuple = (((0, 0),),)  # where in its slice each chip of the mesh is: [data][fsdp] → (x, y)


class CompileError(RuntimeError):
    """The TPU's compiler refuses the step; its own words."""


def require_compiler():
    """InputError if the TPU's compiler cannot run on this machine."""
    system = f"{platform.system()} on {platform.machine()}"
    if system != "Linux on x86_64":
        raise InputError(f"preflight: the TPU's compiler runs on Linux on x86_64, not on {system}; training works here")
    if importlib.util.find_spec("flatbuffers") is None:
        raise InputError("preflight: jax.export needs a package that is not installed: pip install flatbuffers")


def own_libtpu():
    """Returns the path of the libtpu that this jax asks for, beside the runtime. InputError if it cannot be had."""
    needed = [name for name in importlib.metadata.requires("jax") or () if name.startswith("libtpu")]
    if not needed:
        raise InputError("preflight: this jax does not name its libtpu; set TPU_LIBRARY_PATH to a libtpu.so")
    return install_aside(needed[0].partition(";")[0].strip(), "--no-deps") / "libtpu" / "libtpu.so"


def run_compiler(folder, arguments, flags):
    """Runs COMPILER with the installed libtpu and, if that one compiles nothing, with own_libtpu. Colab's TPU runtime
    has libtpu 0.0.21.1, which crashes unless its chip is there. Returns the finished process."""
    environment = os.environ | COMPILER_ENVIRONMENT | {"LIBTPU_INIT_ARGS": libtpu_flags(*flags)}
    command = [sys.executable, "-c", COMPILER, folder, *arguments]
    if importlib.util.find_spec("libtpu") or "TPU_LIBRARY_PATH" in environment:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if (folder / "works").exists():
            return done
        words = (done.stderr.strip().splitlines() or ["no word"])[-1][:100]
        print(f"the installed libtpu compiles nothing here (exit status {done.returncode}: {words})", flush=True)
    environment["TPU_LIBRARY_PATH"] = str(own_libtpu())
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def compile_for(topology, step, args, donated=0, schedules=None, mesh=(1, 1)):
    """step(*args), args all arrays, Compiled for `topology` ('v6e', 'v6e:2x4', …), its chips in a mesh (data, fsdp) as
    the shardings of args say; the first `donated` args give their bytes to the first results, and their shardings.

    `schedules`: a folder for the instruction schedules of all kernels, which takes twice the time. CompileError if the
    compiler refuses the step.
    """
    chip, slice_ = parse_topology(topology)
    require_compiler()
    with tempfile.TemporaryDirectory() as folder:
        folder, name = Path(folder), f"{chip}:{slice_[0]}x{slice_[1]}"
        (folder / "step").write_bytes(jax.export.export(jax.jit(step), platforms=["tpu"])(*args).serialize())
        flags = [COLLECTIVES_ASIDE] if slice_ != (1, 1) else []
        if schedules:
            flags += [f"--xla_jf_dump_to={schedules}", "--xla_jf_dump_llo_pass_label_regex=final_bundles"]
        done = run_compiler(folder, [name, str(donated), json.dumps(mesh)], flags)
        if (folder / "error").exists():
            raise CompileError((folder / "error").read_text())
        if done.returncode:
            fatal = re.search(r"^F\d{4} .*?\] (.*)", done.stderr, re.M)
            words = fatal[1] if fatal else (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise CompileError(f"the compiler itself crashed (another device_batch_size may do): {words}")
        memory, chips = (json.loads((folder / name).read_text()) for name in ("memory", "chips"))
        return Compiled((folder / "program").read_text(), *memory, chips)


def compile_step(config, topology):
    """The train step of `config`, Compiled for `topology`, its state donated. CompileError if it is refused."""
    config = on_topology(config, topology)
    state, tokens = abstract_step(config, None)
    leaves, tree = jax.tree.flatten((state, tokens, tokens))

    def step(*leaves):
        return jax.tree.leaves(train_step(config, *jax.tree.unflatten(tree, leaves)))

    return compile_for(topology, step, leaves, donated=len(leaves) - 2, mesh=config.mesh_shape)


def reason(error):
    """(one sentence that says why a program does not compile, bytes of HBM that it would have taken or None)."""
    text = str(error)
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    total = re.search(r"memory required\D*?\(([\d.]+)(\w?)\) exceeds available HBM \(([\d.]+)(\w?)\)", text)
    if hbm := total or re.search(r"Used ([\d.]+)(\w?) of ([\d.]+)(\w?) hbm", text):  # the second: libtpu 0.0.23
        need, available = float(hbm[1]) * unit[hbm[2]] / 2**30, float(hbm[3]) * unit[hbm[4]] / 2**30
        return f"out of HBM by {need - available:.2f} GiB: needs {need:.2f} of {available:.2f} GiB", need * 2**30
    if one := re.search(r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\)", text):  # it, too
        need, available = (int(size) / 2**30 for size in one.groups())
        words = f"out of HBM by {need - available:.2f} GiB: needs {need:.2f} of {available:.2f} GiB, or more"
        return words, need * 2**30
    if vmem := re.search(r"vmem.*?%(\S+) = .*?size ([\d.]+\w) and limit ([\d.]+\w)", text, re.S):
        return f"over VMEM in the kernel {vmem[1]}: {vmem[2]} of {vmem[3]}; try a smaller splash_block_size", None
    return " ".join(line for line in text.splitlines() if line.strip())[:300], None


# %% Read the schedule tags=["shared"]
NO_ESTIMATE = 2**64 - 1
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
NO_WORK = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "opt-barrier"}


class Instruction(NamedTuple):
    """One line of a compiled program."""

    name: str
    shape: str
    opcode: str
    operands: list
    rest: str


class Collective(NamedTuple):
    """What the chips of a group send each other."""

    kind: str  # all-gather | reduce-scatter | all-reduce | …
    size: int  # bytes: of the whole array that is gathered, scattered or summed
    chips: int  # in a group
    rings: int  # that the compiler sends it around, in one direction each
    hops: int  # from chip to chip, one after the other


class Op(NamedTuple):
    """An instruction as the chip meets it, `times` times a step."""

    name: str
    opcode: str
    scope: str  # jax's op_name, with the named scopes
    times: int
    cycles: int  # the compiler's estimate, 0 where it has none
    traffic: float  # bytes to and from HBM
    matmul_flops: float  # of matmuls between bfloat16 operands
    operands: list
    rest: str
    collective: Collective | None = None


def hbm_bytes(shape):
    """Bytes of an HLO shape, tuple or not, that lie in HBM; what the compiler keeps in VMEM is marked S(1)."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape)
    return sum(
        ITEM_BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims, layout in arrays
        if dtype in ITEM_BYTES and not re.search(r"S\([1-9]\)", layout)
    )


def read_program(text):
    """({computation: [Instruction]}, name of the entry) of the text of a compiled program."""
    found, entry = {}, None
    for line in text.split("\n"):
        if head := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
            body = found[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found and (match := INSTRUCTION.match(line)):
            name, shape, opcode, rest = match.groups()
            body.append(Instruction(name, shape, opcode, re.findall(r"%([^\s,)]+)", rest.split("), ")[0]), rest))
        elif found and body and line != "}":  # an instruction goes over several lines where it carries a kernel
            body[-1] = body[-1]._replace(rest=body[-1].rest + line)
    return found, entry


def bytes_read(program, body, index, size):
    """Of a fusion's parameter of `size` bytes, those that its body reads: the rows of a gather, the slices, none of
    what it updates in place. Bitcasts are the same bytes, and fusions inside are followed."""
    names = {x.name for x in body if x.opcode == "parameter" and x.rest.startswith(f"{index})")}
    for x in body:
        names |= {x.name} if x.opcode == "bitcast" and x.operands[0] in names else set()
    total = 0
    for x in (x for x in body if x.name not in names and names.intersection(x.operands)):
        if x.opcode == "fusion":
            inner = program[re.search(r"calls=%([^\s,]+)", x.rest)[1]]
            total += sum(bytes_read(program, inner, i, size) for i, name in enumerate(x.operands) if name in names)
        elif x.operands[0] not in names or x.opcode not in ("gather", "dynamic-slice", "dynamic-update-slice"):
            return size
        elif x.opcode != "dynamic-update-slice":
            total += hbm_bytes(re.sub(r"S\(\d\)", "", x.shape))
    return min(size, total)


def traffic(program, shapes, instruction):
    """Bytes that an instruction reads from HBM and writes to it: of a table that it only gathers rows from, the rows;
    of an array that it updates in place, the update."""
    sizes = [hbm_bytes(shapes.get(operand, "")) for operand in instruction.operands]
    result = hbm_bytes(instruction.shape)
    if called := re.search(r"calls=%([^\s,]+)", instruction.rest):
        body = program[called[1]]
        sizes = [bytes_read(program, body, i, size) if size else 0 for i, size in enumerate(sizes)]
        inner = {x.name: x.shape for x in body}
        for x in body:
            if x.opcode == "dynamic-update-slice" and hbm_bytes(x.shape) <= result:
                result += hbm_bytes(inner[x.operands[1]]) - hbm_bytes(x.shape)
    return sum(sizes) + result


def matmul_flops(program, instruction):
    """FLOPs of the matmuls, on a TPU they are convolutions, of bfloat16 operands inside a fusion; else 0.

    Of [M, K], [K, N] → [M, N] the product of all three sizes is (M·K·N)², whatever the layout. (A batched matmul counts
    too much by that; op_seconds takes no more than the compiler's estimate.)
    """
    called = re.search(r"calls=%([^\s,]+)", instruction.rest)
    body = program[called[1]] if called else []
    shapes, flops = {x.name: x.shape for x in body}, 0.0
    for x in body:
        if x.opcode in ("convolution", "dot"):
            arrays = [re.match(r"(\w+)\[([\d,]*)\]", shape) for shape in (x.shape, *(shapes[o] for o in x.operands))]
            if all(array[1] == "bf16" for array in arrays[1:]):
                flops += 2 * math.sqrt(math.prod(int(n) for array in arrays for n in array[2].split(",") if n))
        elif x.opcode == "fusion":
            flops += matmul_flops(program, x)
    return flops


def group_size(rest):
    """Devices in each replica group of a collective, in whichever of its notations."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", named[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d, ]*)\}", rest)
    return len(listed[1].split(",")) if listed else 2  # pairs of a source and a target


def find_collective(program, shapes, x):
    """The Collective that an instruction is, starts, or has another core run; else None."""
    kind = x.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        called = re.search(r"(?:calls|to_apply)=%([^\s,]+)", x.rest)
        if x.opcode not in ("fusion", "call-start", "async-start") or not called:
            return None
        body = program.get(called[1], [])
        inner = next((y for y in body if y.opcode.removesuffix("-start") in COLLECTIVES), None)
        if any(y.opcode in ("convolution", "fusion") for y in body):  # a v5e: arithmetic, beside which one goes on
            return None
        found = inner and find_collective(program, {y.name: y.shape for y in body}, inner)
        if found and "all-reduce-scatter" in called[1]:  # each chip keeps its part of a sum: half of the way
            found = found._replace(kind="reduce-scatter", hops=found.hops // 2)
        return found
    local = sum(hbm_bytes(re.sub(r"S\(\d+\)", "", shapes.get(operand, ""))) for operand in x.operands)
    chips = group_size(x.rest)
    phases = re.search(r"phase_rings(.*?)\]|cores:\{([^}]*)\}", x.rest)
    sizes = re.findall(r'"core_count":"(\d+)"', phases[1]) if phases and phases[1] else []
    sizes = sizes or (re.findall(r"\d+", phases[2]) if phases and phases[2] else [chips])
    colors = re.search(r"colors:(\d+)", x.rest)
    rings = x.rest.count('"phase_rings"') or (int(colors[1]) if colors and "UniDirection" in x.rest else 2)
    hops = sum(int(n) // min(rings, 2) for n in sizes) * (2 if kind == "all-reduce" else 1)
    return Collective(kind, local * chips if kind == "all-gather" else local, chips, rings, hops)


def total_cycles(ops):
    return sum(op.times * op.cycles for op in ops)


def schedule(text):
    """[Op] of a compiled program in the order in which they run, those in loops with how often."""
    program, entry = read_program(text)

    def walk(name, times):
        shapes = {x.name: x.shape for x in program[name]}
        for x in program[name]:
            if x.opcode == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', x.rest)
                condition = program[re.search(r"condition=%([^\s,]+)", x.rest)[1]]
                bounds = [int(c.rest.split(")")[0]) for c in condition if re.match(r"\d+\)", c.rest)]
                body = re.search(r"body=%([^\s,]+)", x.rest)[1]
                yield from walk(body, times * (int(trips[1]) if trips else max([1, *bounds])))
            elif x.opcode == "conditional":  # the longest of its branches
                branches = re.search(r"branch_computations=\{([^}]*)\}", x.rest)
                names = re.findall(r"%([^\s,}]+)", branches[1] if branches else "")
                yield from max((list(walk(branch, times)) for branch in names), key=total_cycles, default=[])
            elif x.opcode not in NO_WORK:
                scope = re.search(r'op_name="([^"]*)"', x.rest)
                cycles = re.search(r'"estimated_cycles":"(\d+)"', x.rest)
                cycles = int(cycles[1]) if cycles and int(cycles[1]) != NO_ESTIMATE else 0
                scope = scope[1] if scope else ""
                moved, flops = traffic(program, shapes, x), matmul_flops(program, x)
                sent = find_collective(program, shapes, x)
                yield Op(x.name, x.opcode, scope, times, cycles, moved, flops, x.operands, x.rest, sent)

    return list(walk(entry, 1))


# %% Splash kernels tags=["shared"]
# Cycles that an active block takes by the kernel's own instruction schedule (benchmarks/kernel_cycles.py), for blocks
# of 128, 256, 512 and 1024 tokens at head_dim 128 and 256; bfloat16, T=2048. 64 costs what 128 does.
BLOCK_SIZES = 128, 256, 512, 1024
BLOCK_CYCLES = {
    ("v6e", "fwd"): {128: (233, 563, 912, 3482), 256: (326, 596, 962, 3566)},
    ("v6e", "dkv"): {128: (237, 654, 1275, 4517), 256: (370, 715, 1327, 4588)},
    ("v6e", "dq"): {128: (197, 458, 1009, 3624), 256: (274, 490, 1041, 3799)},
    ("v5e", "fwd"): {128: (254, 508, 1188, 4796), 256: (367, 622, 2151, 8650)},
    ("v5e", "dkv"): {128: (238, 725, 1860, 6950), 256: (417, 1021, 3769, 14368)},
    ("v5e", "dq"): {128: (244, 521, 1467, 5671), 256: (345, 801, 2997, 11485)},
}  # fmt: skip
WINDOW_FACTOR = {  # the mask of a window has one comparison more: blocks of 512 and 1024; smaller ones do not show it
    ("v6e", "fwd"): (1.11, 1.36), ("v6e", "dkv"): (1.13, 1.07), ("v6e", "dq"): (1.18, 1.16),
    ("v5e", "fwd"): (1.00, 1.07), ("v5e", "dkv"): (1.03, 1.02), ("v5e", "dq"): (1.02, 1.03),
}  # fmt: skip
STEP_CYCLES = {"v6e": 220, "v5e": 180}  # of a step of the grid, whether or not its block is active
ROW_CYCLES = {  # for each token of a row of blocks: its start and its end
    ("v6e", "fwd"): 0.5, ("v6e", "dkv"): 0.25, ("v6e", "dq"): 0.13,
    ("v5e", "fwd"): 1.0, ("v5e", "dkv"): 0.45, ("v5e", "dq"): 0.22,
}  # fmt: skip
STEP_SECONDS = 0.5e-6  # the least that a step of the grid takes: from published times with blocks of 128, 256 and 512


def splash_seconds(op, chip, windows):
    """Seconds of one splash kernel, or None if `op` is another kernel."""
    blocks = {name: int(size) for name, size in re.findall(r'\\"(block_\w+)\\": (\d+)', op.rest)}
    kernel = next((kind for kind in ("dkv", "dq", "fwd") if f"splash_mha_{kind}" in op.name + op.scope), None)
    operands = re.findall(r"(\w+)\[([\d,]+)\]", op.rest.partition("operand_layout_constraints={")[2])
    if not (kernel and blocks and operands):
        return None
    grid = [int(n) for n in operands[0][1].split(",")]  # the mask: what blocks there are, the width of a row of them
    dtype, *heads, T, H = next((d, *map(int, s.split(","))) for d, s in operands if d in ("bf16", "f32"))
    suffix = "" if kernel == "fwd" else f"_{kernel}"
    block_q, block_kv = blocks["block_q" + suffix], blocks["block_kv" + suffix]
    layer = re.search(r"layer_(\d+)", op.scope)
    window = windows[int(layer[1])] if layer else max(windows)
    active = sum(
        q + block_q - 1 >= kv and q - (kv + block_kv - 1) <= window  # some query of the block sees some key of it
        for q in range(0, T, block_q)
        for kv in range(0, T, block_kv)
    )
    i = min(range(4), key=lambda i: abs(math.log(block_q * block_kv / BLOCK_SIZES[i] ** 2)))
    cycles = BLOCK_CYCLES[chip, kernel][256 if H > 192 else 128][i] * block_q * block_kv / BLOCK_SIZES[i] ** 2
    if window < T and i >= 2:
        cycles *= WINDOW_FACTOR[chip, kernel][i - 2]
    clock, steps = CHIPS[chip].clock, math.prod(grid[-2:])
    busy = max((STEP_CYCLES[chip] + cycles) / clock, STEP_SECONDS)
    idle = max(STEP_CYCLES[chip] / clock, STEP_SECONDS)
    row = ROW_CYCLES[chip, kernel] * T / clock  # all rows of blocks
    return math.prod(heads) * (active * busy + max(0, steps - active) * idle + row)


# %% Our kernels tags=["shared"]
BUNDLE = re.compile(r"^\s*0?x?[0-9a-f]+\s+(?:\w\w)?\s*:\s*((?:>\s*)*)\{(.*)$")


def bundles(path):
    """[(depth of the loop that it is in, text)] of each bundle of instructions in the schedule that the compiler writes
    of a kernel. A bundle takes one cycle if nothing stalls."""
    found = []
    for line in path.read_text(errors="replace").split("\n"):
        if match := BUNDLE.match(line):
            found.append([match[1].count(">"), match[2]])
        elif found:
            found[-1][1] += line
    return found


def branches(schedule):
    """[(first bundle, number of bundles)] in the grid's loop that a predicated branch can jump over, the long ones."""
    ends, found = {}, []
    for i, (_, text) in enumerate(schedule):
        for region in re.findall(r"(?:Start/End empty|End|Start) region (\d+)", text):
            ends.setdefault(region, i)
    for i, (depth, text) in enumerate(schedule):
        branch = re.search(r"sbr\.rel \([^)]*\) target (?:= \$region|bundleno = .*?region = )(\d+)", text)
        if branch and depth and ends.get(branch[1], 0) > i + 20:
            found.append((i + 1, ends[branch[1]] - i))
    return found


def program_cycles(schedule, group):
    """Cycles of one program of fused attention. What only one query head of a group does counts 1/group."""
    found = branches(schedule)
    start, size = max(found, key=lambda branch: branch[1])  # the program, if one is left to do
    once = sum(n for i, n in found if start < i and i + n < start + size)
    return sum(depth > 0 for depth, _ in schedule) - once * (1 - 1 / group)


def attention_seconds(config, chip):
    """{(kernel, window): seconds} of fused attention in one layer, from the schedules of its kernels, compiled alone.
    Empty where the model uses another kernel."""
    T, H = config.seq_len, config.head_dim
    if config.attn_impl not in ("auto", "fused") or not fits_vmem(T, H):
        return {}
    heads = config.n_head, config.kv_heads, tuple(dict.fromkeys(config.windows))
    rows = config.device_batch_size * config.n_head
    alone = config.replace(mesh=(1, 1), device_batch_size=1, total_batch_size=-1)
    return {key: rows * seconds for key, seconds in program_seconds(alone, chip, *heads).items()}


@functools.lru_cache
def program_seconds(config, chip, N, K, windows):
    """{(kernel, window): seconds} of one query head and sequence; compiled once for each model and chip."""
    T, H, found = config.seq_len, config.head_dim, {}
    shapes = [jax.ShapeDtypeStruct((2 * T, n * H), config.compute_dtype) for n in (N, K, K, N)]
    for window in windows:

        def step(q, k, v, g, window=window):
            y, pullback = jax.vjp(lambda *qkv: attend(config, *qkv, T, window), q, k, v)
            return y, *pullback(g)

        with tempfile.TemporaryDirectory() as folder:
            compile_for(chip, step, shapes, schedules=folder)
            for path in Path(folder).glob("*attention_*_kernel*-final_bundles.txt"):
                if "schedule-analysis" not in path.name:
                    kernel = re.search(r"attention_\w+?_kernel", path.name)[0]
                    found[kernel, window] = program_cycles(bundles(path), N // K) / CHIPS[chip].clock
    return found


# %% Communication tags=["shared"]
def links_within(group, slice_):
    """Links that the worst placed chip of a group [(x, y)] has to others of it. Only an axis of 16 chips is a ring."""
    group = {tuple(chip) for chip in group}

    def near(chip):
        for axis, step in itertools.product((0, 1), (-1, 1)):
            other = list(chip)
            other[axis] += step
            yield tuple(n % 16 if size == 16 else n for n, size in zip(other, slice_, strict=True))

    return max(1, min(len(group.intersection(near(chip)) - {chip}) for chip in group))


def links_of_groups(chips, slice_):
    """{chips in a group: links_within it} for all chips of a mesh, its rows and its columns: [data][fsdp] → (x, y)."""
    columns = list(zip(*chips, strict=True))
    groups = [*chips, *columns, list(itertools.chain(*chips))]
    sizes = {len(group) for group in groups} - {1}
    return {n: min(links_within(group, slice_) for group in groups if len(group) == n) for n in sizes}


def link_seconds(sent, chip, links):
    """Seconds of a Collective, if nothing else uses the links: rings in both directions, the worst placed chip decides.

    A chip receives (n-1)/n of the whole; of a sum, twice: the parts are summed, then gathered. An all-to-all is counted
    as a gather, which is too much.
    """
    shares = {"all-reduce": 2 * (sent.chips - 1) / sent.chips, "collective-permute": 1}
    share = shares.get(sent.kind, (sent.chips - 1) / sent.chips)
    return share * sent.size / (min(sent.rings, links) * CHIPS[chip].link) + sent.hops * HOP


class Wait(NamedTuple):
    """A collective of the schedule: seconds that it takes, and those of them in which the chip does nothing else."""

    op: Op
    sent: Collective
    seconds: float
    exposed: float


def waits(ops, seconds, chip, links):
    """[Wait] of the collectives among `ops`, which take `seconds` where they are arithmetic, in the order of the chip.

    One collective has the links at a time. It begins where it is started, when those before it are done, and the chip
    waits where its result is asked for, unless the arithmetic in between took longer.
    """
    now, free, running, found = 0.0, 0.0, {}, []
    for op, own in zip(ops, seconds, strict=True):
        verb = re.search("(?:^async-collective|-)(start|update|done)", op.name if op.opcode == "fusion" else op.opcode)
        verb = verb[1] if verb else ""
        source = op.name.replace("done", "start") if op.opcode == "fusion" else next(iter(op.operands), None)
        if op.collective or source in running:
            first, sent, done = running.pop(source, (op, op.collective, None))
            needs = link_seconds(sent, chip, links.get(sent.chips, 2))
            if verb != "done" and op.operands:  # what it sends is there
                free = done = max(now, free) + needs
            if verb in ("start", "update"):
                running[op.name] = first, sent, done
                continue
            exposed = max(0.0, done - now)
            found.append(Wait(first, sent, needs, exposed))
            now += exposed
        now += own
    return found


# %% Estimate tags=["shared"]
REACHED_BANDWIDTH, REACHED_MATMUL = 0.85, 0.70  # of the data sheet: published matmuls reach 68 to 70% of a v6e's peak


def component(op):
    """(component, 'forward' | 'backward') of an op, by its named scopes."""
    direction = "backward" if re.search(r"transpose\(|rematted", op.scope) else "forward"
    if (
        op.opcode == "custom-call"
        and "tpu_custom_call" in op.rest
        and re.search("splash|attention", op.name + op.scope)
    ):
        return "attention kernel", "backward" if re.search("dkv|dq|bwd|backward", op.name + op.scope) else direction
    scopes = ("optimizer", "lm_head", "loss", "attn", "mlp", "embed")
    found = next((scope for scope in scopes if re.search(rf"(^|[/(]){scope}[/)]", op.scope)), "other")
    names = {"lm_head": "head and loss", "loss": "head and loss", "attn": "attention", "embed": "embedding"}
    return names.get(found, found if found != "mlp" else "MLP"), direction


def op_seconds(op, chip):
    """Seconds of an op that runs by itself: the slowest of HBM, matrix unit and vector unit.

    The compiler adds a matmul's epilogue to the matmul. On the chip the two overlap where the operands are bfloat16.
    """
    cycles = op.cycles / CHIPS[chip].clock
    matmul = min(op.matmul_flops / (REACHED_MATMUL * peak_flops(CHIPS[chip].kind)), cycles)
    return max(op.traffic / (REACHED_BANDWIDTH * CHIPS[chip].bandwidth), matmul, cycles - matmul)


def kernel_seconds(op, chip, windows, ours):
    """Seconds of a Pallas kernel, or None if it is not known; `ours` as by attention_seconds."""
    if kernel := re.search(r"attention_\w+?_kernel", f"{op.name} {op.scope}"):
        layer = re.search(r"layer_(\d+)", op.scope)
        window = windows[int(layer[1])] if layer else max(windows)
        return max(ours[kernel[0], window], op_seconds(op, chip)) if (kernel[0], window) in ours else None
    return splash_seconds(op, chip, windows)


def timeline(text, chip, windows, ours=types.MappingProxyType({}), links=types.MappingProxyType({})):
    """({(component, direction): seconds}, [names of kernels that could not be counted], [Wait]) of a compiled program.

    `windows`: of each layer; `ours`: what attention_seconds found; `links`: by links_of_groups.
    """
    parts, unknown, ops, seconds = collections.Counter(), [], schedule(text), []
    for op in ops:
        own = 0.0
        if "tpu_custom_call" in op.rest:
            own = kernel_seconds(op, chip, windows, ours)
            if own is None:
                unknown.append(op.name)
                own = op_seconds(op, chip)  # its bytes alone
        elif not op.collective and not re.search("-(start|done|update)$", op.opcode):  # those run beside the arithmetic
            own = op_seconds(op, chip)
        seconds.append(own)
        if own:
            parts[component(op)] += op.times * own
    found = waits(ops, seconds, chip, links)
    for wait in found:
        direction = "backward" if "reduce" in wait.sent.kind else component(wait.op)[1]  # gradients are summed
        parts["communication", direction] += wait.op.times * wait.exposed
    return parts, unknown, found


def estimate(text, chip, windows, ours=types.MappingProxyType({})):
    """The first two of timeline: of a program for one chip."""
    return timeline(text, chip, windows, ours)[:2]


# %% Report tags=["shared"]
def describe_memory(config, chip, compiled):
    """Prints the peak of the step on each chip, and what the compiler tells about its parts; returns it, in bytes."""
    weights = 4 * count_params(config)["total"] // config.mesh_shape[1]
    parts = {"weights": weights, "moments": 2 * weights}
    parts["the rest of the arguments"] = compiled.arguments - 3 * weights
    if config.grad_accum_steps > 1:
        parts["accumulated gradients"] = weights
    parts["activations, gradients, bfloat16 weights"] = compiled.peak - sum(parts.values())
    split = ", ".join(f"{size / 2**30:.2f} {name}" for name, size in parts.items() if size > 2**30 / 200)
    where = "at its peak" if config.devices == 1 else "on each chip at its peak"
    print(f"memory  {compiled.peak / 2**30:.2f} GiB of {CHIPS[chip].hbm / 2**30:.2f} {where}: {split}")
    return compiled.peak


def describe_time(config, chip, seconds):
    """Prints what an estimated step of `seconds` means for the run; returns tokens per second of all chips, and MFU."""
    kind, steps = CHIPS[chip].kind, config.total_steps
    rate, hours = config.tokens_per_step / seconds, steps * seconds / 3600
    mfu = flops_per_token(config) * rate / peak_flops(kind) / config.devices
    each = f", {rate / config.devices:,.0f} a chip" if config.devices > 1 else ""
    print(
        f"time    {seconds * 1e3:.1f} ms a step of {config.tokens_per_step:,} tokens: {rate:,.0f} tok/s{each}, "
        f"MFU {mfu:.1%}"
    )
    print(f"        (6 FLOPs a matmul weight, 12·N·H a visible key; of {peak_flops(kind) / 1e12:.0f} TFLOP/s)")
    run = f"run     {steps:,} steps, {steps * config.tokens_per_step / 1e9:,.2f}B tokens: {format_time(3600 * hours)}"
    if CHIPS[chip].credits and config.devices == 1:
        credits = hours * CHIPS[chip].credits
        run += f", {credits:,.1f} credits, ${credits * DOLLARS_PER_CREDIT:,.2f}"
    print(f"{run}; evaluations, samples and compilation not included")
    return rate, mfu


def show_parts(parts):
    """Prints a table of {(component, direction): seconds}."""
    total = sum(parts.values())
    rows = collections.defaultdict(dict)
    for (name, direction), seconds in parts.items():
        rows[name][direction] = seconds
    print(f"{'ms':>24} {'forward':>9} {'backward':>9} {'share':>7}")
    for name, row in sorted(rows.items(), key=lambda item: -sum(item[1].values())):
        forward, backward = (row.get(direction, 0) for direction in ("forward", "backward"))
        print(f"{name:>24} {1e3 * forward:9.2f} {1e3 * backward:9.2f} {(forward + backward) / total:7.1%}")


def describe_parts(parts, unknown):
    """Prints the table of time per component, and what it leaves out."""
    show_parts(parts)
    print("AdamW runs inside the matmuls of the gradients where the compiler fuses it: there it counts as theirs")
    print("kernels are counted from their static schedules; copies that run beside arithmetic are not counted")
    if unknown:
        print(f"NOT counted but for their bytes: the kernels {', '.join(sorted(unknown)[:4])}, {len(unknown)} in all")


def describe_waits(config, chip, found, seconds):
    """Prints how long the chips of a mesh send each other data, how much of it the step of `seconds` waits for, and the
    collectives that it waits for longest."""
    if config.devices == 1:
        return
    sent, exposed = (sum(w.op.times * getattr(w, name) for w in found) for name in ("seconds", "exposed"))
    print(f"send    {1e3 * sent:.2f} ms a step, of which {1e3 * exposed:.2f} are not beside arithmetic: "
          f"{exposed / seconds:.1%} of the step; links of {CHIPS[chip].link / 1e9:.0f} GB/s one way")  # fmt: skip
    groups = collections.defaultdict(list)
    for w in found:
        groups[w.sent.kind, w.sent.size, w.sent.chips].append(w)
    ranked = sorted(groups.items(), key=lambda item: -sum(w.op.times * w.exposed for w in item[1]))
    for (kind, size, chips), same in ranked[:4]:
        times = sum(w.op.times for w in same)
        waited = sum(w.op.times * w.exposed for w in same)
        print(f"{1e3 * waited:12.2f} ms exposed: {times} × {kind} of {size / 1e6:,.1f} MB over {chips} chips, "
              f"{1e3 * same[0].seconds:.2f} ms each")  # fmt: skip
    print("        published: the links' speed; the compiler's: which collectives, of what size, in which rings, when;")
    print(f"        assumed: full speed, {HOP * 1e6:.0f} µs a hop, one collective at a time, none slows the arithmetic")


def plot_parts(parts, title, path):
    """Horizontal bars of milliseconds per component, forward and backward, saved to `path`."""
    from matplotlib.figure import Figure

    names = sorted({name for name, _ in parts}, key=lambda name: sum(s for (n, _), s in parts.items() if n == name))
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes, left = figure.subplots(), np.zeros(len(names))
    for direction in ("forward", "backward"):
        width = np.array([1e3 * parts.get((name, direction), 0) for name in names])
        axes.barh(names, width, left=left, label=direction)
        left += width
    axes.set_xlabel("ms a step, estimate")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


# %% What would fit tags=["shared"]
def largest_batch(config, topology, needed):
    """The largest device_batch_size that fits and keeps the tokens of a step, found by compiling; None if not even 1.

    `needed`: bytes that the one which did not fit would have taken, to begin near the answer; or None.
    """
    rows = config.tokens_per_step // config.seq_len // config.devices  # of a chip
    sizes = [b for b in range(config.device_batch_size - 1, 0, -1) if rows % b == 0]

    def fits(b):
        print(f"        device_batch_size={b} …", end=" ", flush=True)
        try:
            compile_step(config.replace(device_batch_size=b, total_batch_size=config.tokens_per_step), topology)
        except CompileError as error:
            print(reason(error)[0])
            return False
        print("fits")
        return True

    hbm = CHIPS[parse_topology(topology)[0]].hbm
    guess = config.device_batch_size * hbm / needed if needed else config.device_batch_size / 2
    i = next((i for i, b in enumerate(sizes) if b <= guess), len(sizes) - 1)
    if not sizes:
        return None
    if fits(sizes[i]):
        while i > 0 and fits(sizes[i - 1]):
            i -= 1
        return sizes[i]
    return next((b for b in sizes[i + 1 :] if fits(b)), None)


# %% Preflight tags=["shared"]
def ask(config, topology):
    """(Compiled, *timeline) of the step. CompileError if the compiler refuses it."""
    chip, slice_ = parse_topology(topology)
    compiled = compile_step(config, topology)
    ours, links = attention_seconds(config, chip), links_of_groups(compiled.chips, slice_)
    return compiled, *timeline(compiled.text, chip, config.windows, ours, links)


def communication(parts):
    """Seconds of a step in which a chip waits for others."""
    return sum(seconds for (name, _), seconds in parts.items() if name == "communication")


def preflight(config, topology="v6e"):
    """Compiles the train step for a chip ('v6e', 'v5e') or a slice of several ('v6e:2x4'), and prints whether it fits,
    how fast it will be and what the run will cost.

    Returns {'fits', 'reason'} and, if it fits, {'peak': bytes a chip, 'seconds': of a step, 'tokens_per_second': of all
    chips, 'mfu', 'parts': {(component, direction): seconds}, 'exposed': seconds of communication that nothing hides,
    'unknown': [kernels that were not counted], 'picture': path}, else {'device_batch_size': the largest that fits, or
    None}. InputError if this machine cannot compile for a TPU, or if config.mesh does not suit the topology.
    """
    chip, _ = parse_topology(topology)
    config = on_topology(config, topology)
    started = time.perf_counter()
    counts = count_params(config)["total"]
    mesh = f" on each chip of a mesh {config.mesh_shape[0]} × {config.mesh_shape[1]}" if config.devices > 1 else ""
    size = f"{counts / 1e6:,.1f}M parameters, {config.device_batch_size} × {config.seq_len} tokens"
    print(f"preflight on {topology}: {size} × {config.grad_accum_steps} a step{mesh}", flush=True)
    try:
        compiled, parts, unknown, found = ask(config, topology)
    except CompileError as error:
        why, needed = reason(error)
        print(f"does not compile: {why}")
        batch = largest_batch(config, topology, needed) if "HBM" in why else None
        if batch:
            print(f"what fits: device_batch_size={batch}, total_batch_size={config.tokens_per_step}: the same step in "
                  f"{config.tokens_per_step // config.seq_len // config.devices // batch} parts")  # fmt: skip
        return {"fits": False, "reason": why, "device_batch_size": batch}
    print(f"fits    compiled in {time.perf_counter() - started:.0f} s")
    peak = describe_memory(config, chip, compiled)
    seconds = sum(parts.values())
    rate, mfu = describe_time(config, chip, seconds)
    describe_waits(config, chip, found, seconds)
    describe_parts(parts, unknown)
    title = f"{topology}: {seconds * 1e3:.1f} ms a step, {rate:,.0f} tok/s, MFU {mfu:.1%}, estimate"
    picture = Path(config.run_dir).parent / f"preflight-{topology.replace(':', '-')}.png"
    print(f"picture {plot_parts(parts, title, picture)}", flush=True)
    return {
        "fits": True, "reason": "", "peak": peak, "seconds": seconds, "tokens_per_second": rate, "mfu": mfu,
        "parts": dict(parts), "exposed": communication(parts),
        "unknown": unknown, "picture": picture,
    }  # fmt: skip


# %% Scaling tags=["shared"]
def scaled(config, chips, total=None):
    """config on so many chips: with its sequences a chip, or, where `total` is given, with `total` tokens a step, in as
    few passes as its device_batch_size allows.

    The state is split over all of them: that divides AdamW's work, too, which pays for much of the communication.
    """
    rows = config.device_batch_size
    if total:
        each = total // config.seq_len // chips
        rows = max(n for n in range(1, min(rows, each) + 1) if each % n == 0)
    return config.replace(mesh=(1, chips), device_batch_size=rows, total_batch_size=total or -1)


def scaling(config, chip="v6e", counts=(1, 8, 64)):
    """Compiles the step for 1, 8 and 64 chips, at constant tokens a chip (weak scaling) and at constant tokens a step,
    a sequence for each chip of the largest slice (strong scaling). Prints a table and saves a picture of it.

    Returns {'a chip' | 'a step': [{'chips', 'mesh', 'tokens', 'seconds', 'rate', 'efficiency', 'exposed', 'peak'}]}:
    efficiency is the tokens a second of each chip, over those of the first row. CompileError if one does not fit.
    """
    require(chip in CHIPS, "scaling", chip, f"must be one of {', '.join(CHIPS)}")
    table = collections.defaultdict(list)
    heads = "chips", "mesh", "tokens a step", "passes", "ms", "tok/s", "efficiency", "not hidden", "GiB a chip"
    print(f"scaling on {chip}, estimates: {count_params(config)['total'] / 1e6:,.1f}M parameters")
    for constant, total in (("a chip", None), ("a step", max(counts) * config.seq_len)):
        print(f"tokens {constant} constant\n" + " ".join(f"{head:>13}" for head in heads), flush=True)
        for chips in counts:
            now = scaled(config, chips, total)
            compiled, parts, _, _ = ask(now, f"{chip}:{SLICES[chips]}")
            seconds = sum(parts.values())
            row = {"chips": chips, "mesh": now.mesh, "tokens": now.tokens_per_step, "seconds": seconds,
                   "rate": now.tokens_per_step / seconds, "exposed": communication(parts),
                   "peak": compiled.peak}  # fmt: skip
            first = (table[constant] or [row])[0]
            row["efficiency"] = row["rate"] / chips / (first["rate"] / first["chips"])
            table[constant].append(row)
            cells = (chips, f"{now.mesh[0]} × {now.mesh[1]}", f"{row['tokens']:,}", now.grad_accum_steps,
                     f"{1e3 * seconds:.1f}", f"{row['rate']:,.0f}", f"{row['efficiency']:.1%}",
                     f"{row['exposed'] / seconds:.1%}", f"{row['peak'] / 2**30:.2f}")  # fmt: skip
            print(" ".join(f"{cell!s:>13}" for cell in cells), flush=True)
    print(f"picture {plot_scaling(table, chip, Path(config.run_dir).parent / f'scaling-{chip}.png')}", flush=True)
    return dict(table)


def plot_scaling(table, chip, path):
    """Tokens per second against chips, with the straight line of perfect scaling, saved to `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots(1, len(table), sharey=True)
    for panel, (constant, rows) in zip(axes, table.items(), strict=True):
        chips, rates = ([row[name] for row in rows] for name in ("chips", "rate"))
        panel.plot(chips, [rates[0] / chips[0] * n for n in chips], "--", color="0.6", label="perfect")
        panel.plot(chips, rates, "o-", label="estimate")
        for row in rows[1:]:
            place = {"xytext": (0, -16), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            panel.annotate(f"{row['efficiency']:.0%}", (row["chips"], row["rate"]), **place)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(chips, chips)
        tokens = f"{rows[0]['tokens']:,} tokens {constant}"
        panel.set_title(tokens, fontsize=10)
        panel.set_xlabel(f"{chip} chips")
        panel.legend(fontsize=8)
    axes[0].set_ylabel("tokens a second")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


# %% Preflight from the command line tags=["shared"]
def take_options(argv, name):
    """([value of each `--name value` or `--name=value`], the other words)."""
    found, rest = [], []
    for word in (words := iter(argv)):
        option, _, value = word.partition("=")
        if option == f"--{name}":
            found.append(value or next(words, ""))
        else:
            rest.append(word)
    return found, rest


def preflight_option(argv):
    """([topologies], the other options): `--preflight v6e`, `--preflight=v6e:2x4`, or `--preflight all`, the chips."""
    found, rest = take_options(argv, "preflight")
    found = [name for value in found for name in (CHIPS if value == "all" else [value])]
    for name in found:
        parse_topology(name)
    return found, rest


def scaling_option(argv):
    """([chips], the other options): `--scaling v6e`."""
    found, rest = take_options(argv, "scaling")
    for chip in found:
        require(chip in CHIPS, "scaling", chip, f"must be one of {', '.join(CHIPS)}")
    return found, rest


# %% [markdown]
# ## Read a trace
#
# Preflight says what a step should cost; a trace says what it did. XProf notes when each operation of the compiled
# program ran, the program knows from which named scope each of them came, and the two together give the same table as
# preflight's, measured. Where several operations run at a time, on the cores of a CPU or the streams of a GPU, they
# share the time between them, so the table adds up to the time in which the device was busy.


# %% Read a trace tags=["shared"]
def program_components(text):
    """{name of an instruction: (component, direction)} of a compiled program's text. What the compiler made without a
    word of its origin, a copy or a cast, goes with what it reads."""
    program, _ = read_program(text)
    scopes, instructions = {}, [x for body in program.values() for x in body]
    for x in instructions:  # what is called, and what is read, comes first
        called = re.search(r"(?:calls|to_apply)=%([^\s,]+)", x.rest)
        inside = [scopes.get(y.name) for y in reversed(program[called[1]])] if called else []
        name = re.search(r'op_name="([^"]*)"', x.rest)
        found = [name and name[1], *inside, *(scopes.get(operand) for operand in x.operands)]
        scopes[x.name] = next(filter(None, found), "")
    return {
        x.name: component(Op(x.name, x.opcode, scopes[x.name], 1, 0, 0, 0, x.operands, x.rest)) for x in instructions
    }


def traced_steps(run):
    """([(start, end, thread, instruction)], steps) of the train steps in the newest trace of a run folder; nanoseconds.

    InputError if there is none.
    """
    paths = sorted(Path(run).glob("profile/plugins/profile/*/*.xplane.pb"))
    require(paths, "run_dir", str(run), "holds no trace; train with profile_steps above 0")
    events, steps = [], 0
    for plane in jax.profiler.ProfileData.from_file(str(paths[-1])).planes:
        lines = {line.name: list(line.events) for line in plane.lines}
        steps += sum(event.name == "train" for found in lines.values() for event in found)
        if plane.name.startswith("/device:TPU"):  # one line of programs, one of their operations
            whole = [e for e in lines.get("XLA Modules", []) if e.name.startswith("jit_train_step")]
            for e in lines.get("XLA Ops", []):
                if any(module.start_ns <= e.start_ns < module.end_ns for module in whole):
                    name = re.match(r"%?([\w.-]+)", e.name)[1]
                    events.append((e.start_ns, e.end_ns, plane.name, name))
            continue
        runs = collections.defaultdict(list)
        for thread, found in lines.items():
            for e in found:
                facts = {name: value for name, value in e.stats if name in ("hlo_op", "hlo_module", "run_id")}
                if facts.get("hlo_module", "").startswith("jit_train_step"):
                    event = e.start_ns, e.end_ns, f"{plane.name} {thread}", facts["hlo_op"]
                    runs[facts.get("run_id")].append(event)
        for found in runs.values():
            events += found + (unseen_matmuls(found) if plane.name == "/host:CPU" else [])
    return events, steps


def unseen_matmuls(events):
    """A CPU gives a matmul to a pool of threads, and the trace shows only the giving. So what seems idle between the
    events of one run of a program is an event, too: of the matmul that was begun last."""
    found, seen, matmul = [], None, None
    for start, end, _, name in sorted(events):
        if matmul and start > seen:
            found.append((seen, start, "pool", matmul))
        matmul = name if re.match("dot|conv|ynn", name) else matmul
        seen = max(end, seen or end)
    return found


def shared_time(events):
    """{instruction: nanoseconds} of (start, end, thread, instruction): each moment goes to the innermost event of each
    thread, in equal parts."""
    found, open_events, last = collections.Counter(), collections.defaultdict(list), 0
    moments = [(start, 1, i) for i, (start, *_) in enumerate(events)] + [(e[1], 0, i) for i, e in enumerate(events)]
    for now, opens, i in sorted(moments):
        busy = [threads[-1] for threads in open_events.values() if threads]
        for j in busy:
            found[events[j][3]] += (now - last) / len(busy)
        last, stack = now, open_events[events[i][2]]
        stack.append(i) if opens else stack.remove(i)
    return found


def time_by_component(config, run):
    """Prints where the time of the traced steps went. Returns ({(component, direction): seconds a step}, seconds a
    step). The step is lowered once more for its names; what is compiled is in the cache."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of jax's reader, about itself
        events, steps = traced_steps(run)
    require(events and steps, "run_dir", str(run), "holds a trace without train steps")
    state, tokens = abstract_step(config, device_mesh(config))
    names = program_components(train_step.lower(config, state, tokens, tokens).compile().as_text())
    parts = collections.Counter()
    for name, nanoseconds in shared_time(events).items():
        parts[names.get(name, ("other", "forward"))] += nanoseconds / 1e9 / steps
    whole = (max(end for _, end, *_ in events) - min(start for start, *_ in events)) / 1e9 / steps
    busy = sum(parts.values())
    print(f"{steps} traced steps of {1e3 * whole:.1f} ms: busy {1e3 * busy:.1f} ms, idle {1 - busy / whole:.1%}")
    show_parts(parts)
    return parts, whole


# %% Show TensorBoard tags=["shared"]
# The server is a process of its own. To it tensorflow is as if it were not installed, and xprof's folder comes first.
TENSORBOARD = """#!{python}
import sys
sys.path[:0] = {folders}
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

    try:
        folders = [str(install_aside("xprof"))]
    except (InputError, OSError) as error:
        print(f"{error}; TensorBoard will not show the trace")
        folders = []
    binary = cache_dir() / "tensorboard"
    binary.write_text(TENSORBOARD.format(python=sys.executable, folders=folders))
    binary.chmod(0o755)
    os.environ["TENSORBOARD_BINARY"] = str(binary)
    notebook.start(f"--logdir {shlex.quote(str(run))}")


# %% [markdown]
# ## Train
#
# All pieces in their order. What can be wrong with the Config, the shards, the tokenizer or the run folder is found
# before anything is compiled.

# %% Train tags=["shared"]
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


# %% What is said before and after tags=["shared"]
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
# # Run
#
# Everything above only defined things. `Config.for_device()` is the reference model on a TPU or GPU, and the demo on a
# CPU; change what you like with `config.replace(...)`. As a script, every field is an option:
# `python 02_train.py --n_head 4 --num_iterations 200`.

# %% Configure tags=["run"]
with one_line_errors():
    topologies, options = preflight_option([] if IN_NOTEBOOK else sys.argv[1:])
    chips, options = scaling_option(options)
    if not (topologies or chips):
        join_hosts()
    default = Config() if topologies or chips else Config.for_device()
    help_ = "--preflight v6e | v5e | v6e:2x4 | all: ask the TPU's compiler, train nothing; --scaling v6e | v5e: ask it "
    config = parse_args(options, default, f"{help_}about 1, 8 and 64 chips")

# %% [markdown]
# Choose a chip to ask its compiler, on this machine, about the reference model or about any Config of yours.
# As a script: `python 02_train.py --preflight v6e`, with other options as you like.

# %% Ask the compiler tags=["run"]
PREFLIGHT = ""  # @param ["", "v6e", "v5e", "v6e:2x4", "v5e:2x4", "v6e:8x8"]
if PREFLIGHT:
    from IPython.display import Image, display

    report = preflight(Config(), PREFLIGHT)
    if report["fits"]:
        display(Image(str(report["picture"])))
if topologies or chips:
    with one_line_errors():
        fits = all([preflight(config, topology)["fits"] for topology in topologies])
        for chip in chips:
            scaling(config, chip)
    raise SystemExit(not fits)

# %% Train it tags=["run"]
with one_line_errors():
    summary = train(config)
show_summary(summary)
if summary["stopped"] and not IN_NOTEBOOK:
    raise SystemExit(128 + signal.Signals[summary["stopped"]])
if jax.process_count() > 1:
    raise SystemExit  # what follows looks at the model, on one host

# %% [markdown]
# **What to look for.** The loss starts at ln V, falls steeply while the model learns which tokens are frequent, then
# slowly, and once more in the warmdown, when the falling learning rate lets the weights settle. If the end of the
# curve is still falling, more steps would pay.

# %% [markdown]
# ## Is that any good?
#
# A language model is a compressor: its bits per byte are the size to which an arithmetic coder driven by its
# predictions would shrink the text. So there is a yardstick in every Unix box. It is not a fair fight: the model has
# read a training set first and its own weights are not counted, while `xz` and `zstd` begin with nothing. But a model
# that loses it has learned nothing.


# %% Compressors tags=["shared"]
def compressor_bpb(text):
    """Bits per byte of `xz -9e` and `zstd -19 --ultra` on `text`."""
    data = text.encode()
    packed = {
        "xz -9e": lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
        "zstd -19 --ultra": pa.Codec("zstd", compression_level=19).compress(data, asbytes=True),
    }
    return {name: 8 * len(blob) / len(data) for name, blob in packed.items()}


# %% Compare tags=["run"]
shards, fetch_validation = list_shards(config)
documents = (text for _, text in read_documents(fetch_validation()))
sample = "\n\n".join(itertools.islice(documents, 5000))  # the whole embedded shard, a part of FineWeb-Edu's
for name, bpb in {"this model": summary["val_bpb"], **compressor_bpb(sample)}.items():
    print(f"{name:18}{bpb:.3f} bits per byte" if bpb else f"{name:18}was not evaluated yet")

# %% [markdown]
# ## What does it know?
#
# **What to look for.** The curve falls as far to the right as context still helps: where it is flat, a longer context
# would be wasted on this model. In the passage, the beginnings of names and of sentences are red, their ends are pale:
# what follows from what was read costs little.

# %% Loss by position tags=["run"]
if summary["by_position"] is not None:
    plot_positions(summary["by_position"], Path(summary["run_dir"]) / "loss_by_position.png")
    if IN_NOTEBOOK:
        from IPython.display import Image, display

        display(Image(str(Path(summary["run_dir"]) / "loss_by_position.png")))

# %% Surprise tags=["run"]
state, _ = load_checkpoint(list_checkpoints(summary["run_dir"])[-1], config)
tokenizer = find_tokenizer(config, shards[0]())
passage = max((text for _, text in itertools.islice(read_documents(fetch_validation()), 20)), key=len)
costs = surprise(config, state.params, tokenizer, passage)
(Path(summary["run_dir"]) / "surprise.html").write_text('<meta charset="utf-8">\n' + surprise_html(costs))
ordered = sorted(costs, key=lambda pair: pair[1])
for words, found in (("least", ordered[:6]), ("most", ordered[:-7:-1])):
    print(f"{words} surprising:", ", ".join(f"{piece.decode(errors='replace')!r} {bits:.2f}" for piece, bits in found))
if IN_NOTEBOOK:
    from IPython.display import HTML

    display(HTML(surprise_html(costs)))

# %% [markdown]
# ## Ask it
#
# The checkpoint is what a later session would load. Temperature 0 always takes the likeliest token; higher is more
# adventurous.

# %% Samples tags=["run"]
for text in generate(
    config, state.params, tokenizer, SAMPLE_PROMPTS, max_new_tokens=100, temperature=0.8, top_p=0.95, speed=True
):
    print(text, end="\n\n")

# %% [markdown]
# Type the beginning of a text, and read three ways in which it might go on.

# %% Your prompt tags=["run"]
PROMPT = "In the beginning"  # @param {type:"string"}
TEMPERATURE = 0.8  # @param {type:"number"}
LENGTH = 60  # @param {type:"integer"}
for text in generate(
    config, state.params, tokenizer, [PROMPT] * 3, max_new_tokens=LENGTH, temperature=TEMPERATURE, speed=True
):
    print(text, end="\n\n")

# %% [markdown]
# ## Look inside
#
# Where does a step's time go? The run has traced steps 15 to 20, with a name on each component. The next cell reads the
# trace and prints the table; it needs no browser.
#
# **What to look for.** On a TPU, matmuls should dominate: the MLP, then attention and its kernel, then the head. A step
# that is idle for more than a percent or two waits for its host; an `other` of more than a few percent is copies and
# layouts, and deserves a look at the trace itself.

# %% Where the time went tags=["run"]
try:
    time_by_component(config, summary["run_dir"])
except InputError as error:  # it was not traced
    print(error)

# %% [markdown]
# TensorBoard shows the curves, the norms of each part, the samples and the Config; under *Profile* lies the trace. Its
# plugin is the package `xprof`. It needs a newer protobuf than Colab's, so in Colab it is installed beside the runtime.
#
# How to read it: choose *Trace Viewer*, zoom with W and S, move with A and D. In a **good** trace the rows of the
# device are full from edge to edge, one step joins the next without a gap, and on the host the row of `train` steps
# runs ahead of the device: it has handed out work that is not done yet. In a **bad** one the device is empty while the
# host is in `wait for data` (too few threads, or slow storage), or in Python (something reads a result in every step);
# or small copies stand between the matmuls. `evaluation`, `samples` and `saving` have names of their own on the host's
# row.

# %% TensorBoard tags=["run"]
show_tensorboard(summary["run_dir"])

# %% [markdown]
# ## Give the machine back
#
# A Colab runtime costs compute units until it is released, also when nothing runs. Tick the box before *Run all* for a
# long run: when everything above is done, the runtime goes. What is in `backup` stays; what is only on its disk goes.

# %% Release the runtime tags=["run"]
RELEASE = False  # @param {type:"boolean"}
if RELEASE and "google.colab" in sys.modules:
    from google.colab import runtime

    runtime.unassign()
