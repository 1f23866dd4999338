# ruff: noqa: E501  the lines of a compiled program are long
"""05_preflight: reads programs and traces right, and says in one line what is wrong.

Real compiles run in processes of their own: once libtpu is loaded where there is no TPU, jax.profiler may crash.
"""

import importlib.util
import io
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.helpers import ALIGNED, ROOT, run_notebook, script
from tools.notebooks import load

LINUX = sys.platform == "linux" and os.uname().machine == "x86_64"
compiles = pytest.mark.skipif(not (LINUX and importlib.util.find_spec("libtpu")), reason="needs libtpu, of Linux")
SMALL = dict(
    n_head=1, head_dim=128, aspect_ratio=64, vocab_size=512, seq_len=256, splash_block_size=128, device_batch_size=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def preflight():
    return load(ROOT / "05_preflight.py")


@pytest.fixture
def ask(preflight, tmp_path, monkeypatch, capsys):
    """main on some words and options, in an empty folder: (exit status, stdout). Nothing is on stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words, **settings):
        status = preflight.main([*words, *(f"--{name}={value}" for name, value in settings.items())])
        out, error = capsys.readouterr()
        assert not error
        return status, out

    return call


def table(text):
    """{component: share} of a report; the shares add up to 100%."""
    shares = {name: float(share) for name, share in re.findall(r"^ +([\w ]+?) +[\d.]+ +[\d.]+ +([\d.]+)%$", text, re.M)}
    assert abs(sum(shares.values()) - 100) < 1
    return shares


@compiles
def test_the_report_of_both_chips(tmp_path):
    """As a script: everything that a person is promised, and nothing is trained or left behind."""
    options = [f"--{name}={value}" for name, value in (SMALL | dict(total_batch_size=2048)).items()]
    done = script("05_preflight.py", "02_train.py", "all", *options, cwd=tmp_path)
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])  # libtpu's talk is not for the user
    for report, hbm, price in zip(done.stdout.split("preflight on ")[1:], (31.25, 15.75), (True, False), strict=True):
        assert "2 × 256 tokens × 4 a step" in report and re.search(rf"fits    [\d.]+ GiB of {hbm} at the peak", report)
        assert re.search(r"time    [\d.]+ ms a step of 2,048 tokens: [\d,]+ tok/s, MFU [\d.]+%", report)
        assert (" credits, $" in report) == price and "NOT counted" not in report  # no price of a v5e is known
        assert {"attention", "attention kernel", "MLP", "head and loss", "embedding"} <= set(table(report))


@compiles
@pytest.mark.parametrize("mesh", ["1 × 8", *(pytest.param(x, marks=pytest.mark.slow) for x in ("8 × 1", "1 × 64"))])
def test_the_report_of_a_slice(ask, mesh):
    """The whole rate and a chip's, communication as a component, what is sent and waited for."""
    chips, given = math.prod(map(int, mesh.split(" × "))), "auto" if mesh == "8 × 1" else mesh.replace(" × ", "x")
    status, out = ask("02_train.py", {8: "v6e:2x4", 64: "v5e:8x8"}[chips], **SMALL, mesh=given)
    rates = re.search(rf"a step of {512 * chips:,} tokens: ([\d,]+) tok/s, ([\d,]+) a chip, MFU", out).groups()
    rate, each = (int(number.replace(",", "")) for number in rates)
    assert status == 0 and f"on each chip of a mesh {mesh}" in out and "$" not in out  # Colab has no slices
    sent, exposed = map(float, re.search(r"send    ([\d.]+) ms, of which ([\d.]+) are not", out).groups())
    assert math.isclose(rate, chips * each, rel_tol=1e-3) and 0 < exposed <= sent and table(out)["communication"] > 0


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(path.name for path in ROOT.glob("0[46]*.py")))
def test_other_notebooks(ask, notebook):
    """Their step compiles, and its kernels are counted."""
    status, out = ask(notebook, "v6e", **(ALIGNED if notebook.startswith("04") else SMALL))
    assert status == 0 and "NOT counted" not in out and "attention kernel" in table(out)


