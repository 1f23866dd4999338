"""How much faster is sampling with the KV cache than a forward pass for every token?

    python benchmarks/generate.py [--rounds 3]

The demo with a context of 512 tokens, greedy, a prompt of one token, 511 new ones; all is compiled before it is timed,
in turn. Prints tokens per second without and with the cache in float32, whether both give the same tokens, and with it
in bfloat16 for one, three and eight prompts at once. Ratios are to the first row.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from common import in_turn, load

T, BOS = 512, 7
nb = load("02_train.py")


def with_cache(config, params, prompts):
    """Returns tokens, int32 [prompts, T], that follow BOS alone."""
    tokens, lengths = np.full((prompts, T), BOS, np.int32), np.ones(prompts, np.int32)
    no_stop, greedy = np.int32(-1), (np.float32(0), np.int32(1), np.float32(1))
    return nb.sample_tokens(config, params, tokens, lengths, lengths * T, no_stop, jax.random.key(0), *greedy)


def without_cache(config, params):
    """The same for one prompt, by T − 1 forward passes over all T positions."""
    tokens = jnp.full((1, T), BOS, jnp.int32)
    for position in range(T - 1):
        tokens = one_more(config, params, tokens, position)
    return tokens


@jax.jit
def one_more(config, params, tokens, position):
    following = jnp.argmax(nb.forward(config, params, tokens)[0, position])
    return tokens.at[0, position + 1].set(following.astype(jnp.int32))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    config, rng = nb.Config.demo().replace(seq_len=T, compute_dtype="float32", mesh=(1, 1)), np.random.default_rng(0)
    params = nb.init_params(config, jax.random.key(0))  # at its start every layer writes zeros: these have opinions
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.05), jnp.float32), params)
    short = config.replace(compute_dtype="bfloat16")
    ways = {"float32, no cache": (1, lambda: without_cache(config, params))}
    ways["float32"] = 1, lambda: with_cache(config, params, 1)
    ways |= {f"bfloat16, {n} prompts": (n, lambda n=n: with_cache(short, params, n)) for n in (1, 3, 8)}

    first, second, *_ = (np.asarray(function()) for _, function in ways.values())  # compiles
    seconds = in_turn({name: function for name, (_, function) in ways.items()}, rounds)
    rates = {name: n * (T - 1) / min(seconds[name]) for name, (n, _) in ways.items()}
    for name, rate in rates.items():
        ratio = rate / rates["float32, no cache"]
        print(f"{name:20}{rate:8,.0f} tok/s{1e3 / rate:8.2f} ms a token   ratio {ratio:.1f}")
    print(f"the same {T - 1} tokens with the cache and without: {(first == second).all()}")


if __name__ == "__main__":
    main()
