# ruff: noqa: E501  the lines of a compiled program are long
"""05_preflight: reads programs and traces right, and says in one line what is wrong.

Real compiles run in processes of their own: once libtpu is loaded where there is no TPU, jax.profiler may crash.
"""

import importlib.util
import io
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import ALIGNED, ROOT, run_notebook, script
from tools.notebooks import load

LINUX = platform.system() == "Linux" and platform.machine() == "x86_64"
compiles = pytest.mark.skipif(
    not (LINUX and importlib.util.find_spec("libtpu")), reason="libtpu is for Linux on x86_64"
)
SMALL = dict(
    n_head=1, head_dim=128, aspect_ratio=64, vocab_size=512, seq_len=256, splash_block_size=128, device_batch_size=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def preflight():
    return load(ROOT / "05_preflight.py")


def ask(cwd, *words, **settings):
    """05_preflight.py as a script, about a small model of 02, unless a word names another notebook."""
    return script("05_preflight.py", *words, *(f"--{k}={v}" for k, v in settings.items()), cwd=cwd)


def table(text):
    """{component: share} of a report; the shares add up to 100%."""
    shares = {name: float(share) for name, share in re.findall(r"^ +([\w ]+?) +[\d.]+ +[\d.]+ +([\d.]+)%$", text, re.M)}
    assert abs(sum(shares.values()) - 100) < 1
    return shares


# ---- reports, from the real compiler


@compiles
def test_the_report_of_both_chips(tmp_path):
    """Everything that a person is promised, and nothing is trained or left behind but pictures."""
    done = ask(tmp_path, "02_train.py", "all", **SMALL, total_batch_size=2048)
    assert (done.returncode, done.stderr) == (0, "")  # libtpu's talk of TPU_WORKER_HOSTNAMES is not for the user
    assert "NOT counted" not in done.stdout
    for chip, hbm in (("v6e", "31.25"), ("v5e", "15.75")):
        report = done.stdout.partition(f"preflight on {chip}")[2].partition("picture")[0]
        assert "2 × 256 tokens × 4 a step" in report and "6 FLOPs a matmul weight" in report
        assert re.search(rf"memory  [\d.]+ GiB of {hbm} at its peak: .*activations", report)
        assert re.search(r"time    [\d.]+ ms a step of 2,048 tokens: [\d,]+ tok/s, MFU [\d.]+%", report)
        assert ("credits, $" in report) == (chip == "v6e")  # Colab's price of a v5e is not known here
        assert {"attention", "attention kernel", "MLP", "head and loss", "embedding"} <= set(table(report))
        assert re.search(rf"^ +{chip} +[\d.]+ +[\d,]+ +[\d.]+% +[\d.]+$", done.stdout, re.M)  # a line of the comparison
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["preflight-v5e.png", "preflight-v6e.png"]


@compiles
@pytest.mark.parametrize("mesh", ["1x8", pytest.param("auto", marks=pytest.mark.slow)])
def test_the_report_of_a_slice(tmp_path, mesh):
    """Memory of each chip, the whole rate and a chip's, communication as a component, what is waited for."""
    done = ask(tmp_path, "02_train.py", "v6e:2x4", **SMALL, mesh=mesh)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"× 1 a step on each chip of a mesh {'8 × 1' if mesh == 'auto' else '1 × 8'}" in done.stdout
    assert re.search(r"memory  [\d.]+ GiB of 31.25 on each chip at its peak", done.stdout)
    rates = re.search(r"a step of 4,096 tokens: ([\d,]+) tok/s, ([\d,]+) a chip, MFU", done.stdout).groups()
    rate, each = (int(number.replace(",", "")) for number in rates)
    assert math.isclose(rate, 8 * each, rel_tol=1e-3) and "credits" not in done.stdout  # Colab has no slices
    sent = re.search(r"send    ([\d.]+) ms a step, of which ([\d.]+) are not", done.stdout).groups()
    assert 0 < float(sent[1]) <= float(sent[0])
    assert ("× all-gather of" in done.stdout) == (mesh == "1x8") and "communication" in table(done.stdout)


@compiles
@pytest.mark.slow
def test_scaling(tmp_path):
    """Two tables of one, eight and 64 chips, with the efficiency of the first 100%, and a picture of them."""
    done = ask(tmp_path, "02_train.py", "--scaling=v6e", **SMALL | dict(device_batch_size=1))
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" +(1|8|64) ", line)]
    assert [row[0] for row in rows] == ["1", "8", "64"] * 2 and rows[0][5] == rows[3][5] == "100.00"
    assert [row[1] for row in rows] == ["256", "2,048", "16,384"] + ["16,384"] * 3
    assert (tmp_path / "runs/scaling-v6e.png").exists()


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(path.name for path in ROOT.glob("0[46]*.py")))
def test_other_notebooks(tmp_path, notebook):
    """Their step compiles, and its kernels are counted."""
    done = ask(tmp_path, notebook, "v6e", **(ALIGNED if notebook.startswith("04") else SMALL))
    assert (done.returncode, done.stderr) == (0, "") and "NOT counted" not in done.stdout
    assert "attention kernel" in table(done.stdout)


