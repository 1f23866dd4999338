"""Our TPU kernels, interpreted, and the loss with its own gradient, against the plain formulation of the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SHAPES = [(2, 3, 256, 128), (1, 2, 384, 256), (3, 1, 128, 128)]  # B, N, T, H; tiles of 256, 128 and 128 tokens


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def differ(a, b):
    """The largest difference, over the largest value of b."""
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


# ---- heads


@pytest.mark.parametrize(("B", "N", "T", "H"), SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_turned_heads(nb, B, N, T, H, dtype):
    """Forward and gradient: to float32's rounding, and in bfloat16 to one rounding of the result."""
    x, g = normal(0, (B * T, N * H), dtype), normal(1, (B, N, T, H), dtype)
    cos, sin = (jnp.asarray(table) for table in nb.rope_tables(T, H))
    plain, plain_vjp = jax.vjp(lambda x: nb.norm_and_rope(nb.split_heads(x, T, H), cos, sin), x)
    turned, turned_vjp = jax.vjp(lambda x: nb.turned_heads(x, cos, sin, True), x)
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-8
    assert turned.dtype == plain.dtype and turned.shape == (B, N, T, H)
    assert differ(turned, plain) < tolerance
    (want,), (have,) = plain_vjp(g), turned_vjp(g)
    assert have.dtype == want.dtype and differ(have, want) < tolerance


@pytest.mark.parametrize(("B", "N", "T", "H"), SHAPES)
def test_moved_heads(nb, B, N, T, H):
    """Not a bit changes on the way there, back, and in the gradients."""
    x, y = normal(0, (B * T, N * H), jnp.bfloat16), normal(1, (B, N, T, H), jnp.bfloat16)
    there, there_vjp = jax.vjp(lambda x: nb.moved_heads(x, T, H, True, True), x)
    back, back_vjp = jax.vjp(lambda y: nb.moved_heads(y, T, H, False, True), y)
    assert (there == nb.split_heads(x, T, H)).all() and (back == nb.merge_heads(y)).all()
    assert (there_vjp(y)[0] == nb.merge_heads(y)).all() and (back_vjp(x)[0] == nb.split_heads(x, T, H)).all()


def test_scaled_tables_scale_the_queries(nb):
    """What project_qkv does instead of scaling q: the same numbers, to float32's rounding."""
    x, scale = normal(0, (2 * 128, 3 * 128)), np.float32(128**-0.5)
    cos, sin = nb.rope_tables(128, 128)
    want = scale * nb.norm_and_rope(nb.split_heads(x, 128, 128), cos, sin)
    assert differ(nb.normed_heads(x, scale * cos, scale * sin), want) < 1e-6
    have = nb.turned_heads(x, jnp.asarray(scale * cos), jnp.asarray(scale * sin), True)
    assert differ(have, want) < 1e-6


@pytest.mark.parametrize("impl", ["einsum", "jax", "splash", "pallas"])
def test_the_scale_of_attention(nb, impl):
    """Scaling the queries and asking for no scale is the same as leaving it to attention."""
    q, k, v = (normal(i, (1, 2, 128, 128)) for i in range(3))
    options = dict(window=128, impl=impl, block_size=128)
    want = nb.attention(q, k, v, **options)
    assert differ(nb.attention(q * 128**-0.5, k, v, scale=1.0, **options), want) < 1e-5
    assert differ(nb.attention(q, k, v, scale=0.3, **options), want) > 0.1


@pytest.mark.parametrize(("T", "H"), [(96, 128), (128, 64)])
def test_heads_that_the_tiles_do_not_fit(nb, T, H):
    """The plain functions, on every platform: the program for a TPU has no kernel of ours."""
    x, (cos, sin) = jnp.zeros((2 * T, 3 * H), jnp.bfloat16), nb.rope_tables(T, H)
    step = jax.jit(lambda x: nb.from_heads(nb.normed_heads(x, cos, sin) + nb.to_heads(x, T, H)))
    text = step.trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in text
    x, (cos, sin) = jnp.zeros((2 * 128, 3 * 128), jnp.bfloat16), nb.rope_tables(128, 128)
    step = jax.jit(lambda x: nb.from_heads(nb.normed_heads(x, cos, sin) + nb.to_heads(x, 128, 128)))
    assert step.trace(x).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3


# ---- the loss


def plain_losses(x, head, targets, softcap):
    logits = jnp.einsum("sd,dv->sv", x, head, preferred_element_type=jnp.float32)
    logits = softcap * jnp.tanh(logits / softcap)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]


@pytest.mark.parametrize("softcap", [15.0, 2.0])
def test_the_loss_and_its_gradient(nb, softcap):
    """In float32 what autodiff makes of the definition, to its rounding; also where the cap bends the logits."""
    x, head, targets = normal(0, (64, 32)), normal(1, (32, 300)), jax.random.randint(jax.random.key(2), (64,), 0, 300)
    weights = normal(3, (64,))

    def gradients(losses):
        return jax.value_and_grad(lambda x, head: losses(x, head, targets, softcap) @ weights, (0, 1))(x, head)

    (have, have_gradients), (want, want_gradients) = gradients(nb.softcap_losses), gradients(plain_losses)
    assert abs(have - want) < 1e-5 * abs(want)
    for a, b in zip(have_gradients, want_gradients, strict=True):
        assert differ(a, b) < 1e-5
    assert differ(nb.softcap_losses(x, head, targets, softcap), plain_losses(x, head, targets, softcap)) < 1e-6


def test_the_loss_in_bfloat16(nb):
    """The loss itself sees unrounded logits; the gradients are those of capped logits rounded to bfloat16, which are
    off by 2^-9 of themselves, times the cap: 3%."""
    x, head = normal(0, (256, 64), jnp.bfloat16), normal(1, (64, 512), jnp.bfloat16) / 4
    targets = jax.random.randint(jax.random.key(2), (256,), 0, 512)
    assert differ(nb.softcap_losses(x, head, targets, 15.0), plain_losses(x, head, targets, 15.0)) < 1e-5

    def gradients(losses):
        return jax.grad(lambda x, head: jnp.mean(losses(x, head, targets, 15.0)), (0, 1))(x, head)

    for a, b in zip(gradients(nb.softcap_losses), gradients(plain_losses), strict=True):
        assert a.dtype == jnp.bfloat16 and differ(a, b) < 0.03


def test_training_is_that_of_the_plain_formulation(nb):
    """10 steps in float32: the losses of autodiff through forward's logits, to 1e-5."""
    config = nb.Config.demo().replace(
        n_head=2, head_dim=32, aspect_ratio=32, vocab_size=256 + 9, seq_len=64, device_batch_size=4,
        compute_dtype="float32", num_iterations=10,
    )  # fmt: skip
    tokens = jax.random.randint(jax.random.key(0), (4, 65), 0, 265)

    def plain_loss(params):
        logits = nb.forward(config, params, tokens[:, :-1]).reshape(-1, 265)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:].reshape(-1, 1), axis=1))

    @jax.jit
    def plain_step(state):
        loss, grads = jax.value_and_grad(plain_loss)(state.params)
        learning_rate = nb.scheduled_lr(state.hyper, state.step)
        return nb.TrainState(state.step + 1, *nb.adamw(state.hyper, state, grads, learning_rate), state.hyper), loss

    plain, ours = nb.init_train_state(config), nb.init_train_state(config)
    for _ in range(10):
        plain, want = plain_step(plain)
        ours, metrics = nb.train_step(config, ours, tokens[:, :-1], tokens[:, 1:])
        assert abs(metrics["loss"] - want) < 1e-5 * want
    assert want < 5.4  # ln 265 is 5.58
