"""benchmarks/accelerator.py, tried on the CPU: what a lent device will run in its first minutes."""

import importlib.util
import json
import os
import subprocess
import sys

from tests.helpers import ROOT


def run(folder, *arguments, **environment):
    """(exit status, report, stdout) of the script with small shapes."""
    command = [sys.executable, ROOT / "benchmarks" / "accelerator.py", "--tiny", "--out", folder, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)
    return done.returncode, json.loads((folder / "accelerator.json").read_text()), done.stdout


def test_each_part_survives_the_failure_of_another(tmp_path):
    """04 asks for a kernel that a CPU does not have; torch may be missing. The training comes after them, with its
    curve, samples and table."""
    parts = ["02", "04 pallas", "torch 02", "losses", "train"]
    status, report, out = run(tmp_path, "--parts", *parts)
    assert status == 0 and list(report["parts"]) == parts, out
    step, broken, theirs, losses, train = report["parts"].values()
    assert step["ok"] and step["ms"] > 0 and step["attention"] == "einsum" and step["batch_shape"] == [1, 2, 128]
    assert not broken["ok"] and broken["error"].count("\n") == 0 and "interpret" in broken["error"]
    assert train["ok"] and train["step"] == 40 and len(train["curve"]) == 40 and len(train["validation"]) == 2
    assert "It is a truth" in train["samples"] and "optimizer, forward" in train["trace"]["parts_ms"]
    torch = importlib.util.find_spec("torch") is not None
    assert theirs["ok"] == losses["ok"] == torch
    assert losses["apart"] < 1e-4 if torch else "No module named 'torch'" in losses["error"]
    assert (tmp_path / "accelerator.png").stat().st_size > 10_000
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.suffix != ".log") == [".json", ".png"]


def test_a_part_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import accelerator

    part = accelerator.call("02", ["step", "02", "auto"], tmp_path, True, 0.2)
    assert not part["ok"] and part["error"] == "took more than 0 s" and part["seconds"] < 10


def test_no_part_begins_without_time(tmp_path):
    status, report, _ = run(tmp_path, "--minutes", "0.2", "--parts", "02", "train")
    assert status == 1 and [part["error"] for part in report["parts"].values()] == ["no time was left"] * 2
