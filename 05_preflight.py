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

# %% Imports cellView="form"
# @title Imports
import argparse
import collections
import concurrent.futures
import importlib.metadata
import importlib.util
import itertools
import json
import linecache
import math
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import warnings
from pathlib import Path
from typing import NamedTuple

import jax.export
import numpy as np

GITHUB = "tpuchat/tpuchat"
IN_NOTEBOOK = "get_ipython" in globals()


class InputError(ValueError):
    """A wrong option, file or Config. The message is one line: what was wrong, the value, what to do."""


# %% Install tags=["run"]
missing = [name for name in ("flatbuffers", "tiktoken", "regex", "pyarrow") if importlib.util.find_spec(name) is None]
if missing and IN_NOTEBOOK:  # without dependencies, pip replaces nothing that the runtime has
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *missing], check=True)

# %% [markdown]
# # Part I: the essay
#
# ## Chips
#
# A program does not say the memory that it can use, the clock of the compiler's cycles, and the
# [published](https://jax-ml.github.io/scaling-book/tpus/) speeds. A *topology* is one chip, `v6e`, or a slice of
# several, `v6e:2x4`. What an hour costs stands in 02, beside each `device_kind`.

# %% Chips
Chip = collections.namedtuple("Chip", "kind hbm clock flops bandwidth link")
CHIPS = {  # jax's device_kind; bytes; cycles/s; FLOP/s in bfloat16; bytes/s of HBM, and of a link one way
    "v6e": Chip("TPU v6 lite", 31.25 * 2**30, 1.75e9, 918e12, 1.6e12, 9e10),
    "v5e": Chip("TPU v5 lite", 15.75 * 2**30, 1.5e9, 197e12, 0.82e12, 4.5e10),
}
SLICES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}  # chips: shape


def parse_topology(name):
    """Returns ('v6e', 8) for 'v6e:2x4', and ('v6e', 1) for 'v6e'. Raises InputError for an unknown one."""
    chip, _, shape = name.partition(":")
    if chip not in CHIPS or shape not in ("", *SLICES.values()):
        slices = ", v6e:".join(SLICES.values())
        raise InputError(f"topology={name!r}: must be one of {', '.join(CHIPS)}, or all, or a slice: v6e:{slices}")
    return chip, math.prod(map(int, (shape or "1x1").split("x")))


# %% [markdown]
# ## Read a compiled program
#
# The compiler returns text in [HLO](https://openxla.org/xla/operation_semantics): computations, and in each of them
# instructions in the order in which the chip runs them. `op_name` is the JAX code that an instruction comes from, with
# the model's named scopes. `estimated_cycles` is the compiler's estimate of its time. `S(1)` in a shape marks an array
# in VMEM; other arrays lie in HBM. A loop runs its body several times: for microbatches, or for scanned layers.

# %% Instructions
LINE = re.compile(r" +(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", re.S)
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

    operands = property(lambda self: re.findall(r"%([^\s,)]+)", self.rest.split("), ")[0]))
    scope = property(lambda self: self.attribute(r'op_name="([^"]*)"'))
    cycles = property(lambda self: int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0) % (2**64 - 1))


def execution_order(text):
    """Returns [Instruction] of a compiled program in the order in which a chip runs them."""
    program = {}  # {computation: [Instruction]}
    for line in re.split(r"\n(?= +(?:ROOT )?%\S+ = |ENTRY|%|\}$)", text, flags=re.M):  # a kernel's has several lines
        if head := re.match(r"(ENTRY)? *%(\S+) \(.*\{$", line):
            body = program[head[1] or head[2]] = []
        elif match := LINE.match(line):
            body.append(Instruction(*match.groups()))

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
COMPONENTS = dict(
    optimizer="optimizer", lm_head="head and loss", loss="head and loss", attn="attention", mlp="MLP", embed="embedding"
)


def array_bytes(shape, hbm_only=True):
    """Returns the bytes of the arrays in an HLO shape, a tuple or not: of those in HBM, or of all."""
    return sum(
        int(bits or 8) // 8 * math.prod(int(n) for n in dims.split(",") if n)
        for bits, dims, layout in re.findall(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\](?:\{([^}]*)\})?", shape)
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


def head_seconds(text, chip, steps=1, visible=1, group=1):
    """Returns the seconds of an attention kernel, from its bundles, for one query head and sequence; `visible` of its
    `steps` compute. In the longest branch are branches that one of a `group` of query heads takes."""
    _, *bundles = BUNDLE.split(text)  # in turn: a `>` for each loop around a bundle, and its text
    depths, bodies = bundles[::2], bundles[1::2]
    found = [(region, i) for i, body in enumerate(bodies) for region in re.findall(r"\bregion (\d+)", body)]
    ends = dict(reversed(found))  # where a region is named first
    loop = [i for i, depth in enumerate(depths) if depth]
    jumps = {i: re.search(r"sbr\.rel \(.*?region(?: = )?(\d+)", bodies[i]) for i in loop}
    branches = {i: ends.get(jump[1], 0) - i for i, jump in jumps.items() if jump}  # where one begins: its bundles
    start, longest = max(branches.items(), key=lambda branch: branch[1])
    inner = sum(size for i, size in branches.items() if start < i and size > 20 and i + size < start + longest)
    cycles = len(loop) - inner * (1 - 1 / group), len(loop) - longest
    computes, skips = (max(n / CHIPS[chip].clock, LEAST_STEP) for n in cycles)
    return visible * computes + (steps - visible) * skips


def grid(T, block, window):
    """Returns (steps, visible blocks) of splash attention's grid: rows of blocks, as wide as the widest visible one."""
    starts = range(0, T, block)
    rows = [sum(k < q + block and q - (k + block - 1) <= window for k in starts) for q in starts]
    return len(rows) * max(rows), sum(rows)


