"""No step is lost to anything that can be caught: an error is raised at each call of the loop, in turn; and a stop request
is served, whatever the loop waits for."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.helpers import QUIET, ROOT, SECONDS, TINY, metrics, output_of, read_until, saved_steps, started, state_file
from tests.helpers import tiny, write_shard

AFTER = 7  # steps: the state of step 6 is saved, and that of step 7 is not


class Injected(Exception):
    pass


def calls_of_the_loop(nb, config, after=AFTER, only=None, error=None):
    """Trains. Returns (the functions of 02 that the main thread calls once `after` steps are done, in their order; steps
    done; what was raised). Raises `error` where `only` is called for the first time."""
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
    """What only watches leaves the run alone. All else ends it with the error, and the last step that was done is saved:
    the same start ends as a run that nothing happened to, to the bit."""
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
        return args[-1] if STALLS[stall] == "list_shards" else function(*args, **options)

    reached_before = []
    if STALLS[stall] == "list_shards":
        first, second = (functools.partial(nb.check_shard, shard) for shard in shards)
        waits = functools.partial(wait, shards[1])
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
    assert nb.train(config)["step"] == config.num_iterations


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
