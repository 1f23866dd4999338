"""Our fused attention kernel, interpreted, against the plain formulation of the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import differ, interpreted, take_steps

CASES = [  # N, K, T, H, window: tiles of 512, 256 and 128 queries, groups, windows that end inside a tile of keys
    (2, 2, 512, 128, 512), (4, 2, 512, 128, 200), (3, 1, 1024, 128, 512), (2, 2, 768, 128, 300), (4, 1, 384, 256, 384),
    (1, 1, 128, 128, 5), (2, 1, 256, 128, 1),
]  # fmt: skip


def projections(N, K, T, H, B=2, dtype=jnp.float32):
    """q, k, v and a gradient, as the matmuls leave them: [B·T, N·H], [B·T, K·H]."""
    return [jax.random.normal(jax.random.key(i), (B * T, n * H), dtype) for i, n in enumerate((N, K, K, N))]


def attend(nb, impl, N, K, T, H, window, q, k, v, g):
    """What attend returns, and the gradients of q, k and v."""
    config = nb.Config(n_head=N, n_kv_head=K, head_dim=H, seq_len=T, aspect_ratio=N * H, attn_impl=impl)

    @jax.jit
    def run(q, k, v, g):
        y, pullback = jax.vjp(lambda *qkv: nb.attend(config, *qkv, T, window), q, k, v)
        return y, *pullback(g)

    with interpreted():
        return run(q, k, v, g)


@pytest.mark.parametrize("case", CASES)
def test_fused_attention(nb, case):
    """Forward and the three gradients in float32, against the plain functions: sums of some hundred terms, each of
    which is rounded at 6e-8. The worst seen is 1.5e-6 of the largest entry."""
    arrays = projections(*case[:4])
    for have, want in zip(attend(nb, "fused", *case, *arrays), attend(nb, "einsum", *case, *arrays), strict=True):
        assert have.shape == want.shape and have.dtype == want.dtype
        assert differ(have, want) < 5e-6


@pytest.mark.parametrize("case", CASES[1:5:3])
def test_fused_attention_in_bfloat16(nb, case):
    """Against float32 from the same inputs: turned heads, probabilities and results are rounded to 8 bits each, 2^-9,
    and the sums are kept in float32."""
    arrays = projections(*case[:4], dtype=jnp.bfloat16)
    wants = attend(nb, "einsum", *case, *(x.astype(jnp.float32) for x in arrays))
    for have, want in zip(attend(nb, "fused", *case, *arrays), wants, strict=True):
        assert have.dtype == jnp.bfloat16 and differ(have, want) < 2**-6


@pytest.mark.parametrize("window", [256, 100, 0])
def test_fused_attention_sees_what_it_should(nb, window):
    """A key and a value that change at s change the queries s … s + window, and not one bit of any other."""
    T, H = 256, 128
    places, t = np.array([0, 100, 127, 128, T - 1]), np.arange(T)
    here = jnp.asarray(places[:, None] == t).reshape(-1, 1)  # a sequence for each place
    q, k, v, g = (jnp.tile(x, (len(places), 1)) for x in projections(1, 1, T, H, B=1))

    def run(k, v):
        return np.asarray(attend(nb, "fused", 1, 1, T, H, window, q, k, v, g)[0])

    changed = (run(jnp.where(here, -k, k), jnp.where(here, v + 100, v)) != run(k, v)).any(1).reshape(len(places), T)
    np.testing.assert_array_equal(changed, (places[:, None] <= t) & (t <= places[:, None] + window))


def test_large_projections_do_not_overflow(nb):
    """The softmax has no running maximum: QK-norm bounds the scores, whatever the projections are."""
    case = (2, 2, 256, 128, 256)
    q, _, v, g = projections(*case[:4])
    arrays = 1e4 * q, 1e4 * q, v, g  # keys equal to their queries: the scores on the diagonal are the bound, √H
    for have, want in zip(attend(nb, "fused", *case, *arrays), attend(nb, "einsum", *case, *arrays), strict=True):
        assert np.isfinite(have).all() and differ(have, want) < 2e-5


@pytest.mark.parametrize("impl", ["fused", "splash"])
def test_a_model_trains_with_kernels(nb, impl):
    """Two steps of the whole model, S and L layers, from one state: the losses of einsum, to float32's rounding."""
    config = nb.Config(
        n_head=2, n_kv_head=1, head_dim=128, aspect_ratio=128, vocab_size=300, seq_len=128, device_batch_size=2,
        compute_dtype="float32", num_iterations=2, learning_rate=0.01, window_pattern="SL", splash_block_size=128,
    )  # fmt: skip
    with interpreted():
        _, have = take_steps(nb, config.replace(attn_impl=impl), 2)
    np.testing.assert_allclose(have, take_steps(nb, config.replace(attn_impl="einsum"), 2)[1], rtol=1e-5)


class FakeGpu:
    def __init__(self, capability):
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("capability", "H", "dtype", "takes"),
    [("9.0", 128, jnp.bfloat16, True), ("9.0", 256, jnp.bfloat16, True), ("8.0", 256, jnp.bfloat16, False),
     ("8.9", 64, jnp.bfloat16, True), ("7.5", 64, jnp.bfloat16, False), ("9.0", 128, jnp.float32, False),
     ("9.0", 100, jnp.bfloat16, False), ("gfx90a", 128, jnp.bfloat16, False), (None, 128, jnp.bfloat16, False)],
)  # fmt: skip
def test_when_cudnn_is_taken(nb, monkeypatch, capability, H, dtype, takes):
    """By NVIDIA's own rule: compute capability 8.0, heads of at most 128, or 256 from 9.0 on, in steps of 8."""
    asked = []

    def attention(q, k, v, *, implementation, **_):
        asked.append(implementation)
        return q

    monkeypatch.setattr(jax, "devices", lambda: [FakeGpu(capability) if capability else object()])
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    q = jnp.zeros((2, 4, 128, H), dtype)
    assert nb.attention(q, q, q, window=128, impl="jax").shape == q.shape
    assert asked == ["cudnn" if takes else None]


CHOICES = [  # seq_len, head_dim, splash_block_size: what auto means on a TPU
    (2048, 128, 1024, "fused"), (4096, 128, 1024, "fused"), (8192, 128, 1024, "splash"), (2048, 64, 1024, "splash"),
    (2048, 64, 768, "jax"), (100, 128, 1024, "jax"), (128, 64, 1024, "splash"),
]  # fmt: skip


@pytest.mark.parametrize(("T", "H", "block", "on_tpu"), CHOICES)
def test_what_auto_means(nb, T, H, block, on_tpu):
    """The fastest that takes the shapes, for each platform; a name means itself everywhere; the choice is valid."""
    config = nb.Config(seq_len=T, head_dim=H, splash_block_size=block)
    chosen = [nb.choose_attention(config, platform) for platform in ("tpu", "gpu", "cpu")]
    assert chosen == [on_tpu, "jax", "einsum"]
    for impl in chosen:
        assert nb.choose_attention(config.replace(attn_impl=impl), "tpu") == impl
        assert nb.choose_attention(config.replace(attn_impl=impl), "cpu") == impl
