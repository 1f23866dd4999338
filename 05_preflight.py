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
# Part I says how a program and a trace are read. Part II is machinery, collapsed. In part III you ask.

# %% Install tags=["run"]
import importlib.util
import subprocess
import sys

# Without dependencies, pip replaces nothing that the runtime has.
missing = [name for name in ("flatbuffers", "tiktoken", "regex", "pyarrow") if importlib.util.find_spec(name) is None]
if missing and "get_ipython" in globals():
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *missing], check=True)

# %% Imports cellView="form"
# @title Imports
import argparse
import collections
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

GITHUB = "tpuchat/tpuchat"
IN_NOTEBOOK = "get_ipython" in globals()


class InputError(ValueError):
    """A wrong option, file or Config. The message is one line: what was wrong, the value, what to do."""


# %% [markdown]
# # Part I: the essay
#
# ## Chips
#
# The program does not say the clock of its cycles, the memory that a program can use, and the
# [published](https://jax-ml.github.io/scaling-book/tpus/) speeds. A *topology* is one chip, `v6e`, or a slice of
# several, `v6e:2x4`. Colab sells v6e by the hour; its price of a v5e is not known here.


# %% Chips
class Chip(NamedTuple):
    """What a compiled program does not say about its TPU."""

    hbm: float  # bytes that a program can use
    clock: float  # cycles a second, of the compiler's estimates
    flops: float  # published peak in bfloat16, FLOP/s
    bandwidth: float  # of HBM, published, bytes a second
    link: float  # to a neighboring chip, one way, published, bytes a second
    dollars: float | None  # an hour in Colab: 3.71 compute units of $50 / 600


CHIPS = {
    "v6e": Chip(31.25 * 2**30, 1.75e9, 918e12, 1.6e12, 9e10, 3.71 * 50 / 600),
    "v5e": Chip(15.75 * 2**30, 1.5e9, 197e12, 0.82e12, 4.5e10, None),
}
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
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0) % NO_ESTIMATE


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
            if x.opcode == "while":  # its trips are the constant in its condition
                condition = program[x.attribute(r"condition=%([^\s,]+)")]
                trips = max(int(y.attribute(r"^(\d+)\)") or 1) for y in condition)
                yield from walk(x.attribute(r"body=%([^\s,]+)"), times * trips)
            elif x.opcode not in NO_WORK:
                size = array_bytes(x.shape) + sum(array_bytes(shapes.get(name, "")) for name in x.operands)
                yield x._replace(times=times, bytes=size, collective=find_collective(program, x))

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
BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +(?:[A-Z]{2})? *: *((?:> *)*)\{", re.M)
KERNEL = re.compile(r"attention_\w+?_kernel|splash_mha_(?:fwd|dkv|dq)")
LEAST_STEP = 0.5e-6  # seconds of a step of a grid


def step_cycles(text, group=1):
    """Returns the cycles of a step of an attention kernel's grid that computes its block, and of one that skips it.

    text: the file of its bundles. In the longest branch are branches that one of a `group` of query heads takes.
    """
    _, *bundles = BUNDLE.split(text)  # in turn: a `>` for each loop around a bundle, and its text
    depths, bodies, ends = bundles[::2], bundles[1::2], {}
    for i, body in enumerate(bodies):
        for region in re.findall(r"\bregion (\d+)", body):
            ends.setdefault(region, i)
    jumps = {i: re.search(r"sbr\.rel \(.*?region(?: = )?(\d+)", body) for i, body in enumerate(bodies) if depths[i]}
    branches = {i: ends.get(jump[1], 0) - i for i, jump in jumps.items() if jump}  # where one begins: its bundles
    branches = {i: size for i, size in branches.items() if size > 20}
    start = max(branches, key=branches.get)
    inner = sum(size for i, size in branches.items() if start < i and i + size < start + branches[start])
    return len(jumps) - inner * (1 - 1 / group), len(jumps) - branches[start]


def grid(T, block, window):
    """Returns (steps, visible blocks) of splash attention's grid: rows of blocks, as wide as the widest visible one."""
    starts = range(0, T, block)
    rows = [sum(k < q + block and q - (k + block - 1) <= window for k in starts) for q in starts]
    return len(rows) * max(rows), sum(rows)


def head_seconds(text, chip, steps=1, visible=1, group=1):
    """Returns the seconds of an attention kernel for one query head and sequence; `visible` of its `steps` compute."""
    computes, skips = (max(cycles / CHIPS[chip].clock, LEAST_STEP) for cycles in step_cycles(text, group))
    return visible * computes + (steps - visible) * skips


# %% [markdown]
# ## Communication
#
# Which [collectives](https://jax-ml.github.io/scaling-book/sharding/) there are, of what size and where, is the
# compiler's word; their time is not. Of $n$ chips in a ring, each receives $\frac{n-1}{n}$ of the bytes of a gather, and
# twice that of a sum. The speed of a link is published. Assumed are full speed, 1 µs a hop, two links a chip (one in a
# part of a slice, which is a line), and one collective at a time. Nothing of this was measured on a slice.


# %% Collectives
HOP = 1e-6  # seconds until the first byte is at the next chip


class Collective(NamedTuple):
    """What the chips of a group send each other."""

    kind: str  # all-gather | reduce-scatter | all-reduce
    size: int  # bytes of the unsharded array
    chips: int  # in a group


def group_size(rest):
    """Returns the number of chips in a group of a collective. HLO has three notations for groups."""
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    group = re.search(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})", rest)
    return int(group[1] or group[2].count(",") + 1)


