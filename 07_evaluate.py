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
# # Evaluate: what does a checkpoint know?
#
# A loss says how well a model compresses text. This notebook asks a checkpoint of 02, 04 or 06 questions:
# [CORE](https://arxiv.org/abs/2406.11794), the 22 tasks of DCLM, or `quick`, six tasks for use after every training. At
# tpuchat's size most accuracies are near chance. So each task has a second figure that is smooth: the bits per byte of
# the right answer. The results go to `evaluation.json` in the run folder, to TensorBoard, and to wandb with a key.

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
    "jax", "numpy", "tiktoken", "pyarrow", "huggingface_hub", "safetensors", "datasets", "tensorboard",
    "matplotlib", "tqdm",
)  # fmt: skip

# %% Imports cellView="form"
# @title Imports
import argparse
import collections
import contextlib
import csv
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import linecache
import math
import os
import random
import shutil
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GITHUB = "tpuchat/tpuchat"
IN_NOTEBOOK = "get_ipython" in globals()


class InputError(ValueError):
    """A wrong option, file or checkpoint. The message is one line: what was wrong, the value, what to do."""


# %% [markdown]
# # Part I: the essay
#
# ## Three kinds of questions
#
# In *multiple choice*, a question has several answers, and the model takes the one with the lowest mean loss. In a
# *schema*, several contexts have the same continuation: the model takes the context under which that continuation has
# the lowest mean loss. In *language modelling*, each token of the continuation must be the likeliest one. No answer is
# a letter, and nothing is sampled.

