"""What XLA makes of our train step for an NVIDIA GPU that is not there.

    python benchmarks/cuda.py [--gpus H100 …] [--rows reference …] [--keep FOLDER]

It needs the compiler for CUDA, `pip install "jax[cuda13]"` (tried: jax 0.11.2), but no GPU and no driver. A program
takes seconds. All figures are the compiler's: nothing runs.

Columns: sequences a pass, and passes; GiB of weights, moments and batch, and of temporary arrays; whether both fit 90%
of the GPU's memory; calls of cuDNN's attention, forward and backward; kinds of arrays of T × T; MiB that transposes and
copies write (a loop over passes is not counted); the floor of a step of one pass: ms at the data sheet's FLOP/s and
bandwidth, for the model's FLOPs, and for the bytes of all kernels that are neither a matmul nor attention.

XLA measures kernels to choose among them where a GPU is there. Here it takes the first, so matmuls may differ.
"""

import argparse
import os
import re
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from common import load  # noqa: E402
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # noqa: E402
from jax.experimental import topologies  # noqa: E402

# By NVIDIA's data sheets and CUDA's table of compute capabilities: capability, multiprocessors, KiB of shared memory of
# each and of a block, threads of each, MiB of L2, bytes of memory as nvidia-smi names them, bytes/s of it.
GPUS = {
    "T4": ("Tesla T4", "7.5", 40, 64, 64, 1024, 4, 15_360 * 2**20, 320e9),
    "L4": ("NVIDIA L4", "8.9", 58, 100, 99, 1536, 48, 23_034 * 2**20, 300e9),
    "A100": ("NVIDIA A100-SXM4-40GB", "8.0", 108, 164, 163, 2048, 40, 40_960 * 2**20, 1.555e12),
    "H100": ("NVIDIA H100 80GB HBM3", "9.0", 132, 228, 227, 2048, 50, 81_559 * 2**20, 3.35e12),
}
train, maxtext = load("02_train.py"), load("04_maxtext.py")
ROWS = {"reference": (train, train.Config(mesh=(1, 1))), "369M": (maxtext, maxtext.Config(mesh=(1, 1)))}
TARGET = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin} threads_per_core_limit: {threads} core_count:
{cores} fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: 1.7 device_memory_size: {memory}
registers_per_core_limit: 65536 registers_per_block_limit: 65536
cuda_compute_capability {{ major: {major} minor: {minor} }} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{kind}" """


def gpu_device(name):
    """Returns a device of jax that programs can be compiled for, and nothing else."""
    kind, capability, cores, shared, block, threads, l2, memory, bandwidth = GPUS[name]
    major, minor = capability.split(".")
    target = TARGET.format(
        kind=kind, major=major, minor=minor, cores=cores, shared=shared << 10, optin=block << 10, threads=threads,
        l2=l2 << 20, memory=memory, bandwidth=int(bandwidth),
    )  # fmt: skip
    options = {"target_config": target, "topology": "1x1x1"}
    return topologies.get_topology_desc(topology_name=name, platform="cuda", **options).devices[0]


def lower_step(nb, config, device, capability):
    """Returns the Lowered train step of a Config for a GPU, with the attention that this GPU would choose."""
    jax.clear_caches()  # a trace remembers the GPU before
    place = jax.sharding.SingleDeviceSharding(device)
    args = nb.state_shapes(config), *[jax.ShapeDtypeStruct(config.batch_shape, jnp.int32)] * 2
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    nb.cuda_capability = lambda _: capability
    # jax asks the GPU that is there.
    cudnn.check_cudnn_version = lambda: 91000
    cudnn.is_cuda_compute_capability_equal = lambda it: capability == float(it)
    cudnn.check_compute_capability = lambda least: capability >= float(least)
    return nb.train_step.lower(config, *args)


def array_bytes(shape):
    """Returns the bytes of the arrays in an HLO shape."""
    total = 0
    for kind, bits, dims in re.findall(r"\b([a-z]+)(\d*)\[([\d,]*)\]", shape):
        size = int(bits or 8) // 8 if kind != "pred" else 1
        for n in filter(None, dims.split(",")):
            size *= int(n)
        total += size
    return total


