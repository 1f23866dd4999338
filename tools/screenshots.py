"""Opens a run in TensorBoard, in a headless Chromium; checks what it shows, and takes two pictures of it.

    python tools/screenshots.py RUN_FOLDER [--out docs]

RUN_FOLDER is what 02_train.py or 04_maxtext.py left behind. The pictures are OUT/tensorboard_scalars.png, the curves,
and OUT/tensorboard_trace.png, the traced steps in the Profile plugin's trace viewer. Prints a line for each thing
found; what is missing ends it with one line and exit status 1. The browser sees this machine only, so panels that load
Google Charts stay blank. The plugin leaves its cache beside the profile, as always. Needs, on Debian:

    apt-get install chromium chromium-driver && pip install selenium
"""

import argparse
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

from PIL import Image

try:
    from selenium import webdriver
    from selenium.common.exceptions import TimeoutException, WebDriverException
    from selenium.webdriver.support.ui import WebDriverWait
except ImportError:
    sys.exit("tools/screenshots.py needs selenium: pip install selenium")

REQUIRED = ("val_bpb", "loss", "grad_norm", "learning_rate")
PINNED = ("loss", "val_bpb", "val_loss", "learning_rate", "grad_norm", "tokens_per_second")
SETTINGS = {  # of the Time Series page: all the room for the curves, and no point outside them
    "ignoreOutliers": False, "scalarSmoothing": 0, "sideBarWidthInPercent": 10, "stepSelectorEnabled": False,
    "timeSeriesSettingsPaneOpened": False,
}  # fmt: skip

# Points in the curve of a tag's first card, the pinned one; false while there are fewer than needed.
CURVE = """
const [tag, need] = arguments, cards = Array.from(document.querySelectorAll("scalar-card"));
const card = cards.find(card => card.querySelector(".tag").title == tag);
const drawn = Array.from(card.querySelectorAll(".series-view path, .series-view circle"));  // one point: a circle
const points = Math.max(...drawn.map(shape => (shape.getAttribute("d") || "").split("L").length));
return points >= need && points;"""

# Of the Profile plugin's own page.
LISTED = "return arguments[0].find(session => frames[0].document.body.innerText.includes(session));"
TOOLS = "//*[starts-with(normalize-space(text()), 'Tools (')]/following::mat-select[1]"
TRACE_VIEWER = "//mat-option[normalize-space() = 'Trace Viewer']"

# The trace viewer is a page in the plugin's page in TensorBoard's; selenium's own search for elements fails there.
VIEWER = """
const page = frames[0].frames[0], view = page.document.querySelector("tr-ui-timeline-view"), events = [];
for (const event of view.model.getDescendantEvents()) events.push(event);
const steps = events.filter(event => /^train \\d+$/.test(event.title));
const viewport = view.trackView.viewport, canvas = viewport.modelTrackContainer.canvas, bounds = view.model.bounds;"""
TRACE = """
const tracks = view.model.getAllThreads().map(thread => thread.name).filter(name => name);
const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer;
const colours = new Set(new Uint32Array(pixels)).size, titles = items => items.map(event => event.title);
return steps.length && colours > 100 && {tracks, colours, events: titles(events), steps: titles(steps)};"""
# Selects the steps and fits the trace to the window; true if it was so already: the viewer may set its own view late.
SHOW_STEPS = """
const brush = view.brushingStateController, transform = viewport.currentDisplayTransform.clone();
const [left, right] = [bounds.min, bounds.max].map(time => transform.xWorldToView(time));
if (brush.selection.length == steps.length && Math.abs(left) + Math.abs(right - canvas.clientWidth) < 2) return true;
const selected = new page.tr.model.EventSet();
steps.forEach(step => selected.push(step));
brush.changeSelectionFromTimeline(selected);
transform.xSetWorldBounds(bounds.min, bounds.max, canvas.clientWidth);
viewport.setDisplayTransformImmediately(transform);"""


class Missing(Exception):
    """What was looked for is not there; the message is one line."""


