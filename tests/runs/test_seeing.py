"""What a person looks at: norms, TensorBoard, the table from a trace, wandb, the summary, surprise and positions."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.wandb_server import KEY, WandbServer

TINY = dict(
    n_head=2, head_dim=32, aspect_ratio=32, seq_len=64, device_batch_size=4, num_iterations=20, log_interval=5,
    eval_interval=10, save_interval=10, sample_interval=10, eval_tokens=2048, final_eval_tokens=4096, profile_start=12,
    profile_steps=4,
)  # fmt: skip


def tiny(nb, folder, **changes):
    return nb.Config.demo().replace(run_dir=str(folder), **{**TINY, **changes})


@pytest.fixture(scope="module")
def finished(nb, tmp_path_factory):
    config = tiny(nb, tmp_path_factory.mktemp("runs") / "tiny")
    return config, nb.train(config)


@pytest.fixture(scope="module")
def tokenizer(nb, finished):
    config, _ = finished
    shards, _ = nb.list_shards(config)
    return nb.find_tokenizer(config, shards[0]())


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_norms_are_those_of_the_weights_and_of_their_change(nb):
    """After three steps: each part's norm, and how far the last step moved it, against float64 differences.

    A difference of float32 weights is rounded to 2⁻²⁴ of a weight, about 1e-8, where an update is 1e-3: 1e-4 of it.
    """
    config = tiny(nb, "unused", learning_rate=1e-2, weight_decay=0.3, warmup_ratio=0.5)
    state, rng = nb.init_train_state(config), np.random.default_rng(0)
    for _ in range(3):
        tokens = jnp.asarray(rng.integers(0, 4096, (4, 64)), jnp.int32)
        before = jax.device_get(state.params)
        state, _ = nb.train_step(config, state, tokens, tokens)
    found = jax.device_get(nb.state_norms(state))
    sums = dict.fromkeys(found, 0.0)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state.params))
    for (path, new), old in zip(leaves, jax.tree.leaves(before), strict=True):
        new, old = np.asarray(new, np.float64), np.asarray(old, np.float64)
        sums[f"param_norm/{nb.part_of(path)}"] += (new**2).sum()
        sums[f"update_norm/{nb.part_of(path)}"] += ((new - old) ** 2).sum()
    assert len(found) == 8
    for name, value in found.items():
        assert value == pytest.approx(math.sqrt(sums[name]), rel=1e-5 if "param" in name else 3e-4), name


def test_tensorboard_has_norms_samples_and_the_config(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from tensorboard.util.tensor_util import make_ndarray

    config, _ = finished
    events = EventAccumulator(config.run_dir)
    events.Reload()
    tags = set(events.Tags()["tensors"])
    parts = {f"{kind}_norm/{part}" for kind in ("param", "update") for part in ("embed", "attn", "mlp", "lm_head")}
    assert parts | {"loss", "data_wait_seconds", "samples", "val_bpb", "learning_rate"} <= tags
    texts = [[x.decode() for x in make_ndarray(event.tensor_proto)] for event in events.Tensors("samples")]
    assert len(texts) == 2 and all(len(group) == 3 for group in texts)
    assert texts[1][0].startswith("It is a truth")
    (data,) = (events.summary_metadata["_hparams_/session_start_info"].plugin_data,)
    saved = HParamsPluginData.FromString(data.content).session_start_info.hparams
    assert saved["n_head"].number_value == 2 and saved["dataset"].string_value == "embedded"


def test_where_the_time_went(nb, finished, capsys):
    """The trace's four steps: every component has its time, and together with idleness they are the steps."""
    config, _ = finished
    parts, whole = nb.time_by_component(config, config.run_dir)
    names = {name for name, _ in parts}
    assert {"embedding", "attention", "MLP", "head and loss", "optimizer"} <= names
    assert {("MLP", "forward"), ("MLP", "backward"), ("attention", "backward")} <= set(parts)
    assert 0.5 * whole < sum(parts.values()) <= whole * (1 + 1e-9)
    assert parts["other", "forward"] < 0.3 * whole
    out = capsys.readouterr().out
    assert re.match(r"4 traced steps of [\d.]+ ms: busy [\d.]+ ms, idle [\d.]+%\n", out) and "head and loss" in out