def read_program(text, T):
    """Returns facts of a compiled program: {'cudnn': (forward, backward), 'square': shapes of arrays of T × T, 'moved':
    bytes that transposes and copies write, 'bytes': those of all kernels but matmuls and attention}."""
    entry, shapes, moved, others = text[text.index("\nENTRY") :], {}, 0, 0
    for line in entry.splitlines():
        found = re.match(r"\s+(?:ROOT )?%(\S+) = (\S+|\(.*?\)) ([\w-]+)\((.*?)\)", line)
        if not found:
            continue
        name, shape, opcode, operands = found.groups()
        shapes[name] = array_bytes(shape)
        if opcode in ("parameter", "constant", "bitcast", "get-tuple-element", "tuple") or "custom-call" in opcode:
            continue
        if re.search("transpose|copy", name) or opcode in ("copy", "transpose"):
            moved += shapes[name]
        if not re.match("gemm_fusion|cublas|dot", name):
            others += shapes[name] + sum(shapes.get(x, 0) for x in re.findall(r"%([^\s,)]+)", operands))
    square = {x for x in re.findall(r"\w+\[[\d,]+\]", text) if re.search(rf"\[(?:\d+,){{1,}}{T},{T}\]", x)}
    calls = tuple(len(re.findall(rf'custom_call_target="__cudnn\$fmhaSoftmax{end}"', text)) for end in ("", "Backward"))
    return {"cudnn": calls, "square": square, "moved": moved, "bytes": others}


def describe(nb, config, name, keep=None):
    """Compiles a step for a GPU, prints a row, and returns its facts."""
    kind, capability, *_, memory, bandwidth = GPUS[name]
    lowered = lower_step(nb, config, gpu_device(name), float(capability))
    compiled = lowered.compile()
    text, plan, T = compiled.as_text(), compiled.memory_analysis(), config.seq_len
    if keep:
        Path(keep).mkdir(parents=True, exist_ok=True)
        Path(keep, f"{name}-{nb.__name__}-{config.device_batch_size}.hlo").write_text(text)
    facts = read_program(text, T)
    sizes = plan.argument_size_in_bytes, plan.temp_size_in_bytes
    seconds = nb.flops_per_token(config) * config.tokens_per_step / nb.peak_flops(kind), facts["bytes"] / bandwidth
    floor = f"{1e3 * seconds[0]:.1f} + {1e3 * seconds[1]:.1f} ms" if config.grad_accum_steps == 1 else ""
    fits = sum(sizes) <= 0.9 * memory
    print(f"{name:5} {nb.__name__[3:]:11} {config.compute_dtype:8} {config.device_batch_size:3} × "
          f"{config.grad_accum_steps}{sizes[0] / 2**30:8.2f} +{sizes[1] / 2**30:6.2f} GiB, "
          f"{'fits' if fits else 'too large'}; cuDNN {facts['cudnn']}, T × T {len(facts['square'])}, "
          f"moved {facts['moved'] / 2**20:,.1f} MiB; {floor}", flush=True)  # fmt: skip
    return facts | {"arguments": sizes[0], "temporary": sizes[1], "fits": fits}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", nargs="*", default=list(GPUS), choices=list(GPUS))
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4], help="sequences a pass")
    parser.add_argument("--keep", help="write the compiled programs to this folder")
    args = parser.parse_args()
    for name in args.gpus:
        for row in args.rows:
            nb, config = ROWS[row]
            for batch in args.batches:
                changes = dict(device_batch_size=batch, total_batch_size=max(config.tokens_per_step, batch * 2048))
                dtype = "float32" if float(GPUS[name][1]) < 8 else "bfloat16"
                describe(nb, config.replace(attn_impl="jax", compute_dtype=dtype, **changes), name, args.keep)


if __name__ == "__main__":
    main()
