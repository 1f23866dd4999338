"""07_evaluate on whole runs: a run folder, a checkpoint of 04, a repo of the Hub; going on; what a run may lack."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from unittest.mock import ANY

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import EMBEDDED, ROOT, contents, one_line, script, small_config
from tests.hub_server import HubServer
from tests.unit.test_evaluate_tasks import KINDS, write_bundle
from tools.notebooks import load


@pytest.fixture(scope="module")
def ev():
    return load(ROOT / "07_evaluate.py")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run of 02."""
    return Path(shutil.copytree(finished[0].run_dir, tmp_path / "run"))


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


def results(run):
    return json.loads((run / "evaluation.json").read_text())


def edit_meta(run, **changes):
    """Writes other facts into meta.json of the newest checkpoint; None removes one."""
    path = run / "checkpoints" / "step_00000012" / "meta.json"
    meta = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in meta.items() if value is not None}))


def drop_tokenizer(run):
    """A run as it was before checkpoints held their tokenizer and their notebook's name."""
    for path in run.rglob("tokenizer.*"):
        path.unlink()
    files = json.loads((run / "checkpoints" / "step_00000012" / "meta.json").read_text())["files"]
    edit_meta(run, files={name: x for name, x in files.items() if "tokenizer" not in name}, notebook=None)


def test_a_run_as_a_script(run, tmp_path):
    """The command of the README: a table, CORE of the bundle, questions in full, a picture, TensorBoard's events."""
    before, bundle = {path.name for path in run.iterdir()}, write_bundle(tmp_path / "long", shots=6)
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [str(run), "--tasks", "core", "--bundle", str(bundle), "--limit", "6"]
    done = script("07_evaluate.py", *words, cwd=tmp_path, env=env)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert all(f"\n{kind}" in done.stdout for kind in KINDS) and "the mean of 3 tasks, which are not" in done.stdout
    for words in ("GPT-2", "language_modeling, question", "By mean nats", "tokens: cropped from the left"):
        assert words in done.stdout
    found = results(run)
    assert [*found["tasks"]] == [*KINDS]
    for x in found["tasks"].values():
        assert {"accuracy", "centered", "stderr", "gold_bpb", "n"} <= x.keys() and x["n"] == 6 and x["gold_bpb"] > 0
    assert found["core"] == pytest.approx(sum(x["centered"] for x in found["tasks"].values()) / 3)
    new = {path.name for path in run.iterdir()} - before
    events = {name for name in new if name.startswith("events.")}
    assert events and new - events == {"evaluation.json", "evaluation.png"}


def test_scalars_of_tensorboard(ev, run, bundle):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = {*run.glob("events.*")}
    facts = ev.evaluate_run(run, "schema", 5, bundle)
    (path,) = {*run.glob("events.*")} - before
    reader = EventAccumulator(str(path)).Reload()
    (event,) = reader.Tensors("evaluate/schema/gold_bpb")
    assert event.step == 12
    assert event.tensor_proto.float_val[0] == pytest.approx(facts["tasks"]["schema"]["gold_bpb"], rel=1e-6)


def test_an_evaluation_goes_on(ev, run, bundle, monkeypatch, capsys):
    """After an interrupt the tasks that are done are not asked again; with more questions, with others, and for another
    checkpoint they are."""
    own, asked = ev.evaluate_task, []

    def evaluate_task(scorer, task, *args):
        asked.append(task.label)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return own(scorer, task, *args)

    monkeypatch.setattr(ev, "evaluate_task", evaluate_task)
    argv = [str(run), "--tasks", "core", "--bundle", str(bundle), "--limit", "5"]
    assert ev.main(argv) == 130 and "goes on" in capsys.readouterr().err
    assert [*results(run)["tasks"]] == ["multiple_choice"] and results(run)["core"] is None
    first = results(run)["tasks"]["multiple_choice"]
    assert ev.main(argv) == 0 and asked == ["multiple_choice", "schema", "schema", "language_modeling"]
    assert results(run)["tasks"]["multiple_choice"] == first and results(run)["core"] is not None
    assert ev.main(argv) == 0 and len(asked) == 4
    (bundle / "eval_data" / "schema.jsonl").write_text("".join(json.dumps(q) + "\n" for q in KINDS["schema"][:6]))
    assert ev.main(argv) == 0 and asked[4:] == ["schema"]
    assert ev.main([*argv[:-1], "4"]) == 0 and len(asked) == 5  # five say more than four
    assert ev.main([*argv[:-1], "6"]) == 0 and asked[5:] == [*KINDS]
    edit_meta(run, step=3)
    (run / "checkpoints").rename(run / "rest")
    shutil.copytree(run / "rest" / "step_00000012", run / "checkpoints" / "step_00000003")
    assert ev.main([*argv[:-1], "4"]) == 0 and len(asked) == 11


