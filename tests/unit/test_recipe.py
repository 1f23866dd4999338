"""What 06_recipe.py has of its own. The cells that it copies from 02_train.py are tested there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import (
    QUIET,
    batch,
    bits,
    differ,
    leaves,
    script,
    sequences,
    shaken,
    small_config,
    take_steps,
    tiny,
)  # fmt: skip

# ---- Config


def test_exact_counts(recipe):
    """By hand: the demo has a value embedding in the second of two layers, 4.72M parameters, as nanochat's recipe."""
    demo, V, D = recipe.Config.demo(), 4096, 256
    matrices = 2 * 12 * D * D
    gates = 2 * 2 + 32 * 4 + 32 + 1  # residual scalars, value gate, smear
    assert recipe.count_params(demo)["total"] == 3 * V * D + matrices + gates == 4_718_757
    bare = demo.replace(without=",".join(recipe.PARTS))
    assert recipe.count_params(bare)["total"] == 2 * V * D + matrices + 4


def test_value_embeddings_ask_for_no_tokens(recipe):
    """Ten tokens for each of the other parameters, so that leaving the tables out changes nothing else."""
    whole, bare = recipe.Config(), recipe.Config(without="value_embeddings")
    assert whole.total_steps == bare.total_steps == round(10 * recipe.count_params(bare)["total"] / 8192)


def test_a_step_on_a_device_has_about_131072_tokens(recipe, monkeypatch):
    """For any number of devices, with the rate for it; the demo on a CPU stays as it is."""
    assert recipe.Config.for_device().learning_rate == 0.02
    monkeypatch.setattr(recipe.BaseConfig, "for_device", classmethod(lambda cls: cls(mesh=(3, 1))))
    config = recipe.Config.for_device()
    assert config.tokens_per_step == 5 * 3 * 4 * 2048
    assert config.learning_rate == pytest.approx(0.02 * (config.tokens_per_step / 2**19) ** 0.5)


@pytest.mark.parametrize("value", ["smeer", "smear muon", "smear,backin"])
def test_a_part_that_is_not_there_is_refused(recipe, value):
    with pytest.raises(recipe.InputError, match=f"^without='{value}': must be parts of muon, momentum"):
        recipe.Config(without=value)


@pytest.mark.parametrize("without", ["", *("muon", "momentum", "normuon", "value_embeddings", "smear")])
def test_each_part_can_go(recipe, without):
    """The parts that are left have their parameters, all of which learn, and the loss starts at ln V."""
    config = small_config(recipe, without=without, learning_rate=0.02)
    names = {"value_embeddings": "value_embed", "smear": "smear_scale"}
    have = {
        path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(recipe.init_params(config, jax.random.key(0)))
    }
    assert {part for part, name in names.items() if name in have} == {*names} - {without}
    state, [first, *_, last] = take_steps(recipe, config, 8, seed=0)
    assert abs(first - np.log(config.vocab_size)) < 0.01 and last < first - 0.5
    start = leaves(recipe.init_train_state(config).params)
    assert not [name for name, x in leaves(state.params).items() if np.array_equal(x, start[name])]


# ---- the model


@pytest.fixture(scope="module")
def model(recipe):
    """(config, parameters in which every part has a say)."""
    config = small_config(recipe)
    return config, shaken(recipe, config)


def test_a_token_sees_no_later_one(recipe, model):
    config, params = model
    tokens, _ = sequences(config)
    changed = tokens.at[:, 20:].set((tokens[:, 20:] + 1) % config.vocab_size)
    a, b = (recipe.forward(config, params, x) for x in (tokens, changed))
    np.testing.assert_array_equal(a[:, :20], b[:, :20])
    assert float(jnp.abs(a[:, 20:] - b[:, 20:]).max()) > 0.1


@pytest.mark.parametrize("weight", ["value_embed", "value_gate", "smear_gate", "smear_scale"])
def test_every_new_weight_has_a_say(recipe, model, weight):
    config, params = model
    tokens, _ = sequences(config)
    doubled = jax.tree_util.tree_map_with_path(lambda path, x: 2 * x if path[-1].key == weight else x, params)
    a, b = (recipe.forward(config, x, tokens) for x in (params, doubled))
    assert differ(a, b) > 1e-3


