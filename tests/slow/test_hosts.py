"""Several processes train one model: one of them logs, all stop together, and a run goes on where it was."""

import json
import os
import re
import shutil
import signal
import socket
import time

import pytest

from tests.helpers import QUIET, TINY, contents, metrics, output_of, read_until, saved_steps, started, until

OPTIONS = TINY | dict(n_head=1, head_dim=64, device_batch_size=2, log_interval=1, eval_interval=6, save_interval=2,
                      keep_checkpoints=10, eps=1e-3, mesh="2,2")  # fmt: skip


def start_two(folder, *differences, devices=2, **changes):
    """Two processes of 02_train.py with two devices each and one run folder; each of `differences` is of one."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "NPROC": "64"}
    env |= {"TPUCHAT_HOSTS": "many", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = []
    for i, difference in enumerate(differences or ({}, {})):
        settings = OPTIONS | changes | difference
        env |= {"JAX_PROCESS_ID": str(i)}
        processes.append(started("02_train.py", cwd=folder, env=env, run_dir=folder / "run", **settings))
    return processes


def outputs(processes, seconds=240):
    """What each prints; whoever hangs is killed, which fails."""
    deadline = time.monotonic() + seconds
    try:
        return [output_of(process, max(1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def both_end(processes, status=0):
    out = outputs(processes)
    assert [process.returncode for process in processes] == [status] * 2, "\n".join(out)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, what each has printed) of twelve steps by two processes of two devices each."""
    folder = tmp_path_factory.mktemp("two")
    return folder, both_end(start_two(folder))


def test_one_process_logs(two):
    """The other prints nothing, and the run folder looks as if there were one."""
    folder, (out, other) = two
    assert re.search(r"device  4 × cpu \(.*, \d+ cores\), \w+, peak n/a each; mesh: data 2, fsdp 2", out)
    assert "hosts   2; the first one logs" in out
    assert not any(word in other for word in ("device", "model", "step", "loss"))  # gloo speaks, of ranks
    assert [row["step"] for row in metrics(folder / "run") if "loss" in row] == list(range(12))
    assert len(list((folder / "run").glob("events.*"))) == 1
    assert (folder / "run/samples.txt").read_text().count("--- step") == 2
    meta = json.loads((folder / "run/checkpoints/step_00000012/meta.json").read_text())
    assert meta["tokens_per_step"] == 4 * 2 * 64


@pytest.mark.parametrize("mesh", ["2,2", pytest.param("1,4", marks=pytest.mark.slow)])
def test_two_go_on_where_two_were(two, tmp_path, mesh):
    """Ten steps, evaluations and the state after them: the same tokens, and the same numbers: to the bit, or on another
    mesh to float32 rounding (6e-8 an operation; measured 1e-7)."""
    folder, _ = two
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    shutil.copytree(folder / "run/checkpoints/step_00000002", tmp_path / "run/checkpoints/step_00000002")
    shutil.copy(folder / "run/config.json", tmp_path / "run/config.json")
    out, _ = both_end(start_two(tmp_path, mesh=mesh))
    assert "resumed at step 2" in out
    have, want = metrics(tmp_path / "run"), metrics(folder / "run")
    if mesh == OPTIONS["mesh"]:
        assert have == want
        states = [contents(run / "run/checkpoints/step_00000012") for run in (tmp_path, folder)]
        assert all(states[0][name] == states[1][name] for name in states[1] if name.endswith(".safetensors"))
    else:
        assert len(have) == len(want) and all(x == pytest.approx(y, rel=3e-6) for x, y in zip(have, want))


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_is_killed(tmp_path, victim):
    """The other one ends by itself, within the time that jax waits for signs of life; both go on from the newest
    checkpoint and lose no step."""
    options = QUIET | dict(num_iterations=60, save_interval=10, log_interval=10, keep_checkpoints=100)
    processes = start_two(tmp_path, **options)
    until(lambda: (tmp_path / "run/checkpoints/step_00000010/meta.json").exists(), *processes)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    other = processes[1 - victim]
    output_of(other, 100)
    assert other.returncode not in (0, -signal.SIGKILL) and time.monotonic() - killed < 90
    output_of(processes[victim])
    step = saved_steps(tmp_path / "run")[-1]
    out, _ = both_end(start_two(tmp_path, **options))
    assert f"resumed at step {step}" in out
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    assert [row["step"] for row in metrics(tmp_path / "run") if "loss" in row] == list(range(0, 60, 10))


def test_one_is_asked_to_stop(tmp_path):
    """Both end after the same step, with a checkpoint."""
    processes = start_two(tmp_path, **QUIET | dict(num_iterations=100_000, log_interval=10, mesh="4,1"))
    read_until(processes[0], "first step after")
    processes[1].send_signal(signal.SIGTERM)
    out, _ = both_end(processes, 128 + signal.SIGTERM)
    (step,) = saved_steps(tmp_path / "run")
    assert f"SIGTERM: stopped after step {step}" in out


@pytest.mark.parametrize(
    ("differences", "words"),
    [([{"learning_rate": 0.01}, {"learning_rate": 0.02}], "learning_rate"), ([{"dataset": "nowhere"}] * 2, "dataset=")],
    ids=["not alike", "wrong"],
)
def test_what_is_wrong_is_one_line_on_each_host(tmp_path, differences, words):
    """Both refuse before any work, also where only the first one can know; nobody waits for the other."""
    for out in both_end(start_two(tmp_path, *differences), 2):
        errors = [line for line in out.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and words in errors[0]
    assert not (tmp_path / "run").exists()
