"""What does one change do to the loss and to the speed? Trains the demo under one change at a time; prints a table.

    python benchmarks/ablate.py n_head=2 learning_rate=2e-3,weight_decay=0.3     # two changes, beside the demo itself
    python benchmarks/ablate.py --table shapes --steps 20        # how the demo's settings were chosen
    python benchmarks/ablate.py --table formulations --base compute_dtype=float32,learning_rate=3e-4
    python benchmarks/ablate.py --table dtypes --steps 300 --seeds 0 1 2 --bytes
    python benchmarks/ablate.py --table notebooks --steps 800 --seeds 0 1 2 --bytes

shapes: attention, dtype, B and T. formulations: the loss with its own gradient and the fused attention kernel (slowly,
interpreted, where there is no TPU) beside the plain formulation, einsum attention and autodiff through forward's
logits; and the plain one beside itself, its weights at the start changed in their last bit: training amplifies that,
too, the more the higher the learning rate. dtypes: what bfloat16 changes must be less than what another seed changes.
notebooks: 02 and 04 with equally many parameters (04's `mlp_dim` is 683, so that three matmuls have the weights of
02's two) and each demo's own learning rate.

A table's rows take turns, ten steps each, so that other work on the machine hits all alike; the fastest ten count.
Columns: milliseconds a step, tokens a second, their ratio to the first row; the mean loss of the last tenth of the
steps, nats, and with --bytes the bits per byte of the validation shard, each the mean of the seeds and its standard
deviation; and the largest relative difference of a step's loss to the first row, of the first seed.
"""

import argparse
import contextlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from common import embedded_data, load, timed
from jax.experimental.pallas import tpu as pltpu

BLOCK = 10
nb = load("02_train.py")


@jax.jit
def plain_step(config, state, tokens, targets):
    """The train step as one would write it down."""

    def loss_fn(params):
        logits = nb.forward(config, params, tokens[0])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[0][..., None], axis=-1))

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    params = nb.update_params(config, state, grads, nb.scheduled_lr(state.hyper, state.step))
    return nb.TrainState(state.step + 1, *params, state.hyper), {"loss": loss}


class Row:
    """A variant of a table: a notebook, changes of its demo, and maybe another step, or weights times 1 + nudge."""

    def __init__(self, changes=None, notebook="02_train.py", step=None, nudge=0.0):
        self.changes, self.notebook, self.step, self.nudge = changes or {}, notebook, step, nudge
        self.losses, self.bits, self.seconds = [], [], []  # of each seed; of each block of steps

    def begin(self, base, steps, seed):
        """Makes the state and the loader of a run."""
        self.module = module = load(self.notebook)
        self.step = self.step or module.train_step
        changes = {"mesh": (1, 1), "num_iterations": steps, "seed": seed} | base | self.changes
        mlp_dim = changes.pop("mlp_dim", None)
        self.config = module.Config.demo().replace(**changes)
        if mlp_dim:  # past Config's check: no multiple of 256, and a CPU has no matrix unit
            object.__setattr__(self.config, "mlp_dim", mlp_dim)
        self.state = module.init_train_state(self.config)
        self.state = self.state._replace(
            params=jax.tree.map(lambda x: x * jnp.float32(1 + self.nudge), self.state.params)
        )
        shards, self.validation, self.tokenizer = embedded_data(module, self.config)
        self.loader = module.PrefetchDataLoader(self.config, self.tokenizer, shards)
        self.found = []

    def advance(self, steps):
        """Runs some steps of the run, on batches that are there already."""
        batches = [next(self.loader) for _ in range(steps)]

        def run():
            for batch in batches:
                self.state, metrics = self.step(self.config, self.state, *batch)
                self.found.append(metrics["loss"])
            return self.state

        kernel = self.config.attn_impl in ("fused", "splash", "pallas") and jax.default_backend() != "tpu"
        with pltpu.force_tpu_interpret_mode(True) if kernel else contextlib.nullcontext():
            seconds, _ = timed(run)
        if len(self.found) > steps:  # the first block compiles
            self.seconds.append(seconds / steps)

    def rate(self):
        return self.config.tokens_per_step / min(self.seconds, default=np.nan)

    def end(self, count_bits):
        self.loader.close()
        self.losses.append(np.array(jax.device_get(self.found)))
        if count_bits:
            batches = self.module.validation_batches(self.config, self.tokenizer, self.validation)
            self.bits.append(self.module.evaluate(self.config, self.state.params, batches)["bpb"])


