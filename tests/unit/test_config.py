"""Config says what is wrong, is the reference model by default, and compiles anew only when it must."""

import dataclasses
import math
import types

import jax
import pytest

from tests.helpers import one_line, script

POSITIVE = """n_head head_dim aspect_ratio softcap splash_block_size device_batch_size learning_rate
    target_param_data_ratio eval_tokens keep_checkpoints"""
NOT_NEGATIVE = """weight_decay warmup_ratio warmdown_ratio log_interval eval_interval sample_interval save_interval
    profile_start profile_steps seed grad_clip"""
MINUS_ONE_IS_DEFAULT = "n_kv_head total_batch_size num_iterations num_shards final_eval_tokens"
OUT_OF_RANGE = (
    [(name, value, "positive") for name in POSITIVE.split() for value in (0, -3)]
    + [(name, -3, "not be negative") for name in NOT_NEGATIVE.split()]
    + [(name, value, "-1") for name in MINUS_ONE_IS_DEFAULT.split() for value in (0, -3)]
    + [("beta1", 1, "[0, 1)"), ("beta2", -0.1, "[0, 1)"), ("final_lr_frac", 1.5, "[0, 1]"), ("eps", 0, "least 1e-30")]
    + [("seq_len", 1, "at least 2"), ("vocab_size", 256, "at least 257"), ("softcap", 71.0, "at most 70")]
)
REFUSED = [  # Config(**changes) is refused; the message has the field and its value, and each of the words
    (dict(n_kv_head=3), "n_kv_head=3", "divide", "n_head=8"),
    (dict(head_dim=63), "head_dim=63", "even"),
    (dict(n_head=1, head_dim=32), "aspect_ratio=64", "n_embd=32"),
    (dict(attn_impl="flash"), "attn_impl='flash'", "auto", "einsum", "jax", "splash", "pallas", "fused"),
    (dict(compute_dtype="float16"), "compute_dtype='float16'", "bfloat16", "float32"),
    (dict(window_pattern=""), "window_pattern=''", "S", "L"),
    (dict(window_pattern="SML"), "window_pattern='SML'", "S", "L"),
    (dict(total_batch_size=8191), "total_batch_size=8191", "multiple", "8192"),
    (dict(total_batch_size=4096), "total_batch_size=4096", "multiple", "8192"),
    (dict(total_batch_size=8192, mesh=(2, 4)), "total_batch_size=8192", "multiple", "devices", "65536"),
    (dict(warmup_ratio=0.6, warmdown_ratio=0.5), "=1.1", "warmup_ratio", "warmdown_ratio", "at most 1"),
    (dict(attn_impl="pallas"), "attn_impl='pallas'", "causal only", "set window_pattern='L'", "attn_impl='splash'"),
    (dict(attn_impl="splash", splash_block_size=100), "splash_block_size=100", "multiple of 128"),
    (dict(attn_impl="splash", splash_block_size=768), "splash_block_size=768", "divides seq_len=2048"),
    (dict(attn_impl="splash", seq_len=1000), "seq_len=1000", "multiple of 128"),
    (dict(attn_impl="fused", seq_len=8192), "attn_impl='fused'", "seq_len=8192 and head_dim=128", "splash"),
    (dict(attn_impl="fused", head_dim=64), "attn_impl='fused'", "head_dim=64", "splash"),
    (dict(nonfinite="ignore"), "nonfinite='ignore'", "stop, skip"),
    (dict(backup="hub"), "backup='hub'", "hf_repo_id"),
]


def refusal(nb, **changes):
    """The message of the error that Config(**changes) must raise."""
    with pytest.raises(nb.InputError) as error:
        nb.Config(**changes)
    assert isinstance(error.value, ValueError) and one_line(str(error.value))
    return str(error.value)


@pytest.mark.parametrize(("name", "value", "rule"), OUT_OF_RANGE, ids=str)
def test_out_of_range(nb, name, value, rule):
    message = refusal(nb, **{name: value})
    assert message.startswith(f"{name}={value!r}: must ") and rule in message


def test_every_field_refuses_every_wrong_type(nb):
    """bool is an int to Python, and NaN passes every comparison but one: both slip through naive checks."""
    wrong = {
        int: (None, True, "8", 8.0, [8]), float: (None, False, "0.1", math.nan, math.inf), str: (None, 3, b"SSSL"),
        bool: (None, 1, 0.0, "yes"),
        str | tuple: (None, True, 8, "8", "2x", (8,), (0, 8), (2.0, 4), (1, 2, 4)),
    }  # fmt: skip
    for field in dataclasses.fields(nb.Config):
        for value in wrong[field.type]:
            message = refusal(nb, **{field.name: value})
            assert message.startswith(f"{field.name}={value!r}: must be"), (field.name, message)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused(nb, case):
    changes, *words = case
    assert one_line(refusal(nb, **changes), *words)


