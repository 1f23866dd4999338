"""No step is lost to anything that can be caught: an error is raised at each call of the loop, in turn; and a stop
request is served, whatever the loop waits for."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.helpers import (
    EMBEDDED,
    QUIET,
    ROOT,
    SECONDS,
    TINY,
    fetcher,
    metrics,
    one_line,
    output_of,
    read_until,
    saved_steps,
    script,
    started,
    state_file,
    tiny,
    write_shard,
)

AFTER = 7  # steps: the state of step 6 is saved, and that of step 7 is not


class Injected(Exception):
    pass


def calls_of_the_loop(nb, config, after=AFTER, only=None, error=None):
    """Trains. Returns (the functions of 02 that the main thread calls once `after` steps are done, in their order;
    steps done; what was raised). Raises `error` where `only` is called for the first time."""
    names, steps, train_step = [], [], nb.train_step
    here = nb.train.__code__.co_filename

    def counted(config, state, *batch):
        result = train_step(config, state, *batch)
        steps.append(1)
        return result

    def trace(frame, event, argument):
        name = frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name
        if len(steps) >= after and frame.f_code.co_filename == here and name not in names:
            names.append(name)
            if name == only:
                raise error  # out of the call that is traced; it ends the tracing

    raised = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nb, "train_step", counted)
        sys.settrace(trace)
        try:
            nb.train(config)
        except BaseException as failure:
            raised = failure
        finally:
            sys.settrace(None)
    return names, len(steps), raised


@pytest.fixture(scope="module")
def whole(nb, tmp_path_factory):
    """(the folder of a run that nothing happened to, what its loop calls after step 7)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    names, steps, raised = calls_of_the_loop(nb, tiny(nb, folder, profile_steps=3, profile_start=8))
    assert steps == 12 and raised is None
    assert {"Training.next_batch", "RunLog.read", "evaluate", "Training.save", "Checkpointer.save"} <= {*names}
    return folder, names


WATCHES = {"file_sink.<locals>.write", "tensorboard_sink.<locals>.write", "xprof_trace", "plot_loss"}


@pytest.mark.parametrize(
    ("error", "every"),
    [(Injected("injected"), 4), (KeyboardInterrupt(), 8)]
    + [pytest.param(error, 1, marks=pytest.mark.slow) for error in (Injected("injected"), KeyboardInterrupt())],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else f"every {value}",
)
def test_no_step_is_lost_wherever_an_error_is_raised(nb, whole, tmp_path, error, every):
    """What only watches leaves the run alone. All else ends it with the error, and the last step that was done is
    saved: the same start ends as a run that nothing happened to, to the bit."""
    folder, names = whole
    lost, watched = {}, set()
    for number, name in enumerate(names[::every]):
        run = tmp_path / str(number)
        config = tiny(nb, run, profile_steps=3, profile_start=8)
        _, steps, raised = calls_of_the_loop(nb, config, only=name, error=error)
        if raised is None:
            watched.add(name)
            assert saved_steps(run)[-1] == 12, name
        elif raised is not error or saved_steps(run)[-1] != steps:
            lost[name] = raised, steps, saved_steps(run)
        elif steps < 12:
            nb.train(config)
            assert state_file(run) == state_file(folder), name
            lines = [line for line, before in zip(metrics(run), [None, *metrics(run)]) if line != before]
            expected = metrics(folder)
            missing = [line for line in expected if line not in lines]  # that of the call in which the error came
            assert len(missing) <= 1 and lines == [line for line in expected if line not in missing], name
        shutil.rmtree(run)
    assert not lost and len(names) > 60
    assert every > 1 or isinstance(error, KeyboardInterrupt) or WATCHES <= watched
    print(f"{len(names[::every])} places, {len(watched)} of them only watch; nothing was lost")


# ---- a stop request


STALLS = {
    "the next shard": "list_shards", "the validation shard": "list_shards", "the disk": "write_checkpoint",
    "samples": "generate",
}  # fmt: skip


