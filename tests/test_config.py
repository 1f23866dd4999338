"""Config says what is wrong, is the reference model by default, and compiles anew only when it must."""

import dataclasses
import math
import os
import subprocess
import sys

import jax
import pytest

POSITIVE = (
    "n_head", "head_dim", "aspect_ratio", "seq_len", "softcap", "splash_block_size", "device_batch_size",
    "learning_rate", "eps", "target_param_data_ratio", "eval_tokens",
)  # fmt: skip
NOT_NEGATIVE = (
    "weight_decay", "beta1", "beta2", "warmup_ratio", "warmdown_ratio", "final_lr_frac", "log_interval",
    "eval_interval", "sample_interval", "save_interval", "profile_start", "profile_steps", "seed",
)  # fmt: skip
DEFAULT_IS_MINUS_ONE = ("n_kv_head", "total_batch_size", "num_iterations", "num_shards", "final_eval_tokens")

OUT_OF_RANGE = (
    [(name, value, "positive") for name in POSITIVE for value in (0, -3)]
    + [(name, -3, "") for name in NOT_NEGATIVE]
    + [(name, value, "-1") for name in DEFAULT_IS_MINUS_ONE for value in (0, -3)]
    + [("beta1", 1, "[0, 1)"), ("beta2", 1.5, "[0, 1)"), ("final_lr_frac", 1.5, "at most 1")]
)

# Config(**changes) is refused, and the message names the field, its value and each of the words.
REFUSED = [
    (dict(n_kv_head=3), "n_kv_head=3", ["divide", "n_head=8"]),
    (dict(n_kv_head=16), "n_kv_head=16", ["divide", "n_head=8"]),
    (dict(head_dim=63), "head_dim=63", ["even"]),
    (dict(n_head=1, head_dim=32), "aspect_ratio=64", ["n_embd=32"]),
    (dict(vocab_size=256), "vocab_size=256", ["above 256"]),
    (dict(attn_impl="flash"), "attn_impl='flash'", ["auto", "einsum", "jax", "splash", "pallas"]),
    (dict(compute_dtype="float16"), "compute_dtype='float16'", ["bfloat16", "float32"]),
    (dict(resume="yes"), "resume='yes'", ["auto", "never"]),
    (dict(softcap=71.0), "softcap=71.0", ["at most 70"]),
    (dict(window_pattern=""), "window_pattern=''", ["S", "L"]),
    (dict(window_pattern="SML"), "window_pattern='SML'", ["S", "L"]),
    (dict(window_pattern="ssl"), "window_pattern='ssl'", ["S", "L"]),
    (dict(total_batch_size=8191), "total_batch_size=8191", ["multiple", "8192"]),
    (dict(total_batch_size=4096), "total_batch_size=4096", ["multiple", "8192"]),
    (dict(warmup_ratio=0.6, warmdown_ratio=0.5), "=1.1", ["warmup_ratio", "warmdown_ratio", "at most 1"]),
    (dict(attn_impl="pallas"), "attn_impl='pallas'", ["SSSL", "set window_pattern='L'", "attn_impl='splash'"]),
    (dict(eps=1e-40), "eps=1e-40", ["at least 1e-30", "float32"]),
    (dict(learning_rate=1e39), "learning_rate=1e+39", ["finite", "3.4e+38"]),
    (dict(vocab_size=2**63), f"vocab_size={2**63}", ["below 2^63"]),
    (dict(seed=-(2**63)), f"seed={-(2**63)}", ["below 2^63"]),
    (dict(grad_clip=-1.0), "grad_clip=-1.0", ["0 for no clipping"]),
    (dict(nonfinite="ignore"), "nonfinite='ignore'", ["stop or skip"]),
    (dict(keep_checkpoints=0), "keep_checkpoints=0", ["positive"]),
    (dict(backup="hub"), "backup='hub'", ["hf_repo_id"]),
    (dict(attn_impl="splash", splash_block_size=100), "splash_block_size=100", ["multiple of 128"]),
    (dict(attn_impl="splash", splash_block_size=768), "splash_block_size=768", ["divides seq_len=2048"]),
    (dict(attn_impl="pallas", window_pattern="L", splash_block_size=64), "splash_block_size=64", ["128"]),
    (dict(attn_impl="splash", seq_len=1000), "seq_len=1000", ["multiple of 128"]),
]


def refusal(nb, **changes):
    """The message of the error that Config(**changes) must raise."""
    with pytest.raises(nb.InputError) as error:
        nb.Config(**changes)
    message = str(error.value)
    assert isinstance(error.value, ValueError) and "\n" not in message
    return message


