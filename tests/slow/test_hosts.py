"""Two real processes on loopback, started by cloud/host.sh: they train one model, and one that is lost ends the other.

Each has two devices, so that data and fsdp of the mesh cross processes. What a process reads is tested with the loader.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import ROOT

OPTIONS = dict(
    n_head=1, head_dim=64, aspect_ratio=32, seq_len=64, compute_dtype="float32", eps=1e-3, num_iterations=12,
    log_interval=1, eval_interval=6, sample_interval=0, save_interval=4, keep_checkpoints=10, eval_tokens=4096,
    final_eval_tokens=20_000, profile_steps=0, device_batch_size=2, mesh="2x2",
)  # fmt: skip
LONG = dict(num_iterations=100_000, save_interval=20, eval_interval=0, log_interval=10, mesh="1x4")  # never ends
AGAIN = "start the same command on all hosts: it goes on from the newest checkpoint"


class Process:
    """host.sh with 02_train.py and the run folder `folder`/run, as process `index` of two; alone without a port."""

    def __init__(self, folder, index=0, port=None, **changes):
        devices = 2 if port else 1
        env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "NPROC": "64"}
        command = [sys.executable, "-u", "02_train.py", f"--run_dir={folder / 'run'}"]
        if port:  # on loopback nothing but jax's own variables says which hosts there are
            env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
            env |= {"JAX_PROCESS_ID": str(index)}
            command = ["bash", "cloud/host.sh", "run", *command]
        command += [f"--{name}={value}" for name, value in (OPTIONS | changes).items()]
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / f"{kind}{index}" for kind in ("out", "err")]
        out, err = (path.open("w") for path in self.files)
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err, start_new_session=True)

    def child(self):
        """The process id of the Python process that host.sh has started."""
        return int(subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, check=True).stdout)

    def out(self):
        return self.files[0].read_text()

    def err(self):
        return self.files[1].read_text()


@pytest.fixture
def start_two():
    """A function that starts two processes; `each` has options that only one of them gets. Whoever hangs is killed."""
    groups = []

    def start(folder, each=({}, {}), **changes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pair = [Process(folder, i, port, **changes | each[i]) for i in (0, 1)]
        groups.extend(process.process for process in pair)
        return pair

    yield start
    for process in groups:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait(processes, seconds=300):
    """Returns their exit statuses."""
    ends = time.monotonic() + seconds
    return [process.process.wait(max(1, ends - time.monotonic())) for process in processes]


def until(condition, processes, seconds=300):
    """Waits for a condition while the processes run."""
    ends = time.monotonic() + seconds
    while not condition():
        assert all(process.process.poll() is None for process in processes), processes[0].err() + processes[1].err()
        assert time.monotonic() < ends
        time.sleep(0.05)


def metrics(folder):
    """{(step, name): value} of metrics.jsonl, without what is measured in seconds."""
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    timed = {"step", "tokens_per_second", "mfu", "data_wait_seconds"}
    return {(row["step"], name): value for row in rows for name, value in row.items() if name not in timed}


def resumed(folder, new):
    """A copy of the run at step 4, to go on from."""
    checkpoint = "run/checkpoints/step_00000004"
    shutil.copytree(folder / checkpoint, new / checkpoint)
    shutil.copy(folder / "run/config.json", new / "run/config.json")
    return new


def test_two_processes_train_one_model(nb, start_two, tmp_path):
    """Twelve steps; the same again from a checkpoint of step 4, by two processes and by one alone."""
    folder = tmp_path / "two"
    pair = start_two(folder)
    assert wait(pair) == [0, 0], pair[0].err() + pair[1].err()

    # One process logs and writes, as if there were one.
    assert "4 of them: data 2, fsdp 2; 2 hosts, the first one logs" in pair[0].out()
    assert not re.search("device|model|step|loss", pair[1].out())  # gloo speaks, of ranks
    assert [step for step, name in metrics(folder) if name == "loss"] == list(range(12))
    assert len(list((folder / "run").glob("events.*"))) == 1
    newest = folder / "run/checkpoints/step_00000012"
    assert {path.name for path in newest.iterdir()} == {"meta.json", "state.safetensors", *nb.LOGS, *nb.TOKENIZER}
    assert len(json.loads((newest / "meta.json").read_text())["loader"]["processes"]) == 2

    # The one checkpoint, on one device of one process: the loss of its evaluation is what the two have found.
    config = nb.Config.demo().replace(**OPTIONS | {"mesh": "1x1", "device_batch_size": 8})
    state, _ = nb.load_checkpoint(newest, config)
    shards, validation = nb.list_shards(config)
    batches = nb.validation_batches(config, nb.find_tokenizer(config, shards[0]()), validation(), 20_000)
    val_loss = metrics(folder)[12, "val_loss"]
    assert nb.evaluate(config, state.params, batches)["loss"] == pytest.approx(val_loss, rel=1e-5)

    # Again from step 4: with two processes the same documents, so the same numbers; with one it says what is not.
    again = start_two(resumed(folder, tmp_path / "again"))
    alone = Process(resumed(folder, tmp_path / "alone"), mesh="1x1", device_batch_size=8)
    assert wait([*again, alone]) == [0, 0, 0], again[0].err() + alone.err()
    assert "resumed at step 4" in again[0].out()
    assert metrics(tmp_path / "again") == pytest.approx(metrics(folder), rel=1e-6)
    assert "resumed by 1 processes after 2: some documents are read again" in alone.out()
    assert metrics(tmp_path / "alone")[12, "val_loss"] == pytest.approx(val_loss, rel=0.05)


def test_one_is_asked_to_stop_and_one_is_killed(start_two, tmp_path):
    """SIGTERM to one host ends both after the same step, with a checkpoint. The same command goes on from it; then
    SIGKILL ends one process, and the other in the time that jax waits for signs of life, 30 s."""
    pair = start_two(tmp_path, **LONG)
    until(lambda: "first step after" in pair[0].out(), pair)
    pair[1].process.send_signal(signal.SIGTERM)
    assert wait(pair, 90) == [128 + signal.SIGTERM] * 2
    for process in pair:
        assert process.err().splitlines()[-1] == f"host.sh: stopped by SIGTERM, here or on another host; {AGAIN}"
    step = max(int(path.name[5:]) for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert f"SIGTERM: stopped after step {step};" in pair[0].out()

    pair = start_two(tmp_path, **LONG)
    until(lambda: "first step after" in pair[0].out(), pair)
    assert f"resumed at step {step}" in pair[0].out()
    os.kill(pair[1].child(), signal.SIGKILL)
    killed = time.monotonic()
    assert wait(pair[1:]) == [128 + signal.SIGKILL]
    assert pair[1].err().splitlines()[-1] == f"host.sh: killed by SIGKILL, perhaps for its memory; {AGAIN}"
    assert wait(pair, 100)[0] in (128 + signal.SIGABRT, 1)  # 1 with jax 0.7.2
    assert time.monotonic() - killed < 60
    last = pair[0].err().splitlines()[-1]
    assert re.fullmatch(f"host.sh: ended .*another host is gone.*; {AGAIN}", last)


@pytest.mark.parametrize(
    ("each", "words", "alone"),
    [
        ([{"learning_rate": 0.01}, {"learning_rate": 0.02}], "several hosts: Config or tokenizer differ", False),
        ([{"dataset": "nowhere"}] * 2, "dataset='nowhere': must be 'embedded', a file or folder of text", False),
        ([{"run_dir": "tests"}] * 2, "run_dir='tests': tests is not empty and holds no run", True),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_is_one_line(start_two, tmp_path, each, words, alone):
    """Both refuse before any work. What only the first process can know, it says `alone`; the other is ended then."""
    pair = start_two(tmp_path, each)
    statuses = wait(pair, 150)
    assert statuses[0] == 2 and statuses[1] != 0
    for process in pair[:1] if alone else pair:
        assert f"error: {words}" in process.err() and "Traceback" not in process.err()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_only_one_host_sees(nb, monkeypatch, tmp_path):
    """Where process 1 does not find what process 0 has made, all of them say so."""
    config = nb.Config.demo().replace(run_dir=str(tmp_path / "run"))
    monkeypatch.setattr(nb.jax, "process_count", lambda: 2)
    monkeypatch.setattr(nb.multihost_utils, "broadcast_one_to_all", lambda x: x)
    monkeypatch.setattr(nb, "all_gather", lambda tree: np.array([True, False]))
    with pytest.raises(nb.InputError, match="run_dir=.*: must be a folder on storage that all hosts share"):
        nb.open_run_together(config)