def test_the_edges_are_accepted(nb):
    """The rules refuse nothing that works: each of these is one step inside of a refusal above."""
    for changes in (
        dict(n_kv_head=1), dict(n_kv_head=8), dict(vocab_size=257), dict(seq_len=2), dict(beta1=0),
        dict(beta2=0.0), dict(warmup_ratio=0.5), dict(warmup_ratio=0, warmdown_ratio=1), dict(total_batch_size=8192),
        dict(final_lr_frac=1), dict(attn_impl="pallas", window_pattern="L"), dict(attn_impl="splash", seq_len=128),
        dict(attn_impl="splash", seq_len=1536, splash_block_size=768), dict(num_shards=-1), dict(log_interval=0),
        dict(attn_impl="fused", seq_len=4096),
    ):  # fmt: skip
        nb.Config(**changes)
    assert type(nb.Config(softcap=15).softcap) is float  # or 15 and 15.0 would compile two programs


def test_replace_validates_and_suggests(nb):
    config = nb.Config()
    assert config.replace(n_head=4) == nb.Config(n_head=4)
    with pytest.raises(nb.InputError, match=r"'n_haed', did you mean 'n_head'\?"):
        config.replace(n_haed=4)
    with pytest.raises(nb.InputError, match="n_head=0: must be positive"):
        config.replace(n_head=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_head = 4
    with pytest.raises(TypeError):
        nb.Config(4)  # keyword-only


# ---- sizes


def test_reference_model(nb):
    config = nb.Config()
    assert (config.n_embd, config.depth, config.mlp_dim, config.kv_heads) == (1024, 16, 4096, 8)
    assert config.windows == [1024, 1024, 1024, 2048] * 4
    D, F, L, V = 1024, 4096, 16, 32768
    attn, mlp, total = L * (4 * D * D + 2), L * 2 * D * F, 268_435_488
    parts = {"embed": V * D, "attn": attn, "mlp": mlp, "lm_head": D * V, "total": total}
    assert nb.count_params(config) == parts and 2 * V * D + attn + mlp == total
    fewer = L * D * D * 3 // 2  # key and value weights shrink to 2/8
    assert nb.count_params(config.replace(n_kv_head=2)) == parts | {"attn": attn - fewer, "total": total - fewer}


@pytest.mark.parametrize(
    ("n_head", "pattern", "windows"),
    [(2, "S", "SSSL"), (2, "L", "LLLL"), (2, "LS", "LSLL"), (3, "SSSL", "SSSLSL"), (1, "SSSL", "SL")],
)
def test_the_last_layer_sees_the_whole_context(nb, n_head, pattern, windows):
    config = nb.Config(n_head=n_head, window_pattern=pattern)
    assert config.windows == [{"S": 1024, "L": 2048}[letter] for letter in windows]


def test_steps_and_batches(nb):
    """device_batch_size is a device's: a mesh multiplies it, unless total_batch_size holds the step to what it was."""
    config = nb.Config()
    assert (config.tokens_per_step, config.batch_shape) == (4 * 2048, (1, 4, 2048))
    bigger = config.replace(total_batch_size=65536)
    assert (bigger.tokens_per_step, bigger.batch_shape, bigger.grad_accum_steps) == (65536, (8, 4, 2048), 8)
    mesh = config.replace(mesh=(2, 4))
    assert (mesh.tokens_per_step, mesh.devices, mesh.batch_shape) == (65536, 8, (1, 32, 2048))
    assert mesh.replace(total_batch_size=2**17).batch_shape == (2, 32, 2048)
    assert config.total_steps == round(10 * 268_435_488 / 8192) == 327_680
    assert bigger.replace(target_param_data_ratio=20.0).total_steps == round(20 * 268_435_488 / 65536) == 81_920
    assert config.replace(num_iterations=7).total_steps == 7
    assert config.replace(target_param_data_ratio=1e-9).total_steps == 1


def test_a_mesh_as_it_may_be_written(nb):
    for written in ((2, 4), [2, 4], "2x4", "2,4", "(2, 4)"):
        config = nb.Config(mesh=written)
        assert config.mesh == config.mesh_shape == (2, 4)
        assert config == nb.Config(mesh=(2, 4)) and hash(config) == hash(nb.Config(mesh=(2, 4)))
    assert nb.parse_args(["--mesh", "1,8"], nb.Config.demo()).mesh == (1, 8)
    assert nb.Config().mesh_shape == (jax.device_count(), 1)
    with pytest.raises(nb.InputError, match=r"mesh=\(2, 4\): is of 8 devices, and here are 1"):
        nb.train(nb.Config.demo().replace(mesh=(2, 4)))


def test_weights_are_split_along_their_longest_axis(nb):
    """Of those that fsdp divides; a small or odd weight stays whole."""
    config = nb.Config(mesh=(1, 8))
    for shape, spec in {
        (1024, 4096): (None, "fsdp"), (4096, 1024): ("fsdp", None), (1024, 8, 128): ("fsdp", None, None),
        (8, 128, 1024): (None, None, "fsdp"), (): (), (3, 5): (None, None), (12, 8): (None, "fsdp"),
    }.items():  # fmt: skip
        assert nb.weight_spec(config, shape) == spec, shape
        assert nb.weight_spec(nb.Config(mesh=(8, 1)), shape) == (None,) * len(shape)


# ---- devices


@pytest.mark.parametrize(
    ("kind", "memory", "rows"),
    [("TPU v6 lite", None, 4), ("TPU v5 lite", None, 4), ("NVIDIA H100 80GB HBM3", 80e9, 4), ("NVIDIA L4", 22e9, 4),
     ("unknown", None, 1), ("gfx90a", 15e9, 1)],
)  # fmt: skip
def test_the_step_fits_the_device(nb, monkeypatch, kind, memory, rows):
    """Passes as large as the device allows; the tokens of a step are the same everywhere."""
    device = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: memory and {"bytes_limit": memory})
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    config = nb.Config.for_device()
    assert config.device_batch_size == rows and config.tokens_per_step == nb.Config().tokens_per_step
    assert config.replace(device_batch_size=4, total_batch_size=-1) == nb.Config()


