"""Random Configs and damaged files: each works or raises InputError; none hangs, crashes or leaves a part of a file.

A sample always runs, the same one; others, and many more, with `-m slow`.
"""

import contextlib
import dataclasses
import faulthandler
import shutil
import string

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import EMBEDDED, QUIET, documents, fetcher, small_config, tiny, write_shard
from tools.notebooks import load

HANGS_AFTER = 120  # seconds


def tries(sample, length):
    """Runs a test with a count of examples: a sample of them, or with `-m slow` all."""
    return pytest.mark.parametrize(
        "count", [pytest.param(sample, id="sample"), pytest.param(length, id="length", marks=pytest.mark.slow)]
    )


def fuzz(nb, count, example, works_at_least):
    """Calls example(data, stack) with `count` random inputs; each works or raises InputError, and a share works:
    a notebook that refuses everything is of no use."""
    found = {"works": 0, "refused": 0}

    @settings(
        max_examples=count, derandomize=count < 200, deadline=None, database=None, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=st.data())
    def each(data):
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        try:
            with contextlib.ExitStack() as stack:
                example(data, stack)
            found["works"] += 1
        except nb.InputError as error:
            found["refused"] += 1
            assert str(error)
        finally:
            faulthandler.cancel_dump_traceback_later()

    each()
    assert found["works"] >= works_at_least * sum(found.values()), found
    print(found)


# ---- Configs

ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4),
    st.lists(st.integers(), max_size=2), st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, 1e308, 5e-324, "", "auto"]),
)  # fmt: skip
SMALL = dict(  # values that are often right, for the fields whose size costs time; the others draw from their type
    n_head=st.integers(1, 4), n_kv_head=st.sampled_from([-1, 1, 2, 3]), head_dim=st.sampled_from([2, 6, 16, 64, 128]),
    vocab_size=st.integers(250, 400), seq_len=st.sampled_from([2, 3, 32, 128, 256]),
    window_pattern=st.text("SL", max_size=5), softcap=st.floats(0.1, 80), splash_block_size=st.sampled_from([64, 128]),
    attn_impl=st.sampled_from(["auto", "einsum", "jax", "splash", "pallas", "fused"]),
    compute_dtype=st.sampled_from(["float32", "bfloat16"]), device_batch_size=st.integers(1, 3),
    total_batch_size=st.sampled_from([-1, 256, 768]), nonfinite=st.sampled_from(["stop", "skip"]),
    aspect_ratio=st.integers(16, 300), resume=st.sampled_from(["auto", "never"]), num_iterations=st.integers(-1, 10),
    grad_clip=st.floats(0, 2), warmup_ratio=st.floats(0, 1), warmdown_ratio=st.floats(0, 1), beta1=st.floats(0, 1),
    beta2=st.floats(0, 1), final_lr_frac=st.floats(0, 1), n_embd=st.sampled_from([256, 512]),
    n_layer=st.integers(1, 3), mlp_dim=st.sampled_from([256, 512, 700]), remat=st.sampled_from(["none", "full"]),
    layers=st.sampled_from(["unrolled", "scanned"]), loss_chunks=st.integers(1, 4),
    wandb_mode=st.sampled_from(["auto", "offline", "disabled"]), keep_checkpoints=st.integers(1, 9),
)  # fmt: skip
MESHES = st.sampled_from(["auto", "auto", (1, 1), (2, 2), (1, 8), [2, 1], "1x2", "2,"])
BY_TYPE = {
    int: st.integers(-2, 1000), float: st.floats(0, 10), str: st.text(string.printable, max_size=6),
    str | tuple: MESHES, bool: st.booleans(),
}  # fmt: skip


@st.composite
def changes(draw, nb):
    """Fields of a Config with their values: several that are mostly right, and sometimes one that is anything."""
    fields = {field.name: field.type for field in dataclasses.fields(nb.Config)}
    names = draw(st.sets(st.sampled_from(sorted(fields)), max_size=5))
    values = {name: draw(SMALL.get(name, BY_TYPE[fields[name]])) for name in sorted(names)}
    if draw(st.integers(0, 3)) == 0:
        values[draw(st.sampled_from(sorted(fields)))] = draw(ANYTHING)
    return values


def use_config(nb, values, base):
    """All that is done with a Config before a device is asked: its sizes, its command line, the trace of its step."""
    config = base.replace(**values)
    if config.depth > 100 or config.seq_len > 100_000:  # what is counted layer by layer, token by token, takes its time
        return
    counts = nb.count_params(config)
    assert counts["total"] == sum(count for part, count in counts.items() if part != "total")
    assert config.total_steps > 0 and config.grad_accum_steps > 0 and nb.flops_per_token(config) > 0
    words = [f"--{field.name}={getattr(config, field.name)}" for field in dataclasses.fields(config)]
    assert nb.parse_args(words, base) == config
    if counts["total"] * config.tokens_per_step < 1e10 and config.depth < 8:
        state, tokens = nb.state_shapes(config), jax.ShapeDtypeStruct(config.batch_shape, jnp.int32)
        after, metrics = jax.eval_shape(lambda *args: nb.train_step(config, *args), state, tokens, tokens)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
        assert metrics["loss"].shape == ()


