"""TensorBoard shows a run, in a real browser: tools/screenshots.py finds the curves and the traced steps."""

import shutil
import subprocess
import sys

import pytest
from PIL import Image

from tests.helpers import ROOT

pytest.importorskip("selenium", reason="needs a browser: pip install selenium")


@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs a browser: apt-get install chromium chromium-driver",
)
def test_a_browser_shows_the_curves_and_the_traced_steps(finished, tmp_path):
    def screenshots():
        command = [sys.executable, ROOT / "tools" / "screenshots.py", tmp_path / "run", "--out", tmp_path / "docs"]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    shutil.copytree(finished[0].run_dir, tmp_path / "run")
    done = screenshots()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "card loss: points in the curve: 6" in done.stdout and "card val_bpb: points in the curve: 3" in done.stdout
    assert "steps: train 4, train 5, train 6\n" in done.stdout
    for name in ("tensorboard_scalars.png", "tensorboard_trace.png"):
        path = tmp_path / "docs" / name
        assert Image.open(path).size == (1280, 960) and path.stat().st_size < 150_000

    shutil.rmtree(tmp_path / "run" / "profile")
    done = screenshots()
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "holds no profile" in done.stderr