@pytest.mark.parametrize(("capability", "dtype"), [("7.5", "float32"), ("8.0", "bfloat16"), ("gfx90a", "bfloat16")])
def test_a_gpu_without_bfloat16_computes_in_float32(nb, monkeypatch, capability, dtype):
    memory = {"bytes_limit": 14e9}
    device = types.SimpleNamespace(device_kind="Tesla T4", compute_capability=capability, memory_stats=lambda: memory)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    config = nb.Config.for_device()
    assert (config.compute_dtype, config.device_batch_size, config.grad_accum_steps) == (dtype, 1, 4)


def test_a_run_says_why_it_computes_in_float32(nb, monkeypatch, capsys):
    client = types.SimpleNamespace(platform_version="PJRT C API cuda 12080")
    device = types.SimpleNamespace(device_kind="Tesla T4", platform="gpu", compute_capability="7.5", client=client)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    nb.describe_machine(nb.Config(compute_dtype="float32", mesh=(1, 1)))
    assert "Tesla T4, float32 (it has no bfloat16 matmuls), peak 8 TFLOP/s" in capsys.readouterr().out


def test_the_demo_is_the_default_of_a_cpu(nb):
    demo, chosen = nb.Config.demo(), nb.Config.for_device()
    assert chosen.replace(compute_dtype="float32") == demo.replace(compute_dtype="float32")
    assert demo.dataset == chosen.dataset == "embedded" and nb.count_params(demo)["total"] < 10_000_000


CHIPS = {  # what jax calls each, and its dense peak in bfloat16, TFLOP/s by the vendor's data sheet; T4: float32
    "TPU v6 lite": 918, "TPU v5 lite": 197, "TPU v5p": 459, "TPU v5": 459, "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989, "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100 80GB PCIe": 312, "Tesla T4": 8.1, "NVIDIA L4": 121,
}  # fmt: skip
UNKNOWN = ("cpu", "NVIDIA L40S", "NVIDIA L40", "TPU v4", "TPU7x", "NVIDIA T400", "NVIDIA RTX A1000", "")


def test_peak_flops_does_not_guess(nb):
    """An MFU against the peak of another chip is worse than none: 'L4' is not 'L40S'."""
    want = {kind: peak * 1e12 for kind, peak in CHIPS.items()} | dict.fromkeys(UNKNOWN)
    assert {kind: nb.peak_flops(kind) for kind in want} == want


# ---- what compiles, and what a resumed run may change

COMPILED = dict(  # a changed value for each field that is compiled in
    n_head=4, n_kv_head=2, head_dim=64, aspect_ratio=32, vocab_size=4096, seq_len=1024, window_pattern="L",
    softcap=30.0, attn_impl="einsum", splash_block_size=512, compute_dtype="float32", device_batch_size=2,
    total_batch_size=16384, grad_clip=1.0, nonfinite="skip", mesh=(1, 1),
)  # fmt: skip
RESUME = """attn_impl splash_block_size compute_dtype mesh device_batch_size total_batch_size grad_clip nonfinite
    hf_repo_id run_dir resume log_interval eval_interval sample_interval save_interval keep_checkpoints backup
    profile_start profile_steps wandb_mode wandb_project eval_tokens final_eval_tokens"""


