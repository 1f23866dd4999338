# ---
# jupyter:
#   colab:
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
# # Preflight: ask the TPU's compiler
#
# Does a training step fit a chip? How fast is it, what does the run cost, what do several chips send each other? The
# TPU's compiler is a Python package, [libtpu](https://pypi.org/project/libtpu/), and compiles on any x86-64 Linux
# machine. So this notebook answers on a free CPU runtime, before you rent a TPU. Press *Run all*: two minutes or so.
#
# - **Part I, the essay**: how to read a compiled program, how to estimate its time, how to read a trace.
# - **Part II, the machinery**: get a notebook, compile its step, print and draw. Its cells are collapsed.
# - **Part III, run**: choose a notebook and a chip, and ask. No account, accelerator or data is needed.

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
install("jax", "numpy", "tiktoken", "pyarrow", "matplotlib", "tqdm", "flatbuffers")

# %% Imports cellView="form"
# @title Imports
import argparse
import collections
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
import types
import urllib.request
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.export
import numpy as np

GITHUB = "tpuchat/tpuchat"
IN_NOTEBOOK = "get_ipython" in globals()


class InputError(ValueError):
    """A wrong option, file or Config. The message is one line: what was wrong, the value, what to do."""


# %% [markdown]
# # Part I: the essay
#
# ## Chips
#
# The program says what a chip does. This table has what the program does not say: the clock of the compiler's cycles,
# the memory that a program can use, and published speeds
# ([How to Scale Your Model](https://jax-ml.github.io/scaling-book/tpus/)). A *topology* is one chip, `v6e`, or a slice
# of several, `v6e:2x4`. Colab sells v6e by the hour; its price of a v5e is not known here.


# %% Chips
class Chip(NamedTuple):
    """What a compiled program does not say about its TPU."""

    hbm: float  # bytes that a program can use
    clock: float  # cycles a second, of the compiler's estimates
    flops: float  # published peak in bfloat16, FLOP/s
    bandwidth: float  # of HBM, published, bytes a second
    link: float  # to a neighboring chip, one way, published, bytes a second
    credits: float | None  # Colab's compute units an hour


CHIPS = {
    "v6e": Chip(31.25 * 2**30, 1.75e9, 918e12, 1.6e12, 9e10, 3.71),
    "v5e": Chip(15.75 * 2**30, 1.5e9, 197e12, 0.82e12, 4.5e10, None),
}
DOLLARS_PER_CREDIT = 50 / 600
SLICES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}  # chips: shape


def parse_topology(name):
    """Returns ('v6e', 8) for 'v6e:2x4', and ('v6e', 1) for 'v6e'. Raises InputError for an unknown one."""
    chip, _, shape = name.partition(":")
    if chip not in CHIPS or shape not in ("", *SLICES.values()):
        slices = ", ".join(f"v6e:{size}" for size in SLICES.values())
        raise InputError(f"topology={name!r}: must be one of {', '.join(CHIPS)}, or all, or a slice: {slices}")
    return chip, math.prod(map(int, (shape or "1x1").split("x")))


# %% [markdown]
# ## Read a compiled program
#
# The compiler returns text in [HLO](https://openxla.org/xla/operation_semantics): computations, and in each of them
# instructions in the order in which the chip runs them. `op_name` is the JAX code that an instruction comes from, with
# the model's named scopes. `estimated_cycles` is the compiler's estimate of its time. `S(1)` in a shape marks an array
# in VMEM; other arrays lie in HBM. A loop runs its body several times: for microbatches, or for scanned layers.


# %% Instructions
LINE = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
NO_ESTIMATE = 2**64 - 1
NO_WORK = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "opt-barrier"}


class Instruction(NamedTuple):
    """One instruction of a compiled program."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes
    times: int = 1  # how often it runs in a step
    collective: object = None
    bytes: int = 0  # of operands and results in HBM

    def attribute(self, pattern):
        """Returns the group of a regular expression in the attributes, or ''."""
        return (re.search(pattern, self.rest) or [""] * 2)[1]

    @property
    def operands(self):
        return re.findall(r"%([^\s,)]+)", self.rest.split("), ")[0])

    @property
    def scope(self):
        return self.attribute(r'op_name="([^"]*)"')

    @property
    def cycles(self):
        """The compiler's estimate; 0 where it has none."""
        cycles = int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)
        return cycles if cycles < NO_ESTIMATE else 0


def parse_program(text):
    """Returns {computation: [Instruction]}; the program starts in 'ENTRY'."""
    program = {}
    for line in text.split("\n"):
        if head := re.match(r"(ENTRY)? *%(\S+) \(.*\{$", line):
            body = program[head[1] or head[2]] = []
        elif program and (match := LINE.match(line)):
            body.append(Instruction(*match.groups()))
        elif program and body and line != "}":  # an instruction that carries a kernel has several lines
            body[-1] = body[-1]._replace(rest=body[-1].rest + line)
    return program


def execution_order(text):
    """Returns [Instruction] of a compiled program in the order in which a chip runs them."""
    program = parse_program(text)

    def walk(name, times):
        shapes = {x.name: x.shape for x in program[name]}
        for x in program[name]:
            if x.opcode == "while":  # its trips: a known number, or the constant in its condition
                condition = program[x.attribute(r"condition=%([^\s,]+)")]
                known = x.attribute(r'known_trip_count":\{"n":"(\d+)"')
                trips = [known] if known else [y.attribute(r"^(\d+)\)") or 1 for y in condition]
                yield from walk(x.attribute(r"body=%([^\s,]+)"), times * max(map(int, trips)))
            elif x.opcode == "conditional":  # its longest branch
                names = re.findall(r"%([^\s,]+)", x.attribute(r"branch_computations=\{([^}]*)\}"))
                runs = [list(walk(branch, times)) for branch in names]
                yield from max(runs, key=lambda run: sum(y.times * y.cycles for y in run), default=[])
            elif x.opcode not in NO_WORK:
                size = array_bytes(x.shape) + sum(array_bytes(shapes.get(name, "")) for name in x.operands)
                yield x._replace(times=times, bytes=size, collective=find_collective(program, shapes, x))

    return list(walk("ENTRY", 1))


# %% Components
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}
COMPONENTS = {
    "optimizer": "optimizer", "lm_head": "head and loss", "loss": "head and loss", "attn": "attention", "mlp": "MLP",
    "embed": "embedding",
}  # fmt: skip


def array_bytes(shape, hbm_only=True):
    """Returns the bytes of the arrays in an HLO shape, a tuple or not: of those in HBM, or of all."""
    return sum(
        ITEM_BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape)
        if not (hbm_only and re.search(r"S\([1-9]\)", layout))
    )


