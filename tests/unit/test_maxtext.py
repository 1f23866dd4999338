"""What 04_maxtext.py has of its own. The cells that it copies from 02_train.py are tested there."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import QUIET, differ, interpreted, script, sequences, shaken, small_config, take_steps

# ---- Config


def test_exact_counts(mt):
    """By hand: V·D twice, and a layer's q, k, v, o and three matrices of the MLP."""
    D, F, V = 1024, 3072, 32768
    for config, layers, K in ((mt.Config(), 24, 2), (mt.Config.small(), 8, 1)):
        attention, mlp = layers * (2 * D * 4 * 256 + 2 * D * K * 256), layers * 3 * D * F
        counts = mt.count_params(config)
        assert counts == {"embed": V * D, "attn": attention, "mlp": mlp, "lm_head": V * D, "total": sum(
            (2 * V * D, attention, mlp))}  # fmt: skip
    assert mt.count_params(mt.Config())["total"] == 369_098_752  # the 369M of the title


def test_the_defaults(mt):
    config = mt.Config()
    assert (config.n_embd, config.depth, config.mlp_dim, config.n_head, config.kv_heads, config.head_dim) == (
        1024, 24, 3072, 4, 2, 256,
    )  # fmt: skip
    assert (config.vocab_size, config.seq_len, config.learning_rate) == (32768, 2048, 7e-4)
    assert set(config.windows) == {2048}
    small = mt.Config.small()
    assert (small.depth, small.kv_heads, small.tokens_per_step) == (8, 1, 64 * 2048)


@pytest.mark.parametrize(
    ("field", "value", "nearest"),
    [("n_embd", 1000, "768 or 1024"), ("mlp_dim", 3000, "2816 or 3072"), ("head_dim", 128, "256"),
     ("vocab_size", 50257, "50176 or 50432"), ("seq_len", 2000, "1792 or 2048")],
)  # fmt: skip
def test_dimensions_that_do_not_fill_the_matrix_unit(mt, field, value, nearest):
    with pytest.raises(mt.InputError, match=rf"^{field}={value}: must be a multiple of 256, .*: {nearest}$"):
        mt.Config(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(remat="some"), r"remat='some': must be one of none, minimal, full"),
        (dict(layers="rolled"), r"layers='rolled': must be one of unrolled, scanned"),
        (dict(layers="scanned", window_pattern="SL"), r"layers='scanned': .*window_pattern='SL'"),
        (dict(loss_chunks=3), r"loss_chunks=3: must divide the 16384 tokens"),
        (dict(loss_chunks=0), r"loss_chunks=0: must be positive"),
        (dict(n_layer=0), r"n_layer=0: must be positive"),
        (dict(n_kv_head=3), r"n_kv_head=3: must divide n_head=4"),
    ],
)
def test_other_mistakes(mt, changes, message):
    with pytest.raises(mt.InputError, match=message):
        mt.Config(**changes)


def test_options_keep_what_base_config_says_of_them(mt):
    """A field with another default has the type, help and rule of BaseConfig's; each field of its own has a help."""
    base, own = ({field.name: field for field in dataclasses.fields(cls)} for cls in (mt.BaseConfig, mt.Config))
    for name in base:
        assert own[name].metadata == base[name].metadata, name
        assert (own[name].type, own[name].compare) == (base[name].type, base[name].compare), name
    new = {name: field for name, field in own.items() if name not in base}
    assert all(field.metadata["help"] for field in new.values())
    resumable = {name for name, field in new.items() if field.metadata["resume"]}
    assert resumable == {"remat", "loss_chunks", "layers"}


# ---- the model


def test_loss_at_init_is_ln_v(mt):
    config = small_config(mt)
    params = mt.init_params(config, jax.random.key(0))
    for chunks in (1, 4):
        loss = jax.jit(mt.loss_fn)(config.replace(loss_chunks=chunks), params, *sequences(config))
        assert loss == pytest.approx(np.log(config.vocab_size), rel=1e-3)


def loss_and_grads(mt, config, params):
    with interpreted():
        step = jax.jit(jax.value_and_grad(mt.loss_fn, 1))
        return step(config, mt.cast_weights(config, params), *sequences(config))


@pytest.mark.parametrize("changes", [dict(remat="minimal"), dict(remat="full"), dict(layers="scanned")])
def test_rematerialization_and_scan_change_nothing(mt, changes):
    """Loss and gradients agree to float32's rounding: XLA may fuse otherwise what is computed again (jax 0.7.2 does;
    0.12 only in a scan)."""
    config = small_config(mt, attn_impl="fused")
    params = shaken(mt, config)
    want, want_grads = loss_and_grads(mt, config, params)
    have, have_grads = loss_and_grads(mt, config.replace(**changes), params)
    assert abs(have - want) < 1e-6 * want
    for a, b in zip(jax.tree.leaves(have_grads), jax.tree.leaves(want_grads), strict=True):
        assert a.dtype == b.dtype and differ(a, b) < 1e-5


def test_what_a_policy_keeps(mt):
    """Numbers a token that one more layer keeps for the backward pass: full keeps the residual stream; minimal also q,
    k, v, gate, up and the result of attention; none what autodiff asks for."""

    def kept(**changes):
        config = small_config(mt, attn_impl="fused", device_batch_size=3, **changes)
        params, (tokens, _) = mt.init_params(config, jax.random.key(0)), sequences(config)
        rest = jax.eval_shape(lambda p: jax.vjp(lambda p: mt.trunk(config, p, tokens), p)[1], params)
        # Not the weights, nor the RoPE tables: an axis of B·T = 768 is that of the tokens.
        return sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(rest) if x.shape[:1] == (768,))

    layer = {remat: kept(remat=remat, n_layer=4) - kept(remat=remat, n_layer=3) for remat in mt.REMATS}
    D, F, NH, KH = 256, 256, 512, 256
    assert layer["full"] == D
    assert layer["minimal"] == D + NH + 2 * KH + 2 * F + NH
    assert layer["none"] > 1.5 * layer["minimal"]


