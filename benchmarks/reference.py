"""The train step that tpuchat is measured against, as it was: for the other benchmarks, nothing to run.

That of vorushin/tpuchat (February 2026), T=2048: weights, moments and activations in float32, to which an array for the
learning rate had promoted them (a TPU still multiplies in bfloat16), and nothing donated; RMSNorm without weights,
RoPE, QK-norm, ReLU², x0 and residual scalars, windows SSSL, softcap 15, AdamW. Its model of 8 layers with SwiGLU ran
in bfloat16, weights and moments included. Attention is 02_train.py's, by einsum or splash.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from tools.notebooks import load

nb = load(Path(__file__).resolve().parents[1] / "02_train.py")
T, V = 2048, 32768


def rms_norm(x):
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def rope(x, cos, sin):  # [B, T, N, H]
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = (table[None, :, None, :].astype(x.dtype) for table in (cos, sin))
    return jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)


def reference_step(
    B, depth=16, heads=8, kv_heads=8, head_dim=128, swiglu=0, impl="einsum", block=1024, pattern="SSSL", parts=1,
    dtype=jnp.float32, loss="masked",
):  # fmt: skip
    """(step of flat arguments, those arguments as shapes, how many to donate, windows)."""
    D, F = heads * head_dim, swiglu or 4 * heads * head_dim
    shapes = {"q": (D, heads, head_dim), "k": (D, kv_heads, head_dim), "v": (D, kv_heads, head_dim)}
    shapes |= {"o": (heads, head_dim, D), "up": (D, F), "down": (F, D), "resid": (), "x0": ()}
    shapes |= {"gate": (D, F)} if swiglu else {}
    windows = [T if i == depth - 1 or pattern[i % len(pattern)] == "L" else T // 2 for i in range(depth)]
    cos, sin = nb.rope_tables(T, head_dim)

    def loss_fn(params, tokens, targets):
        with jax.named_scope("embed"):
            x = x0 = rms_norm(params["embed"][tokens])
        for i, (layer, window) in enumerate(zip(params["layers"], windows)):
            with jax.named_scope(f"layer_{i:02d}"), jax.named_scope("attn"):
                x = layer["resid"] * x + layer["x0"] * x0
                h = rms_norm(x)
                q, k, v = (jnp.einsum("btd,dnh->btnh", h, layer[name]) for name in "qkv")
                q, k = (rms_norm(rope(y, cos, sin)) for y in (q, k))
                q, k, v = (jnp.swapaxes(y, 1, 2) for y in (q, k, v))
                y = nb.attention(q, k, v, window=window, impl=impl, block_size=block)
                x = x + jnp.einsum("bnth,nhd->btd", y, layer["o"])
            with jax.named_scope(f"layer_{i:02d}"), jax.named_scope("mlp"):
                h = rms_norm(x)
                u = jnp.einsum("btd,df->btf", h, layer["up"])
                gate = jax.nn.silu(jnp.einsum("btd,df->btf", h, layer["gate"])) if swiglu else None
                u = gate * u if swiglu else jnp.square(jax.nn.relu(u))
                x = x + jnp.einsum("btf,fd->btd", u, layer["down"])
        with jax.named_scope("lm_head"):
            logits = jnp.einsum("btd,dv->btv", rms_norm(x), params["lm_head"]).astype(jnp.float32)
            logits = 15 * jnp.tanh(logits / 15)
        with jax.named_scope("loss"):
            if loss == "gather":
                return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1))
            target = jnp.sum(jnp.where(jnp.arange(V) == targets[..., None], logits, 0), axis=-1)
            return jnp.mean(jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) - target)

    def step(params, mu, nu, count, tokens, targets):
        if parts == 1:
            value, grads = jax.value_and_grad(loss_fn)(params, tokens[0], targets[0])
        else:

            def add(total, batch):
                return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, *batch)), None

            zeros = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)
            (value, grads), _ = jax.lax.scan(add, zeros, (tokens, targets))
        with jax.named_scope("optimizer"):
            mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g / parts, mu, grads)
            nu = jax.tree.map(lambda n, g: 0.95 * n + 0.05 * jnp.square(g / parts), nu, grads)
            c1, c2 = (1 - beta ** (count + 1).astype(dtype) for beta in (0.9, 0.95))
            params = jax.tree.map(
                lambda p, m, n: p - 3e-4 * ((m / c1) / (jnp.sqrt(n / c2) + 1e-8) + 0.1 * p), params, mu, nu
            )
        return params, mu, nu, count + 1, value

    layer = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    params = {"embed": jax.ShapeDtypeStruct((V, D), dtype), "lm_head": jax.ShapeDtypeStruct((D, V), dtype)}
    params |= {"layers": [layer] * depth}
    tokens = jax.ShapeDtypeStruct((parts, B, T), jnp.int32)
    args = params, params, params, jax.ShapeDtypeStruct((), jnp.int32), tokens, tokens
    leaves, tree = jax.tree.flatten(args)
    donated = len(leaves) - 2 if dtype == jnp.bfloat16 else 0
    return lambda *leaves: jax.tree.leaves(step(*jax.tree.unflatten(tree, leaves))), leaves, donated, windows