def component(x):
    """Returns (component, 'forward' | 'backward') of an Instruction, by its named scopes."""
    names = x.name + x.scope
    direction = "backward" if re.search(r"transpose\(|rematted", x.scope) else "forward"
    if "tpu_custom_call" in x.rest and re.search("splash|attention", names):
        return "attention kernel", "backward" if re.search("dkv|dq|bwd|backward", names) else direction
    scope = re.search(rf"(?:^|[/(])({'|'.join(COMPONENTS)})[/)]", x.scope)
    return COMPONENTS[scope[1]] if scope else "other", direction


# %% [markdown]
# ## Kernels
#
# A [Pallas](https://docs.jax.dev/en/latest/pallas/index.html) kernel has no estimate in the HLO. But the compiler can
# write its *bundles*: a bundle of instructions takes one cycle, if nothing stalls. A kernel loops over a grid. Splash
# attention has a step of the grid for each block of queries and keys, and its longest branch computes the block; the
# branch is skipped where the mask hides the block. A step takes 0.5 µs at least: without that minimum, estimates of
# published steps with blocks of 128 tokens are 51% short, with it 4%.


# %% Kernels
BUNDLE = re.compile(r"^\s*0?x?[0-9a-f]+\s+(?:\w\w)?\s*:\s*((?:>\s*)*)\{(.*)$")
KERNEL = re.compile(r"attention_\w+?_kernel|splash_mha_(?:fwd|dkv|dq)")
LEAST_STEP = 0.5e-6  # seconds of a step of a grid


def read_bundles(path):
    """Returns [(depth, text)] of the bundles in a file of the compiler; depth 1 is the loop over the grid."""
    bundles = []
    for line in path.read_text(errors="replace").split("\n"):
        if match := BUNDLE.match(line):
            bundles.append((match[1].count(">"), match[2]))
        elif bundles:
            bundles[-1] = bundles[-1][0], bundles[-1][1] + line
    return bundles


def branches(bundles):
    """Returns [(first bundle, number of bundles)] of the code in the grid's loop that a branch can jump over."""
    ends, regions = {}, []
    for i, (_, text) in enumerate(bundles):
        for region in re.findall(r"(?:Start/End empty|End|Start) region (\d+)", text):
            ends.setdefault(region, i)
    for i, (depth, text) in enumerate(bundles):
        branch = re.search(r"sbr\.rel \([^)]*\) target (?:= \$region|bundleno = .*?region = )(\d+)", text)
        if branch and depth and ends.get(branch[1], 0) > i + 20:
            regions.append((i + 1, ends[branch[1]] - i))
    return regions


def head_seconds(bundles, chip, steps=1, visible=1, group=1):
    """Returns the seconds of an attention kernel for one query head and sequence; `visible` of its `steps` compute.

    Our kernel has one step. In its branch are branches that only one of a `group` of query heads takes.
    """
    regions, loop = branches(bundles), sum(depth > 0 for depth, _ in bundles)
    start, longest = max(regions, key=lambda region: region[1])
    inner = sum(n for i, n in regions if start < i and i + n < start + longest)
    computes = max((loop - inner * (1 - 1 / group)) / CHIPS[chip].clock, LEAST_STEP)
    skips = max((loop - longest) / CHIPS[chip].clock, LEAST_STEP)
    return visible * computes + (steps - visible) * skips


def grid(T, block, window):
    """Returns (steps, visible blocks) of splash attention's grid: rows of blocks, as wide as the widest visible one."""
    starts = range(0, T, block)
    rows = [sum(k < q + block and q - (k + block - 1) <= window for k in starts) for q in starts]
    return len(rows) * max(rows), sum(rows)


# %% [markdown]
# ## Communication
#
# The program of one chip of a slice is the program of each. Its
# [collectives](https://jax-ml.github.io/scaling-book/sharding/) are the compiler's word: what is gathered, summed or
# scattered, among how many chips, and when. Their time is not. Of $n$ chips in a ring, each receives $\frac{n-1}{n}$ of
# the bytes of a gather, and twice that of a sum. The speed of a link is published. Assumed are: full speed, 1 µs a hop,
# two links a chip (the corner of a slice has no more; a part of a slice is a line, whose end has one), one collective
# at a time, and arithmetic that is no slower beside it. Nothing of this was measured on a slice.


# %% Collectives
COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
HOP = 1e-6  # seconds until the first byte is at the next chip


class Collective(NamedTuple):
    """What the chips of a group send each other."""

    kind: str  # all-gather | reduce-scatter | all-reduce | …
    size: int  # bytes of the unsharded array
    chips: int  # in a group


def group_size(rest):
    """Returns the number of chips in a group of a collective. HLO has three notations for groups."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", named[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d, ]*)\}", rest)
    return len(listed[1].split(",")) if listed else 2  # pairs of a source and a target


def find_collective(program, shapes, x):
    """Returns the Collective that an Instruction runs, starts, or has another core run, or None."""
    kind = x.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        size = sum(array_bytes(shapes.get(operand, ""), hbm_only=False) for operand in x.operands)
        return Collective(kind, size * (group_size(x.rest) if kind == "all-gather" else 1), group_size(x.rest))
    called = x.attribute(r"(?:calls|to_apply)=%([^\s,]+)") * (x.opcode in ("fusion", "call-start", "async-start"))
    body = program.get(called, [])
    inner = next((y for y in body if y.opcode.removesuffix("-start") in COLLECTIVES), None)
    if inner is None or any(y.opcode in ("convolution", "fusion") for y in body):  # arithmetic beside a collective
        return None
    sent = find_collective(program, {y.name: y.shape for y in body}, inner)
    return sent._replace(kind="reduce-scatter") if "all-reduce-scatter" in called else sent


def link_seconds(sent, chip, chips):
    """Returns the seconds of a Collective that has the links of a slice of `chips` for itself."""
    rounds, links = 2 if sent.kind == "all-reduce" else 1, 2 if sent.chips == chips else 1
    share = 1 if sent.kind == "collective-permute" else rounds * (sent.chips - 1) / sent.chips
    return share * sent.size / (links * CHIPS[chip].link) + rounds * (sent.chips // 2) * HOP


# %% Try it: a matmul and a gather tags=["run"]
if IN_NOTEBOOK:
    toy = """