# %% [markdown]
# ## Communication
#
# Which [collectives](https://jax-ml.github.io/scaling-book/sharding/) there are, of what size and where, is the
# compiler's word; their time is not. Of $n$ chips in a ring, each receives $\frac{n-1}{n}$ of the bytes of a gather,
# twice that of a sum. Links have the published speed, a hop takes 1 µs; a chip has two links, in part of a slice one,
# for one collective at a time. The chip waits where it needs a result, unless the arithmetic since the start of the
# collective took longer. Nothing of this was measured on a slice.


# %% Collectives
def group_size(rest):
    """Returns the number of chips in a group of a collective. HLO has three notations for groups."""
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    group = re.search(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})", rest)
    return int(group[1] or group[2].count(",") + 1)


def find_collective(program, x):
    """Returns (kind, bytes of the unsharded array, chips in a group) of what an Instruction starts or runs, or None."""
    if x.opcode in ("all-gather", "reduce-scatter", "all-reduce"):
        chips, size = group_size(x.rest), array_bytes(x.shape, hbm_only=False)
        return x.opcode, size * chips if x.opcode == "reduce-scatter" else size, chips
    called = x.attribute(r"(?:calls|to_apply)=%([^\s,]+)") if x.opcode in ("fusion", "call-start") else ""
    body = program.get(called, [])
    if not any(y.opcode in ("convolution", "fusion") for y in body):  # else it is arithmetic beside a collective
        return next(filter(None, (find_collective(program, y) for y in body)), None)