@tries(60, 1500)
@pytest.mark.parametrize("notebook", ["02_train.py", "04_maxtext.py"])
def test_configs(root, notebook, count):
    nb = load(root / notebook)
    base = small_config(nb)
    fuzz(nb, count, lambda data, _: use_config(nb, data.draw(changes(nb)), base), 0.2)


# ---- files


@st.composite
def damaged(draw, content):
    """`content` with one or two changes: bits, bytes, runs of them gone, doubled, made zero or new; cut short."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 2))):
        size = max(1, len(content))
        here = draw(st.integers(0, size - 1))  # headers and footers are where a parser believes what it reads
        here = draw(st.sampled_from([here, here % 300, size - 1 - here % 300])) % size
        length = draw(st.sampled_from([1, 4, 64, 1000]))
        kind = draw(st.sampled_from(["flip", "new", "gone", "doubled", "zero", "cut", "more"]))
        if kind == "flip" and content:
            content[here] ^= 1 << draw(st.integers(0, 7))
        elif kind == "new":
            content[here : here + length] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "gone":
            del content[here : here + length]
        elif kind == "doubled":
            content[here:here] = content[here : here + length]
        elif kind == "zero":
            content[here : here + length] = bytes(len(content[here : here + length]))
        elif kind == "cut":
            del content[here:]
        else:
            content += draw(st.binary(min_size=1, max_size=8))
    return bytes(content)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def run(nb, tmp_path_factory):
    """(Config, folder) of an unfinished run with two checkpoints."""
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    config = tiny(nb, folder, **QUIET | dict(num_iterations=6, save_interval=2, keep_checkpoints=3))
    nb.train(config)
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    return config, folder


@tries(20, 400)
def test_checkpoints(nb, run, tmp_path_factory, count):
    """A file of the run is damaged; it goes on all the same, from the newest checkpoint or the one before it, or it
    says what is wrong."""
    config, whole = run

    def example(data, stack):
        folder = tmp_path_factory.mktemp("run") / "run"
        stack.callback(shutil.rmtree, folder.parent)
        shutil.copytree(whole, folder)
        newest = nb.list_checkpoints(folder)[-1]
        files = [newest / "meta.json", newest / "metrics.jsonl", newest / "state.safetensors", folder / "config.json"]
        path = data.draw(st.sampled_from([*files, folder / "metrics.jsonl"]))
        path.write_bytes(data.draw(damaged(path.read_bytes())))
        assert nb.train(config.replace(run_dir=str(folder)))["step"] == 6
        assert not [name for name in names(folder) if ".tmp" in name or ".part" in name]
        assert all(name.startswith("run") for name in names(folder.parent))

    fuzz(nb, count, example, 0.5)


@tries(60, 500)
def test_tokenizers(nb, tmp_path_factory, count):
    """A tokenizer that is loaded gives back what it has encoded."""
    text = "It's 2026 — naïve 東京 🙂\n\n\tdef f(x):\r\n  return x<|bos|>"

    def example(data, stack):
        folder = tmp_path_factory.mktemp("tokenizer")
        stack.callback(shutil.rmtree, folder)
        shutil.copytree(EMBEDDED / "tokenizer", folder, dirs_exist_ok=True)
        path = folder / data.draw(st.sampled_from(["tokenizer.json", "tokenizer.tiktoken"]))
        path.write_bytes(data.draw(st.just(path.read_bytes()) | damaged(path.read_bytes())))
        tokenizer = nb.load_tokenizer(folder)
        assert tokenizer.decode(nb.encode_document(tokenizer, text).tolist()[1:]) == text
        nb.token_bytes(tokenizer)
        assert names(folder) == ["tokenizer.json", "tokenizer.tiktoken"]

    fuzz(nb, count, example, 0.05)


@tries(60, 500)
def test_shards(nb, tmp_path_factory, count):
    """A shard whose every document is a text, or a refusal that names it."""
    texts = documents(0, 120)

    def example(data, stack):
        folder = tmp_path_factory.mktemp("shard")
        stack.callback(shutil.rmtree, folder)
        path = folder / "shard_00000.parquet"
        codec = data.draw(st.sampled_from(["zstd", "snappy", "none"]))
        content = write_shard(path, texts, row_group_size=40, compression=codec).read_bytes()
        path.write_bytes(data.draw(st.just(content) | damaged(content)))
        read = nb.read_documents(fetcher(nb, path)())
        assert all(isinstance(text, str) and text for _, text in read)
        assert names(folder) == ["shard_00000.parquet"]

    fuzz(nb, count, example, 0.05)