@compiles
def test_what_does_not_fit(tmp_path):
    """Out of HBM: by how much, a batch that fits, found by compiling, and the accumulation for it."""
    done = ask(tmp_path, "02_train.py", "v5e", **SMALL | dict(device_batch_size=65536))
    assert (done.returncode, done.stderr) == (1, ""), done.stdout
    need, have = map(float, re.search(r"out of HBM by .*: needs ([\d.]+) of ([\d.]+) GiB", done.stdout).groups())
    assert 15.75 <= have <= 16 and have < need  # libtpu 0.0.23 compares one buffer with all memory
    fits = int(re.search(r"what fits: --device_batch_size (\d+) --total_batch_size 16777216, in", done.stdout)[1])
    assert f"in {65536 // fits} passes" in done.stdout
    assert f"device_batch_size={2 * fits}: out of HBM" in done.stdout or 2 * fits > 65536 * have / need


@compiles
@pytest.mark.slow
def test_a_kernel_over_vmem_is_named(tmp_path):
    settings = dict(n_head=1, aspect_ratio=128, vocab_size=512, device_batch_size=1, attn_impl="splash")
    done = ask(tmp_path, "02_train.py", "v5e", **settings, splash_block_size=2048)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"over VMEM in the kernel splash_mha_fwd\S*: [\d.]+M of 16.00M; try a smaller", done.stdout)
    assert "what fits" not in done.stdout  # another batch would not help


@compiles
def test_the_notebook(tmp_path):
    """In a real kernel: no cell fails, the report is there, and its picture is shown."""
    shutil.copy(ROOT / "02_train.py", tmp_path)
    text, outputs = run_notebook("05_preflight.ipynb", tmp_path, **SMALL)
    assert "y: ('MLP', 'forward'), 0.51 µs" in text and "kind='all-gather', size=65536, chips=8), 4.32 µs" in text
    assert "fits    compiled in" in text and "image/png" in outputs[-1]["data"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


# ---- the command line


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["v7"], "topology='v7': must be one of v6e, v5e, or all"),
        (["02_train.py", "v6e:3x5"], "topology='v6e:3x5': .*v6e:2x4"),
        (["02_train.py", "v6e:2x4", "--mesh=2x2"], r"mesh=\(2, 2\): .* the 8 chips of v6e:2x4"),
        (["02_train.py", "v6e", "--n_haed=3"], "--n_haed.*did you mean 'n_head'?"),
        (["--scaling", "v6e:2x4"], "--scaling: .*v6e:2x4"),
        (["01_tokenizer.py"], "notebook='01_tokenizer.py': has no train_step"),
        (["04_maxtext.py", "--preset=huge"], "preset='huge': must be one of small"),
        (["--trace=nowhere"], "trace='nowhere': holds no trace"),
    ],
)
def test_a_wrong_option_is_one_line(preflight, capsys, words, answer):
    assert preflight.main(words) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and re.match(f"error: .*{answer}", error) and not out


def test_help_has_a_sentence_for_each_option(tmp_path):
    done = ask(tmp_path, "--help")
    assert done.returncode == 0 and not done.stderr
    for option in ("scaling CHIP", "trace RUN_DIR", "preset NAME", "help", "n_head"):
        assert re.search(rf"^  --{option}\b.*\s+\w+ \w+", done.stdout, re.M), option


