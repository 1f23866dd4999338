"""Several processes: each reads documents of its own, they train one model, and what one of them loses all take up."""

import collections
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.test_data import tokenizer, write  # noqa: F401  a fixture

# ---- streams of documents


def left_of(nb, tokenizer, texts, positions):  # noqa: F811
    """Counts of the tokens that streams at these positions have still to read of one shard."""
    left, S = collections.Counter(), len(positions)
    for s, place in enumerate(positions):
        if place.shard or place.epoch:
            continue
        for row in range(place.row, len(texts)):
            if row % S == s:
                tokens = nb.encode_document(tokenizer, texts[row])
                left.update(tokens[place.offset if row == place.row else 0 :].tolist())
    return left


def joined(states):
    """The state of all processes from that of each, as state_dict gives it where there are really several."""
    places = [place for state in states for place in state.get("streams", [state])]
    return places[0] if len(places) == 1 else {"streams": places}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 3)), min_size=1, max_size=4), st.integers(0, 9)
)
def test_no_document_is_lost_or_read_twice(nb, tokenizer, tmp_path_factory, phases, seed):  # noqa: F811
    """Whatever number of processes goes on where another number has stopped: what was read, and what is left, is all
    there is, token for token. All numbers are different, so none can stand for another."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(f"{i}-{j}" for j in range(rng.integers(1, 40))) for i in range(300)]
    path = write(tmp_path_factory.mktemp("shard") / "shard.parquet", texts, row_group_size=7)
    config = nb.Config.demo().replace(seq_len=16, device_batch_size=12)
    read, state = collections.Counter(), None
    for processes, steps in phases:
        states = []
        for process in range(processes):
            with nb.PrefetchDataLoader(
                config, tokenizer, [lambda: path], process=process, processes=processes, threads=1
            ) as loader:
                if state:
                    loader.load_state_dict(state)
                for _ in range(steps):
                    tokens, targets = map(np.asarray, next(loader))
                    assert tokens.shape == targets.shape == (12 // processes, 16)
                    read.update(tokens.ravel().tolist())
                states.append(loader.state_dict())
        state = joined(states)
    places = [nb.Position(**place) for place in state.get("streams", [state])]
    assert len(places) == math.lcm(*(processes for processes, _ in phases))
    whole = sum(
        (collections.Counter(nb.encode_document(tokenizer, text).tolist()) for text in texts), collections.Counter()
    )
    assert read + left_of(nb, tokenizer, texts, places) == whole


def test_fewer_processes_see_the_same_batches(nb, tokenizer, tmp_path):  # noqa: F811
    """A run of four processes that goes on with two, or one: every row is what it would have been."""
    texts = [f"{i} " * (1 + i * 7 % 30) for i in range(200)]
    path = write(tmp_path / "shard.parquet", texts)
    config = nb.Config.demo().replace(seq_len=16, device_batch_size=8)

    def batches(processes, state, count):
        found, states = [], []
        for process in range(processes):
            with nb.PrefetchDataLoader(
                config, tokenizer, [lambda: path], process=process, processes=processes
            ) as loader:
                if state:
                    loader.load_state_dict(state)
                found.append([np.asarray(next(loader)[0]) for _ in range(count)])
                states.append(loader.state_dict())
        return [np.concatenate(parts) for parts in zip(*found, strict=True)], joined(states)

    _, state = batches(4, None, 3)
    expected, after = batches(4, state, 3)
    for processes in (1, 2):
        again, state_again = batches(processes, state, 3)
        assert all(np.array_equal(x, y) for x, y in zip(expected, again, strict=True)) and state_again == after


def test_more_streams_than_documents(nb, tokenizer, tmp_path):  # noqa: F811
    path = write(tmp_path / "shard.parquet", ["one", "two"])
    config = nb.Config.demo().replace(seq_len=16, device_batch_size=4)
    with nb.PrefetchDataLoader(config, tokenizer, [lambda: path], process=2, processes=4) as loader:
        with pytest.raises(nb.InputError, match="no shard has a document for each of 4 streams; use fewer hosts"):
            next(loader)
    with pytest.raises(nb.InputError, match="total_batch_size=64: must give each of 3 processes as many sequences"):
        nb.PrefetchDataLoader(config, tokenizer, [lambda: path], process=0, processes=3)


# ---- are there several?


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False), ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, True), ({"TPU_WORKER_HOSTNAMES": "host"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, True), ({"SLURM_NTASKS": "4"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True), ({"MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1"}, True),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_environment_says(nb, monkeypatch, environment, several):
    for name in ("JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert nb.several_hosts() == several


# ---- two real processes

OPTIONS = dict(
    n_head=1, head_dim=64, aspect_ratio=32, seq_len=64, compute_dtype="float32", eps=1e-3, num_iterations=12,
    log_interval=1, eval_interval=6, sample_interval=6, save_interval=2, keep_checkpoints=10, eval_tokens=4096,
    final_eval_tokens=20_000, profile_start=3, profile_steps=2,
)  # fmt: skip


def start(folder, process=None, processes=2, devices=2, port=0, **changes):
    """A process of 02_train.py with the run folder `folder`/run; one of two if `process` says which."""
    options = [f"--{name}={value}" for name, value in (OPTIONS | changes).items()]
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "NPROC": "64"}
    if process is not None:
        env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
        env |= {"JAX_PROCESS_ID": str(process)}
    folder.mkdir(exist_ok=True)
    out, err = ((folder / f"{kind}{process or 0}").open("w") for kind in ("out", "err"))
    return subprocess.Popen(
        [sys.executable, ROOT / "02_train.py", f"--run_dir={folder / 'run'}", *options], env=env, stdout=out, stderr=err
    )


def start_two(folder, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(folder, process, port=port, **options) for process in (0, 1)]


def wait(processes, seconds=240):
    """Their exit statuses; whoever hangs is killed, which fails."""
    ends = time.monotonic() + seconds
    try:
        return [process.wait(max(1, ends - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def said(folder, kind="out", process=0):
    return (folder / f"{kind}{process}").read_text()


def metrics(folder):
    """{(step, name): value} of metrics.jsonl, without what is measured in seconds."""
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    timed = {"step", "tokens_per_second", "mfu", "data_wait_seconds"}
    return {(row["step"], name): value for row in rows for name, value in row.items() if name not in timed}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of twelve steps by two processes of two devices each, state split in two, copied twice."""
    folder = tmp_path_factory.mktemp("two")
    assert wait(start_two(folder, mesh="2,2", device_batch_size=2)) == [0, 0], said(folder, "err") + said(
        folder, "err", 1
    )
    return folder