ENTRY %main (x: bf16[512,256], w: bf16[32,128]) -> bf16[512,128] {
  %x = bf16[512,256]{1,0} parameter(0)
  %w = bf16[32,128]{1,0} parameter(1)
  %all = bf16[256,128]{1,0} all-gather(%w), replica_groups=[1,8]<=[8]
  ROOT %y = bf16[512,128]{1,0} fusion(%x, %all), metadata={op_name="jvp(mlp)/dot"}, "estimated_cycles":"900"
}"""
    gather, matmul = execution_order(toy)
    print(f"{matmul.name}: {component(matmul)}, {matmul.cycles / CHIPS['v6e'].clock * 1e6:.2f} µs on a v6e")
    print(f"{gather.name}: {gather.collective}, {link_seconds(gather.collective, 'v6e', 8) * 1e6:.2f} µs on v6e:2x4")

# %% [markdown]
# What arithmetic hides costs nothing. So play the program in order. A collective begins when its input is there and the
# links are free. The chip waits where it needs the result, unless the arithmetic in between took longer.


# %% Exposed communication
class Wait(NamedTuple):
    """A collective, the seconds that it takes, and those in which the chip does nothing else."""

    first: Instruction  # that begins it
    seconds: float
    exposed: float


def waits(instructions, seconds, chip, chips):
    """Returns [Wait] of the collectives among `instructions`, which take `seconds` where they are arithmetic."""
    now, links_free, running, result = 0.0, 0.0, {}, []  # running: {name: (first instruction, when it is done)}
    for x, own in zip(instructions, seconds, strict=True):
        fused = x.opcode == "fusion"
        phase = re.search("(?:^async-collective|-)(start|update|done)|$", x.name if fused else x.opcode)[1]
        before = x.name.replace("done", "start") if fused else "".join(x.operands[:1])
        if x.collective or before in running:
            first, done = running.pop(before, (x, 0.0))
            needs = link_seconds(first.collective, chip, chips)
            if phase != "done" and x.operands:  # its input is there
                links_free = done = max(now, links_free) + needs
            if phase in ("start", "update"):
                running[x.name] = first, done
                continue
            result.append(Wait(first, needs, max(0.0, done - now)))
            now = max(now, done)
        now += own
    return result


# %% [markdown]
# ## Estimate
#
# The time of a step is the compiler's estimate of each instruction, plus the kernels, plus the waits. Copies between
# HBM and VMEM run beside the arithmetic and count nothing. Against ten published steps of a v6e the mean error is 7.0%:
# [the table](https://github.com/tpuchat/tpuchat/blob/main/docs/speed.md). The error with two corrections, for what the
# compiler adds to a matmul and for HBM's bandwidth, was 7.3%, so there are none.


# %% Estimate
class Estimate(NamedTuple):
    """Where the time of a step goes."""

    parts: dict  # {(component, 'forward' | 'backward'): seconds}
    uncounted: list  # names of kernels of which only the bytes count
    waits: list

    @property
    def seconds(self):
        return sum(self.parts.values())

    @property
    def exposed(self):
        """Seconds in which a chip waits for others."""
        return sum(wait.first.times * wait.exposed for wait in self.waits)


def kernel_seconds(x, windows, kernels):
    """Returns the seconds of a kernel, or None. A scope names its layer: layer_03 sees windows[3] tokens."""
    kernel, layer = KERNEL.search(f"{x.name} {x.scope}"), re.search(r"layer_(\d+)", x.scope)
    return kernels.get((kernel[0], windows[int(layer[1])] if layer else max(windows))) if kernel else None


def estimate(text, topology, windows, kernels):
    """Returns the Estimate of a compiled program; kernels: {(kernel, window): seconds a layer}."""
    (chip, chips), instructions = parse_topology(topology), execution_order(text)
    parts, uncounted, seconds = collections.Counter(), [], []
    for x in instructions:
        if "tpu_custom_call" in x.rest:
            own = kernel_seconds(x, windows, kernels)
            uncounted += [x.name] if own is None else []
            own = max(own or 0.0, x.bytes / CHIPS[chip].bandwidth)
        else:
            aside = x.collective or re.search("-(start|done|update)$", x.opcode)
            own = 0.0 if aside else x.cycles / CHIPS[chip].clock
        seconds.append(own)
        parts[component(x)] += x.times * own
    sends = waits(instructions, seconds, chip, chips)
    for wait in sends:  # what is reduced are gradients
        direction = "backward" if "reduce" in wait.first.collective.kind else component(wait.first)[1]
        parts["communication", direction] += wait.first.times * wait.exposed
    return Estimate(+parts, uncounted, sends)


# %% [markdown]
# ## Preflight
#
# `preflight(config, "v6e")` compiles the train step and prints its memory, time, price and components. The peak of the
# memory is the compiler's own: a program that is too large fails here as on the chip. Then a smaller microbatch may
# fit, with the same tokens a step. MFU is [model FLOPs utilization](https://arxiv.org/abs/2204.02311).


# %% Preflight
def compile_and_estimate(config, topology):
    """Returns (Compiled, Estimate) of the step of a Config. Raises CompileError."""
    config = on_topology(config, topology)
    compiled, kernels = compile_step(config, topology), attention_kernels(config, topology.partition(":")[0])
    return compiled, estimate(compiled.text, topology, config.windows, kernels)


def preflight(config, topology="v6e"):
    """Compiles the train step for a chip ('v6e') or a slice ('v6e:2x4') and prints whether it fits, its time and price.

    Returns {'fits': True, 'peak': bytes a chip, 'seconds', 'tokens_per_second', 'mfu', 'parts', 'exposed', 'uncounted',
    'picture': path} or {'fits': False, 'reason', 'device_batch_size': one that fits, or None}. Raises
    InputError if this machine cannot compile for a TPU, or if config.mesh does not suit the topology.
    """
    config, started = on_topology(config, topology), time.perf_counter()
    size = f"{subject(config).count_params(config)['total'] / 1e6:,.1f}M parameters"
    mesh = f" on each chip of a mesh {config.mesh_shape[0]} × {config.mesh_shape[1]}" if config.devices > 1 else ""
    print(f"preflight on {topology}: {size}, {config.device_batch_size} × {config.seq_len} tokens × "
          f"{config.grad_accum_steps} a step{mesh}", flush=True)  # fmt: skip
    try:
        compiled, answer = compile_and_estimate(config, topology)
    except CompileError as error:
        reason, needed = explain(error)
        print(f"does not compile: {reason}")
        batch = smaller_batch(config, topology, needed) if "HBM" in reason else None
        return {"fits": False, "reason": reason, "device_batch_size": batch}
    print(f"fits    compiled in {time.perf_counter() - started:.0f} s")
    describe_memory(config, topology, compiled)
    rate, mfu = describe_time(config, topology, answer)
    describe_waits(topology, answer)
    describe_parts(answer)
    title = f"{topology}: {answer.seconds * 1e3:.1f} ms a step, {rate:,.0f} tok/s, MFU {mfu:.1%}, estimate"
    path = Path(config.run_dir).parent / f"preflight-{topology.replace(':', '-')}.png"
    return {
        "fits": True, "peak": compiled.peak, "seconds": answer.seconds, "tokens_per_second": rate, "mfu": mfu,
        "parts": answer.parts, "exposed": answer.exposed, "uncounted": answer.uncounted,
        "picture": plot_parts(answer.parts, title, path),
    }  # fmt: skip


def smaller_batch(config, topology, needed):
    """Returns a smaller device_batch_size that fits, with the same tokens a step, or None. Compiles to find out.

    needed: bytes of HBM that config would take, or None. The search goes down from the batch that they suggest.
    """
    rows = config.tokens_per_step // config.seq_len // config.devices  # of a chip
    guess = config.device_batch_size * (CHIPS[topology.partition(":")[0]].hbm / needed if needed else 0.5)
    for batch in (b for b in range(int(guess), 0, -1) if rows % b == 0):
        try:
            compile_step(config.replace(device_batch_size=batch, total_batch_size=config.tokens_per_step), topology)
        except CompileError as error:
            print(f"        device_batch_size={batch}: {explain(error)[0]}", flush=True)
        else:
            total = config.tokens_per_step
            print(f"what fits: --device_batch_size {batch} --total_batch_size {total}, in {rows // batch} passes")
            return batch


# %% [markdown]
# ## Scaling
#
# More chips do more tokens a second, but not in proportion. *Weak scaling* keeps the tokens of each chip, *strong
# scaling* the tokens of a step. *Efficiency* is the tokens a second of each chip, over those of one chip alone. It can
# exceed 100%: the state is sharded over all chips ([ZeRO](https://arxiv.org/abs/1910.02054)), and AdamW's work with it.


# %% Scaling
def scaled(config, chips, total=None):
    """Returns config on so many chips: with the same tokens a chip, or with `total` a step in as few passes as fit."""
    rows = config.device_batch_size
    if total:
        each = total // config.seq_len // chips
        rows = max(n for n in range(1, min(rows, each) + 1) if each % n == 0)
    return config.replace(mesh=(1, chips), device_batch_size=rows, total_batch_size=total or -1)


def scaling(config, chip="v6e", counts=(1, 8, 64)):
    """Compiles the step for several numbers of chips, prints a table of weak and strong scaling, and draws it.

    Strong scaling has one sequence for each chip of the largest slice. Returns {'a chip' | 'a step': [{'chips',
    'tokens', 'ms', 'tok/s', …}]}. Raises CompileError if one does not fit.
    """
    tables = {"a chip": [], "a step": []}
    for constant, total in (("a chip", None), ("a step", max(counts) * config.seq_len)):
        print(f"{chip}, estimates, tokens {constant} constant", flush=True)
        for chips in counts:
            now = scaled(config, chips, total)
            compiled, answer = compile_and_estimate(now, f"{chip}:{SLICES[chips]}")
            rate = now.tokens_per_step / answer.seconds
            alone = tables[constant][0]["tok/s"] / counts[0] if tables[constant] else rate / chips
            row = {"chips": chips, "tokens": now.tokens_per_step, "passes": now.grad_accum_steps,
                   "ms": 1e3 * answer.seconds, "tok/s": rate, "efficiency %": 100 * rate / chips / alone,
                   "exposed %": 100 * answer.exposed / answer.seconds, "GiB a chip": compiled.peak / 2**30}  # fmt: skip
            if not tables[constant]:
                print("".join(f"{name:>14}" for name in row))
            print("".join(f"{v:14,}" if isinstance(v, int) else f"{v:14,.2f}" for v in row.values()), flush=True)
            tables[constant].append(row)
    plot_scaling(tables, chip, Path(config.run_dir).parent / f"scaling-{chip}.png")
    return tables


# %% [markdown]
# ## Read a trace
#
# A trace says what a step did. [XProf](https://openxla.org/xprof) notes when each instruction ran, and stores the
# compiled program beside it, with its named scopes. Together they give the same table of components, measured. The file
# is a [protocol buffer](https://protobuf.dev/programming-guides/encoding/), so it can be read on any machine.


# %% The program in a trace
def varint(data, i):
    """Returns (integer, index after it): seven bits a byte, the lowest first."""
    value = shift = 0
    while data[i] & 128:
        value, shift, i = value | (data[i] & 127) << shift, shift + 7, i + 1
    return value | data[i] << shift, i + 1


def message(data):
    """Returns {field: [values]} of a protocol buffer: integers, or bytes of strings and of messages."""
    fields, i = collections.defaultdict(list), 0
    while i < len(data):
        key, i = varint(data, i)
        if key & 7 == 0:
            value, i = varint(data, i)
        else:
            size, i = varint(data, i) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], i)
            value, i = data[i : i + size], i + size
        fields[key >> 3].append(value)
    return fields


def traced_program(data):
    """Returns the HloModuleProto, a message, of the train step in an XSpace. Fields are numbered in xplane.proto."""
    for plane in map(message, message(data)[1]):
        for entry in plane[4] if plane[2] == [b"/host:metadata"] else ():
            event = message(message(entry)[2][0])
            for proto in (proto for stat in map(message, event[5]) for proto in stat[6]):
                if event[2][0].startswith(b"jit_train_step"):
                    return message(message(proto)[1][0])
    return message(b"")


def traced_components(data):
    """Returns {instruction: (component, direction)} of an XSpace's train step. Fields are numbered in hlo.proto."""
    components = {}
    for x in (message(x) for computation in traced_program(data)[3] for x in message(computation)[2]):
        scope = b"".join(message(b"".join(x[7]))[2]).decode()
        target = b"".join(x[28]).decode()  # of a custom call
        name, opcode = x[1][0].decode(), x[2][0].decode()
        components[name] = component(Instruction(name, "", opcode, f'{target} op_name="{scope}"'))
    return components