# %% Tasks
FIELDS = {  # what a question of each kind has
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


class Task(NamedTuple):
    """A task. Its questions are dicts with the FIELDS of its kind, in the order in which they are asked."""

    label: str
    kind: str
    shots: int  # examples before a question
    delimiter: str  # between a question and its answer
    baseline: float  # the accuracy of a guess
    questions: list


def completed(task, question, choice=None):
    """Returns the text of a question with its right answer, or with answer number `choice`."""
    choice = question.get("gold", 0) if choice is None else choice
    if task.kind == "multiple_choice":
        return question["query"] + task.delimiter + question["choices"][choice]
    if task.kind == "schema":
        return question["context_options"][choice] + task.delimiter + question["continuation"]
    return question["context"].strip() + task.delimiter + question["continuation"]


# %% [markdown]
# ## Few-shot examples
#
# Most tasks show the model ten examples with their answers. The published procedure fixes them: the questions are
# shuffled with seed 1337, and question number $i$ gets examples drawn with seed $1234 + i$ from all others of its file.
# An empty line parts two examples. With `--limit 500` the first 500 shuffled questions are asked; their examples are
# those of the whole file.


# %% Prompts
def in_order(questions):
    """Returns the questions in the order in which they are asked."""
    questions = list(questions)
    random.Random(1337).shuffle(questions)
    return questions


def examples(task, index):
    """Returns the few-shot examples of question number `index`."""
    drawn = random.Random(1234 + index).sample(range(len(task.questions) - 1), task.shots)
    return [task.questions[i + (i >= index)] for i in drawn]  # all but the question itself


def prompts(task, index):
    """Returns a text for each answer of a question; in language modelling the text without the answer, and with it."""
    question, before = task.questions[index], "".join(completed(task, x) + "\n\n" for x in examples(task, index))
    if task.kind == "language_modeling":
        return [(before + question["context"].strip() + task.delimiter).strip(), before + completed(task, question)]
    answers = question["choices" if task.kind == "multiple_choice" else "context_options"]
    return [before + completed(task, question, i) for i in range(len(answers))]


# %% Try it: a question tags=["run"]
if IN_NOTEBOOK:
    sums = [
        {"query": f"{a} + {b} is", "choices": [str(a + b), str(a + b + 1)], "gold": 0} for a in (2, 3) for b in (4, 5)
    ]
    toy = Task("sums", "multiple_choice", 1, " ", 0.5, in_order(sums))
    print(*map(repr, prompts(toy, 0)), sep="\n")

# %% [markdown]
# ## What counts as the answer
#
# The tokenizer decides, not the text: a token may span the end of a question and the start of its answer. So the answer
# is what follows the longest common prefix of a question's token sequences; in a schema, their longest common suffix.
# A prompt longer than the context loses its first tokens, BOS among them, and is counted.


# %% Tokens
class Item(NamedTuple):
    """A question as tokens."""

    sequences: list  # the token ids of each answer's prompt
    starts: list  # where the answer begins in each
    gold: int
    cropped: bool


def shared_length(sequences):
    """Returns the length of the longest common prefix."""
    differs = (i for i, tokens in enumerate(zip(*sequences)) if len(set(tokens)) > 1)
    return next(differs, min(map(len, sequences)))


def to_item(task, index, encode, longest):
    """Returns question number `index` as an Item of sequences of at most `longest` tokens. encode: text → ids."""
    sequences, cropped = [encode(text) for text in prompts(task, index)], False
    starts = [shared_length(sequences)] * len(sequences)
    if task.kind == "schema":
        same = shared_length([sequence[::-1] for sequence in sequences])
        starts = [len(sequence) - same for sequence in sequences]
    if task.kind == "language_modeling":
        sequences, starts = sequences[1:], starts[1:]
    for j, sequence in enumerate(sequences):
        cut = max(0, len(sequence) - longest)
        cropped |= cut > 0
        sequences[j], last = sequence[cut:], len(sequence) - cut - 1
        starts[j] = max(1, min(starts[j] - cut, last))  # the first token has no loss; one token counts at least
    return Item(sequences, starts, task.questions[index].get("gold", 0), cropped)


# %% Try it: tokens tags=["run"]
if IN_NOTEBOOK:
    item = to_item(toy, 0, lambda text: [256, *text.encode()], 64)  # a token for each byte, and BOS
    for sequence, start in zip(item.sequences, item.starts):
        print(f"{len(sequence)} tokens, of which the answer is {bytes(sequence[start:])!r}")

# %% [markdown]
# ## Packing: a tree in a row
#
# The answers of a question share its prompt, often 500 tokens for an answer of five. So a question is stored as a
# *tree*: the prompt once, as its *trunk*, then a *branch* for each answer. A row holds several trees, the longest
# first. A token sees its own branch and the trunk that it grows from; its position is that in the whole sequence. The
# last common token opens each branch, because it predicts the branch's first token.


# %% Pack
def trees(items, longest, shared=True):
    """Yields (tokens, tokens of the trunk, [(item, answer), …]) of trees of at most `longest` tokens. `shared=False`:
    each answer is a tree of its own, without a trunk."""
    for i, item in enumerate(items):
        trunk = max(0, min(shared_length(item.sequences), *item.starts) - 1) if shared else 0
        size, members = trunk, []
        for j, sequence in enumerate(item.sequences):
            if members and (not shared or size + len(sequence) - trunk > longest):
                yield size, trunk, members
                size, members = trunk, []
            size += len(sequence) - trunk
            members.append((i, j))
        yield size, trunk, members


def pack(items, lengths, shared=True):
    """Returns ({length of the rows: int32 [rows, 5, length]}, {(item, answer): (length, row, start, stop)}).

    A row has tokens, the tokens after them, positions, branches and trunks (two numbers that are unique in the row).
    start and stop: the columns that predict the answer. `shared=False`: a row for each answer.
    """
    rows, room, places = {n: [] for n in lengths}, {n: [] for n in lengths}, {}
    for size, trunk, members in sorted(trees(items, lengths[-1], shared), key=lambda tree: -tree[0]):
        length = next(n for n in lengths if size <= n)
        row = next((i for i, free in enumerate(room[length]) if free >= size), None) if shared else None
        if row is None:
            row = len(rows[length])
            rows[length].append(np.zeros((5, length), np.int32))
            room[length].append(length)
        root = column = length - room[length][row]
        room[length][row] -= size

        def add(tokens, position, parent):
            nonlocal column
            stop = column + len(tokens)
            following, own = [*tokens[1:], 0], column + 1  # 0 is padding
            facts = tokens, following, range(position, position + len(tokens)), own, parent or own
            for line, values in zip(rows[length][row], facts):  # noqa: B023
                line[column:stop] = values
            column = stop

        if trunk:
            i, j = members[0]
            add(items[i].sequences[j][:trunk], 0, None)
        for i, j in members:
            start = column + items[i].starts[j] - 1 - trunk
            add(items[i].sequences[j][trunk:], trunk, trunk and root + 1)
            places[i, j] = length, row, start, column - 1
    return {n: np.stack(some) for n, some in rows.items() if some}, places


# %% Try it: a packed row tags=["run"]
if IN_NOTEBOOK:
    row = pack([item], [64])[0][64][0]
    for branch, group in itertools.groupby(range(64), key=lambda column: row[3, column]):
        columns = [*group]
        text = bytes(min(token, 255) for token in row[0, columns]) if branch else "padding"
        first, last = columns[0], columns[-1]
        print(f"positions {row[2, first]:2} to {row[2, last]:2}, grows from {row[4, first]:2}: {text!r}")

# %% [markdown]
# ## Scores
#
# The model is the notebook's own `forward`. Only its attention is replaced while the program is traced: by one that
# follows the branches, with the notebook's QK-norm, RoPE and windows. A model may mix tokens in another way. So a check
# compares packed rows with whole sequences; if they differ, every answer gets a row of its own. The losses of all
# answers come from at most three shapes of rows. With the check these are four programs to compile.


# %% Attention along branches
def branch_attention(nb, positions, branches, trunks):
    """Returns an `attend` for packed rows: each token sees its branch and its trunk. All arguments: [B, T]."""

    def attend(config, q, k, v, T, window):
        H, K = config.head_dim, config.kv_heads
        q, k, v = (nb.split_heads(x, T, H) for x in (q, k, v))
        tables = [jnp.asarray(table)[positions][:, None] for table in nb.rope_tables(config.seq_len, H)]
        q, k = nb.norm_and_rope(q, *tables), nb.norm_and_rope(k, *tables)
        distance = positions[:, :, None] - positions[:, None]
        related = (branches[:, :, None] == branches[:, None]) | (trunks[:, :, None] == branches[:, None])
        seen = related & (distance >= 0) & (distance <= window)
        scores = jnp.einsum("bkgth,bksh->bkgts", q.reshape(-1, K, q.shape[1] // K, T, H), k,
                            preferred_element_type=jnp.float32) * H**-0.5  # fmt: skip
        probs = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
        return nb.merge_heads(jnp.einsum("bkgts,bksh->bkgth", probs, v).reshape(q.shape))

    return attend


def packed_logits(nb, config, params, rows, shared=True):
    """Returns the logits of packed rows [B, 5, T], float32 [B, T, V], by the notebook's forward."""
    tokens, _, positions, branches, trunks = jnp.moveaxis(rows, 1, 0)
    own = nb.attend
    try:
        nb.attend = branch_attention(nb, positions, branches, trunks) if shared else own
        return nb.forward(config, params, tokens)
    finally:
        nb.attend = own


@functools.partial(jax.jit, static_argnums=(0, 4))
def score_rows(nb, config, params, rows, shared):
    """Returns, of each token's next one, the loss in nats, float32 [B, T], and whether it is the likeliest."""
    logits = packed_logits(nb, config, params, rows, shared)
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, rows[:, 1, :, None], axis=-1)[..., 0]
    return losses, jnp.argmax(logits, axis=-1) == rows[:, 1]


# %% Check of the branches
def follows_branches(nb, config, params):
    """Whether the notebook's forward gives packed rows the logits of whole sequences, in float32."""
    if list(inspect.signature(getattr(nb, "attend", print)).parameters) != "config q k v T window".split():
        return False
    config, length = config.replace(compute_dtype="float32"), min(128, config.seq_len)
    third = (length - 1) // 3
    ends = np.random.default_rng(0).integers(config.vocab_size, size=(3, third)).tolist()
    item = Item([ends[0] + ends[1], ends[0] + ends[2]], [third] * 2, 0, False)
    rows, places = pack([item], [length])

    @jax.jit
    def gap(params):
        whole = nb.forward(config, params, jnp.array(item.sequences, jnp.int32))[:, third - 1 : -1]
        packed = packed_logits(nb, config, params, jnp.asarray(rows[length]))[0]
        packed = jnp.stack([packed[start:stop] for _, _, start, stop in places.values()])
        return jnp.abs(packed - whole).max() / jnp.abs(whole).max()

    with contextlib.suppress(AttributeError, TypeError), jax.default_matmul_precision("highest"):
        return float(gap(params)) <= 1e-3
    return False  # its attention has other parts


# %% Score questions
class Scorer(NamedTuple):
    """What scores rows: a model, or another source of probabilities."""

    score: object  # rows [B, 5, T] → (losses [B, T], whether the next token is the likeliest [B, T])
    longest: int  # tokens of a sequence, at most
    batch_tokens: int
    shared: bool = True


def model_scorer(nb, config, params):
    """Returns the Scorer of a model."""
    shared = follows_branches(nb, config, params)
    if not shared:
        print(f"{config.notebook} mixes tokens in another way: each answer is computed alone")
    batch = 2048 if jax.default_backend() == "cpu" else 8192
    return Scorer(lambda rows: score_rows(nb, config, params, rows, shared), config.seq_len, batch, shared)


def score_items(scorer, items):
    """Returns {(item, answer): (losses of its tokens, nats, whether each is the likeliest)}."""
    lengths = sorted({min(length, scorer.longest) for length in (256, 1024, scorer.longest)})
    rows, places = pack(items, lengths, scorer.shared)
    scored = {}
    for length, some in rows.items():
        size, outputs = max(1, scorer.batch_tokens // length), []
        for first in range(0, len(some), size):
            batch = some[first : first + size]
            outputs.append(scorer.score(np.pad(batch, ((0, size - len(batch)), (0, 0), (0, 0)))))
            jax.block_until_ready(outputs[-2:][0])  # two in flight keep the device busy
        scored[length] = [np.concatenate(x) for x in zip(*jax.device_get(outputs))]
    return {place: [x[row, start:stop] for x in scored[length]] for place, (length, row, start, stop) in places.items()}


# %% [markdown]
# ## Accuracy, CORE, and bits per byte
#
# *Centred* accuracy is 0 for a guess and 1 for no mistake: $(a - b) / (1 - b)$, where $b$ is the accuracy of a guess.
# CORE is the plain mean over its tasks. The standard error of an accuracy is the binomial one, $\sqrt{a(1-a)/n}$, and
# CORE's follows from those of its tasks. *Gold bpb* is what the right answers cost, in bits, over their bytes. It needs
# no rival answers and has no threshold, so it falls from the first steps of a training on.


# %% Evaluate a task
class Answer(NamedTuple):
    """How a model answers a question."""

    right: bool
    losses: list  # mean nats of a token, for each answer
    bits: float  # of the right answer
    bytes: int
    cropped: bool


def answer(item, scores, n_bytes, greedy):
    """Returns the Answer of an Item from the scores of its answers; n_bytes: UTF-8 bytes of each token id.

    `greedy`: all tokens must be the likeliest ones, as in language modelling."""
    nats = [losses.astype(np.float64) for losses, _ in scores]
    means, gold = [float(x.mean()) for x in nats], item.sequences[item.gold][item.starts[item.gold] :]
    right = bool(scores[0][1].all()) if greedy else int(np.argmin(means)) == item.gold
    return Answer(right, means, float(nats[item.gold].sum() / math.log(2)), int(n_bytes[gold].sum()), item.cropped)


def evaluate_task(scorer, task, encode, n_bytes, limit=None, progress=lambda n: None):
    """Returns ({'accuracy', 'centered', 'stderr', 'gold_bpb', 'n', …}, [Answer]) of the first `limit` questions."""
    started, answers, count = time.perf_counter(), [], min(limit or len(task.questions), len(task.questions))
    for first in range(0, count, 256):
        items = [to_item(task, i, encode, scorer.longest) for i in range(first, min(first + 256, count))]
        scores = score_items(scorer, items)
        for i, item in enumerate(items):
            mine = [scores[i, j] for j in range(len(item.sequences))]
            answers.append(answer(item, mine, n_bytes, task.kind == "language_modeling"))
        progress(len(items))
    accuracy = sum(x.right for x in answers) / count
    n_bytes = sum(x.bytes for x in answers)
    return {
        "accuracy": accuracy, "centered": (accuracy - task.baseline) / (1 - task.baseline),
        "stderr": math.sqrt(accuracy * (1 - accuracy) / count),
        "gold_bpb": sum(x.bits for x in answers) / n_bytes if n_bytes else None, "n": count,
        "cropped": sum(x.cropped for x in answers), "baseline": task.baseline,
        "seconds": round(time.perf_counter() - started, 1),
    }, answers  # fmt: skip


def core_score(results):
    """Returns (CORE, its standard error) of the results of all its tasks."""
    errors = [x["stderr"] / (1 - x["baseline"]) for x in results]
    return sum(x["centered"] for x in results) / len(results), math.hypot(*errors) / len(results)


# %% Try it: four-sided dice tags=["run"]
if IN_NOTEBOOK:
    dice = random.Random(0)
    rolls = [sum(dice.random() < 0.25 for _ in range(500)) / 500 for _ in range(22)]
    guesses = [{"centered": (a - 0.25) / 0.75, "stderr": math.sqrt(a * (1 - a) / 500), "baseline": 0.25} for a in rolls]
    print("22 tasks of 500 questions, answered by dice: CORE {:.4f} ± {:.4f}".format(*core_score(guesses)))

# %% [markdown]
# # Part II: machinery
#
# The notebook that made a checkpoint becomes a module: its model, its tokenizer, its logs. Questions come from a
# folder, from the published bundle (one archive, kept in `~/.cache/tpuchat`), or from the Hub, task by task.


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


# %% The run cellView="form"
# @title The run
Run = collections.namedtuple("Run", "folder nb config params meta tokenizer")


def first_line(error):
    """Returns the first line of an exception's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def suggest(name, known):
    """Returns ', did you mean X?', or ''."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f", did you mean {close[0]!r}?" if close else ""


def fetch_run(tools, name):
    """Returns runs/NAME with the newest checkpoint of a Hub repo, 'owner/name' or 'owner/name/run': a backup by 02."""
    owner, repo, *runs = name.split("/")
    repo = f"{owner}/{repo}"
    files = tools.read_hub(f"list {repo}", lambda api: api.list_repo_files(repo, repo_type="model"))
    there = sorted(file.split("/")[1] for file in files if re.fullmatch(r"checkpoints/[^/]+/meta\.json", file))
    found = [run for run in there if run in runs or not runs]
    if len(found) != 1:
        raise InputError(f"{repo} holds the runs {', '.join(there) or '(none)'}; name one: {repo}/RUN")
    folder = Path("runs", repo.replace("/", "-"), found[0])
    if tools.list_checkpoints(folder):
        print(f"run     {folder} is there from an earlier download; delete it to fetch it anew")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tools.restore_backup(tools.Config(backup="hub", hf_repo_id=repo, run_dir=str(folder)), folder)
    return folder


def find_checkpoint(name):
    """Returns (run folder, path, meta) of the newest checkpoint of a run folder, a checkpoint, or a Hub repo."""
    tools, folder = load_notebook("02_train.py"), Path(name).expanduser()
    try:
        if (folder / "meta.json").is_file():
            folder = folder.absolute()
            return folder.parents[1 if folder.parent.name == "checkpoints" else 0], folder, tools.read_meta(folder)
        hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*){1,2}", name) and not name.startswith("runs/")
        if hub and not folder.parent.is_dir():
            folder = fetch_run(tools, name)
    except (ValueError, OSError) as error:
        where = "cannot be loaded" if folder.exists() else "is no folder here, and cannot be had from the Hub"
        raise InputError(f"run={name!r}: {where} ({error})") from error
    if not (newest := tools.newest_checkpoint(folder)):
        raise InputError(f"run={name!r}: holds no checkpoint; name a run folder, or owner/name of the Hub")
    return folder, *newest


def find_tokenizer(nb, config, path, meta):
    """Returns the tokenizer of a checkpoint: the one stored in it, else that of its data. Raises InputError if there
    is none, or if it is not the one that the model was trained with."""
    try:
        if (path / "tokenizer.json").exists():
            tokenizer = nb.load_tokenizer(path)
        else:
            tokenizer = nb.find_tokenizer(config, nb.list_shards(config)[0][0]())
    except ValueError as error:
        hint = "copy tokenizer.json and tokenizer.tiktoken into it"
        what = str(error).rpartition(";")[0] or error  # its hint is to delete the folder
        raise InputError(f"checkpoint {path}: has no tokenizer, or a damaged one ({what}); {hint}") from error
    theirs = meta.get("data", {}).get("tokenizer")
    mine = nb.tokenizer_digest(tokenizer)
    if tokenizer.n_vocab > config.vocab_size or theirs not in (None, mine):
        rule = f"it has {tokenizer.n_vocab} tokens and hash {mine}, the model {config.vocab_size} and {theirs}"
        raise InputError(f"checkpoint {path}: the tokenizer has another vocabulary ({rule}); give it the right one")
    return tokenizer


def load_run(name):
    """Returns the Run of a run folder, a checkpoint in it, or a Hub repo, on one device. Raises InputError."""
    folder, path, meta = find_checkpoint(str(name))
    notebook = meta.get("notebook", "02_train.py")  # older checkpoints name none
    if not re.fullmatch(r"\w[\w-]*\.py", notebook):  # its code will run: a name beside this one, no path and no address
        raise InputError(f"checkpoint {path}: notebook={notebook!r} must be a file name, such as 02_train.py")
    nb = load_notebook(notebook)
    here = {"mesh": (1, 1), "device_batch_size": 1, "total_batch_size": -1, "attn_impl": "einsum"}
    config = nb.Config().replace(**meta["config"] | here)
    tokenizer = find_tokenizer(nb, config, path, meta)
    state, _ = nb.load_checkpoint(path, config)
    size, trained = nb.count_params(config)["total"] / 1e6, meta["step"] * meta.get("tokens_per_step", 0)
    print(f"model   {path}: {size:,.1f}M parameters of {config.notebook}, {trained:,} tokens trained", flush=True)
    return Run(folder, nb, config, state.params, meta, tokenizer)


# %% The bundle cellView="form"
# @title The bundle
BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
CORE = (
    "hellaswag_zeroshot jeopardy bigbench_qa_wikidata arc_easy arc_challenge copa commonsense_qa piqa openbook_qa "
    "lambada_openai hellaswag winograd winogrande bigbench_dyck_languages agi_eval_lsat_ar bigbench_cs_algorithms "
    "bigbench_operators bigbench_repeat_copy_logic squad coqa boolq bigbench_language_identification"
).split()


def bundle_cache():
    """Returns the folder in which the published bundle is kept."""
    return Path.home() / ".cache" / "tpuchat" / "eval_bundle"


def download_bundle():
    """Returns the folder of the published bundle, downloaded and unpacked once. Raises InputError."""
    folder, url = bundle_cache(), BUNDLE_URL
    if folder.exists():
        return folder
    part = folder.with_name(f"eval_bundle-{os.getpid()}")
    try:
        part.mkdir(parents=True, exist_ok=True)
        print(f"data    downloading {url}", flush=True)
        with urllib.request.urlopen(url, timeout=60) as answer, open(part / "zip", "wb") as file:
            shutil.copyfileobj(answer, file)
        with zipfile.ZipFile(part / "zip") as archive:
            archive.extractall(part / "all")
        cores = [*(part / "all").rglob("core.yaml")]
        if not cores:
            raise zipfile.BadZipFile("there is no core.yaml in it")
        cores[0].parent.rename(folder)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"bundle {url}: what arrived is damaged ({error}); start again, or give --bundle") from error
    except OSError as error:
        hint = "check the network, or give --bundle FOLDER"
        raise InputError(f"bundle {url}: cannot be had, and none is cached ({error}); {hint}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def read_bundle(folder):
    """Returns {label: Task whose questions are a path} of a folder in the bundle's layout. Raises InputError."""
    import yaml

    folder, tasks = Path(folder).expanduser(), {}
    reading = folder / "eval_meta_data.csv"
    try:
        with open(reading, encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        reading = folder / "core.yaml"
        for entry in yaml.safe_load(reading.read_text(encoding="utf-8"))["icl_tasks"]:
            label, kind, shots = str(entry["label"]), entry["icl_task_type"], entry["num_fewshot"][0]
            path, delimiter = folder / "eval_data" / entry["dataset_uri"], entry.get("continuation_delimiter") or " "
            if kind not in FIELDS or type(shots) is not int or shots < 0 or not path.is_file():
                raise ValueError(f"{label}: kind {kind!r}, {shots!r} examples, questions in {path}")
            if label not in baselines or not 0 <= baselines[label] < 1:
                raise ValueError(f"{label}: eval_meta_data.csv has no random baseline from 0 to below 100 for it")
            tasks[label] = Task(label, kind, shots, str(delimiter), baselines[label], path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        said = repr(error) if isinstance(error, LookupError) else " ".join(str(error).split())
        raise InputError(f"bundle: {reading} is damaged or not there ({said}); get the bundle again") from error
    return tasks


def check_question(kind, question):
    """Raises ValueError unless a dict is a question of its kind."""
    wrong = [name for name, type_ in FIELDS[kind].items() if not isinstance(question.get(name), type_)]
    options = question.get("choices", question.get("context_options", [""] * 2))
    if wrong or not all(isinstance(x, str) for x in options) or question.get("gold", 0) not in range(len(options)):
        raise ValueError(f"is no {kind} question: wrong {', '.join(wrong) or 'choices or gold'}")


def read_questions(task):
    """Returns a task of read_bundle with its questions. Raises InputError with the line that is wrong."""
    questions, read = [], 0
    try:
        for line in task.questions.read_text(encoding="utf-8").split("\n"):
            read += 1
            if line.strip():
                questions.append(json.loads(line))
                check_question(task.kind, questions[-1])
    except (OSError, ValueError, AttributeError) as error:
        where = f"{task.questions}, line {read}"
        raise InputError(f"task={task.label!r}: {where}: {first_line(error)}; get the bundle again") from error
    return task._replace(questions=questions)


# %% Tasks of the Hub cellView="form"
# @title Tasks of the Hub
def hellaswag(row):
    """Returns the question of a row, without the marks that WikiHow has left in texts."""

    def clean(text):
        return re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).replace("  ", " ").strip()

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {"query": clean(context), "choices": [*map(clean, row["endings"])], "gold": int(row["label"])}


def with_letters(row, query):
    """Returns the question of a row whose answers have letters or numbers."""
    gold = row["choices"]["label"].index(row["answerKey"].strip())
    return {"query": query, "choices": list(row["choices"]["text"]), "gold": gold}


def copa(row):
    link = "because" if row["question"] == "cause" else "therefore"
    choices = [text[:1].lower() + text[1:] for text in (row["choice1"], row["choice2"])]
    return {"query": f"{row['premise'].rstrip('. ')} {link}", "choices": choices, "gold": row["label"]}


def winogrande(row):
    before, after = row["sentence"].split("_", 1)
    options = [before + row["option1"], before + row["option2"]]
    return {"context_options": options, "continuation": after.strip(), "gold": int(row["answer"]) - 1}


def lambada(row):
    context, _, word = row["text"].rpartition(" ")
    return {"context": context, "continuation": word}


def sciq(row):
    choices, gold = [row[f"distractor{i}"] for i in (1, 2, 3)], len(row["question"]) % 4  # not always the last
    choices.insert(gold, row["correct_answer"])
    return {"query": f"{row['support'].strip()}\nQuestion: {row['question']}".strip(), "choices": choices, "gold": gold}


def piqa(row):
    return {"query": f"Question: {row['goal']}", "choices": [row["sol1"], row["sol2"]], "gold": int(row["label"])}


def boolq(row):
    query = f"Passage: {row['passage']}\nQuestion: {row['question']}?"
    return {"query": query, "choices": ["no", "yes"], "gold": int(row.get("answer", row.get("label")))}


def arc(row):
    return with_letters(row, f"Question: {row['question']}")


def openbook(row):
    return with_letters(row, row["question_stem"])


ANSWER = "\nAnswer: "
HUB = {  # label: data set, its part, its split, kind, examples, delimiter, baseline, row → question
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "test", "language_modeling", 0, " ", 0.0, lambada),
    "hellaswag_zeroshot": ("Rowan/hellaswag", None, "validation", "multiple_choice", 0, " ", 0.25, hellaswag),
    "hellaswag": ("Rowan/hellaswag", None, "validation", "multiple_choice", 10, " ", 0.25, hellaswag),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", "multiple_choice", 10, ANSWER, 0.25, arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", "multiple_choice", 10, ANSWER, 0.25, arc),
    "piqa": ("baber/piqa", None, "validation", "multiple_choice", 10, ANSWER, 0.5, piqa),
    "sciq": ("allenai/sciq", None, "test", "multiple_choice", 0, ANSWER, 0.25, sciq),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", "schema", 0, " ", 0.5, winogrande),
    "openbook_qa": ("allenai/openbookqa", "main", "test", "multiple_choice", 0, " ", 0.25, openbook),
    "copa": ("aps/super_glue", "copa", "validation", "multiple_choice", 0, " ", 0.5, copa),
    "commonsense_qa": ("tau/commonsense_qa", None, "validation", "multiple_choice", 10, ANSWER, 0.2, arc),
    "boolq": ("aps/super_glue", "boolq", "validation", "multiple_choice", 10, ANSWER, 0.62, boolq),
}
# Of two labels the first that is there. hellaswag with ten examples would be most of the work.
QUICK = "lambada_openai lambada", "hellaswag_zeroshot hellaswag", "arc_easy", "piqa", "sciq", "winogrande"