def test_one_process_logs(two):
    """The other prints nothing, and the run folder looks as if there were one."""
    out = said(two)
    assert re.search(r"device  4 × cpu \(.*, \d+ cores\), \w+, peak n/a each; mesh: data 2, fsdp 2", out)
    assert "hosts   2; the first one logs" in out
    assert not any(
        word in said(two, process=1) for word in ("device", "model", "step", "loss")
    )  # gloo speaks, of ranks
    steps = [step for step, name in metrics(two) if name == "loss"]
    assert steps == list(range(12)) and len(list((two / "run").glob("events.*"))) == 1
    assert (two / "run/samples.txt").read_text().count("--- step") == 2
    newest = two / "run/checkpoints/step_00000012"
    parts = [f"state-0000{i}-of-00002.safetensors" for i in range(2)]
    assert sorted(path.name for path in newest.iterdir()) == ["meta.json", "metrics.jsonl", *parts]
    meta = json.loads((newest / "meta.json").read_text())
    assert len(meta["loader"]["streams"]) == 2 and meta["tokens_per_step"] == 512


def resumed(two, folder, step):
    """A copy of the run at `step`, to go on from."""
    (folder / "run/checkpoints").mkdir(parents=True)
    shutil.copytree(two / f"run/checkpoints/step_{step:08d}", folder / f"run/checkpoints/step_{step:08d}")
    shutil.copy(two / "run/config.json", folder / "run/config.json")
    return folder


@pytest.mark.parametrize(("devices", "mesh", "rows"), [(1, "1,1", 8), (4, "1,4", 2)])
def test_one_process_goes_on_with_what_two_began(two, tmp_path, devices, mesh, rows):
    """Ten steps, evaluations and the state after them: the same tokens, and the same numbers to float32 rounding (6e-8
    an operation; measured 1e-7), on one device and on four."""
    folder = resumed(two, tmp_path, step=2)
    assert wait([start(folder, devices=devices, mesh=mesh, device_batch_size=rows)]) == [0], said(folder, "err")
    assert "resumed at step 2" in said(folder)
    have, want = metrics(folder), metrics(two)
    assert len(have) == len(want) and have == pytest.approx(want, rel=3e-6)
    nb_names = ("params.embed", "params.layers.0.up", "mu.lm_head")
    for name, x, y in zip(nb_names, arrays(two, nb_names), arrays(folder, nb_names), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6, err_msg=name)


