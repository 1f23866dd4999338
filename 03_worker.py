# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V6E1
#     machine_shape: hm
#     provenance: []
#     toc_visible: true
#   jupytext:
#     cell_metadata_filter: title,tags,cellView,-all
#     comment_magics: false
#     notebook_metadata_filter: accelerator,colab,kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sweep hyper-parameters, on as many chips as you like
#
# Which learning rate? How long a warmdown? Wide heads or many? This notebook tries. Its subject is another notebook:
# 02, 04, 06, or your own copy of one, in which you have changed the model. It defines a search over the Config of the
# subject. Then it works for that search: it asks [wandb](https://docs.wandb.ai/guides/sweeps) for a suggestion, trains
# it, reports, and asks again. Open it in a second Colab tab with the id of the same sweep, and two workers share the
# search.
#
# | you have | *Run all* |
# |---|---|
# | no account | tries a few suggestions on this machine and logs them offline; `wandb sync` can send them later |
# | a wandb key (secret or environment variable `WANDB_API_KEY`) | creates a sweep, prints its id, and works for it |
# | a key, and a sweep's id in `SWEEP_ID` | joins that sweep |

# %% [markdown]
# ## Setup
#
# All code cells of the subject that are not tagged `run` are executed, and become the module `nb`: its Config, its
# model, its training loop. A file of that name in the working folder is taken first, `.py` or `.ipynb`, then one beside
# this notebook, then GitHub's. Save the notebook that you have changed to a mounted Drive, and give its path; tag the
# cells `run` in which you only tried something. All workers of a sweep need the same subject and the same `CHANGES`.

# %% Parameters tags=["parameters"]
NOTEBOOK = "02_train.py"  # @param ["02_train.py", "04_maxtext.py", "06_recipe.py"] {allow-input: true}
SWEEP_ID = ""  # @param {type:"string"}
PROJECT = "tpuchat"  # @param {type:"string"}
ENTITY = ""  # @param {type:"string"}
RUNS = 40  # @param {type:"integer"}
LOCAL_TRIALS = 4  # @param {type:"integer"}
CHANGES = {}  # fields of the subject's Config that the search starts from, such as {"dataset": "my_folder"}

# %% Install what is missing cellView="form" tags=["shared"]
# @title Install what is missing
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile


