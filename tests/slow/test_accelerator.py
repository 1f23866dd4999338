"""What a TPU or a GPU should check, in five minutes: `pytest -m accelerator tests/slow/test_accelerator.py` there.

Elsewhere, and without -m, the same tests run on the CPU with small shapes. On the device they need jax for it, pytest,
pyarrow, tiktoken, tqdm, safetensors and protobuf.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import QUIET, ROOT, batch, bits, differ, leaves, script, take_steps, tiny
from tools.notebooks import load

pytestmark = pytest.mark.accelerator
load(ROOT / "02_train.py")  # it sets XLA's flags, which must precede the next line
BACKEND, DEVICE = jax.default_backend(), jax.devices()[0]
CPU = BACKEND == "cpu"
IMPLS = ["einsum", "jax", *["splash", "pallas"] * (BACKEND == "tpu")]
EXACT = functools.partial(jax.default_matmul_precision, "highest")  # else float32 matmuls are in TF32 or bfloat16


def model(nb):
    """The model that this device trains; on a CPU a small one."""
    return tiny(nb, "unused", compute_dtype="bfloat16", seq_len=256) if CPU else nb.Config.for_device()


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


# ---- memory. First of all tests, since the peak is that of the process


def test_memory_is_what_the_compiler_says_and_the_state_is_donated(nb):
    """The peak of the device within 15% of arguments and temporary arrays. A step leaves nothing of the old state."""
    config = model(nb)
    state, (tokens, targets) = nb.init_train_state(config), batch(config)
    plan = nb.train_step.lower(config, state, tokens, targets).compile().memory_analysis()
    assert plan.argument_size_in_bytes == pytest.approx(size((state, tokens, targets)), rel=0.01)
    assert plan.alias_size_in_bytes >= size((state.params, state.mu, state.nu))
    for _ in range(3):
        old = state
        state, metrics = nb.train_step(config, state, tokens, targets)
        assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.mu, old.nu)))
    assert np.isfinite(float(metrics["loss"]))
    if stats := DEVICE.memory_stats():
        said = plan.argument_size_in_bytes + plan.temp_size_in_bytes
        assert stats["peak_bytes_in_use"] == pytest.approx(said, rel=0.15)
    else:
        assert CPU


# ---- attention


def reference(q, k, v, g, window):
    """(y, dq, dk, dv) of attention in float64: q, g [B, N, T, H], k, v [B, K, T, H]."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    (B, N, T, H), K = q.shape, k.shape[1]
    keys, values = (np.repeat(x, N // K, axis=1) for x in (k, v))
    t, s = np.arange(T)[:, None], np.arange(T)[None, :]
    scores = np.where((s <= t) & (t - s <= window), q @ keys.swapaxes(2, 3) / np.sqrt(H), -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    dprobs = g @ values.swapaxes(2, 3)
    dscores = probs * (dprobs - (probs * dprobs).sum(-1, keepdims=True)) / np.sqrt(H)
    dk, dv = ((x.swapaxes(2, 3) @ y).reshape(B, K, N // K, T, H).sum(axis=2) for x, y in ((dscores, q), (probs, g)))
    return probs @ values, dscores @ keys, dk, dv


HEADS = [(4, 4, 64), (4, 2, 128), (4, 1, 256), (2, 2, 96)]  # N, K, H
CASES = [("bfloat16", *heads) for heads in HEADS] + [("float32", 4, 2, 128)]


@pytest.mark.parametrize(("dtype", "N", "K", "H"), CASES)
@pytest.mark.parametrize("window", ["all", "half", "odd"])
@pytest.mark.parametrize("impl", IMPLS)
def test_attention_and_its_gradients(nb, impl, window, dtype, N, K, H):
    """Against float64 on the same rounded numbers. In bfloat16 the weights and results are rounded by 2⁻⁹, and a
    gradient is a sum of such. cuDNN takes bfloat16 and no other; so 'jax' in float32 is XLA's."""
    T = 256 if CPU else 1024
    window = {"all": T, "half": T // 2, "odd": T // 3}[window]
    if impl == "pallas" and window < T or impl in ("splash", "pallas") and (H % 128 or dtype == "float32"):
        pytest.skip("this kernel cannot")
    rng = np.random.default_rng(N * H)
    shapes = [(2, heads, T, H) for heads in (N, K, K, N)]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype) for shape in shapes]

    @jax.jit
    def run(q, k, v, g):
        y, pullback = jax.vjp(functools.partial(nb.attention, window=window, impl=impl), q, k, v)
        return y, *pullback(g)

    with EXACT():
        found = run(*arrays)
    limit = 2**-6 if dtype == "bfloat16" else 5e-6
    if CPU and dtype == "bfloat16" and jax.__version_info__ >= (0, 11):
        limit = 2**-4  # there XLA sums dv in bfloat16: 0.032
    for name, have, want in zip(("y", "dq", "dk", "dv"), found, reference(*arrays, window), strict=True):
        assert have.dtype == dtype and differ(have, want) < limit, (name, differ(have, want))


@pytest.mark.parametrize("impl", ["jax", *["splash", "fused"] * (BACKEND == "tpu")])
@pytest.mark.parametrize("window", ["all", "odd"])
def test_attention_with_norm_and_rope(nb, impl, window):
    """All between the projections, in bfloat16, against einsum in float32 with exact products."""
    T, N, K, H = 256 if CPU else 1024, 4, 2, 128
    window = {"all": T, "odd": T // 3}[window]
    config = nb.Config(n_head=N, n_kv_head=K, head_dim=H, seq_len=T, aspect_ratio=N * H, window_pattern="L")
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (2 * T, n * H), jnp.bfloat16) for key, n in zip(keys, (N, K, K, N))]

    @functools.partial(jax.jit, static_argnums=0)
    def run(impl, q, k, v, g):
        attend = functools.partial(nb.attend, config.replace(attn_impl=impl, mesh=(1, 1)), T=T, window=window)
        y, pullback = jax.vjp(lambda q, k, v: attend(q, k, v), q, k, v)
        return y, *pullback(g)

    with EXACT():
        wants = run("einsum", *(x.astype(jnp.float32) for x in arrays))
    for name, have, want in zip(("y", "dq", "dk", "dv"), run(impl, *arrays), wants, strict=True):
        assert have.dtype == jnp.bfloat16 and differ(have, want) < 2**-5, (name, differ(have, want))


# ---- loss and norm


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_loss_and_its_gradient(nb, dtype):
    """The hand-written gradient against float64. In bfloat16 it is rounded before the two matmuls, and so are the
    logits that it reads."""
    S, D, V, softcap = (64, 32, 512, 15.0) if CPU else (1024, 512, 32768, 15.0)
    rng = np.random.default_rng(0)
    x, head = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((S, D), (D, V)))
    head, targets = head * jnp.asarray(0.5, dtype), jnp.asarray(rng.integers(0, V, S), jnp.int32)
    with EXACT():
        losses, pullback = jax.jit(
            lambda *args: jax.vjp(lambda x, h: nb.softcap_losses(x, h, targets, softcap), *args)
        )(x, head)
        found = losses, *jax.jit(pullback)(jnp.full(S, 1 / S, jnp.float32))

    x, head = (np.asarray(a, np.float64) for a in (x, head))
    capped = np.tanh(x @ head / softcap)
    lse = np.log(np.exp(softcap * capped).sum(-1, keepdims=True))
    is_target = np.arange(V) == np.asarray(targets)[:, None]
    gradient = (np.exp(softcap * capped - lse) - is_target) / S * (1 - capped**2)
    wants = (lse - softcap * (capped * is_target).sum(-1, keepdims=True))[:, 0], gradient @ head.T, x.T @ gradient
    limits = (3e-6, 2**-7, 2**-7) if dtype == "bfloat16" else (3e-6,) * 3
    for name, have, want, limit in zip(("losses", "dx", "dhead"), found, wants, limits, strict=True):
        assert differ(have, want) < limit, (name, differ(have, want))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_norm_and_rope_and_their_gradients(nb, dtype):
    """Against float64: one rounding of the result, and one of the gradient."""
    T, H = 64, 128
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(2, 3, T, H)), dtype) for _ in range(2))
    cos, sin = nb.rope_tables(T, H)
    y, pullback = jax.vjp(jax.jit(lambda x: nb.norm_and_rope(x, cos, sin)), x)

    def turn(x, sin):
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    x, back = np.asarray(x, np.float64), turn(np.asarray(g, np.float64), -sin)
    scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    normed = x * scale
    dx = scale * (back - normed * (back * normed).mean(-1, keepdims=True))
    limit = 2**-8 if dtype == "bfloat16" else 1e-6
    for name, have, want in (("y", y, turn(normed, sin)), ("dx", pullback(g)[0], dx)):
        assert have.dtype == dtype and differ(have, want) < limit, (name, differ(have, want))


