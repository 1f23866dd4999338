"""Sampling: the KV cache against the plain forward pass, one compilation for all prompts, and what may be asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import shaken, small_config

PROMPTS = ["It is a truth", "", "She said that the people", "é☃"]


@pytest.fixture(scope="module")
def tokenizer(nb):
    """Bytes, three pairs and the special tokens."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"e ", b" t"]
    return nb.make_tokenizer({token: rank for rank, token in enumerate(tokens)})


def model(nb, tokenizer, **changes):
    """(Config, parameters with opinions): every weight has a say, logits are far apart. A token without text, and BOS,
    has the logit 0 and is never the largest, so that texts go on to the end."""
    config = small_config(nb, seq_len=48, **changes)
    params = shaken(nb, config, head=0.3)
    first_special = tokenizer.n_vocab - len(tokenizer.special_tokens_set)
    return config, {**params, "lm_head": params["lm_head"].at[:, first_special:].set(0)}


def uncached(nb, config, params, ids, count):
    """`count` ids after `ids`, each the argmax of a forward pass over all tokens before it."""
    T = config.seq_len
    forward = jax.jit(nb.forward)  # on whole contexts: what follows a position cannot change it
    ids = list(ids)
    for _ in range(count):
        tokens = jnp.asarray(ids + [0] * (T - len(ids)), jnp.int32)[None]
        ids.append(int(forward(config, params, tokens)[0, len(ids) - 1].argmax()))
    return ids


def sampled(nb, config, params, prompts, *, temperature=0.0, top_k=300, top_p=1.0, seed=0, stop=-1):
    """sample_tokens on rows of token ids to the end of the context, as a numpy array."""
    tokens = np.array([[*ids, *[0] * (config.seq_len - len(ids))] for ids in prompts], np.int32)
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    ends = np.full(len(prompts), config.seq_len, np.int32)
    out = nb.sample_tokens(
        config, params, tokens, lengths, ends, stop, jax.random.key(seed), np.float32(temperature), np.int32(top_k),
        np.float32(top_p),
    )  # fmt: skip
    return np.asarray(out)


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_head": 4, "window_pattern": "L"}, {"n_kv_head": 1, "window_pattern": "S"}]
)
def test_greedy_is_the_argmax_of_forward(nb, tokenizer, changes):
    """Token for token over the whole context, from one token on, so that windows slide and caches fill. Rows with
    prompts of other lengths are each continued as if alone."""
    config, params = model(nb, tokenizer, **changes)
    rng = np.random.default_rng(0)
    prompts = [[7], *(rng.integers(0, 256, n).tolist() for n in (5, 20, 47))]
    have = sampled(nb, config, params, prompts)
    for row, ids in zip(have, prompts, strict=True):
        assert row.tolist() == uncached(nb, config, params, ids, config.seq_len - len(ids))
    assert len(set(have[0].tolist())) > 10  # not a loop of a few tokens, on which any cache would agree


def test_text_of_the_uncached_argmax(nb, tokenizer):
    """generate itself: BOS first, then the prompt, then the argmax, decoded after the prompt as it was given. A batch
    equals its prompts one by one."""
    (config, params), bos = model(nb, tokenizer), tokenizer.encode_single_token("<|bos|>")
    texts = nb.generate(config, params, tokenizer, PROMPTS, max_new_tokens=20, temperature=0)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = [bos, *tokenizer.encode_ordinary(prompt)]
        want = uncached(nb, config, params, ids, 20)[len(ids) :]
        assert text == prompt + tokenizer.decode(want)
        assert text == nb.generate(config, params, tokenizer, prompt, max_new_tokens=20, temperature=0)


def test_one_compilation_for_every_request(nb, tokenizer):
    """Neither the prompt's length nor any option of sampling is part of the program."""
    config, params = model(nb, tokenizer)
    nb.generate(config, params, tokenizer, "a", max_new_tokens=3)
    before = nb.sample_tokens._cache_size()
    for i, prompt in enumerate(PROMPTS):
        options = dict(max_new_tokens=1 + 5 * i, temperature=i / 4, top_k=1 + i, top_p=1 / (i + 1))
        nb.generate(config, params, tokenizer, prompt, **options)
    assert nb.sample_tokens._cache_size() == before