def install(*packages):
    """Installs, in a notebook, the packages that the runtime lacks. Pins all installed versions: pip replaces none."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if not missing or "get_ipython" not in globals():
        return
    print("installing", *missing)
    pins = {}
    for package in importlib.metadata.distributions():
        name, version = package.name, package.version
        # pip refuses versions such as Debian's own 2.22.1ubuntu1.
        if name and re.fullmatch(r"[\d.]+(?:(?:a|b|rc|\.post|\.dev)\d+)*(?:\+[\w.]+)?", version or ""):
            pins.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)  # the first in the path is the one in use
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as constraints:
        constraints.write("".join(f"{name}=={version}\n" for name, version in pins.items()))
        constraints.flush()
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints.name, *missing]
        subprocess.run(command, check=True)


# %% Install tags=["run"]
install(
    "jax", "numpy", "tiktoken", "rustbpe", "pyarrow", "huggingface_hub", "datasets", "safetensors", "tensorboard",
    "wandb", "matplotlib", "tqdm",
)  # fmt: skip

# %% Imports cellView="form"
# @title Imports
import atexit
import dataclasses
import functools
import gc
import itertools
import json
import linecache
import math
import os
import pprint
import random
import shlex
import shutil
import sys
import threading
import traceback
import urllib.request
from pathlib import Path

import numpy as np
import wandb

GITHUB = "tpuchat/tpuchat"
IN_NOTEBOOK = "get_ipython" in globals()


class InputError(ValueError):
    """A wrong input. The message is one line: what was wrong, the value, and what to do."""


# %% Load a notebook cellView="form" tags=["shared"]
# @title Load a notebook
def load_notebook(name):
    """Returns a notebook, .py or .ipynb, as a module of its code cells not tagged `run`, without lines of % and !.

    It is looked for here, beside this file, and on GitHub. Raises InputError if it is nowhere, or no notebook."""
    paths = Path(name).expanduser().absolute(), Path(globals().get("__file__", "")).absolute().parent / name
    path = next((path for path in paths if path.is_file()), None)
    url = path.as_uri() if path else f"https://raw.githubusercontent.com/{GITHUB}/main/{name}"
    try:
        data = urllib.request.urlopen(url, timeout=30).read()
    except (OSError, ValueError) as error:
        raise InputError(f"notebook={name!r}: there is no such file here, and none at {url} ({error})") from error
    try:
        if name.endswith(".ipynb"):
            cells = [cell for cell in json.loads(data)["cells"] if cell["cell_type"] == "code"]
            cells = ["".join(cell["source"]) for cell in cells if "run" not in cell["metadata"].get("tags", [])]
            code = re.sub(r"^ *[%!].*", "", "\n".join(cells), flags=re.M)
        else:
            run = re.compile(r'# %%.*(\[markdown\]|tags=\[[^\]]*"run")')
            cells = re.split(r"^(?=# %%)", data.decode(), flags=re.M)
            code = "".join("\n" * cell.count("\n") if run.match(cell) else cell for cell in cells)  # line numbers stay
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"notebook={name!r}: {path or url} is no notebook ({error!r})") from error
    title, file = f"subject_{Path(name).stem}", str(path or url)
    linecache.cache[file] = len(code), None, code.splitlines(True), file  # a traceback shows the line
    module = sys.modules[title] = type(sys)(title)  # before the code runs: dataclasses look their module up
    if path:
        module.__file__ = file  # beside it is the embedded corpus
    if "get_ipython" in globals():
        module.get_ipython = get_ipython  # noqa: F821  by which the subject knows that it is in a notebook
    exec(compile(code, file, "exec", dont_inherit=True), module.__dict__)
    if not hasattr(module, "train_step"):
        raise InputError(f"notebook={name!r}: has no train_step; 02_train.py has one")
    return module


# %% The subject
if __name__ == "__main__" and not IN_NOTEBOOK and sys.argv[1:] and sys.argv[1].endswith((".py", ".ipynb")):
    NOTEBOOK = sys.argv.pop(1)
try:
    nb = load_notebook(NOTEBOOK)
except InputError as error:
    if IN_NOTEBOOK or __name__ != "__main__":
        raise
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None
if __name__ == "__main__" and not IN_NOTEBOOK:
    nb.keep_writable("stdout"), nb.keep_writable("stderr")
InputError, first_line, host, require = nb.InputError, nb.first_line, nb.host, nb.require
import jax  # after the subject, which sets the variables that jax reads

# %% [markdown]
# ## The search space
#
# A sweep is a space, a way to search it, and a rule that ends bad trials early. **Bayesian search** fits a Gaussian
# process to the results so far, and suggests what promises most; several workers may ask it at once.
# [**Hyperband**](https://arxiv.org/abs/1603.06560) compares a trial with the others after the same number of
# evaluations, and stops it if it is not in the better half.
#
# | parameter | range | what it is |
# |---|---|---|
# | `learning_rate` | log-uniform, a quarter to three times the base's | matters most; its scale is a ratio |
# | `weight_decay` | 0 to 0.3 | shrinks the matrices, scaled by the learning rate; matters more in long runs |
# | `warmup_ratio`, `warmdown_ratio` | 0 to 0.1, 0.2 to 0.9 | the shape of the schedule; together never above 1 |
# | `n_embd` | the base's and half of it | the width of the model; depth follows width |
# | `head_dim` | the base's and twice that | many narrow heads or few wide ones: `n_head = n_embd / head_dim` |
# | `heads_per_kv` | 1 or 2 | query heads that share a key/value head: `n_kv_head = n_head / heads_per_kv` |
# | `device_batch_size` | the base's, half, a quarter | sequences a step: less noise in the gradient, or more steps |
#
# Every suggestion is a valid Config: heads follow from the width, so they divide it. (In 04 they do not follow, and its
# shape stays.) No model is larger than the base, which fits the device. The first four parameters are traced, so
# changing them compiles nothing; each of the 2 × 2 × 2 × 3 shapes compiles once. Heads narrower than the base's are
# left out, since a register of the TPU is 128 lanes wide: at width 512 a step takes 25.2 ms with heads of 64, and
# 8.5 ms with heads of 128 (02 on a v6e, estimated by the compiler).


# %% Base of the search
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig(nb.Config):
    """The Config that a search starts from, and the options of the search itself."""

    sweep_id: str = host("", "id of the wandb sweep to join; empty = create a sweep")
    project: str = host("tpuchat", "project of the sweep at wandb", nb.PROJECT)
    entity: str = host("", "user or team that owns the project at wandb; empty = your default")
    runs: int = host(40, "most trials of a sweep that is created here, of all workers together", nb.POSITIVE)
    trials: int = host(4, "trials of a search without an account", nb.POSITIVE)

    def __post_init__(self):
        super().__post_init__()
        rule = "a search compares trials of equal FLOPs; give num_iterations"
        require(not self.hours and not self.credits, "hours or credits", self.hours or self.credits, rule)


def searches_shapes(config):
    """Whether the width follows from the heads, as in 02 and 06. In 04 it does not: there the model stays as it is."""
    return "n_embd" not in {field.name for field in dataclasses.fields(config)}


def base_config():
    """Returns the base on this device: a trial takes minutes on a TPU or GPU, and less than one on a CPU."""
    config = SearchConfig.for_device()
    config, run_dir = config.replace(total_batch_size=-1, profile_steps=0), f"runs/sweep-{Path(NOTEBOOK).stem}"
    if jax.default_backend() == "cpu":
        shape = dict(n_head=8, head_dim=16, aspect_ratio=32) if searches_shapes(config) else {}
        lengths = dict(num_iterations=60, eval_tokens=4096, final_eval_tokens=16_384)
        return config.replace(**shape, **lengths, run_dir=run_dir)
    lengths = dict(num_iterations=8000, eval_tokens=262_144, final_eval_tokens=2_097_152, num_shards=8)
    return config.replace(**lengths, run_dir=run_dir)


# %% Search space
def search_space(base):
    """Returns the parameters of the search around `base`, {name: its values, or its range}, in wandb's format."""
    rate = base.learning_rate
    shapes = {
        "n_embd": {"values": [base.n_embd // 2, base.n_embd]},
        "head_dim": {"values": [base.head_dim, 2 * base.head_dim]},
        "heads_per_kv": {"values": [1, 2]},
    }
    return {
        "learning_rate": {"distribution": "log_uniform_values", "min": rate / 4, "max": rate * 3},
        "weight_decay": {"distribution": "uniform", "min": 0.0, "max": 0.3},
        "warmup_ratio": {"distribution": "uniform", "min": 0.0, "max": 0.1},
        "warmdown_ratio": {"distribution": "uniform", "min": 0.2, "max": 0.9},
        **(shapes if searches_shapes(base) else {}),
        "device_batch_size": {"values": sorted({max(1, base.device_batch_size // part) for part in (1, 2, 4)})},
    }


def draw(parameter, rng):
    """Returns a random value of a parameter of the search space."""
    if "values" in parameter:
        return rng.choice(parameter["values"])
    low, high = parameter["min"], parameter["max"]
    if parameter["distribution"] == "log_uniform_values":
        return math.exp(rng.uniform(math.log(low), math.log(high)))
    return rng.uniform(low, high)


def suggested_config(base, suggestion):
    """Returns the Config of a suggestion, {parameter: value}; what the suggestion does not name is the base's.

    Raises InputError if there is no such model.
    """
    changes = dict(suggestion)
    if not searches_shapes(base):
        return base.replace(**changes)
    width, group = changes.pop("n_embd", base.n_embd), changes.pop("heads_per_kv", base.n_head // base.kv_heads)
    head_dim = changes.get("head_dim", base.head_dim)
    require(head_dim > 0 and width % head_dim == 0, "n_embd", width, f"must be a multiple of head_dim={head_dim}")
    heads = width // head_dim
    require(isinstance(group, int) and group > 0 and heads % group == 0, "heads_per_kv", group, f"must divide {heads}")
    return base.replace(**changes, n_head=heads, n_kv_head=heads // group)


def sweep_definition(base):
    """Returns wandb's definition of the sweep. Raises InputError if some shape in its space is not a model."""
    rule = "must be a multiple of 8: the search halves the width, doubles head_dim and pairs heads on a key/value head"
    require(base.n_head % 8 == 0 or not searches_shapes(base), "n_head", base.n_head, rule)
    space = search_space(base)
    shapes = {name: parameter["values"] for name, parameter in space.items() if "values" in parameter}
    for values in itertools.product(*shapes.values()):
        suggestion = dict(zip(shapes, values, strict=True))
        try:
            suggested_config(base, suggestion)
        except InputError as error:
            raise InputError(f"{error}; the search tries {suggestion}") from error
    return {
        "name": f"around-{Path(base.run_dir).name}",
        "method": "bayes",
        "metric": {"name": "val_bpb", "goal": "minimize"},
        "early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 2},  # compared at evaluations 2, 4, 8 of 10
        "run_cap": base.runs,
        "parameters": space,
    }


# %% Try it: three suggestions tags=["run"]
if IN_NOTEBOOK:
    base, rng = base_config(), random.Random(0)
    for name, parameter in sweep_definition(base)["parameters"].items():
        print(f"{name:18}", parameter.get("values") or "{min:.2g} to {max:.2g}, {distribution}".format(**parameter))
    for _ in range(3):
        suggestion = {name: draw(parameter, rng) for name, parameter in search_space(base).items()}
        c = suggested_config(base, suggestion)
        shape = f"D {c.n_embd} = N {c.n_head} × H {c.head_dim}, K {c.kv_heads}, L {c.depth}, B {c.device_batch_size}"
        print(f"{shape}; learning rate {c.learning_rate:.1e}, warmdown {c.warmdown_ratio:.0%} of the steps")

# %% [markdown]
# ## What it costs
#
# Every trial gets **the same compute**: FLOPs, not steps or tokens. A small model sees more tokens, a large one fewer,
# and the lowest bits per byte is what this budget buys. The budget is `base.num_iterations` steps of the base.
#
# FLOPs are known before the first trial. Time and price need the share of the chip's peak that a step reaches (MFU):
# 40% is assumed. For the reference model on a v6e the compiler's estimate is 39%, and smaller models reach less.

# %% Budget
ASSUMED_MFU = 0.4


def trial_flops(base):
    """Returns the FLOPs that each trial may use."""
    return base.total_steps * base.tokens_per_step * nb.flops_per_token(base)


def describe_budget(base, trials):
    """Prints what so many trials will take, before anything is trained."""
    kind, flops = jax.devices()[0].device_kind, trial_flops(base)
    text = f"budget  {trials} trials of {flops:.1e} FLOPs on {kind}"
    if not nb.peak_flops(kind):
        print(f"{text}: no time and no price, since the peak of this device is not known")
        return
    hours = flops / (ASSUMED_MFU * nb.peak_flops(kind) * base.devices) / 3600
    text += f": about {hours * 60:.1f} minutes each at {ASSUMED_MFU:.0%} MFU, {trials * hours:.1f} hours in all"
    if credits := trials * hours * (nb.units_per_hour() or 0):
        text += f", {credits:.1f} credits, ${credits * nb.UNIT_DOLLARS:.2f}"
    print(f"{text}; evaluation and compilation not included, early stops not counted")


# %% [markdown]
# ## A trial
#
# A suggestion becomes a Config, and the subject's `train` does the rest: it hands each line of its metrics to
# `report`, which logs it to wandb. A suggestion that is no model raises InputError. Then the run *fails*, with its
# reason in the summary, and reports no loss: an invented loss, however high, would distort the Gaussian process.


# %% Trial
def base_suggestion(base):
    """Returns the base as a suggestion."""
    heads_per_kv = base.n_head // base.kv_heads
    return {name: heads_per_kv if name == "heads_per_kv" else getattr(base, name) for name in search_space(base)}


def trial_config(base, suggestion, name):
    """Returns the Config of the trial `name`, with as many steps as the budget allows. Raises InputError."""
    config = suggested_config(base, suggestion)
    steps = max(10, round(trial_flops(base) / (config.tokens_per_step * nb.flops_per_token(config))))
    return config.replace(
        num_iterations=steps, run_dir=str(Path(base.run_dir) / name), eval_interval=math.ceil(steps / 10),
        log_interval=max(1, steps // 50), sample_interval=0, save_interval=0, resume="never", wandb_mode="disabled",
    )  # fmt: skip


def run_trial(base, run, suggestion):
    """Trains a suggestion and logs to the wandb run `run`. Returns the row of the trial: parameters, result, failure.

    A suggestion that is no model, a diverging loss, too little memory, and a stop by the sweep are noted as `failure`.
    Any other error is raised as RuntimeError, without the frames that hold arrays on the device.
    """
    folder, unexpected, thread = Path(base.run_dir) / run.id, None, threading.current_thread()
    row = {"name": run.id, **base_suggestion(base), **suggestion, "val_bpb": None, "failure": ""}
    run.define_metric("*", step_metric="step")

    def report(step, values):
        run.log({"step": step, **values})
        if getattr(thread, "_terminated", False):  # by the agent, whose exception jax's cache has caught and dropped
            raise Exception

    try:
        config = trial_config(base, suggestion, run.id)
        run.config.update({"trial": dataclasses.asdict(config)})
        summary = nb.train(config, report)
        row |= {"val_bpb": summary["val_bpb"], "parameters": nb.count_params(config)["total"], "steps": summary["step"]}
        if summary["stopped"]:
            raise KeyboardInterrupt
    except InputError as error:
        row["failure"] = str(error)
    except Exception as error:
        stopped = type(error) is Exception and not str(error)  # wandb.agent raises it in the thread of a trial
        row["failure"] = "stopped by the sweep" if stopped else f"{type(error).__name__}: {first_line(error)}"
        if not stopped:
            traceback.print_exc()
            unexpected = row["failure"]
    finally:
        for checkpoints in folder.parent.glob(f"{run.id}*/checkpoints"):  # gigabytes: the winner is trained anew
            shutil.rmtree(checkpoints, ignore_errors=True)
    gc.collect()  # cycles of objects may hold arrays on the device
    if folder.exists():
        (folder / "trial.json").write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    if row["failure"]:
        run.summary["failure"] = row["failure"]
        print(f"trial {run.id} failed: {row['failure']}", flush=True)
    else:
        rate = row["learning_rate"]
        print(f"trial {run.id}: {row['val_bpb']:.4f} bits per byte, learning rate {rate:.1e}", flush=True)
    if unexpected:
        raise RuntimeError(unexpected)
    return row


# %% [markdown]
# ## Work for a sweep
#
# `wandb.agent` asks the server for suggestions and calls a function for each, in a thread. When hyperband gives up on
# a trial, the agent raises an exception in that thread: the loader closes, the arrays on the device are freed, and the
# next suggestion comes. If this worker dies, wandb marks its trial as crashed after some minutes, and the other workers
# go on. Start the notebook again with the same `SWEEP_ID`, and the worker takes the next suggestion.


# %% Work for a sweep
def ask_wandb(what, call):
    """Returns call(). Raises InputError with the first line of an error of wandb."""
    try:
        return call()
    except (wandb.Error, ValueError, OSError) as error:
        raise InputError(f"wandb: cannot {what}: {first_line(error)}") from error


def leave_at_once():
    """Ends the process without wandb's own exit, which may wait for minutes for a server that does not answer."""
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(2)


def check_login():
    """Raises InputError, within seconds, if wandb does not answer or refuses the key."""
    try:
        ask_wandb("log in (check the network and WANDB_API_KEY)", lambda: wandb.login(verify=True))
    except InputError:
        if __name__ == "__main__" and not IN_NOTEBOOK:
            atexit.register(leave_at_once)  # the last one registered is called first
        raise


def create_sweep(base):
    """Creates a sweep at wandb and returns its id."""
    definition = sweep_definition(base)
    create = functools.partial(wandb.sweep, definition, project=base.project, entity=base.entity or None)
    return ask_wandb("create a sweep", create)


def work(base):
    """Trains what the sweep base.sweep_id suggests, until the sweep is done. Returns the rows of this worker."""
    rows = []

    def one():
        run = wandb.init(dir=base.run_dir)
        rows.append(run_trial(base, run, dict(run.config)))
        run.finish(exit_code=int(bool(rows[-1]["failure"])))

    Path(base.run_dir).mkdir(parents=True, exist_ok=True)
    where = {"project": base.project, "entity": base.entity or None}
    ask_wandb(f"join the sweep {base.sweep_id!r}", lambda: wandb.agent(base.sweep_id, function=one, **where))
    return rows


# %% [markdown]
# ## Search without an account
#
# The same space, sampled at random, without early stops. [Random
# search](https://jmlr.org/papers/v13/bergstra12a.html) wastes nothing on parameters that do not matter: each trial
# tries a new value of every other one. The first trial is the base itself, which the others have to beat.


# %% Search without an account
def local_search(base):
    """Trains the base and base.trials - 1 random suggestions, logged offline. Returns their rows."""
    rng, space, rows = random.Random(0), sweep_definition(base)["parameters"], []
    Path(base.run_dir).mkdir(parents=True, exist_ok=True)
    suggestions = [{name: draw(parameter, rng) for name, parameter in space.items()} for _ in range(base.trials - 1)]
    for suggestion in [base_suggestion(base), *suggestions]:
        run = wandb.init(
            mode="offline", project=base.project, group="local search", config=suggestion, dir=base.run_dir,
            reinit="finish_previous", settings=wandb.Settings(silent=True),
        )  # fmt: skip
        try:
            rows.append(run_trial(base, run, suggestion))
        except KeyboardInterrupt:
            print("interrupted: the results are those of the trials before; the next start searches anew", flush=True)
            run.finish(exit_code=1)
            break
        run.finish(exit_code=int(bool(rows[-1]["failure"])))
    return rows


# %% [markdown]
# ## Results
#
# A table of the best trials, a scatter of each parameter, the curves of the best and the worst, and the winner as code
# for the subject. wandb knows the trials of all workers; without an account they lie in the run folder.


# %% Rows
def fetch_rows(base):
    """Returns the rows of all trials of a sweep, of all workers, each with its curve [(step, val_bpb), …]."""
    path, rows = "/".join(filter(None, (base.entity, base.project, base.sweep_id))), []
    for run in ask_wandb("read the sweep", lambda: list(wandb.Api().sweep(path).runs)):
        curve = [(line["step"], line["val_bpb"]) for line in run.history(keys=["step", "val_bpb"], pandas=False)]
        suggestion = {name: value for name, value in run.config.items() if name != "trial"}
        failure = run.summary.get("failure", "" if run.state == "finished" else run.state)
        bpb = run.summary.get("val_bpb")
        rows.append({"name": run.id, **suggestion, "val_bpb": bpb, "failure": failure, "curve": curve})
    return rows


def add_curves(base, rows):
    """Adds to each row the curve [(step, val_bpb), …] that its trial left on this machine. Returns the rows."""
    for row in rows:
        folder = Path(base.run_dir) / row["name"]
        lines = nb.read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
        row["curve"] = [(line["step"], line["val_bpb"]) for line in lines if "val_bpb" in line]
    return rows


def ranked(rows):
    """Returns the rows of the trials that came to their end, the best first."""
    return sorted((row for row in rows if row["val_bpb"] and not row["failure"]), key=lambda row: row["val_bpb"])


def show_table(rows, names, count=10):
    """Prints the best trials, and how many did not come to their end."""
    print("   ".join(f"{name:>17}" for name in ("val_bpb", *names)))
    for row in ranked(rows)[:count]:
        values = [f"{row[name]:.4g}" if name in row else "" for name in names]
        print("   ".join(f"{value:>17}" for value in (f"{row['val_bpb']:.4f}", *values)))
    if others := len(rows) - len(ranked(rows)):
        print(f"{others} of {len(rows)} trials were stopped or failed")


def show_winner(base, rows):
    """Prints CHANGES of the subject for the best trial: what differs from this device's default, but for the length of
    the run."""
    best, default = ranked(rows)[0], nb.Config.for_device()
    config = suggested_config(base, {name: best[name] for name in search_space(base) if name in best})
    print(f"{best['val_bpb']:.4f} bits per byte with")
    changes = {}
    for field in dataclasses.fields(nb.Config):
        value, learned = getattr(config, field.name), field.compare or not field.metadata["resume"]
        if learned and value != getattr(default, field.name) and field.name not in ("num_iterations", "num_shards"):
            changes[field.name] = value
    print(f"CHANGES = {pprint.pformat(changes, sort_dicts=False)}")


# %% Pictures
def plot_parameters(rows, space, path):
    """Writes a scatter of bits per byte against each parameter of the search space."""
    from matplotlib.figure import Figure

    best = ranked(rows)
    figure = Figure(figsize=(12, 6), layout="constrained")
    grid = figure.subplots(2, math.ceil(len(space) / 2), sharey=True)
    for axes, (name, parameter) in zip(grid.flat, space.items(), strict=False):
        axes.scatter([row[name] for row in best], [row["val_bpb"] for row in best], s=14, color="tab:blue", alpha=0.7)
        axes.scatter([best[0][name]], [best[0]["val_bpb"]], s=60, color="tab:orange", label="best")
        axes.set(xlabel=name, xscale="log" if parameter.get("distribution", "").startswith("log") else "linear")
        axes.grid(alpha=0.3)
    figure.supylabel("validation bits per byte")
    figure.savefig(path, dpi=110)


def plot_curves(rows, path):
    """Writes the validation curves of the five best and the five worst trials."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, best = figure.subplots(), ranked(rows)
    for group, color, label in ((best[5:][-5:], "tab:red", "five worst"), (best[:5], "tab:blue", "five best")):
        for i, row in enumerate(group):
            if row["curve"]:
                steps, losses = np.array(row["curve"]).T
                axes.plot(steps / steps[-1], losses, color=color, alpha=0.8, label=label if i == 0 else None)
    axes.set(xlabel="share of the trial", ylabel="validation bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


# %% [markdown]
# # Run
#
# The first tab leaves `SWEEP_ID` empty and prints one; the others paste it. As a script: `python 03_worker.py
# 02_train.py --sweep_id abc123 --project tpuchat`. Every field of the base Config is another option.

# %% Configure tags=["run"]
USAGE = "03_worker.py [NOTEBOOK] searches over the Config of NOTEBOOK, a .py or .ipynb, of which these are the fields."
with nb.one_line_errors():
    base = base_config().replace(**CHANGES)
    base = base.replace(sweep_id=SWEEP_ID, project=PROJECT, entity=ENTITY, runs=RUNS, trials=LOCAL_TRIALS)
    base = nb.parse_args([] if IN_NOTEBOOK else sys.argv[1:], base, USAGE)
    sweep_definition(base)  # raises if some shape is no model
    key = nb.wandb_key()
    rule = "needs a key: set WANDB_API_KEY, or run `wandb login`"
    require(key or not base.sweep_id, "sweep_id", base.sweep_id, rule)
    nb.describe_machine(base)
    print(f"subject {getattr(nb, '__file__', NOTEBOOK)}")
    describe_budget(base, base.runs if key else base.trials)

# %% [markdown]
# ### Create once, or join

# %% Create tags=["run"]
with nb.one_line_errors():
    nb.find_data(base)  # wrong data would fail every trial
    if key:
        check_login()
        base = base if base.sweep_id else base.replace(sweep_id=create_sweep(base))
        options = " ".join(map(shlex.quote, () if IN_NOTEBOOK else sys.argv[1:]))
        command = f"python 03_worker.py {NOTEBOOK} {options} --sweep_id {base.sweep_id}"
        print(f"sweep   {base.sweep_id}: put it into SWEEP_ID of the next tab, or {command}")
    else:
        print("no WANDB_API_KEY: a search on this machine, logged offline")

# %% Work tags=["run"]
with nb.one_line_errors():
    rows = work(base) if key else local_search(base)

# %% [markdown]
# **What to look for.** In the scatter, a parameter that matters draws a valley, and one that does not draws a cloud. A
# best value at the end of its range says that the range was too narrow. Differences below the noise of a seed mean
# nothing: train the winner, and the base, with three seeds before you believe the difference.

# %% Results of the search tags=["run"]
rows = add_curves(base, rows)
if key:
    try:
        rows = fetch_rows(base)
    except InputError as error:
        print(f"{error}; the results below are those of this worker alone")
if ranked(rows):
    show_table(rows, search_space(base))
    plot_parameters(rows, search_space(base), Path(base.run_dir) / "parameters.png")
    plot_curves(rows, Path(base.run_dir) / "curves.png")
    show_winner(base, rows)
    print(f"parameters.png and curves.png are in {base.run_dir}")
else:
    print("no trial came to its end")

# %% Show the pictures tags=["run"]
if IN_NOTEBOOK and ranked(rows):
    from IPython.display import Image, display

    display(Image(str(Path(base.run_dir) / "parameters.png")), Image(str(Path(base.run_dir) / "curves.png")))

# %% [markdown]
# ## Release the runtime

# %% Release the runtime tags=["run"]
RELEASE = False  # @param {type:"boolean"}
if RELEASE and "google.colab" in sys.modules:
    from google.colab import runtime as colab_runtime

    colab_runtime.unassign()
