"""The loss and its hand-written gradient, against autodiff of the plain formulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import batch, differ, leaves, sequences, shaken, shaken_state, small_config


def test_plain_loss_is_the_definition(nb):
    """In float64, a row at a time."""
    rng = np.random.default_rng(0)
    x, head, targets = rng.normal(size=(20, 8)), rng.normal(size=(8, 30)), rng.integers(0, 30, 20)
    logits = 3.0 * np.tanh(x @ head / 3.0)
    want = [-np.log(np.exp(row[target]) / np.exp(row).sum()) for row, target in zip(logits, targets, strict=True)]
    np.testing.assert_allclose(nb.plain_loss(*map(jnp.asarray, (x, head, targets)), 3.0), want, rtol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "softcap", "tolerance"), [("float32", 15.0, 1e-5), ("float32", 2.0, 1e-5), ("bfloat16", 15.0, 0.03)]
)
def test_the_loss_and_its_gradient(nb, dtype, softcap, tolerance):
    """What autodiff makes of plain_loss, also where the cap bends the logits. In bfloat16 the loss itself sees
    unrounded logits; the gradients are of capped logits rounded to 2⁻⁹ of themselves, times the cap: 3%."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, head = jax.random.normal(keys[0], (256, 64), dtype), jax.random.normal(keys[1], (64, 512), dtype) / 4
    targets, weights = jax.random.randint(keys[2], (256,), 0, 512), jax.random.normal(keys[3], (256,))

    def gradients(losses):
        return jax.grad(lambda x, head: losses(x, head, targets, softcap) @ weights, (0, 1))(x, head)

    assert differ(nb.softcap_losses(x, head, targets, softcap), nb.plain_loss(x, head, targets, softcap)) < 1e-5
    for have, want in zip(gradients(nb.softcap_losses), gradients(nb.plain_loss), strict=True):
        assert have.dtype == dtype and differ(have, want) < tolerance


def test_the_models_gradient_is_autodiffs(nb):
    """Through forward's logits, for every weight, to float32's rounding; train_step's first moment is a tenth of it."""
    config = small_config(nb, beta1=0.9)
    params, (tokens, targets) = shaken(nb, config), sequences(config)

    def plain_loss(params):
        logits = nb.forward(config, params, tokens)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1))

    loss, want = jax.jit(jax.value_and_grad(plain_loss))(params)
    state, metrics = nb.train_step(config, shaken_state(nb, config), *batch(config))
    assert abs(metrics["loss"] - loss) < 1e-6 * loss
    for (name, gradient), moment in zip(leaves(want).items(), jax.tree.leaves(state.mu), strict=True):
        assert differ(10 * moment, gradient) < 1e-4, name
