"""Our TPU kernels, interpreted, and the loss with its own gradient, against the plain formulation of the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def differ(a, b):
    """The largest difference, over the largest value of b."""
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


# ---- attention


CASES = [  # N, K, T, H, window: tiles of 512, 256 and 128 queries, groups, windows that end inside a tile of keys
    (2, 2, 512, 128, 512), (4, 2, 512, 128, 200), (3, 1, 1024, 128, 512), (2, 2, 768, 128, 300), (4, 1, 384, 256, 384),
    (1, 1, 128, 128, 5), (2, 1, 256, 128, 1),
]  # fmt: skip


def projections(N, K, T, H, B=2, dtype=jnp.float32):
    """q, k, v and a gradient, as the matmuls leave them: [B·T, N·H], [B·T, K·H]."""
    return [normal(i, (B * T, n * H), dtype) for i, n in enumerate((N, K, K, N))]


def attend(nb, impl, N, K, T, H, window, q, k, v, g):
    """What attend returns, and the gradients of q, k and v."""
    config = nb.Config(n_head=N, n_kv_head=K, head_dim=H, seq_len=T, aspect_ratio=N * H, attn_impl=impl)

    @jax.jit
    def run(q, k, v, g):
        y, pullback = jax.vjp(lambda *qkv: nb.attend(config, *qkv, T, window), q, k, v)
        return y, *pullback(g)

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


@pytest.mark.parametrize(
    ("T", "H", "kernel"),
    [(256, 128, "attention_forward_kernel"), (4096, 128, "attention_forward_kernel"), (8192, 128, "splash"),
     (256, 64, "splash"), (100, 128, None)],
)  # fmt: skip
def test_what_auto_is_on_a_tpu(nb, T, H, kernel):
    """The fused kernel where it fits, else splash, else XLA's."""
    config = nb.Config(n_head=1, head_dim=H, seq_len=T, aspect_ratio=H, attn_impl="auto")
    x = jax.ShapeDtypeStruct((T, H), jnp.bfloat16)
    step = jax.jit(lambda x: nb.attend(config, x, x, x, T, T))
    text = step.trace(x).lower(lowering_platforms=("tpu",)).as_text()
    for name in ("attention_forward_kernel", "splash"):
        assert (name in text) == (name == kernel), name
    assert ("tpu_custom_call" in text) == bool(kernel)
    text = step.trace(x).lower(lowering_platforms=("cpu",)).as_text()
    assert "tpu_custom_call" not in text


@pytest.mark.parametrize(("T", "H"), [(8192, 128), (100, 128), (256, 64), (4096, 256)])
def test_fused_attention_refuses_what_does_not_fit(nb, T, H):
    with pytest.raises(nb.InputError, match=rf"attn_impl='fused': .*seq_len={T} and head_dim={H}.*splash"):
        nb.Config(n_head=1, head_dim=H, seq_len=T, aspect_ratio=H, attn_impl="fused")


def test_a_model_trains_with_fused_attention(nb):
    """Two steps of the whole model, S and L layers, from one state: the losses of einsum, to float32's rounding."""
    losses = {}
    for impl in ("fused", "einsum"):
        config = nb.Config(
            n_head=2, n_kv_head=1, head_dim=128, aspect_ratio=128, vocab_size=300, seq_len=128, device_batch_size=2,
            compute_dtype="float32", attn_impl=impl, num_iterations=2, learning_rate=0.01, window_pattern="SL",
        )  # fmt: skip
        state = nb.init_train_state(config)
        tokens = jax.random.randint(jax.random.key(0), (2, 129), 0, 300)
        losses[impl] = []
        for _ in range(2):
            state, metrics = nb.train_step(config, state, tokens[:, :-1], tokens[:, 1:])
            losses[impl] += [float(metrics["loss"]), float(metrics["grad_norm"])]
    np.testing.assert_allclose(losses["fused"], losses["einsum"], rtol=1e-5)


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
    monkeypatch.setattr(jax, "devices", lambda: [FakeGpu(capability) if capability else object()])
    assert nb.cudnn_takes(jax.ShapeDtypeStruct((2, 128, 4, H), dtype)) == takes


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