# %% [markdown]
# A TPU has a line of programs and a line of their instructions. A CPU or a GPU has a line for each thread or stream,
# and instructions that run at the same time share the time. A CPU gives a matmul to a pool of threads, and the trace
# shows only the call. So the gap after the call belongs to the matmul.


# %% Events of a trace
def tpu_events(plane, lines):
    """Returns [(start, end, thread, instruction)] of the train steps in [(line, its events)] of a TPU; nanoseconds."""
    modules, ops = (dict(lines).get(name, []) for name in ("XLA Modules", "XLA Ops"))
    steps = [e for e in modules if e.name.startswith("jit_train_step")]
    ops = [e for e in ops if any(step.start_ns <= e.start_ns < step.end_ns for step in steps)]
    return [(e.start_ns, e.end_ns, plane, re.match(r"%?([\w.-]+)", e.name)[1]) for e in ops]


def thread_events(plane, lines):
    """Returns the same of a CPU or a GPU."""
    runs = collections.defaultdict(list)
    for i, (_, line) in enumerate(lines):
        for e in line:
            facts = {name: value for name, value in e.stats if name in ("hlo_op", "hlo_module", "run_id")}
            if facts.get("hlo_module", "").startswith("jit_train_step"):
                runs[facts.get("run_id")].append((e.start_ns, e.end_ns, f"{plane} {i}", facts["hlo_op"]))
    return [e for run in runs.values() for e in run + (pool_events(run) if plane == "/host:CPU" else [])]