def hub_task(label):
    """Returns a task whose questions come from the Hub, by `datasets`, which keeps them. Raises InputError."""
    repo, part, split, kind, shots, delimiter, baseline, convert = HUB[label]
    try:
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.load_dataset(repo, part, split=split)
        return Task(label, kind, shots, delimiter, baseline, [convert(row) for row in rows])
    except Exception as error:  # of datasets, of the Hub, of an HTTP library
        hint = "check the network, or give --bundle FOLDER"
        raise InputError(f"task={label!r}: {repo} of the Hub, and no copy here: {first_line(error)}; {hint}") from error


# %% Find the tasks cellView="form"
# @title Find the tasks
def find_tasks(names, bundle=None):
    """Returns ([Task], labels that make up CORE) of 'core', 'quick', or labels with commas between. The questions come
    from the folder `bundle`; without one from the published bundle, or from the Hub. Raises InputError."""
    names, chosen = [name.strip() for name in names.split(",")], []
    folder = bundle or (bundle_cache() if bundle_cache().exists() else None)
    entries = read_bundle(folder) if folder else {}
    known = {"core", "quick", *entries} | (set() if bundle else {*HUB, *CORE})
    for name in names:
        if name not in known:
            rule = f"it must be one of {', '.join(sorted(known))}"
            raise InputError(f"task={name!r}: is not known here{suggest(name, known)}; {rule}")
    if not folder and {"core", *CORE}.difference(HUB).intersection(names):  # what only the bundle has
        entries = read_bundle(download_bundle())
    here = {*entries} if bundle else {*entries, *HUB}
    for name in names:
        quick = [next((label for label in labels.split() if label in here), labels) for labels in QUICK]
        chosen += {"core": [*entries], "quick": [x for x in quick if x in here]}.get(name, [name])
        if name == "quick" and (gone := [x for x in quick if x not in here]):
            print(f"data    {bundle} does not have {', '.join(gone)}: left out of quick")
    if not chosen:
        raise InputError(f"bundle={str(bundle)!r}: has no task of {', '.join(names)}")
    tasks = []
    for label in dict.fromkeys(chosen):
        task = read_questions(entries[label]) if label in entries else hub_task(label)
        if len(task.questions) <= task.shots:
            rule = f"has {len(task.questions)} questions; with {task.shots} examples it takes at least {task.shots + 1}"
            raise InputError(f"task={label!r}: {rule}")
        tasks.append(task._replace(questions=in_order(task.questions)))
    return tasks, [*entries]


