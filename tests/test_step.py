"""The train step: the optimizer against optax, accumulation, precision, donation, and what may cost a compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

compilations = []  # the duration of each that XLA has done in this process
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compilations.append(seconds) if "backend_compile" in event else None
)


def small_config(nb, **changes):
    """Two layers, D = 64, windows T/2 and T, in float32; the learning rate is high for 20 steps to change something."""
    config = nb.Config(
        n_head=4, n_kv_head=2, head_dim=16, aspect_ratio=32, vocab_size=300, seq_len=32, compute_dtype="float32",
        attn_impl="einsum", device_batch_size=4, learning_rate=0.01, num_iterations=20, warmup_ratio=0.2,
    )  # fmt: skip
    return config.replace(**changes)


def batch(config, seed=0):
    """(tokens, targets) of a step; the targets are the next tokens, as in a text."""
    shape = (config.tokens_per_step // config.seq_len, config.seq_len + 1)
    stream = jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)
    return stream[:, :-1], stream[:, 1:]


def shaken_state(nb, config):
    """A state before step 0 in which nothing is zero: every weight has a gradient, larger than at a real start."""
    rng, scale = np.random.default_rng(0), {"o": 0.1, "down": 0.1, "lm_head": 0.1}
    state = nb.init_train_state(config)
    return state._replace(
        params=jax.tree_util.tree_map_with_path(
            lambda path, x: x + scale.get(path[-1].key, 0) * jnp.asarray(rng.normal(size=x.shape), jnp.float32),
            state.params,
        )
    )


def run(nb, config, steps, state=None):
    """(state, losses) after some steps, each on a batch of its own."""
    state, losses = state or nb.init_train_state(config), []
    for step in range(steps):
        state, metrics = nb.train_step(config, state, *batch(config, seed=step))
        losses.append(float(metrics["loss"]))
    return state, losses


def leaves(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def equal(one, other):
    return jax.tree.all(jax.tree.map(jnp.array_equal, one, other))


def decayed(params):
    """Which weights AdamW decays: the matmul weights."""
    return {**jax.tree.map(lambda x: x.ndim > 1, params), "embed": False}


# The schedule


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


@pytest.mark.parametrize(
    ("total", "warmup", "warmdown", "final"),
    [(100, 0.1, 0.4, 0.0), (100, 0.1, 0.4, 0.25), (100, 0.5, 0.5, 0.1), (10, 0, 0.5, 0), (10, 0.3, 0, 0), (10, 0, 0, 0),
     (1, 0, 0, 0), (1, 0.02, 0.5, 0), (1, 0, 1, 0.1), (3, 0.5, 0.5, 0), (7, 0, 1, 0)],
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


# AdamW


def test_adamw_is_optax_adamw(nb):
    """20 updates of the same gradients, of very different sizes, some zero: the two differ by the order of a few
    float32 operations (6e-8 each) in each update. eps is of the size of some gradients, so that its place shows."""
    config = small_config(nb, eps=1e-4, beta1=0.8, beta2=0.97, weight_decay=0.3, n_head=2)
    state = nb.init_train_state(config)
    state = state._replace(params=jax.tree.map(lambda p: p + 0.5, state.params))
    learning_rate = 0.01
    oracle = optax.adamw(learning_rate, b1=0.8, b2=0.97, eps=1e-4, weight_decay=0.3, mask=decayed)
    params = start = state.params
    opt_state, update, adamw = oracle.init(params), jax.jit(oracle.update), jax.jit(nb.adamw)
    rng = np.random.default_rng(0)
    for step in range(20):
        grads = jax.tree.map(
            lambda p: jnp.asarray(rng.normal(size=p.shape) * 10.0 ** rng.integers(-6, 2, p.shape), jnp.float32), params
        )
        grads["embed"] = grads["embed"].at[:100].set(0)
        changes, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, changes)
        new, mu, nu = adamw(state.hyper, state, grads, jnp.float32(learning_rate))
        state = nb.TrainState(jnp.int32(step + 1), new, mu, nu, state.hyper)
    adam = opt_state[0]
    for have, want in ((state.mu, adam.mu), (state.nu, adam.nu)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7 * float(y.max())), have, want)
    moved = jax.tree.map(lambda x, y: x - y, state.params, start)
    want = jax.tree.map(lambda x, y: x - y, params, start)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), moved, want)
    assert all(np.abs(x).max() > 0.01 for x in jax.tree.leaves(want))  # a hundred thousand times the tolerance


def test_train_step_is_optax_on_the_mean_gradient(nb):
    """20 whole steps against jax.grad and optax.adamw on the schedule. eps is large beside the rounding of gradients,
    which Adam would otherwise blow up to a full update, where the gradient itself is nearly zero."""
    config = small_config(nb, eps=1e-3, final_lr_frac=0.1)
    state = shaken_state(nb, config)
    params = jax.tree.map(jnp.copy, state.params)
    oracle = optax.adamw(
        lambda step: config.learning_rate * jnp.asarray([plain_schedule(config, i) for i in range(20)])[step],
        b1=config.beta1, b2=config.beta2, eps=config.eps, weight_decay=config.weight_decay, mask=decayed,
    )  # fmt: skip

    @jax.jit
    def oracle_step(params, opt_state, tokens, targets):
        loss, grads = jax.value_and_grad(lambda p: nb.loss_fn(config, p, tokens, targets))(params)
        changes, opt_state = oracle.update(grads, opt_state, params)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        return optax.apply_updates(params, changes), opt_state, loss, norm

    start, opt_state = params, oracle.init(params)
    for step in range(20):
        tokens, targets = batch(config, seed=step)
        params, opt_state, loss, norm = oracle_step(params, opt_state, tokens, targets)
        state, metrics = nb.train_step(config, state, tokens, targets)
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=2e-6), step
        assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-5), step
        rate = config.learning_rate * plain_schedule(config, step)
        assert float(metrics["learning_rate"]) == pytest.approx(rate, rel=1e-6)
    assert int(state.step) == 20
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-6), state.params, params)
    assert all(np.abs(x - y).max() > 1e-3 for x, y in zip(*map(jax.tree.leaves, (params, start)), strict=True))


# Accumulation


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_microbatches_are_one_batch(nb, dtype):
    """The same 16 sequences at once and four at a time, for two steps. The first moment is linear in the gradients. In
    float32 their sums differ in order alone; in bfloat16 each microbatch's gradient is rounded, 2⁻⁹ an entry (and a
    matmul that XLA on a CPU sums in bfloat16, that of o, is 3% off)."""
    changes = {"total_batch_size": 16 * 32, "eps": 1e-3, "compute_dtype": dtype, "aspect_ratio": 64}  # one layer
    whole, split = (small_config(nb, device_batch_size=B, **changes) for B in (16, 4))
    assert (whole.grad_accum_steps, split.grad_accum_steps) == (1, 4)
    start = shaken_state(nb, whole).params
    (one, losses), (four, split_losses) = (run(nb, config, 2, shaken_state(nb, config)) for config in (whole, split))
    exact = dtype == "float32"
    np.testing.assert_allclose(losses, split_losses, rtol=1e-6 if exact else 2e-4)
    for (name, x), y in zip(leaves(one.mu).items(), jax.tree.leaves(four.mu), strict=True):
        assert np.linalg.norm(x - y) < (1e-5 if exact else 0.05) * np.linalg.norm(x), name
    for (name, x), y, was in zip(leaves(one.params).items(), *map(jax.tree.leaves, (four.params, start)), strict=True):
        assert np.abs(x - y).max() < (1e-6 if exact else 1e-3) < 1.5e-3 < np.abs(x - was).max(), name


# Precision


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_keeps_every_dtype_and_shape(nb, dtype, accumulate):
    """A weak type counts as a change: it is one to jit, which would compile a second program for the second step."""
    config = small_config(nb, compute_dtype=dtype, total_batch_size=accumulate * 4 * 32)
    state = nb.init_train_state(config)
    after, metrics = jax.eval_shape(lambda state, *xs: nb.train_step(config, state, *xs), state, *batch(config))
    before = {name: (x.shape, x.dtype, x.weak_type) for name, x in leaves(state).items()}
    assert before == {name: (x.shape, x.dtype, x.weak_type) for name, x in leaves(after).items()}
    kinds = {name: dtype for name, (_, dtype, _) in before.items()}
    assert kinds.pop(".step") == jnp.int32 and set(kinds.values()) == {jnp.dtype("float32")}
    assert {name: (x.shape, x.dtype.name) for name, x in metrics.items()} == dict.fromkeys(
        ("loss", "grad_norm", "learning_rate"), ((), "float32")
    )


def equations(jaxpr):
    """All equations of a jaxpr and of those inside it, but not those of a Pallas kernel, which has its own rules."""

    def inside(value):
        if isinstance(value, core.ClosedJaxpr):
            yield from equations(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            yield from equations(value)
        elif isinstance(value, (tuple, list)):
            for part in value:
                yield from inside(part)

    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for value in equation.params.values():
                yield from inside(value)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bfloat16_is_never_promoted(nb, accumulate):
    """Forward and backward, each matmul of the layers has two bfloat16 operands. A layer has six (q, k, v, o, up, down;
    attention itself is a kernel here), and two more for each in the backward pass."""
    config = small_config(
        nb, compute_dtype="bfloat16", attn_impl="splash", seq_len=128, total_batch_size=accumulate * 4 * 128
    )
    traced = nb.train_step.trace(config, nb.init_train_state(config), *batch(config))
    matmuls = {}
    for equation in equations(traced.jaxpr.jaxpr):
        scope = str(equation.source_info.name_stack)
        if equation.primitive.name == "dot_general" and "layer_" in scope:
            matmuls.setdefault(scope, []).append([x.aval.dtype.name for x in equation.invars])
    assert sum(map(len, matmuls.values())) == 2 * (6 + 12)
    promoted = {scope: pairs for scope, pairs in matmuls.items() if pairs != [["bfloat16"] * 2] * len(pairs)}
    assert not promoted


def test_no_float64_even_where_it_is_allowed(nb):
    """A numpy float64 scalar in the step is harmless as long as jax disables float64, but it is strongly typed: it
    promotes bfloat16. With float64 enabled it leaves a trace."""
    config = small_config(nb, compute_dtype="bfloat16", total_batch_size=2 * 4 * 32)
    state, tokens = nb.init_train_state(config), batch(config)
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # before jax 0.8
    with enable_x64(True):
        traced = nb.train_step.trace(config, state, *tokens)
    wide = [
        str(equation)
        for equation in equations(traced.jaxpr.jaxpr)
        if any(getattr(x.aval, "dtype", None) in (np.float64, np.complex128) for x in equation.outvars)
        and not all(getattr(x.aval, "weak_type", False) for x in equation.outvars)
    ]
    assert not wide


# Compilation


def test_one_program_for_the_whole_run(nb):
    """The first step compiles; no later one does, nor the first one on a checkpoint's arrays, which come from the
    host."""
    config = small_config(nb, seq_len=48)  # a shape that no other test has
    state, before = nb.init_train_state(config), nb.train_step._cache_size()
    batches = [batch(config, seed) for seed in range(5)]
    state, _ = nb.train_step(config, state, *batches[0])
    first = len(compilations)
    for tokens, targets in batches[1:]:
        state, _ = nb.train_step(config, state, tokens, targets)
    assert len(compilations) == first
    nb.train_step(config, jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state), *batches[0])
    assert nb.train_step._cache_size() == before + 1


FREE = [
    {"learning_rate": 0.02}, {"weight_decay": 0.5}, {"beta1": 0.5}, {"beta2": 0.5}, {"eps": 1e-2}, {"seed": 1},
    {"warmup_ratio": 0.5}, {"warmdown_ratio": 0.75}, {"num_iterations": 8}, {"final_lr_frac": 0.5},
]  # fmt: skip


def test_a_sweep_compiles_once(nb):
    """Each free field takes effect, on the same compiled program."""
    config = small_config(nb, num_iterations=4, warmup_ratio=0.25)
    base, _ = run(nb, config, 4)
    programs, done = nb.train_step._cache_size(), len(compilations)
    results = [base] + [run(nb, config.replace(**changes), 4)[0] for changes in FREE]
    assert nb.train_step._cache_size() == programs and len(compilations) == done
    different = {hash(np.asarray(state.params["layers"][0]["up"]).tobytes()) for state in results}
    assert len(different) == 1 + len(FREE)
    assert equal(run(nb, config, 4)[0], base)


def test_no_free_field_is_read_while_tracing(nb):
    """It would be compiled in, and the sweep that changes it would change nothing."""
    free = {field.name for field in dataclasses.fields(nb.Config) if not field.compare}
    assert {"learning_rate", "seed", "num_iterations"} < free and not free & {"n_head", "softcap", "compute_dtype"}
    read = set()

    @jax.tree_util.register_static
    class Watched(nb.Config):
        def __getattribute__(self, name):
            if watching and name in free:
                read.add(name)
            return super().__getattribute__(name)

    watching = False
    config = Watched(**dataclasses.asdict(small_config(nb, total_batch_size=2 * 4 * 32)))
    state, (tokens, targets) = nb.init_train_state(config), batch(config)
    watching = True
    config.learning_rate  # noqa: B018
    assert read == {"learning_rate"}  # it does watch
    read.clear()
    nb.train_step.lower(config, state, tokens, targets)
    nb.evaluation_step.lower(config, state.params, tokens, targets)
    jax.jit(nb.init_params).lower(config, jax.random.key(0))
    rows = np.ones(len(tokens), np.int32)
    key, scalars = jax.random.key(0), (np.float32(1), np.int32(5), np.float32(1))
    nb.sample_tokens.lower(config, state.params, tokens, rows, 2 * rows, 0, key, *scalars)
    assert not read


# Buffers


def test_the_state_is_donated(nb):
    """The old state's memory is the new state's: its arrays are gone, every one, and the inputs are not."""
    config = small_config(nb)
    state, (tokens, targets) = nb.init_train_state(config), batch(config)
    new, _ = nb.train_step(config, state, tokens, targets)
    kept = [name for name, x in leaves(state).items() if not x.is_deleted()]
    assert not kept
    assert not any(x.is_deleted() for x in (tokens, targets, *jax.tree.leaves(new)))


# Learning


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_batch_overfits(nb, dtype):
    """128 random tokens learned by heart. Their entropy given the one before is near zero, so the loss can go there."""
    config = small_config(nb, num_iterations=60, compute_dtype=dtype, weight_decay=0.0)
    state, (tokens, targets) = nb.init_train_state(config), batch(config)
    losses = []
    for _ in range(60):
        state, metrics = nb.train_step(config, state, tokens, targets)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 5.5 and losses[-1] < 0.02, losses[::10]
