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


def sampled(nb, config, params, prompts, end, *, temperature=0.0, top_k=300, seed=0, stop=-1):
    """sample_tokens on rows of token ids, as a numpy array."""
    tokens = np.zeros((len(prompts), config.seq_len), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    out = nb.sample_tokens(
        config, params, tokens, lengths, np.full(len(prompts), end, np.int32), stop, jax.random.key(seed),
        np.float32(temperature), np.int32(top_k),
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
        nb.generate(config, params, tokenizer, prompt, max_new_tokens=1 + i, temperature=i / 4, top_k=1 + i, seed=i)
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


def test_picks_follow_temperature_and_top_k(nb):
    """20,000 draws from known logits: frequencies within 5 standard deviations (0.0035 each at most) of the softmax
    of the k largest over the temperature, and never another token."""
    logits = jnp.asarray([2.0, 0.0, 1.0, -1.0, 1.5])
    keys = jax.random.split(jax.random.key(0), 20_000)
    for temperature, top_k in ((1.0, 5), (0.5, 3), (2.0, 2)):
        pick = jax.vmap(lambda key: nb.pick_token(key, logits[None], np.float32(temperature), np.int32(top_k))[0])  # noqa: B023
        have = np.bincount(np.asarray(jax.jit(pick)(keys)), minlength=5) / len(keys)
        kept = np.argsort(-np.asarray(logits))[:top_k]
        want = np.zeros(5)
        want[kept] = np.exp(np.asarray(logits)[kept] / temperature)
        np.testing.assert_allclose(have, want / want.sum(), atol=0.018)
        assert (have > 0).sum() == top_k


def test_of_a_long_prompt_the_end_is_read(nb, tokenizer):
    """As much of it as fits beside BOS and the new tokens; the text still begins with all of it."""
    config = small_config(nb)
    params = shaken(nb, config, tokenizer)
    kept = "the quick brown fox jumps over the lazy dog "  # 27 tokens fit: 48, less BOS and 20 to come
    ids = tokenizer.encode_ordinary("0" * 500 + kept)
    end = tokenizer.decode(ids[-27:])
    long = nb.generate(config, params, tokenizer, "0" * 500 + kept, max_new_tokens=20, temperature=0)
    short = nb.generate(config, params, tokenizer, end, max_new_tokens=20, temperature=0)
    assert tokenizer.encode_ordinary(end) == ids[-27:]
    assert long == "0" * 500 + kept + short.removeprefix(end) and len(long) > 544


def test_the_whole_context_can_be_filled(nb, tokenizer):
    """BOS, one token of the prompt and T − 2 new ones; whoever asks for more gets these."""
    config = small_config(nb)
    params, bos = shaken(nb, config, tokenizer), tokenizer.encode_single_token("<|bos|>")
    want = uncached(nb, config, params, [bos, ord("a")], config.seq_len - 2)
    for count in (config.seq_len - 2, config.seq_len, 10_000):
        text = nb.generate(config, params, tokenizer, "a", max_new_tokens=count, temperature=0)
        assert text == "a" + tokenizer.decode(want[2:])


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"max_new_tokens": 0}, r"max_new_tokens=0: must be positive"), ({"top_k": 0}, r"top_k=0: must be positive"),
     ({"temperature": -0.1}, r"temperature=-0.1: must not be negative"), ({"temperature": float("nan")}, r"=nan: "),
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
