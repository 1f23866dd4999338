"""What a TPU or a GPU does with 02 and 04, in some minutes: speed, memory, torch beside it, and a training.

    python benchmarks/accelerator.py [--minutes 8] [--parts …] [--out FOLDER] [--tiny]

It needs jax for the device, numpy, tiktoken, pyarrow, tqdm and safetensors; no network. torch is for the parts that
compare with it, matplotlib for the picture. Each part runs in a process of its own with a limit, so that one may fail;
what has been found is in FOLDER/accelerator.json ($OUT, else runs/accelerator) after each. A part for which no time is
left is left out: `--parts train --minutes 8` gives the training seven minutes. --tiny is a trial of the script.

ms is the median of 30 steps, each waited for at both ends; queued is the mean of 30 steps without waits between. MFU is
at `queued`, with the FLOPs and peaks of the notebook (flops_per_token, PEAK_FLOPS). A program compiled before is found
again in jax's cache: then its compile time is about 0.
"""

import argparse
import functools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOTEBOOKS = {"02": "02_train.py", "04": "04_maxtext.py"}
TINY = {
    "02": dict(n_head=2, head_dim=32, aspect_ratio=32, vocab_size=4096, seq_len=128, device_batch_size=2),
    "04": dict(n_embd=256, n_layer=2, mlp_dim=256, n_head=1, n_kv_head=1, vocab_size=4096, seq_len=256,
               device_batch_size=2),
}  # fmt: skip
# Name: (arguments, least seconds, usual seconds on a GPU). In the order of their value.
PARTS = {
    "02": (["step", "02", "auto"], 30, 60),
    "torch 02": (["torch", "02", "sdpa"], 30, 75),
    "losses": (["losses"], 10, 20),
    "train": (["train", "02"], 60, None),
    "04": (["step", "04", "auto"], 30, 60),
    "02 rounded": (["step", "02", "auto", "xla_allow_excess_precision=false"], 30, 60),  # docs/gpu.md
    "torch 02 flex": (["torch", "02", "flex"], 30, 75),
    "batch": (["batch", "02"], 30, 75),
    "02 einsum": (["step", "02", "einsum"], 30, 60),
    "torch 04": (["torch", "04", "sdpa"], 30, 75),
    "04 einsum": (["step", "04", "einsum"], 30, 60),
    "02 splash": (["step", "02", "splash"], 30, 60),  # on a TPU, as the next two
    "02 jax": (["step", "02", "jax"], 30, 60),
    "04 pallas": (["step", "04", "pallas"], 30, 60),
}
TRAINING = 420  # seconds at most


# ---- in a process of its own: a part


