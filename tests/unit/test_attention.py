"""The four implementations of `attention` against a float64 reference that is written out row by row.

The kernels run in interpret mode, at T = 256 in tiles of 128: two tiles, so that a whole tile can be skipped.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import interpreted

T, N = 256, 4
FULL = T
IMPLS = ("einsum", "jax", "splash", "pallas")


def reference(q, k, v, cotangent, window):
    """(out, dq, dk, dv) in float64, one query at a time: no mask, no batching, only the definition."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    scale = 1 / np.sqrt(q.shape[-1])
    for b, n, t in np.ndindex(*q.shape[:3]):
        head = n // (q.shape[1] // k.shape[1])
        seen = slice(max(0, t - window), t + 1)
        keys, values = k[b, head, seen], v[b, head, seen]
        scores = keys @ q[b, n, t] * scale
        probs = np.exp(scores - scores.max())
        probs /= probs.sum()
        out[b, n, t] = probs @ values
        dprobs = values @ cotangent[b, n, t]
        dscores = probs * (dprobs - probs @ dprobs) * scale
        dq[b, n, t] = dscores @ keys
        dk[b, head, seen] += np.outer(dscores, q[b, n, t])
        dv[b, head, seen] += np.outer(probs, cotangent[b, n, t])
    return out, dq, dk, dv


def inputs(K=2, H=128, B=2, dtype=jnp.float32, norm=1.0, seq_len=T):
    """q, k, v and a cotangent; the entries of q and k have standard deviation `norm`, the scores norm²."""
    rng = np.random.default_rng(K * H)
    draw = [rng.normal(size=(B, heads, seq_len, H)) for heads in (N, K, K, N)]
    return [jnp.asarray(x * s, dtype) for x, s in zip(draw, (norm, norm, 1, 1), strict=True)]


def out_and_gradients(nb, impl, window, *arrays, block_size=128):
    call = functools.partial(nb.attention, window=window, impl=impl, block_size=block_size)

    @jax.jit
    def run(q, k, v, cotangent):
        out, vjp = jax.vjp(call, q, k, v)
        return out, *vjp(cotangent)

    with interpreted():
        return run(*arrays)


def check(nb, impl, window, arrays, tolerance):
    """Forward and the three gradients, each within `tolerance` of its largest entry."""
    have, want = out_and_gradients(nb, impl, window, *arrays), reference(*arrays, window)
    for name, x, y, like in zip(("out", "dq", "dk", "dv"), have, want, (arrays[0], *arrays[:3]), strict=True):
        assert x.shape == like.shape and x.dtype == like.dtype, name
        error = np.abs(np.asarray(x, np.float64) - y).max() / max(np.abs(y).max(), 1)
        assert error < tolerance, (name, error)


CASES = [(impl, window, 2) for impl in IMPLS for window in (FULL, T // 2, 100, 1, 0) if impl != "pallas"]
CASES += [(impl, 100, 4) for impl in IMPLS if impl != "pallas"] + [("pallas", FULL, 2)]


@pytest.mark.parametrize(("impl", "window", "K"), CASES)
def test_float32_parity(nb, impl, window, K):
    """Forward and gradients, for every window and grouping. Scores have standard deviation 9, so that a wrong scale,
    or one applied twice, is an error of order one. Such a score is a sum of 128 terms and up to 40, rounded at 6e-8:
    it is off by some 3e-6, and so, relatively, is its probability. The worst seen is 6e-6."""
    check(nb, impl, window, inputs(K, norm=3.0), tolerance=1.2e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_kv_head_of_64(nb, impl):
    """K = 1, and a head dim that is half of a TPU's lane width."""
    window = FULL if impl == "pallas" else 100
    check(nb, impl, window, inputs(K=1, H=64, B=1, norm=3.0), tolerance=1.2e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_parity(nb, impl):
    """With bfloat16 inputs the error is that of rounding a few numbers on the way (probabilities, the scaled queries
    of splash, the result) to 8 bits, 2⁻⁹ each: the sums are kept in float32. Not all of them by XLA on a CPU, though:
    the gradient of v as einsum and jax write it becomes a loop that adds up 256 terms in bfloat16."""
    window = FULL if impl == "pallas" else 100
    tolerance = 2**-7 if impl in ("splash", "pallas") else 2**-5
    check(nb, impl, window, inputs(B=1, dtype=jnp.bfloat16), tolerance)


PROBES = [(impl, window) for impl in IMPLS for window in (FULL, 100, 0) if impl != "pallas" or window == FULL]


@pytest.mark.parametrize(("impl", "window"), PROBES)
def test_probe(nb, impl, window):
    """Changing the key and value at s changes the queries s … s + window, and not one bit of any other: nothing sees
    the future, and the window is not one too long or too short. Changing the query at t changes only the output t."""
    places, t = np.array([0, 100, 127, 128, T - 1]), np.arange(T)
    here = jnp.asarray((places[:, None] == t)[:, None, :, None])  # [B, 1, T, 1], another place in each sequence
    q, k, v = (jnp.broadcast_to(x, here.shape[:1] + x.shape[1:]) for x in inputs(K=4, B=1)[:3])
    q, k, v = (x[:, :1] for x in (q, k, v))
    run = jax.jit(functools.partial(nb.attention, window=window, impl=impl, block_size=128))

    def changed(q2, k2, v2):
        with interpreted():
            return np.asarray(run(q2, k2, v2) != run(q, k, v)).any((1, 3))

    seen_by = (places[:, None] <= t) & (t <= places[:, None] + window)
    np.testing.assert_array_equal(changed(q, jnp.where(here, -k, k), jnp.where(here, v + 100, v)), seen_by)
    itself = (places[:, None] == t) & (t > 0) & (window > 0)  # of a single key the softmax is 1, whatever the query
    np.testing.assert_array_equal(changed(jnp.where(here, q + 1, q), k, v), itself)


def test_a_block_larger_than_the_sequence_is_cut_to_it(nb):
    arrays = inputs(B=1)
    large, exact = (out_and_gradients(nb, "splash", 100, *arrays, block_size=block) for block in (1024, T))
    assert all(map(np.array_equal, large, exact))


@pytest.mark.parametrize(
    ("impl", "K", "seq_len", "window", "block", "message"),
    [
        ("flash", 2, 256, 256, 128, r"impl='flash': must be .*splash"),
        ("einsum", 3, 256, 256, 128, r"k\.shape\[1\]=3: must divide the 4 query heads"),
        ("pallas", 2, 256, 100, 128, r"window=100: .*causal only.*256.*splash"),
        ("pallas", 2, 100, 100, 128, r"seq_len=100: .*multiple of 128"),
        ("splash", 2, 100, 100, 128, r"seq_len=100: .*multiple of 128"),
        ("splash", 2, 384, 384, 256, r"splash_block_size=256: .*384"),
        ("pallas", 2, 256, 256, 64, r"splash_block_size=64: .*256"),
    ],
)
def test_what_cannot_be_computed_is_refused(nb, impl, K, seq_len, window, block, message):
    """By name, value and rule; pallas would silently attend to the whole context."""
    q, k, v, _ = inputs(K=K, seq_len=seq_len)
    with pytest.raises(nb.InputError, match=message):
        nb.attention(q, k, v, window=window, impl=impl, block_size=block)