def test_no_trace_is_said(nb, finished, tmp_path):
    config, _ = finished
    with pytest.raises(nb.InputError, match="holds no trace; train with profile_steps above 0"):
        nb.time_by_component(config, tmp_path)


def test_time_is_shared_between_threads(nb):
    """Nested events: the inner one's. Two threads at a time: half each. Alone: all of it."""
    events = [(0, 100, "a", "outer"), (20, 60, "a", "inner"), (40, 80, "b", "other"), (200, 210, "b", "late")]
    found = nb.shared_time(events)
    assert found == {"outer": 20 + 10 + 20, "inner": 20 + 10, "other": 10 + 10, "late": 10}


def test_a_matmul_in_the_pool_is_seen(nb):
    """The gaps after it, until the next operation; not those before the first matmul."""
    events = [
        (0, 10, "a", "copy"),
        (12, 20, "a", "dot.1"),
        (30, 40, "b", "add"),
        (35, 50, "a", "exp"),
        (55, 60, "a", "b"),
    ]
    assert nb.unseen_matmuls(events) == [(20, 30, "pool", "dot.1"), (50, 55, "pool", "dot.1")]
    assert nb.unseen_matmuls([]) == []


def test_operations_without_a_name_go_with_what_they_read(nb):
    text = """HloModule jit_train_step

%wrapped (p: f32[2]) -> f32[2] {
  ROOT %c = bf16[2]{0} convert(%p)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %dot = f32[2]{0} dot(%x), metadata={op_name="jit(train_step)/transpose(jvp(layer_03))/mlp/dot"}
  %copy.1 = f32[2]{0} copy(%dot)
  %cast = f32[2]{0} fusion(%copy.1), kind=kLoop, calls=%wrapped
  ROOT %norm = f32[2]{0} add(%x, %x), metadata={op_name="jit(train_step)/optimizer/add"}
}
"""
    found = nb.program_components(text)
    assert found["copy.1"] == found["cast"] == found["dot"] == ("MLP", "backward")
    assert found["norm"] == ("optimizer", "forward") and found["x"] == ("other", "forward")


def test_the_summary(nb, finished, capsys):
    config, summary = finished
    nb.show_summary(summary)
    out = capsys.readouterr().out
    assert f"{nb.count_params(config)['total'] / 1e6:.1f}M parameters (embed" in out
    assert f"tokens  {20 * 256:,} in 20 steps" in out and "waiting for data" in out and "best " in out
    times = summary["times"]
    assert {"steps", "start", "compiling", "evaluation", "samples", "saving", "tracing", "drawing"} == set(times)
    assert all(seconds > 0 for seconds in times.values())
    assert sum(times.values()) == pytest.approx(summary["seconds"])


