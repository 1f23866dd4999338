"""The train step: accumulation, precision, donation, a bad batch, and what may cost a compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from tests.helpers import batch, interpreted, leaves, sequences, shaken, shaken_state, small_config, take_steps

compilations = []  # the duration of each that XLA has done in this process
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compilations.append(seconds) if "backend_compile" in event else None
)


# Accumulation


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_microbatches_are_one_batch(nb, dtype):
    """The same 16 sequences at once and four at a time, for two steps. The first moment is linear in the gradients. In
    float32 their sums differ in order alone; in bfloat16 each microbatch's gradient is rounded, 2⁻⁹ an entry (and a
    matmul that XLA on a CPU sums in bfloat16, that of o, is 3% off)."""
    changes = dict(total_batch_size=16 * 32, eps=1e-3, compute_dtype=dtype, aspect_ratio=64, weight_decay=0.0)
    whole, split = (small_config(nb, device_batch_size=B, **changes) for B in (16, 4))
    assert (whole.grad_accum_steps, split.grad_accum_steps) == (1, 4)
    start = shaken(nb, whole)
    (one, losses), (four, split_losses) = (
        take_steps(nb, config, 2, shaken_state(nb, config)) for config in (whole, split)
    )
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
    config = small_config(nb, compute_dtype=dtype, total_batch_size=accumulate * 2 * 32)
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
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params) if equation.primitive.name != "pallas_call" else ():
            value = getattr(value, "jaxpr", value)
            if isinstance(value, core.Jaxpr):
                yield from equations(value)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bfloat16_is_never_promoted(nb, accumulate):
    """Forward and backward, each matmul of the layers has two bfloat16 operands. A layer has six (q, k, v, o, up, down;
    attention itself is a kernel here), and two more for each in the backward pass."""
    config = small_config(
        nb, compute_dtype="bfloat16", attn_impl="splash", seq_len=128, total_batch_size=accumulate * 2 * 128
    )
    with interpreted():
        traced = nb.train_step.trace(config, nb.init_train_state(config), *batch(config))
    matmuls = {}
    for equation in equations(traced.jaxpr.jaxpr):
        scope = str(equation.source_info.name_stack)
        if equation.primitive.name == "dot_general" and "layer_" in scope:
            matmuls.setdefault(scope, []).append([x.aval.dtype.name for x in equation.invars])
    assert sum(map(len, matmuls.values())) == 3 * (6 + 12)
    promoted = {scope: pairs for scope, pairs in matmuls.items() if pairs != [["bfloat16"] * 2] * len(pairs)}
    assert not promoted


def test_no_float64_even_where_it_is_allowed(nb):
    """A numpy float64 scalar in the step is harmless as long as jax disables float64, but it is strongly typed: it
    promotes bfloat16. With float64 enabled it leaves a trace."""
    config = small_config(nb, compute_dtype="bfloat16", total_batch_size=2 * 2 * 32)
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
    """The first step compiles; no later one does, nor the first on a checkpoint's arrays, which come from the host."""
    config = small_config(nb, seq_len=48)  # a shape that no other test has
    before = nb.train_step._cache_size()
    state, _ = take_steps(nb, config, 1)
    first = len(compilations)
    state, _ = take_steps(nb, config, 4, state)
    assert len(compilations) == first
    take_steps(nb, config, 1, jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state))
    assert nb.train_step._cache_size() == before + 1


FREE = [
    {"learning_rate": 0.02}, {"weight_decay": 0.5}, {"beta1": 0.5}, {"beta2": 0.5}, {"eps": 1e-2}, {"seed": 1},
    {"warmup_ratio": 0.5}, {"warmdown_ratio": 0.75}, {"num_iterations": 8}, {"final_lr_frac": 0.5},
]  # fmt: skip