def test_smear_by_hand(recipe, model):
    """The embedding of a token gets scale · sigmoid(gate) of the one before; the first gets nothing."""
    config, params = model
    tokens, _ = sequences(config)
    T, x = config.seq_len, np.asarray(recipe.embed(config, params, tokens), np.float64).reshape(*tokens.shape, -1)
    gate = 1 / (1 + np.exp(-x[..., :32] @ np.asarray(params["smear_gate"], np.float64)))
    want = x.copy()
    want[:, 1:] += float(params["smear_scale"]) * gate[:, 1:] * x[:, :-1]
    flat = jnp.asarray(x, jnp.float32)
    before = jnp.pad(flat[:, :-1], ((0, 0), (1, 0), (0, 0))).reshape(-1, config.n_embd)
    have = recipe.smear(params, flat.reshape(-1, config.n_embd), before).reshape(-1, T, config.n_embd)
    assert differ(have, want) < 1e-6  # float32


def test_decoding_gives_the_logits_of_forward(recipe, model):
    """Token by token, with the cache, in float32: smear and value embeddings are those of the whole pass."""
    config, params = model
    tokens, _ = sequences(config)
    want, decode = recipe.forward(config, params, tokens), jax.jit(recipe.decode_token)
    shape = (tokens.shape[0] * config.kv_heads, config.seq_len, config.head_dim)
    cache = [(jnp.zeros(shape),) * 2 for _ in range(config.depth)]
    for t in range(config.seq_len):
        logits, cache = decode(config, recipe.cast_weights(config, params), cache, tokens, t)
        assert differ(logits, want[:, t]) < 1e-5, t


# ---- Muon


def composed(recipe, s):
    """What the polynomials, composed, make of singular values s, float64."""
    for (a, b, c), room in zip(recipe.POLAR_EXPRESS, recipe.ROOM, strict=True):
        s = s / room
        s = a * s + b * s**3 + c * s**5
    return s