@pytest.mark.parametrize(("name", "value", "rule"), OUT_OF_RANGE, ids=str)
def test_out_of_range(nb, name, value, rule):
    kind = {field.name: field.type for field in dataclasses.fields(nb.Config)}[name]
    message = refusal(nb, **{name: value})
    assert message.startswith(f"{name}={kind(value)!r}: must ") and rule in message


def test_every_field_refuses_every_wrong_type(nb):
    """bool is an int to Python, and NaN passes every comparison but one: both slip through naive checks."""
    wrong = {
        int: (None, True, "8", 8.0, [8], math.nan),
        float: (None, False, "0.1", [0.1], math.nan, math.inf, -math.inf),
        str: (None, True, 3, b"SSSL"),
        str | tuple: (None, True, 8, 2.5, b"2x4", "8", "2x", (8,), (0, 8), (2, -4), (2.0, 4), (1, 2, 4), (True, 8)),
    }
    for field in dataclasses.fields(nb.Config):
        for value in wrong[field.type]:
            message = refusal(nb, **{field.name: value})
            assert message.startswith(f"{field.name}={value!r}: must be"), (field.name, message)


@pytest.mark.parametrize(("changes", "value", "words"), REFUSED, ids=str)
def test_refused(nb, changes, value, words):
    message = refusal(nb, **changes)
    assert value in message and all(word in message for word in words), message


def test_the_edges_are_accepted(nb):
    """The rules refuse nothing that works: each of these is one step inside of a refusal above."""
    for changes in (
        dict(n_kv_head=1), dict(n_kv_head=8), dict(vocab_size=257), dict(seq_len=2), dict(beta1=0),
        dict(beta2=0.0), dict(warmup_ratio=0.5), dict(warmup_ratio=0, warmdown_ratio=1), dict(total_batch_size=8192),
        dict(final_lr_frac=1), dict(attn_impl="pallas", window_pattern="L"), dict(attn_impl="splash", seq_len=128),
        dict(attn_impl="splash", seq_len=1536, splash_block_size=768), dict(num_shards=-1), dict(log_interval=0),
    ):  # fmt: skip
        nb.Config(**changes)
    assert type(nb.Config(softcap=15).softcap) is float  # or 15 and 15.0 would compile two programs