def test_topologies_and_configs(preflight, nb):
    """Words before the options; all; the mesh that suits a topology; the same tokens a chip, or a step."""
    parse = preflight.parse_command
    assert parse([])[:2] == ("02_train.py", ["v6e"]) and parse(["--trace=x"])[1] == []
    assert parse(["04_maxtext.py", "all", "--n_head", "4"])[1::2] == (["v6e", "v5e"], ["--n_head", "4"])
    config = preflight.on_topology(nb.Config(), "v6e:2x4")
    assert (config.mesh, config.attn_impl) == ((8, 1), "fused")
    weak, strong = ([preflight.scaled(nb.Config(), n, total) for n in (1, 8, 64)] for total in (None, 64 * 2048))
    assert [c.tokens_per_step for c in weak] == [4 * 2048, 32 * 2048, 256 * 2048]
    assert [(c.tokens_per_step, c.device_batch_size) for c in strong] == [(64 * 2048, rows) for rows in (4, 4, 1)]


def test_a_notebook_from_github(preflight, monkeypatch):
    """Cells tagged `run` are not executed, lines stay where they are, and the address is in the traceback."""
    text = '# %% [markdown]\n# x\n# %% tags=["run"]\n1 / 0\n# %% Step\ndef train_step():\n    return 1 / 0\n'
    addresses = []
    monkeypatch.setattr(
        preflight.urllib.request, "urlopen", lambda url, timeout: addresses.append(url) or io.BytesIO(text.encode())
    )
    module = preflight.load_notebook("09_mine.py")
    assert addresses == [f"https://raw.githubusercontent.com/{preflight.GITHUB}/main/09_mine.py"]
    assert (module.train_step.__code__.co_firstlineno, module.train_step.__code__.co_filename) == (6, addresses[0])


# ---- the process of the compiler


def test_a_machine_without_the_compiler(preflight, monkeypatch):
    monkeypatch.setattr(preflight.platform, "system", lambda: "Darwin")
    with pytest.raises(preflight.InputError, match="runs on Linux on x86_64, not on Darwin .*; training works here"):
        preflight.compile_for("v6e", abs, [])


@pytest.mark.skipif(not LINUX, reason="elsewhere the compiler is refused before")
def test_a_compiler_that_crashes_takes_nothing_with_it(preflight, nb, monkeypatch, capsys):
    """libtpu 0.0.52 has aborted on a real Config."""
    words = "F1123 10:16:27.628217   28182 fusion_util.cc:5409] Check failed: window.pad_low[old_dim] == 0"
    crash = (
        f"import os, sys; open(sys.argv[1] + '/works', 'w'); print({words!r}, file=sys.stderr, flush=True); os.abort()"
    )
    monkeypatch.setattr(preflight, "COMPILER", crash)
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: True)
    report = preflight.preflight(nb.Config.demo(), "v6e")
    assert not report["fits"] and report["device_batch_size"] is None
    assert "the compiler itself crashed" in report["reason"] and "Check failed: window.pad_low" in report["reason"]
    assert report["reason"] in capsys.readouterr().out


def test_a_libtpu_that_needs_its_chip_is_not_the_last_word(preflight, monkeypatch, tmp_path, capsys):
    """Colab's TPU runtime: the small program ends in a segmentation fault, and the libtpu that jax asks for is taken."""
    compiler = """import os, pathlib, sys
if "TPU_LIBRARY_PATH" not in os.environ:
    os.abort()
pathlib.Path(sys.argv[1], "works").touch()
print(os.environ["TPU_LIBRARY_PATH"], os.environ["LIBTPU_INIT_ARGS"], *sys.argv[2:])"""
    monkeypatch.setattr(preflight, "COMPILER", compiler)
    monkeypatch.setattr(preflight, "own_libtpu", lambda: Path("ours/libtpu.so"))
    monkeypatch.setenv("TPU_LIBRARY_PATH", "")  # so that it is restored
    monkeypatch.delenv("TPU_LIBRARY_PATH")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--mine")
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: True)
    done = preflight.run_compiler(tmp_path, ["v6e:1x1", "3"], "--theirs")
    assert (done.returncode, done.stdout) == (0, "ours/libtpu.so --theirs --mine v6e:1x1 3\n")
    assert "the installed libtpu compiles nothing here" in capsys.readouterr().out
    assert os.environ["TPU_LIBRARY_PATH"] == "ours/libtpu.so"  # the next program begins with it


