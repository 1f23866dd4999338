"""The step as it is lowered for an NVIDIA GPU that is not there: cuDNN's attention, and no scores in memory.

jax lowers for a GPU without one, once told which GPU it would be. What XLA makes of it is in the last test, which needs
jax's plugin for CUDA and is skipped without.
"""

import importlib.util
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

CALLS = re.compile(r"@__cudnn\$fmhaSoftmax(Backward)?\(")


@pytest.fixture
def on_gpu(monkeypatch):
    """A function that makes notebooks and jax believe in a GPU of a compute capability."""

    def believe(nb, capability):
        jax.clear_caches()  # a trace remembers the GPU before
        monkeypatch.setattr(nb, "cuda_capability", lambda _: capability)
        monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
        monkeypatch.setattr(cudnn, "check_compute_capability", lambda least: capability >= float(least))
        monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda it: capability == float(it))

    yield believe
    jax.clear_caches()


def lowered_step(nb, **changes):
    """(The StableHLO of a train step for CUDA, its Config)."""
    config = nb.Config(mesh=(1, 1), attn_impl="jax").replace(**changes)
    tokens = jax.ShapeDtypeStruct(config.batch_shape, jnp.int32)
    traced = nb.train_step.trace(config, nb.state_shapes(config), tokens, tokens)
    return traced.lower(lowering_platforms=("cuda",)).as_text(), config


def calls(text):
    """How often cuDNN is called, (forward, backward)."""
    found = CALLS.findall(text)
    return found.count(""), found.count("Backward")


def squares(text, T):
    """The types of arrays that have two axes of T after others: scores."""
    return set(re.findall(rf"tensor<\d+x(?:\d+x)*{T}x(?:\d+x)?{T}x\w+>", text))


def test_the_reference_calls_cudnn_in_each_layer(nb, on_gpu):
    """Windows of T/2 as cuDNN counts them, the query's own place included. No T × T array: scores stay on the chip."""
    on_gpu(nb, 9.0)
    text, config = lowered_step(nb)
    assert calls(text) == (config.depth, config.depth) and not squares(text, config.seq_len)
    windows = re.findall(r"sliding_window_length\\22: (\d+)", text)  # \22 is a quotation mark
    short = sum(window < config.seq_len for window in config.windows)
    assert windows.count("1025") == 2 * short == 24, windows


def test_the_wide_model_calls_cudnn_on_hopper_alone(mt, on_gpu):
    """04's heads of 256, two of them for keys and values; older GPUs take heads of at most 128."""
    for capability, count in ((9.0, 2), (8.0, 0)):
        on_gpu(mt, capability)
        text, config = lowered_step(mt, n_layer=2)
        assert calls(text) == (count, count)
        assert bool(squares(text, config.seq_len)) == (count == 0)


@pytest.mark.parametrize(
    ("capability", "dtype", "N", "K", "H", "expected"),
    [
        (8.0, "bfloat16", 4, 2, 64, True), (8.0, "bfloat16", 4, 1, 128, True), (8.0, "bfloat16", 4, 2, 136, False),
        (8.9, "bfloat16", 2, 2, 96, True), (9.0, "bfloat16", 4, 2, 256, True), (9.0, "bfloat16", 4, 2, 264, False),
        (9.0, "bfloat16", 4, 2, 100, False), (9.0, "float32", 4, 2, 128, False), (7.5, "bfloat16", 4, 2, 128, False),
        (10.0, "bfloat16", 4, 2, 128, True), (10.0, "bfloat16", 4, 2, 256, False), (0, "bfloat16", 4, 2, 128, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("window", [256, 100])
def test_what_cudnn_refuses_is_left_to_xla(nb, on_gpu, capability, dtype, N, K, H, expected, window):
    """Heads that are wide or odd, other dtypes, other GPUs: never an error."""
    on_gpu(nb, capability)
    q, k, v = (jax.ShapeDtypeStruct((2, heads, 256, H), dtype) for heads in (N, K, K))

    def run(q, k, v):
        return jax.grad(lambda q: nb.attention(q, k, v, window=window, impl="jax").astype(jnp.float32).sum())(q)

    text = jax.jit(run).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert calls(text) == ((1, 1) if expected else (0, 0))


def test_xla_compiles_it_without_transposes(root):
    """XLA's program for an H100: no array of T × T, and nothing that only moves. Its layouts make the transposes around
    attention free."""
    if not importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("needs jax[cuda13]")
    command = [sys.executable, "benchmarks/cuda.py", "--gpus", "H100", "--rows", "reference", "--batches", "4"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert "cuDNN (16, 16), T × T 0, moved 0.0 MiB" in done.stdout, done.stdout + done.stderr
