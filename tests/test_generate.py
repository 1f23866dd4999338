"""Sampling: the KV cache against the plain forward pass, one compilation for all prompts, and what may be asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

PROMPTS = ["It is a truth", "", "She said that the people of the United States were", "é☃"]


@pytest.fixture(scope="module")
def tokenizer(nb):
    """Bytes, three pairs and the special tokens."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"e ", b" t"]
    return nb.make_tokenizer({token: rank for rank, token in enumerate(tokens)})


def small_config(nb, **changes):
    """D = 64, three layers with the windows T/2, T, T; K = 2 of N = 4; more rows than the tokenizer has tokens."""
    config = nb.Config(
        n_head=4, n_kv_head=2, head_dim=16, aspect_ratio=21, vocab_size=300, seq_len=48, window_pattern="SL",
        compute_dtype="float32", attn_impl="einsum",
    )  # fmt: skip
    return config.replace(**changes)


def shaken(nb, config, tokenizer, seed=0):
    """Parameters with opinions: every weight has a say, logits are far apart. A token without text, and BOS, has the
    logit 0 and is never the largest, so that texts go on to the end."""
    params = nb.init_params(config, jax.random.key(seed))
    rng, scale = np.random.default_rng(seed), {"o": 0.1, "down": 0.05, "lm_head": 0.3}
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x + scale.get(path[-1].key, 0) * jnp.asarray(rng.normal(size=x.shape), jnp.float32), params
    )
    first_special = tokenizer.n_vocab - len(tokenizer.special_tokens_set)
    return {**params, "lm_head": params["lm_head"].at[:, first_special:].set(0)}


def uncached(nb, config, params, ids, count):
    """`count` ids after `ids`, each the argmax of a forward pass over all tokens before it."""
    T = config.seq_len
    forward = jax.jit(nb.forward)  # on whole contexts: what follows a position cannot change it
    ids = list(ids)
    for _ in range(count):
        tokens = jnp.asarray(ids + [0] * (T - len(ids)), jnp.int32)[None]
        ids.append(int(forward(config, params, tokens)[0, len(ids) - 1].argmax()))
    return ids


def sampled(nb, config, params, prompts, end, *, temperature=0.0, top_k=300, top_p=1.0, seed=0, stop=-1):
    """sample_tokens on rows of token ids, as a numpy array."""
    tokens = np.zeros((len(prompts), config.seq_len), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    out = nb.sample_tokens(
        config, params, tokens, lengths, np.full(len(prompts), end, np.int32), stop, jax.random.key(seed),
        np.float32(temperature), np.int32(top_k), np.float32(top_p),
    )  # fmt: skip
    return np.asarray(out)


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_head": 4, "window_pattern": "L"}, {"n_kv_head": 1, "window_pattern": "S"}]
)
def test_greedy_is_the_argmax_of_forward(nb, tokenizer, changes):
    """Token for token over the whole context, from one token on, so that windows slide and caches fill."""
    config = small_config(nb, **changes)
    params = shaken(nb, config, tokenizer)
    want = uncached(nb, config, params, [7], config.seq_len - 1)
    have = sampled(nb, config, params, [[7]], config.seq_len)[0]
    assert have.tolist() == want
    assert len(set(want)) > 10  # not a loop of a few tokens, on which any cache would agree


def test_prompts_are_read_before_they_are_continued(nb, tokenizer):
    """Rows of different lengths, each continued as if alone; rows that end before others stop there."""
    config = small_config(nb)
    params = shaken(nb, config, tokenizer)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, n).tolist() for n in (1, 5, 20, 47)]
    out = sampled(nb, config, params, prompts, config.seq_len)
    for row, ids in zip(out, prompts, strict=True):
        assert row.tolist() == uncached(nb, config, params, ids, config.seq_len - len(ids))


def test_text_of_the_uncached_argmax(nb, tokenizer):
    """generate itself: BOS first, then the prompt, then the argmax, decoded after the prompt as it was given."""
    config = small_config(nb)
    params, bos = shaken(nb, config, tokenizer), tokenizer.encode_single_token("<|bos|>")
    prompts = ["It is a truth", "", "é☃"]
    texts = nb.generate(config, params, tokenizer, prompts, max_new_tokens=20, temperature=0)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = [bos, *tokenizer.encode_ordinary(prompt)]
        want = uncached(nb, config, params, ids, 20)[len(ids) :]
        assert text == prompt + tokenizer.decode(want)