def test_a_compiler_that_cannot_be_had_is_one_line(preflight, monkeypatch, tmp_path):
    """Nothing of it is left behind, so that the next try begins anew."""
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {"INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "0", "CONFIG_FILE": os.devnull}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(preflight.InputError, match=r"cannot install libtpu==[\d.*]+ \(.*\); check the network"):
        preflight.own_libtpu()
    assert not list((tmp_path / ".cache/tpuchat").iterdir())


@pytest.mark.colab
def test_a_runtime_of_colab_with_a_tpu(tmp_path):
    """Its libtpu 0.0.21.1 crashes without its chip, so jax 0.7.2's own is installed beside the runtime. Time and peak
    are then within 5% of what this jax and its libtpu say, and the runtime stays as it was."""
    from tools import colab

    try:
        venv = colab.build("tpu")
    except colab.Wrong as wrong:
        pytest.skip(wrong.args[1])
    copy, environment = colab.prepare(tmp_path, venv)
    pip = [copy / "bin/python", "-m", "pip", "install", "--quiet", "tiktoken", "flatbuffers"]  # as the first cell does
    subprocess.run(pip, env=environment, check=True)
    before = colab.packages_of(copy)

    def figures(python, env):
        command = [python, ROOT / "05_preflight.py", "02_train.py", "v6e", "--aspect_ratio", "512"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "NOT counted" not in done.stdout, done.stdout + done.stderr
        patterns = r"memory  ([\d.]+) GiB", r"time    ([\d.]+) ms", r"attention kernel +([\d.]+)"
        return done.stdout, [float(re.search(pattern, done.stdout)[1]) for pattern in patterns]

    text, have = figures(copy / "bin/python", environment)
    assert "installing libtpu==0.0.23 into " in text and colab.packages_of(copy) == before
    assert have == pytest.approx(figures(sys.executable, os.environ)[1], rel=0.05)


def test_what_the_compiler_says(preflight):
    hbm = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (31.88G) exceeds available HBM (15.75G). HLO module: jit_train_step.\nSee https://openxla.org"
    )
    assert preflight.explain(hbm) == ("out of HBM by 16.13 GiB: needs 31.88 of 15.75 GiB", 31.88 * 2**30)
    for words in (  # libtpu 0.0.23: one buffer that is larger than all memory, and a program that is
        "RESOURCE_EXHAUSTED: Allocation (size=34359738368) would exceed memory (size=17179869184) :: #allocation310",
        "Ran out of memory in memory space hbm. Used 32.00G of 16.00G hbm. Exceeded hbm capacity by 16.00G.",
    ):
        assert preflight.explain(words) == ("out of HBM by 16.00 GiB: needs 32.00 of 16.00 GiB", 2**35)
    assert preflight.explain("INTERNAL: Mosaic failed\n\n  to compile") == (
        "INTERNAL: Mosaic failed   to compile",
        None,
    )


# ---- reading a program

PROGRAM = """\
HloModule jit_train_step

%body (x: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %x = (s32[], f32[64,128]{1,0}) parameter(0)
  %state = f32[64,128]{1,0} get-tuple-element(%x), index=1
  %small = f32[64,128]{1,0} fusion(%state), kind=kLoop, backend_config={"estimated_cycles":"100"}
  ROOT %out = (s32[], f32[64,128]{1,0}) tuple(%zero, %small)
}

%condition (x: (s32[], f32[64,128])) -> pred[] {
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%x.1, %limit), direction=LT
}

%short (x: f32[64,128]) -> f32[64,128] {
  ROOT %a = f32[64,128]{1,0} fusion(%x), backend_config={"estimated_cycles":"10"}
}

%long (x: f32[64,128]) -> f32[64,128] {
  ROOT %b = f32[64,128]{1,0} fusion(%x), backend_config={"estimated_cycles":"1000"}
}

ENTRY %main (p0: bf16[512,256], p1: bf16[256,128], p2: f32[4096,128], p3: s32[16]) -> f32[512,128] {
  %p0 = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[256,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %rows = f32[16,128]{1,0} fusion(%p2, %p3), kind=kLoop, calls=%fused_gather, metadata={op_name="jit(train_step)/jvp(embed)/gather"}, backend_config={"estimated_cycles":"18446744073709551615"}
  %loop = (s32[], f32[64,128]{1,0}) while(%init), condition=%condition, body=%body
  %either = f32[64,128]{1,0} conditional(%p3, %p2, %p2), branch_computations={%short, %long}
  %copy-start.1 = (f32[64,128]{1,0}, f32[64,128]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%p2), backend_config={"estimated_cycles":"7"}
  %kernel = (bf16[2,4,2048,128]{3,2,1,0}, f32[2,4,2048,128]{3,2,1,0:S(1)}) custom-call(%p0, %p3), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024, \\"block_kv\\": 1024}"
}}, metadata={op_name="jit(train_step)/jvp(layer_01)/attn/splash_mha_fwd/pallas_call"}
  ROOT %product = f32[512,128]{1,0:T(8,128)} fusion(%p0, %p1), kind=kOutput, calls=%fused_matmul, metadata={op_name="jit(train_step)/transpose(jvp(layer_00))/mlp/dot_general"}, backend_config={"estimated_cycles":"5000"}
}
"""


def test_what_runs_and_how_often(preflight):
    """A loop's body as often as its condition's constant says, or a known trip count; the longest branch; the bytes of
    what does not lie in VMEM, S(1)."""
    program = {x.name: x for x in preflight.execution_order(PROGRAM)}
    assert {name: (x.times, x.cycles) for name, x in program.items()} == {
        "rows": (1, 0), "small": (7, 100), "b": (1, 1000), "copy-start.1": (1, 7), "kernel": (1, 0), "product": (1, 5000),
    }  # fmt: skip
    known = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
    assert {x.name: x.times for x in preflight.execution_order(known)}["small"] == 9
    assert program["product"].bytes == 512 * 256 * 2 + 512 * 128 * 4
    assert program["kernel"].bytes == 512 * 256 * 2 + 2 * 4 * 2048 * 128 * 2
    found = [preflight.component(program[name]) for name in ("product", "rows", "kernel")]
    assert found == [("MLP", "backward"), ("embedding", "forward"), ("attention kernel", "forward")]


@pytest.mark.parametrize(
    ("scope", "want"),
    [
        ("jit(train_step)/optimizer/mul", ("optimizer", "forward")),
        ("jit(train_step)/while/body/transpose(jvp(lm_head))/dot", ("head and loss", "backward")),
        ("jit(train_step)/jvp(loss)/log", ("head and loss", "forward")),
        ("jit(train_step)/transpose(jvp(layer_03))/attn/mul", ("attention", "backward")),
        ("jit(train_step)/convert_element_type", ("other", "forward")),
    ],
)
def test_components(preflight, scope, want):
    assert preflight.component(preflight.Instruction("add.1", "", "add", f'op_name="{scope}"')) == want


def test_estimate(preflight):
    """Cycles at the chip's clock; copies run beside them; kernels by their table, one that is not in it by its bytes."""
    kernels, bytes_ = {("splash_mha_fwd", 1024): 0.25}, (512 * 256 * 2 + 2**22) / 1.6e12
    answer = preflight.estimate(PROGRAM, "v6e", [2048, 1024], kernels)
    assert answer.parts["MLP", "backward"] == 5000 / 1.75e9 and answer.parts["attention kernel", "forward"] == 0.25
    assert math.isclose(answer.seconds, 0.25 + (5000 + 7 * 100 + 1000) / 1.75e9) and not answer.uncounted
    unknown = preflight.estimate(PROGRAM, "v6e", [2048, 2048], kernels)  # another window in layer 1
    assert unknown.uncounted == ["kernel"] and math.isclose(unknown.parts["attention kernel", "forward"], bytes_)


# ---- kernels


def test_seconds_of_a_kernel(preflight, tmp_path):
    """All bundles of the loop for a step that computes, those outside the longest branch for one that is skipped, half a
    microsecond at least; what one of four query heads does for all of them counts a quarter."""
    bundles = [(0, "before")] + [(1, "loop")] * 30 + [(1, "sbr.rel (%p1) target = $region9")]
    bundles += [(1, "body")] * 2000 + [(1, "sbr.rel (%p2) target = $region5")] + [(1, "once")] * 40
    bundles += [(1, "End region 5")] + [(1, "body")] * 60 + [(1, "End region 9"), (1, "loop"), (0, "after")]
    assert preflight.branches(bundles) == [(32, 2103), (2033, 41)]
    loop = sum(depth for depth, _ in bundles)
    assert preflight.head_seconds(bundles, "v6e") == loop / 1.75e9
    assert math.isclose(preflight.head_seconds(bundles, "v6e", group=4), (loop - 41 * 3 / 4) / 1.75e9)
    assert math.isclose(preflight.head_seconds(bundles, "v6e", 4, 3), 3 * loop / 1.75e9 + 0.5e-6)
    (tmp_path / "file").write_text(
        "// a comment\n     0x0   :  { %s1 = inlined }\n    0x1 LB: > { %v1 = vadd  ;;\n  %v2 = vmul }\n  0x2   : > > { nop }\n"
    )
    read = preflight.read_bundles(tmp_path / "file")
    assert [depth for depth, _ in read] == [0, 1, 2] and "vadd" in read[1][1] and "vmul" in read[1][1]


def test_the_grid_of_splash(preflight):
    """Of 2 × 2 blocks causal attention sees 3; with a window of 1024 in blocks of 512 a row sees 3 at most."""
    assert preflight.grid(2048, 1024, 2048) == (4, 3)
    assert preflight.grid(2048, 512, 1024) == (12, 9)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("impl", ["fused", "splash", "jax"])
def test_seconds_of_real_kernels(preflight, nb, impl):
    """Backward costs more than forward, and 256 tokens of a head of 128 take some thousand cycles."""
    changes = dict(n_head=2, n_kv_head=1, window_pattern="SL", aspect_ratio=128, device_batch_size=4, attn_impl=impl)
    seconds = preflight.attention_kernels(nb.Config(**SMALL | changes), "v6e")
    names = dict(fused=["attention_forward_kernel", "attention_backward_kernel"], jax=[])
    names = names.get(impl, [f"splash_mha_{kind}" for kind in ("fwd", "dkv", "dq")])
    assert set(seconds) == {(name, window) for name in names for window in (128, 256)}
    for window in (128, 256) if impl == "fused" else ():
        forward, backward = (seconds[name, window] for name in names)
        assert 1.3 * forward < backward < 4 * forward and 500 < forward / (4 * 2) * 1.75e9 < 2000


# ---- several chips

SENDING = """\
HloModule jit_step

%aside (shard: bf16[128,1024]) -> bf16[1024,1024] {
  %shard = bf16[128,1024]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[1024,1024]{1,0} all-gather(%shard), replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp'}, dimensions={0}
}, execution_thread="sparsecore"

%all-reduce-scatter (g: f32[1024,128]) -> f32[128,128] {
  %g = f32[1024,128]{1,0} parameter(0)
  %all-reduce.7 = f32[1024,128]{1,0} all-reduce(%g), replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, to_apply=%add
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


def test_collectives_of_a_program(preflight):
    """Kind, bytes, chips of a group, in each notation; what runs on another core is found behind its call, and a sum of
    which each chip keeps a part is a reduce-scatter."""
    found = {x.name: tuple(x.collective) for x in preflight.execution_order(SENDING) if x.collective}
    assert found == {
        "gather.call-start": ("all-gather", 1024 * 1024 * 2, 8), "all-reduce.9": ("all-reduce", 256 * 4, 4),
        "scattered": ("reduce-scatter", 1024 * 128 * 4, 8),
    }  # fmt: skip
    assert preflight.group_size("source_target_pairs={{0,1},{1,0}}") == 2


def test_seconds_of_a_collective(preflight):
    """By hand, at 90 GB/s a link: seven eighths of the bytes arrive, of a sum twice, over two links of a whole slice."""
    gather = preflight.Collective("all-gather", 8 * 10**6, 8)
    assert math.isclose(preflight.link_seconds(gather, "v6e", 8), 7e6 / 180e9 + 4e-6)
    assert math.isclose(preflight.link_seconds(gather, "v6e", 64), 7e6 / 90e9 + 4e-6)
    assert math.isclose(preflight.link_seconds(gather._replace(kind="all-reduce"), "v5e", 8), 14e6 / 90e9 + 8e-6)
    assert math.isclose(
        preflight.link_seconds(gather._replace(kind="collective-permute"), "v6e", 8), 8e6 / 180e9 + 4e-6
    )


def test_only_what_arithmetic_does_not_hide_is_waited_for(preflight):
    """The gather begins at its update, not at its start; the sum after it waits for the links, and the chip for it."""
    program = preflight.execution_order(SENDING)
    gather = preflight.link_seconds(program[0].collective, "v6e", 8)

    def exposed(between):
        seconds = [{"before": 1.0, "between": between}.get(x.name, 0.0) for x in program]
        return [wait.exposed for wait in preflight.waits(program, seconds, "v6e", 8)]

    assert math.isclose(exposed(0.0)[0], gather) and math.isclose(exposed(0.25 * gather)[0], 0.75 * gather)
    hidden = exposed(2 * gather)
    assert hidden[0] == 0 and hidden[1] > 0 and hidden[2] > 0
    answer = preflight.estimate(SENDING, "v6e:2x4", [2048], {})
    assert len(answer.waits) == 3 and ("communication", "backward") in answer.parts  # gradients are summed
    waited = sum(seconds for (name, _), seconds in answer.parts.items() if name == "communication")
    assert math.isclose(waited, answer.exposed)


# ---- traces


def test_the_trace_of_a_run(preflight, finished, capsys):
    """Every component has its time, beside an estimate's, and together with idleness they are the steps."""
    config, _ = finished
    parts, seconds, steps = preflight.read_trace(config.run_dir)
    assert {("MLP", "forward"), ("MLP", "backward"), ("attention", "backward"), ("optimizer", "forward")} <= set(parts)
    busy = sum(parts.values())
    assert steps == 3 and 0 < parts["other", "forward"] < 0.3 * busy < busy < seconds
    preflight.describe_trace(config.run_dir, {"v6e": {("MLP", "forward"): 1.0}})
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"trace   3 steps of [\d.]+ ms, of which train_step runs [\d.]+ ms", lines[0])
    (mlp,) = (line.split() for line in lines if line.split()[0] == "MLP")
    assert mlp[1:4] == ["1000.00", "0.00", "100.0%"] and float(mlp[4]) == pytest.approx(
        1e3 * parts["MLP", "forward"], abs=0.01
    )
    options = preflight.parse_command([f"--trace={config.run_dir}"])[2]
    nb = sys.modules[type(config).__module__]
    assert preflight.first_config(nb, options) == config  # the estimate is of the same model