@pytest.mark.parametrize("stall", STALLS)
def test_a_stop_request_is_served_while_the_loop_waits(nb, tokenizer, tmp_path, monkeypatch, stall):
    """For a shard that does not come, for a disk or a sample that takes its time. The state is saved at once, and the
    run goes on as if it had not been stopped."""
    release, reached, moments = threading.Event(), threading.Event(), []
    function, shards = getattr(nb, STALLS[stall]), [tmp_path / f"{name}.parquet" for name in "ab"]
    for shard in shards:
        write_shard(shard, ["some words " * 200] * 30)

    def wait(*args, **options):
        if len(reached_before) >= (stall == "the disk"):  # its first checkpoint is written
            reached.set()
            release.wait(SECONDS)
        reached_before.append(1)
        return second() if STALLS[stall] == "list_shards" else function(*args, **options)

    reached_before = []
    if STALLS[stall] == "list_shards":
        first, second = (fetcher(nb, shard) for shard in shards)
        waits = functools.partial(wait, nb.Shard("b", (nb.HubFile("me/x", "b.parquet"),)))
        listed = ([first, waits], second) if stall == "the next shard" else ([first, second], waits)
        monkeypatch.setattr(nb, "list_shards", lambda config: listed)
        monkeypatch.setattr(nb, "find_tokenizer", lambda *_: tokenizer)
    else:
        monkeypatch.setattr(nb, STALLS[stall], wait)

    def stop():
        assert reached.wait(SECONDS)
        time.sleep(1)  # the loop comes to where it waits
        if stall == "the disk":
            release.set()  # a disk that never comes cannot be written to
        moments.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGTERM)

    dataset = "karpathy/climbmix-400b-shuffle" if STALLS[stall] == "list_shards" else "embedded"
    config = tiny(nb, tmp_path / "run", dataset=dataset, num_iterations=60, save_interval=5)
    if "shard" in stall:
        config = config.replace(eval_interval=0 if stall == "the next shard" else 40, num_iterations=100)
    threading.Thread(target=stop, daemon=True).start()
    summary = nb.train(config)
    latency = time.perf_counter() - moments[0]
    print(f"{stall}: stopped {latency:.2f} s after the signal")
    assert summary["stopped"] == "SIGTERM" and saved_steps(tmp_path / "run")[-1] == summary["step"] > 0
    release.set()
    again = nb.train(config)
    assert again["step"] == config.num_iterations and again["finished"]
    assert nb.newest_checkpoint(tmp_path / "run")[1]["finished"]


LONG = TINY | QUIET | dict(num_iterations=4000, n_head=1, seq_len=32)


def test_a_terminal_that_is_gone_saves_and_one_that_is_expected_to_go_does_not_matter(tmp_path):
    """SIGHUP ends a run as SIGTERM does; under nohup it does not. A closed stdout is no reason to stop."""
    process = started("02_train.py", cwd=tmp_path, run_dir="run", **LONG)
    read_until(process, "first step")
    process.send_signal(signal.SIGHUP)
    out = output_of(process)
    assert process.returncode == 128 + signal.SIGHUP, out
    assert "SIGHUP: stopped after step" in out and len(saved_steps(tmp_path / "run")) == 1
    command = f"{sys.executable} {ROOT}/02_train.py --run_dir=piped " + " ".join(f"--{n}={v}" for n, v in LONG.items())
    command = f"set -o pipefail; {command} --num_iterations=40 --log_interval=1 | head -n 3"
    piped = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert piped.returncode == 0 and saved_steps(tmp_path / "piped") == [40], piped.stderr


@pytest.mark.parametrize("gap", [0.0, 0.02, 0.3])
def test_a_second_ctrl_c_interrupts_no_save(tmp_path, gap):
    process = started("02_train.py", cwd=tmp_path, run_dir="run", **LONG)
    read_until(process, "first step")
    time.sleep(0.5)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(gap)
    out = output_of(process)
    assert process.returncode == 130 and "could not be saved" not in out, out
    assert f"stopped after step {saved_steps(tmp_path / 'run')[-1]};" in out