def arrays(folder, names):
    """Some arrays of the last checkpoint, put together."""
    from tools.notebooks import load

    nb, path = load(ROOT / "02_train.py"), folder / "run/checkpoints/step_00000012"
    parts = nb.part_index(path, [file.name for file in path.glob("*.safetensors")])
    for name in names:
        shape = tuple(max(at + n for at, n in zip(axis_at, axis_n)) for axis_at, axis_n in zip(
            zip(*(start for start, _, _ in parts[name])), zip(*(size for _, size, _ in parts[name])))
        )  # fmt: skip
        yield nb.read_range(parts[name], shape, (slice(None),) * len(shape))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_is_killed(tmp_path, victim):
    """The other one ends by itself, within the time that jax waits for signs of life, with words that say what to do;
    both go on from the newest checkpoint; a run of one process from there comes to the same end."""
    options = dict(mesh="1,4", device_batch_size=2, num_iterations=120, save_interval=10, eval_interval=0,
                   sample_interval=0, log_interval=10, keep_checkpoints=100, profile_steps=0)  # fmt: skip
    processes = start_two(tmp_path, **options)
    newest = tmp_path / "run/checkpoints/step_00000010/meta.json"
    while not newest.exists():
        assert all(process.poll() is None for process in processes), said(tmp_path, "err", victim)
        time.sleep(0.05)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    other = processes[1 - victim]
    assert other.wait(100) in (128 + signal.SIGABRT, 1)  # 1 with jax 0.7.2
    assert time.monotonic() - killed < 60
    last = said(tmp_path, "err", 1 - victim).splitlines()[-1]
    assert re.match("error: ended .*another host is gone", last)
    assert last.endswith("it goes on from the newest checkpoint, if there is one")

    if victim == 0:
        return  # going on is the same
    found = sorted((tmp_path / "run/checkpoints").glob("step_*/meta.json"))
    step = json.loads(found[-1].read_text())["step"]
    alone = resumed(tmp_path, tmp_path / "alone", step)
    assert wait(start_two(tmp_path, **options)) == [0, 0], said(tmp_path, "err")
    assert f"resumed at step {step}" in said(tmp_path)
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    assert wait([start(alone, devices=1, **options | {"mesh": "1,1", "device_batch_size": 8})]) == [0]
    have, want = metrics(tmp_path), metrics(alone)
    assert {key for key in have if key[1] == "loss"} == {(step, "loss") for step in range(0, 120, 10)}
    # A hundred steps amplify the last bit; a lost or doubled document would show in the second digit.
    assert have[120, "val_loss"] == pytest.approx(want[120, "val_loss"], rel=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_is_asked_to_stop(tmp_path, number):
    """Both end after the same step, with a checkpoint."""
    processes = start_two(tmp_path, mesh="4,1", device_batch_size=2, num_iterations=100_000, eval_interval=0,
                          sample_interval=0, save_interval=0, log_interval=10, profile_steps=0)  # fmt: skip
    while "first step after" not in said(tmp_path):
        assert all(process.poll() is None for process in processes), said(tmp_path, "err")
        time.sleep(0.05)
    processes[1].send_signal(number)
    assert wait(processes, 60) == [128 + signal.SIGTERM] * 2
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step_*")
    assert f"SIGTERM: stopped after step {int(checkpoint.name[5:])}" in said(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([{"learning_rate": 0.01}, {"learning_rate": 0.02}], "several hosts: learning_rate must be the same on all"),
        ([{"dataset": "nowhere"}] * 2, "dataset='nowhere': must be 'embedded', a folder of parquet shards"),
        ([{"mesh": "1,8"}] * 2, "mesh=(1, 8): is of 8 devices, and here are 4"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_is_one_line_on_each_host(tmp_path, changes, words):
    """Both refuse before any work, also where only the first one can know; nobody waits for the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [{"mesh": "2,2", "device_batch_size": 2} | change for change in changes]
    assert wait([start(tmp_path, i, port=port, **options[i]) for i in (0, 1)], 100) == [2, 2]
    for process in (0, 1):
        errors = [line for line in said(tmp_path, "err", process).splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and words in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_folder_that_only_one_host_sees(nb, monkeypatch, tmp_path):
    """Where process 1 does not find what process 0 has made, all of them say so."""
    config = nb.Config.demo().replace(run_dir=str(tmp_path / "run"))
    monkeypatch.setattr(nb, "from_all_processes", lambda tree: np.array([True, False]))
    with pytest.raises(nb.InputError, match="run_dir=.*: must be a folder on storage that all hosts share"):
        nb.open_run_together(config)


def test_a_part_that_never_comes(nb, monkeypatch, tmp_path):
    """The first process waits a while, names the other, and leaves nothing behind; others wait for the first."""
    config = nb.Config.demo()
    part = {"state.safetensors": {"step": ([], np.zeros((), np.int32))}}
    monkeypatch.setattr(nb, "PART_SECONDS", 0.2)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(nb.InputError, match="process 1 has not written its part for 0.2 s; is run_dir on storage that"):
        nb.write_checkpoint(tmp_path, config, 0, part, {})
    assert list((tmp_path / "checkpoints").iterdir()) == []
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    with pytest.raises(nb.InputError, match="the first process has not finished it for 0.2 s"):
        nb.write_checkpoint(tmp_path, config, 0, part, {})


def test_parts_of_several_processes_make_one_checkpoint(nb, monkeypatch, tmp_path):
    """Three threads that take themselves for three processes, the first of them last."""
    import threading

    names, who = [f"state-0000{i}-of-00003.safetensors" for i in range(3)], threading.local()
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: who.i)
    found = {}

    def write_part(i):
        who.i = i
        part = {names[i]: {"params.embed": ([i], np.full(1, i, np.float32))}}
        found[i] = nb.write_checkpoint(tmp_path, nb.Config.demo(), 7, part, {"finished": False})

    threads = [threading.Thread(target=write_part, args=(i,)) for i in (2, 1, 0)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(20)
    who.i, path = 0, tmp_path / "checkpoints" / "step_00000007"
    assert found == dict.fromkeys(range(3), path)
    assert set(nb.read_meta(path)["files"]) == set(names) == {Path(file).name for file in path.glob("state*")}