def pool_events(events):
    """Returns events for the gaps in one run of a program on a CPU, by the last matmul before each."""
    gaps, latest, matmul = [], None, None
    for start, end, _, name in sorted(events):
        if matmul and start > latest:
            gaps.append((latest, start, "pool", matmul))
        matmul = name if re.match("dot|conv|ynn", name) else matmul
        latest = max(end, latest or end)
    return gaps


def shared_time(events):
    """Returns {instruction: nanoseconds}: each moment goes to the innermost event of each thread, in equal parts."""
    times, threads, last = collections.Counter(), collections.defaultdict(list), 0
    moments = [(e[0], 1, i) for i, e in enumerate(events)] + [(e[1], 0, i) for i, e in enumerate(events)]
    for now, opens, i in sorted(moments):
        busy = [stack[-1] for stack in threads.values() if stack]
        for j in busy:
            times[events[j][3]] += (now - last) / len(busy)
        stack, last = threads[events[i][2]], now
        if opens:
            stack.append(i)
        else:
            stack.remove(i)
    return times


# %% Trace
def read_trace(run_dir):
    """Returns ({(component, direction): seconds a step}, seconds a step, steps) of the newest trace in a run folder."""
    paths, events, steps = sorted(Path(run_dir).glob("profile/plugins/profile/*/*.xplane.pb")), [], 0
    if not paths:
        raise InputError(f"trace={str(run_dir)!r}: holds no trace; train with profile_steps above 0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # jax's reader warns about itself
        for plane in jax.profiler.ProfileData.from_file(str(paths[-1])).planes:
            lines = [(line.name, list(line.events)) for line in plane.lines]  # two threads may have the same name
            steps += sum(event.name == "train" for _, line in lines for event in line)
            events += (tpu_events if plane.name.startswith("/device:TPU") else thread_events)(plane.name, lines)
    if not (events and steps):
        raise InputError(f"trace={str(run_dir)!r}: holds a trace without train steps")
    components, parts = traced_components(paths[-1].read_bytes()), collections.Counter()
    for name, nanoseconds in shared_time(events).items():
        parts[components.get(name, ("other", "forward"))] += nanoseconds / 1e9 / steps
    return parts, (max(e[1] for e in events) - min(e[0] for e in events)) / 1e9 / steps, steps


def describe_trace(run_dir, estimates):
    """Prints where the time of the traced steps went, beside {topology: parts} of estimates."""
    parts, seconds, steps = read_trace(run_dir)
    busy = sum(parts.values())
    print(f"trace   {steps} steps of {1e3 * seconds:.1f} ms, of which train_step runs {1e3 * busy:.1f} ms")
    show_parts({**{f"{name}, estimate": table for name, table in estimates.items()}, "measured": parts})


# %% [markdown]
# # Part II: machinery
#
# The subject of this notebook is another notebook: its cells that are not tagged `run` become a module. Its train step
# goes as [StableHLO](https://docs.jax.dev/en/latest/export/export.html) to a process of its own that compiles it.


# %% The subject cellView="form"
# @title The subject
def load_notebook(name):
    """Returns a notebook, in this folder, beside this file or on GitHub, as a module of its cells not tagged `run`.

    Raises InputError if there is none, or if it has no train_step.
    """
    here = [path for path in (Path(name), Path(globals().get("__file__", "")).parent / name) if path.is_file()]
    url = here[0].resolve().as_uri() if here else f"https://raw.githubusercontent.com/{GITHUB}/main/{name}"
    try:
        text = urllib.request.urlopen(url, timeout=30).read().decode()
    except (OSError, ValueError) as error:
        raise InputError(f"notebook={name!r}: there is no such file here, and none at {url} ({error})") from error
    code = ""
    for cell in re.split(r"^(?=# %%)", text, flags=re.M):
        run = re.match(r'# %%.*(\[markdown\]|tags=\[[^\]]*"run")', cell)
        code += "\n" * cell.count("\n") if run else cell  # line numbers stay
    module = types.ModuleType("subject_" + re.sub(r"\W", "_", Path(name).stem))
    sys.modules[module.__name__] = module  # before the code runs: dataclasses look their module up
    exec(compile(code, str(here[0]) if here else url, "exec", dont_inherit=True), module.__dict__)
    if not hasattr(module, "train_step"):
        raise InputError(f"notebook={name!r}: has no train_step; 02_train.py has one")
    return module


def subject(config):
    """Returns the module that a Config belongs to."""
    return sys.modules[type(config).__module__]


def on_topology(config, topology):
    """Returns config on the chips of a topology, with a TPU's attention; mesh='auto' becomes (all chips, 1)."""
    chips = parse_topology(topology)[1]
    config = config.replace(mesh=(chips, 1)) if config.mesh == "auto" else config
    if config.devices != chips:
        raise InputError(f"mesh={config.mesh}: data · fsdp must be the {chips} chips of {topology}")
    return config.replace(attn_impl=subject(config).choose_attention(config, "tpu"))


# %% The process of the compiler cellView="form"
# @title The process of the compiler
# libtpu may crash, and jax's profiler may crash in a process that has loaded libtpu without a TPU.
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
mesh = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
mesh = jax.sharding.Mesh(mesh, ("data", "fsdp"))
replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
shardings = [sharding or replicated for sharding in step.in_shardings_jax(mesh)]
args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(step.in_avals, shardings)]
results = [*shardings[:donated], *[replicated] * (len(step.out_avals) - donated)] if donated else None
try:
    compiled = jax.jit(step.call, donate_argnums=range(donated), out_shardings=results).lower(*args).compile()
except jax.errors.JaxRuntimeError as error:
    (folder / "error").write_text(str(error))
else:
    memory = compiled.memory_analysis()
    (folder / "memory").write_text(json.dumps([memory.peak_memory_in_bytes, memory.argument_size_in_bytes]))
    try:
        (folder / "program").write_text(compiled.as_text())
    except jax.errors.JaxRuntimeError:  # jax 0.10 has failed on what libtpu 0.0.52 compiles
        (folder / "error").write_text(f"jax {jax.__version__} and this libtpu do not match: pip install 'jax[tpu]'")
