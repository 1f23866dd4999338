"""The model: initial values, counts, and a forward pass checked against one in float64 numpy, loops and all."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def small_config(nb, **changes):
    """D = 64, three layers with the windows T/2, T, T; K = 2 of N = 4."""
    config = nb.Config(
        n_head=4, n_kv_head=2, head_dim=16, aspect_ratio=21, vocab_size=300, seq_len=24, window_pattern="SL",
        compute_dtype="float32", attn_impl="einsum", device_batch_size=2,
    )  # fmt: skip
    return config.replace(**changes)


def shaken(nb, config, seed=0, head=0.1):
    """Parameters in which no weight is zero or one, so that every part of the model has a say in the logits."""
    params = nb.init_params(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    noise = {"o": 0.1, "down": 0.05, "resid_scale": 0.3, "x0_scale": 0.3, "lm_head": head}

    def shake(path, x):
        return x + noise.get(path[-1].key, 0) * jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(shake, params)


def some_tokens(config, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, config.vocab_size, (config.device_batch_size, config.seq_len)), jnp.int32)


def forward(nb, config, params, tokens):
    return jax.jit(nb.forward)(config, params, tokens)


def reference_logits(config, params, tokens):
    """The model as the text above it describes it, one position at a time, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    H, group = config.head_dim, config.n_head // config.kv_heads

    def norm(x):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)

    def rope(x, t):  # pairs (i, i + H/2) are complex numbers, turned by t / 10000^(2i/H)
        z = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * t * 10000.0 ** (-2 * np.arange(H // 2) / H))
        return np.concatenate([z.real, z.imag], -1)

    logits = []
    for row in np.asarray(tokens):
        x = x0 = norm(p["embed"][row])
        for i, layer in enumerate(p["layers"]):
            last = i == len(p["layers"]) - 1
            short = config.window_pattern[i % len(config.window_pattern)] == "S" and not last
            window = len(row) // 2 if short else len(row)
            x = layer["resid_scale"] * x + layer["x0_scale"] * x0
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
            x = x + np.maximum(norm(x) @ layer["up"], 0) ** 2 @ layer["down"]
        logits.append(config.softcap * np.tanh(norm(x) @ p["lm_head"] / config.softcap))
    return np.stack(logits)


def test_forward_is_the_model_described(nb):
    """Against float64. Activations are of order 1 and pass through some 20 sums: 1e-5 is a hundred roundings."""
    for changes in ({}, {"n_kv_head": 4, "window_pattern": "L", "softcap": 3.0}, {"n_kv_head": 1}):
        config = small_config(nb, **changes)
        params, tokens = shaken(nb, config), some_tokens(config)
        have, want = forward(nb, config, params, tokens), reference_logits(config, params, tokens)
        assert have.dtype == jnp.float32 and have.shape == (*tokens.shape, config.vocab_size)
        assert want.std() > 0.5
        np.testing.assert_allclose(have, want, atol=1e-5)


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
    is_normal(params["embed"], 0.1)
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_at_init_is_ln_v(nb, dtype):
    config = small_config(nb, vocab_size=4096, compute_dtype=dtype)
    params = nb.init_params(config, jax.random.key(0))
    loss = nb.loss_fn(config, params, some_tokens(config), some_tokens(config, seed=1))
    assert loss.dtype == jnp.float32 and loss.shape == ()
    assert float(loss) == pytest.approx(math.log(4096), rel=0.01)


def test_loss_is_the_mean_cross_entropy(nb):
    """Of the float64 logits; the maximum over V is not near zero, so a wrong normalization shows."""
    config = small_config(nb)
    params, tokens, targets = shaken(nb, config, head=0.5), some_tokens(config), some_tokens(config, seed=1)
    logits = reference_logits(config, params, tokens)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = -np.log(np.take_along_axis(probs, np.asarray(targets)[..., None], -1))[..., 0]
    np.testing.assert_allclose(nb.token_losses(config, params, tokens, targets), want, atol=5e-5)
    assert float(nb.loss_fn(config, params, tokens, targets)) == pytest.approx(want.mean(), rel=2e-6)


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": -1}, {"vocab_size": 1000, "n_kv_head": 1}])
def test_count_params(nb, changes):
    """By part, against the leaves and against the closed form."""
    config = small_config(nb, **changes)
    params, counts = nb.init_params(config, jax.random.key(0)), nb.count_params(config)
    V, D, N, K, H, L = config.vocab_size, 64, 4, config.kv_heads, 16, 3
    attn = L * (2 * D * N * H + 2 * D * K * H + 2)
    assert counts == {"embed": V * D, "attn": attn, "mlp": L * 8 * D * D, "lm_head": V * D, "total": counts["total"]}
    assert counts["total"] == sum(x.size for x in jax.tree.leaves(params)) == sum(counts.values()) - counts["total"]


def test_the_reference_model_has_268_million_parameters(nb):
    config = nb.Config()
    assert (config.n_embd, config.depth, config.windows[:4]) == (1024, 16, [1024, 1024, 1024, 2048])
    assert nb.count_params(config)["total"] == 2 * 32768 * 1024 + 16 * (12 * 1024**2 + 2)


def test_flops_per_token(nb):
    """6 a matmul weight, and 12·H a head for each pair of query and key in sight, counted one by one. The two scalars
    of a layer are no matmul: 1e-5 is less than what one of the matmuls or one key more or less would make."""
    for config in (small_config(nb, seq_len=64), small_config(nb, window_pattern="L", n_kv_head=4)):
        counts, T = nb.count_params(config), config.seq_len
        pairs = sum(t - s <= window for window in config.windows for t in range(T) for s in range(t + 1))
        weights = counts["attn"] + counts["mlp"] + counts["lm_head"] - 2 * config.depth
        want = 6 * weights + 12 * config.n_head * config.head_dim * pairs / T
        assert nb.flops_per_token(config) == pytest.approx(want, rel=1e-4)


def test_logits_are_softcapped(nb):
    config = small_config(nb, softcap=5.0)
    params = shaken(nb, config)
    params["lm_head"] *= 1000
    logits = forward(nb, config, params, some_tokens(config))
    assert 4.99 < jnp.abs(logits).max() <= 5.0 and logits.std() > 3


@pytest.mark.parametrize("impl", ["einsum", "jax", "auto"])
def test_nothing_sees_the_future(nb, impl):
    """Each position has a token of its own, so the gradient of one position's logits with respect to the embedding
    is one row for each position. The rows after it are zero, exactly; those before it are not."""
    config = small_config(nb, attn_impl=impl, device_batch_size=1)
    params, tokens = shaken(nb, config), jnp.arange(config.seq_len)[None]

    def one_sum(embed, t):
        logits = nb.forward(config, {**params, "embed": embed}, tokens)[0, t]
        return jnp.sum(logits * jnp.cos(jnp.arange(logits.size)))

    gradient = jax.jit(jax.grad(one_sum))
    for t in (0, 7, config.seq_len - 2):
        seen = np.asarray(gradient(params["embed"], t)).any(-1)
        np.testing.assert_array_equal(seen, np.arange(config.vocab_size) <= t)


def test_a_prefix_has_the_same_logits(nb):
    """What forward says does not depend on how much text follows: 1e-5 is rounding, in sums of other lengths."""
    config = small_config(nb)
    params, tokens = shaken(nb, config), some_tokens(config)
    whole, prefix = forward(nb, config, params, tokens), forward(nb, config, params, tokens[:, :9])
    np.testing.assert_allclose(whole[:, :9], prefix, atol=1e-5)


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


def test_grouped_heads_share_keys_and_values(nb):
    """K = 2 of N = 4 is the model with K = 4 whose key/value heads are equal in pairs: the same sums, but in matmuls
    of another shape."""
    grouped, full = small_config(nb), small_config(nb, n_kv_head=4)
    params, tokens = shaken(nb, grouped), some_tokens(grouped)
    layers = [layer | {name: jnp.repeat(layer[name], 2, axis=1) for name in "kv"} for layer in params["layers"]]
    have, want = forward(nb, grouped, params, tokens), forward(nb, full, {**params, "layers": layers}, tokens)
    np.testing.assert_allclose(have, want, atol=1e-5)


def test_bfloat16_is_close_to_float32(nb):
    """bfloat16 rounds to 2⁻⁹ = 0.2%, a dozen times in a row; norms, softmax and logits stay float32. 1% in the mean."""
    config = small_config(nb)
    params, tokens = shaken(nb, config), some_tokens(config)
    half = forward(nb, config.replace(compute_dtype="bfloat16"), params, tokens)
    full = forward(nb, config, params, tokens)
    assert half.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((half - full) ** 2) / jnp.mean(full**2)))
    assert 1e-4 < error < 0.01, error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cast_weights_and_masters_are_one_model(nb, dtype):
    """The step casts once, evaluation and sampling too: forward must not care whether that was done."""
    config = small_config(nb, compute_dtype=dtype)
    params, tokens = shaken(nb, config), some_tokens(config)
    weights = nb.cast_weights(config, params)
    kept = {"embed", "resid_scale", "x0_scale"}
    for path, x in jax.tree_util.tree_leaves_with_path(weights):
        assert x.dtype == ("float32" if path[-1].key in kept else dtype), path
    assert jnp.array_equal(forward(nb, config, weights, tokens), forward(nb, config, params, tokens))
