"""The whole train step compiled for a TPU that is not there, by the TPU's own compiler, on a host that is a CPU.

A kernel that does not fit its chip, an implementation that cannot be lowered for it, a donation that its layouts defeat
and a promoted matmul show here, before a chip is paid for. The model is as small as the kernels' tiles allow.
"""

import functools
import importlib.util
import math
import platform
import re

import jax
import pytest

from tests.helpers import ROOT
from tools.notebooks import load

LINUX = platform.system() == "Linux" and platform.machine() == "x86_64"
pytestmark = pytest.mark.skipif(
    not (LINUX and importlib.util.find_spec("libtpu")), reason="libtpu is for Linux on x86_64"
)
T = 256  # no other dimension is as long, so two of them in one shape are attention scores
LINE_PADDING = 512  # bytes that a TPU sets aside for a scalar
PEAK_KIB = {  # by libtpu 0.0.42, 0.0.50 and 0.0.52; 5% above it wants a reason and a new number
    ("v6e", "auto", 1): 78_231, ("v5e", "auto", 2): 93_252, ("v6e", "maxtext", 1): 124_352,
    ("v6e", "einsum", 1): 78_391, ("v6e", "jax", 1): 77_334, ("v6e", "splash", 1): 77_463, ("v6e", "pallas", 1): 77_590,
}  # fmt: skip
ALWAYS = list(PEAK_KIB)[:3]
PROGRAMS = [pytest.param(*key, marks=[] if key in ALWAYS else pytest.mark.slow) for key in PEAK_KIB]
KERNELS = {"auto": (4, "attention"), "maxtext": (4, "attention"), "splash": (6, "splash_mha"), "pallas": (6, "flash")}


def small_config(impl, accumulate):
    """Two layers, S and L, of 3 query heads that share one key/value head; two tiles in a sequence.

    The impl "maxtext" is 04_maxtext.py, whose dimensions are multiples of 256, and 5·T is none of the others.
    """
    if impl == "maxtext":
        return load(ROOT / "04_maxtext.py").Config(
            n_embd=512, n_layer=2, mlp_dim=768, n_head=2, n_kv_head=1, vocab_size=1024, seq_len=5 * T,
            device_batch_size=1, total_batch_size=accumulate * 5 * T,
        )  # fmt: skip
    return load(ROOT / "02_train.py").Config(
        n_head=3, n_kv_head=1, head_dim=128, aspect_ratio=192, vocab_size=512, seq_len=T, splash_block_size=128,
        window_pattern="L" if impl == "pallas" else "SL", attn_impl=impl, device_batch_size=2,
        total_batch_size=accumulate * 2 * T,
    )  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    """(chip, impl, accumulate) -> (state, tokens as shapes, compiled train step); each is compiled once."""
    from jax.experimental import topologies
    from jax.experimental.compilation_cache import compilation_cache

    @functools.cache
    def compile_step(chip, impl, accumulate):
        topology = topologies.get_topology_desc(f"{chip}:1x1", "tpu", chips_per_host_bounds=(1, 1, 1))
        place = jax.sharding.SingleDeviceSharding(topology.devices[0])
        config = small_config(impl, accumulate)
        nb = load(ROOT / ("04_maxtext.py" if impl == "maxtext" else "02_train.py"))
        config = config.replace(attn_impl=nb.choose_attention(config, "tpu"))
        tokens = jax.ShapeDtypeStruct(config.batch_shape, "int32")
        shapes = nb.state_shapes(config), tokens, tokens
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
        return *shapes[:2], nb.train_step.lower(config, *args).compile()

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # read when libtpu is loaded: others may use it as well
        environment.setenv("TPU_SKIP_MDS_QUERY", "1")  # nobody is asked over the network what chip this is
        cached = jax.config.jax_enable_compilation_cache  # it writes a topology's programs, but cannot read them
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # or it remembers that it was on
        yield compile_step
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()


def text_of(step):
    """The program's text, where this jaxlib can read it: 0.10, the last for Python 3.11, cannot read all."""
    try:
        return step.as_text()
    except jax.errors.JaxRuntimeError as error:
        if jax.__version_info__ >= (0, 11):
            raise
        pytest.skip(f"jaxlib {jax.__version__} cannot read it: {str(error).splitlines()[0][:80]}")