def test_sampling_stops_at_bos(nb, tokenizer):
    """Where BOS would be the most likely from the start, nothing is added; where it comes later, the text ends
    before it, and the rows beside it go on."""
    (config, params), bos = model(nb, tokenizer), tokenizer.encode_single_token("<|bos|>")
    want = uncached(nb, config, params, [7], config.seq_len - 1)
    stop = want[12]
    first = want.index(stop)
    assert first > 1
    out = sampled(nb, config, params, [[7], [9]], stop=stop)
    assert out[0].tolist()[: first + 1] == want[: first + 1] and set(out[0][first:]) <= {stop, 0}
    other = uncached(nb, config, params, [9], config.seq_len - 1)
    end = other.index(stop) + 1 if stop in other else len(other)
    assert out[1].tolist()[:end] == other[:end]
    start = nb.init_params(config, jax.random.key(0))  # its layers pass everything through
    ended = {**start, "embed": jnp.ones_like(start["embed"])}
    ended["lm_head"] = jnp.zeros_like(params["lm_head"]).at[:, bos].set(1.0)
    assert nb.generate(config, ended, tokenizer, "He", max_new_tokens=20, temperature=0) == "He"


def test_top_k_and_seed(nb, tokenizer):
    """The most likely of one is greedy, whatever the temperature; a seed is a text."""
    config, params = model(nb, tokenizer)
    greedy = sampled(nb, config, params, [[7]])
    assert np.array_equal(sampled(nb, config, params, [[7]], temperature=5.0, top_k=1), greedy)
    texts = [sampled(nb, config, params, [[7]], temperature=1.0, seed=seed % 5).tobytes() for seed in range(10)]
    assert texts[:5] == texts[5:] and len({*texts, greedy.tobytes()}) == 6


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


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"max_new_tokens": 0}, r"max_new_tokens=0: must be positive"), ({"top_k": 0}, r"top_k=0: must be positive"),
     ({"temperature": -0.1}, r"temperature=-0.1: must not be negative"), ({"temperature": float("nan")}, r"=nan: "),
     ({"top_p": 0}, r"top_p=0: must be above 0"), ({"top_p": 1.5}, r"top_p=1.5: must be above 0 and at most 1"),
     ({"prompt": []}, r"prompt=\[\]: .*at least one"),
     ({"max_new_tokens": 31}, r"max_new_tokens=31: must be at most 28: the prompt takes 4 of the context's 32 tokens")],
)  # fmt: skip
def test_bad_arguments(nb, tokenizer, bad, message):
    """Refused by name, value and rule, before anything is compiled."""
    arguments = {"prompt": "The", "max_new_tokens": 20} | bad
    with pytest.raises(nb.InputError, match=message):
        nb.generate(small_config(nb), {}, tokenizer, **arguments)


def test_up_to_the_last_token_of_the_context(nb, tokenizer):
    """BOS, the longest prompt and the new tokens fill it exactly; one more is refused."""
    config, params = model(nb, tokenizer)
    longest = config.seq_len - 1 - len(tokenizer.encode_ordinary("She said"))
    prompts = ["She said", "It"]
    texts = nb.generate(config, params, tokenizer, prompts, max_new_tokens=longest, temperature=0)
    ids = [[tokenizer.encode_single_token("<|bos|>"), *tokenizer.encode_ordinary(text)] for text in prompts]
    for text, prompt, row in zip(texts, prompts, ids, strict=True):
        assert text == prompt + tokenizer.decode(uncached(nb, config, params, row, longest)[len(row) :])
    with pytest.raises(nb.InputError, match=f"max_new_tokens={longest + 1}: must be at most {longest}"):
        nb.generate(config, params, tokenizer, prompts, max_new_tokens=longest + 1)


def test_a_token_that_the_tokenizer_lacks_is_no_crash(nb, tokenizer):
    """The model has 300 rows, the tokenizer fewer tokens: what an untrained model says in between has no text."""
    config, params = model(nb, tokenizer)
    assert tokenizer.n_vocab < config.vocab_size
    params = {**params, "embed": jnp.ones_like(params["embed"])}  # a larger logit whatever the input is
    params["lm_head"] = jnp.zeros_like(params["lm_head"]).at[:, tokenizer.n_vocab + 3].set(1.0)
    params["layers"] = nb.init_params(config, jax.random.key(0))["layers"]
    assert nb.generate(config, params, tokenizer, "The", max_new_tokens=20, temperature=0) == "The"
