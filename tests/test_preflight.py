# ruff: noqa: E501  the lines of a compiled program are long
"""preflight: reads a compiled program right, and says in one line what is wrong. Real compiles run in processes of
their own: once libtpu is loaded where there is no TPU, jax.profiler may crash the process."""

import importlib.util
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

HAS_COMPILER = platform.system() == "Linux" and platform.machine() == "x86_64" and importlib.util.find_spec("libtpu")
SMALL = (
    "--n_head=1", "--head_dim=128", "--aspect_ratio=64", "--vocab_size=512", "--seq_len=256", "--splash_block_size=128",
)  # fmt: skip


def script(cwd, *options):
    env = {**os.environ, "HOME": str(cwd)}
    command = [sys.executable, str(ROOT / "02_train.py"), *options]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


# ---- the report, from the real compiler


@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is for Linux on x86_64")
def test_the_report(tmp_path):
    """Everything that a person is promised, for both chips, and nothing is trained or left behind but pictures."""
    done = script(tmp_path, "--preflight", "all", *SMALL, "--device_batch_size=2", "--total_batch_size=2048")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr.strip()  # libtpu's talk of TPU_WORKER_HOSTNAMES is not for the user
    for chip, hbm in (("v6e", "31.25"), ("v5e", "15.75")):
        report = done.stdout.partition(f"preflight on {chip}")[2].partition("picture")[0]
        assert re.search(rf"memory  [\d.]+ GiB of {hbm} at its peak: .*activations", report)
        assert re.search(r"time    [\d.]+ ms a step of 2,048 tokens: [\d,]+ tok/s, MFU [\d.]+%", report)
        assert "6 FLOPs a matmul weight" in report and "2 × 256 tokens × 4 a step" in done.stdout
        assert ("credits, $" in report) == (chip == "v6e")  # Colab's price of a v5e is not known here
        rows = re.findall(r"^ +([\w ]+?) +([\d.]+) +([\d.]+) +([\d.]+)%$", report, re.M)
        assert {"attention", "attention kernel", "MLP", "head and loss", "embedding"} <= {name for name, *_ in rows}
        assert abs(sum(float(share) for *_, share in rows) - 100) < 0.1 * len(rows)
        assert "NOT counted" not in report
    pictures = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert pictures == ["preflight-v5e.png", "preflight-v6e.png"]


@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is for Linux on x86_64")
def test_what_does_not_fit(tmp_path):
    """Out of HBM: by how much, the largest batch that does fit, found by compiling, and the accumulation for it."""
    done = script(tmp_path, "--preflight=v5e", *SMALL, "--device_batch_size=65536")
    assert done.returncode == 1, done.stdout + done.stderr
    need, have = map(float, re.search(r"out of HBM by .*: needs ([\d.]+) of ([\d.]+) GiB", done.stdout).groups())
    assert 15.75 <= have <= 16 and have < need  # libtpu 0.0.23 compares one buffer with all memory
    tried = re.findall(r"device_batch_size=(\d+) … (\w+)", done.stdout)
    assert len(tried) <= 4
    fits = max(int(size) for size, answer in tried if answer == "fits")
    assert str(2 * fits) in {size for size, answer in tried if answer == "out"}
    assert f"what fits: device_batch_size={fits}, total_batch_size={65536 * 256}: the same step in" in done.stdout
    assert f"in {65536 // fits} parts" in done.stdout