def find_collective(program, x):
    """Returns the Collective that an Instruction runs, starts, or has another core run, or None."""
    if x.opcode in ("all-gather", "reduce-scatter", "all-reduce"):
        chips, size = group_size(x.rest), array_bytes(x.shape, hbm_only=False)
        return Collective(x.opcode, size * chips if x.opcode == "reduce-scatter" else size, chips)
    called = x.attribute(r"(?:calls|to_apply)=%([^\s,]+)") if x.opcode in ("fusion", "call-start") else ""
    body = program.get(called, [])
    if not any(y.opcode in ("convolution", "fusion") for y in body):  # else it is arithmetic beside a collective
        return next(filter(None, (find_collective(program, y) for y in body)), None)


def link_seconds(sent, chip, chips):
    """Returns the seconds of a Collective that has the links of a slice of `chips` for itself."""
    rounds, links = 2 if sent.kind == "all-reduce" else 1, 2 if sent.chips == chips else 1
    share = (sent.chips - 1) / sent.chips
    return rounds * (share * sent.size / (links * CHIPS[chip].link) + sent.chips // 2 * HOP)


# %% [markdown]
# What arithmetic hides costs nothing. So play the program in order. A collective begins when its input is there and the
# links are free. The chip waits where it needs the result, unless the arithmetic in between took longer.


# %% Exposed communication
def waits(instructions, seconds, chip, chips):
    """Returns [(first instruction, seconds, those that the chip waits)] of the collectives among `instructions`.

    seconds: of each instruction that is arithmetic, else 0.
    """
    now, links_free, running, result = 0.0, 0.0, {}, []  # running: {name: (first instruction, when it is done)}
    for x, own in zip(instructions, seconds, strict=True):
        fused = x.opcode == "fusion"
        phase = re.search("(?:^async-collective|^call)-(start|update|done)|$", x.name if fused else x.opcode)[1]
        before = x.name.replace("done", "start") if fused else "".join(x.operands[:1])
        if x.collective or before in running:
            first, done = running.pop(before, (x, 0.0))
            needs = link_seconds(first.collective, chip, chips)
            if phase != "done" and x.operands:  # its input is there
                links_free = done = max(now, links_free) + needs
            if phase in ("start", "update"):
                running[x.name] = first, done
            else:
                result.append((first, needs, max(0.0, done - now)))
                now = max(now, done)
        now += own
    return result


# %% Try it: a matmul and a gather tags=["run"]
if IN_NOTEBOOK:
    toy = """
ENTRY %main (x: bf16[512,256], w: bf16[32,128]) -> bf16[512,128] {
  %all = bf16[256,128]{1,0} all-gather(%w), replica_groups=[1,8]<=[8]
  ROOT %y = bf16[512,128]{1,0} fusion(%x, %all), metadata={op_name="jvp(mlp)/dot"}, "estimated_cycles":"900"
}"""
    gather, matmul = execution_order(toy)
    print(f"{matmul.name}: {component(matmul)}, {matmul.cycles / CHIPS['v6e'].clock * 1e6:.2f} µs on a v6e")
    print(f"{gather.name}: {gather.collective}, {link_seconds(gather.collective, 'v6e', 8) * 1e6:.2f} µs on v6e:2x4")

# %% [markdown]
# ## Estimate
#
# The time of a step is the compiler's estimate of each instruction, plus the kernels, plus the waits. Copies between
# HBM and VMEM run beside the arithmetic and count nothing. Against ten published steps of a v6e the mean error is 7.0%:
# [the table](https://github.com/tpuchat/tpuchat/blob/main/docs/speed.md#the-error).


# %% Estimate
class Estimate(NamedTuple):
    """Where the time of a step goes."""

    parts: dict  # {(component, 'forward' | 'backward'): seconds}
    uncounted: list  # names of kernels of which only the bytes count
    sent: float  # seconds in which chips send each other something

    @property
    def seconds(self):
        return sum(self.parts.values())

    @property
    def exposed(self):
        """Seconds in which a chip waits for others."""
        return sum(seconds for (name, _), seconds in self.parts.items() if name == "communication")


def estimate(text, topology, windows, kernels):
    """Returns the Estimate of a compiled program.

    kernels: {(kernel, window): seconds a layer}. A scope names its layer: layer_03 sees windows[3] tokens.
    """
    (chip, chips), instructions = parse_topology(topology), execution_order(text)
    parts, uncounted, seconds = collections.Counter(), [], []
    for x in instructions:
        if "tpu_custom_call" in x.rest:
            kernel, layer = KERNEL.search(f"{x.name} {x.scope}"), re.search(r"layer_(\d+)", x.scope)
            window = windows[int(layer[1])] if layer else max(windows)
            known = kernels.get((kernel[0], window)) if kernel else None
            uncounted += [x.name] if known is None else []
            own = max(known or 0.0, x.bytes / CHIPS[chip].bandwidth)
        else:
            aside = x.collective or re.search("-(start|done|update)$", x.opcode)
            own = 0.0 if aside else x.cycles / CHIPS[chip].clock
        seconds.append(own)
        parts[component(x)] += x.times * own
    sends = waits(instructions, seconds, chip, chips)
    for first, _, exposed in sends:  # what is reduced are gradients
        direction = "backward" if "reduce" in first.collective.kind else component(first)[1]
        parts["communication", direction] += first.times * exposed
    return Estimate(+parts, uncounted, sum(first.times * needs for first, needs, _ in sends))


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
    compiled, kernels = compile_step(config, topology), attention_kernels(config, parse_topology(topology)[0])
    return compiled, estimate(compiled.text, topology, config.windows, kernels)


def preflight(config, topology="v6e"):
    """Compiles the train step for a chip ('v6e') or a slice ('v6e:2x4') and prints whether it fits, its time and price.

    Returns {'fits': True, 'peak': bytes a chip, 'seconds', 'tokens_per_second', 'mfu', 'parts', 'exposed', 'uncounted'}
    or {'fits': False, 'reason', 'device_batch_size': one that fits, or None}. Raises InputError if this machine cannot
    compile for a TPU, or if config.mesh does not suit the topology.
    """
    config, started = on_topology(config, topology), time.perf_counter()
    nb, chip, mesh = subject(config), CHIPS[parse_topology(topology)[0]], config.mesh_shape
    print(f"preflight on {topology}: {nb.count_params(config)['total'] / 1e6:,.1f}M parameters, "
          f"{config.device_batch_size} × {config.seq_len} tokens × {config.grad_accum_steps} a step"
          + f" on each chip of a mesh {mesh[0]} × {mesh[1]}" * (config.devices > 1), flush=True)  # fmt: skip
    try:
        compiled, answer = compile_and_estimate(config, topology)
    except CompileError as error:
        reason, needed = explain(error)
        print(f"does not compile: {reason}")
        batch = smaller_batch(config, topology, needed) if "HBM" in reason else None
        return {"fits": False, "reason": reason, "device_batch_size": batch}
    print(f"fits    compiled in {time.perf_counter() - started:.0f} s")
    rate = config.tokens_per_step / answer.seconds
    mfu = nb.flops_per_token(config) * rate / chip.flops / config.devices
    describe(config, chip, compiled, answer, rate, mfu)
    return {"fits": True, "peak": compiled.peak, "seconds": answer.seconds, "tokens_per_second": rate, "mfu": mfu,
            "parts": answer.parts, "exposed": answer.exposed, "uncounted": answer.uncounted}  # fmt: skip


def smaller_batch(config, topology, needed):
    """Returns the largest device_batch_size that fits, with the same tokens a step, or None. Compiles to find out.

    needed: bytes of HBM that config would take, or None. The search goes down from the batch that they suggest.
    """
    total, hbm = config.tokens_per_step, CHIPS[parse_topology(topology)[0]].hbm
    rows = total // config.seq_len // config.devices  # of a chip
    guess = int(config.device_batch_size * (hbm / needed if needed else 0.5))
    for batch in (b for b in range(guess, 0, -1) if rows % b == 0):
        try:
            compile_step(config.replace(device_batch_size=batch, total_batch_size=total), topology)
        except CompileError as error:
            print(f"        device_batch_size={batch}: {explain(error)[0]}", flush=True)
        else:
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
    each = total // config.seq_len // chips if total else config.device_batch_size
    rows = max(n for n in range(1, min(config.device_batch_size, each) + 1) if each % n == 0)
    return config.replace(mesh=(1, chips), device_batch_size=rows, total_batch_size=total or -1)


def scaling(config, chip="v6e", counts=(1, 8, 64)):
    """Compiles the step for several numbers of chips, prints a table of weak and strong scaling, and draws it.

    Strong scaling has one sequence for each chip of the largest slice. Returns {'a chip' | 'a step': [{'chips',
    'tokens', 'ms', 'tok/s', …}]} and the path of the picture. Raises CompileError if one does not fit.
    """
    tables = {"a chip": [], "a step": []}
    for constant, rows in tables.items():
        print(f"{chip}, estimates, tokens {constant} constant", flush=True)
        for chips in counts:
            now = scaled(config, chips, max(counts) * config.seq_len if constant == "a step" else None)
            compiled, answer = compile_and_estimate(now, f"{chip}:{SLICES[chips]}")
            rate = now.tokens_per_step / answer.seconds
            alone = rows[0]["tok/s"] / counts[0] if rows else rate / chips
            rows.append({"chips": chips, "tokens": now.tokens_per_step, "passes": now.grad_accum_steps,
                         "ms": 1e3 * answer.seconds, "tok/s": rate, "efficiency %": 100 * rate / chips / alone,
                         "exposed %": 100 * answer.exposed / answer.seconds, "GiB a chip": compiled.peak / 2**30})  # fmt: skip
            print("".join(f"{name:>14}" for name in rows[0]) + "\n" if len(rows) == 1 else "", end="")
            print("".join(f"{v:14,}" if isinstance(v, int) else f"{v:14,.2f}" for v in rows[-1].values()), flush=True)
    return tables, plot_scaling(tables, chip, Path(config.run_dir).parent / f"scaling-{chip}.png")


# %% [markdown]
# ## Read a trace
#
# A trace says what a step did. [XProf](https://openxla.org/xprof) notes when each instruction ran, and stores the
# compiled program beside it, with its named scopes. Together they give the same table of components, measured. XProf's
# own table, `hlo_stats`, is empty for a trace of a CPU. So the file, a
# [protocol buffer](https://protobuf.dev/programming-guides/encoding/), is read here.


# %% The program in a trace
def fields(data):
    """Yields (number, value) of the fields of a protocol buffer: integers, or bytes of strings and of messages."""
    i = 0

    def varint():  # seven bits a byte, the lowest first
        nonlocal i
        start = i
        while data[i] & 128:
            i += 1
        i += 1
        return sum((byte & 127) << 7 * n for n, byte in enumerate(data[start:i]))

    while i < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            i += size
            yield number, data[i - size : i]


def inside(data, number, *path):
    """Yields the values at a path of field numbers in a protocol buffer."""
    for value in (value for field, value in fields(data) if field == number):
        yield from inside(value, *path) if path else [value]


def traced_components(data):
    """Returns {instruction: (component, direction)} of the train step in the bytes of a trace.

    The fields are numbered in xplane.proto and, from HloProto on, in hlo.proto.
    """
    components = {}
    for event in inside(data, 1, 4, 2):  # plane, event_metadata, its value
        if b"".join(inside(event, 2)).startswith(b"jit_train_step"):
            for x in inside(event, 5, 6, 1, 3, 2):  # stat, HloProto, module, computation, instruction
                texts = [b"".join(inside(x, *path)).decode() for path in ((1,), (2,), (28,), (7, 2))]
                name, opcode, target, scope = texts
                components[name] = component(Instruction(name, "", opcode, f'{target} op_name="{scope}"'))
    return components


# %% [markdown]
# An instruction runs until the next one begins. On an accelerator it ends before that, if the device is idle. On a CPU it
# does not: there a pool of threads does a matmul, and the trace shows only its call.


# %% Events of a trace
def step_events(name, lines):
    """Returns {run: [(start, end, instruction)]} of the train steps in a plane of a trace; nanoseconds.

    lines: [(name, [event])]. A TPU has a line of programs and one of their instructions; a CPU and a GPU have a line
    for each thread or stream, and an instruction says which program it belongs to.
    """
    runs, by_name = collections.defaultdict(list), dict(lines)
    if name.startswith("/device:TPU"):
        for step in (e for e in by_name.get("XLA Modules", []) if e.name.startswith("jit_train_step")):
            inside_it = (e for e in by_name.get("XLA Ops", []) if step.start_ns <= e.start_ns < step.end_ns)
            runs[step.start_ns] = [(e.start_ns, e.end_ns, re.match(r"%?([\w.-]+)", e.name)[1]) for e in inside_it]
        return runs
    for e in (e for _, line in lines for e in line):
        facts = {key: value for key, value in e.stats if key in ("hlo_op", "hlo_module", "run_id")}
        if facts.get("hlo_module", "").startswith("jit_train_step"):
            runs[facts.get("run_id")].append((e.start_ns, e.end_ns, facts["hlo_op"]))
    return runs


def times_of(events, pool=False):
    """Returns {instruction: nanoseconds} of a run: each until the next one begins or, without a pool, until its end."""
    times, events = collections.Counter(), sorted(events)
    for (start, end, name), (after, *_) in itertools.pairwise([*events, (max(e[1] for e in events),)]):
        times[name] += max(after - start, 0) if pool else min(after, end) - start
    return times


# %% Trace
def read_trace(run_dir):
    """Returns ({(component, direction): seconds a step}, seconds a step, steps) of the newest trace in a run folder."""
    paths, runs, steps = sorted(Path(run_dir).glob("profile/plugins/profile/*/*.xplane.pb")), {}, 0
    if not paths:
        raise InputError(f"trace={str(run_dir)!r}: holds no trace; train with profile_steps above 0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # jax's reader warns about itself
        for plane in jax.profiler.ProfileData.from_file(str(paths[-1])).planes:
            lines = [(line.name, list(line.events)) for line in plane.lines]
            steps += sum(event.name == "train" for _, line in lines for event in line)
            found = step_events(plane.name, lines)
            if found and (not runs or plane.name.startswith("/device") and not where.startswith("/device")):
                runs, where = found, plane.name  # of several chips, the first
    if not (runs and steps):
        raise InputError(f"trace={str(run_dir)!r}: holds a trace without train steps")
    components, parts = traced_components(paths[-1].read_bytes()), collections.Counter()
    for events in runs.values():
        for name, nanoseconds in times_of(events, where == "/host:CPU").items():
            parts[components.get(name, ("other", "forward"))] += nanoseconds / 1e9 / steps
    moments = [moment for events in runs.values() for e in events for moment in e[:2]]
    return parts, (max(moments) - min(moments)) / 1e9 / steps, steps


def describe_trace(run_dir, estimates):
    """Prints where the time of the traced steps went, beside {topology: parts} of estimates."""
    parts, seconds, steps = read_trace(run_dir)
    print(f"trace   {steps} steps of {1e3 * seconds:.1f} ms, of which train_step runs {1e3 * sum(parts.values()):.1f} ms")
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
    memory = compiled.memory_analysis()
    answer = [compiled.as_text(), memory.peak_memory_in_bytes, memory.argument_size_in_bytes]
    (folder / "answer").write_text(json.dumps(answer))
except jax.errors.JaxRuntimeError as error:
    (folder / "error").write_text(str(error))
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
    package = (needed or ["libtpu"])[0].partition(";")[0].strip()
    folder = Path.home() / ".cache" / "tpuchat" / re.sub(r"[^\w.]+", "-", package).strip(".-")
    if not folder.exists():
        print(f"installing {package} into {folder}, beside the runtime", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as partial:
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", f"{partial}/new", package]
            done = subprocess.run(command, env=os.environ | {"PIP_USER": "0"}, capture_output=True, text=True)
            if done.returncode:
                words = last_line(done.stderr)
                raise InputError(f"cannot install {package} ({words}); check the network: pip download {package!r}")
            os.replace(f"{partial}/new", folder)
    return folder / "libtpu" / "libtpu.so"


def last_line(text):
    return (text.strip().splitlines() or ["no word"])[-1]


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
        words = last_line(done.stderr)[:100]
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
            words = fatal[1] if fatal else last_line(done.stderr)
            raise CompileError(f"the compiler itself crashed (another device_batch_size may do): {words}")
        return Compiled(*json.loads((folder / "answer").read_text()))


def compile_step(config, topology):
    """Returns the train step of a Config on a topology, Compiled, its state donated. Raises CompileError."""
    nb = subject(config)

    def place(x, *spec):
        sharding = nb.sharding(config, *spec) if config.devices > 1 else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = jax.tree.map(lambda x: place(x, *nb.weight_spec(config, x.shape)), nb.state_shapes(config))
    tokens = place(jax.ShapeDtypeStruct(config.batch_shape, "int32"), None, nb.ROWS)
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
                    one = head_seconds(path.read_text(errors="replace"), chip, *blocks)
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
def describe(config, chip, compiled, answer, rate, mfu):
    """Prints the memory of a step on each chip, its time, what they mean for the run, and where the time goes."""
    weights = 4 * subject(config).count_params(config)["total"] // config.mesh_shape[1]
    parts = {"weights": weights, "moments": 2 * weights, "the rest of the arguments": compiled.arguments - 3 * weights}
    parts |= {"accumulated gradients": weights} if config.grad_accum_steps > 1 else {}
    parts["activations, gradients, bfloat16 weights"] = compiled.peak - sum(parts.values())
    split = ", ".join(f"{size / 2**30:.2f} {name}" for name, size in parts.items() if size > 2**30 / 200)
    each, alone = "on each chip " if config.devices > 1 else "", config.devices == 1
    print(f"memory  {compiled.peak / 2**30:.2f} GiB of {chip.hbm / 2**30:.2f} {each}at its peak: {split}")
    steps, tokens, hours = config.total_steps, config.tokens_per_step, config.total_steps * answer.seconds / 3600
    each = f", {rate / config.devices:,.0f} a chip" if config.devices > 1 else ""
    print(f"time    {answer.seconds * 1e3:.1f} ms a step of {tokens:,} tokens: {rate:,.0f} tok/s{each}, MFU {mfu:.1%}")
    print(f"        (6 FLOPs a matmul weight, 12·N·H a visible key; of {chip.flops / 1e12:.0f} TFLOP/s)")
    price = f", ${hours * chip.dollars:,.2f} in Colab" if chip.dollars and alone else ""
    print(f"run     {steps:,} steps, {steps * tokens / 1e9:,.2f}B tokens: {hours:,.2f} hours{price}; evaluations, samples "
          "and compilation not included")  # fmt: skip
    if answer.sent:
        print(f"send    {1e3 * answer.sent:.2f} ms a step, of which {1e3 * answer.exposed:.2f} are not beside arithmetic: "
              f"{answer.exposed / answer.seconds:.1%} of the step; links of {chip.link / 1e9:.0f} GB/s one way")  # fmt: skip
    show_parts({"estimate": answer.parts})
    print("AdamW runs inside the matmuls of the gradients where the compiler fuses it: there it counts as theirs")
    print("kernels are counted from their bundles; copies that run beside arithmetic are not counted")
    if names := sorted(answer.uncounted):
        print(f"NOT counted but for their bytes: the kernels {', '.join(names[:4])}, {len(names)} in all")


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


def compare(reports):
    """Prints a line for each of {topology: what preflight returned}."""
    print(f"{'':>12}{'ms a step':>12}{'tok/s':>14}{'MFU':>8}{'GiB a chip':>12}")
    for topology, report in reports.items():
        if report["fits"]:
            ms, rate, gib = 1e3 * report["seconds"], report["tokens_per_second"], report["peak"] / 2**30
            print(f"{topology:>12}{ms:12.1f}{rate:14,.0f}{report['mfu']:8.1%}{gib:12.2f}")
        else:
            print(f"{topology:>12}  {report['reason']}")


def plot_scaling(tables, chip, path):
    """Draws tokens a second against chips, with the straight line of perfect scaling. Returns the path."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"picture {path}", flush=True)
    return path


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
    options, rest = parser.parse_known_args(argv[len(words) :])
    if options.help:
        parser.print_help()
    notebook = words.pop(0) if words and words[0].endswith(".py") else "02_train.py"
    topologies = words or ["v6e"] * (not (options.scaling or options.trace))
    return notebook, expand(topologies), options, ["--help"] if options.help else rest


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
        notebook, topologies, options, rest = parse_command(argv)
        nb = load_notebook(notebook)
        config = nb.parse_args(rest, first_config(nb, options))
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
TOPOLOGIES = "v6e"  # @param {type: "string"}
reports = {name: preflight(config, name) for name in expand(TOPOLOGIES.split())}
compare(reports)

# %% Several chips tags=["run"]
from IPython.display import Image, display

SCALING = ""  # @param ["", "v6e", "v5e"]
if SCALING:
    display(Image(str(scaling(config, SCALING)[1])))

# %% What a run did tags=["run"]
TRACE = ""  # @param {type: "string"}
if TRACE:
    describe_trace(TRACE, {name: report["parts"] for name, report in reports.items() if report["fits"]})