def test_a_batch_equals_its_single_prompts(nb, tokenizer):
    config = small_config(nb)
    params = shaken(nb, config, tokenizer)
    batch = nb.generate(config, params, tokenizer, PROMPTS, max_new_tokens=20, temperature=0)
    assert batch == [nb.generate(config, params, tokenizer, p, max_new_tokens=20, temperature=0) for p in PROMPTS]
    assert [text[: len(prompt)] for text, prompt in zip(batch, PROMPTS, strict=True)] == PROMPTS


def test_one_compilation_for_every_request(nb, tokenizer):
    """Neither the prompt's length nor any option of sampling is part of the program."""
    config = small_config(nb)
    params = shaken(nb, config, tokenizer)
    nb.generate(config, params, tokenizer, "a", max_new_tokens=3)
    before = nb.sample_tokens._cache_size()
    for i, prompt in enumerate([*PROMPTS, "x" * 200]):
        nb.generate(
            config,
            params,
            tokenizer,
            prompt,
            max_new_tokens=1 + 20 * i,
            temperature=i / 4,
            top_k=1 + i,
            top_p=1 / (i + 1),
        )
    assert nb.sample_tokens._cache_size() == before


def test_sampling_stops_at_bos(nb, tokenizer):
    """Where BOS would be the most likely from the start, nothing is added; where it comes later, the text ends
    before it, and the rows beside it go on."""
    config = small_config(nb)
    params, bos = shaken(nb, config, tokenizer), tokenizer.encode_single_token("<|bos|>")
    want = uncached(nb, config, params, [7], config.seq_len - 1)
    stop = want[12]
    first = want.index(stop)
    assert first > 1
    out = sampled(nb, config, params, [[7], [9]], config.seq_len, stop=stop)
    assert out[0].tolist()[: first + 1] == want[: first + 1] and set(out[0][first:]) <= {stop, 0}
    other = uncached(nb, config, params, [9], config.seq_len - 1)
    end = other.index(stop) + 1 if stop in other else len(other)
    assert out[1].tolist()[:end] == other[:end]
    start = nb.init_params(config, jax.random.key(0))  # its layers pass everything through
    ended = {**start, "embed": jnp.ones_like(start["embed"])}
    ended["lm_head"] = jnp.zeros_like(params["lm_head"]).at[:, bos].set(1.0)
    assert nb.generate(config, ended, tokenizer, "He", max_new_tokens=20, temperature=0) == "He"


def test_top_k_of_one_is_greedy(nb, tokenizer):
    config = small_config(nb)
    params = shaken(nb, config, tokenizer)
    greedy = sampled(nb, config, params, [[7]], config.seq_len)
    assert np.array_equal(sampled(nb, config, params, [[7]], config.seq_len, temperature=5.0, top_k=1), greedy)
    assert not np.array_equal(sampled(nb, config, params, [[7]], config.seq_len, temperature=5.0), greedy)


def test_a_seed_is_a_text(nb, tokenizer):
    config = small_config(nb)
    params = shaken(nb, config, tokenizer)

    def text(seed):
        return nb.generate(config, params, tokenizer, "The", max_new_tokens=20, temperature=1.0, seed=seed)

    texts = [text(seed) for seed in range(5)]
    assert texts == [text(seed) for seed in range(5)]
    assert len(set(texts)) == 5


def test_picks_follow_temperature_top_k_and_top_p(nb):
    """20,000 draws from known logits: frequencies within 5 standard deviations (0.0035 each at most) of the softmax
    of those that are kept over the temperature, and never another token.

    At temperature 1 the probabilities are 0.43, 0.06, 0.16, 0.02, 0.26 and 0.07.
    """
    logits = jnp.asarray([2.0, 0.0, 1.0, -1.0, 1.5, 0.2])
    keys = jax.random.split(jax.random.key(0), 20_000)
    for temperature, top_k, top_p, count in (
        (1.0, 6, 1.0, 6), (0.5, 3, 1.0, 3), (2.0, 2, 1.0, 2), (1.0, 6, 0.6, 2), (1.0, 6, 0.72, 3), (1.0, 6, 1e-6, 1),
        (1.0, 2, 0.6, 1), (1.0, 2, 0.65, 2), (4.0, 6, 0.65, 4),
    ):  # fmt: skip

        def pick(key, t=temperature, k=top_k, p=top_p):
            return nb.pick_token(key, logits[None], np.float32(t), np.int32(k), np.float32(p))[0]

        have = np.bincount(np.asarray(jax.jit(jax.vmap(pick))(keys)), minlength=6) / len(keys)
        kept = np.argsort(-np.asarray(logits))[:count]
        want = np.zeros(6)
        want[kept] = np.exp(np.asarray(logits)[kept] / temperature)
        np.testing.assert_allclose(have, want / want.sum(), atol=0.018)
        assert (have > 0).sum() == count, (temperature, top_k, top_p)