def notebook(name, tiny, **changes):
    """Returns (notebook as a module, its Config for this device)."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from common import load

    nb = load(NOTEBOOKS[name])
    config = nb.Config(**TINY[name]) if tiny else nb.Config.for_device()
    return nb, config.replace(mesh=(1, 1), wandb_mode="disabled", **changes)


def random_batch(config):
    import jax
    import numpy as np

    rows = np.random.default_rng(0).integers(0, config.vocab_size, (*config.batch_shape[:2], config.seq_len + 1))
    return jax.device_put((rows[..., :-1].astype(np.int32), rows[..., 1:].astype(np.int32)))


def time_steps(nb, config, runs):
    """Returns what a step takes, measured; the keys are those of torch_step.measure, and rates."""
    import jax
    import numpy as np

    device, state, batch = jax.devices()[0], nb.init_train_state(config), random_batch(config)
    started = time.perf_counter()
    compiled = nb.train_step.lower(config, state, *batch).compile()
    compile_s, plan = time.perf_counter() - started, compiled.memory_analysis()
    step = functools.partial(compiled, config)
    for _ in range(3):
        state, metrics = step(state, *batch)
    seconds = []
    for _ in range(runs):
        jax.block_until_ready((state, metrics))
        started = time.perf_counter()
        state, metrics = step(state, *batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    for _ in range(runs):
        state, metrics = step(state, *batch)
    jax.block_until_ready((state, metrics))
    queued = (time.perf_counter() - started) / runs
    loss = float(metrics["loss"])
    assert np.isfinite(loss), f"the loss is {loss}"
    return {
        "ms": 1e3 * statistics.median(seconds), "queued_ms": 1e3 * queued, "compile_s": compile_s, "loss": loss,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "planned_bytes": plan.argument_size_in_bytes + plan.temp_size_in_bytes,
        "attention": nb.choose_attention(config, jax.default_backend()), **rates(nb, config, queued),
    }  # fmt: skip


def rates(nb, config, seconds):
    """Returns {'tokens_per_second', 'mfu', …}; MFU is None for a device whose peak is not known."""
    import jax

    kind, rate = jax.devices()[0].device_kind, config.tokens_per_step / seconds
    peak = nb.peak_flops(kind)
    return {
        "tokens_per_second": rate, "mfu": peak and nb.flops_per_token(config) * rate / peak, "device": kind,
        "batch_shape": list(config.batch_shape), "compute_dtype": config.compute_dtype, "jax": jax.__version__,
        "platform": jax.devices()[0].client.platform_version.replace("\n", " "),
    }  # fmt: skip


def torch_spec(nb, config):
    """Returns the shapes of a Config as torch_step.py reads them, and what rates need to know."""
    keys = dict(heads=config.n_head, kv_heads=config.kv_heads, head_dim=config.head_dim, width=config.n_embd,
                mlp=config.mlp_dim, vocab=config.vocab_size)  # fmt: skip
    return keys | dict(
        seq_len=config.seq_len, windows=config.windows, softcap=config.softcap, dtype=config.compute_dtype,
        gate=nb.__name__ == "nb_04_maxtext", batch_shape=list(config.batch_shape), betas=[config.beta1, config.beta2],
        learning_rate=config.learning_rate, head_rate=nb.HEAD_RATE, tokens=config.tokens_per_step,
        flops=nb.flops_per_token(config),
    )  # fmt: skip


def part_step(out, tiny, name, impl, *flags):
    """A notebook's step with one implementation of attention, and flags for XLA."""
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *(f"--{flag}" for flag in flags)]).strip()
    nb, config = notebook(name, tiny, attn_impl=impl)
    if impl == "auto":
        import jax

        peak = nb.peak_flops(jax.devices()[0].device_kind)
        (out / f"spec-{name}.json").write_text(json.dumps(torch_spec(nb, config) | {"peak": peak}))
    return time_steps(nb, config, 5 if tiny else 30)


def part_torch(out, tiny, name, attention):
    """The same model and batch in torch, which must not share a process with jax: each takes most of the memory."""
    spec = json.loads((out / f"spec-{name}.json").read_text())
    path = out / f"spec-{name}-{attention}.json"
    path.write_text(json.dumps(spec | {"attention": attention, "steps": 5 if tiny else 30}))
    found = run_torch(path)
    rate = spec["tokens"] / found["queued_ms"] * 1e3
    mfu = spec["peak"] and spec["flops"] * rate / spec["peak"]
    return found | {"attention": attention, "tokens_per_second": rate, "mfu": mfu, "batch_shape": spec["batch_shape"]}