@compiles
def test_what_does_not_fit(ask):
    """Out of HBM, and the largest batch that fits, found by compiling, with the accumulation for it."""
    status, out = ask("02_train.py", "v5e", **SMALL | dict(device_batch_size=65536))
    need, have = map(float, re.search(r"out of HBM: needs ([\d.]+) of ([\d.]+) GiB", out).groups())
    assert status == 1 and 15.75 <= have <= 16 and have < need  # libtpu 0.0.23 compares one buffer with all memory
    fits = int(re.search(r"what fits: --device_batch_size (\d+) --total_batch_size 16777216, in", out)[1])
    assert f"in {65536 // fits} passes" in out
    assert f"device_batch_size={2 * fits}: out of HBM" in out or 2 * fits > 65536 * have / need


@compiles
def test_the_notebook(tmp_path):
    """In a real kernel: no cell fails, and the report is there."""
    shutil.copy(ROOT / "02_train.py", tmp_path)
    text, outputs = run_notebook("05_preflight.ipynb", tmp_path, **SMALL)
    assert "('MLP', 'forward'): 0.51 µs" in text and "('all-gather', 65536, 8): 4.32 µs" in text
    assert re.search(r"fits    [\d.]+ GiB of 31.25 .*\ntime    [\d.]+ ms", text)
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["v7"], "topology='v7': must be one of v6e, v5e, or all"),
        (["02_train.py", "v6e:3x5"], "topology='v6e:3x5': .*v6e:2x4"),
        (["02_train.py", "v6e:2x4", "--mesh=2x2"], r"mesh=\(2, 2\): .* the 8 chips of v6e:2x4"),
        (["02_train.py", "v6e", "--n_haed=3"], "--n_haed.*did you mean 'n_head'?"),
        (["--scaling", "v6e:2x4"], "--scaling: .*v6e:2x4"),
        (["--trace"], "--trace: expected one argument"),
        (["01_tokenizer.py"], "notebook='01_tokenizer.py': has no train_step"),
        (["04_maxtext.py", "--preset=huge"], "preset='huge': must be one of small"),
        (["--trace=nowhere"], "trace='nowhere': holds no trace"),
    ],
)
def test_a_wrong_option_is_one_line(preflight, capsys, words, answer):
    assert preflight.main(words) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and re.match(f"error: .*{answer}", error) and not out


