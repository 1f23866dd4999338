"""How fast does rustbpe train beside Hugging Face's tokenizers, and do both find the same tokens?

    python benchmarks/tokenizer.py [--vocab_size 32768] [--copies 4] [--rounds 3]

The training shards of the embedded corpus, documents cut to 10,000 characters, `copies` times. Both trainers take the
same pieces by the same pattern from the same list in memory, in turn. Prints the median MB/s of both, their ratio, and
how many tokens both have. docs/log/02-tokenizer.md has the figures for 170 MB of other text, and the bytes per token
beside GPT-2's and GPT-4's.
"""

import argparse
import statistics

from common import in_turn, load
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

nb = load("01_tokenizer.py")


def hugging_face(texts, vocab_size):
    """The tokens, in letters that stand for bytes, that Hugging Face's trainer finds."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(nb.SPLIT_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet, size = pre_tokenizers.ByteLevel.alphabet(), vocab_size - len(nb.SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.get_vocab()


def byte_letters():
    """{letter: byte} of the alphabet in which Hugging Face writes bytes: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab_size", type=int, default=32768)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    shards, _ = nb.list_shards(nb.Config.demo())
    texts = [text for fetch in shards for _, text in nb.read_documents(fetch())]
    texts = [text[i : i + 10_000] for text in texts for i in range(0, len(text), 10_000)] * args.copies
    size, found = sum(len(text.encode()) for text in texts) / 1e6, {}
    ways = {
        "rustbpe": lambda: found.update(ours=nb.train_tokenizer(texts, args.vocab_size)._mergeable_ranks),
        "tokenizers": lambda: found.update(theirs=hugging_face(texts, args.vocab_size)),
    }
    seconds = {name: statistics.median(times) for name, times in in_turn(ways, args.rounds).items()}
    print(f"{size:.1f} MB: " + ", ".join(f"{name} {size / median:.1f} MB/s" for name, median in seconds.items()))
    letters = byte_letters()
    theirs = {bytes(letters[letter] for letter in token) for token in found["theirs"]}
    both = len(theirs & set(found["ours"]))
    print(f"ratio {seconds['tokenizers'] / seconds['rustbpe']:.2f}; both have {both:,} of {len(theirs):,} tokens")


if __name__ == "__main__":
    main()
