"""Do the fast formulations change what is learned? Losses on the embedded corpus, on this machine.

    python benchmarks/numerics.py [--steps 50] [--long 300] [--seeds 0 1 2]

1. In float32, some steps of training with the fused attention kernel (interpreted where there is no TPU) and the loss
   that has its own gradient, beside the plain formulation: einsum attention, and autodiff through forward's logits.
   It prints the largest relative difference of a step's losses, at the reference's learning rate and at the demo's,
   which is 13 times higher: there training itself amplifies a difference in the last bit. How much, says a plain
   formulation against itself, its weights at the start changed in their last bit.
2. bfloat16 against float32 compute, three seeds each: the mean loss of the last 50 steps. What bfloat16 changes must
   be less than what another seed changes.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from tools.notebooks import load  # noqa: E402

nb = load(ROOT / "02_train.py")


def losses(config, step=nb.train_step, nudge=0.0):
    """Loss of each step of config.num_iterations on the embedded corpus; weights start multiplied by 1 + nudge."""
    shards, _ = nb.list_shards(config)
    state, found = nb.init_train_state(config), []
    state = state._replace(params=jax.tree.map(lambda x: x * jnp.float32(1 + nudge), state.params))
    with nb.PrefetchDataLoader(config, nb.find_tokenizer(config, shards[0]()), shards) as loader:
        for _ in range(config.num_iterations):
            state, metrics = step(config, state, *next(loader))
            found.append(metrics["loss"])
    return np.array(jax.device_get(found))


def plain_step(config, state, tokens, targets):
    """The train step as one would write it down."""

    def loss_fn(params):
        logits = nb.forward(config, params, tokens)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1))

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    params = nb.adamw(state.hyper, state, grads, nb.scheduled_lr(state.hyper, state.step))
    return nb.TrainState(state.step + 1, *params, state.hyper), {"loss": loss}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--long", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    args = parser.parse_args()

    for rate in (nb.Config().learning_rate, nb.Config.demo().learning_rate):
        config = nb.Config.demo().replace(
            n_head=2, head_dim=128, num_iterations=args.steps, compute_dtype="float32", learning_rate=rate,
            attn_impl="einsum",
        )  # fmt: skip
        step = jax.jit(plain_step)
        plain = losses(config, step)
        others = {
            "einsum attention, own gradient of the loss": losses(config),
            "fused attention, own gradient of the loss": losses(config.replace(attn_impl="fused")),
            "the plain formulation, weights nudged": losses(config, step, nudge=2**-23),
        }
        print(f"{args.steps} steps in float32, learning rate {rate}: losses {plain[0]:.4f} … {plain[-1]:.4f}")
        for name, other in others.items():
            print(f"{name:44} largest relative difference {np.max(np.abs(other / plain - 1)):.1e}", flush=True)

    ends = {}
    for dtype in ("float32", "bfloat16"):
        for seed in args.seeds:
            config = nb.Config.demo().replace(num_iterations=args.long, compute_dtype=dtype, seed=seed)
            ends.setdefault(dtype, []).append(losses(config)[-50:].mean())
        print(f"{args.long} steps, {dtype:8}: {'  '.join(f'{x:.4f}' for x in ends[dtype])}", flush=True)
    means = {dtype: np.mean(values) for dtype, values in ends.items()}
    paired = np.subtract(ends["bfloat16"], ends["float32"])
    print(f"bfloat16 - float32: {means['bfloat16'] - means['float32']:+.4f} in the mean, "
          f"{'  '.join(f'{x:+.4f}' for x in paired)} by seed; "
          f"standard deviation over seeds {np.std(ends['float32'], ddof=1):.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