# %% Results cellView="form"
# @title Results
def fingerprint(task):
    """Returns a hash of a task and its questions."""
    return hashlib.sha256(json.dumps(task).encode()).hexdigest()[:16]


RESULT = {"accuracy", "centered", "stderr", "gold_bpb", "n", "cropped", "baseline", "seconds", "of"}


def read_results(path, checkpoint):
    """Returns what evaluation.json holds, if it is of the same checkpoint, without damaged results."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["checkpoint"] == checkpoint:
            tasks = {label: x for label, x in found["tasks"].items() if isinstance(x, dict) and x.keys() >= RESULT}
            return found | {"tasks": tasks}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        print(f"data    {path} cannot be read ({first_line(error)}): it is written anew")
    return {"tasks": {}}


def write_results(path, checkpoint, results, core):
    """Writes `results` into evaluation.json, atomically, beside those of other tasks. Returns what it holds.

    core: the labels that make it up; without them an earlier score stays, unless one of its results has changed."""
    earlier = read_results(path, checkpoint)
    tasks, of = earlier["tasks"] | results, earlier.get("core_of") or []
    facts = {"checkpoint": checkpoint, "tasks": tasks, "core": None, "core_stderr": None, "core_of": None}
    if core and all(label in results for label in core):
        score, error = core_score([results[label] for label in core])
        facts |= {"core": score, "core_stderr": error, "core_of": core}
    elif of and all(tasks.get(label) == earlier["tasks"].get(label) for label in of):
        facts |= {name: earlier.get(name) for name in ("core", "core_stderr", "core_of")}
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as problem:
        raise InputError(f"cannot write {path}: {problem}; make room, or copy the run elsewhere") from problem
    return facts


def log_results(run, facts):
    """Writes results to TensorBoard, and to the run's wandb where there is a key. An error is printed."""
    values = {
        f"evaluate/{label}/{name}": x[name] for label, x in facts["tasks"].items() for name in ("accuracy", "gold_bpb")
    }
    values |= {"evaluate/core": facts["core"]} if facts["core"] is not None else {}
    values = {name: value for name, value in values.items() if value is not None}
    try:
        with contextlib.ExitStack() as stack:
            run.nb.tensorboard_sink(run.config, run.folder, stack)(run.meta["step"], values)
        if live := run.nb.open_wandb(run.config, run.folder, run.meta.get("wandb")):
            run.nb.wandb_sink(live)(run.meta["step"], values)
            live.finish()
    except Exception as error:  # whatever only watches stops nothing
        print(f"log     {first_line(error)}; evaluation.json has the results")