# ---- training


def hundred_losses(nb, config, batches):
    state, losses = nb.init_train_state(config), []
    for tokens, targets in batches:
        state, metrics = nb.train_step(config, state, tokens, targets)
        losses.append(metrics["loss"])
    return np.array([float(loss) for loss in losses])


def test_a_hundred_steps_are_those_of_a_cpu(nb, tmp_path):
    """In bfloat16 with the attention that this device chooses, beside float32 and einsum on the CPU, on equal tokens:
    at most 5% apart at each step, 0.2% in the mean. Two runs of the demo on a CPU were 2.6% and 0.05% apart."""
    config = nb.Config.demo().replace(num_iterations=100, mesh=(1, 1))
    config = tiny(nb, tmp_path, num_iterations=100, mesh=(1, 1), learning_rate=4e-3) if CPU else config
    shards, _ = nb.list_shards(config)
    with nb.PrefetchDataLoader(config, nb.find_tokenizer(config, shards[0]()), shards) as loader:
        batches = [tuple(map(np.asarray, next(loader))) for _ in range(config.num_iterations)]
    before = nb.train_step._cache_size()
    have = hundred_losses(nb, config.replace(compute_dtype="bfloat16"), batches)
    assert nb.train_step._cache_size() <= before + 1
    with jax.default_device(jax.devices("cpu")[0]):
        want = hundred_losses(nb, config.replace(compute_dtype="float32", attn_impl="einsum"), batches)
    assert want[-1] < 0.9 * want[0]
    np.testing.assert_allclose(have, want, rtol=0.05)
    assert abs(have.mean() / want.mean() - 1) < 0.002


