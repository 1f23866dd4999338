"""The whole train step compiled for a TPU that is not there, by the TPU's own compiler, on a host that is a CPU.

A kernel that does not fit its chip, an implementation that cannot be lowered for it, a donation that its layouts defeat
and a promoted matmul show here, before a chip is paid for. The model is as small as the kernels' tiles allow.
"""

import functools
import importlib.util
import math
import platform
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools.notebooks import load

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(
        platform.system() != "Linux" or platform.machine() != "x86_64",
        reason=f"libtpu is for Linux on x86_64, not {platform.system()} on {platform.machine()}",
    ),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

T = 256  # no other dimension is as long, so two of them in one shape are attention scores
LINE_PADDING = 512  # bytes that a TPU sets aside for a scalar


def small_config(nb, impl, accumulate=1):
    """Two layers, S and L, of 3 query heads that share one key/value head; two tiles in a sequence."""
    return nb.Config(
        n_head=3, n_kv_head=1, head_dim=128, aspect_ratio=192, vocab_size=512, seq_len=T, splash_block_size=128,
        window_pattern="L" if impl == "pallas" else "SL", attn_impl=impl, device_batch_size=2,
        total_batch_size=accumulate * 2 * T,
    )  # fmt: skip


def maxtext_config(mt, accumulate):
    """The same of 04_maxtext.py; its dimensions are multiples of 256, and T is none of the others."""
    return mt.Config(
        n_embd=512, n_layer=2, mlp_dim=768, n_head=2, n_kv_head=1, vocab_size=1024, seq_len=5 * 256,
        device_batch_size=1, total_batch_size=accumulate * 5 * 256,
    )  # fmt: skip