def draw(results, path):
    """Draws the centred accuracies with their errors, and the bits per byte, as bars. Returns the path."""
    from matplotlib.figure import Figure

    labels, rows = [*results], [*results.values()]
    figure = Figure(figsize=(9, 1.4 + 0.3 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    errors = [x["stderr"] / (1 - x["baseline"]) for x in rows]
    left.barh(labels, [x["centered"] for x in rows], xerr=errors, color="tab:blue", ecolor="0.4", capsize=3)
    left.axvline(0, color="0.4", linewidth=1)
    left.set(xlabel="centred accuracy: 0 = a guess", title=path.parent.name)
    right.barh(labels, [x["gold_bpb"] or 0 for x in rows], color="tab:orange")
    right.set(xlabel="bits per byte of the right answer")
    left.invert_yaxis()
    figure.savefig(path, dpi=110)
    return path


# %% Report cellView="form"
# @title Report
PUBLISHED = {"GPT-2, 1.5B": 0.2565, "nanochat d16, the reference's shape": 0.155, "one v6e, 60 hours": 0.1217}


def show_result(label, x):
    """Prints a line of the table."""
    bpb = f"{x['gold_bpb']:9.3f}" if x["gold_bpb"] is not None else f"{'–':>9}"
    cropped = f"  {x['cropped']} cropped" if x["cropped"] else ""
    line = f"{label:<33}{x['accuracy']:9.4f}{x['centered']:9.4f}{x['stderr']:8.4f}{bpb}{x['n']:8,}{x['seconds']:9.1f}"
    print(line + cropped, flush=True)


def show_core(facts):
    """Prints CORE beside the published figures; of a bundle of other tasks, their mean."""
    if facts["core"] is None:
        return
    tasks = {*facts["core_of"]}
    name = "CORE" if tasks == {*CORE} else f"the mean of {len(tasks)} tasks, which are not those of CORE:"
    published = ", ".join(f"{who} {score}" for who, score in PUBLISHED.items())
    print(f"{name} {facts['core']:.4f} ± {facts['core_stderr']:.4f}; published CORE: {published}")


def show_question(task, index, given):
    """Prints a question without its examples, the loss of each answer, and which one is right and which was chosen."""
    question, verdict = task.questions[index], "right" if given.right else "wrong"
    print(f"\n{task.label}, question {index}, {verdict}. By mean nats of a token; * the right answer, > the model's")
    if task.kind == "language_modeling":
        print(f"  {question['context'].strip()[-600:]!r}\n *{given.losses[0]:8.3f} {question['continuation']!r}")
        return
    print(f"  {question['query' if task.kind == 'multiple_choice' else 'continuation'].strip()[-600:]!r}")
    for i, text in enumerate(question["choices" if task.kind == "multiple_choice" else "context_options"]):
        marks = "*" * (i == question["gold"]) + ">" * (i == int(np.argmin(given.losses)))
        print(f"{marks:>2}{given.losses[i]:8.3f} {text!r}")


def show_questions(task, answers):
    """Prints one question that was answered right and one that was answered wrong."""
    for right in (True, False):
        if (index := next((i for i, x in enumerate(answers) if x.right == right), None)) is not None:
            show_question(task, index, answers[index])


# %% Evaluate cellView="form"
# @title Evaluate
def encoder(tokenizer):
    """Returns text → ids, BOS first."""
    bos = tokenizer.encode_single_token("<|bos|>")
    return lambda text: [bos, *tokenizer.encode_ordinary(text)]


def evaluate_run(name, names="quick", limit=None, bundle=None):
    """Evaluates a checkpoint, prints the table, and returns what evaluation.json holds. limit: questions of a task;
    None = 500 for quick, else all. What an earlier evaluation of the checkpoint has asked is not asked again."""
    from tqdm import tqdm

    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: must be positive")
    quick = {name.strip() for name in names.split(",")} == {"quick"}
    limit = limit or (500 if quick else None)
    run = load_run(name)
    tasks, core = find_tasks(names, bundle)
    path, n_bytes = run.folder / "evaluation.json", run.nb.token_bytes(run.tokenizer)
    checkpoint = {"step": run.meta["step"], "state": run.meta["files"]["state.safetensors"][:16]}
    marks = {task.label: fingerprint(task) for task in tasks}
    counts = {task.label: min(limit or len(task.questions), len(task.questions)) for task in tasks}
    core = core if marks.keys() >= {*core} else []  # of questions that are known to be those of this command
    # Of as many questions or more they need not be asked again.
    results = {label: x for label, x in read_results(path, checkpoint)["tasks"].items() if x["of"] == marks.get(label)}
    results = {label: x for label, x in results.items() if x["n"] >= counts[label]}
    kept, facts = {*results}, write_results(path, checkpoint, results, core)
    print(f"{'task':<33}{'accuracy':>9}{'centred':>9}{'±':>8}{'gold bpb':>9}{'n':>8}{'seconds':>9}")
    left = [task for task in tasks if task.label not in kept]
    scorer = model_scorer(run.nb, run.config, run.params) if left else None
    total, shown = sum(counts[task.label] for task in left), {}
    out = sys.stdout if IN_NOTEBOOK else sys.stderr
    with tqdm(total=total, unit=" questions", file=out, disable=not (IN_NOTEBOOK or out.isatty())) as bar:
        for task in tasks:
            if task.label not in kept:
                bar.set_description(task.label)
                encode = encoder(run.tokenizer)
                result, answers = evaluate_task(scorer, task, encode, n_bytes, counts[task.label], bar.update)
                results[task.label] = result | {"of": marks[task.label]}
                facts = write_results(path, checkpoint, results, core)
                shown.setdefault(task.kind, (task, answers))
            with tqdm.external_write_mode(file=sys.stdout):
                show_result(task.label, results[task.label])
    if kept:
        print(f"of an earlier evaluation: {', '.join(sorted(kept))}")
    if cropped := sum(results[task.label]["cropped"] for task in tasks):
        print(f"{cropped:,} prompts were longer than the context, {run.config.seq_len} tokens: cropped from the left")
    show_core(facts)
    for task, answers in shown.values():
        show_questions(task, answers)
    log_results(run, facts)
    picture = draw(facts["tasks"], path.with_suffix(".png"))
    print(f"\nresults {path}; picture {picture}")
    return facts | {"picture": str(picture)}


# %% Command line cellView="form"
# @title Command line
def parse_command(argv):
    """Returns the options of the command line: run, tasks, limit, bundle. Raises InputError."""
    usage = "07_evaluate.py RUN [--tasks quick|core|LABEL,LABEL] [--limit N] [--bundle FOLDER]"
    parser = argparse.ArgumentParser(usage=usage, description="Asks a checkpoint questions.", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run folder, a checkpoint in it, or owner/name[/run] of the Hub")
    parser.add_argument("--tasks", default="quick", help="quick (default), core, or labels with commas between")
    parser.add_argument("--limit", type=int, help="questions of a task (default: 500 for quick, else all)")
    parser.add_argument("--bundle", help="a folder in the layout of the published bundle; then no network is needed")

    def refuse(message):
        raise InputError(f"{message} (--help lists the options)")

    parser.error = refuse
    return parser.parse_args(argv)


def main(argv):
    """Does what the command line asks. Returns the exit status; a wrong input is one line on stderr, and 2."""
    try:
        options = parse_command(argv)
        evaluate_run(options.run, options.tasks, options.limit, options.bundle)
        return 0
    except ValueError as error:
        if type(error).__name__ not in ("InputError", "MissingFileError", "RefusedError"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last task of the table", file=sys.stderr)
        return 130


# %% [markdown]
# # Part III: run
#
# RUN is a run folder, such as `runs/demo`, or `owner/name` of the Hub, where `backup='hub'` has put one. TASKS is
# `quick`, `core`, or labels with commas between. LIMIT is the number of questions of a task; 0 means 500 for `quick`,
# and all for other tasks. BUNDLE is a folder; leave it empty to use the published bundle and the Hub.

# %% As a script tags=["run"]
if not IN_NOTEBOOK:
    sys.stdout.reconfigure(errors="backslashreplace")  # questions have characters that a locale may lack
    raise SystemExit(main(sys.argv[1:]))

# %% Evaluate it tags=["run"]
RUN = "runs/demo"  # @param {type: "string"}
TASKS = "quick"  # @param {type: "string"}
LIMIT = 0  # @param {type: "integer"}
BUNDLE = ""  # @param {type: "string"}
facts = evaluate_run(RUN, TASKS, LIMIT or None, BUNDLE or None)

# %% Picture tags=["run"]
from IPython.display import Image, display

display(Image(facts["picture"]))