"""
COMPILER_ENVIRONMENT = {  # libtpu asks no server which TPU this is, and other processes may use the compiler, too
    "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
}  # fmt: skip
# The SparseCores of a v6e run its collectives beside the arithmetic. cloud/host.sh sets the same flags on real hosts;
# LOG.md has what each is worth. The libtpu of jax 0.7.2 does not know the last one, and ends the process.
COLLECTIVE_FLAGS = " ".join(
    f"--xla_tpu_{name}=true"
    for name in (
        "enable_sparse_core_collective_offload_all_gather", "enable_sparse_core_collective_offload_reduce_scatter",
        "enable_sparse_core_collective_offload_all_reduce", "prefer_async_allgather_to_allreduce",
        *["enable_sparse_core_collective_offload_nd_reduce_scatter"] * (jax.__version_info__ >= (0, 10)),
    )
)  # fmt: skip


def own_libtpu():
    """Returns the path of the libtpu that this jax asks for, installed in ~/.cache/tpuchat, beside the runtime.

    Raises InputError if pip fails.
    """
    needed = [name for name in importlib.metadata.requires("jax") or () if name.startswith("libtpu")]
    if not needed:
        raise InputError("this jax does not name its libtpu; set TPU_LIBRARY_PATH to a libtpu.so")
    package = needed[0].partition(";")[0].strip()
    folder = Path.home() / ".cache" / "tpuchat" / re.sub(r"[^\w.]+", "-", package).strip(".-")
    if folder.exists():
        return folder / "libtpu" / "libtpu.so"
    print(f"installing {package} into {folder}, beside the runtime", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as partial:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{partial}/new"]
        done = subprocess.run([*command, package], env=os.environ | {"PIP_USER": "0"}, capture_output=True, text=True)
        if done.returncode:
            words = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise InputError(f"cannot install {package} ({words}); check the network: pip download {package!r}")
        os.replace(f"{partial}/new", folder)
    return folder / "libtpu" / "libtpu.so"


def run_compiler(folder, arguments, flags=""):
    """Runs COMPILER with the installed libtpu and, if that one compiles nothing, with own_libtpu.

    Colab's TPU runtime has libtpu 0.0.21.1, which crashes unless its chip is there. Returns the finished process.
    """
    flags = f"{flags} {os.environ.get('LIBTPU_INIT_ARGS', '')}".strip()  # yours come last, and win
    environment = os.environ | COMPILER_ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags}
    command = [sys.executable, "-c", COMPILER, folder, *arguments]
    if importlib.util.find_spec("libtpu") or "TPU_LIBRARY_PATH" in environment:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if (folder / "works").exists():
            return done
        words = (done.stderr.strip().splitlines() or ["no word"])[-1][:100]
        print(f"the installed libtpu compiles nothing here (exit status {done.returncode}: {words})", flush=True)
    environment["TPU_LIBRARY_PATH"] = os.environ["TPU_LIBRARY_PATH"] = str(own_libtpu())  # for later programs, too
    return subprocess.run(command, env=environment, capture_output=True, text=True)


# %% Compile cellView="form"
# @title Compile
class Compiled(NamedTuple):
    """The program of each chip, and bytes of its HBM."""

    text: str
    peak: int
    arguments: int


class CompileError(RuntimeError):
    """The TPU's compiler refuses a program; its own words."""