def tables():
    """Returns {name of a table: {name of a row: Row}}; the first row is what the others are compared with."""
    demo = nb.Config.demo()
    shapes = [(demo.device_batch_size, demo.seq_len), (16, 128), (32, 128), (16, 256), (4, 512), (8, 512)]
    changes = [dict(attn_impl="jax"), dict(compute_dtype="float32")]
    changes += [dict(device_batch_size=B, seq_len=T) for B, T in shapes[1:]]
    heads, einsum = dict(n_head=2, head_dim=128), dict(n_head=2, head_dim=128, attn_impl="einsum")
    return {
        "shapes": {"demo": Row(), **{describe(change): Row(change) for change in changes}},
        "formulations": {
            "plain": Row(einsum, step=plain_step), "einsum, own gradient of the loss": Row(einsum),
            "fused, own gradient of the loss": Row(heads | {"attn_impl": "fused"}),
            "plain, weights nudged": Row(einsum, step=plain_step, nudge=2**-23),
        },
        "dtypes": {dtype: Row({"compute_dtype": dtype}) for dtype in ("float32", "bfloat16")},
        "notebooks": {"02_train": Row(), "04_maxtext": Row({"mlp_dim": 683}, "04_maxtext.py")},
    }  # fmt: skip


def describe(changes):
    return ", ".join(f"{name}={value}" for name, value in changes.items())


def parse(text):
    """Returns {field: value} of 'field=value,field=value', each value of its field's type."""
    pairs = [part.split("=", 1) for part in text.split(",") if part]
    given = nb.parse_args([word for name, *value in pairs for word in (f"--{name}", *value)], nb.Config.demo())
    return {name: getattr(given, name) for name, *_ in pairs}


def spread(values, form):
    """Returns the mean of the seeds, with the standard deviation if there are several."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return format(statistics.mean(values), form) + deviation if values else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("changes", nargs="*", help="field=value,field=value: a row of the table each")
    parser.add_argument("--table", choices=["shapes", "formulations", "dtypes", "notebooks"])
    parser.add_argument("--base", default="", help="changes of all rows")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--bytes", action="store_true", help="bits per byte of the validation shard, too")
    args = parser.parse_args()
    with nb.one_line_errors():
        rows = tables()[args.table] if args.table else {"demo": Row()}
        rows |= {change: Row(parse(change)) for change in args.changes}
        base = parse(args.base)
        for seed in args.seeds:
            for row in rows.values():
                row.begin(base, args.steps, seed)
            for done in range(0, args.steps, BLOCK):
                for row in rows.values():
                    row.advance(min(BLOCK, args.steps - done))
            for row in rows.values():
                row.end(args.bytes)

    first, width = next(iter(rows.values())), max(map(len, rows)) + 2
    print(f"{'':{width}}{'ms':>7}{'tok/s':>9}{'ratio':>7}  {'loss':17}{'bpb' if args.bytes else '':17}difference")
    for name, row in rows.items():
        ends = [float(losses[-max(1, args.steps // 10) :].mean()) for losses in row.losses]
        seconds = min(row.seconds, default=np.nan)  # of a single block it is not known: it compiles
        difference = np.max(np.abs(row.losses[0] / first.losses[0] - 1))
        print(f"{name:{width}}{1e3 * seconds:7.0f}{row.rate():9,.0f}{row.rate() / first.rate():7.2f}  "
              f"{spread(ends, '.4f'):17}{spread(row.bits, '.4f'):17}{difference:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