def test_the_table_reads_a_trace(nb, root, tmp_path):
    """A run with all its parts, in bfloat16. 05's table of its trace has the components, in the time of a step."""
    config = tiny(nb, tmp_path / "run", profile_steps=2, compute_dtype="bfloat16", **QUIET)
    if CPU:  # in a process of its own: in this one a test of broken profilers may have left a trace running
        options = {name: value for name, value in dataclasses.asdict(config).items() if name != "mesh"}
        done = script("02_train.py", cwd=tmp_path, **options)
        assert done.returncode == 0, done.stderr
    else:
        assert nb.train(config)["step"] == 12
    parts, seconds, steps = load(root / "05_preflight.py").read_trace(config.run_dir)
    assert steps == 2 and 0 < sum(parts.values()) <= 1.01 * seconds
    assert {"attention", "MLP", "head and loss", "optimizer"} <= {component for component, _ in parts}
    other = sum(time for (component, _), time in parts.items() if component == "other")
    assert other < 0.5 * sum(parts.values()), parts


def test_a_checkpoint_goes_on(nb, tmp_path):
    """Five steps, and the same five from a checkpoint: to the bit, but on a GPU. There the gradient of the embedding is
    a sum in the order in which threads come."""
    config = (tiny(nb, tmp_path) if CPU else nb.Config.demo()).replace(compute_dtype="bfloat16", num_iterations=10)
    state, _ = take_steps(nb, config, 5)
    path = nb.save_checkpoint(tmp_path, config, state)
    again, _ = nb.load_checkpoint(path, config)
    assert bits(again) == bits(state)
    ours, theirs = (take_steps(nb, config, 5, start) for start in (state, again))
    if BACKEND == "gpu":
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-3)
    else:
        assert ours[1] == theirs[1]
    assert leaves(ours[0]).keys() == leaves(theirs[0]).keys()
