"""07_evaluate: prompts, tokens, packed rows and scores of three kinds of tasks; bundles, and what may be wrong."""

import csv
import http.server
import json
import math
import random
import shutil
import threading
import zipfile
from functools import partial

import jax
import numpy as np
import pytest

from tests.helpers import ROOT, one_line, shaken, small_config
from tools.notebooks import load

WORDS = "river stone cloud engine paper garden winter letter copper island".split()


@pytest.fixture(scope="module")
def ev():
    """07_evaluate as a module."""
    return load(ROOT / "07_evaluate.py")


def encode(text):
    """A token for each byte, and BOS."""
    return [256, *text.encode()]


def multiple_choice(count=40, choices=4, gold=None, seed=0):
    rng, made = random.Random(seed), []
    for i in range(count):
        answers = [f"{letter} {rng.choice(WORDS)}" for letter in "ABCDEFGH"[:choices]]
        right = rng.randrange(choices) if gold is None else gold[i % len(gold)]
        made.append({"query": f"Question {i}: {rng.choice(WORDS)}?", "choices": answers, "gold": right})
    return made


SCHEMA = [
    {"context_options": [f"The {a} hit the {b}, and the {x}" for x in (a, b)], "continuation": "broke.", "gold": i % 2}
    for i, (a, b) in enumerate(zip(WORDS, WORDS[1:]))
]
LANGUAGE = [{"context": f"{a} {b} {a} {b} {a} ", "continuation": b} for a, b in zip(WORDS, WORDS[3:])]
KINDS = {"multiple_choice": multiple_choice(), "schema": SCHEMA, "language_modeling": LANGUAGE}


def task_of(ev, kind, shots=0, questions=None, delimiter=" ", baseline=0.25):
    return ev.Task(kind, kind, shots, delimiter, baseline, questions or KINDS[kind])


# ---- prompts and tokens


def test_prompts_of_each_kind(ev):
    """By hand. With two questions and one example, the example is the other question."""
    q = [{"query": "Q one", "choices": ["a", "b"], "gold": 1}, {"query": "Q two", "choices": ["c", "d"], "gold": 0}]
    task = task_of(ev, "multiple_choice", 1, q, delimiter="\nAnswer: ")
    assert ev.prompts(task, 0) == [f"Q two\nAnswer: c\n\nQ one\nAnswer: {x}" for x in "ab"]
    q = [{"context_options": ["x is", "y is"], "continuation": f"{i}.", "gold": i} for i in (0, 1)]
    assert ev.prompts(task_of(ev, "schema", 1, q), 0) == ["y is 1.\n\nx is 0.", "y is 1.\n\ny is 0."]
    q = [{"context": f"  count {i} ", "continuation": f"{i + 1}"} for i in (0, 1)]
    assert ev.prompts(task_of(ev, "language_modeling", 1, q), 1) == ["count 0 1\n\ncount 1", "count 0 1\n\ncount 1 2"]


def test_examples_and_order_are_those_of_the_published_procedure(ev):
    """As it is published: shuffled by 1337; for each question its own generator draws from a list of all others."""
    questions = multiple_choice(60)
    shuffled = list(questions)
    random.Random(1337).shuffle(shuffled)
    assert ev.in_order(questions) == shuffled != questions
    task = task_of(ev, "multiple_choice", 10, shuffled)
    for index in (0, 1, 31, 59):
        others = [i for i in range(60) if i != index]
        assert ev.examples(task, index) == [shuffled[i] for i in random.Random(1234 + index).sample(others, 10)]


def test_what_counts_is_after_the_common_prefix_or_the_common_suffix(ev):
    q = [{"query": "Q", "choices": ["the cat", "the cow"], "gold": 0}]
    item = ev.to_item(task_of(ev, "multiple_choice", 0, q), 0, encode, 99)
    assert [bytes(s[a:]) for s, a in zip(item.sequences, item.starts)] == [b"at", b"ow"]
    q = [{"context_options": ["the cat is", "no cow is"], "continuation": "here", "gold": 1}]
    item = ev.to_item(task_of(ev, "schema", 0, q), 0, encode, 99)
    assert [bytes(s[a:]) for s, a in zip(item.sequences, item.starts)] == [b" is here"] * 2
    item = ev.to_item(task_of(ev, "language_modeling", 0, [{"context": "one ", "continuation": "two"}]), 0, encode, 99)
    assert [bytes(s[a:]) for s, a in zip(item.sequences, item.starts)] == [b" two"]