def test_a_checkpoint_of_04_names_its_notebook(ev, mt, tmp_path, bundle):
    config, run = small_config(mt, mesh=(1, 1), vocab_size=4096), tmp_path / "run"
    run.mkdir()
    mt.save_tokenizer(mt.load_tokenizer(EMBEDDED / "tokenizer"), run)
    path = mt.save_checkpoint(run, config, mt.init_train_state(config), data={})
    assert json.loads((path / "meta.json").read_text())["notebook"] == "04_maxtext.py"
    facts = ev.evaluate_run(path, "schema", 5, bundle)
    assert facts["tasks"]["schema"]["n"] == 5 and results(run).items() <= facts.items()


def test_a_run_of_before_its_checkpoints_held_a_tokenizer(ev, run, bundle, capsys):
    facts = ev.evaluate_run(run, "schema", 5, bundle)
    drop_tokenizer(run)
    (run / "evaluation.json").unlink()
    again = ev.evaluate_run(run, "schema", 5, bundle)
    assert "of an earlier" not in capsys.readouterr().out
    assert {**again["tasks"]["schema"], "seconds": 0} == {**facts["tasks"]["schema"], "seconds": 0}


def test_a_repo_of_the_hub(run, bundle, tmp_path):
    """What backup='hub' has put there: the newest checkpoint of a run, under its name."""
    files = contents(run / "checkpoints" / "step_00000012")
    files = {f"/me/model/resolve/main/checkpoints/big/{name}": data for name, data in files.items()}
    files["/me/empty/resolve/main/tokenizer/tokenizer.json"] = b"{}"
    words = ["--tasks", "schema", "--bundle", str(bundle), "--limit", "5"]
    with HubServer(files) as hub:
        env = hub.environment(tmp_path / "home")
        for name in ("me/model", "me/model/big"):
            done = script("07_evaluate.py", name, *words, cwd=tmp_path, env=env)
            assert done.returncode == 0, done.stderr
        assert "earlier download" in done.stdout
        assert results(tmp_path / "runs" / "me-model" / "big")["tasks"]["schema"]["n"] == 5
        done = script("07_evaluate.py", "me/empty", *words, cwd=tmp_path, env=env)
        assert done.returncode == 2 and one_line(done.stderr.strip(), "me/empty", "(none)")
        done = script("07_evaluate.py", "me/model/small", *words, cwd=tmp_path, env=env)
        assert done.returncode == 2 and one_line(done.stderr.strip(), "me/model", "runs big")
        done = script("07_evaluate.py", "me/nothing", *words, cwd=tmp_path, env=env)
        assert done.returncode == 2 and one_line(done.stderr.strip(), "me/nothing", "is no folder here")