def test_a_closed_stdout_and_logs_that_cannot_be_written(nb, tmp_path):
    """Nobody reads what is printed, and metrics.jsonl is a folder: the run ends well."""
    words = " ".join(f"--{name}={value}" for name, value in (TINY | QUIET).items())
    command = f"{sys.executable} {ROOT}/02_train.py --run_dir=new {words} >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, timeout=SECONDS).returncode == 0
    assert saved_steps(tmp_path / "new") == [12]
    config = tiny(nb, tmp_path / "two", **QUIET)
    log_step = nb.Training.log_step

    def put_in_the_way(run, step, metrics):
        if step == 5:
            (run.run / "metrics.jsonl").unlink()
            (run.run / "metrics.jsonl").mkdir()
        log_step(run, step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nb.Training, "log_step", put_in_the_way)
        assert nb.train(config)["step"] == 12
    assert saved_steps(tmp_path / "two") == [12]


# ---- what a run depends on


def test_one_folder_one_process(nb, tmp_path, monkeypatch, capsys):
    """A second start is refused in a line while the first trains; the lock goes with its process. Storage without locks
    is said."""
    config = tiny(nb, tmp_path / "run", **QUIET | {"num_iterations": 2})
    run, _, lock = nb.open_run(config)
    with (
        lock,
        pytest.raises(nb.InputError, match="another process is training in .*run; wait, stop it, or name") as error,
    ):
        nb.train(config)
    assert one_line(str(error.value), "run_dir=") and not list(run.glob("events*"))
    holder = started("02_train.py", cwd=tmp_path, run_dir="run", **LONG)
    read_until(holder, "first step")
    with pytest.raises(nb.InputError, match="another process is training"):
        nb.train(config)
    never, _, lock = nb.open_run(config.replace(resume="never"))
    lock.close()
    assert never.name == "run-2"
    holder.kill()
    output_of(holder)
    monkeypatch.setattr(nb.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    assert nb.train(config.replace(run_dir=str(tmp_path / "drive")))["step"] == 2
    assert "cannot be locked" in capsys.readouterr().out


def test_other_data_are_refused_by_name(nb, tmp_path):
    """A folder that has grown would train on what validated before; another tokenizer gives other tokens."""
    data, config = tmp_path / "data", tiny(nb, tmp_path / "run", dataset=str(tmp_path / "data"), final_eval_tokens=512)
    shutil.copytree(EMBEDDED, data)
    shards = sorted(data.glob("*.parquet"))
    shards[0].rename(tmp_path / "later.parquet")
    nb.train(config)
    meta = sorted((tmp_path / "run").glob("checkpoints/*/meta.json"))[-1]
    meta.write_text(meta.read_text().replace('"finished": true', '"finished": false'))

    def refused(*words):
        with pytest.raises(nb.InputError, match="holds an unfinished run on other data") as error:
            nb.train(config)
        return one_line(str(error.value), "resume='never'", *words)

    added = shutil.copy(tmp_path / "later.parquet", data / "zzz.parquet")
    assert refused("validation shard shard_00004.parquet", "→ zzz.parquet", "3 training shards → 4; new: shard_00004")
    added.unlink()
    shards[1].rename(data / "moved.parquet")
    assert refused("gone: shard_00001.parquet", "new: moved.parquet")
    (data / "moved.parquet").rename(shards[1])
    names = data / "tokenizer" / "tokenizer.json"
    names.write_text(names.read_text().replace("<|output_end|>", "<|another|>"))
    assert refused("tokenizer ")
    names.write_text(names.read_text().replace("<|another|>", "<|output_end|>"))
    assert nb.train(config)["step"] == 12


FLAGS = dict(
    JAX_ENABLE_X64="1", JAX_DEFAULT_PRNG_IMPL="rbg", JAX_THREEFRY_PARTITIONABLE="0", JAX_RANDOM_SEED_OFFSET="7",
    JAX_NUMPY_DTYPE_PROMOTION="strict", JAX_NUMPY_RANK_PROMOTION="raise", LC_ALL="C", PYTHONUTF8="0",
    PYTHONIOENCODING="ascii", WANDB_MODE="",
)  # fmt: skip


def test_the_environment_does_not_decide_the_numbers(nb, finished, tmp_path):
    """Whatever is set there: jax's flags, a locale that has no letters but ASCII."""
    settings = TINY | dict(run_dir="run", profile_steps=3)
    done = script("02_train.py", cwd=tmp_path, env=os.environ | FLAGS, **settings)
    assert done.returncode == 0, done.stderr
    assert state_file(tmp_path / "run") == state_file(finished[0].run_dir)
    assert metrics(tmp_path / "run") == metrics(finished[0].run_dir)


def test_out_of_memory_names_the_largest_batch_that_fits(nb, tmp_path, monkeypatch):
    """And with that it trains. The folder is not used up."""
    config = tiny(nb, tmp_path / "run", **QUIET | {"num_iterations": 2, "device_batch_size": 24})
    train_step, limit = nb.train_step, nb.memory_of_step(config.replace(device_batch_size=9, total_batch_size=-1))

    def full(config, state, *batch):
        if config.device_batch_size > 12:
            raise nb.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.\nmore")
        return train_step(config, state, *batch)

    full.lower = train_step.lower
    monkeypatch.setattr(nb, "train_step", full)
    monkeypatch.setattr(nb, "memory_limit", lambda: limit)
    with pytest.raises(nb.InputError, match="^out of memory: RESOURCE_EXHAUSTED") as error:
        nb.train(config)
    found = re.search(
        r"set device_batch_size=(\d+), the largest that fits, and total_batch_size=(\d+)", str(error.value)
    )
    size, total = map(int, found.groups())
    fits = {
        n: nb.memory_of_step(config.replace(device_batch_size=n, total_batch_size=total)) <= limit for n in (6, 8, 12)
    }
    assert size == max(n for n in fits if fits[n]) and not all(fits.values())
    with monkeypatch.context() as patch:  # the state itself does not fit
        patch.setattr(nb, "init_train_state", lambda config: full(config, None))
        with pytest.raises(nb.InputError, match="^out of memory: .*device_batch_size"):
            nb.train(config)
    summary = nb.train(config.replace(device_batch_size=size, total_batch_size=total))
    assert summary["step"] == 2 and summary["run_dir"] == config.run_dir and summary["tokens"] == 2 * 24 * 64


def test_a_chip_that_jax_does_not_have_is_not_replaced_by_the_demo(nb, tmp_path, monkeypatch):
    monkeypatch.setattr(nb, "TPUS", [Path("/dev/accel0")])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(nb.InputError, match="/dev/accel0.*jax does not have it: .*JAX_PLATFORMS=cpu"):
        nb.Config.for_device()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert nb.Config.for_device().dataset == "embedded"
    done = script("02_train.py", cwd=tmp_path, env=os.environ | {"JAX_PLATFORMS": "tpu"}, num_iterations=1)
    assert done.returncode == 2 and one_line(done.stderr.strip(), "error: JAX_PLATFORMS=tpu: ", "unset it")


def test_a_profiler_in_use_and_one_that_cannot_write(nb, tmp_path, capsys):
    """The trace is left out, and the run goes on."""
    config = tiny(nb, tmp_path / "run", **QUIET | {"profile_steps": 3})
    nb.jax.profiler.start_trace(str(tmp_path / "own"))
    try:
        assert nb.train(config)["step"] == 12
    finally:
        nb.jax.profiler.stop_trace()
    trace = nb.xprof_trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nb, "xprof_trace", lambda run: (run / "profile").write_text("in the way") and trace(run))
        assert nb.train(config.replace(resume="never"))["step"] == 12
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("profiler failed: ")]
    assert len(lines) == 2 and all(line.endswith("training goes on without it") for line in lines)
