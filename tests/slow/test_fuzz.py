"""Random Configs and damaged files: each works or raises InputError; none hangs, crashes or leaves a part of a file.

The suite tries a share of them, always the same ones. 2,000 Configs and 500 files of each kind, others each time:

    FUZZ=1 python -m pytest -q tests/test_fuzz.py      # FUZZ=10 tries ten times as many
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import shutil
import string

import jax
import jax.numpy as jnp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("FUZZ", 0))
HANGS_AFTER = 120  # seconds


def tries(everything, share):
    return settings(
        max_examples=TIMES * everything or share, derandomize=not TIMES, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip


@contextlib.contextmanager
def works_or_is_refused(nb):
    """Lets InputError pass, and ends the process with a traceback if it hangs."""
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    try:
        yield
        event("works")
    except nb.InputError as error:
        event("refused")
        assert str(error)
    finally:
        faulthandler.cancel_dump_traceback_later()


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
)  # fmt: skip
MESHES = st.sampled_from(["auto", "auto", (1, 1), (2, 2), (1, 8), (3, 1), [2, 1], "1x2", "2,", (0, 1)])
BY_TYPE = {
    int: st.integers(-2, 1000), float: st.floats(0, 10), str: st.text(string.printable, max_size=6),
    str | tuple: MESHES,
}  # fmt: skip


@st.composite
def changes(draw, nb):
    """Fields of a Config with their values: many at once that are mostly right, and sometimes one that is anything."""
    fields = {field.name: field.type for field in dataclasses.fields(nb.Config)}
    names = draw(st.sets(st.sampled_from(sorted(fields)), max_size=12))
    values = {name: draw(SMALL.get(name, BY_TYPE[fields[name]])) for name in sorted(names)}
    if draw(st.integers(0, 3)) == 0:
        values[draw(st.sampled_from(sorted(fields)))] = draw(ANYTHING)
    return values


def use_config(nb, values, base):
    """All that is done with a Config before a device is asked: its sizes, its command line, the trace of its step."""
    config = base.replace(**values)
    counts = nb.count_params(config)
    assert counts["total"] == sum(count for part, count in counts.items() if part != "total")
    assert config.total_steps > 0 and config.grad_accum_steps > 0 and nb.flops_per_token(config) > 0
    words = [f"--{field.name}={getattr(config, field.name)}" for field in dataclasses.fields(config)]
    assert nb.parse_args(words, base) == config
    if counts["total"] * config.tokens_per_step < 1e10 and config.depth < 8:
        state = jax.eval_shape(lambda: nb.init_train_state(config))
        tokens = jax.ShapeDtypeStruct((config.tokens_per_step // config.seq_len, config.seq_len), jnp.int32)
        after, metrics = jax.eval_shape(lambda *args: nb.train_step(config, *args), state, tokens, tokens)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
        assert metrics["loss"].shape == ()
        event("its step is traced")


@tries(1500, 60)
@given(data=st.data())
def test_configs(nb, data):
    base = nb.Config.demo().replace(n_head=2, head_dim=16, aspect_ratio=32, vocab_size=300, seq_len=32)
    with works_or_is_refused(nb):
        use_config(nb, data.draw(changes(nb)), base)


@tries(500, 20)
@given(data=st.data())
def test_configs_of_maxtext(mt, data):
    with works_or_is_refused(mt):
        use_config(mt, data.draw(changes(mt)), mt.Config.demo().replace(vocab_size=512))


# ---- files


@st.composite
def damaged(draw, content):
    """`content` with one to three changes: bits, bytes, runs of them gone, doubled, made zero or new; cut short."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        near_an_end = draw(st.sampled_from([0, 1, 2]))  # headers and footers are where a parser believes what it reads
        here = draw(st.integers(0, max(0, len(content) - 1)))
        here = {0: here, 1: here % 300, 2: len(content) - 1 - here % 300}[near_an_end] % max(1, len(content))
        length = draw(st.sampled_from([1, 2, 4, 8, 64, 1000]))
        kind = draw(st.sampled_from(["flip", "new", "gone", "doubled", "zero", "ones", "cut", "more"]))
        if kind == "flip" and content:
            content[here] ^= 1 << draw(st.integers(0, 7))
        elif kind == "new":
            content[here : here + length] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "gone":
            del content[here : here + length]
        elif kind == "doubled":
            content[here:here] = content[here : here + length]
        elif kind in ("zero", "ones"):
            content[here : here + length] = bytes([255 * (kind == "ones")]) * len(content[here : here + length])
        elif kind == "cut":
            del content[here:]
        else:
            content += draw(st.binary(min_size=1, max_size=8))
    return bytes(content)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("../../../x")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def edited(draw, content):
    """A JSON text in which a value, at any depth, is another or gone."""
    content = json.loads(content)
    node = content
    while True:
        keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and node[key] and draw(st.booleans()):
            node = node[key]
            continue
        if draw(st.booleans()):
            node[key] = draw(JSON)
        else:
            del node[key]
        return json.dumps(content).encode()