def compile_for(topology, step, args, donated=0, mesh=(1, 1), bundles=None):
    """Returns step(*args), Compiled for the chips of a topology in a mesh (data, fsdp).

    args: shapes, whose shardings name the axes of the mesh. The first `donated` give their bytes and shardings to the
    first results. bundles: a folder for the bundles of all kernels, which takes twice the time. Raises CompileError, or
    InputError if this machine cannot compile for a TPU.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        here = f"{platform.system()} on {platform.machine()}"
        raise InputError(f"the TPU's compiler runs on Linux on x86_64, not on {here}; training works here")
    chip, _, shape = topology.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "step").write_bytes(jax.export.export(jax.jit(step), platforms=["tpu"])(*args).serialize())
        flags = COLLECTIVE_FLAGS if math.prod(mesh) > 1 else ""
        flags += f" --xla_jf_dump_to={bundles} --xla_jf_dump_llo_pass_label_regex=final_bundles" if bundles else ""
        done = run_compiler(folder, [f"{chip}:{shape or '1x1'}", str(donated), json.dumps(mesh)], flags)
        if (folder / "error").exists():
            raise CompileError((folder / "error").read_text())
        if done.returncode:
            fatal = re.search(r"^F\d{4} .*?\] (.*)", done.stderr, re.M)
            words = fatal[1] if fatal else (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise CompileError(f"the compiler itself crashed (another device_batch_size may do): {words}")
        return Compiled((folder / "program").read_text(), *json.loads((folder / "memory").read_text()))


def compile_step(config, topology):
    """Returns the train step of a Config on a topology, Compiled, its state donated. Raises CompileError."""
    nb = subject(config)

    def place(x, *spec):
        sharding = nb.sharding(config, *spec) if config.devices > 1 else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = jax.tree.map(lambda x: place(x, *nb.weight_spec(config, x.shape)), nb.state_shapes(config))
    tokens = place(jax.ShapeDtypeStruct(config.batch_shape, np.int32), None, nb.ROWS)
    leaves, tree = jax.tree.flatten((state, tokens, tokens))

    def step(*leaves):
        return jax.tree.leaves(nb.train_step(config, *jax.tree.unflatten(tree, leaves)))

    return compile_for(topology, step, leaves, len(leaves) - 2, config.mesh_shape)


def attention_kernels(config, chip):
    """Returns {(kernel, window): seconds a layer} of fused or splash attention: its kernels, compiled alone, for one
    chip. Empty for an attention of other kernels, or of none."""
    nb, T, H, N, K, seconds = subject(config), config.seq_len, config.head_dim, config.n_head, config.kv_heads, {}
    alone = config.replace(mesh=(1, 1), device_batch_size=1, total_batch_size=-1)
    shapes = [jax.ShapeDtypeStruct((2 * T, n * H), config.compute_dtype) for n in (N, K, K, N)]
    for window in set(config.windows) if config.attn_impl in ("fused", "splash") else ():

        def step(q, k, v, g, window=window):
            y, pullback = jax.vjp(lambda *qkv: nb.attend(alone, *qkv, T, window), q, k, v)
            return y, *pullback(g)

        splash = config.attn_impl == "splash"
        blocks = grid(T, min(T, config.splash_block_size), window) if splash else (1, 1, N // K)
        with tempfile.TemporaryDirectory() as folder:
            compile_for(chip, step, shapes, bundles=folder)
            for path in Path(folder).glob("*[0-9]-final_bundles.txt"):
                if name := KERNEL.search(path.name):
                    one = head_seconds(read_bundles(path), chip, *blocks)
                    seconds[name[0], window] = config.device_batch_size * N * one
    return seconds


def explain(error):
    """Returns (why a program does not compile, in a sentence, and the bytes of HBM that it would take, or None)."""
    text, unit = str(error), {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    for pattern in (
        r"memory required\D*?\(([\d.]+)(\w?)\) exceeds available HBM \(([\d.]+)(\w?)\)",
        r"Used ([\d.]+)(\w?) of ([\d.]+)(\w?) hbm",  # libtpu 0.0.23, as the next, which is about one buffer alone
        r"Allocation \(size=(\d+)()\) would exceed memory \(size=(\d+)()\)",
    ):
        if hbm := re.search(pattern, text):
            needed, limit = float(hbm[1]) * unit[hbm[2]], float(hbm[3]) * unit[hbm[4]]
            short = f"out of HBM by {(needed - limit) / 2**30:.2f} GiB"
            return f"{short}: needs {needed / 2**30:.2f} of {limit / 2**30:.2f} GiB", needed
    if vmem := re.search(r"vmem.*?%(\S+) = .*?size ([\d.]+\w) and limit ([\d.]+\w)", text, re.S):
        return f"over VMEM in the kernel {vmem[1]}: {vmem[2]} of {vmem[3]}; try a smaller splash_block_size", None
    return " ".join(line for line in text.splitlines() if line.strip())[:300], None


# %% Report cellView="form"
# @title Report
def describe_memory(config, topology, compiled):
    """Prints the peak of a step on each chip, and what it consists of."""
    weights = 4 * subject(config).count_params(config)["total"] // config.mesh_shape[1]
    parts = {"weights": weights, "moments": 2 * weights, "the rest of the arguments": compiled.arguments - 3 * weights}
    parts |= {"accumulated gradients": weights} if config.grad_accum_steps > 1 else {}
    parts["activations, gradients, bfloat16 weights"] = compiled.peak - sum(parts.values())
    split = ", ".join(f"{size / 2**30:.2f} {name}" for name, size in parts.items() if size > 2**30 / 200)
    hbm, each = CHIPS[topology.partition(":")[0]].hbm, "on each chip " if config.devices > 1 else ""
    print(f"memory  {compiled.peak / 2**30:.2f} GiB of {hbm / 2**30:.2f} {each}at its peak: {split}")


def describe_time(config, topology, answer):
    """Prints what the time of a step means for the run. Returns tokens a second of all chips, and MFU."""
    chip, steps, tokens = CHIPS[topology.partition(":")[0]], config.total_steps, config.tokens_per_step
    rate, run = tokens / answer.seconds, datetime.timedelta(seconds=round(steps * answer.seconds))
    mfu = subject(config).flops_per_token(config) * rate / chip.flops / config.devices
    each = f", {rate / config.devices:,.0f} a chip" if config.devices > 1 else ""
    print(f"time    {answer.seconds * 1e3:.1f} ms a step of {tokens:,} tokens: {rate:,.0f} tok/s{each}, MFU {mfu:.1%}")
    print(f"        (6 FLOPs a matmul weight, 12·N·H a visible key; of {chip.flops / 1e12:.0f} TFLOP/s)")
    credits = (chip.credits or 0) * run.total_seconds() / 3600
    price = f", {credits:,.1f} credits, ${credits * DOLLARS_PER_CREDIT:,.2f}" if credits and config.devices == 1 else ""
    print(f"run     {steps:,} steps, {steps * tokens / 1e9:,.2f}B tokens: {run}{price}; evaluations, samples and "
          "compilation not included")  # fmt: skip
    return rate, mfu


def describe_waits(topology, answer):
    """Prints how long the chips of a slice send each other data, and the collectives that they wait for longest."""
    if not answer.waits:
        return
    groups = collections.defaultdict(list)
    for wait in answer.waits:
        groups[wait.first.collective].append(wait)
    sent = sum(wait.first.times * wait.seconds for wait in answer.waits)
    print(f"send    {1e3 * sent:.2f} ms a step, of which {1e3 * answer.exposed:.2f} are not beside arithmetic: "
          f"{answer.exposed / answer.seconds:.1%} of the step; links of "
          f"{CHIPS[topology.partition(':')[0]].link / 1e9:.0f} GB/s one way")  # fmt: skip
    exposed = {c: 1e3 * sum(wait.first.times * wait.exposed for wait in same) for c, same in groups.items()}
    for c in sorted(groups, key=exposed.get, reverse=True)[:4]:
        print(f"{exposed[c]:12.2f} ms exposed: {sum(wait.first.times for wait in groups[c])} × {c.kind} of "
              f"{c.size / 1e6:,.1f} MB over {c.chips} chips, {1e3 * groups[c][0].seconds:.2f} ms each")  # fmt: skip


def show_parts(tables):
    """Prints {label: {(component, direction): seconds}} side by side, in the order of the last one."""
    last = list(tables.values())[-1]
    names = dict.fromkeys(name for table in tables.values() for name, _ in table)
    if len(tables) > 1:
        print(" " * 24 + "".join(f" {label:>27}" for label in tables))
    print(f"{'ms':>24}" + f" {'forward':>9} {'backward':>9} {'share':>7}" * len(tables))
    for name in sorted(names, key=lambda name: -sum(last.get((name, d), 0) for d in ("forward", "backward"))):
        line = f"{name:>24}"
        for table in tables.values():
            forward, backward = (table.get((name, direction), 0) for direction in ("forward", "backward"))
            line += f" {1e3 * forward:9.2f} {1e3 * backward:9.2f} {(forward + backward) / sum(table.values()):7.1%}"
        print(line)


def describe_parts(answer):
    """Prints the time of each component, and what the table leaves out."""
    show_parts({"estimate": answer.parts})
    print("AdamW runs inside the matmuls of the gradients where the compiler fuses it: there it counts as theirs")
    print("kernels are counted from their bundles; copies that run beside arithmetic are not counted")
    if names := sorted(answer.uncounted):
        print(f"NOT counted but for their bytes: the kernels {', '.join(names[:4])}, {len(names)} in all")


def compare(reports):
    """Prints a line for each of {topology: what preflight returned}."""
    print(f"{'':>12}{'ms a step':>12}{'tok/s':>14}{'MFU':>8}{'GiB a chip':>12}")
    for topology, report in reports.items():
        if report["fits"]:
            ms, rate, gib = 1e3 * report["seconds"], report["tokens_per_second"], report["peak"] / 2**30
            print(f"{topology:>12}{ms:12.1f}{rate:14,.0f}{report['mfu']:8.1%}{gib:12.2f}")
        else:
            print(f"{topology:>12}  {report['reason']}")


# %% Pictures cellView="form"
# @title Pictures
def save(figure, path):
    """Saves a figure, prints its path and returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"picture {path}", flush=True)
    return path


