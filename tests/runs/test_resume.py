"""A run goes on where it was: after a stop, with a damaged checkpoint, on a new machine; and refuses what is wrong."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.helpers import QUIET, TINY, contents, output_of, read_until, run_code, same_end, saved_steps, started, tiny
from tests.hub_server import HubServer


@pytest.fixture
def interrupted(finished, tmp_path):
    """The folder of a copy of the finished run as of step 9: it was never saved at its end."""
    run = tmp_path / "run"
    shutil.copytree(finished[0].run_dir, run)
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    return run


def test_an_interrupted_run_ends_as_if_it_had_not_been(nb, finished, interrupted):
    """Whatever has become of the files that were being written when the machine died: metrics come back from the
    checkpoint, to the bit."""
    config, summary = finished
    (interrupted / "metrics.jsonl").write_bytes(b"\0" * 300)
    (interrupted / "config.json").write_text("")
    again = nb.train(tiny(nb, interrupted))
    assert again["val_loss"] == summary["val_loss"] and same_end(interrupted, config.run_dir)
    assert (interrupted / "samples.txt").read_text() == Path(config.run_dir, "samples.txt").read_text()


@pytest.mark.parametrize("damaged", ["state.safetensors", "metrics.jsonl", "meta.json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(nb, finished, tmp_path, capsys, damaged):
    """One byte is another. The checkpoint before is used, and the end is that of a run that nothing happened to."""
    run = tmp_path / "run"
    shutil.copytree(finished[0].run_dir, run)
    newest = run / "checkpoints" / "step_00000012"
    meta = (newest / "meta.json").read_text().replace('"finished": true', '"finished": false')
    (newest / "meta.json").write_text(meta)  # or the next start would take a new folder
    data = (newest / damaged).read_bytes()
    (newest / damaged).write_bytes(data[:-1] + b"?")
    summary = nb.train(tiny(nb, run))
    out = capsys.readouterr().out
    assert f"skipping damaged checkpoint {newest}: " in out
    assert "resumed at step 9" in out and summary["run_dir"] == str(run)
    assert same_end(run, finished[0].run_dir)


DAMAGE = [
    '"config": []', '"data": []', '"step": 12.0', '"todo": ["rm"]', '"todo": 5', '"best": "abc"',
    '"best": {"step": 3}', '"loader": 3', '"plan": 3', '"spent": "x"', '"tokens_per_step": "256"', '"val_loss": "x"',
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_meta_is_passed_over(nb, finished, tmp_path, capsys, damage):
    """Whatever a field has become. The checkpoint before is used, and the new ones stay, however few are kept."""
    run = tmp_path / "run"
    shutil.copytree(finished[0].run_dir, run)
    path = run / "checkpoints" / "step_00000012" / "meta.json"
    meta = json.loads(path.read_text()) | {"finished": False} | json.loads("{" + damage + "}")
    path.write_text(json.dumps(meta))
    nb.train(tiny(nb, run, keep_checkpoints=1, save_interval=1))
    assert f"skipping damaged checkpoint {path.parent}" in capsys.readouterr().out
    assert nb.newest_checkpoint(run)[1]["finished"] and same_end(run, finished[0].run_dir)


# ---- folders


def test_a_finished_run_is_never_overwritten(nb, finished):
    config, _ = finished
    before = Path(config.run_dir, "metrics.jsonl").read_bytes()
    run, checkpoint, lock = nb.open_run(config)
    lock.close()
    assert (run.name, checkpoint) == ("run-2", None)
    assert Path(config.run_dir, "metrics.jsonl").read_bytes() == before


def test_an_unfinished_run_of_another_config_is_refused(nb, interrupted):
    config = tiny(nb, interrupted, learning_rate=0.5)
    with pytest.raises(nb.InputError, match=r"learning_rate 0\.\d+ → 0\.5.*resume='never'"):
        nb.train(config)
    run, _, lock = nb.open_run(config.replace(resume="never"))
    lock.close()
    assert run.name == "run-2"


def test_a_folder_that_is_not_a_run_is_left_alone(nb, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(nb.InputError, match="holds no run"):
        nb.train(tiny(nb, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(nb.InputError, match="run_dir=.*: cannot write there .*; name another folder"):
        nb.train(tiny(nb, tmp_path / "thesis.tex" / "run"))


# ---- signals


LONG = TINY | QUIET | dict(num_iterations=400, n_head=1, seq_len=32)


@pytest.fixture(scope="module")
def long_run(nb, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "run"
    nb.train(tiny(nb, folder, **LONG))
    return folder


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_start_goes_on(nb, long_run, tmp_path, number, status):
    """After the step that runs, with a checkpoint of it; the end is bit for bit that of an uninterrupted run."""
    process = started("02_train.py", cwd=tmp_path, run_dir=tmp_path / "run", **LONG)
    read_until(process, "first step")
    time.sleep(0.2)
    process.send_signal(number)
    out = output_of(process)
    assert process.returncode == status, out
    (stopped,) = saved_steps(tmp_path / "run")
    assert f"{number.name}: stopped after step {stopped};" in out and f"stopped by {number.name}" in out
    assert nb.train(tiny(nb, tmp_path / "run", **LONG))["step"] == 400
    assert same_end(tmp_path / "run", long_run, step=400)


def test_a_notebook_goes_on_after_its_stop_button(nb, tokenizer, tmp_path, monkeypatch):
    """In the same process: train comes back, the model can be evaluated and sampled, and train goes on. The handlers of
    before are back."""
    config, before = tiny(nb, tmp_path / "run", final_eval_tokens=1024), signal.getsignal(signal.SIGINT)
    train_step = nb.train_step

    def press_stop(config, state, *batch):
        if int(state.step) == 4:
            signal.raise_signal(signal.SIGINT)
        return train_step(config, state, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(nb, "train_step", press_stop)
        summary = nb.train(config)
    assert (summary["step"], summary["stopped"]) == (5, "SIGINT") and saved_steps(tmp_path / "run")[-1] == 5
    nb.show_summary(summary)
    state, _ = nb.load_checkpoint(nb.list_checkpoints(tmp_path / "run")[-1], config)
    assert nb.generate(config, state.params, tokenizer, "It is", max_new_tokens=3).startswith("It is")
    assert signal.getsignal(signal.SIGINT) == before
    assert nb.train(config)["stopped"] == ""


# ---- on a new machine


def test_a_new_machine_goes_on_from_a_folder(nb, finished, tmp_path):
    """As after a runtime was taken away: the run folder is gone, the mounted Drive is not."""
    config = tiny(nb, tmp_path / "one" / "run", backup=str(tmp_path / "drive"))
    train_step = nb.train_step

    def die(config, state, *batch):
        if int(state.step) == 7:
            raise RuntimeError("the runtime is gone")
        return train_step(config, state, *batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="gone"):
        patch.setattr(nb, "train_step", die)
        nb.train(config)
    shutil.rmtree(tmp_path / "one")
    assert saved_steps(tmp_path / "drive" / "run")[-1] == 7  # a copy that takes long leaves out the ones in between
    nb.train(config.replace(run_dir=str(tmp_path / "two" / "run")))
    assert same_end(tmp_path / "two" / "run", finished[0].run_dir)
    assert saved_steps(tmp_path / "drive" / "run")[-1] == 12


TOKEN = "hf_" + "plantedSecret123"


def test_a_new_machine_goes_on_from_the_hub(finished, tmp_path):
    """Two processes on two 'machines', with a Hub on loopback between them. The secret is nowhere: not in what is
    printed, not in what is written, not in what is uploaded."""
    settings = TINY | dict(backup="hub", hf_repo_id="me/model")
    code = f"""