def run_torch(path):
    done = subprocess.run([sys.executable, HERE / "torch_step.py", path], capture_output=True, text=True)
    print(done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(f"torch_step.py: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def part_losses(out, tiny):
    """Three steps of each small model in float32, beside torch's from the same weights, all on the CPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    found = {name: losses_beside_torch(out, name) for name in NOTEBOOKS}
    apart = max(x["apart"] for x in found.values())
    assert apart < 1e-4, found
    return {"losses": found, "apart": apart}


def losses_beside_torch(out, name):
    import jax
    import numpy as np

    changes = dict(warmup_ratio=0.0, warmdown_ratio=0.0, learning_rate=1e-2)
    nb, config = notebook(name, True, compute_dtype="float32", num_iterations=10, **changes)
    state, batch = nb.init_train_state(config), random_batch(config)
    params = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(state.params)
    }
    losses = []
    for _ in range(3):
        state, metrics = nb.train_step(config, state, *batch)
        losses.append(float(metrics["loss"]))
    weights, path = out / "weights.npz", out / f"spec-{name}-losses.json"
    np.savez(weights, tokens=batch[0], targets=batch[1], losses=losses, **params)
    path.write_text(json.dumps(torch_spec(nb, config) | {"weights": str(weights)}))
    return run_torch(path)


def part_batch(out, tiny, name):
    """The largest device_batch_size that fits, by the compiler's memory of two sizes; then its step is timed."""
    nb, config = notebook(name, tiny)

    def sized(rows):
        return config.replace(device_batch_size=rows, total_batch_size=-1)

    small = sized(config.device_batch_size)
    a, b = small.device_batch_size, 2 * small.device_batch_size
    one, two, limit = nb.memory_of_step(small), nb.memory_of_step(sized(b)), nb.memory_limit()
    rows = min(int(a + (limit - one) / ((two - one) / (b - a))), 4 if tiny else 256)
    while True:
        try:
            found = time_steps(nb, sized(rows), 5)
            return found | {"device_batch_size": rows, "limit_bytes": limit}
        except Exception as error:
            if rows == 1 or not nb.memory_is_out(error):
                raise
            print(f"{rows} sequences do not fit: {nb.first_line(error)[:200]}", flush=True)
        rows = min(rows - 1, rows * 9 // 10)


def part_train(out, tiny, name, seconds):
    """A run of the notebook on the embedded corpus, as many steps as `seconds` allow, with a trace."""
    started = time.perf_counter()
    nb, config = notebook(name, tiny, dataset="embedded", num_shards=-1, run_dir=tempfile.mkdtemp(), resume="never")
    ms = time_steps(nb, config, 5)["queued_ms"]
    left = float(seconds) - (time.perf_counter() - started)
    room = max(0.4 * left, left - 60)  # the rest compiles, evaluates, samples and saves
    steps = min(40 if tiny else 10**6, max(40, int(room / ms * 1e3)))
    config = config.replace(
        num_iterations=steps, eval_interval=max(20, steps // 12), sample_interval=max(20, steps // 3), save_interval=0,
        log_interval=max(1, steps // 200), eval_tokens=262_144, final_eval_tokens=-1,
    )  # fmt: skip
    if tiny:
        config = config.replace(eval_tokens=4096, final_eval_tokens=4096)
    summary = nb.train(config)
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    facts = {key: summary[key] for key in ("step", "loss", "val_loss", "val_bpb", "best", "tokens", "tokens_per_second",
                                           "mfu", "seconds", "times", "wait_seconds", "peak_memory")}  # fmt: skip
    facts["curve"] = [[line["step"], line["loss"]] for line in lines if "loss" in line]
    facts["validation"] = [[line["step"], line["val_bpb"]] for line in lines if "val_bpb" in line]
    facts["samples"] = (Path(config.run_dir) / "samples.txt").read_text(encoding="utf-8")
    facts["parameters"] = nb.count_params(config)["total"]
    try:
        facts["trace"] = traced(config.run_dir)
    except Exception as error:
        facts["trace"] = f"{type(error).__name__}: {nb.first_line(error)}"
    shutil.rmtree(config.run_dir, ignore_errors=True)
    return facts


def traced(run_dir):
    """Returns the table of a run's trace, as 05 reads it: {'attention, forward': ms a step, …}."""
    from common import load

    parts, seconds, steps = load("05_preflight.py").read_trace(run_dir)
    table = {", ".join(name): round(1e3 * value, 3) for name, value in parts.most_common()}
    return {"steps": steps, "ms": 1e3 * seconds, "parts_ms": table}


def run_part(arguments, out, tiny):
    """Runs a part in this process, and writes what it returns to out/part.json."""
    kind, *rest = arguments
    try:
        found = globals()[f"part_{kind}"](out, tiny, *rest)
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {str(error).strip()[:500]}")  # the last line: what the parent reports
    (out / "part.json").write_text(json.dumps(found))


# ---- the parent, which never imports jax


def call(name, arguments, out, tiny, seconds):
    """Runs a part in a process of its own. Returns {'ok', 'seconds', and what it found, or 'error'}."""
    command = [sys.executable, __file__, "--out", str(out), *["--tiny"] * tiny, "--run", *arguments]
    result, log = out / "part.json", out / "part.log"
    result.unlink(missing_ok=True)
    started = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(seconds)
            error = f"exit status {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            error = f"took more than {seconds:.0f} s"
            process.send_signal(signal.SIGTERM)  # a training saves and goes
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                pass
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # it may have children; nothing stays on the device
            except ProcessLookupError:
                pass
            process.wait()
    took = time.perf_counter() - started
    if result.exists():
        return {"ok": True, "seconds": took, **json.loads(result.read_text())}
    text = log.read_text(errors="replace")
    with (out / "failures.log").open("a") as file:
        file.write(f"---- {name}\n{text[-20_000:]}\n")
    lines = [line for line in text.splitlines() if line.strip()]
    return {"ok": False, "seconds": took, "error": "; ".join([error, *lines[-1:]])[:600]}


def say(name, part):
    """Prints a line of a part."""
    if not part["ok"]:
        return print(f"{name:14} failed: {part['error']}", flush=True)
    if "losses" in part:
        return print(f"{name:14} torch's losses are within {part['apart']:.1e}", flush=True)
    mfu = f"{part['mfu']:.1%}" if part["mfu"] else "n/a"
    if "curve" in part:
        best = part["best"] or {"val_bpb": float("nan"), "step": 0}
        words = f"{part['step']:,} steps, {part['val_bpb']:.4f} bits per byte, best {best['val_bpb']:.4f} at step "
        words += f"{best['step']:,}"
    else:
        words = f"{part['ms']:9.2f} ms, queued {part['queued_ms']:9.2f}, compiled in {part['compile_s']:.0f} s, "
        words += f"batch {part['batch_shape']}, {part['attention']}"
        words += f", {part['peak_bytes'] / 2**30:.2f} GiB" if part["peak_bytes"] else ""
    print(f"{name:14} {words}; {part['tokens_per_second']:,.0f} tok/s, MFU {mfu}", flush=True)


def draw(report, path):
    """Draws the rates of all steps, and the curve of the training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = {name: x["tokens_per_second"] for name, x in report["parts"].items() if x["ok"] and "ms" in x}
    bars = left.barh([*rates][::-1], [*rates.values()][::-1])
    left.bar_label(bars, fmt="{:,.0f}", padding=3)
    left.set(xlabel="tokens a second", title=report["device"])
    left.margins(x=0.2)
    if "curve" in (train := report["parts"].get("train", {})):
        right.plot(*zip(*train["curve"]), color="0.7", label="training loss, nats a token")
        if train["validation"]:
            right.plot(*zip(*train["validation"]), "o-", label="validation, bits per byte")
        right.set(xlabel="step", ylim=(0, None))
        right.legend()
    figure.savefig(path, dpi=120)


def write(report, out):
    """Writes the report, whole or not at all, and the picture."""
    new = out / "accelerator.json.new"
    new.write_text(json.dumps(report, indent=1))
    os.replace(new, out / "accelerator.json")
    try:
        draw(report, out / "accelerator.png")
    except Exception as error:  # no matplotlib
        report["picture"] = f"{type(error).__name__}: {error}"


def choose(names, out):
    """Returns the parts that were asked for; without a TPU its attentions are left out."""
    if names:
        return {name: PARTS[name] for name in names}
    tpu = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    return {name: part for name, part in PARTS.items() if tpu or name not in ("02 splash", "02 jax", "04 pallas")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), help="in this order; all without")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "runs/accelerator"))
    parser.add_argument("--tiny", action="store_true", help="small shapes and few steps: a trial")
    parser.add_argument("--run", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.run:
        return run_part(args.run, out, args.tiny)
    deadline = time.monotonic() + 60 * args.minutes - 10  # to draw and leave
    (out / "failures.log").unlink(missing_ok=True)
    report = {"device": "", "minutes": args.minutes, "tiny": args.tiny, "parts": {}}
    parts = choose(args.parts, out)
    for i, (name, (arguments, least, usual)) in enumerate(parts.items()):
        left = deadline - time.monotonic()
        if usual is None:  # three tenths of the time, and more if the parts after it leave it
            later = sum(usual for _, _, usual in [*parts.values()][i + 1 :])
            left = min(TRAINING + 30, max(least, 18 * args.minutes, left - later), left)
            arguments = [*arguments, f"{left - 30:.0f}"]
        else:
            left = min(left, 2.5 * usual)  # a part that hangs must not cost the others
        if left < (10 if args.tiny else least):
            part = {"ok": False, "seconds": 0.0, "error": "no time was left"}
        else:
            part = call(name, arguments, out, args.tiny, left)
        report["parts"][name] = part
        report["device"] = report["device"] or part.get("device", "")
        say(name, part)
        write(report, out)
    for path in [out / "part.json", out / "part.log", out / "weights.npz", *out.glob("spec-*.json")]:
        path.unlink(missing_ok=True)
    print(f"written: {out / 'accelerator.json'}")
    return 0 if any(part["ok"] for part in report["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
