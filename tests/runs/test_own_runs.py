"""Each command of docs/data.md trains, from files that are made here, and a run on your own data resumes to the bit."""

import gzip
import json
import re
import shlex

import datasets
import pyarrow as pa
import pytest

from tests.helpers import QUIET, ROOT, TINY, documents, run_code, same_end, script, write_shard
from tests.hub_server import HubServer

TEXTS = documents(4, 400, 20, 60)
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
COMMANDS = re.findall(r"(?m)^python (\S+) (--dataset .*?)(?: +#.*)?$", (ROOT / "docs" / "data.md").read_text())


def make_files(folder):
    """All that the commands of docs/data.md name on this machine."""
    for i, text in enumerate(TEXTS):
        (folder / "notes" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (folder / "notes" / str(i % 3) / f"{i}.{'md' if i % 2 else 'txt'}").write_text(text, encoding="utf-8")
    (folder / "stories.txt").write_text("<|endoftext|>".join(TEXTS), encoding="utf-8")
    (folder / "shakespeare.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    (folder / "dump.jsonl.zst").write_bytes(pa.compress(LINES, codec="zstd", asbytes=True))
    (folder / "crawl").mkdir()
    for i in range(3):
        (folder / "crawl" / f"{i}.jsonl.gz").write_bytes(gzip.compress(LINES + b'{"text": "broken\n'))
    (folder / "list.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    table = datasets.Dataset.from_dict({"review": TEXTS, "product": ["a thing"] * len(TEXTS)})
    table.to_csv(folder / "reviews.csv", index=False)
    table.rename_column("review", "text").save_to_disk(folder / "saved")
    (folder / "corpus").mkdir()
    for i in range(3):
        write_shard(folder / "corpus" / f"{i}.parquet", TEXTS[i::3])


def hub_files(folder):
    """The same for the Hub: a configuration of two, a folder, and the parquet files of a conversion."""
    shards = {f"{i}.parquet": (folder / "corpus" / f"{i}.parquet").read_bytes() for i in range(3)}
    wikitext, other = "/datasets/Salesforce/wikitext/resolve/main/", "/datasets/owner/name/resolve/main/"
    names = ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
    card = {"configs": [{"config_name": name, "data_files": f"{name}/*"} for name in names]}
    files = {f"{wikitext}README.md": f"---\n{json.dumps(card)}\n---\n".encode()}
    files |= {f"{wikitext}{name}/{shard}": data for name in names for shard, data in shards.items()}
    return files | {f"{other}folder/{shard}": data for shard, data in shards.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("own")
    make_files(made)
    return made


def test_each_command_of_the_docs_trains(folder, tmp_path):
    """With fewer steps and a smaller model; what each run says of its data is what the files hold."""
    commands = [shlex.split(words) for notebook, words in COMMANDS if notebook == "02_train.py"]
    assert len(commands) == 13
    settings = TINY | QUIET | dict(num_iterations=2, vocab_size=4096, final_eval_tokens=512)
    code = f"""
import io, contextlib
os.chdir({str(folder)!r})
for i, words in enumerate({commands!r}):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        config = nb.parse_args(words, nb.Config.demo()).replace(**{settings!r}, run_dir=f"{tmp_path}/{{i}}")
        if "embedded" not in words:
            config = config.replace(vocab_size=300)
        answers[" ".join(words)] = [message(lambda: nb.train(config)["step"])]
    answers[" ".join(words)].append([line for line in out.getvalue().splitlines() if line.startswith("data")])
"""
    with HubServer(hub_files(folder)) as hub:
        answers, _ = run_code(code, hub.environment(tmp_path))
    for words, (said, lines) in answers.items():
        assert said == "no error, but 2", (words, said)
        chosen = next(line for line in lines if "; validation: " in line)
        count = int(re.search(r"data +(?:about )?([\d,]+) documents", chosen)[1].replace(",", ""))
        if "embedded" not in words:
            whole = len([text for text in "\n\n".join(TEXTS).split("\n\n") if text]) if "shakes" in words else 400
            parts = 2 if "crawl" in words else 2 / 3 if ".parquet" in chosen else 0.98
            assert count == pytest.approx(parts * whole, rel=0.02), (words, chosen)
        assert ("crawl" in words) == any("bad rows" in line or "Unterminated" in line for line in lines)


def test_the_tokenizer_of_the_docs(folder, tmp_path):
    """01 with the same options; 02 takes its tokenizer, and trains none."""
    (notebook, words), = [command for command in COMMANDS if command[0] == "01_tokenizer.py"]  # fmt: skip
    with HubServer({}) as hub:
        env = hub.environment(tmp_path)
        done = script(notebook, *shlex.split(words.replace("8192", "300")), cwd=folder, env=env)
        assert done.returncode == 0, done.stderr
        assert "documents, 0.1 MB of text in " in done.stdout and "300 tokens from 1 shards" in done.stdout
        options = dict(TINY | QUIET, dataset="dump.jsonl.zst", vocab_size=300, num_iterations=2)
        done = script("02_train.py", cwd=folder, env=env, **options, run_dir=tmp_path / "run")
    assert done.returncode == 0 and "training a tokenizer" not in done.stdout, done.stderr


def test_a_run_on_text_of_your_own_resumes_to_the_bit(nb, tmp_path):
    """Shuffled, divided and over several passes: stopped in the middle, it ends as the run that was not."""
    lines = [json.dumps({"text": text}) for text in TEXTS[:60]]
    lines.insert(7, "{broken")
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    base = nb.Config.demo().replace(
        **TINY | dict(dataset=str(tmp_path / "a.jsonl"), vocab_size=300, skip_bad_rows=True, shuffle=16)
    )
    nb.train(base.replace(run_dir=str(tmp_path / "whole")))
    step = nb.train_step

    def stop_at_seven(config, state, *batch):
        if int(state.step) == 7:
            raise RuntimeError("stop here")
        return step(config, state, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nb, "train_step", stop_at_seven)
        with pytest.raises(RuntimeError, match="stop here"):
            nb.train(base.replace(run_dir=str(tmp_path / "cut")))
    cut = base.replace(run_dir=str(tmp_path / "cut"))
    with pytest.raises(nb.InputError, match="unfinished run of another Config .*shuffle"):
        nb.train(cut.replace(shuffle=0))
    data = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(data + "\n")
    with pytest.raises(nb.InputError, match="unfinished run on other data .*a.jsonl"):
        nb.train(cut)
    (tmp_path / "a.jsonl").write_text(data)
    nb.train(cut)
    assert same_end(tmp_path / "cut", tmp_path / "whole")