def windows(nb, config, params, bos, ids, count):
    """generate's rule, without a cache: when T tokens are there, BOS and the last T/2 begin the next context."""
    T, new, context = config.seq_len, [], [bos, *ids]
    while len(new) < count:
        if len(context) >= T:
            context = [bos, *context[-(T // 2) :]]
        room = min(count - len(new), T - len(context))
        longer = uncached(nb, config, params, context, room)
        new, context = new + longer[len(context) :], longer
    return new


@pytest.mark.parametrize("prompt", ["a", "the quick brown fox " * 30])
def test_past_the_context(nb, tokenizer, prompt):
    """Four contexts' worth of tokens by the rule of the docstring, token for token; the text begins with the prompt."""
    config = small_config(nb)
    params, bos = shaken(nb, config, tokenizer, seed=1), tokenizer.encode_single_token("<|bos|>")
    want = windows(nb, config, params, bos, tokenizer.encode_ordinary(prompt), 4 * config.seq_len)
    text = nb.generate(config, params, tokenizer, prompt, max_new_tokens=len(want), temperature=0)
    assert text == prompt + tokenizer.decode(want)
    assert len(set(want[-config.seq_len :])) > 20


def test_rows_reach_the_end_of_the_context_apart(nb, tokenizer):
    """A batch in which one prompt fills its context rounds before the other is still its prompts, one by one."""
    config = small_config(nb)
    params = shaken(nb, config, tokenizer, seed=1)
    prompts = ["a", "the quick brown fox jumps over the laz"]
    batch = nb.generate(config, params, tokenizer, prompts, max_new_tokens=60, temperature=0)
    assert batch == [nb.generate(config, params, tokenizer, p, max_new_tokens=60, temperature=0) for p in prompts]


def test_speed_is_said(nb, tokenizer, capsys):
    config = small_config(nb)
    nb.generate(config, shaken(nb, config, tokenizer), tokenizer, ["a", "b"], max_new_tokens=7, speed=True)
    assert capsys.readouterr().out.startswith("14 new tokens in ")


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"max_new_tokens": 0}, r"max_new_tokens=0: must be positive"), ({"top_k": 0}, r"top_k=0: must be positive"),
     ({"temperature": -0.1}, r"temperature=-0.1: must not be negative"), ({"temperature": float("nan")}, r"=nan: "),
     ({"top_p": 0}, r"top_p=0: must be above 0"), ({"top_p": 1.5}, r"top_p=1.5: must be above 0 and at most 1"),
     ({"prompt": []}, r"prompt=\[\]: .*at least one")],
)  # fmt: skip
def test_bad_arguments(nb, tokenizer, bad, message):
    """Refused by name, value and rule, before anything is compiled."""
    config = small_config(nb)
    arguments = {"prompt": "The", "max_new_tokens": 20} | bad
    with pytest.raises(nb.InputError, match=message):
        nb.generate(config, {}, tokenizer, **arguments)


def test_a_token_that_the_tokenizer_lacks_is_no_crash(nb, tokenizer):
    """The model has 300 rows, the tokenizer fewer tokens: what an untrained model says in between has no text."""
    config = small_config(nb)
    assert tokenizer.n_vocab < config.vocab_size
    params = nb.init_params(config, jax.random.key(0))
    params["lm_head"] = params["lm_head"].at[:, : tokenizer.n_vocab].set(0)
    for temperature in (0, 1.0):
        text = nb.generate(config, params, tokenizer, "The", max_new_tokens=40, temperature=temperature, top_k=300)
        assert text.startswith("The")
    # nothing but such tokens: a larger logit whatever the input is
    params["embed"] = jnp.ones_like(params["embed"])
    params["lm_head"] = jnp.zeros_like(params["lm_head"]).at[:, tokenizer.n_vocab + 3].set(1.0)
    assert nb.generate(config, params, tokenizer, "The", max_new_tokens=40, temperature=0) == "The"
