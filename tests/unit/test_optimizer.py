"""The schedule case by case, AdamW and whole steps against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import batch, sequences, shaken_state, small_config


def plain_schedule(config, step):
    """The factor on the learning rate at `step`, case by case."""
    total = config.num_iterations
    warmup, warmdown = round(config.warmup_ratio * total), round(config.warmdown_ratio * total)
    factor = 1.0
    if step < warmup:
        factor = (step + 1) / warmup
    if step >= total - warmdown:
        down = (total - step) / warmdown
        factor = min(factor, down + config.final_lr_frac * (1 - down))
    return factor


def decayed(params):
    """Which weights AdamW decays: the matmul weights."""
    return {**jax.tree.map(lambda x: x.ndim > 1, params), "embed": False}


# The head learns at four times the rate, the rest as optax says.
HEAD_FASTER = optax.stateless(lambda changes, _: {**changes, "lm_head": 4 * changes["lm_head"]})


@pytest.mark.parametrize(
    ("total", "warmup", "warmdown", "final"),
    [(100, 0.1, 0.4, 0.25), (100, 0.5, 0.5, 0.1), (10, 0, 0.5, 0), (10, 0.3, 0, 0), (10, 0, 0, 0), (1, 0.02, 0.5, 0),
     (1, 0, 1, 0.1), (3, 0.5, 0.5, 0), (7, 0, 1, 0)],
)  # fmt: skip
def test_schedule(nb, total, warmup, warmdown, final):
    """Every step, to float32 rounding. It starts above zero, is the full rate between, and falls linearly."""
    config = small_config(
        nb, num_iterations=total, warmup_ratio=warmup, warmdown_ratio=warmdown, final_lr_frac=final, learning_rate=2.0
    )
    hyper, scheduled_lr = nb.hyperparams(config), jax.jit(nb.scheduled_lr)
    have = np.array([scheduled_lr(hyper, jnp.int32(step)) for step in range(total)])
    want = 2 * np.array([plain_schedule(config, step) for step in range(total)])
    np.testing.assert_allclose(have, want, rtol=1e-6)
    assert (have > 0).all() and (have.max() == 2 or warmdown == 1)


def test_schedule_of_the_reference(nb):
    """Some numbers by hand: 1000 steps, 2% up, the first half in all at the full rate or on the way to it."""
    config = nb.Config(num_iterations=1000, learning_rate=1.0, final_lr_frac=0.1)
    have = {step: float(nb.scheduled_lr(nb.hyperparams(config), jnp.int32(step))) for step in (0, 9, 19, 500, 750, 999)}
    assert have == pytest.approx({0: 0.05, 9: 0.5, 19: 1.0, 500: 1.0, 750: 0.55, 999: 0.1018})


def test_adamw_is_optax_adamw(nb):
    """20 updates of the same gradients, of very different sizes, some zero: the two differ by the order of a few
    float32 operations (6e-8 each) in each update. eps is of the size of some gradients, so that its place shows."""
    config = small_config(nb, eps=1e-4, beta1=0.8, beta2=0.97, weight_decay=0.3)
    state = nb.init_train_state(config)
    state = state._replace(params=jax.tree.map(lambda p: p + 0.5, state.params))
    learning_rate = 0.01
    adamw = optax.adamw(learning_rate, b1=0.8, b2=0.97, eps=1e-4, weight_decay=0.3, mask=decayed)
    oracle = optax.chain(adamw, HEAD_FASTER)
    params = start = state.params
    opt_state, update, adamw = oracle.init(params), jax.jit(oracle.update), jax.jit(nb.update_params)
    rng = np.random.default_rng(0)
    for step in range(20):
        grads = jax.tree.map(
            lambda p: jnp.asarray(rng.normal(size=p.shape) * 10.0 ** rng.integers(-6, 2, p.shape), jnp.float32), params
        )
        grads["embed"] = grads["embed"].at[:100].set(0)
        changes, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, changes)
        new, mu, nu = adamw(config, state, grads, jnp.float32(learning_rate))
        state = nb.TrainState(jnp.int32(step + 1), new, mu, nu, state.hyper)
    adam = opt_state[0][0]
    for have, want in ((state.mu, adam.mu), (state.nu, adam.nu)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7 * float(y.max())), have, want)
    moved = jax.tree.map(lambda x, y: x - y, state.params, start)
    want = jax.tree.map(lambda x, y: x - y, params, start)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), moved, want)
    assert all(np.abs(x).max() > 0.01 for x in jax.tree.leaves(want) if x.ndim)  # 5,000 times the tolerance


@pytest.mark.parametrize("clip", [0.0, 4.0])
def test_train_step_is_optax_on_the_mean_gradient(nb, clip):
    """20 whole steps against jax.grad and optax.adamw on the schedule, not clipped, and clipped at some steps of them.
    eps is large beside the rounding of gradients, which Adam would otherwise blow up to a full update where the
    gradient itself is nearly zero."""
    config = small_config(nb, eps=1e-3, final_lr_frac=0.1, grad_clip=clip)
    state = shaken_state(nb, config)
    params = start = jax.tree.map(jnp.copy, state.params)
    rates = jnp.asarray([config.learning_rate * plain_schedule(config, i) for i in range(20)])
    oracle = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.adamw(lambda step: rates[step], b1=config.beta1, b2=config.beta2, eps=config.eps,
                    weight_decay=config.weight_decay, mask=decayed),
        HEAD_FASTER,
    )  # fmt: skip

    @jax.jit
    def oracle_step(params, opt_state, tokens, targets):
        loss, grads = jax.value_and_grad(lambda p: nb.loss_fn(config, p, tokens, targets))(params)
        changes, opt_state = oracle.update(grads, opt_state, params)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        return optax.apply_updates(params, changes), opt_state, loss, norm

    opt_state, clipped = oracle.init(params), 0
    for step in range(20):
        params, opt_state, loss, norm = oracle_step(params, opt_state, *sequences(config, step))
        state, metrics = nb.train_step(config, state, *batch(config, step))
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=3e-6), step
        assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-5), step
        assert float(metrics["learning_rate"]) == pytest.approx(float(rates[step]), rel=1e-6)
        clipped += norm > clip
    assert int(state.step) == 20 and (0 < clipped < 20 or not clip)
    # float32; the head moves four times as far as the rest
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1.2e-5), state.params, params)
    assert all(np.abs(x - y).max() > 1e-3 for x, y in zip(*map(jax.tree.leaves, (params, start)), strict=True))


def test_norms_are_those_of_the_weights_and_of_their_change(nb):
    """After three steps: each part's norm, and how far the last step moved it, against float64 differences. A
    difference of float32 weights is rounded to 2⁻²⁴ of a weight, about 1e-8, where an update is 1e-3: 1e-4 of it."""
    config = small_config(nb, weight_decay=0.3)
    state = shaken_state(nb, config)
    for step in range(3):
        before = jax.device_get(state.params)
        state, _ = nb.train_step(config, state, *batch(config, step))
    found = jax.device_get(nb.state_norms(state))
    sums = dict.fromkeys(found, 0.0)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state.params))
    for (path, new), old in zip(leaves, jax.tree.leaves(before), strict=True):
        new, old = np.asarray(new, np.float64), np.asarray(old, np.float64)
        sums[f"param_norm/{nb.part_of(path)}"] += (new**2).sum()
        sums[f"update_norm/{nb.part_of(path)}"] += ((new - old) ** 2).sum()
    assert len(found) == 8
    for name, value in found.items():
        assert value == pytest.approx(np.sqrt(sums[name]), rel=1e-5 if "param" in name else 3e-4), name