def test_a_prompt_longer_than_the_context_is_cropped_from_the_left(ev):
    q = [{"query": "0123456789", "choices": ["yes", "n"], "gold": 0}]
    item = ev.to_item(task_of(ev, "multiple_choice", 0, q), 0, encode, 8)
    assert [bytes(s) for s in item.sequences] == [b"6789 yes"[-8:], b"456789 n"[-8:]] and item.cropped
    assert [bytes(s[a:]) for s, a in zip(item.sequences, item.starts)] == [b"yes", b"n"]
    item = ev.to_item(task_of(ev, "multiple_choice", 0, q), 0, encode, 2)  # the answer itself is too long
    assert [(bytes(s), a) for s, a in zip(item.sequences, item.starts)] == [(b"es", 1), (b" n", 1)]


@pytest.mark.parametrize("choices", [["same", "same"], ["a", "a b"]])
def test_answers_that_are_alike_still_have_a_token_that_counts(ev, choices):
    q = [{"query": "Q", "choices": choices, "gold": 0}]
    item = ev.to_item(task_of(ev, "multiple_choice", 0, q), 0, encode, 99)
    assert all(1 <= start < len(sequence) for sequence, start in zip(item.sequences, item.starts))


# ---- packing and scores


@pytest.fixture(scope="module", params=["02_train.py", "04_maxtext.py", "06_recipe.py"])
def model(request):
    """(notebook, Config, params) of a small model in which every weight has a say."""
    nb = load(ROOT / request.param)
    config = small_config(nb, mesh=(1, 1), **({} if "04" in request.param else dict(seq_len=128, softcap=30.0)))
    return nb, config, shaken(nb, config)


def sums(scorer, ev, items):
    return {place: losses.sum(dtype=np.float64) for place, (losses, _) in ev.score_items(scorer, items).items()}


def items_of(ev, longest, shots=2):
    return [
        ev.to_item(task_of(ev, kind, shots), i, encode, longest)
        for kind, questions in KINDS.items()
        for i in range(min(6, len(questions)))
    ]


def test_packed_rows_score_like_whole_sequences(ev, model):
    """One by one by the notebook's own forward, in float32; cropped prompts and windows of T/2 are among them."""
    nb, config, params = model
    items = items_of(ev, config.seq_len)
    assert any(item.cropped for item in items) or config.seq_len > 128
    forward, found = jax.jit(nb.forward), ev.score_items(ev.model_scorer(nb, config, params), items)
    for (i, j), (losses, hits) in found.items():
        sequence, start = np.array(items[i].sequences[j]), items[i].starts[j]
        tokens = np.pad(sequence, (0, config.seq_len - len(sequence)))[None].astype(np.int32)
        logits = np.asarray(forward(config, params, tokens), np.float64)[0, start - 1 : len(sequence) - 1]
        targets = sequence[start:]
        expected = np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(targets)), targets]
        np.testing.assert_allclose(losses, expected, rtol=0, atol=3e-6 * np.abs(logits).max())
        assert hits.tolist() == (logits.argmax(axis=-1) == targets).tolist()


def test_scores_do_not_depend_on_batch_or_packing(ev, model):
    nb, config, params = model
    items = items_of(ev, config.seq_len)
    scorer = ev.model_scorer(nb, config, params)
    assert scorer.shared == ("06" not in nb.__name__)  # smear mixes tokens outside of attention
    expected = sums(scorer, ev, items)
    plain = scorer._replace(score=lambda rows: ev.score_rows(nb, config, params, rows, False), shared=False)
    backwards = {(len(items) - 1 - i, j): x for (i, j), x in sums(scorer, ev, items[::-1]).items()}
    for other in (sums(scorer._replace(batch_tokens=config.seq_len), ev, items), sums(plain, ev, items), backwards):
        assert other.keys() == expected.keys()
        for place, value in expected.items():
            assert other[place] == pytest.approx(value, rel=1e-6)