def test_a_sweep_compiles_once(nb):
    """Each free field takes effect, on the same compiled program."""
    config = small_config(nb, num_iterations=4, warmup_ratio=0.25)
    base, _ = take_steps(nb, config, 4)
    programs, done = nb.train_step._cache_size(), len(compilations)
    results = [base] + [take_steps(nb, config.replace(**changes), 4)[0] for changes in FREE]
    assert nb.train_step._cache_size() == programs and len(compilations) == done
    different = {hash(np.asarray(state.params["layers"][0]["up"]).tobytes()) for state in results}
    assert len(different) == 1 + len(FREE)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, take_steps(nb, config, 4)[0], base))


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
    config = Watched(**dataclasses.asdict(small_config(nb, total_batch_size=2 * 2 * 32)))
    state, (tokens, targets) = nb.init_train_state(config), sequences(config)
    watching = True
    config.learning_rate  # noqa: B018
    assert read == {"learning_rate"}  # it does watch
    read.clear()
    nb.train_step.lower(config, state, *batch(config))
    nb.evaluation_step.lower(config, state.params, tokens, targets)
    jax.jit(nb.init_params).lower(config, jax.random.key(0))
    rows = np.ones(len(tokens), np.int32)
    key, scalars = jax.random.key(0), (np.float32(1), np.int32(5), np.float32(1))
    nb.sample_tokens.lower(config, state.params, tokens, rows, 2 * rows, 0, key, *scalars)
    assert not read


# The state and the batch


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 1, "vocab_size": 1000, "compute_dtype": "bfloat16"}])
def test_state_shapes_is_the_state_without_arrays(nb, changes):
    config = small_config(nb, **changes)
    shapes, state = nb.state_shapes(config), nb.init_train_state(config)
    assert all(type(x) is jax.ShapeDtypeStruct for x in jax.tree.leaves(shapes))
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), state
    )
    far = config.replace(mesh=(4, 16), n_head=64, n_kv_head=64)  # of more devices than are here
    assert nb.state_shapes(far).params["embed"].shape == (config.vocab_size, 64 * 16)


def test_put(nb):
    """On one device: any tree, as it is, on the device."""
    tree = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": (np.float32(2), jnp.ones(3, jnp.bfloat16))}
    there = nb.put(small_config(nb), tree, nb.ROWS)
    assert jax.tree.structure(there) == jax.tree.structure(tree)
    for x, y in zip(*map(jax.tree.leaves, (there, tree)), strict=True):
        assert isinstance(x, jax.Array) and x.devices() == {jax.devices()[0]} and x.dtype == y.dtype and (x == y).all()


def test_a_batch_may_be_flat_on_one_device(nb):
    """[A·B, T] is [A, B, T], to the bit."""
    config = small_config(nb, total_batch_size=2 * 2 * 32)
    assert batch(config)[0].shape == config.batch_shape == (2, 2, 32)
    flat, whole = (nb.train_step(config, shaken_state(nb, config), *xs) for xs in (sequences(config), batch(config)))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, flat, whole))


def test_memory_of_a_step(nb):
    """The state, float32 weights and two moments of them, the batch, and not absurdly more."""
    config = small_config(nb)
    state = 3 * 4 * nb.count_params(config)["total"]
    assert state < nb.memory_of_step(config) < 20 * state


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
    """64 random tokens learned by heart. Their entropy given the one before is near zero, so the loss can go there."""
    config = small_config(nb, num_iterations=60, compute_dtype=dtype, weight_decay=0.0)
    _, losses = take_steps(nb, config, 60, seed=0)
    assert losses[0] > 5.5 and losses[-1] < 0.02, losses[::10]


def test_a_bad_batch_is_skipped(nb):
    """nonfinite='skip': an infinite gradient leaves weights and moments as they are, to the bit; the step counts. A
    good batch is not touched by the option."""
    config = small_config(nb, nonfinite="skip")
    state = shaken_state(nb, config)
    bad = state._replace(params={**state.params, "lm_head": state.params["lm_head"].at[0, 0].set(np.inf)})
    before = jax.tree.map(np.array, bad)
    after, metrics = nb.train_step(config, bad, *batch(config))
    assert not np.isfinite(float(metrics["loss"]) + float(metrics["grad_norm"]))
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.mu, after.nu), before[1:4])
    assert int(after.step) == 1
    fine, plain = (take_steps(nb, config.replace(nonfinite=rule), 1)[0] for rule in ("skip", "stop"))
    jax.tree.map(np.testing.assert_array_equal, fine, plain)