def test_what_each_declaration_means(nb):
    """option, runtime, free and host: whether a field is compiled in, and whether a resumed run may change it."""
    kinds = {"option": (True, False), "runtime": (True, True), "free": (False, False), "host": (False, True)}
    for kind, want in kinds.items():
        field = getattr(nb, kind)(3, "a sentence", nb.POSITIVE)
        assert (field.compare, field.metadata["resume"]) == want
        assert (field.default, field.metadata["help"], field.metadata["rule"]) == (3, "a sentence", nb.POSITIVE)
    fields = dataclasses.fields(nb.Config)
    assert {field.name for field in fields if field.metadata["resume"]} == set(RESUME.split())
    assert {field.name for field in fields if field.compare} == set(COMPILED)


def test_free_fields_do_not_recompile(nb):
    """A Config is a static argument: jit compiles anew where it differs in a compiled field, and only there."""
    traced = []
    program = jax.jit(lambda config, x: traced.append(config) or x * config.n_head)
    base, changed = nb.Config(), {int: 7, float: 0.01, str: "x", bool: True, "resume": "never", "wandb_mode": "offline"}
    program(base, 1.0)
    for field in dataclasses.fields(base):
        value = COMPILED.get(field.name) or changed.get(field.name, changed.get(field.type))
        assert value != getattr(base, field.name)
        program(base.replace(**{field.name: value}), 1.0)
        assert len(traced) == 1 + (field.name in COMPILED), field.name
        del traced[1:]
    assert not jax.tree.leaves(base)  # no leaf is traced: the whole Config is part of the program


# ---- the command line


def test_parse_args(nb):
    demo = nb.Config.demo()
    assert dataclasses.asdict(nb.parse_args([], demo)) == dataclasses.asdict(demo)
    given = "--n_head 2 --num_iterations=-1 --num_shards -1 --learning_rate=1e-3 --softcap 20 --dataset here"
    want = dict(n_head=2, num_iterations=-1, num_shards=-1, learning_rate=1e-3, softcap=20.0, dataset="here")
    parsed = nb.parse_args(given.split(), demo)
    assert dataclasses.asdict(parsed) == dataclasses.asdict(demo) | want and type(parsed.softcap) is float


MISTAKES = [
    ("--n_haed=4", "--n_haed", "did you mean 'n_head'?"),
    ("--n_hea 4", "--n_hea", "did you mean 'n_head'?"),  # no abbreviations: they change meaning with new fields
    ("--zzz 4", "--zzz"),
    ("stray", "stray"),
    ("--n_head 4.0", "--n_head", "int", "'4.0'"),
    ("--n_head=", "--n_head", "int", "''"),
    ("--softcap high", "--softcap", "float", "'high'"),
    ("--softcap nan", "softcap=nan", "finite"),
    ("--weight_decay -1", "weight_decay=-1.0", "negative"),
    ("--n_head --seed 3", "n_head", "expected one argument"),
    ("--preflight v6e", "05_preflight.py"),
    ("--scaling", "05_preflight.py"),
]


@pytest.mark.parametrize("case", MISTAKES, ids=str)
def test_parse_args_refuses(nb, case):
    with pytest.raises(nb.InputError) as error:
        nb.parse_args(case[0].split(), nb.Config.demo())
    assert one_line(str(error.value), *case[1:])


@pytest.mark.parametrize(
    ("line", "words"),
    [("--n_haed 4", ["--n_haed", "did you mean 'n_head'?"]),
     ("--dataset nowhere", ["dataset='nowhere'", "embedded", "karpathy/fineweb-edu-100b-shuffle"]),
     ("--run_dir file/run", ["run_dir='file/run'", "cannot write there"])],
)  # fmt: skip
def test_as_a_script_a_mistake_is_one_line(tmp_path, line, words):
    (tmp_path / "file").write_text("a regular file")
    done = script("02_train.py", *line.split(), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and one_line(done.stderr.rstrip("\n"), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help_has_a_sentence_for_each_field(nb, tmp_path):
    done = script("02_train.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    text = " ".join(done.stdout.split())
    for field in dataclasses.fields(nb.Config):
        sentence, rule = field.metadata["help"], field.metadata["rule"][0]
        assert sentence and f"--{field.name} " in text and " ".join(f"{sentence}; {rule}".strip("; ").split()) in text