@contextlib.contextmanager
def tensorboard(run):
    """TensorBoard on a port of its own choice; yields its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", run, "--host", "127.0.0.1", "--port", "0"]
    with tempfile.NamedTemporaryFile() as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + 120
            while not (address := re.search(r"at (http://\S+)", log := Path(file.name).read_text(encoding="utf-8"))):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise Missing(f"TensorBoard does not start: {(log.splitlines() or ['it says nothing'])[-1]}")
                time.sleep(0.2)
            yield address[1]
        finally:
            server.terminate()
            server.wait()


@contextlib.contextmanager
def chromium():
    """A headless Chromium with a page of 1280 × 960 and no network but this machine's."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        raise Missing("Chromium or its driver is not there: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):  # root has no sandbox
        options.add_argument(f"--{argument}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        size = {"width": 1280, "height": 960, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        settings = f"localStorage.setItem('_tb_global_settings', '{json.dumps(SETTINGS)}')"
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": settings})
        yield browser
    finally:
        browser.quit()


def wait(browser, missing, look, *arguments):
    """What the script, or the function of the browser, `look` returns once it is true; a minute later it is missing."""
    ask = look if callable(look) else lambda browser: browser.execute_script(look, *arguments)
    try:
        return WebDriverWait(browser, 60, ignored_exceptions=[WebDriverException]).until(ask)
    except TimeoutException:
        raise Missing(missing) from None


def picture(browser, path, ready="return true"):
    """Of a page that has come to rest in the state that the script `ready` wants, in 128 colours."""
    shots = [b""]

    def at_rest(browser):
        shots.append(browser.get_screenshot_as_png())
        return browser.execute_script(ready) and shots[-1] == shots[-2]

    wait(browser, "the page does not come to rest", at_rest)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(shots[-1])).convert("RGB").quantize(128).save(path, optimize=True)
    print(f"picture  {path}, {path.stat().st_size / 1000:.0f} kB")


def check_scalars(browser, address, run, path):
    logged = (run / "metrics.jsonl").read_text(encoding="utf-8").count('"loss"')
    many = min(max(logged, 2), 500)  # TensorBoard shows a sample of 1000

    def tags_are_read(_):  # a page that is opened before stays empty
        with urllib.request.urlopen(f"{address}data/plugin/timeseries/tags") as reply:
            return set(REQUIRED) <= set().union(*json.load(reply)["scalars"]["runTagInfo"].values())

    wait(browser, f"TensorBoard does not find all of {', '.join(REQUIRED)} in {run}", tags_are_read)
    pins = urllib.parse.quote(json.dumps([{"plugin": "scalars", "tag": tag} for tag in PINNED]))
    browser.get(f"{address}?forceSVG=true&pinnedCards={pins}#timeseries")
    for tag in REQUIRED:
        need = many if tag == "loss" else 1
        points = wait(browser, f"no card {tag} with a curve of {need} points or more", CURVE, tag, need)
        print(f"scalars  card {tag}: points in the curve: {points}")
    picture(browser, path)


def check_trace(browser, address, sessions, path):
    browser.get(f"{address}#profile")
    names = " ".join(sessions)
    print("profile  listed:", wait(browser, f"the Profile plugin does not list {names}", LISTED, sessions))
    browser.switch_to.frame(0)
    for xpath in (TOOLS, TRACE_VIEWER):
        wait(browser, "no Trace Viewer among the plugin's tools", lambda b, x=xpath: b.find_element("xpath", x)).click()
    browser.switch_to.default_content()

    trace = wait(browser, "the trace viewer draws no steps, train N", VIEWER + TRACE)
    if "train_step" not in " ".join(trace["events"]):
        raise Missing("the trace viewer shows no event of train_step")
    tracks, events, names = trace["tracks"], len(trace["events"]), len(set(trace["events"]))
    print(f"trace    {events} events of {names} names, drawn in {trace['colours']} colours")
    print(f"trace    {len(tracks)} tracks: {', '.join(tracks)}")
    print(f"trace    steps: {', '.join(trace['steps'])}")
    picture(browser, path, VIEWER + SHOW_STEPS)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Checks and pictures of a run in TensorBoard.")
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pictures (docs)")
    options = parser.parse_args(argv)
    sessions = sorted(path.name for path in options.run.glob("**/plugins/profile/*") if path.is_dir())
    try:
        if not (options.run / "metrics.jsonl").exists():
            raise Missing(f"{options.run} is no run folder: it has no metrics.jsonl")
        if not sessions:
            raise Missing(f"{options.run} holds no profile: was it made with --profile_steps 0?")
        with tensorboard(options.run) as address, chromium() as browser:
            check_scalars(browser, address, options.run, options.out / "tensorboard_scalars.png")
            check_trace(browser, address, sessions, options.out / "tensorboard_trace.png")
    except (Missing, OSError, WebDriverException) as error:
        print(f"tools/screenshots.py: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