def test_events_of_a_tpu(preflight):
    """Instructions of other programs are left out."""

    def events(*rows):
        return [SimpleNamespace(start_ns=start, end_ns=end, name=name) for start, end, name in rows]

    modules = events((0, 10, "jit_train_step(1)"), (20, 30, "jit_other(2)"))
    ops = events((1, 4, "%fusion.3 = bf16[2]{0} fusion(%x)"), (21, 22, "%fusion.4 = f32[] fusion()"))
    found = preflight.tpu_events("TPU:0", [("XLA Modules", modules), ("XLA Ops", ops)])
    assert found == [(1, 4, "TPU:0", "fusion.3")]


def test_time_is_shared_between_threads(preflight):
    """Nested events: the inner one's. Two threads at a time: half each. Alone: all of it. A gap after a matmul is its."""
    events = [(0, 100, "a", "outer"), (20, 60, "a", "inner"), (40, 80, "b", "other"), (200, 210, "b", "late")]
    assert preflight.shared_time(events) == {"outer": 20 + 10 + 20, "inner": 20 + 10, "other": 10 + 10, "late": 10}
    events = [
        (0, 10, "a", "copy"),
        (12, 20, "a", "dot.1"),
        (30, 40, "b", "add"),
        (35, 50, "a", "exp"),
        (55, 60, "a", "b"),
    ]
    assert preflight.pool_events(events) == [(20, 30, "pool", "dot.1"), (50, 55, "pool", "dot.1")]
    assert preflight.pool_events([]) == []