def test_packing_computes_a_shared_prompt_once(ev):
    task = task_of(ev, "multiple_choice", 5)
    items = [ev.to_item(task, i, encode, 512) for i in range(20)]
    alone = sum(len(sequence) for item in items for sequence in item.sequences)
    packed = sum(size for size, _, _ in ev.trees(items, 512))
    assert packed < alone / 3
    rows, _ = ev.pack(items, [256, 512])
    assert sum(x.shape[0] * x.shape[2] for x in rows.values()) < 1.5 * packed


def test_a_tree_too_large_for_a_row_is_split(ev):
    q = [{"query": "Q" * 20, "choices": [letter * 30 for letter in "abcd"], "gold": 0}]
    items = [ev.to_item(task_of(ev, "multiple_choice", 0, q), 0, encode, 64)]
    assert [len(members) for _, _, members in ev.trees(items, 64)] == [1, 1, 1, 1]
    assert [len(members) for _, _, members in ev.trees(items, 96)] == [2, 2]


def test_a_model_that_mixes_tokens_in_another_way_is_noticed(ev, model, monkeypatch, capsys):
    """Its packed rows would leak from one branch into the next."""
    nb, config, params = model
    own = nb.embed

    def smeared(config, params, tokens):
        x = own(config, params, tokens).reshape(*tokens.shape, -1)
        return (x.at[:, 1:].add(0.5 * x[:, :-1])).reshape(-1, x.shape[-1])

    monkeypatch.setattr(nb, "embed", smeared)
    assert not ev.follows_branches(nb, config, params)
    monkeypatch.setattr(nb, "attend", lambda config, q: q)
    assert not ev.follows_branches(nb, config, params)


def test_at_most_four_programs_are_compiled(ev, monkeypatch):
    nb = load(ROOT / "02_train.py")
    config = small_config(nb, mesh=(1, 1), seq_len=1280, n_head=2, n_kv_head=1, window_pattern="L", softcap=20.0)
    params, compiled = shaken(nb, config), []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    task = task_of(ev, "multiple_choice", 0, multiple_choice(20))
    long = task_of(ev, "language_modeling", 0, [{"context": "x" * n, "continuation": "y"} for n in (600, 1100, 1400)])
    jax.clear_caches()
    compiled.clear()
    scorer = ev.model_scorer(nb, config, params)
    for one in (task, long, task):
        ev.evaluate_task(scorer, one, encode, np.ones(300, int))
    count = sum(name.endswith("backend_compile_duration") for name in compiled)
    assert 2 <= count <= 4


# ---- accuracy, CORE, bits per byte


def prefers(ev, letter):
    """A Scorer to which a letter costs nothing, and every other token one nat."""
    return ev.Scorer(lambda rows: (np.where(rows[:, 1] == ord(letter), 0.0, 1.0), rows[:, 1] > 0), 4096, 8192)