def test_replace_validates_and_suggests(nb):
    config = nb.Config()
    assert config.replace(n_head=4) == nb.Config(n_head=4)
    with pytest.raises(nb.InputError, match=r"'n_haed', did you mean 'n_head'\?"):
        config.replace(n_haed=4)
    with pytest.raises(nb.InputError, match=r"unknown Config field 'zzz'$"):  # nothing is near: nothing is suggested
        config.replace(zzz=4)
    with pytest.raises(nb.InputError, match="n_head=0: must be positive"):
        config.replace(n_head=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_head = 4
    with pytest.raises(TypeError):
        nb.Config(4)  # keyword-only


def test_reference_model(nb):
    config = nb.Config()
    assert (config.n_embd, config.depth, config.mlp_dim, config.kv_heads) == (1024, 16, 4096, 8)
    assert config.windows == [1024, 1024, 1024, 2048] * 4
    D, F, L, V = 1024, 4096, 16, 32768
    attn, mlp, scalars = 4 * D * D, 2 * D * F, 2
    total = V * D + L * (attn + mlp + scalars) + D * V
    assert total == 268_435_488
    parts = {"embed": V * D, "attn": L * (attn + scalars), "mlp": L * mlp, "lm_head": D * V, "total": total}
    assert nb.count_params(config) == parts
    grouped = nb.count_params(config.replace(n_kv_head=2))  # key and value weights shrink to 2/8
    assert grouped == parts | {"attn": parts["attn"] - L * D * D * 3 // 2, "total": total - L * D * D * 3 // 2}


def test_windows(nb):
    """The last layer sees the whole context, whatever its letter."""
    four = nb.Config(n_head=2)
    assert four.depth == 4
    assert four.replace(window_pattern="S").windows == [1024, 1024, 1024, 2048]
    assert four.replace(window_pattern="L").windows == [2048] * 4
    assert four.replace(window_pattern="LS").windows == [2048, 1024, 2048, 2048]
    assert nb.Config(n_head=3).windows == [1024, 1024, 1024, 2048, 1024, 2048]
    assert nb.Config(n_head=1, aspect_ratio=128).windows == [2048]


def test_steps_and_batches(nb):
    config = nb.Config()
    assert (config.tokens_per_step, config.grad_accum_steps) == (4 * 2048, 1)
    bigger = config.replace(total_batch_size=65536)
    assert (bigger.tokens_per_step, bigger.grad_accum_steps) == (65536, 8)
    assert config.total_steps == round(10 * 268_435_488 / 8192) == 327_680
    assert bigger.replace(target_param_data_ratio=20.0).total_steps == round(20 * 268_435_488 / 65536) == 81_920
    assert config.replace(num_iterations=7).total_steps == 7
    assert config.replace(target_param_data_ratio=1e-9).total_steps == 1


@pytest.mark.parametrize(
    ("flags", "used", "dtype"),
    [("fpu avx512f avx512_bf16", True, "bfloat16"), ("amx_bf16 amx_tile", True, "bfloat16"),
     ("fpu avx512f avx512_bf16", False, "float32"), ("fpu avx2 avx512f", True, "float32"), ("", True, "float32")],
)  # fmt: skip
def test_demo_is_the_default_of_a_cpu(nb, monkeypatch, flags, used, dtype):
    """In the dtype that its matmuls are fast in: without bfloat16 instructions each operand would be converted."""
    monkeypatch.setattr(nb, "cpu_fact", {"flags": flags}.get)
    monkeypatch.setattr(nb, "CPU_USES_BFLOAT16", used)
    demo = nb.Config.demo()
    assert dataclasses.asdict(nb.Config.for_device()) == dataclasses.asdict(demo.replace(compute_dtype=dtype))
    assert demo.dataset == "embedded" and nb.count_params(demo)["total"] < 10_000_000


class FakeDevice:
    def __init__(self, kind, memory=None):
        self.device_kind, self.memory = kind, memory

    def memory_stats(self):
        return {"bytes_limit": self.memory} if self.memory else None


@pytest.mark.parametrize(
    ("device", "rows"),
    [(FakeDevice("TPU v6 lite"), 4), (FakeDevice("TPU v5 lite"), 4), (FakeDevice("NVIDIA H100 80GB HBM3", 80e9), 4),
     (FakeDevice("Tesla T4", 15e9), 1), (FakeDevice("unknown"), 1)],
)  # fmt: skip
def test_the_step_fits_the_device(nb, monkeypatch, device, rows):
    """Passes as large as the device allows; the tokens of a step are the same everywhere."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    config = nb.Config.for_device()
    assert config.device_batch_size == rows and config.tokens_per_step == nb.Config().tokens_per_step
    assert config.replace(device_batch_size=4, total_batch_size=-1) == nb.Config()


# A changed value for each field that is compiled in. All other fields must be free.
COMPILED = dict(
    n_head=4, n_kv_head=2, head_dim=64, aspect_ratio=32, vocab_size=4096, seq_len=1024, window_pattern="L",
    softcap=30.0, attn_impl="einsum", splash_block_size=512, compute_dtype="float32", device_batch_size=2,
    total_batch_size=16384, grad_clip=1.0, nonfinite="skip", mesh=(1, 1),
)  # fmt: skip


def test_free_fields_do_not_recompile(nb):
    """A Config is a static argument: jit compiles anew where it differs in a compiled field, and only there."""
    traced = []

    @jax.jit
    def program(config, x):
        traced.append(config)
        return x * config.n_head

    base = nb.Config()
    program(base, 1.0)
    changed = {int: 7, float: 0.01, str: "x", "resume": "never", "wandb_mode": "offline"}
    for field in dataclasses.fields(base):
        if field.name not in COMPILED:
            other = base.replace(**{field.name: changed.get(field.name, changed[field.type])})
            assert getattr(other, field.name) != getattr(base, field.name)
            assert hash(other) == hash(base), field.name
            program(other, 1.0)
    assert len(traced) == 1

    for name, value in COMPILED.items():
        program(base.replace(**{name: value}), 1.0)
        assert len(traced) == 2, name
        traced.pop()
    assert not jax.tree.leaves(base)  # no leaf is traced: the whole Config is part of the program


def test_parse_args(nb):
    demo = nb.Config.demo()

    def parse(line):
        return dataclasses.asdict(nb.parse_args(line.split(), demo))

    assert parse("") == dataclasses.asdict(demo)
    given = "--n_head 2 --num_iterations=-1 --num_shards -1 --learning_rate=1e-3 --softcap 20 --dataset here"
    want = dict(n_head=2, num_iterations=-1, num_shards=-1, learning_rate=1e-3, softcap=20.0, dataset="here")
    assert parse(given) == dataclasses.asdict(demo) | want
    assert type(nb.parse_args(["--softcap", "20"], demo).softcap) is float


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--n_haed 4", ["--n_haed", "did you mean 'n_head'?"]),
        ("--n_haed=4", ["--n_haed", "did you mean 'n_head'?"]),
        ("--n_hea 4", ["--n_hea", "did you mean 'n_head'?"]),  # no abbreviations: they change meaning with new fields
        ("--zzz 4", ["--zzz"]),
        ("stray", ["stray"]),
        ("--n_head x", ["n_head='x'", "int"]),
        ("--n_head 4.0", ["n_head='4.0'", "int"]),
        ("--n_head=", ["n_head=''", "int"]),
        ("--softcap high", ["softcap='high'", "float"]),
        ("--softcap nan", ["softcap=nan", "finite"]),
        ("--weight_decay -1", ["weight_decay=-1.0", "negative"]),
        ("--n_head", ["n_head", "expected one argument"]),
        ("--n_head --seed 3", ["n_head", "expected one argument"]),
    ],
)
def test_parse_args_refuses(nb, line, words):
    with pytest.raises(nb.InputError) as error:
        nb.parse_args(line.split(), nb.Config.demo())
    assert all(word in str(error.value) for word in words), error.value


def script(root, tmp_path, *args):
    return subprocess.run(
        [sys.executable, str(root / "02_train.py"), *args],
        cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--n_haed 4", ["--n_haed", "did you mean 'n_head'?"]),
        ("--n_head x", ["n_head='x'", "must be of type int"]),
        ("--n_head 0", ["n_head=0", "must be positive"]),
        ("--n_head", ["n_head", "expected one argument"]),
        ("--dataset nowhere", ["dataset='nowhere'", "embedded", "karpathy/fineweb-edu-100b-shuffle"]),
        ("--run_dir file/run", ["run_dir='file/run'", "can be written"]),
    ],
)
def test_as_a_script_a_mistake_is_one_line(root, tmp_path, line, words):
    (tmp_path / "file").write_text("a regular file")
    done = script(root, tmp_path, *line.split())
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert (tmp_path / "file").read_text() == "a regular file"


def test_help(nb, root, tmp_path):
    done = script(root, tmp_path, "--help")
    assert done.returncode == 0 and not done.stderr
    assert all(f"--{field.name}" in done.stdout for field in dataclasses.fields(nb.Config))


# What jax calls each chip, and its dense 16-bit peak in TFLOP/s by the vendor's data sheet.
CHIPS = {
    "TPU v6 lite": 918, "TPU v5 lite": 197, "TPU v5p": 459, "TPU v5": 459, "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989, "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100 80GB PCIe": 312, "Tesla T4": 65, "NVIDIA L4": 121,
}  # fmt: skip
UNKNOWN = ("cpu", "NVIDIA L40S", "NVIDIA L40", "TPU v4", "TPU7x", "NVIDIA T400", "NVIDIA RTX A1000", "")


def test_peak_flops(nb):
    assert {kind: nb.peak_flops(kind) for kind in CHIPS} == {kind: peak * 1e12 for kind, peak in CHIPS.items()}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_peak_flops_does_not_guess(nb, kind):
    """An MFU against the peak of another chip is worse than none: 'L4' is not 'L40S'."""
    assert nb.peak_flops(kind) is None


@pytest.mark.parametrize("changes", [{}, {"window_pattern": "L"}, {"n_kv_head": 1}, {"seq_len": 15}], ids=str)
def test_flops_per_token_counts_what_is_seen(nb, changes):
    """By brute force: 6 FLOPs a token for each matmul weight, and for each pair of a query t and a key s that it sees
    2·N·H each for the score and for the sum over values, three times (forward, and backward for both operands)."""
    config = nb.Config(n_head=2, head_dim=4, aspect_ratio=2, vocab_size=300, seq_len=16).replace(**changes)
    N, K, H, D, F, T, L = 2, config.kv_heads, 4, 8, 32, config.seq_len, 4
    assert config.depth == L
    weights = L * (D * N * H + 2 * D * K * H + N * H * D + 2 * D * F) + D * config.vocab_size
    pairs = sum(s <= t and t - s <= window for window in config.windows for t in range(T) for s in range(T))
    want = 6 * weights + 3 * 2 * (2 * N * H) * pairs / T
    scalars = 6 * 2 * L  # the two residual scalars of a layer may count as weights or not; everything else is exact
    got = nb.flops_per_token(config)
    assert any(math.isclose(got, total, rel_tol=1e-12) for total in (want, want + scalars)), (got, want)