sys.stderr = sys.stdout
config = nb.Config.demo().replace(**{settings!r}, run_dir=str(Path.home() / "run"))
"""
    with HubServer({}) as hub:
        one, two = (hub.environment(tmp_path / home) | {"HF_TOKEN": TOKEN} for home in ("one", "two"))
        _, printed = run_code(code + "nb.train(config)", one)
        folder = "/me/model/resolve/main/checkpoints/run/"
        files = {path.removeprefix(folder): data for path, data in hub.files.items()}
        logs, tokenizer = {"metrics.jsonl", "samples.txt"}, {"tokenizer.tiktoken", "tokenizer.json"}
        assert set(files) == {"meta.json", "state.safetensors"} | logs | tokenizer
        whole = contents(finished[0].run_dir)["checkpoints/step_00000012/state.safetensors"]
        assert files["state.safetensors"] == whole
        meta = json.loads(files["meta.json"]) | {"finished": False}  # as if there were more to do
        hub.files[folder + "meta.json"] = json.dumps(meta).encode()
        code += "run, checkpoint, _ = nb.open_run(config)\n"
        code += "answers['found'] = [checkpoint.name, nb.load_checkpoint(checkpoint, config)[1]['step']]"
        answers, printed_too = run_code(code, two)
    assert answers["found"] == ["step_00000012", 12]
    assert contents(tmp_path / "two" / "run")["checkpoints/step_00000012/state.safetensors"] == whole
    everything = [str(printed + printed_too).encode(), *hub.files.values()]
    everything += contents(tmp_path).values()
    assert len(everything) > 15 and not any(TOKEN.encode() in data for data in everything)


@pytest.mark.parametrize("meta", [{"step": "../../../evil"}, {"step": -1}, {"step": None}, {}, [], "half"])
def test_a_backup_that_is_damaged_is_as_if_it_were_not_there(nb, tmp_path, monkeypatch, meta):
    """From a repo that someone else wrote, or that was cut short: nothing is written outside of the run folder, and
    nothing is used."""
    if isinstance(meta, dict):
        meta = {"files": {"state.safetensors": {}}, "config": {}} | meta

    class Api:
        def snapshot_download(self, repo_id, allow_patterns, local_dir):
            folder = Path(local_dir, "checkpoints", "run")
            folder.mkdir(parents=True)
            (folder / "meta.json").write_text(json.dumps(meta)[: 4 if meta == "half" else None])
            (folder / "state.safetensors").write_text("x")

    monkeypatch.setattr(nb, "hub_api", Api)
    config, run = tiny(nb, tmp_path / "here" / "run", backup="hub", hf_repo_id="me/model"), tmp_path / "here" / "run"
    run.mkdir(parents=True)
    nb.restore_backup(config, run)
    assert not list(run.iterdir()) and [path.name for path in tmp_path.iterdir()] == ["here"]