@pytest.mark.parametrize(("chip", "impl", "accumulate"), PROGRAMS)
def test_kernels_and_casts(compiled, chip, impl, accumulate):
    """`auto` is our fused kernel. Two layers have two kernels each, forward and backward, or with jax's three. Weights
    are cast to bfloat16 before the first layer and the first microbatch, and no array of a weight's size changes its
    type in a layer, forward or backward."""
    state, _, step = compiled(chip, impl, accumulate)
    text, (count, kernel) = text_of(step), KERNELS.get(impl, (0, ""))
    calls = re.findall(r"^ *(?:ROOT )?%(\S+) = .*custom_call_target=\"tpu_custom_call\"", text, re.M)
    assert len(calls) == count and all(kernel in name for name in calls), calls

    sizes = {x.size for layer in state.params["layers"] for x in layer.values() if x.ndim > 1}  # no activation's
    casts = re.findall(r"= (f32|bf16)\[([\d,]+)\]\S* convert\(.*?op_name=\"([^\"]*)\"", text)
    casts = [(dtype, math.prod(map(int, shape.split(","))), scope) for dtype, shape, scope in casts]
    casts = [cast for cast in casts if cast[1] in sizes]
    assert {size for dtype, size, _ in casts if dtype == "bf16"} == sizes  # so there is something to see
    assert not [cast for cast in casts if "layer_" in cast[2] or (cast[0] == "bf16" and "while" in cast[2])]


@pytest.mark.parametrize(("chip", "impl", "accumulate"), PROGRAMS)
def test_memory(compiled, chip, impl, accumulate):
    """Every array of the state is donated: the new state takes the bytes of the old one, and the only other arguments
    are the tokens. The peak does not grow."""
    state, tokens, step = compiled(chip, impl, accumulate)
    sizes, memory = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)], step.memory_analysis()
    assert memory.alias_size_in_bytes == sum(max(size, LINE_PADDING) for size in sizes)
    assert memory.argument_size_in_bytes == memory.alias_size_in_bytes + 2 * tokens.size * 4
    assert memory.argument_size_in_bytes < memory.peak_memory_in_bytes < 1.05 * 1024 * PEAK_KIB[chip, impl, accumulate]
    assert len(re.findall(r"\(\d+, \{\}, (?:may|must)-alias\)", text_of(step).split("\n")[0])) == len(sizes)


def matmuls(text):
    """[(scope, [shape of the result and of both operands])] of an HLO text; a TPU's matmuls are convolutions."""
    shapes, found = dict(re.findall(r"^ *(?:ROOT )?%(\S+) = (\w+\[[\d,]*\])", text, re.M)), []
    for line in text.split("\n"):
        if match := re.search(r"%(\S+) = \S+ (?:convolution|dot)\(([^)]*)\)", line):
            scope = re.search(r'op_name="([^"]*)"', line)
            names = match[1], *re.findall(r"%([^\s,]+)", match[2])
            found.append((scope[1] if scope else "", [shapes[name] for name in names]))
    return found


@pytest.mark.parametrize(("chip", "impl", "accumulate"), PROGRAMS)
def test_no_matmul_of_the_layers_is_promoted(compiled, chip, impl, accumulate):
    """All operands are bfloat16. The head's are not looked at, nor those of attention scores, which are float32 where
    XLA computes them. A layer has 6 matmuls, with 12 in the backward pass; some may be done twice or be merged."""
    found = matmuls(text_of(compiled(chip, impl, accumulate)[2]))
    assert len([scope for scope, _ in found if "(loss)" in scope]) == 3  # so scopes are to be had

    def scores(shape):
        return shape[:-1].partition("[")[2].split(",").count(str(T)) > 1

    layers = [shapes for scope, shapes in found if "(loss)" not in scope and not any(map(scores, shapes))]
    assert len(layers) >= 30
    assert not [shapes for shapes in layers if not all(x.startswith("bf16") for x in shapes[1:])]
    assert jax.default_backend() == "cpu"