def plot_parts(parts, title, path):
    """Draws milliseconds of each component, forward and backward, as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes, left, names = figure.subplots(), 0, list(dict.fromkeys(name for name, _ in parts))
    for direction in ("forward", "backward"):
        width = np.array([1e3 * parts.get((name, direction), 0) for name in names])
        axes.barh(names, width, left=left, label=direction)
        left = left + width
    axes.set_xlabel("ms a step, estimate")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    return save(figure, path)


def plot_scaling(tables, chip, path):
    """Draws tokens a second against chips, with the straight line of perfect scaling."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    for panel, (constant, rows) in zip(figure.subplots(1, len(tables), sharey=True), tables.items(), strict=True):
        chips, rates = ([row[name] for row in rows] for name in ("chips", "tok/s"))
        panel.plot(chips, [rates[0] / chips[0] * n for n in chips], "--", color="0.6", label="perfect")
        panel.plot(chips, rates, "o-", label="estimate")
        for row in rows[1:]:
            panel.annotate(f"{row['efficiency %']:.0f}%", (row["chips"], row["tok/s"]), fontsize=8)
        panel.set(xscale="log", yscale="log", xlabel=f"{chip} chips", ylabel="tokens a second")
        panel.set_xticks(chips, chips)
        panel.set_title(f"{rows[0]['tokens']:,} tokens {constant}", fontsize=10)
        panel.legend(fontsize=8)
    return save(figure, path)


# %% Command line cellView="form"
# @title Command line
def parse_command(argv):
    """Returns (notebook, [topologies], options, the options of the Config). Raises InputError."""
    parser = argparse.ArgumentParser(
        usage="05_preflight.py [NOTEBOOK] [TOPOLOGY ...] [options] [--FIELD VALUE ...]",
        description="Asks the TPU's compiler about the train step of NOTEBOOK (default: 02_train.py) on each TOPOLOGY: "
        f"{', '.join(CHIPS)}, all of them, or a slice such as v6e:2x4. --FIELD VALUE changes the notebook's Config.",
        epilog="Exit status: 0 if every step fits, 1 if one does not, 2 for a wrong option.",
        add_help=False, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--scaling", metavar="CHIP", choices=CHIPS, help="compile for 1, 8 and 64 chips, and draw it")
    parser.add_argument("--trace", metavar="RUN_DIR", help="print where the time of a traced run went")
    parser.add_argument("--preset", metavar="NAME", help="begin with a named Config of the notebook, if it has some")
    parser.add_argument("--help", action="store_true", help="print this, and the fields of the notebook's Config")

    def refuse(message):
        raise InputError(f"{message} (--help lists the options)")

    parser.error = refuse
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    options, fields = parser.parse_known_args(argv[len(words) :])
    if options.help:
        parser.print_help()
    notebook = words.pop(0) if words and words[0].endswith(".py") else "02_train.py"
    topologies = words or ["v6e"] * (not (options.scaling or options.trace))
    return notebook, expand(topologies), options, ["--help"] if options.help else fields


def expand(words):
    """Returns [topology] of words, of which 'all' means each chip. Raises InputError for an unknown one."""
    topologies = [name for word in words for name in (CHIPS if word == "all" else [word])]
    for name in topologies:
        parse_topology(name)
    return topologies


def first_config(nb, options):
    """Returns the Config of a traced run, or a named one, or the notebook's default. Raises InputError."""
    config, presets = nb.Config(), getattr(nb, "PRESETS", ())
    if options.preset:
        if options.preset not in presets:
            raise InputError(f"preset={options.preset!r}: must be one of {', '.join(presets) or 'none'}")
        config = getattr(nb.Config, options.preset)()
    if options.trace and (path := Path(options.trace, "config.json")).is_file():
        config = config.replace(**json.loads(path.read_text()))
    return config


def main(argv):
    """Does what the command line asks. Returns the exit status; a wrong option is one line on stderr, and 2."""
    try:
        notebook, topologies, options, fields = parse_command(argv)
        nb = load_notebook(notebook)
        config = nb.parse_args(fields, first_config(nb, options))
        reports = {name: preflight(config, name) for name in topologies}
        if len(reports) > 1:
            compare(reports)
        if options.scaling:
            scaling(config, options.scaling)
        if options.trace:
            describe_trace(options.trace, {name: report["parts"] for name, report in reports.items() if report["fits"]})
        return 0 if all(report["fits"] for report in reports.values()) else 1
    except CompileError as error:  # of scaling
        print(f"does not compile: {explain(error)[0]}")
        return 1
    except ValueError as error:
        if type(error).__name__ != "InputError":  # this notebook's or the subject's: each has a class of its own
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


# %% [markdown]
# # Part III: run
#
# As a script: `python 05_preflight.py 02_train.py v6e:2x4 --mesh 1x8`, with any option of the notebook's Config;
# `--help` lists all. In the forms below, OPTIONS are the same as in a terminal, and TOPOLOGIES are one or several of
# `v6e`, `v5e` and slices such as `v6e:2x4`. SCALING compiles six programs: that takes several minutes. TRACE is a run
# folder, which may come from another machine.

# %% As a script tags=["run"]
jax.config.update("jax_platforms", "cpu")  # a TPU that is here stays free: the compiler needs none
if not IN_NOTEBOOK:
    raise SystemExit(main(sys.argv[1:]))

# %% Configure tags=["run"]
NOTEBOOK = "02_train.py"  # @param ["02_train.py", "04_maxtext.py", "06_recipe.py"] {allow-input: true}
OPTIONS = ""  # @param {type: "string"}
nb = load_notebook(NOTEBOOK)
config = nb.parse_args(shlex.split(OPTIONS), nb.Config())

# %% Ask the compiler tags=["run"]
from IPython.display import Image, display

TOPOLOGIES = "v6e"  # @param {type: "string"}
reports = {name: preflight(config, name) for name in expand(TOPOLOGIES.split())}
compare(reports)
for report in reports.values():
    if report["fits"]:
        display(Image(str(report["picture"])))

# %% Several chips tags=["run"]
SCALING = ""  # @param ["", "v6e", "v5e"]
if SCALING:
    scaling(config, SCALING)
    display(Image(str(Path(config.run_dir).parent / f"scaling-{SCALING}.png")))

# %% What a run did tags=["run"]
TRACE = ""  # @param {type: "string"}
if TRACE:
    describe_trace(TRACE, {name: report["parts"] for name, report in reports.items() if report["fits"]})