def test_a_model_that_always_prefers_the_first_answer(ev):
    """30 of 40 right answers are the first; (0.75 − 0.25) / 0.75 is two thirds."""
    task = task_of(ev, "multiple_choice", 0, multiple_choice(40, gold=[0, 0, 0, 2]))
    result, answers = ev.evaluate_task(prefers(ev, "A"), task, encode, np.ones(300, int))
    assert result["accuracy"] == 0.75 and result["centered"] == pytest.approx(2 / 3) and result["n"] == 40
    assert result["stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 40))
    assert [x.right for x in answers] == [True, True, True, False] * 10


def test_the_mean_loss_decides_and_not_the_sum(ev):
    """'AZ' costs one nat, half a nat a token; 'BBAAAAAA' costs two, a quarter each."""
    q = [{"query": "Q", "choices": ["AZ", "BBAAAAAA"], "gold": 1}]
    result, (given,) = ev.evaluate_task(
        prefers(ev, "A"), task_of(ev, "multiple_choice", 0, q), encode, np.ones(300, int)
    )
    assert given.losses == [0.5, 0.25] and given.right and given.bits == pytest.approx(2 / math.log(2))
    assert result["gold_bpb"] == pytest.approx(2 / math.log(2) / 8)


def test_a_single_choice_is_right(ev):
    q = [{"query": "Q", "choices": ["A"], "gold": 0}]
    result, _ = ev.evaluate_task(prefers(ev, "B"), task_of(ev, "multiple_choice", 0, q), encode, np.ones(300, int))
    assert result["accuracy"] == 1


def test_shuffled_answers_score_chance_within_its_error(ev):
    task = task_of(ev, "multiple_choice", 0, multiple_choice(2000, seed=3))
    result, _ = ev.evaluate_task(prefers(ev, "B"), task, encode, np.ones(300, int))
    assert abs(result["centered"]) < 4 * result["stderr"] / 0.75 and result["stderr"] < 0.011


def test_language_modelling_wants_every_token(ev):
    """The likeliest token is always 'e': 'eee' is right, 'eex' is not."""
    scorer = ev.Scorer(lambda rows: (np.ones(rows[:, 1].shape), rows[:, 1] == ord("e")), 64, 512)
    q = [{"context": "x", "continuation": text} for text in ("ee", "ex", "xe", "e", "x")]
    task = task_of(ev, "language_modeling", 0, q, delimiter="", baseline=0.0)
    result, answers = ev.evaluate_task(scorer, task, encode, np.ones(300, int))
    assert [x.right for x in answers] == [True, False, False, True, False] and result["accuracy"] == 0.4


def test_gold_bits_per_byte_of_a_uniform_model_are_bits_of_a_token(ev):
    """A token a byte, and 256 tokens alike: eight bits a byte, whatever the kind."""
    scorer = ev.Scorer(lambda rows: (np.full(rows[:, 1].shape, math.log(256)), rows[:, 1] == 0), 4096, 8192)
    n_bytes = np.array([1] * 256 + [0])
    for kind in KINDS:
        result, _ = ev.evaluate_task(scorer, task_of(ev, kind), encode, n_bytes)
        assert result["gold_bpb"] == pytest.approx(8, abs=1e-6)


def test_limit_asks_the_first_questions_with_the_examples_of_all(ev):
    task, seen = task_of(ev, "multiple_choice", 10, multiple_choice(30)), []
    result, answers = ev.evaluate_task(prefers(ev, "A"), task, encode, np.ones(300, int), 5, seen.append)
    whole, _ = ev.evaluate_task(prefers(ev, "A"), task, encode, np.ones(300, int))
    assert (result["n"], whole["n"], sum(seen)) == (5, 30, 5)


def test_core_is_the_plain_mean_and_its_error_follows(ev):
    results = [{"centered": 0.5, "stderr": 0.03, "baseline": 0.25}, {"centered": 0.1, "stderr": 0.02, "baseline": 0.0}]
    score, error = ev.core_score(results)
    assert score == pytest.approx(0.3) and error == pytest.approx(math.sqrt(0.04**2 + 0.02**2) / 2)
    assert len(ev.CORE) == len({*ev.CORE}) == 22


# ---- bundles


def write_bundle(folder, tasks=KINDS, shots=2, **changes):
    """A folder in the bundle's layout with a task of each kind."""
    (folder / "eval_data").mkdir(parents=True)
    entries, rows = [], [("Eval Task", "Task Category", "Random baseline")]
    for kind, questions in tasks.items():
        text = "".join(json.dumps(question) + "\n" for question in questions)
        (folder / "eval_data" / f"{kind}.jsonl").write_text(text)
        entry = {"label": kind, "dataset_uri": f"{kind}.jsonl", "num_fewshot": [shots], "icl_task_type": kind}
        entries.append(entry | changes)
        rows.append((kind, "made up", 0 if kind == "language_modeling" else 50))
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))
    with open(folder / "eval_meta_data.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of its own: nothing is cached."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def test_a_bundle_in_a_folder(ev, home):
    tasks, core = ev.find_tasks("core", write_bundle(home / "b", continuation_delimiter="\nA: "))
    assert core == [task.label for task in tasks] == [*KINDS]
    assert [(task.kind, task.shots, task.delimiter, task.baseline) for task in tasks] == [
        ("multiple_choice", 2, "\nA: ", 0.5), ("schema", 2, "\nA: ", 0.5), ("language_modeling", 2, "\nA: ", 0.0)
    ]  # fmt: skip
    assert tasks[1].questions == ev.in_order(SCHEMA)
    (task,), _ = ev.find_tasks("schema", write_bundle(home / "c"))
    assert task.delimiter == " "


@pytest.fixture
def web(ev, home, monkeypatch):
    """A web server of a folder; BUNDLE_URL is a file of it."""
    (home / "web").mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(home / "web"))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setattr(ev, "BUNDLE_URL", f"http://127.0.0.1:{server.server_port}/eval_bundle.zip")
    monkeypatch.setenv("NO_PROXY", "*")
    yield home / "web"
    server.shutdown()
    server.server_close()