def snapshot(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def mt(root):
    from tools.notebooks import load

    return load(root / "04_maxtext.py")


@pytest.fixture(scope="module")
def run(nb, tmp_path_factory):
    """(Config, folder) of an unfinished run with two checkpoints."""
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    config = nb.Config.demo().replace(
        n_head=1, head_dim=32, aspect_ratio=32, seq_len=32, device_batch_size=2, num_iterations=8, log_interval=2,
        eval_interval=0, save_interval=3, sample_interval=0, eval_tokens=256, final_eval_tokens=256, profile_steps=0,
        keep_checkpoints=3, run_dir=str(folder),
    )  # fmt: skip
    nb.train(config)
    shutil.rmtree(folder / "checkpoints" / "step_00000008")
    nb.train(config.replace(run_dir=f"{folder}-2"))  # a run that nothing happened to
    return config, folder


@tries(500, 25)
@given(data=st.data())
def test_checkpoints(nb, run, tmp_path_factory, data):
    """The newest checkpoint is damaged, in half of the cases with the sums put right again; the run goes on all the
    same, from it or from the one before it, or it says what is wrong."""
    config, whole = run
    folder = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(whole, folder)
    config = config.replace(run_dir=str(folder))
    checkpoint = nb.list_checkpoints(folder)[-1]
    where, name = data.draw(st.sampled_from(
        [(checkpoint, "meta.json"), (checkpoint, "metrics.jsonl"), (checkpoint, "state.safetensors"),
         (folder, "config.json"), (folder, "metrics.jsonl")]
    ))  # fmt: skip
    path = where / name
    content = path.read_bytes()
    edit = path.suffix == ".json" and data.draw(st.booleans())
    path.write_bytes(data.draw(edited(content) if edit else damaged(content)))
    if where == checkpoint and name != "meta.json" and data.draw(st.booleans()):
        meta = json.loads((checkpoint / "meta.json").read_text())
        meta["files"][path.name] = nb.file_facts(path)
        (checkpoint / "meta.json").write_text(json.dumps(meta))
    with works_or_is_refused(nb):
        assert nb.train(config)["step"] == 8
    assert not [name for name in snapshot(folder) if ".tmp" in name or ".part" in name]
    assert snapshot(folder.parent)[0] == "run" and all(name.startswith("run") for name in snapshot(folder.parent))
    shutil.rmtree(folder.parent)


@tries(500, 100)
@given(data=st.data())
def test_tokenizers(nb, root, tmp_path_factory, data):
    """A tokenizer that is loaded gives back what it has encoded."""
    source = root / "data" / "embedded" / "tokenizer"
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer.tiktoken"):
        shutil.copyfile(source / name, folder / name)
    path = folder / data.draw(st.sampled_from(["tokenizer.json", "tokenizer.tiktoken"]))
    content = path.read_bytes()
    edit = path.name == "tokenizer.json" and data.draw(st.booleans())
    path.write_bytes(data.draw(edited(content) if edit else damaged(content)))
    with works_or_is_refused(nb):
        tokenizer = nb.load_tokenizer(folder)
        text = "It's 2026 — naïve 東京 🙂\n\n\tdef f(x):\r\n  return x<|bos|>"
        assert tokenizer.decode(nb.encode_document(tokenizer, text).tolist()[1:]) == text
        nb.token_bytes(tokenizer)
    assert snapshot(folder) == ["tokenizer.json", "tokenizer.tiktoken"]
    shutil.rmtree(folder)


@tries(500, 100)
@given(data=st.data())
def test_shards(nb, tmp_path_factory, data):
    """A shard whose every document is a text, or a refusal that names it."""
    folder = tmp_path_factory.mktemp("shard")
    path = folder / "shard_00000.parquet"
    texts = [f"document {i} " + "words and words " * (i % 7) for i in range(120)]
    codec = data.draw(st.sampled_from(["zstd", "snappy", "none"]))
    pq.write_table(pa.table({"text": texts}), path, row_group_size=40, compression=codec)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with works_or_is_refused(nb):
        nb.check_shard(path)
        nb.count_chars(path)
        assert all(isinstance(text, str) and text for _, text in nb.read_documents(path))
    assert snapshot(folder) == ["shard_00000.parquet"]
    shutil.rmtree(folder)