def test_help(preflight, capsys):
    """The notebook's fields and, in words, what is 05's own."""
    with pytest.raises(SystemExit, match="0"):
        preflight.main(["04_maxtext.py", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert not [
        x for x in ("[TOPOLOGY ...]", "--scaling CHIP", "--trace RUN_DIR", "--preset N", "--mlp_dim") if x not in out
    ]


def test_topologies_and_configs(preflight, nb):
    """Words before the options; all; the mesh and the attention that suit a topology."""
    parse = preflight.parse_command
    assert parse([])[:2] == ("02_train.py", ["v6e"]) and parse(["--trace=x"])[1] == parse(["--scaling=v6e"])[1] == []
    assert parse(["04_maxtext.py", "all", "--n_head", "4"])[1::2] == (["v6e", "v5e"], ["--n_head", "4"])
    config = preflight.on_topology(nb.Config(), "v6e:2x4")
    assert (config.mesh, config.attn_impl) == ((8, 1), "fused")


@pytest.fixture
def asked(preflight, monkeypatch):
    """[(Config, topology)] of what main and scaling ask; the answer is 100 tokens a second, less 1 for each chip."""
    found, same = [], dict(seconds=2.0, exposed=0.5, peak=2**30, parts={})

    def answer(config, topology):
        found.append((config, topology))
        return dict(fits=topology != "v5e:8x8", tokens_per_second=config.devices * (100 - config.devices), **same)

    monkeypatch.setattr(preflight, "preflight", answer)
    return found


def test_scaling(ask, asked, tmp_path):
    """The same tokens a chip on 1, 8 and 64 chips; a table, a picture; exit status 1 if one of them does not fit."""
    status, out = ask("02_train.py", "--scaling=v6e")
    assert status == 0 and [topology for _, topology in asked] == ["v6e:1x1", "v6e:2x4", "v6e:8x8"]
    assert {(config.tokens_per_step / config.devices, config.mesh[0]) for config, _ in asked} == {(4 * 2048, 1)}
    rows = [line.split() for line in out.splitlines() if re.match(r" +(1|8|64) ", line)]
    assert rows[2] == ["64", "2000.00", "2,304", "36.4%", "25.0%", "1.00"] and rows[0][3] == "100.0%"
    assert (tmp_path / "runs/scaling-v6e.png").exists()
    assert ask("02_train.py", "--scaling=v5e") == (1, "")


def test_where_the_config_comes_from(ask, asked, finished, preflight, monkeypatch):
    """A preset's; a traced run's, so that the estimate is of the same model; an option changes either."""
    monkeypatch.setattr(preflight, "describe_trace", lambda *args: None)
    ask("02_train.py", "v6e", trace=finished[0].run_dir, learning_rate=0.5)
    ask("04_maxtext.py", "v6e:2x4", preset="v6e_8")
    traced, named = (config for config, _ in asked)
    assert vars(traced) == vars(finished[0]) | dict(learning_rate=0.5) and named == type(named).v6e_8()


def test_a_notebook_from_github(preflight, monkeypatch):
    """Cells tagged `run` are not executed, lines stay where they are, and the address is in the traceback."""
    text = b'# %% [markdown]\n# x\n# %% tags=["run"]\n1 / 0\n# %% Step\ndef train_step():\n    return 1 / 0\n'
    monkeypatch.setattr(preflight.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(text))
    code = preflight.load_notebook("09_mine.py").train_step.__code__
    address = f"https://raw.githubusercontent.com/{preflight.GITHUB}/main/09_mine.py"
    assert (code.co_firstlineno, code.co_filename) == (6, address)


@pytest.fixture
def compiler(preflight, monkeypatch):
    """Makes some code the program that compiles."""
    if not LINUX:
        pytest.skip("elsewhere the compiler is refused before")
    monkeypatch.setattr(preflight, "find_libtpu", dict)
    return lambda code: monkeypatch.setattr(preflight, "COMPILER", f"import json, os, sys\n{code}")


def test_a_compiler_that_crashes_takes_nothing_with_it(preflight, nb, compiler, capsys):
    """libtpu 0.0.52 has aborted on a real Config."""
    words = "F1123 10:16:27.628217   28182 fusion_util.cc:5409] Check failed: window.pad_low[old_dim] == 0"
    compiler(f"print({words!r}, file=sys.stderr, flush=True); os.abort()")
    report = preflight.preflight(nb.Config.demo(), "v6e")
    assert not report["fits"] and report["device_batch_size"] is None
    assert re.search(r"the compiler itself crashed .*: Check failed: window.pad_low", report["reason"])
    assert report["reason"] in capsys.readouterr().out


def test_how_the_compiler_is_called(preflight, compiler, monkeypatch):
    """Your flags come last, and win; a slice has its own. Elsewhere than on Linux: a line."""
    compiler('open(sys.argv[1] + "/answer", "w").write(json.dumps([os.environ["LIBTPU_INIT_ARGS"], *sys.argv[2:5:2]]))')
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--mine")
    flags, *one = preflight.compile_for("v6e", lambda: 1, [], bundles="x")
    assert one == ["v6e:1x1", "[1, 1]"] and re.fullmatch(" *--xla_jf_dump_to=x .* --mine", flags)
    flags, *several = preflight.compile_for("v6e:2x4", lambda: 1, [], mesh=(1, 8))
    assert several == ["v6e:2x4", "[1, 8]"] and re.fullmatch(".*sparse_core.*all_gather.* --mine", flags)
    monkeypatch.setattr(preflight.sys, "platform", "darwin")
    with pytest.raises(preflight.InputError, match="runs on Linux on x86_64 alone; training works here"):
        preflight.compile_for("v6e", lambda: 1, [])


def test_the_libtpu_that_jax_asks_for(preflight, monkeypatch, tmp_path):
    """The installed one if it is that, else one beside the runtime; if pip cannot get it, a line, and nothing is left."""
    needs = ["numpy", 'libtpu==0.0.4.*; extra == "tpu"']
    monkeypatch.setattr(preflight.importlib.metadata, "requires", lambda name: needs)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def find(installed=None, pip=None):
        there = SimpleNamespace(origin="/there/libtpu/__init__.py") if installed else None
        monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: there)
        monkeypatch.setattr(preflight.importlib.metadata, "version", lambda name: installed)
        monkeypatch.setattr(preflight.subprocess, "run", pip)
        return preflight.find_libtpu()

    def install(command):
        os.makedirs(command[command.index("--target") + 1])
        return SimpleNamespace(returncode=command[-1] != "libtpu==0.0.4.*")

    assert find("0.0.4.1") == find("0.0.4") == {}
    with pytest.raises(preflight.InputError, match=r"cannot install libtpu==0.0.4.\*; check the network"):
        find(pip=lambda command: SimpleNamespace(returncode=1))
    ours = {"TPU_LIBRARY_PATH": f"{tmp_path}/.cache/tpuchat/libtpu-0.0.4/libtpu/libtpu.so"}
    assert find("0.0.42", pip=install) == find("0.0.42") == find() == ours  # the next program finds it there
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/there/libtpu/libtpu.so")  # as an import of jax does
    assert find("0.0.42") == ours
    monkeypatch.setenv("TPU_LIBRARY_PATH", "mine")
    assert find("0.0.42") == find() == {}


@pytest.mark.colab
def test_a_runtime_of_colab_with_a_tpu(tmp_path):
    """Its libtpu 0.0.21.1 crashes without its chip, so jax 0.7.2's own is installed beside the runtime. Time and peak
    are then within 5% of what this jax and its libtpu say, and the runtime stays as it was."""
    from tools import colab

    try:
        copy, environment = colab.prepare(tmp_path, colab.build("tpu"))
    except colab.Wrong as wrong:
        pytest.skip(wrong.args[1])
    pip = [copy / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "tiktoken", "flatbuffers"]
    subprocess.run(pip, env=environment, check=True)  # as the first cell does
    before = colab.packages_of(copy)

    def figures(python, env):
        command = [python, ROOT / "05_preflight.py", "02_train.py", "v6e", "--aspect_ratio", "512"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "NOT counted" not in done.stdout, done.stdout + done.stderr
        patterns = r"fits    ([\d.]+) GiB", r"time    ([\d.]+) ms", r"attention kernel +([\d.]+)"
        return done.stdout, [float(re.search(pattern, done.stdout)[1]) for pattern in patterns]

    text, have = figures(copy / "bin/python", environment)
    assert "installing libtpu==0.0.23 into " in text and colab.packages_of(copy) == before
    assert have == pytest.approx(figures(sys.executable, os.environ)[1], rel=0.05)


@pytest.mark.parametrize(
    "words",
    [
        "Ran out of memory on HBM, the total memory required for HLO temporaries (32.00G) exceeds available HBM (16.00G).\nSee",
        "RESOURCE_EXHAUSTED: Allocation (size=34359738368) would exceed memory (size=17179869184) :: #allocation310",
        "Ran out of memory in memory space hbm. Used 32.00G of 16384M hbm. Exceeded hbm capacity by 16.00G.",
    ],
)
def test_what_the_compiler_says(preflight, words):
    """The newest libtpu; 0.0.23 on one buffer that is larger than all memory, and on a program that is."""
    assert preflight.explain(words) == ("out of HBM: needs 32.00 of 16.00 GiB", 2**35)
    assert preflight.explain("INTERNAL: Mosaic failed\n\n  to compile") == ("INTERNAL: Mosaic failed to compile", None)


PROGRAM = """\
%body (x: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %state = f32[64,128]{1,0} get-tuple-element(%x), index=1
  ROOT %small = f32[64,128]{1,0} fusion(%state), kind=kLoop, backend_config={"estimated_cycles":"100"}
}
%condition (x: (s32[], f32[64,128])) -> pred[] {
  ROOT %limit = s32[] constant(7)
}
%aside (shard: bf16[128,1024]) -> bf16[1024,1024] {
  ROOT %all-gather.1 = bf16[1024,1024]{1,0} all-gather(%shard), replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp'}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (p0: bf16[512,256], p1: bf16[256,128], p2: f32[4096,128], p3: s32[16]) -> f32[128,128] {
  %p0 = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[256,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %rows = f32[16,128]{1,0} fusion(%p2, %p3), kind=kLoop, calls=%fused_gather, metadata={op_name="jit(train_step)/jvp(embed)/gather"}, backend_config={"estimated_cycles":"18446744073709551615"}
  %loop = (s32[], f32[64,128]{1,0}) while(%init), condition=%condition, body=%body
  %copy-start.1 = (f32[64,128]{1,0}, f32[64,128]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%p2), backend_config={"estimated_cycles":"7"}
  %kernel = (bf16[2,4,2048,128]{3,2,1,0}, f32[2,4,2048,128]{3,2,1,0:S(1)}) custom-call(%p0, %p3), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024, \\"block_kv\\": 1024}"
}}, metadata={op_name="jit(train_step)/jvp(layer_01)/attn/splash_mha_fwd/pallas_call"}
  %product = f32[512,128]{1,0:T(8,128)} fusion(%p0, %p1), kind=kOutput, calls=%fused_matmul, metadata={op_name="jit(train_step)/transpose(jvp(layer_00))/mlp/dot_general"}, backend_config={"estimated_cycles":"5000"}
  %gather.call-start = ((), (), (s32[1]{0:S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%aside
  %before = f32[256]{0} negate(%p2)
  %gather.call-update = ((bf16[128,1024]{1,0}), bf16[1024,1024]{1,0}) call-update(%gather.call-start, %p0)
  %between = f32[256]{0} negate(%before)
  %gather.call-done = bf16[1024,1024]{1,0} call-done(%gather.call-update)
  %all-reduce.9 = f32[256]{0} all-reduce(%between), replica_groups=[4,4]<=[16], to_apply=%add
  ROOT %scattered = f32[128,128]{1,0} reduce-scatter(%p1), replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, to_apply=%add, backend_config={"estimated_cycles":"400"}
}
"""


@pytest.fixture
def program(preflight):
    return {x.name: x for x in preflight.execution_order(PROGRAM)}


def test_what_runs_and_how_often(preflight, program):
    """A loop's body as often as its condition's constant says; the bytes of what does not lie in VMEM, S(1); components."""
    assert [*program][:5] == ["rows", "small", "copy-start.1", "kernel", "product"] and program["small"].times == 7
    assert [x.cycles for x in program.values()][:5] == [0, 100, 7, 0, 5000]
    assert program["product"].bytes == 512 * 256 * 2 + 512 * 128 * 4
    assert program["kernel"].bytes == 512 * 256 * 2 + 2 * 4 * 2048 * 128 * 2
    found = [preflight.component(program[name]) for name in ("product", "rows", "kernel")]
    assert found == [("MLP", "backward"), ("embedding", "forward"), ("attention kernel", "forward")]
    scopes = "optimizer/mul", "while/body/transpose(jvp(lm_head))/dot", "transpose(jvp(layer_03))/attn/mul", "dot"
    found = [preflight.component(preflight.Instruction("add.1", "", "add", f'op_name="jit/{x}"')) for x in scopes]
    assert [name for name, _ in found] == ["optimizer", "head and loss", "attention", "other"]
    assert [direction for _, direction in found] == ["forward", "backward", "backward", "forward"]


def test_estimate(preflight):
    """Cycles at the chip's clock; copies run beside them; kernels by their table, one that is not in it by its bytes;
    a wait for a sum counts as backward."""
    kernels, bytes_ = {("splash_mha_fwd", 1024): 0.25}, (512 * 256 * 2 + 2**22) / 1.6e12
    answer = preflight.estimate(PROGRAM, "v6e:2x4", [2048, 1024], kernels)
    assert answer.parts["MLP", "backward"] == 5000 / 1.75e9 and answer.parts["attention kernel", "forward"] == 0.25
    waited = answer.parts["communication", "forward"] + answer.parts["communication", "backward"]
    assert 0 < answer.parts["communication", "backward"] < waited <= answer.sent
    assert math.isclose(answer.exposed, waited) and not answer.uncounted
    assert math.isclose(answer.seconds, 0.25 + (5000 + 7 * 100) / 1.75e9 + waited)
    unknown = preflight.estimate(PROGRAM, "v6e", [2048, 2048], kernels)  # another window in layer 1
    assert unknown.uncounted == ["kernel"] and math.isclose(unknown.parts["attention kernel", "forward"], bytes_)


@pytest.mark.parametrize("jump", ["target = $region{}", "target bundleno = 9 (0x9), region = {}"])
def test_seconds_of_a_kernel(preflight, jump):
    """All bundles of the loop for a step that computes, those outside the longest branch for one that is skipped, half a
    microsecond at least; what one of four query heads does for all of them counts a quarter. Of 2 × 2 blocks causal
    attention sees 3; with a window of 1024 in blocks of 512 a row sees 3 at most."""
    assert (preflight.grid(2048, 1024, 2048), preflight.grid(2048, 512, 1024)) == ((4, 3), (12, 9))
    jump = f"sbr.rel (!%p1) {jump}"
    body = ["loop"] * 30 + [jump.format(9)] + ["x ;;\n %v2 = vmul"] * 2000 + [jump.format(5)] + ["once"] * 40
    body += ["/* End region 5 */"] + ["x"] * 60 + ["/* Start region 9 */ /* End region 5 */", "loop"]
    text = "".join(f"\n {i:#x} {'LB' if i == 1 else '  '}: > {{ {x} }}" for i, x in enumerate(body, 1))
    text, loop = f"// a comment\n  0x0   :  {{ before }}{text}\n0xfff PF: {{ after }}", len(body) / 1.75e9
    assert preflight.head_seconds(text, "v6e") == loop
    assert math.isclose(preflight.head_seconds(text, "v6e", group=4), loop - 41 * 3 / 4 / 1.75e9)
    assert math.isclose(preflight.head_seconds(text, "v6e", 4, 3), 3 * loop + 0.5e-6)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("impl", ["fused", "splash", "jax"])
def test_seconds_of_real_kernels(preflight, nb, impl):
    """Backward costs more than forward, and 256 tokens of a head of 128 take some thousand cycles."""
    changes = dict(n_head=2, n_kv_head=1, window_pattern="SL", aspect_ratio=128, device_batch_size=4, attn_impl=impl)
    seconds = preflight.attention_kernels(nb.Config(**SMALL | changes), "v6e")
    names = dict(fused="attention_forward_kernel attention_backward_kernel", jax="")
    names = names.get(impl, "splash_mha_fwd splash_mha_dkv splash_mha_dq").split()
    assert set(seconds) == {(name, window) for name in names for window in (128, 256)}
    for window in (128, 256) if impl == "fused" else ():
        forward, backward = (seconds[name, window] for name in names)
        assert 1.3 * forward < backward < 4 * forward and 500 < forward / (4 * 2) * 1.75e9 < 2000


def test_collectives(preflight, program):
    """Kind, bytes, chips of a group, in each notation; what runs on another core is found behind its call. Seconds by
    hand, at 90 GB/s a link: seven eighths of the bytes arrive, of a sum twice, over two links of a whole slice."""
    gather, *sums = (x.collective for x in program.values() if x.collective)
    assert gather == ("all-gather", 1024 * 1024 * 2, 8)
    assert sums == [("all-reduce", 256 * 4, 4), ("reduce-scatter", 128 * 128 * 4 * 8, 8)]
    other = "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0','axis_2'}, x={1}"
    assert preflight.group_size(other) == 8
    seconds = preflight.link_seconds
    assert math.isclose(seconds("all-gather", 8e6, 8, "v6e", 8), 7e6 / 180e9 + 4e-6)
    assert math.isclose(seconds("all-gather", 8e6, 8, "v6e", 64), 7e6 / 90e9 + 4e-6)
    assert math.isclose(seconds("all-reduce", 8e6, 8, "v5e", 8), 14e6 / 90e9 + 8e-6)


def test_only_what_arithmetic_does_not_hide_is_waited_for(preflight, program):
    """The gather begins at its update, not at its start. A second one waits for the links, and the chip for both."""
    needs = preflight.link_seconds(*program["gather.call-start"].collective, "v6e", 8)

    def exposed(between):
        seconds = [{"before": 1.0, "between": between}.get(name, 0.0) for name in program]
        return [waited for _, _, waited in preflight.waits(program.values(), seconds, "v6e", 8)]

    assert math.isclose(exposed(0.0)[0], needs) and math.isclose(exposed(0.25 * needs)[0], 0.75 * needs)
    hidden = exposed(2 * needs)
    assert hidden[0] == 0 and hidden[1] > 0 and hidden[2] > 0
    start, update, done = (program[f"gather.call-{word}"] for word in ("start", "update", "done"))
    second = start._replace(name="b.call-start", rest="%p0), to_apply=%aside"), done._replace(name="b.call-done")
    both = preflight.waits([start, update, second[0], done, second[1]], [0.0] * 5, "v6e", 8)
    assert [waited for _, _, waited in both] == pytest.approx([needs, needs])


def test_the_trace_of_a_run(preflight, finished, capsys):
    """Every component has its time, beside an estimate's, and together with idleness they are the steps."""
    parts, seconds, steps = preflight.read_trace(finished[0].run_dir)
    assert {("MLP", "forward"), ("MLP", "backward"), ("attention", "backward"), ("optimizer", "forward")} <= set(parts)
    busy = sum(parts.values())
    assert steps == 3 and 0 < parts["other", "forward"] < 0.6 * busy < busy < seconds
    estimate = dict(fits=True, parts=preflight.collections.Counter({("MLP", "forward"): 1.0}))
    preflight.describe_trace(finished[0].run_dir, {"v6e": estimate, "v5e": dict(fits=False)})
    out = capsys.readouterr().out
    assert re.match(r"trace   3 steps of [\d.]+ ms, of which train_step runs [\d.]+ ms", out)
    measured = re.search(r" MLP +1000.00 +0.00 +100.0% +([\d.]+)", out)[1]
    assert float(measured) == pytest.approx(1e3 * parts["MLP", "forward"], abs=0.01)


def test_events_of_a_tpu(preflight):
    """Instructions of other programs are left out."""
    rows = [
        (0, 10, "jit_train_step(1)"),
        (20, 30, "jit_other(2)"),
        (1, 4, "%fusion.3 = f32[] fusion(%x)"),
        (21, 22, "%x"),
    ]
    events = [SimpleNamespace(start_ns=start, end_ns=end, name=name) for start, end, name in rows]
    found = preflight.step_events("/device:TPU:0", [("XLA Modules", events[:2]), ("XLA Ops", events[2:])])
    assert found == [(0, 1, 4, "fusion.3")]


def test_an_instruction_lasts_until_the_next(preflight):
    """A loop around others gets what is left; idleness is a device's, and the matmul's of a CPU; runs are apart."""
    events = [(1, 0, 100, "loop"), (1, 20, 60, "dot"), (1, 90, 95, "add"), (2, 200, 210, "dot")]
    assert preflight.times_of(events, pool=False) == {"loop": 20, "dot": 40 + 10, "add": 5}
    assert preflight.times_of(events[::-1], pool=True) == {"loop": 20, "dot": 70 + 10, "add": 5}


def test_the_law_of_a_plan(preflight):
    """The best size has the frontier's bits per byte; one that is e times as large, or as small, loses the curvature."""
    for flops, bpb in preflight.FRONTIER.items():
        best = math.sqrt(flops / 6 / preflight.RATIO)
        values = [preflight.expected_bpb(flops, size) for size in (best / math.e, best, best * math.e)]
        assert values[1] == pytest.approx(bpb, abs=0.004)  # the four points are not quite on a line
        assert values[0] == values[2] == pytest.approx(values[1] * (1 + preflight.CURVATURE))


def test_a_plan_names_the_best_size_and_how_to_start_it(preflight, tmp_path, monkeypatch, capsys):
    """Steps run at 40% MFU; the largest size fits with half of the batch. The command is one that the notebook takes."""

    def estimate(config, chip):
        nb = sys.modules[type(config).__module__]
        if config.n_head == 12 and config.device_batch_size > 2:
            raise preflight.CompileError("Used 40.0G of 31.25G hbm")
        seconds = nb.flops_per_token(config) * config.tokens_per_step / 918e12 / 0.4
        return SimpleNamespace(peak=2**33), SimpleNamespace(seconds=seconds)

    def smaller(config, topology, needed):
        assert needed == 40 * 2**30
        return 2

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "compile_and_estimate", estimate)
    monkeypatch.setattr(preflight, "smaller_batch", smaller)
    picture = preflight.plan(credits=[3, 300], hours=[7], sizes={"02_train.py": (4, 8, 12), "06_recipe.py": (8,)})
    assert picture.stat().st_size > 10_000
    tables = capsys.readouterr().out.split("\nv6e, ")[1:]
    assert [table.split(":")[0] for table in tables] == [
        "0.81 hours, 3 credits", "80.86 hours, 300 credits", "7.00 hours, 25.97 credits",
    ]  # fmt: skip
    for table, notebook in zip(tables, ("06_recipe.py", "02_train.py", "06_recipe.py"), strict=True):
        rows = re.findall(r"^(0\d), n_head (\d+) .* ([\d.]+|-)(\*?)$", table, re.M)
        assert len(rows) == 4
        best = min(rows, key=lambda row: float(row[2].replace("-", "inf")))
        name, options = re.search(r"^take    python (\S+) (.*)$", table, re.M).groups()
        nb = preflight.load_notebook(name)
        config = nb.parse_args(options.split(), nb.Config())
        assert name == notebook and (best[0], int(best[1])) == (name[:2], config.n_head)
        assert (config.device_batch_size == 2) == (config.n_head == 12) and (config.credits or config.hours)
        assert table.startswith("0.81") or all(row[3] for row in rows) == table.startswith("80.86")  # beyond the law


@compiles
def test_a_row_of_a_plan_is_what_the_compiler_says(preflight):
    nb = preflight.load_notebook("02_train.py")
    config = nb.Config().replace(**SMALL)
    row, report = preflight.plan_row("v6e", config), preflight.preflight(config)
    assert (row["seconds"], row["peak"]) == (report["seconds"], report["peak"]) and row["config"] == config
    tokens, _ = preflight.expect(row, 1)
    assert tokens * row["seconds"] / config.tokens_per_step < 3600 - preflight.START


@pytest.mark.parametrize(("words", "message"), [
    ("", "plan : give --credits or --hours"), ("--credits 0", "plan --credits 0: give --credits or --hours, above 0"),
    ("--hours nan", "plan --hours nan: give"), ("--credits x", "argument --credits: invalid float value: 'x'"),
    ("v7 --hours 3", "argument chip: invalid choice: 'v7'"), ("--hours 3 --foo", "plan --hours 3 --foo: give"),
    ("v5e --credits 12", "credits=12.0: the price of a v5e is not known; add --price"),
    ("--hours 0.1", "hours=0.1: a plan needs 0.25; 300 s pass before the first step"),
])  # fmt: skip
def test_a_wrong_plan_is_refused_in_a_line(preflight, capsys, words, message):
    assert preflight.main(["plan", *words.split()]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and error.startswith(f"error: {message}")
