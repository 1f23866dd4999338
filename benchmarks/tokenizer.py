"""Training speed against Hugging Face's tokenizers on the same text, and bytes per token against GPT-2's and GPT-4's.

    apt-get download linux-doc-6.1 dict-gcide && npm pack tiktoken
    python benchmarks/tokenizer.py linux-doc-6.1_*.deb dict-gcide_*.deb tiktoken-*.tgz [--rounds 3]

The text: the kernel's documentation (.rst, .txt, .yaml) and a dictionary of English, from Debian's packages, and the
training shards of the embedded corpus; documents cut to 10,000 characters, twice, so that it is well over 100 MB.
Every 20th file of the kernel's documentation is held out. Both trainers take the same pieces by the same pattern, in
turn, `rounds` times, from the same list in memory; the median and the share of tokens that both have are printed, and
the peak of the process before and after ours, which comes first. npm's `tiktoken` package brings the ranks of GPT-2 and
GPT-4, in a form of its own; they are checked against the SHA-256 that Python's tiktoken expects of the original files.
"""

import argparse
import base64
import gzip
import hashlib
import io
import json
import resource
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import tiktoken

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.notebooks import load  # noqa: E402

VOCAB = 32768
RANKS_SHA256 = {
    "r50k_base": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
}


def files_of(deb, wanted):
    """(name, bytes) of the files in a Debian package that `wanted` accepts by name, unpacked if they end in .gz."""
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(tar)) as files:
        for member in sorted(files, key=lambda member: member.name):
            if member.isfile() and wanted(member.name):
                data = files.extractfile(member).read()
                yield member.name, gzip.decompress(data) if member.name.endswith(("gz", "dz")) else data


def documents(linux, dictionary):
    """(texts of the kernel's documentation, texts of the dictionary)."""
    kernel = {}
    for _, data in files_of(linux, lambda name: name.removesuffix(".gz").endswith((".rst", ".txt", ".yaml"))):
        kernel.setdefault(hashlib.sha256(data).hexdigest(), data.decode(errors="replace"))  # some are there twice
    (_, data), *_ = files_of(dictionary, lambda name: name.endswith("gcide.dict.dz"))
    return list(kernel.values()), [data.decode(errors="replace")]


def cut(texts, size=10_000):
    return [text[i : i + size] for text in texts for i in range(0, len(text), size)]


def rival(package, name, nb):
    """The tiktoken.Encoding of npm's ranks."""
    with tarfile.open(package) as files:
        spec = json.load(files.extractfile(f"package/encoders/{name}.json"))
    tokens = {}
    for line in filter(None, spec["bpe_ranks"].split("\n")):
        _, first, *group = line.split(" ")  # a run of tokens with successive ranks
        tokens |= {token: int(first) + i for i, token in enumerate(group)}
    original = "".join(f"{token} {rank}\n" for token, rank in tokens.items()).encode()
    if hashlib.sha256(original).hexdigest() != RANKS_SHA256[name]:
        sys.exit(f"{package}: its ranks of {name} are not those of the original")
    ranks = {base64.b64decode(token): rank for token, rank in tokens.items()}
    special = spec["special_tokens"]
    return tiktoken.Encoding(name, pat_str=spec["pat_str"], mergeable_ranks=ranks, special_tokens=special)


def hugging_face(texts, pattern, vocab_size):
    """The set of tokens, as bytes, that Hugging Face's trainer finds."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.get_vocab()


def byte_letters():
    """{letter: byte} of the alphabet in which Hugging Face writes bytes: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("linux", help="linux-doc-6.1_*.deb")
    parser.add_argument("dictionary", help="dict-gcide_*.deb")
    parser.add_argument("tiktoken", help="tiktoken-*.tgz of npm")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    nb = load(ROOT / "01_tokenizer.py")
    demo = nb.Config.demo()
    shards, fetch_validation = nb.list_shards(demo)
    embedded = [text for fetch in shards for _, text in nb.read_documents(fetch())]
    kernel, dictionary = documents(args.linux, args.dictionary)
    held_out = kernel[::20]
    del kernel[::20]
    texts = cut([*kernel, *dictionary, *embedded]) * 2
    size = sum(len(text.encode()) for text in texts)
    print(f"text: {size / 1e6:.1f} MB in {len(texts):,} documents; held out {sum(map(len, held_out)) / 1e6:.2f} MB")

    before, seconds = peak(), {"rustbpe": [], "tokenizers": []}
    for _ in range(args.rounds):
        started = time.perf_counter()
        ours = nb.train_tokenizer(texts, VOCAB)
        seconds["rustbpe"].append(time.perf_counter() - started)
        if len(seconds["rustbpe"]) == 1:
            print(f"peak memory: {before:,.0f} MiB with the text, {peak():,.0f} MiB after training")
        started = time.perf_counter()
        theirs = hugging_face(texts, nb.SPLIT_PATTERN, VOCAB - len(nb.SPECIAL_TOKENS))
        seconds["tokenizers"].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:12}{median:7.1f} s  {size / 1e6 / median:6.1f} MB/s   {[round(s, 1) for s in seconds[name]]}")
    letters = byte_letters()
    theirs = {bytes(letters[letter] for letter in token) for token in theirs}
    both = len(theirs & set(ours._mergeable_ranks))
    print(f"ratio {medians['tokenizers'] / medians['rustbpe']:.2f}; both have {both:,} of {len(theirs):,} tokens, "
          f"{both / len(theirs):.3%}")  # fmt: skip

    demo_tokenizer = nb.load_tokenizer(nb.embedded_folder() / "tokenizer")
    gpt2, gpt4 = (rival(args.tiktoken, name, nb) for name in ("r50k_base", "cl100k_base"))
    validation = [text for _, text in nb.read_documents(fetch_validation())]
    for tokenizer, group, kind in ((demo_tokenizer, validation, "embedded"), (ours, held_out, "linux-doc")):
        tokenizers = {"tpuchat": tokenizer, "GPT-2": gpt2, "GPT-4": gpt4}
        nb.show_compression(nb.bytes_per_token(tokenizers, {kind: group}), tokenizers)


if __name__ == "__main__":
    main()