@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is for Linux on x86_64")
def test_a_kernel_over_vmem_is_named(tmp_path):
    options = (
        "--n_head=1",
        "--aspect_ratio=128",
        "--vocab_size=512",
        "--device_batch_size=1",
        "--attn_impl=splash",
        "--splash_block_size=2048",
    )
    done = script(tmp_path, "--preflight=v5e", *options)
    assert done.returncode == 1 and not done.stderr.strip()
    assert re.search(r"over VMEM in the kernel splash_mha_fwd\S*: [\d.]+M of 16.00M; try a smaller", done.stdout)
    assert "what fits" not in done.stdout  # another batch would not help


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preflight", "v7"], ["preflight='v7'", "v6e, v5e, or all"]),
        (["--preflight"], ["preflight=''", "v6e, v5e, or all"]),
        (["--preflight=v6e", "--n_haed=3"], ["--n_haed", "did you mean 'n_head'?"]),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, options, words):
    done = script(tmp_path, *options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and all(word in done.stderr for word in words)


def test_where_the_compiler_cannot_run(nb, monkeypatch):
    """One clear line; training does not need it."""
    with monkeypatch.context() as patch:
        patch.setattr(nb.platform, "system", lambda: "Darwin")
        with pytest.raises(nb.InputError, match="runs on Linux on x86_64, not on Darwin .*; training works here"):
            nb.require_compiler()
    with monkeypatch.context() as patch:
        patch.setattr(nb.platform, "system", lambda: "Linux")
        patch.setattr(nb.platform, "machine", lambda: "x86_64")
        patch.setattr(nb.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(nb.InputError, match="not installed: pip install flatbuffers"):
            nb.require_compiler()


def test_a_compiler_that_crashes_takes_nothing_with_it(nb, monkeypatch, capsys):
    """libtpu 0.0.52 has aborted on a real Config; a training session in the same process must outlive that."""
    words = "F1123 10:16:27.628217   28182 fusion_util.cc:5409] Check failed: window.pad_low[old_dim] == 0"
    monkeypatch.setattr(nb, "require_compiler", lambda: None)
    crash = f"import os, sys; open(sys.argv[1] + '/works', 'w'); print({words!r}, file=sys.stderr, flush=True); os.abort()"
    monkeypatch.setattr(nb, "COMPILER", crash)
    report = nb.preflight(nb.Config.demo(), "v6e")
    assert not report["fits"] and report["device_batch_size"] is None
    assert "the compiler itself crashed" in report["reason"] and "Check failed: window.pad_low" in report["reason"]
    assert report["reason"] in capsys.readouterr().out


def test_a_libtpu_that_needs_its_chip_is_not_the_last_word(nb, monkeypatch, tmp_path):
    """Colab's TPU runtime: the small program ends in a segmentation fault, and the compiler that jax asks for is taken."""
    compiler = """import os, pathlib, sys
if "TPU_LIBRARY_PATH" not in os.environ:
    os.abort()
pathlib.Path(sys.argv[1], "works").touch()
print(os.environ["TPU_LIBRARY_PATH"], *sys.argv[2:])"""
    monkeypatch.setattr(nb, "COMPILER", compiler)
    monkeypatch.setattr(nb, "own_libtpu", lambda: Path("ours/libtpu.so"))
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(nb.importlib.util, "find_spec", lambda name: name == "libtpu")
    done = nb.run_compiler(tmp_path, ["v6e:1x1", "3"], [])
    assert (done.returncode, done.stdout) == (0, "ours/libtpu.so v6e:1x1 3\n")


def test_a_compiler_that_cannot_be_had_is_one_line(nb, monkeypatch, tmp_path):
    """Nothing of it is left behind, so that the next try begins anew."""
    monkeypatch.setattr(nb, "cache_dir", lambda: tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(nb.InputError, match=r"cannot install libtpu==[\d.*]+ \(.*\); check the network"):
        nb.own_libtpu()
    assert not list(tmp_path.iterdir())


def test_chips_from_the_command_line(nb):
    assert nb.preflight_option(["--n_head", "4"]) == ([], ["--n_head", "4"])
    assert nb.preflight_option(["--preflight", "v5e", "--n_head=4"]) == (["v5e"], ["--n_head=4"])
    assert nb.preflight_option(["--preflight=all"]) == (["v6e", "v5e"], [])


# ---- reading a program


PROGRAM = """\
HloModule jit_train_step

%fused_matmul (a: bf16[512,256], b: bf16[256,128]) -> f32[512,128] {
  %a = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %conv = f32[512,128]{1,0:T(8,128)} convolution(%a, %b), dim_labels=bf_io->bf
}

%fused_gather (table: f32[4096,128], rows: s32[16]) -> f32[16,128] {
  %table = f32[4096,128]{1,0} parameter(0)
  %rows = s32[16]{0} parameter(1)
  ROOT %gather = f32[16,128]{1,0} gather(%table, %rows), slice_sizes={1,128}
}

%fused_update (whole: f32[64,128], part: f32[1,128], at: s32[]) -> f32[64,128] {
  %whole = f32[64,128]{1,0} parameter(0)
  %part = f32[1,128]{1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %update = f32[64,128]{1,0} dynamic-update-slice(%whole, %part, %at, %at)
}

%body (x: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %x = (s32[], f32[64,128]{1,0}) parameter(0)
  %state = f32[64,128]{1,0} get-tuple-element(%x), index=1
  %small = f32[1,128]{1,0} fusion(%state), kind=kLoop, calls=%fused_x, backend_config={"estimated_cycles":"100"}
  %zero = s32[] constant(0)
  %in_place = f32[64,128]{1,0} fusion(%state, %small, %zero), kind=kLoop, calls=%fused_update, backend_config={"estimated_cycles":"10"}
  ROOT %out = (s32[], f32[64,128]{1,0}) tuple(%zero, %in_place)
}

%condition (x: (s32[], f32[64,128])) -> pred[] {
  %x.1 = (s32[], f32[64,128]{1,0}) parameter(0)
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%x.1, %limit), direction=LT
}

ENTRY %main (p0: bf16[512,256], p1: bf16[256,128], p2: f32[4096,128], p3: s32[16]) -> f32[512,128] {
  %p0 = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[256,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %p2 = f32[4096,128]{1,0} parameter(2)
  %p3 = s32[16]{0} parameter(3)
  %rows = f32[16,128]{1,0} fusion(%p2, %p3), kind=kLoop, calls=%fused_gather, metadata={op_name="jit(train_step)/jvp(embed)/gather"}, backend_config={"estimated_cycles":"18446744073709551615"}
  %init = (s32[], f32[64,128]{1,0}) tuple(%p3, %p2)
  %loop = (s32[], f32[64,128]{1,0}) while(%init), condition=%condition, body=%body
  %copy-start.1 = (f32[64,128]{1,0}, f32[64,128]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%p2)
  %kernel = (bf16[2,4,2048,128]{3,2,1,0}, f32[2,4,2048,128]{3,2,1,0}) custom-call(%p3, %p3), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,2,2]{2,1,0}, s8[1,2,2]{2,1,0}, bf16[2,4,2048,128]{3,2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024, \\"block_kv\\": 1024}"
}}, metadata={op_name="jit(train_step)/jvp(layer_01)/attn/splash_mha_fwd/pallas_call"}
  ROOT %product = f32[512,128]{1,0:T(8,128)} fusion(%p0, %p1), kind=kOutput, calls=%fused_matmul, metadata={op_name="jit(train_step)/transpose(jvp(layer_00))/mlp/dot_general"}, backend_config={"estimated_cycles":"5000"}
}
""".replace("calls=%fused_x, ", "")


@pytest.fixture
def ops(nb):
    return {op.name: op for op in nb.schedule(PROGRAM)}


def test_what_runs_and_how_often(ops):
    assert {name: op.times for name, op in ops.items()} == {
        "rows": 1, "small": 7, "in_place": 7, "copy-start.1": 1, "kernel": 1, "product": 1,
    }  # fmt: skip
    assert ops["product"].cycles == 5000 and ops["small"].cycles == 100
    assert ops["rows"].cycles == 0  # the compiler's way to say that it does not know


def test_traffic(ops):
    """What lies in VMEM, S(1), costs nothing; of a table only the rows that are read; of an update only the update."""
    assert ops["product"].traffic == 512 * 256 * 2 + 512 * 128 * 4
    assert ops["rows"].traffic == 2 * 16 * 128 * 4 + 16 * 4
    assert ops["in_place"].traffic == 2 * 128 * 4 + 4
    assert ops["small"].traffic == 64 * 128 * 4 + 128 * 4


NESTED = """\
HloModule jit_step

%slices (stack: f32[24,64,128], at: s32[]) -> f32[64,128] {
  %stack = f32[24,64,128]{2,1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  %slice = f32[1,64,128]{2,1,0} dynamic-slice(%stack, %at.1, %at.1, %at.1), dynamic_slice_sizes={1,64,128}
  ROOT %flat = f32[64,128]{1,0} bitcast(%slice)
}

%fused_layer (out: f32[24,64,128], saved: f32[24,64,128], at: s32[]) -> f32[24,64,128] {
  %out = f32[24,64,128]{2,1,0} parameter(0)
  %saved = f32[24,64,128]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %same = f32[24,64,128]{2,1,0} bitcast(%saved)
  %one = f32[64,128]{1,0} fusion(%same, %at), kind=kLoop, calls=%slices
  %row = f32[1,64,128]{2,1,0} bitcast(%one)
  ROOT %update = f32[24,64,128]{2,1,0} dynamic-update-slice(%out, %row, %at, %at, %at)
}

ENTRY %main (p0: f32[24,64,128], p1: f32[24,64,128], p2: s32[]) -> f32[24,64,128] {
  %p0 = f32[24,64,128]{2,1,0} parameter(0)
  %p1 = f32[24,64,128]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %layer = f32[24,64,128]{2,1,0} fusion(%p0, %p1, %p2), kind=kLoop, calls=%fused_layer
}
"""


def test_traffic_of_a_scanned_layer(nb):
    """One slice of 24 is read, in a fusion inside the fusion and behind bitcasts, and one is written."""
    (op,) = nb.schedule(NESTED)
    assert op.traffic == 2 * 64 * 128 * 4 + 4
    (op,) = nb.schedule(NESTED.replace("fusion(%same, %at)", "fusion(%same, %same)"))  # now it reads all as an index
    assert op.traffic == 24 * 64 * 128 * 4 + 64 * 128 * 4 + 4


def test_a_longer_known_trip_count_wins(nb):
    text = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
    assert {op.name: op.times for op in nb.schedule(text)}["small"] == 9


def test_matmul_flops(nb, ops):
    assert math.isclose(ops["product"].matmul_flops, 2 * 512 * 256 * 128) and ops["rows"].matmul_flops == 0
    full = PROGRAM.replace("bf16[512,256]", "f32[512,256]")  # float32 operands are not overlapped
    assert {op.name: op for op in nb.schedule(full)}["product"].matmul_flops == 0


def test_components(nb, ops):
    assert nb.component(ops["product"]) == ("MLP", "backward") and nb.component(ops["rows"]) == ("embedding", "forward")
    assert nb.component(ops["kernel"]) == ("attention kernel", "forward")
    scopes = {
        "jit(train_step)/optimizer/mul": ("optimizer", "forward"),
        "jit(train_step)/while/body/transpose(jvp(lm_head))/dot": ("head and loss", "backward"),
        "jit(train_step)/jvp(loss)/log": ("head and loss", "forward"),
        "jit(train_step)/transpose(jvp(layer_03))/attn/mul": ("attention", "backward"),
        "jit(train_step)/convert_element_type": ("other", "forward"),
    }
    for scope, want in scopes.items():
        assert nb.component(ops["small"]._replace(scope=scope)) == want


def test_seconds_of_an_op(nb, ops):
    """The slowest of HBM, matrix unit and what is left for the vector unit."""
    op, chip = ops["small"], nb.CHIPS["v6e"]
    bandwidth, matmul = nb.REACHED_BANDWIDTH * chip.bandwidth, nb.REACHED_MATMUL * 918e12
    assert nb.op_seconds(op._replace(cycles=0, traffic=1e9), "v6e") == 1e9 / bandwidth
    assert nb.op_seconds(op._replace(cycles=10**6, traffic=0), "v6e") == 1e6 / chip.clock
    flops = 0.9 * 1e6 / chip.clock * matmul  # nine tenths of the estimate are the matmul: its epilogue is hidden
    op = op._replace(cycles=10**6, traffic=0, matmul_flops=flops)
    assert math.isclose(nb.op_seconds(op, "v6e"), 0.9 * 1e6 / chip.clock)
    assert math.isclose(nb.op_seconds(op._replace(matmul_flops=flops / 9), "v6e"), 0.9 * 1e6 / chip.clock)
    assert nb.op_seconds(op._replace(matmul_flops=9 * flops), "v6e") == 1e6 / chip.clock  # never more than estimated


def test_seconds_of_splash(nb, ops):
    """By hand: 2 sequences × 4 heads, 2 × 2 blocks of 1024, of which causal attention needs 3."""
    op, clock = ops["kernel"]._replace(name="splash_mha_fwd_residuals.1"), 1.75e9
    block, step = 3482 / clock, 220 / clock
    want = 8 * (3 * (block + step) + 1 * 0.5e-6 + 0.5 * 2048 / clock)
    assert math.isclose(nb.splash_seconds(op, "v6e", [2048, 2048]), want)
    windowed = 8 * (3 * (1.36 * block + step) + 0.5e-6 + 0.5 * 2048 / clock)
    assert math.isclose(nb.splash_seconds(op, "v6e", [2048, 1024]), windowed)  # the window of layer 1
    small = op._replace(rest=op.rest.replace("1024", "128").replace("s8[1,2,2]", "s8[1,16,9]"))
    want = 8 * (16 * 9 * 0.5e-6 + 0.5 * 2048 / clock)  # 233 + 220 cycles are less than the least time of a step
    assert math.isclose(nb.splash_seconds(small, "v6e", [2048, 1024]), want)
    by_scope = nb.splash_seconds(ops["kernel"], "v6e", [2048, 2048])  # whatever its name, its scope says what it is
    assert math.isclose(by_scope, nb.splash_seconds(op, "v6e", [2048, 2048]))
    assert nb.splash_seconds(ops["kernel"]._replace(scope="layer_01/attn"), "v6e", [2048, 2048]) is None


def test_a_kernel_that_cannot_be_counted_is_named(nb):
    parts, unknown = nb.estimate(PROGRAM.replace("splash_mha_fwd", "attention"), "v6e", [2048, 1024])
    assert unknown == ["kernel"]
    assert ("attention kernel", "forward") in parts and all(seconds >= 0 for seconds in parts.values())
    parts, unknown = nb.estimate(PROGRAM, "v6e", [2048, 1024])
    assert unknown == []


SCHEDULE = [(0, "before")] + [(1, "loop")] * 30 + [(1, "sbr.rel (%p1) target = $region9")]
SCHEDULE += [(1, "body")] * 100 + [(1, "sbr.rel (%p2) target = $region5")] + [(1, "once")] * 40
SCHEDULE += [(1, "End region 5")] + [(1, "body")] * 60 + [(1, "End region 9"), (1, "loop"), (0, "after")]


def test_cycles_of_a_program(nb):
    """All bundles in the grid's loop; what the first of four query heads does for all of them counts a quarter."""
    assert nb.branches(SCHEDULE) == [(32, 203), (133, 41)]
    inside = sum(depth for depth, _ in SCHEDULE)
    assert nb.program_cycles(SCHEDULE, 1) == inside
    assert nb.program_cycles(SCHEDULE, 4) == inside - 41 * 3 / 4


def test_bundles_of_a_schedule(nb, tmp_path):
    """One a line, with the depth of its loop; what goes on in the next line belongs to it."""
    (tmp_path / "bundles").write_text(
        "// a comment\n     0x0   :  { %s1 = inlined }\n    0x1 LB: > { %v1 = vadd  ;;\n  %v2 = vmul }\n  0x2   : > > { nop }\n"
    )
    found = nb.bundles(tmp_path / "bundles")
    assert [depth for depth, _ in found] == [0, 1, 2]
    assert "vadd" in found[1][1] and "vmul" in found[1][1]


@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is for Linux on x86_64")
def test_seconds_of_fused_attention(nb):
    """From the schedules of the real kernels: backward costs more than forward, two query heads more than one; none
    where the model uses another kernel. 256 tokens of a head of 128 take some thousand cycles."""
    config = nb.Config(n_head=2, n_kv_head=1, seq_len=256, window_pattern="SL", aspect_ratio=128, device_batch_size=4)
    found = nb.attention_seconds(config, "v6e")
    forward, backward = "attention_forward_kernel", "attention_backward_kernel"
    assert set(found) == {(kernel, window) for kernel in (forward, backward) for window in (128, 256)}
    assert 1.3 * found[forward, 256] < found[backward, 256] < 4 * found[forward, 256]
    cycles = found[forward, 256] / (4 * 2) * 1.75e9
    assert 500 < cycles < 2000
    assert nb.attention_seconds(config.replace(attn_impl="splash"), "v6e") == {}
    op = nb.Op("attention_forward_kernel.3", "custom-call", "jvp(layer_01)/attn", 1, 0, 0.0, 0.0, [], "tpu_custom_call")
    assert nb.kernel_seconds(op, "v6e", config.windows, found) == found[forward, 256]
    assert nb.kernel_seconds(op._replace(scope="jvp(layer_00)"), "v6e", config.windows, found) == found[forward, 128]
    assert nb.kernel_seconds(op, "v6e", config.windows, {}) is None
    assert nb.component(op) == ("attention kernel", "forward")


def test_reasons(nb):
    hbm = RuntimeError(
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (31.88G) exceeds available HBM (15.75G). HLO module: jit_train_step.\nSee https://openxla.org"
    )
    assert nb.reason(hbm) == ("out of HBM by 16.13 GiB: needs 31.88 of 15.75 GiB", 31.88 * 2**30)
    other = RuntimeError("INTERNAL: Mosaic failed\n\n  to compile")
    for words in (  # libtpu 0.0.23: one buffer that is larger than all memory, and a program that is
        "RESOURCE_EXHAUSTED: Allocation (size=34359738368) would exceed memory (size=17179869184) :: #allocation310",
        "Ran out of memory in memory space hbm. Used 32.00G of 16.00G hbm. Exceeded hbm capacity by 16.00G.",
    ):
        why, needed = nb.reason(words)
        assert why.startswith("out of HBM by 16.00 GiB: needs 32.00 of 16.00 GiB") and needed == 2**35
    assert nb.reason(other) == ("INTERNAL: Mosaic failed   to compile", None)


# ---- several chips


@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is for Linux on x86_64")
@pytest.mark.parametrize("mesh", ["1x8", "auto"])
def test_the_report_of_a_slice(tmp_path, mesh):
    """Eight chips: memory of each, the whole rate and a chip's, communication as a component, what is waited for."""
    done = script(tmp_path, "--preflight=v6e:2x4", *SMALL, "--device_batch_size=2", f"--mesh={mesh}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr.strip()
    shape = "8 × 1" if mesh == "auto" else "1 × 8"
    assert (
        f"preflight on v6e:2x4: 0.5M parameters, 2 × 256 tokens × 1 a step on each chip of a mesh {shape}"
        in done.stdout
    )
    assert re.search(r"memory  [\d.]+ GiB of 31.25 on each chip at its peak", done.stdout)
    rate, each = re.search(r"a step of 4,096 tokens: ([\d,]+) tok/s, ([\d,]+) a chip, MFU", done.stdout).groups()
    assert math.isclose(int(rate.replace(",", "")), 8 * int(each.replace(",", "")), rel_tol=1e-3)
    assert "credits" not in done.stdout  # Colab has no slices
    sent, exposed = map(
        float, re.search(r"send    ([\d.]+) ms a step, of which ([\d.]+) are not", done.stdout).groups()
    )
    assert 0 < exposed <= sent
    assert ("× all-gather of" in done.stdout) == (mesh == "1x8")
    shares = dict(re.findall(r"^ +([\w ]+?) +[\d.]+ +[\d.]+ +([\d.]+)%$", done.stdout, re.M))
    assert "communication" in shares and abs(sum(map(float, shares.values())) - 100) < 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["preflight-v6e-2x4.png"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preflight", "v6e:3x5"], ["preflight='v6e:3x5'", "v6e:2x4"]),
        (["--preflight", "v6e:2x4", "--mesh=2x2"], ["mesh=(2, 2)", "the 8 chips of v6e:2x4"]),
        (["--preflight", "v6e", "--mesh=1x8"], ["mesh=(1, 8)", "the 1 chips of v6e"]),
        (["--scaling", "v6e:2x4"], ["scaling='v6e:2x4'", "v6e, v5e"]),
    ],
)
def test_a_wrong_slice_is_one_line(tmp_path, options, words):
    done = script(tmp_path, *options, *SMALL)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and all(word in done.stderr for word in words)


def test_devices_of_a_mesh(nb):
    """As many as the mesh says, each once."""
    config = nb.Config(mesh=(2, 2))
    arranged = nb.arrange(config, nb.jax.devices() * 4 if len(nb.jax.devices()) == 1 else nb.jax.devices()[:4])
    assert arranged.shape == (2, 2)
    with pytest.raises(nb.InputError, match=r"mesh=\(2, 2\).*there are 3 devices"):
        nb.arrange(config, nb.jax.devices()[:1] * 3)


def test_scaled_configs(nb):
    """The same tokens a chip, or the same tokens a step in as few passes as fit; fsdp over eight chips at most."""
    config = nb.Config()
    assert [nb.scaled(config, n).tokens_per_step for n in (1, 8, 64)] == [4 * 2048, 32 * 2048, 256 * 2048]
    total = 64 * 2048
    strong = [nb.scaled(config, n, total) for n in (1, 8, 64)]
    assert [c.tokens_per_step for c in strong] == [total] * 3
    assert [(c.device_batch_size, c.grad_accum_steps) for c in strong] == [(4, 16), (4, 2), (1, 1)]
    assert all(c.devices == n for c, n in zip(strong, (1, 8, 64), strict=True))


def test_links_of_groups(nb):
    """A slice of 2×4 has no ring but around its edge: two links a chip. In a line, the last chip has one; an axis of
    16 closes."""
    edge = [[(0, 0), (1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (1, 3), (0, 3)]]
    assert nb.links_of_groups(edge, (2, 4)) == {8: 2}
    square = [[(x, y) for y in range(8)] for x in range(8)]
    assert nb.links_of_groups(square, (8, 8)) == {8: 1, 64: 2}
    assert nb.links_within([(0, y) for y in range(16)], (16, 16)) == 2
    assert nb.links_of_groups([[(0, 0)]], (1, 1)) == {}


SENDING = """\
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%aside (shard: bf16[128,1024]) -> bf16[1024,1024] {
  %shard = bf16[128,1024]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[1024,1024]{1,0} all-gather(%shard), replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp'}, dimensions={0}, backend_config={"color_strategies":[{"phase_rings":[{"ring_type":"CW","core_count":"8"}]},{"phase_rings":[{"ring_type":"CCW","core_count":"8"}]}]}
}, execution_thread="sparsecore"

%all-reduce-scatter (g: f32[1024,128]) -> f32[128,128] {
  %g = f32[1024,128]{1,0} parameter(0)
  %all-reduce.7 = f32[1024,128]{1,0} all-reduce(%g), replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[128,128]{1,0} dynamic-slice(%all-reduce.7, %zero, %zero), dynamic_slice_sizes={128,128}
}

ENTRY %main (p0: bf16[128,1024], p1: f32[1024,128], p2: f32[256]) -> f32[128,128] {
  %p0 = bf16[128,1024]{1,0} parameter(0)
  %p1 = f32[1024,128]{1,0} parameter(1)
  %p2 = f32[256]{0} parameter(2)
  %gather.call-start = ((), (), (s32[1]{0:S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%aside
  %before = f32[256]{0} negate(%p2)
  %gather.call-update = ((bf16[128,1024]{1,0}), bf16[1024,1024]{1,0}) call-update(%gather.call-start, %p0)
  %between = f32[256]{0} negate(%before)
  %gather.call-done = bf16[1024,1024]{1,0} call-done(%gather.call-update)
  %all-reduce.9 = f32[256]{0} all-reduce(%between), replica_groups=[4,4]<=[16], to_apply=%add
  ROOT %scattered = f32[128,128]{1,0} fusion(%p1), kind=kCustom, calls=%all-reduce-scatter
}
"""


@pytest.fixture
def sending(nb):
    return {op.name: op for op in nb.schedule(SENDING)}


def test_collectives_of_a_program(nb, sending):
    """Kind, bytes of the whole, chips of a group, in each notation; what runs on another core is found behind its call,
    a sum of which each chip keeps a part is a reduce-scatter, and a scalar operation is none."""
    found = {name: op.collective for name, op in sending.items() if op.collective}
    assert found == {
        "gather.call-start": nb.Collective("all-gather", 1024 * 1024 * 2, 8, 2, 4),
        "all-reduce.9": nb.Collective("all-reduce", 256 * 4, 4, 2, 4),
        "scattered": nb.Collective("reduce-scatter", 1024 * 128 * 4, 8, 2, 4),
    }
    assert nb.group_size("source_target_pairs={{0,1},{1,0}}") == 2


def test_seconds_of_a_collective(nb):
    """By hand, at 90 GB/s a link: seven eighths of the bytes arrive, of a sum twice, over two links or one."""
    gather = nb.Collective("all-gather", 8 * 10**6, 8, 2, 4)
    assert math.isclose(nb.link_seconds(gather, "v6e", 2), 7e6 / 180e9 + 4e-6)
    assert math.isclose(nb.link_seconds(gather, "v6e", 1), 7e6 / 90e9 + 4e-6)
    assert math.isclose(nb.link_seconds(gather._replace(rings=1), "v6e", 2), 7e6 / 90e9 + 4e-6)
    assert math.isclose(nb.link_seconds(gather._replace(kind="all-reduce", hops=8), "v5e", 2), 14e6 / 90e9 + 8e-6)


def test_only_what_arithmetic_does_not_hide_is_waited_for(nb, sending):
    """The gather begins at its update, not at its start; the sum after it waits for the links, and the chip for it."""
    ops = list(sending.values())
    gather = nb.link_seconds(sending["gather.call-start"].collective, "v6e", 2)

    def exposed(between):
        seconds = [{"before": 1.0, "between": between}.get(op.name, 0.0) for op in ops]
        return {wait.sent.kind: wait.exposed for wait in nb.waits(ops, seconds, "v6e", {8: 2, 4: 2})}

    assert math.isclose(exposed(0.0)["all-gather"], gather)
    assert math.isclose(exposed(0.25 * gather)["all-gather"], 0.75 * gather)
    hidden = exposed(2 * gather)
    assert hidden["all-gather"] == 0 and hidden["all-reduce"] > 0 and hidden["reduce-scatter"] > 0
    links = {8: 2, 4: 2}
    parts, _, found = nb.timeline(SENDING, "v6e", [2048], links=links)
    waited = sum(seconds for (name, _), seconds in parts.items() if name == "communication")
    assert math.isclose(waited, sum(wait.exposed for wait in found)) and len(found) == 3
    assert ("communication", "backward") in parts  # gradients are summed
