"""A model wrapped for lm-eval, and its word on a task of 07_evaluate: for a test, and for benchmarks/evaluate.py."""

import datasets
import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask


class Wrapped(TemplateLM):
    """A model of a notebook: whole sequences, one at a time, by its forward."""

    def __init__(self, nb, config, params, tokenizer):
        super().__init__()
        self.config, self.encoding, self.bos = config, tokenizer, tokenizer.encode_single_token("<|bos|>")
        self.forward = jax.jit(lambda tokens: jax.nn.log_softmax(nb.forward(config, params, tokens)))

    eot_token_id = property(lambda self: self.bos)

    def tok_encode(self, string, add_special_tokens=None, **_):
        return [self.bos] * (add_special_tokens is not False) + self.encoding.encode_ordinary(string)

    def _loglikelihood_tokens(self, requests, **_):
        answers, T = [], self.config.seq_len
        for _, context, continuation in requests:
            ids = (context + continuation)[-T:]
            logs = np.asarray(self.forward(jnp.array([ids + [0] * (T - len(ids))], jnp.int32)))[0]
            logs = logs[len(ids) - len(continuation) - 1 : len(ids) - 1]
            likelihood = logs[np.arange(len(continuation)), continuation].sum(dtype=np.float64)
            answers.append((float(likelihood), bool((logs.argmax(axis=-1) == continuation).all())))
            self.lengths.append(len(continuation))
        return answers

    def loglikelihood(self, requests, **options):
        self.lengths = []
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests, **_):
        raise NotImplementedError

    def generate_until(self, requests, **_):
        raise NotImplementedError


def ask(nb, config, params, tokenizer, task, limit=None):
    """Returns [[(log-likelihood, greedy, tokens) of each answer] of each question], by lm-eval's evaluator, without
    examples. task: a Task of 07_evaluate."""
    gap = " " if task.delimiter.endswith(" ") else ""
    before = task.delimiter.removesuffix(gap) if gap else task.delimiter
    questions = task.questions[:limit]
    rows = datasets.Dataset.from_list(questions)
    common = {"task": task.label, "custom_dataset": lambda **_: {"test": rows}, "test_split": "test", "num_fewshot": 0}
    kinds = {
        "multiple_choice": {
            "output_type": "multiple_choice", "doc_to_text": lambda q: q["query"] + before,
            "doc_to_choice": lambda q: q["choices"], "doc_to_target": lambda q: q["gold"],
        },
        "schema": {  # the contexts are the choices, and the text is the number of the right one
            "output_type": "multiple_choice", "doc_to_text": lambda q: q["gold"],
            "doc_to_choice": lambda q: q["context_options"], "doc_to_target": lambda q: q["continuation"],
        },
        "language_modeling": {
            "output_type": "loglikelihood", "doc_to_text": lambda q: q["context"].strip() + before,
            "doc_to_target": lambda q: gap + q["continuation"],
        },
    }  # fmt: skip
    delimiter = gap if task.kind != "language_modeling" else ""
    theirs = ConfigurableTask(config=common | kinds[task.kind] | {"target_delimiter": delimiter})
    model = Wrapped(nb, config, params, tokenizer)
    result = lm_eval.simple_evaluate(model, tasks=[theirs], log_samples=True, bootstrap_iters=0)
    samples = sorted(result["samples"][task.label], key=lambda sample: sample["doc_id"])
    lengths = iter(model.lengths)
    return [[(float(r[0][0]), bool(r[0][1]), next(lengths)) for r in sample["resps"]] for sample in samples]