def test_questions_of_the_hub(run, tmp_path):
    """By `datasets`, from a Hub on this machine; a second time without it, from the cache; a third without both."""
    rows = [{"goal": f"Lift {i}?", "sol1": "use a crane", "sol2": "use a spoon", "label": i % 2} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = (tmp_path / "rows.parquet").read_bytes()
    words = [str(run), "--tasks", "piqa", "--limit", "5"]
    with HubServer({"/datasets/baber/piqa/resolve/main/data/validation-00000-of-00001.parquet": data}) as hub:
        env = hub.environment(tmp_path / "home")
        done = script("07_evaluate.py", *words, cwd=tmp_path, env=env)
        assert done.returncode == 0 and results(run)["tasks"]["piqa"]["n"] == 5, done.stderr
    (run / "evaluation.json").unlink()
    offline = env | {"HF_HUB_OFFLINE": "1"}
    done = script("07_evaluate.py", *words, cwd=tmp_path, env=offline)
    assert done.returncode == 0 and results(run)["tasks"]["piqa"]["n"] == 5, done.stderr
    done = script("07_evaluate.py", *words, cwd=tmp_path, env=offline | {"HF_HOME": str(tmp_path / "empty")})
    assert done.returncode == 2 and one_line(done.stderr.strip().splitlines()[-1], "'piqa'", "--bundle", "no copy here")


def refusal(ev, capsys, *argv):
    """The line on stderr of a command that is refused."""
    assert ev.main([*map(str, argv)]) == 2
    return capsys.readouterr().err.strip()


def test_what_is_wrong_with_a_run(ev, run, bundle, tmp_path, capsys, monkeypatch):
    words = ["--tasks", "schema", "--bundle", bundle]
    assert one_line(refusal(ev, capsys, tmp_path / "none", *words), "none'", "no checkpoint")
    assert one_line(refusal(ev, capsys, bundle, *words), "no checkpoint")
    monkeypatch.chdir(tmp_path)  # runs/… is here, so a name in it is no repo of the Hub: nothing is asked
    (tmp_path / "runs").mkdir()
    assert one_line(refusal(ev, capsys, "runs/demoo", *words), "'runs/demoo'", "no checkpoint")
    assert one_line(refusal(ev, capsys, run, *words, "--limit", "0"), "limit=0")
    assert one_line(refusal(ev, capsys, run, "--task", "x"), "--help lists")
    assert one_line(refusal(ev, capsys, run, "--tasks", "shema", "--bundle", bundle), "did you mean 'schema'?")
    for name in ("../other/02_train.py", "/tmp/x.py", "https://x.org/y.py", "x"):  # code of a stranger
        edit_meta(run, notebook=name)
        assert one_line(refusal(ev, capsys, run, *words), repr(name), "file name")
    edit_meta(run, notebook="08_nothing.py")
    assert one_line(refusal(ev, capsys, run, *words), "08_nothing.py")
    edit_meta(run, notebook="02_train.py", data={"tokenizer": "0" * 16})
    assert one_line(refusal(ev, capsys, run, *words), "another vocabulary", "0" * 16)


def test_a_checkpoint_without_a_tokenizer(ev, finished, run, bundle, capsys):
    """Neither in the checkpoint nor where its data was."""
    drop_tokenizer(run)
    config = dataclasses.asdict(finished[0]) | {"dataset": "/nowhere/at/all"}
    edit_meta(run, config=config)
    assert one_line(refusal(ev, capsys, run, "--tasks", "schema", "--bundle", bundle), "has no tokenizer", "copy")


def test_a_damaged_evaluation_is_written_anew(ev, run, bundle, capsys):
    (run / "evaluation.json").write_text('{"tasks": ')
    assert ev.evaluate_run(run, "schema", 5, bundle)["tasks"]["schema"]["n"] == 5
    assert "written anew" in capsys.readouterr().out and results(run)["tasks"]["schema"]


def test_damaged_results_are_asked_again(ev, run, bundle):
    whole = ev.evaluate_run(run, "schema", 5, bundle)["tasks"]["schema"]
    for damaged in (None, 5, {"of": whole["of"]}, {"of": "x", "n": 3, "accuracy": 0.5}):
        facts = results(run)
        facts["tasks"] = {"schema": damaged, "other": damaged}
        (run / "evaluation.json").write_text(json.dumps(facts))
        assert ev.evaluate_run(run, "schema", 5, bundle)["tasks"] == {"schema": whole | {"seconds": ANY}}


def test_core_is_of_the_questions_of_one_command(ev, run, bundle, capsys):
    """A part of it leaves the score; other questions for a part of it take it away."""
    ev.evaluate_run(run, "core", 5, bundle)
    core = results(run)["core"]
    ev.evaluate_run(run, "schema", 4, bundle)
    assert results(run)["core"] == core is not None
    other = write_bundle(bundle.parent / "other")
    (other / "eval_data" / "schema.jsonl").write_text("".join(json.dumps(q) + "\n" for q in KINDS["schema"][:6]))
    capsys.readouterr()
    ev.evaluate_run(run, "schema", 5, other)
    assert results(run)["core"] is None and "the mean of" not in capsys.readouterr().out
    ev.evaluate_run(run, " core ", 5, bundle)
    assert results(run)["core"] == core


def test_two_evaluations_at_once_keep_both_results(ev, run, bundle):
    """Each writes its own beside what the other has written meanwhile."""
    path = run / "evaluation.json"
    ev.evaluate_run(run, "schema", 5, bundle)
    one = results(run)
    result = one["tasks"]["schema"]
    ev.write_results(path, one["checkpoint"], {"mine": result}, [])
    ev.write_results(path, one["checkpoint"], {"theirs": result}, [])
    assert [*results(run)["tasks"]] == ["schema", "mine", "theirs"]


def test_quick_is_500_questions_however_it_is_written(ev, run, bundle, monkeypatch):
    asked, task = [], ev.Task("x", "schema", 0, " ", 0.5, [{}] * 600)
    monkeypatch.setattr(ev, "find_tasks", lambda *args: ([task], []))
    monkeypatch.setattr(ev, "evaluate_task", lambda *args: asked.append(args[4]) or (_ for _ in ()).throw(KeyError))
    for names in ("quick", " quick", "quick,quick", "quick,arc_easy"):
        with pytest.raises(KeyError):
            ev.evaluate_run(run, names)
    assert [n for n in asked if isinstance(n, int)] == [500, 500, 500, 600]


def test_what_only_watches_stops_nothing(ev, run, bundle, monkeypatch, capsys):
    """Neither TensorBoard nor wandb."""
    loaded = ev.load_notebook

    def broken(name):
        nb = loaded(name)
        nb.open_wandb = nb.tensorboard_sink = lambda *_: 1 / 0
        return nb

    monkeypatch.setattr(ev, "load_notebook", broken)
    assert ev.evaluate_run(run, "schema", 5, bundle)["tasks"]["schema"]["n"] == 5
    assert "division by zero" in capsys.readouterr().out
    assert jax.default_backend()