def best_polynomial(low, high):
    """a, b, c of the odd polynomial a·x + b·x³ + c·x⁵ that stays closest to 1 on [low, high], by Remez' exchange: its
    error is equal, with changing signs, at low, at two extrema, and at high."""
    inner = (3 * low + high) / 4, (low + 3 * high) / 4
    for _ in range(100):
        points = zip((low, *inner, high), (1, -1, 1, -1), strict=True)
        a, b, c, _ = np.linalg.solve([[x, x**3, x**5, sign] for x, sign in points], np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt((-3 * b - root) / (10 * c)), np.sqrt((-3 * b + root) / (10 * c))
    return np.array([a, b, c])


def test_the_polynomials_are_polar_express(recipe):
    """Derived anew, as the paper says: each is the best one for the interval that the ones before leave of [0.001, 1].
    Its lower end is lifted to 0.0241 of the upper one; so that no value is left out, the polynomial is then centred."""
    low, high = 1e-3, 1.0
    for have in recipe.POLAR_EXPRESS:
        lifted = max(low, 0.02407327424182761 * high)
        want = best_polynomial(lifted, high)
        at_low, at_lifted = want @ (low, low**3, low**5), want @ (lifted, lifted**3, lifted**5)
        want *= 2 / (at_low + 2 - at_lifted)  # 1 where nothing was lifted: then 2 − p(low) is the largest value
        np.testing.assert_allclose(have, want, rtol=1e-9)  # float64, five linear systems
        low = want @ (low, low**3, low**5)
        high = 2 - low
    s = np.geomspace(1e-3, 1, 10_000)
    assert np.abs(composed(recipe, s) - 1).max() < 0.15 and low > 0.876  # 0.124, and what the room costs


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64), (3, 48, 32)])
def test_orthogonalize_beside_the_svd(recipe, shape):
    """bfloat16 iterates against the same polynomials in float64, applied to the singular values of the same rounded
    matrix, and against U·Vᵀ. The singular values of a random matrix span about 1 to 0.01."""
    x = jax.random.normal(jax.random.key(0), shape)
    have = np.asarray(jax.jit(recipe.orthogonalize)(7 * x), np.float64)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    u, s, vt = np.linalg.svd(np.asarray((x / (1.01 * norm)).astype(jnp.bfloat16), np.float64), full_matrices=False)
    exact, ideal = (u * composed(recipe, s)[..., None, :]) @ vt, u @ vt

    def gap(a, b):
        return np.linalg.norm(a - b) / np.linalg.norm(b)

    assert gap(have, exact) < 0.025  # 1.2% was measured: ten roundings of 2^-9, which later polynomials enlarge
    assert gap(have, ideal) < 0.13  # the polynomials alone leave up to 0.124
    values = np.linalg.svd(have, compute_uv=False)
    assert values.max() < 1.14 and (values[..., : -values.shape[-1] // 8] > 0.87).all()
    assert not np.asarray(recipe.orthogonalize(jnp.zeros(shape)), np.float32).any()


def test_muon_is_optax_muon(recipe, monkeypatch):
    """20 updates against optax.contrib.muon. It needs to be told which axes make the matrix, iterates in the gradient's
    float32, and corrects its momentum for the start, so it begins at a late count."""
    config = small_config(recipe, without="normuon")
    monkeypatch.setattr(recipe, "MOMENTUM", (0.95, 0.95, 0.95))
    state = recipe.init_train_state(config)
    axes = optax.contrib.MuonDimensionNumbers
    dims = {
        "q": axes(0, (1, 2)),
        "k": axes(0, (1, 2)),
        "v": axes(0, (1, 2)),
        "o": axes((0, 1), 2),
        "up": axes(0, 1),
        "down": axes(0, 1),
    }
    matrices = {name: x for name, x in state.params["layers"][0].items() if name in recipe.MATRICES}
    coefficients = [
        (a / room, b / room**3, c / room**5) for (a, b, c), room in zip(recipe.POLAR_EXPRESS, recipe.ROOM, strict=True)
    ]
    oracle = optax.contrib.muon(
        0.02,
        ns_coeffs=coefficients,
        beta=0.95,
        muon_weight_dimension_numbers={n: dims[n] for n in matrices},
    )
    opt_state = oracle.init(matrices)
    opt_state = jax.tree.map(lambda x: jnp.int32(10_000) if x.dtype == jnp.int32 and x.ndim == 0 else x, opt_state)
    rng, params, update = np.random.default_rng(0), matrices, jax.jit(recipe.update_params)
    start = matrices
    for step in range(20):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), state.params)
        changes, opt_state = oracle.update({n: grads["layers"][0][n] for n in matrices}, opt_state, params)
        params = optax.apply_updates(params, changes)
        new = update(config, state, grads, jnp.float32(0.02))
        state = recipe.TrainState(jnp.int32(step + 1), *new, state.hyper)
    for name in matrices:
        have, want = state.params["layers"][0][name] - start[name], params[name] - start[name]
        assert differ(have, want) < 0.05, name  # bfloat16 iterates against float32


def test_adamw_takes_the_rest(recipe):
    """With Muon left out, every parameter is optax.adamw's at its share of the rate; with it, all but the matrices."""
    for without in ("", "muon"):
        config = small_config(recipe, without=without, weight_decay=0.1)
        state = recipe.init_train_state(config)
        update, params = jax.jit(recipe.update_params), state.params
        decayed = jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key in (*recipe.MATRICES, "lm_head"), params
        )
        oracle = optax.adamw(0.02, b1=config.beta1, b2=config.beta2, eps=config.eps, weight_decay=0.1, mask=decayed)
        shares = jax.tree_util.tree_map_with_path(lambda path, _: recipe.adam_rate(path), params)
        opt_state = oracle.init(params)
        for step in range(5):
            grads = recipe.init_params(config, jax.random.key(step + 1))  # numbers of the right shapes, some zero
            changes, opt_state = oracle.update(grads, opt_state, params)
            params = jax.tree.map(lambda p, c, share: p + share * c, params, changes, shares)
            new = update(config, state, grads, jnp.float32(0.02))
            state = recipe.TrainState(jnp.int32(step + 1), *new, state.hyper)
        have, want = leaves(state.params), leaves(params)
        for name in want:
            if without or name.split("'")[-2] not in recipe.MATRICES:
                np.testing.assert_allclose(have[name], want[name], atol=2e-6, err_msg=name)  # float32