def test_the_published_bundle_is_fetched_once(ev, web, home, capsys):
    """The archive has one folder, eval_bundle, in it."""
    write_bundle(home / "made" / "eval_bundle")
    shutil.make_archive(str(web / "eval_bundle"), "zip", home / "made")
    for fetched in (True, False):
        tasks, core = ev.find_tasks("core")
        assert [task.label for task in tasks] == [*KINDS] and ("downloading" in capsys.readouterr().out) == fetched
        shutil.rmtree(web, ignore_errors=True)
    assert [path.name for path in (home / "home/.cache/tpuchat").iterdir()] == ["eval_bundle"]


def refusal(ev, *args):
    with pytest.raises(ev.InputError) as caught:
        ev.find_tasks(*args)
    return str(caught.value)


def test_a_bundle_that_cannot_be_had(ev, web, home):
    assert one_line(refusal(ev, "core"), "404", "--bundle", "none is cached")
    (web / "eval_bundle.zip").write_bytes(b"PK but no archive")
    assert one_line(refusal(ev, "core"), "damaged")
    shutil.make_archive(str(web / "eval_bundle"), "zip", write_bundle(home / "made"))
    whole = (web / "eval_bundle.zip").read_bytes()
    for damaged in (whole[:-30], whole[:200] + b"?" * 200 + whole[400:]):
        (web / "eval_bundle.zip").write_bytes(damaged)
        assert one_line(refusal(ev, "core"), "damaged")
    with zipfile.ZipFile(web / "eval_bundle.zip", "w") as archive:
        archive.writestr("readme", "nothing")
    assert one_line(refusal(ev, "core"), "core.yaml")
    assert not [*(home / "home/.cache/tpuchat").iterdir()]


def test_tasks_that_are_not_known(ev, home):
    folder = write_bundle(home / "b")
    assert one_line(refusal(ev, "shema", folder), "'shema'", "did you mean 'schema'?")
    assert one_line(refusal(ev, "helaswag"), "'helaswag'", "did you mean 'hellaswag'?")
    assert one_line(refusal(ev, "jeopardi"), "did you mean 'jeopardy'?")
    assert one_line(refusal(ev, "quick", folder), "has no task of quick")


