"""The model: initial values, counts, and a forward pass checked against one in float64 numpy, loops and all."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import sequences, shaken, small_config
from tools.notebooks import load


def forward(nb, config, params, tokens):
    return jax.jit(nb.forward)(config, params, tokens)


def reference_logits(config, params, tokens):
    """The model as its text describes it, one position at a time, in float64; 04 has gates and no residual scalars."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    H, group = config.head_dim, config.n_head // config.kv_heads

    def norm(x):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)

    def rope(x, t):  # pairs (i, i + H/2) are complex numbers, turned by t / 10000^(2i/H)
        z = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * t * 10000.0 ** (-2 * np.arange(H // 2) / H))
        return np.concatenate([z.real, z.imag], -1)

    def mlp(layer, h):
        if "gate" not in layer:
            return np.maximum(h @ layer["up"], 0) ** 2 @ layer["down"]
        gate = h @ layer["gate"]
        return (gate / (1 + np.exp(-gate)) * (h @ layer["up"])) @ layer["down"]

    logits = []
    for row in np.asarray(tokens):
        x = x0 = norm(p["embed"][row])
        for i, layer in enumerate(p["layers"]):
            last = i == len(p["layers"]) - 1
            short = config.window_pattern[i % len(config.window_pattern)] == "S" and not last
            window = len(row) // 2 if short else len(row)
            x = layer.get("resid_scale", 1) * x + layer.get("x0_scale", 0) * x0
            h = norm(x)
            q, k = (np.stack([rope(norm(np.einsum("d,dnh->nh", h[t], layer[name])), t) for t in range(len(row))])
                    for name in "qk")  # fmt: skip
            v = np.einsum("td,dnh->tnh", h, layer["v"])
            y = np.zeros_like(q)
            for t, n in np.ndindex(*q.shape[:2]):
                seen = slice(max(0, t - window), t + 1)
                probs = np.exp(k[seen, n // group] @ q[t, n] / math.sqrt(H))
                y[t, n] = probs @ v[seen, n // group] / probs.sum()
            x = x + np.einsum("tnh,nhd->td", y, layer["o"])
            x = x + mlp(layer, norm(x))
        logits.append(config.softcap * np.tanh(norm(x) @ p["lm_head"] / config.softcap))
    return np.stack(logits)


@pytest.mark.parametrize(
    ("notebook", "changes"),
    [("02_train.py", {}), ("02_train.py", {"n_kv_head": 4, "window_pattern": "L", "softcap": 3.0}),
     ("02_train.py", {"n_kv_head": 1, "attn_impl": "jax"}), ("04_maxtext.py", {"device_batch_size": 1, "n_layer": 3})],
    ids=str,
)  # fmt: skip
def test_forward_is_the_model_described(root, notebook, changes):
    """Against float64. Activations are of order 1 and pass through some 20 sums: 2e-5 is two hundred roundings."""
    nb = load(root / notebook)
    config = small_config(nb, **changes)
    params, (tokens, _) = shaken(nb, config), sequences(config)
    have, want = forward(nb, config, params, tokens), reference_logits(config, params, tokens)
    assert have.dtype == jnp.float32 and have.shape == (*tokens.shape, config.vocab_size)
    assert want.std() > 0.5
    np.testing.assert_allclose(have, want, atol=2e-5)


def test_loss_is_the_mean_cross_entropy(nb):
    """Of the float64 logits; the maximum over V is not near zero, so a wrong normalization shows."""
    config = small_config(nb)
    params, (tokens, targets) = shaken(nb, config, head=0.5), sequences(config)
    logits = reference_logits(config, params, tokens)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = -np.log(np.take_along_axis(probs, np.asarray(targets)[..., None], -1))[..., 0]
    np.testing.assert_allclose(nb.token_losses(config, params, tokens, targets), want, atol=5e-5)
    assert float(nb.loss_fn(config, params, tokens, targets)) == pytest.approx(want.mean(), rel=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_at_init_is_ln_v(nb, dtype):
    config = small_config(nb, vocab_size=4096, compute_dtype=dtype)
    loss = nb.loss_fn(config, nb.init_params(config, jax.random.key(0)), *sequences(config))
    assert loss.dtype == jnp.float32 and loss.shape == ()
    assert float(loss) == pytest.approx(math.log(4096), rel=0.01)


def test_initial_values(nb):
    """dtype, shape and distribution of every weight, as the table in init_params says."""
    config = nb.Config(n_head=4, n_kv_head=2, head_dim=64, aspect_ratio=128, vocab_size=2048, seq_len=128)
    V, D, N, K, H, F, L = 2048, 256, 4, 2, 64, 1024, 2
    params = nb.init_params(config, jax.random.key(0))
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        assert x.dtype == jnp.float32 and not x.weak_type, path  # a weak type is gone after a step, which recompiles it
    assert set(params) == {"embed", "lm_head", "layers"} and len(params["layers"]) == L

    def is_normal(x, std):  # a share of 0.27% lies beyond three standard deviations; none do in a uniform
        assert np.std(x) == pytest.approx(std, rel=0.01) and abs(np.mean(x)) < 0.01 * std
        assert np.mean(np.abs(x) > 3 * std) == pytest.approx(0.0027, rel=0.2)

    def is_uniform(x, std):
        bound = math.sqrt(3) * std
        assert np.std(x) == pytest.approx(std, rel=0.01) and abs(np.mean(x)) < 0.02 * std
        assert 0.999 * bound < np.abs(x).max() <= bound * (1 + 1e-6)

    assert params["embed"].shape == (V, D) and params["lm_head"].shape == (D, V)
    is_normal(params["embed"], 0.01)
    is_normal(params["lm_head"], 0.001)
    shapes = {"q": (D, N, H), "k": (D, K, H), "v": (D, K, H), "o": (N, H, D), "up": (D, F), "down": (F, D)}
    scalars = {"resid_scale": 1.0, "x0_scale": np.float32(0.1)}
    for layer in params["layers"]:
        assert {name: x.shape for name, x in layer.items()} == shapes | dict.fromkeys(scalars, ())
        for name in ("q", "k", "v", "up"):
            is_uniform(layer[name], 1 / math.sqrt(D))
        assert not layer["o"].any() and not layer["down"].any()
        assert {name: layer[name] for name in scalars} == scalars


def test_no_two_weights_are_drawn_from_one_key(nb):
    config = small_config(nb)
    first, again, other = (nb.init_params(config, jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, first, again))
    draws = [np.asarray(x).ravel() for p in (first, other) for x in jax.tree.leaves(p) if x.ndim > 1 and x.any()]
    starts = {tuple(np.round(x[:8] / x.std(), 3)) for x in draws}
    assert len(starts) == len(draws) == 2 * (2 + 4 * config.depth)


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": -1}, {"vocab_size": 1000, "n_kv_head": 1}])
def test_count_params(nb, changes):
    """By part, against the leaves and against the closed form."""
    config = small_config(nb, **changes)
    params, counts = nb.init_params(config, jax.random.key(0)), nb.count_params(config)
    V, D, N, K, H, L = config.vocab_size, 64, 4, config.kv_heads, 16, 3
    attn = L * (2 * D * N * H + 2 * D * K * H + 2)
    assert counts == {"embed": V * D, "attn": attn, "mlp": L * 8 * D * D, "lm_head": V * D, "total": counts["total"]}
    assert counts["total"] == sum(x.size for x in jax.tree.leaves(params)) == sum(counts.values()) - counts["total"]


@pytest.mark.parametrize("changes", [{}, {"window_pattern": "L"}, {"n_kv_head": 1}, {"seq_len": 15}], ids=str)
def test_flops_per_token_counts_what_is_seen(nb, changes):
    """By brute force: 6 FLOPs a token for each matmul weight, and for each pair of a query t and a key s that it sees
    2·N·H each for the score and for the sum over values, three times (forward, and backward for both operands)."""
    config = nb.Config(n_head=2, head_dim=4, aspect_ratio=2, vocab_size=300, seq_len=16).replace(**changes)
    N, K, H, D, F, T, L = 2, config.kv_heads, 4, 8, 32, config.seq_len, 4
    assert config.depth == L
    weights = L * (D * N * H + 2 * D * K * H + N * H * D + 2 * D * F) + D * config.vocab_size
    pairs = sum(s <= t and t - s <= window for window in config.windows for t in range(T) for s in range(T))
    want = 6 * weights + 3 * 2 * (2 * N * H) * pairs / T
    scalars = 6 * 2 * L  # the two residual scalars of a layer may count as weights or not; everything else is exact
    got = nb.flops_per_token(config)
    assert any(math.isclose(got, total, rel_tol=1e-12) for total in (want, want + scalars)), (got, want)


def test_rope_is_relative_and_orthogonal(nb):
    """Scores of one query and one key vector at all positions depend on the distance alone, and vary with it; the
    length stays what QK-norm makes it, √H. The tables are rounded once, 6e-8, and a score is a sum of H terms ≤ 1."""
    T, H = 2048, 64
    cos, sin = nb.rope_tables(T, H)
    assert cos.dtype == sin.dtype == np.float32 and cos.shape == (T, H // 2)
    rng = np.random.default_rng(0)
    q, k = (nb.norm_and_rope(jnp.tile(jnp.asarray(rng.normal(size=H), jnp.float32), (T, 1)), cos, sin) for _ in "qk")
    np.testing.assert_allclose(np.linalg.norm(q, axis=-1), math.sqrt(H), rtol=1e-5)
    scores = np.asarray(q, np.float64) @ np.asarray(k, np.float64).T
    for distance in (0, 1, 5, 100, 1500):
        diagonal = np.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=5e-5)
    assert np.ptp(scores[:, 0]) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cast_weights_and_masters_are_one_model(nb, dtype):
    """The step casts once, evaluation and sampling too: forward must not care whether that was done. bfloat16 rounds
    to 2⁻⁹ = 0.2%, a dozen times in a row; norms, softmax and logits stay float32: 1% in the mean."""
    config = small_config(nb, compute_dtype=dtype)
    params, (tokens, _) = shaken(nb, config), sequences(config)
    weights = nb.cast_weights(config, params)
    kept = {"embed", "resid_scale", "x0_scale"}
    for path, x in jax.tree_util.tree_leaves_with_path(weights):
        assert x.dtype == ("float32" if path[-1].key in kept else dtype), path
    have = forward(nb, config, weights, tokens)
    assert have.dtype == jnp.float32 and jnp.array_equal(have, forward(nb, config, params, tokens))
    exact = forward(nb, config.replace(compute_dtype="float32"), params, tokens)
    error = float(jnp.sqrt(jnp.mean((have - exact) ** 2) / jnp.mean(exact**2)))
    assert error == 0 if dtype == "float32" else 1e-4 < error < 0.01, error