def test_loss_by_position(nb, finished, tokenizer, tmp_path):
    """Its mean over the places is the loss, where every place has as many targets."""
    config, summary = finished
    state, _ = nb.load_checkpoint(nb.list_checkpoints(config.run_dir)[-1], config)
    _, fetch = nb.list_shards(config)
    batches = nb.validation_batches(config, tokenizer, fetch(), 4096)  # 16 batches, none padded
    result = nb.evaluate(config, state.params, batches)
    assert result["by_position"].shape == (64,) and result["by_position"].mean() == pytest.approx(result["loss"])
    assert result["loss"] == summary["val_loss"]
    config = config.replace(compute_dtype="float32")  # in bfloat16, op by op rounds otherwise than one program: 2e-5
    result = nb.evaluate(config, state.params, batches)
    at = [float(nb.token_losses(config, state.params, tokens, targets)[:, 5].mean()) for tokens, targets, _ in batches]
    assert result["by_position"][5] == pytest.approx(np.mean(at), rel=1e-6)
    nb.plot_positions(result["by_position"], tmp_path / "a.png")
    nb.plot_positions(result["by_position"][:2], tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 5000 < (tmp_path / "b.png").stat().st_size


def test_surprise(nb, finished, tokenizer):
    """The bits of a passage add up to its loss; the page holds every character once, escaped, redder where it costs."""
    config = finished[0].replace(compute_dtype="float32")
    state, _ = nb.load_checkpoint(nb.list_checkpoints(config.run_dir)[-1], config)
    text = 'Is 1 < 2 & "so"?\nThe café, 東京'
    ids = [tokenizer.encode_single_token("<|bos|>"), *tokenizer.encode_ordinary(text)]
    found = nb.surprise(config, state.params, tokenizer, text)
    assert b"".join(piece for piece, _ in found).decode() == text
    tokens = np.zeros((4, 64), np.int32)
    tokens[0, : len(ids)] = ids
    losses = nb.token_losses(config, state.params, tokens, np.roll(tokens, -1, axis=1))[0, : len(ids) - 1]
    np.testing.assert_allclose([bits for _, bits in found], np.asarray(losses) / math.log(2), rtol=1e-5)
    page = nb.surprise_html(found)
    plain = re.sub(r"<br>|<[^>]*>", "", page).replace("↵", "\n").rstrip("\n")
    assert plain == "Is 1 &lt; 2 &amp; &quot;so&quot;?\nThe café, 東京"
    page = nb.surprise_html([(b"a", 1.0), (b"b", 9.0), ("é".encode()[:1], 3.0), ("é".encode()[1:], 4.0)])
    assert [float(x) for x in re.findall(r"rgba\(220, 50, 30, ([\d.]+)\)", page)] == [0.05, 0.45, 0.35]
    assert len(nb.surprise(config, state.params, tokenizer, "word " * 500)) == config.seq_len


# ---- wandb


def offline_runs(folder):
    return sorted(path.name.split("-")[-1] for path in (folder / "wandb").glob("offline-run-*"))


def test_wandb_offline_and_again_after_an_interruption(nb, tmp_path, monkeypatch):
    """The run has its lines, samples, the curve and an artifact; whoever goes on from a checkpoint goes on with it."""
    config = tiny(nb, tmp_path / "run", wandb_mode="offline", profile_steps=0)
    nb.train(config)
    (name,) = offline_runs(tmp_path / "run")
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = record.read_bytes()
    for word in (b"val_bpb", b"param_norm/attn", b"samples", b"loss curve", b"run-checkpoint", b"learning_rate"):
        assert word in content, word
    (tmp_path / "run" / "checkpoints" / "step_00000020" / "meta.json").unlink()
    nb.train(config)
    assert offline_runs(tmp_path / "run") == [name, name]


def test_wandb_is_off_without_a_key(nb, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nb.open_wandb(tiny(nb, tmp_path), tmp_path, None) is None
    with pytest.raises(nb.InputError, match="wandb_mode='online': needs a key"):
        nb.open_wandb(tiny(nb, tmp_path, wandb_mode="online"), tmp_path, None)


@pytest.mark.parametrize("fault", ["nobody listens", "a bad key"])
def test_wandb_never_stops_a_run_that_did_not_ask_for_it(nb, tmp_path, monkeypatch, capsys, fault):
    """With a key there and wandb away, 'auto' says so and trains; 'online' refuses, before anything is trained."""
    import wandb

    wandb.teardown()  # it keeps the settings of the process's first run
    with WandbServer() as server:
        for name, value in {**server.environment(tmp_path), "WANDB_API_KEY": "f" * 40}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("WANDB_MODE")
        if fault == "nobody listens":
            monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        assert nb.open_wandb(tiny(nb, tmp_path), tmp_path, None) is None
        out = capsys.readouterr().out
        assert out.startswith("wandb: cannot ") and "training goes on without it" in out and "f" * 40 not in out
        with pytest.raises(nb.InputError, match="wandb: cannot "):
            nb.open_wandb(tiny(nb, tmp_path, wandb_mode="online"), tmp_path, None)
    assert KEY not in out