# ---- the loss in chunks


@pytest.mark.parametrize("chunks", [2, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-7)])
def test_chunked_loss(mt, chunks, dtype, tolerance):
    """Loss and gradients are the plain ones: to 1e-5 in float32, and in bfloat16 to three roundings of 2^-9 each, of
    the gradient of the logits, of the result, and of its product with the gradient of the loss. The loss itself is a
    float32 sum of the same terms in both."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, head = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, ((256, 64), (64, 512))))
    head, targets = head / 4, jax.random.randint(keys[2], (256,), 0, 512)

    def plain(x, head):
        return 3 * jnp.mean(mt.softcap_losses(x, head, targets, 15.0))

    def chunked(x, head):
        return 3 * mt.chunked_mean_loss(mt.Config(softcap=15.0, loss_chunks=chunks), x, head, targets)

    want, want_grads = jax.jit(jax.value_and_grad(plain, (0, 1)))(x, head)
    have, have_grads = jax.jit(jax.value_and_grad(chunked, (0, 1)))(x, head)
    assert abs(have - want) < 1e-6 * want and abs(jax.jit(chunked)(x, head) - want) < 1e-6 * want
    for a, b in zip(have_grads, want_grads, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and differ(a, b) < tolerance


def test_chunks_keep_no_logits(mt):
    """The forward pass keeps the two gradients, and no array of tokens × V."""
    x, head = jax.ShapeDtypeStruct((1024, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16)
    targets = jnp.zeros(1024, jnp.int32)
    loss = functools.partial(mt.chunked_mean_loss, mt.Config(loss_chunks=8))
    kept = jax.eval_shape(lambda x, w: jax.vjp(lambda *a: loss(*a, targets), x, w)[1], x, head)
    assert sorted(leaf.size for leaf in jax.tree.leaves(kept) if leaf.size > 1) == [1024 * 64, 64 * 4096]


def test_a_part_of_the_tokens_has_rows_of_every_device(mt, monkeypatch):
    """from_parts is the inverse of in_parts; on several devices both constrain, and a part has rows of each device."""
    x, constrained = jnp.arange(48).reshape(24, 2), []
    monkeypatch.setattr(mt, "constrain", lambda config, x, *spec: constrained.append(spec) or x)
    for devices, constraints in ((1, []), (4, [(None, mt.ROWS)] * 2 + [(mt.ROWS,)] * 2)):
        config = mt.Config(mesh=(1, devices))
        parts = mt.in_parts(config, x, 3)
        assert parts.shape == (3, 8, 2)
        np.testing.assert_array_equal(mt.from_parts(config, parts), x)
        rows = 24 // devices  # of a device
        assert {int(row) // 2 // rows for row in parts[0, :, 0]} == set(range(devices))
        assert constrained == constraints


def test_a_model_trains_in_chunks_and_microbatches(mt):
    """Four steps with remat, scan, chunks and accumulation have the losses of the default, to float32's rounding."""
    plain = small_config(mt)
    other = plain.replace(
        loss_chunks=4, remat="minimal", layers="scanned", device_batch_size=1, total_batch_size=2 * 256
    )
    want, have = (take_steps(mt, config, 4, seed=0)[1] for config in (plain, other))
    assert want[-1] < 0.9 * want[0]
    np.testing.assert_allclose(have, want, rtol=2e-5)


# ---- as a script


def test_the_script_trains_and_refuses(tmp_path):
    """A few steps of the demo from the command line; then a dimension and a preset that are refused in one line."""
    settings = dict(mlp_dim=256, n_layer=1, device_batch_size=2, eval_tokens=1024, final_eval_tokens=1024,
                    log_interval=1, run_dir="run", num_iterations=4, **QUIET)  # fmt: skip
    done = script("04_maxtext.py", "--preset=demo", cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    assert re.search(r"model +2\.\dM parameters \(embed 1\.0, attn 0\.3, mlp 0\.2, lm_head 1\.0\)", done.stdout)
    assert (tmp_path / "run" / "loss.png").exists()
    for words, message in (
        (["--n_embd=300"], "n_embd=300: must be a multiple of 256, the matrix unit's width: 256 or 512"),
        (["--preset"], "preset='': must be one of small, demo, v6e_8, v6e_64"),
    ):
        wrong = script("04_maxtext.py", *words, cwd=tmp_path)
        assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", f"error: {message}\n")


# ---- sizes for several chips


def test_presets_follow_the_arithmetic(mt):
    """About 1.3B and 7B parameters, 20 tokens for each of them, on 8 and 64 chips."""
    for name, chips, parameters in (("v6e_8", 8, 1.34e9), ("v6e_64", 64, 6.8e9)):
        config, rest = mt.preset_option(["--preset", name, "--seed=1"])
        assert rest == ["--seed=1"] and config == getattr(mt.Config, name)() and config.devices == chips
        counted = mt.count_params(config)["total"]
        assert abs(counted / parameters - 1) < 0.02
        tokens = config.total_steps * config.tokens_per_step
        assert abs(tokens / (20 * counted) - 1) < 1e-3
    assert mt.preset_option(["--n_layer=2"]) == (None, ["--n_layer=2"])
    with pytest.raises(mt.InputError, match="preset='v6e-8'.*small, demo, v6e_8, v6e_64"):
        mt.preset_option(["--preset=v6e-8"])