@pytest.mark.parametrize(
    "file, text, says",
    [
        ("core.yaml", "icl_tasks: [", "core.yaml"),
        ("core.yaml", "tasks: []", "icl_tasks"),
        ("core.yaml", None, "core.yaml"),
        ("eval_meta_data.csv", "Eval Task,Other\nschema,1\n", "Random baseline"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nmultiple_choice,100\n", "baseline"),
        ("eval_data/schema.jsonl", None, "schema.jsonl"),
        ("eval_data/schema.jsonl", '{"query": "?"}\n', "line 1: is no schema question"),
        ("eval_data/schema.jsonl", json.dumps(SCHEMA[0]) + "\n{\n", "line 2"),
        ("eval_data/schema.jsonl", json.dumps(SCHEMA[0] | {"gold": 2}), "choices or gold"),
        ("eval_data/schema.jsonl", "[1]", "schema.jsonl"),
    ],
)
def test_a_damaged_bundle(ev, home, file, text, says):
    folder = write_bundle(home / "b")
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    assert one_line(refusal(ev, "core", folder), says, "get", "again")


def test_fewer_questions_than_examples(ev, home):
    folder = write_bundle(home / "b", {"schema": SCHEMA[:3]}, shots=3)
    assert one_line(refusal(ev, "core", folder), "'schema'", "3 questions", "at least 4")


def test_rows_of_the_hub_become_questions(ev):
    """Rows as the data sets have them."""
    row = {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "endings": ["[step] is [title] up", "b"]}
    assert ev.hellaswag(row | {"label": "1"}) == {
        "query": "Roof: A man sits. He",
        "choices": ["is. up", "b"],
        "gold": 1,
    }
    row = {"question": "Who?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    assert ev.arc(row) == {"query": "Question: Who?", "choices": ["x", "y"], "gold": 1}
    row = {"sentence": "Sarah beat Maria so _ won.", "option1": "Sarah", "option2": "Maria", "answer": "1"}
    expected = {"context_options": ["Sarah beat Maria so Sarah", "Sarah beat Maria so Maria"], "gold": 0}
    assert ev.winogrande(row) == expected | {"continuation": "won."}
    assert ev.lambada({"text": "I see the sign"}) == {"context": "I see the", "continuation": "sign"}
    row = {"premise": "The man ran.", "choice1": "He fell.", "choice2": "She hid.", "question": "effect", "label": 0}
    assert ev.copa(row) == {"query": "The man ran therefore", "choices": ["he fell.", "she hid."], "gold": 0}
    row = {
        "support": "",
        "question": "Who?",
        "correct_answer": "d",
        **{f"distractor{i}": "abc"[i - 1] for i in (1, 2, 3)},
    }
    assert ev.sciq(row) == {"query": "Question: Who?", "choices": [*"dabc"], "gold": 0}
    assert ev.piqa({"goal": "Go?", "sol1": "x", "sol2": "y", "label": 1})["gold"] == 1
    assert ev.boolq({"passage": "P", "question": "is it", "answer": True})["query"] == "Passage: P\nQuestion: is it?"


# ---- lm-eval


def test_lm_eval_agrees(ev, nb, tokenizer):
    """lm-eval's own tasks ask a model that is wrapped for it, a sequence at a time: log-likelihoods within 1e-3 in
    float32, the same choices, and the same greedy matches. The answers of a question differ from their first token on,
    so that both count the same tokens."""
    pytest.importorskip("lm_eval", reason="of tests/requirements.txt")
    from tests.lm_eval_oracle import ask

    config = small_config(nb, mesh=(1, 1), seq_len=128, vocab_size=4096, softcap=30.0)
    params = shaken(nb, config, head=0.5)
    scorer = ev.model_scorer(nb, config, params)
    text = ev.encoder(tokenizer)
    for kind in KINDS:
        task = task_of(ev, kind)
        theirs = ask(nb, config, params, tokenizer, task)
        for i in range(len(task.questions)):
            item = ev.to_item(task, i, text, config.seq_len)
            ours = ev.score_items(scorer, [item])
            lengths = [len(s) - a for s, a in zip(item.sequences, item.starts)]
            assert len(theirs[i]) == len(ours) and lengths == [count for _, _, count in theirs[i]]
            for j, (likelihood, greedy, _) in enumerate(theirs[i]):
                losses, hits = ours[0, j]
                assert -losses.sum() == pytest.approx(likelihood, abs=1e-3) and hits.all() == greedy
            mean = [likelihood / count for likelihood, _, count in theirs[i]]
            given = ev.answer(item, [ours[0, j] for j in range(len(lengths))], np.ones(4096, int), greedy=False)
            assert np.argmin(given.losses) == np.argmax(mean)