def link_seconds(kind, size, group, chip, chips):
    """Returns the seconds of a collective that has the links of a slice of `chips` for itself."""
    rounds, links = 2 if kind == "all-reduce" else 1, 2 if group == chips else 1
    return rounds * ((group - 1) / group * size / (links * CHIPS[chip].link) + group // 2 * 1e-6)


def waits(instructions, seconds, chip, chips):
    """Returns [(first instruction, seconds, those that the chip waits)] of the collectives among instructions."""
    now, links_free, running, result = 0.0, 0.0, {}, []  # running: {name: (first instruction, when it is done)}
    for x, own in zip(instructions, seconds, strict=True):
        phase = re.search("(?:^async-collective|call)-(start|update|done)|$", x.name)[1]
        name = re.sub("-(start|update|done)", "", x.name)
        if x.collective or name in running:
            first, done = running.pop(name, (x, 0.0))
            needs = link_seconds(*first.collective, chip, chips)
            if phase != "done" and x.operands:  # its input is there
                links_free = done = max(now, links_free) + needs
            if phase in ("start", "update"):
                running[name] = first, done
            else:
                result.append((first, needs, max(0.0, done - now)))
                now = max(now, done)
        now += own
    return result


# %% Try it: a matmul and a gather tags=["run"]
if IN_NOTEBOOK:
    gather, matmul = execution_order("""ENTRY %main (w: bf16[32,128]) -> bf16[512,128] {
  %all = bf16[256,128]{1,0} all-gather(%w), replica_groups=[1,8]<=[8]
  ROOT %y = bf16[512,128]{1,0} fusion(%x, %all), metadata={op_name="jvp(mlp)/dot"}, "estimated_cycles":"900"
}""")
    print(f"{component(matmul)}: {matmul.cycles / CHIPS['v6e'].clock * 1e6:.2f} µs on a v6e")
    print(f"{gather.collective}: {link_seconds(*gather.collective, 'v6e', 8) * 1e6:.2f} µs on v6e:2x4")

# %% [markdown]
# ## Estimate
#
# The time of a step is the compiler's estimate of each instruction, plus the kernels, plus the waits. Copies between
# HBM and VMEM run beside the arithmetic and count nothing. Against ten published steps of a v6e the mean error is 7.0%:
# [the table](https://github.com/tpuchat/tpuchat/blob/main/docs/speed.md#the-error).

# %% Estimate
Estimate = collections.namedtuple("Estimate", "seconds parts sent exposed uncounted")


def estimate(text, topology, windows, kernels):
    """Returns the Estimate of a compiled program. parts: {(component, 'forward' | 'backward'): seconds}; sent, exposed:
    seconds in which chips send, and in which they wait for it; uncounted: kernels that are not in `kernels`, a
    {(kernel, window): seconds a layer}. A scope names its layer: layer_03 sees windows[3] tokens."""
    (chip, chips), instructions = parse_topology(topology), execution_order(text)
    parts, uncounted, seconds = collections.Counter(), [], []
    for x in instructions:
        if "tpu_custom_call" in x.rest:
            kernel, layer = KERNEL.search(f"{x.name} {x.scope}"), re.search(r"layer_(\d+)", x.scope)
            known = kernels.get((kernel and kernel[0], windows[int(layer[1])] if layer else max(windows)))
            uncounted += [x.name] if known is None else []
            own = max(known or 0.0, x.bytes / CHIPS[chip].bandwidth)
        else:
            aside = x.collective or re.search("-(start|done|update)$", x.opcode)
            own = 0.0 if aside else x.cycles / CHIPS[chip].clock
        seconds.append(own)
        parts[component(x)] += x.times * own
    sent = exposed = 0.0
    for first, needs, waited in waits(instructions, seconds, chip, chips):
        sent, exposed = sent + first.times * needs, exposed + first.times * waited
        direction = "backward" if "reduce" in first.collective[0] else component(first)[1]  # of gradients
        parts["communication", direction] += first.times * waited
    return Estimate(sum(parts.values()), +parts, sent, exposed, uncounted)


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
    """Compiles the train step for a topology and prints whether it fits, its time and price. Returns {'fits': True,
    'peak': bytes a chip, 'tokens_per_second', 'mfu', and what an Estimate has} or {'fits': False, 'reason',
    'device_batch_size': one that fits, or None}. Raises InputError."""
    config, nb = on_topology(config, topology), sys.modules[type(config).__module__]
    size, rows = nb.count_params(config)["total"] / 1e6, f"{config.device_batch_size} × {config.seq_len} tokens"
    mesh = "" if config.devices == 1 else " on each chip of a mesh {} × {}".format(*config.mesh_shape)
    print(f"preflight on {topology}: {size:,.1f}M weights, {rows} × {config.grad_accum_steps} a step{mesh}", flush=True)
    try:
        compiled, answer = compile_and_estimate(config, topology)
    except CompileError as error:
        reason, size = explain(error)
        print(f"does not compile: {reason}")
        return {"fits": False, "reason": reason, "device_batch_size": size and smaller_batch(config, topology, size)}
    rate, chip = config.tokens_per_step / answer.seconds, CHIPS[parse_topology(topology)[0]]
    mfu = nb.flops_per_token(config) * rate / chip.flops / config.devices
    describe(config, chip, compiled, answer, rate, mfu)
    return {"fits": True, "peak": compiled.peak, "tokens_per_second": rate, "mfu": mfu, **answer._asdict()}


def smaller_batch(config, topology, needed):
    """Returns the largest device_batch_size that fits, or None: compiles, from what the needed bytes suggest down."""
    total, rows = config.tokens_per_step, config.tokens_per_step // config.seq_len // config.devices
    guess = int(config.device_batch_size * CHIPS[parse_topology(topology)[0]].hbm / needed)
    for batch in (b for b in range(guess, 0, -1) if rows % b == 0):
        try:
            compile_step(config.replace(device_batch_size=batch, total_batch_size=total), topology)
        except CompileError as error:
            print(f"        device_batch_size={batch}: {explain(error)[0]}", flush=True)
        else:
            print(f"what fits: --device_batch_size {batch} --total_batch_size {total}, in {rows // batch} passes")
            return batch


# %% [markdown]
# ## Plan a budget
#
# What is the best model for twelve credits? A larger one learns more from each token, and sees fewer of them. `plan`
# asks the compiler how long a step of each size takes, and gives the size the tokens that the budget pays for. With $N$
# weights in matrices and head, and $C$ FLOPs,
#
# $$\text{bits per byte} = E(\epsilon C) \, (1 + \kappa \ln^2 (N / N^*)), \qquad N^* = \sqrt{\epsilon C / (6 r)}$$
#
# $E$ is the best that [nanochat](https://github.com/karpathy/nanochat) reached on FineWeb-Edu, at $r = 10.7$ tokens for
# each of these weights. Its versions differ by 0.02 and more, and it has nothing beyond $10^{19}$ FLOPs. The curvature
# $\kappa$, and the share $\epsilon$ of its FLOPs with which 06 learns as much as AdamW does, are
# [measured](https://github.com/tpuchat/tpuchat/blob/main/docs/budget.md) here, with tiny models. Trust the order of the
# rows more than their values.


# %% Plan a budget
FRONTIER = {1e18: 0.897, 2e18: 0.862, 5e18: 0.829, 1e19: 0.800}  # FLOPs: bits per byte at the best size
RATIO = 10.7  # tokens for each weight there; 10.3 to 11.2
CURVATURE = 0.038  # of the bits per byte, for a size that is e times the best
SHARE = {"02_train.py": 0.75, "04_maxtext.py": 0.75, "06_recipe.py": 1.0}  # 04 with AdamW as 02
START = 300  # seconds until the first step; nobody has measured them on a TPU
SIZES = {"02_train.py": (4, 6, 8, 12, 16), "04_maxtext.py": (4,), "06_recipe.py": (4, 6, 8, 12)}  # n_head


def expected_bpb(flops, size):
    """Returns the bits per byte to expect of a `size`, weights in matrices and head, trained with so many FLOPs; inf
    where the law does not reach."""
    slope, at_one = np.polyfit(np.log([*FRONTIER]), np.log([*FRONTIER.values()]), 1)
    away = math.log(size / math.sqrt(flops / 6 / RATIO))
    if not -1.25 < away < 2:  # measured from -0.8 to 1.8, and continued a little; below -1.3 more tokens would hurt
        return math.inf
    return math.exp(at_one + slope * math.log(flops)) * (1 + CURVATURE * away**2)


def plan_config(nb, n_head):
    """Returns the Config of a size as its notebook trains it on a v6e; the learning rate follows 1/√D."""
    config, recipe = nb.Config(), nb.Config.notebook == "06_recipe.py"  # which takes larger steps on an accelerator
    rate = (0.01 if recipe else config.learning_rate) * (config.n_head / n_head) ** 0.5
    tokens = 131_072 if recipe else config.tokens_per_step
    return config.replace(n_head=n_head, learning_rate=float(f"{rate:.3g}"), total_batch_size=tokens)


def plan_row(chip, config):
    """Returns what a budget needs to know of a Config on a chip, a dict, or None if no batch of it fits."""
    nb = sys.modules[type(config).__module__]
    try:
        compiled, answer = compile_and_estimate(config, chip)
    except CompileError as error:
        print(f"        {config.notebook} --n_head {config.n_head}: {explain(error)[0]}", flush=True)
        batch = smaller_batch(on_topology(config, chip), chip, explain(error)[1] or math.inf)
        if not batch:
            return None
        config = config.replace(device_batch_size=batch)
        compiled, answer = compile_and_estimate(config, chip)
    counts, pace = nb.count_params(config), answer.seconds / config.tokens_per_step
    return {
        "name": f"{config.notebook[:2]}, n_head {config.n_head}", "config": config, "parameters": counts["total"],
        "size": counts["attn"] + counts["mlp"] + counts["lm_head"], "flops": nb.flops_per_token(config),
        "peak": compiled.peak, "seconds": answer.seconds, "rest": START + config.final_eval_tokens * pace / 3,
        "pace": pace * (1 + config.eval_tokens / 3 / config.eval_interval / config.tokens_per_step),
    }  # fmt: skip


def expect(row, hours):
    """Returns (tokens, bits per byte) of a size after so many hours. An evaluated token takes a third of a trained."""
    tokens = max(0.0, (0.998 * 3600 * hours - row["rest"]) / row["pace"])
    share = SHARE[row["config"].notebook]
    return tokens, expected_bpb(tokens * row["flops"] * share, row["size"]) if tokens else math.inf


def show_plan(rows, chip, hours, price):
    """Prints the table of a budget, and how to start the best size."""
    cost, far = f", {hours * price:.4g} credits" if price else "", False
    print(f"\n{chip}, {hours:.2f} hours{cost}: the compiler's estimates, and the bits per byte that the law expects")
    print(f"{'size':14} weights  ms/step    tok/s   batch    GiB    tokens  a weight  bits per byte")
    for row in rows:
        config, (tokens, bpb) = row["config"], expect(row, hours)
        rate, gib = 1 / row["pace"], row["peak"] / 2**30
        beyond = not min(FRONTIER) < tokens * row["flops"] * SHARE[config.notebook] < max(FRONTIER)
        line = f"{row['name']:14}{row['parameters'] / 1e6:7,.0f}M {1e3 * row['seconds']:8.1f} {rate:8,.0f} "
        line += f"{config.device_batch_size:>4} × {config.grad_accum_steps:<2}{gib:6.2f} {tokens / 1e9:8.2f}B "
        print(f"{line}{tokens / row['size']:9.1f} {f'{bpb:.3f}' if bpb < math.inf else '-':>14}{'*' * beyond}")
        far |= beyond
    print("* outside the law's four points, from 1e18 to 1e19 FLOPs\n" * far, end="")
    best = min(rows, key=lambda row: expect(row, hours)[1])
    (tokens, bpb), config = expect(best, hours), best["config"]
    if bpb == math.inf:
        print("take    none of them: the best size is far smaller or larger")
        return
    default = plan_config(sys.modules[type(config).__module__], type(config)().n_head)
    nb, kind, names = sys.modules[type(config).__module__], CHIPS[chip].kind, ("n_head", "learning_rate")
    changes = "".join(f" --{x} {getattr(config, x)}" for x in names if getattr(config, x) != getattr(default, x))
    if config.device_batch_size != nb.DEVICE_BATCH.get(kind):  # else it is what the notebook takes there
        changes += f" --device_batch_size {config.device_batch_size} --total_batch_size {config.tokens_per_step}"
    if tokens > 2.5e9:  # the 50 shards of the default have about as many, and would be read again
        changes += " --num_shards -1"
    known = price and price == nb.UNITS.get(kind)  # of no other price does a run know the credits
    amount = f"--credits {hours * price:.4g}" if known else f"--hours {hours:.4g}"
    print(f"take    python {config.notebook}{changes} {amount}")


def plan(chip="v6e", credits=(), hours=(), price=None, sizes=SIZES):
    """Prints a table of sizes for each budget, and draws what to expect. price: credits of an hour, where 02 has none;
    sizes: {notebook: heads}. Returns the path of the picture. Raises InputError."""
    from matplotlib.figure import Figure

    notebooks = {name: load_notebook(name) for name in sizes}
    price = price or next(iter(notebooks.values())).UNITS.get(CHIPS[chip].kind)
    if credits and not price:
        raise InputError(f"credits={credits[0]}: the price of a {chip} is not known; add --price, credits of an hour")
    budgets = [*(amount / (price or 1) for amount in credits), *hours]
    if short := [budget for budget in budgets if 3600 * budget < 3 * START]:
        raise InputError(f"hours={short[0]:.3g}: a plan needs {3 * START / 3600}; {START} s pass before the first step")
    configs = [plan_config(notebooks[name], n) for name, heads in sizes.items() for n in heads]
    print(f"plan    compiles {len(configs)} sizes for a {chip}; each takes minutes", flush=True)
    find_libtpu()  # which may install it: once
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        rows = [row for row in pool.map(lambda config: plan_row(chip, config), configs) if row]
    if not rows:
        raise InputError(f"topology={chip!r}: none of these sizes fits it")
    for budget in budgets:
        show_plan(rows, chip, budget, price)
    panel, amounts = Figure(figsize=(7, 4), layout="constrained").subplots(), np.geomspace(0.5, 200, 200)
    for row in rows:
        panel.plot(amounts * (price or 1), [expect(row, x)[1] for x in amounts], label=row["name"])
    panel.set(xscale="log", xlabel="credits" if price else "hours", ylabel="expected bits per byte", ylim=(0.65, 1))
    panel.legend(fontsize=8)
    path = Path("runs", f"plan-{chip}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    panel.figure.savefig(path, dpi=110)
    print(f"picture {path}")
    return path


# %% [markdown]
# ## Scaling
#
# Each chip keeps its tokens (*weak scaling*). *Efficiency*, the tokens a second of each chip over those of one alone,
# can exceed 100%: the state is sharded over all ([ZeRO](https://arxiv.org/abs/1910.02054)), and AdamW's work with it.


# %% Scaling
def scaling(config, chip="v6e", counts=(1, 8, 64)):
    """Asks about several numbers of chips, prints a table and draws it. Returns the path of the picture, or None."""
    from matplotlib.figure import Figure

    reports = {n: preflight(config.replace(mesh=(1, n), total_batch_size=-1), f"{chip}:{SLICES[n]}") for n in counts}
    if not all(report["fits"] for report in reports.values()):
        return None
    print(f"{chip}, estimates\n   chips   ms a step         tok/s  efficiency  exposed  GiB a chip")
    rates = {n: report["tokens_per_second"] for n, report in reports.items()}
    for n, x in reports.items():
        efficiency, exposed = rates[n] / n / rates[1], x["exposed"] / x["seconds"]
        ms, gib = 1e3 * x["seconds"], x["peak"] / 2**30
        print(f"{n:8}{ms:12.2f}{rates[n]:14,.0f}{efficiency:12.1%}{exposed:9.1%}{gib:12.2f}")
    panel = Figure(figsize=(4.5, 3), layout="constrained").subplots()
    panel.plot(counts, [rates[1] * n for n in counts], "--", color="0.6", label="perfect")
    panel.plot(counts, rates.values(), "o-", label="estimate")
    panel.set(xscale="log", yscale="log", xlabel=f"{chip} chips", ylabel="tokens a second")
    panel.legend()
    path = Path(config.run_dir).parent / f"scaling-{chip}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    panel.figure.savefig(path, dpi=150)
    print(f"picture {path}")
    return path


# %% [markdown]
# ## Read a trace
#
# [XProf](https://openxla.org/xprof) notes when each instruction of a step ran, and stores the compiled program beside
# it, with its named scopes. Together they give the same table of components, measured. XProf's own table, `hlo_stats`,
# is empty for a CPU's trace. An instruction runs until the next one begins, and on an accelerator not longer than its
# own end. On a CPU, a pool of threads does a matmul: the trace shows only the call.


# %% Trace
def inside(data, number, *path):
    """Yields the values at a path of field numbers in a protocol buffer: integers, or bytes."""
    from google.protobuf import empty_pb2, unknown_fields

    for field in unknown_fields.UnknownFieldSet(empty_pb2.Empty.FromString(data)):
        if field.field_number == number:
            yield from inside(field.data, *path) if path else [field.data]


def traced_components(data):
    """Returns {instruction: (component, direction)} of the train step in the bytes of a trace."""
    components = {}
    for event in inside(data, 1, 4, 2):  # plane, event_metadata, its value: numbers of xplane.proto
        if b"".join(inside(event, 2)).startswith(b"jit_train_step"):
            for x in inside(event, 5, 6, 1, 3, 2):  # stat, HloProto, module, computation, instruction: of hlo.proto
                name, target, scope = (b"".join(inside(x, *path)).decode() for path in ((1,), (28,), (7, 2)))
                components[name] = component(Instruction(name, "", "", f'{target} op_name="{scope}"'))
    return components


def step_events(plane, lines):
    """Returns [(run, start, end, instruction)] of the train steps in [(line, its events)] of a plane; nanoseconds."""
    if plane.startswith("/device:TPU"):  # a line of programs, and one of their instructions
        modules, ops = (dict(lines).get(name, []) for name in ("XLA Modules", "XLA Ops"))
        steps = [step for step in modules if step.name.startswith("jit_train_step")]
        pairs = [(s, e) for s in steps for e in ops if s.start_ns <= e.start_ns < s.end_ns]
        return [(s.start_ns, e.start_ns, e.end_ns, re.match(r"%?([\w.-]+)", e.name)[1]) for s, e in pairs]
    found = [(e, dict(e.stats)) for _, line in lines for e in line]  # a line for each thread or stream
    found = [(e, facts) for e, facts in found if facts.get("hlo_module", "").startswith("jit_train_step")]
    return [(facts.get("run_id"), e.start_ns, e.end_ns, facts["hlo_op"]) for e, facts in found]


def times_of(events, pool):
    """Returns {instruction: nanoseconds}: each until the next of its run begins, and without a pool at most its own."""
    times = collections.Counter()
    for (run, start, end, name), (later, after, *_) in itertools.pairwise([*sorted(events), (None, 0)]):
        times[name] += (end if later != run else after if pool else min(after, end)) - start
    return times


def read_trace(run_dir):
    """Returns ({(component, direction): seconds a step}, seconds a step, steps) of the newest trace in a run folder."""
    paths = sorted(Path(run_dir).glob("profile/plugins/profile/*/*.xplane.pb"))
    planes = jax.profiler.ProfileData.from_file(str(paths[-1])).planes if paths else ()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # jax 0.7.2's reader warns about itself
        found = {p.name: step_events(p.name, [(line.name, list(line.events)) for line in p.lines]) for p in planes}
    plane = min((name for name, events in found.items() if events), default=None)  # the first device, or the host
    if plane is None:
        raise InputError(f"trace={str(run_dir)!r}: holds no trace of train steps; train with profile_steps above 0")
    components, parts, events = traced_components(paths[-1].read_bytes()), collections.Counter(), found[plane]
    steps = len({run for run, *_ in events})
    for name, nanoseconds in times_of(events, plane == "/host:CPU").items():
        parts[components.get(name, ("other", "forward"))] += nanoseconds / 1e9 / steps
    return parts, (max(e[2] for e in events) - min(e[1] for e in events)) / 1e9 / steps, steps


def describe_trace(run_dir, reports):
    """Prints where the time of the traced steps went, beside the estimates of {topology: what preflight returned}."""
    parts, seconds, steps = read_trace(run_dir)
    busy, tables = sum(parts.values()), {f"{name}, estimate": x["parts"] for name, x in reports.items() if x["fits"]}
    print(f"trace   {steps} steps of {1e3 * seconds:.1f} ms, of which train_step runs {1e3 * busy:.1f} ms")
    show_parts(tables | {"measured": parts})


# %% [markdown]
# # Part II: machinery
#
# The subject of this notebook is another notebook: its cells that are not tagged `run` become a module. Its train step
# goes as [StableHLO](https://docs.jax.dev/en/latest/export/export.html) to a process of its own that compiles it.


# %% Load a notebook cellView="form" tags=["shared"]
# @title Load a notebook
def load_notebook(name):
    """Returns a notebook, .py or .ipynb, as a module of its code cells not tagged `run`, without lines of % and !.

    It is looked for here, beside this file, and on GitHub. Raises InputError if it is nowhere, or no notebook."""
    paths = Path(name).expanduser().absolute(), Path(globals().get("__file__", "")).absolute().parent / name
    path = next((path for path in paths if path.is_file()), None)
    url = path.as_uri() if path else f"https://raw.githubusercontent.com/{GITHUB}/main/{name}"
    try:
        data = urllib.request.urlopen(url, timeout=30).read()
    except (OSError, ValueError) as error:
        raise InputError(f"notebook={name!r}: there is no such file here, and none at {url} ({error})") from error
    try:
        if name.endswith(".ipynb"):
            cells = [cell for cell in json.loads(data)["cells"] if cell["cell_type"] == "code"]
            cells = ["".join(cell["source"]) for cell in cells if "run" not in cell["metadata"].get("tags", [])]
            code = re.sub(r"^ *[%!].*", "", "\n".join(cells), flags=re.M)
        else:
            run = re.compile(r'# %%.*(\[markdown\]|tags=\[[^\]]*"run")')
            cells = re.split(r"^(?=# %%)", data.decode(), flags=re.M)
            code = "".join("\n" * cell.count("\n") if run.match(cell) else cell for cell in cells)  # line numbers stay
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"notebook={name!r}: {path or url} is no notebook ({error!r})") from error
    title, file = f"subject_{Path(name).stem}", str(path or url)
    linecache.cache[file] = len(code), None, code.splitlines(True), file  # a traceback shows the line
    module = sys.modules[title] = type(sys)(title)  # before the code runs: dataclasses look their module up
    if path:
        module.__file__ = file  # beside it is the embedded corpus
    if "get_ipython" in globals():
        module.get_ipython = get_ipython  # noqa: F821  by which the subject knows that it is in a notebook
    exec(compile(code, file, "exec", dont_inherit=True), module.__dict__)
    if not hasattr(module, "train_step"):
        raise InputError(f"notebook={name!r}: has no train_step; 02_train.py has one")
    return module


# %% The subject cellView="form"
# @title The subject
def on_topology(config, topology):
    """Returns config on the chips of a topology, with a TPU's attention; mesh='auto' becomes (all chips, 1)."""
    nb, chips = sys.modules[type(config).__module__], parse_topology(topology)[1]
    config = config.replace(mesh=(chips, 1)) if config.mesh == "auto" else config
    if config.devices != chips:
        raise InputError(f"mesh={config.mesh}: data · fsdp must be the {chips} chips of {topology}")
    return config.replace(attn_impl=nb.choose_attention(config, "tpu"))


# %% Compile cellView="form"
# @title Compile
# libtpu may crash, and jax's profiler may crash in a process that has loaded libtpu without a TPU.
COMPILER = """
import json, pathlib, sys
import jax, jax.export
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
folder, topology, donated, shape = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
step = jax.export.deserialize((folder / "step").read_bytes())
host = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
devices = topologies.get_topology_desc(topology, "tpu", **host).devices
mesh = Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), ("data", "fsdp"))
replicated = NamedSharding(mesh, PartitionSpec())
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
}  # fmt: skip
# The SparseCores of a v6e run its collectives beside the arithmetic. cloud/host.sh sets the same flags on real hosts;
# LOG.md has what each is worth. The libtpu of jax 0.7.2 does not know nd_reduce_scatter, and ends the process.
OFFLOADED = ["all_gather", "reduce_scatter", "all_reduce"] + ["nd_reduce_scatter"] * (jax.__version_info__ >= (0, 10))
COLLECTIVE_FLAGS = "--xla_tpu_prefer_async_allgather_to_allreduce=true " + " ".join(
    f"--xla_tpu_enable_sparse_core_collective_offload_{name}=true" for name in OFFLOADED
)


def find_libtpu():
    """Returns {} if the libtpu that this jax asks for is installed, else {'TPU_LIBRARY_PATH': one in ~/.cache/tpuchat}.
    Another version may crash where no TPU is, as that of Colab's TPU runtime does. Raises InputError if pip fails."""
    package = next(x for x in importlib.metadata.requires("jax") if x.startswith("libtpu")).partition(";")[0].strip()
    spec, path = importlib.util.find_spec("libtpu"), os.environ.get("TPU_LIBRARY_PATH")
    theirs = spec and str(Path(spec.origin).with_name("libtpu.so"))  # an import of jax sets the variable to it
    installed = importlib.metadata.version("libtpu") if spec else ""
    if path not in (None, theirs) or f"{installed}.".startswith(package[8:].rstrip("*")):
        return {}
    folder = Path.home() / ".cache" / "tpuchat" / package.replace("==", "-").rstrip(".*")
    if not folder.exists():
        print(f"installing {package} into {folder}, beside the runtime", flush=True)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", f"{folder}.new"]
        if subprocess.run([*command, package]).returncode:
            raise InputError(f"cannot install {package}; check the network: pip download {package!r}")
        os.replace(f"{folder}.new", folder)
    return {"TPU_LIBRARY_PATH": str(folder / "libtpu" / "libtpu.so")}


Compiled = collections.namedtuple("Compiled", "text peak arguments")  # the program, and bytes of HBM of a chip


class CompileError(RuntimeError):
    """The TPU's compiler refuses a program; its own words."""


def compile_for(topology, step, args, donated=0, mesh=(1, 1), bundles=None):
    """Returns step(*args), Compiled for a topology in a mesh (data, fsdp). Raises CompileError or InputError.

    args: shapes with shardings, of which the first `donated` become the first results. bundles: a folder for bundles.
    """
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise InputError("the TPU's compiler runs on Linux on x86_64 alone; training works here")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "step").write_bytes(jax.export.export(jax.jit(step), platforms=["tpu"])(*args).serialize())
        flags = [COLLECTIVE_FLAGS] if math.prod(mesh) > 1 else []
        flags += [f"--xla_jf_dump_to={bundles} --xla_jf_dump_llo_pass_label_regex=final_bundles"] if bundles else []
        flags = " ".join([*flags, os.environ.get("LIBTPU_INIT_ARGS", "")])  # yours come last, and win
        environment = os.environ | COMPILER_ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags} | find_libtpu()
        topology += "" if ":" in topology else ":1x1"
        command = [sys.executable, "-c", COMPILER, folder, topology, str(donated), json.dumps(mesh)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if (folder / "error").exists():
            raise CompileError((folder / "error").read_text())
        if done.returncode:
            words = re.findall(r"^F\d{4} .*?\] (.*)", done.stderr, re.M) or done.stderr.strip().split("\n")[-1:]
            raise CompileError(f"the compiler itself crashed (another device_batch_size may do): {words[0]}")
        return Compiled(*json.loads((folder / "answer").read_text()))


def compile_step(config, topology):
    """Returns the train step of a Config on a topology, Compiled, its state donated. Raises CompileError."""
    nb, Shape = sys.modules[type(config).__module__], jax.ShapeDtypeStruct
    place = nb.sharding if config.devices > 1 else lambda *_: None
    specs = jax.tree.map(lambda x: place(config, *nb.weight_spec(config, x.shape)), nb.state_shapes(config))
    state = jax.tree.map(lambda x, s: Shape(x.shape, x.dtype, sharding=s), nb.state_shapes(config), specs)
    tokens = Shape(config.batch_shape, "int32", sharding=place(config, None, nb.ROWS))
    leaves, tree = jax.tree.flatten((state, tokens, tokens))

    def step(*leaves):
        return jax.tree.leaves(nb.train_step(config, *jax.tree.unflatten(tree, leaves)))

    return compile_for(topology, step, leaves, len(leaves) - 2, config.mesh_shape)


def attention_kernels(config, chip):
    """Returns {(kernel, window): seconds a layer} of fused or splash attention, whose kernels are compiled alone."""
    nb, seconds = sys.modules[type(config).__module__], {}
    T, H, N, K = config.seq_len, config.head_dim, config.n_head, config.kv_heads
    alone = config.replace(mesh=(1, 1), device_batch_size=1, total_batch_size=-1)
    shapes = [jax.ShapeDtypeStruct((2 * T, n * H), config.compute_dtype) for n in (N, K, K, N)]
    for window in set(config.windows) if config.attn_impl in ("fused", "splash") else ():

        def step(q, k, v, g, window=window):
            y, pullback = jax.vjp(lambda *qkv: nb.attend(alone, *qkv, T, window), q, k, v)
            return y, *pullback(g)

        blocks = grid(T, min(T, config.splash_block_size), window) if config.attn_impl == "splash" else (1, 1, N // K)
        with tempfile.TemporaryDirectory() as folder:
            compile_for(chip, step, shapes, bundles=folder)
            for path in Path(folder).glob("*[0-9]-final_bundles.txt"):
                if name := KERNEL.search(path.name):
                    one = head_seconds(path.read_text(errors="replace"), chip, *blocks)
                    seconds[name[0], window] = config.device_batch_size * N * one
    return seconds


def explain(error):
    """Returns (why a program does not compile, in a sentence, and the bytes of HBM that it would take, or None)."""
    size, text = r"([\d.]+)([KMG]?)", str(error)  # a libtpu has one of three ways to say it
    oom = re.search(rf"(?:memory required\D*\(|Used |\(size=){size}\)? (?:exceeds\D*|of |would\D*){size}", text)
    if not oom:
        return " ".join(text.split())[:300], None
    needed, limit = (float(oom[i]) * 2 ** (10 * " KMG".index(oom[i + 1] or " ")) for i in (1, 3))
    return f"out of HBM: needs {needed / 2**30:.2f} of {limit / 2**30:.2f} GiB", needed


# %% Report and command line cellView="form"
# @title Report and command line
def describe(config, chip, compiled, answer, rate, mfu):
    """Prints the memory of a step on each chip, its time, what they mean for the run, and where the time goes."""
    tokens, several = config.tokens_per_step, config.devices > 1
    nb = sys.modules[type(config).__module__]
    units = nb.UNITS.get(chip.kind, 0)
    if config.credits and not units:
        raise InputError(f"credits={config.credits}: the price of this chip is not known; give hours")
    budget = config.hours or config.credits and config.credits / units / config.devices  # hours
    steps = int(3600 * budget / answer.seconds) or config.total_steps
    peak, hbm, arguments = (size / 2**30 for size in (compiled.peak, chip.hbm, compiled.arguments))
    print(f"fits    {peak:.2f} GiB of {hbm:.2f} at the peak, {arguments:.2f} of them weights, moments and tokens")
    each = f", {rate / config.devices:,.0f} a chip" if several else ""
    print(f"time    {1e3 * answer.seconds:.1f} ms a step of {tokens:,} tokens: {rate:,.0f} tok/s{each}, MFU {mfu:.1%}")
    hours = steps * answer.seconds / 3600
    price = f", {c:,.1f} credits, ${c * nb.UNIT_DOLLARS:,.2f}" if (c := hours * units) and not several else ""
    print(f"run     {steps:,} steps, {steps * tokens / 1e9:,.2f}B tokens: {hours:,.2f} hours{price}, of training alone")
    if several:
        sent, exposed, share = 1e3 * answer.sent, 1e3 * answer.exposed, answer.exposed / answer.seconds
        print(f"send    {sent:.2f} ms, of which {exposed:.2f} are not beside arithmetic: {share:.1%} of the step")
    show_parts({"estimate": answer.parts})
    print("AdamW counts as the matmul of a gradient where the compiler fuses it; copies beside arithmetic do not count")
    if names := answer.uncounted:
        print(f"NOT counted but for their bytes: the kernels {', '.join(names[:4])}, {len(names)} in all")


def show_parts(tables):
    """Prints {label: Counter of (component, direction): seconds} side by side, in the order of the last one."""
    *_, last = tables.values()
    print(" " * 24 + "".join(f" {label:>27}" for label in tables))
    print(f"{'ms':>24}" + "   forward  backward   share" * len(tables))
    names = {name for table in tables.values() for name, _ in table}
    for name in sorted(names, key=lambda name: -last[name, "forward"] - last[name, "backward"]):
        line = f"{name:>24}"
        for table in tables.values():
            forward, backward = 1e3 * table[name, "forward"], 1e3 * table[name, "backward"]
            line += f" {forward:9.2f} {backward:9.2f} {(forward + backward) / 1e3 / table.total():7.1%}"
        print(line)


USAGE = """05_preflight.py [NOTEBOOK] [TOPOLOGY ...] [OPTION ...] asks the TPU's compiler about the train step of
NOTEBOOK (02_train.py) on each TOPOLOGY: v6e, v5e, all of them, or a slice such as v6e:2x4. Options besides its
Config's: --scaling CHIP compiles for 1, 8 and 64 chips, and draws it; --trace RUN_DIR prints where the time of a run
went; --preset NAME begins with a named Config. Exit status: 0 if every step fits, 1 if not, 2 for a wrong option.
05_preflight.py plan [v6e | v5e] --credits C [C ...] or --hours H [H ...] prints what each size can learn with a budget;
--price P: credits of an hour, for a chip without a known price."""


def parse_command(argv):
    """Returns (notebook, [topology], options, the options of the Config). Raises InputError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--scaling", choices=CHIPS)
    parser.add_argument("--trace")
    parser.add_argument("--preset")
    parser.add_argument("--help", action="store_true")
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    try:
        options, rest = parser.parse_known_args(argv[len(words) :])
    except argparse.ArgumentError as error:
        raise InputError(f"{error} (--help lists the options)") from error
    notebook = words.pop(0) if words and words[0].endswith((".py", ".ipynb")) else "02_train.py"
    words = words or ["v6e"] * (not (options.scaling or options.trace))
    topologies = [name for word in words for name in (CHIPS if word == "all" else [word]) if parse_topology(name)]
    return notebook, topologies, options, ["--help"] if options.help else rest


def parse_plan(argv):
    """Returns the arguments of plan, a dict. Raises InputError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("chip", nargs="?", choices=CHIPS, default="v6e")
    for name in ("--credits", "--hours"):
        parser.add_argument(name, nargs="+", type=float, default=[])
    parser.add_argument("--price", type=float)
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(f"{error} (--help lists the options)") from error
    numbers = [*options.credits, *options.hours, *([] if options.price is None else [options.price])]
    if rest or not options.credits + options.hours or not all(0 < x < math.inf for x in numbers):
        raise InputError(f"plan {' '.join(argv)}: give --credits or --hours, above 0, such as: plan --credits 12")
    return vars(options)


def main(argv):
    """Does what the command line asks. Returns the exit status; a wrong option is one line on stderr, and 2."""
    try:
        if argv[:1] == ["plan"]:
            if "--help" not in argv:
                plan(**parse_plan(argv[1:]))
                return 0
            argv = ["--help"]
        notebook, topologies, options, rest = parse_command(argv)
        nb, path = load_notebook(notebook), Path(options.trace or "", "config.json")
        if options.preset and options.preset not in (presets := getattr(nb, "PRESETS", ())):
            raise InputError(f"preset={options.preset!r}: must be one of {', '.join(presets) or 'none'}")
        config = getattr(nb.Config, options.preset or "", nb.Config)()
        if options.trace and path.is_file():
            config = config.replace(**json.loads(path.read_text()))
        config = nb.parse_args(rest, config, USAGE)
        reports = {name: preflight(config, name) for name in topologies}
        if options.trace:
            describe_trace(options.trace, reports)
        scaled = scaling(config, options.scaling) if options.scaling else True
        return 0 if scaled and all(report["fits"] for report in reports.values()) else 1
    except ValueError as error:
        if type(error).__name__ != "InputError":  # this notebook's or the subject's: each has a class of its own
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


# %% [markdown]
# # Part III: run
#
# As a script: `python 05_preflight.py 02_train.py v6e:2x4 --mesh 1x8`, or `python 05_preflight.py plan --credits 12`.
# OPTIONS are the same as there. TOPOLOGIES are one or several of `v6e`, `v5e` and slices such as `v6e:2x4`. SCALING
# asks about 1, 8 and 64 chips: that takes minutes. TRACE is a run folder, which may come from another machine. CREDITS
# above 0 plans a budget of a v6e: that compiles ten models.

# %% As a script tags=["run"]
jax.config.update("jax_platforms", "cpu")  # a TPU that is here stays free: the compiler needs none
if not IN_NOTEBOOK:
    raise SystemExit(main(sys.argv[1:]))

# %% Configure tags=["run"]
NOTEBOOK = "02_train.py"  # @param ["02_train.py", "04_maxtext.py", "06_recipe.py"] {allow-input: true}
OPTIONS = ""  # @param {type: "string"}
nb = load_notebook(NOTEBOOK)
config = nb.parse_args(OPTIONS.split(), nb.Config())

# %% Ask the compiler tags=["run"]
TOPOLOGIES = "v6e"  # @param {type: "string"}
SCALING = ""  # @param ["", "v6e", "v5e"]
TRACE = ""  # @param {type: "string"}
reports = {name: preflight(config, name) for name in parse_command(TOPOLOGIES.split())[1]}
if TRACE:
    describe_trace(TRACE, reports)
if SCALING and (picture := scaling(config, SCALING)):
    from IPython.display import Image, display

    display(Image(str(picture)))

# %% Plan tags=["run"]
CREDITS = 0  # @param {type: "number"}
if CREDITS:
    from IPython.display import Image, display

    display(Image(str(plan(credits=[CREDITS]))))