def test_the_state_is_no_larger_than_adamws(recipe):
    """Muon keeps one moment of a matrix; the dtypes and shapes after a step are those before."""
    config = small_config(recipe)
    state = recipe.init_train_state(config)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    matrices = sum(
        x.size for path, x in jax.tree_util.tree_leaves_with_path(state.params) if path[-1].key in recipe.MATRICES
    )
    total = sum(x.size for x in jax.tree.leaves(state.params))
    D, rows = config.n_embd, 0
    for name, x in state.params["layers"][0].items():
        rows += max(D, x.size // D) if name in recipe.MATRICES else 0  # its longer axis; D is the other one
    assert sum(x.size for x in jax.tree.leaves(state.nu)) == total - matrices + rows * config.depth
    state, _ = recipe.train_step(config, state, *batch(config))
    compiled = recipe.train_step._cache_size()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
    recipe.train_step(config, state, *batch(config))
    assert recipe.train_step._cache_size() == compiled


def test_momentum_rises_and_falls(recipe):
    hyper = recipe.hyperparams(recipe.Config.demo().replace(num_iterations=1000, warmdown_ratio=0.4))
    have = [float(recipe.momentum_at(hyper, t)) for t in (1, 100, 200, 600, 800, 1000)]
    assert have == pytest.approx([0.8505, 0.90, 0.95, 0.95, 0.925, 0.90])


def test_normuon_by_hand(recipe):
    """Rows of very different sizes become even, the norm of the whole stays; wide matrices are evened by column."""
    rng, n = np.random.default_rng(0), jnp.zeros((6, 1))
    moment = np.zeros((6, 1))
    for _ in range(3):
        x = rng.normal(size=(6, 4)) * np.geomspace(1, 100, 6)[:, None]
        have, n = recipe.even_out(jnp.asarray(x, jnp.float32), n)
        moment = 0.95 * moment + 0.05 * (x**2).mean(axis=1, keepdims=True)
        want = x / np.sqrt(moment)
        want *= np.linalg.norm(x) / np.linalg.norm(want)
        assert differ(have, want) < 1e-6 and differ(n, moment) < 1e-6  # float32
    assert recipe.second_moment_shape(4, 6) == (1, 6) and recipe.second_moment_shape(6, 6) == (6, 1)
    wide, _ = recipe.even_out(jnp.asarray(x.T, jnp.float32), jnp.zeros((1, 6)))
    tall, _ = recipe.even_out(jnp.asarray(x, jnp.float32), jnp.zeros((6, 1)))
    np.testing.assert_allclose(wide, tall.T, rtol=1e-5)


# ---- the run


class Interrupted(Exception):
    pass


def test_a_run_goes_on_with_the_same_bits(recipe, tmp_path):
    """Interrupted after three of six steps and resumed, against one that was not; then a wrong part, in one line."""
    whole, broken = (tiny(recipe, tmp_path / name, num_iterations=6, log_interval=1) for name in ("whole", "broken"))

    def interrupt(step, values):
        if step == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        recipe.train(broken, interrupt)
    results = [recipe.train(config) for config in (whole, broken)]
    assert results[0]["val_bpb"] == results[1]["val_bpb"]
    states = [
        recipe.load_checkpoint(recipe.list_checkpoints(config.run_dir)[-1], config)[0] for config in (whole, broken)
    ]
    assert bits(states[0]) == bits(states[1])


def test_the_script(tmp_path):
    settings = dict(n_head=1, device_batch_size=2, eval_tokens=1024, final_eval_tokens=1024, run_dir="run",
                    num_iterations=4, aspect_ratio=64, without="smear", **QUIET)  # fmt: skip
    done = script("06_recipe.py", cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    wrong = script("06_recipe.py", "--without=smeer", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: without='smeer': must be parts of muon, ")