@pytest.fixture(scope="module")
def compile_step(nb):
    """(chip, impl, accumulate) -> (abstract state, tokens, compiled train step); each is compiled once. The impl
    "maxtext" is 04_maxtext.py, with its default."""
    from jax.experimental import topologies
    from jax.experimental.compilation_cache import compilation_cache

    @functools.cache
    def compile_for(chip, impl, accumulate):
        topology = topologies.get_topology_desc(f"{chip}:1x1", "tpu", chips_per_host_bounds=(1, 1, 1))
        place = jax.sharding.SingleDeviceSharding(topology.devices[0])
        module = load(ROOT / "04_maxtext.py") if impl == "maxtext" else nb
        config = maxtext_config(module, accumulate) if impl == "maxtext" else small_config(nb, impl, accumulate)
        tokens = jax.ShapeDtypeStruct((config.tokens_per_step // config.seq_len, config.seq_len), jnp.int32)
        abstract = jax.eval_shape(lambda: module.init_train_state(config)), tokens, tokens
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract)
        return *abstract[:2], module.train_step.lower(config, *args).compile()

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # read when libtpu is loaded: others may use it as well
        environment.setenv("TPU_SKIP_MDS_QUERY", "1")  # nobody is asked over the network what chip this is
        cached = jax.config.jax_enable_compilation_cache  # it writes a topology's programs, but cannot read them
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # or it remembers that it was on
        yield compile_for
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()


def text_of(compiled):
    """The program's text, where this jaxlib can read it: 0.10, the last for Python 3.11, cannot read all."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        if jax.__version_info__ >= (0, 11):
            raise
        pytest.skip(f"jaxlib {jax.__version__} cannot read it: {str(error).splitlines()[0][:80]}")


PROGRAMS = [("v6e", impl, 1) for impl in ("auto", "einsum", "jax", "splash", "pallas")] + [
    ("v5e", "auto", 2),
    ("v6e", "maxtext", 1),
]


@pytest.mark.parametrize(("chip", "impl", "accumulate"), PROGRAMS)
def test_attention_is_the_kernel_asked_for(compile_step, chip, impl, accumulate):
    """`auto` is our fused one, as the chip compiled for decides, not the host. Two layers have two kernels each,
    forward and backward, or with jax's three: forward, dq, dkv."""
    *_, compiled = compile_step(chip, impl, accumulate)
    calls = re.findall(r"^ *(?:ROOT )?%(\S+) = .*custom_call_target=\"tpu_custom_call\"", text_of(compiled), re.M)
    kernel = {"auto": "attention", "maxtext": "attention", "splash": "splash_mha", "pallas": "flash"}.get(impl)
    assert len(calls) == {"auto": 4, "maxtext": 4, "splash": 6, "pallas": 6}.get(impl, 0), calls
    assert all(kernel in name for name in calls), calls


@pytest.mark.parametrize(("chip", "impl", "accumulate"), PROGRAMS)
def test_the_whole_state_is_donated(compile_step, chip, impl, accumulate):
    """Every array of it: the new state takes the bytes of the old one, and the only other arguments are the tokens."""
    state, tokens, compiled = compile_step(chip, impl, accumulate)
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
    memory = compiled.memory_analysis()
    assert len(re.findall(r"\(\d+, \{\}, (?:may|must)-alias\)", text_of(compiled).split("\n")[0])) == len(sizes)
    assert memory.alias_size_in_bytes == sum(max(size, LINE_PADDING) for size in sizes)
    assert memory.argument_size_in_bytes == memory.alias_size_in_bytes + 2 * tokens.size * 4
    assert memory.peak_memory_in_bytes > memory.argument_size_in_bytes


def matmuls(text):
    """[(scope, [shape of the result and of both operands, as 'bf16[2,256]'])] of an HLO text; a TPU's matmuls are
    convolutions."""
    shapes = dict(re.findall(r"^ *(?:ROOT )?%(\S+) = (\w+\[[\d,]*\])", text, re.M))
    found = []
    for line in text.split("\n"):
        if match := re.search(r"%(\S+) = \S+ (?:convolution|dot)\(([^)]*)\)", line):
            operands = re.findall(r"%([^\s,]+)", match[2])
            scope = re.search(r'op_name="([^"]*)"', line)
            found.append((scope[1] if scope else "", [shapes[name] for name in (match[1], *operands)]))
    return found


@pytest.mark.parametrize(("chip", "impl", "accumulate"), PROGRAMS)
def test_no_matmul_of_the_layers_is_promoted(compile_step, chip, impl, accumulate):
    """All operands are bfloat16. The head's are not looked at, nor those of attention scores, which are float32 where
    XLA computes them. A layer has 6 matmuls, with 12 in the backward pass; some may be done twice or be merged."""
    *_, compiled = compile_step(chip, impl, accumulate)
    found = matmuls(text_of(compiled))
    assert len([scope for scope, _ in found if "(loss)" in scope]) == 3  # so scopes are to be had
    layers = [
        (scope, shapes)
        for scope, shapes in found
        if "(loss)" not in scope and not any(shape.split("[")[1][:-1].split(",").count(str(T)) > 1 for shape in shapes)
    ]
    assert len(layers) >= 30
    assert not [(scope, shapes) for scope, shapes in layers if not all(x.startswith("bf16") for x in shapes[1:])]


PEAK_KIB = {  # of each program, by libtpu 0.0.42, 0.0.50 and 0.0.52; 5% above it wants a reason and a new number
    ("v6e", "auto", 1): 78_231, ("v6e", "einsum", 1): 78_391, ("v6e", "jax", 1): 77_334, ("v6e", "splash", 1): 77_463,
    ("v6e", "pallas", 1): 77_590, ("v5e", "auto", 2): 93_252, ("v6e", "maxtext", 1): 124_352,
}  # fmt: skip


@pytest.mark.parametrize(("chip", "impl", "accumulate"), PROGRAMS)
def test_peak_memory_does_not_grow(compile_step, chip, impl, accumulate):
    *_, compiled = compile_step(chip, impl, accumulate)
    assert compiled.memory_analysis().peak_memory_in_bytes / 1024 < 1.05 * PEAK_KIB[chip, impl, accumulate]


@pytest.mark.parametrize(("chip", "impl", "accumulate"), PROGRAMS)
def test_weights_are_cast_once(compile_step, chip, impl, accumulate):
    """To bfloat16 before the first layer and the first microbatch, and no array of a weight's size goes from one type
    to the other in a layer, forward or backward."""
    state, _, compiled = compile_step(chip, impl, accumulate)
    sizes = {x.size for layer in state.params["layers"] for x in layer.values() if x.ndim > 1}  # no activation's
    casts = re.findall(r"= (f32|bf16)\[([\d,]+)\]\S* convert\(.*?op_name=\"([^\"]*)\"", text_of(compiled))
    casts = [(dtype, math.prod(map(int, shape.split(","))), scope) for dtype, shape, scope in casts]
    casts = [cast for cast in casts if cast[1] in sizes]
    assert {size for dtype, size, _ in casts if dtype == "bf16"} == sizes  # so there is something to see
    assert not [cast for cast in casts if "layer_" in cast[2] or (cast[0] == "bf16" and "while" in cast[2])]


def test_the_host_stays_a_cpu(compile_step):
    compile_step("v6e", "auto", 1)
    assert jax.default_backend() == "cpu" and float(jnp.sum(jnp.asarray(np.ones(3)))) == 3
