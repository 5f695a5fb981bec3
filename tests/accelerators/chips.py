"""Programs compiled for chips that are not here, from descriptions of them.

XLA compiles for a description of a chip: no device, no driver and no CUDA toolkit is needed, and
nothing runs. What comes out is the optimized program, the memory it takes and the kernels it calls.
On a device XLA would also time alternatives of one product, which is switched off here.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# As `xla/tools/hlo_opt` spells it. Sizes are bytes, and memory bandwidth is bytes per second.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }} {versions}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} {runtime}
device_description_str: "{name}"
"""
_GPUS = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "major": 9,
        "minor": 0,
        "cores": 132,
        "fpus": 128,
        "threads": 2048,
        "shared": 233472,
        "optin": 232448,
        "l2": 52428800,
        "clock": 1.98,
        "memory": 84942979072,
        "bandwidth": 3352320000000,
    },
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "major": 8,
        "minor": 0,
        "cores": 108,
        "fpus": 64,
        "threads": 2048,
        "shared": 167936,
        "optin": 166912,
        "l2": 41943040,
        "clock": 1.41,
        "memory": 84974239744,
        "bandwidth": 2039000000000,
    },
}
_TPUS = {"v5p": "v5p:2x2x1"}
# Versions of XLA differ in what a description must say; the first that is understood is taken.
_RUNTIME = "runtime_version {{ major: {} minor: {} patch: 0 }}".format
_VERSIONS = " ".join(
    f'{name}: "{version}"'
    for name, version in {
        "driver_version": "13.0.0",
        "runtime_version": "13.0.0",
        "compile_time_toolkit_version": "13.0.0",
        "dnn_version": "9.27.0",
    }.items()
)
_SPELLINGS = (
    {"versions": _VERSIONS, "runtime": _RUNTIME(13, 0)},
    {"versions": "", "runtime": _RUNTIME(12, 8)},
    {"versions": "", "runtime": ""},
)
_ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}


@functools.cache
def devices(chip: str, count: int = 1) -> list[Any]:
    """`count` devices of a kind that this machine need not have: `"h100"`, `"a100"` or `"v5p"`."""
    if chip in _TPUS:
        topology = topologies.get_topology_desc(_TPUS[chip], platform="tpu")
        return topology.devices[:count]
    feature = "feature_extension: ACCELERATED_FEATURES" if chip == "h100" else ""
    errors = []
    for spelling in _SPELLINGS:
        for extension in {feature, ""}:
            description = _GPU.format(**_GPUS[chip], **spelling, feature=extension)
            try:
                return topologies.get_topology_desc(
                    platform="cuda", topology=f"1x1x{count}", target_config=description
                ).devices
            except Exception as error:  # each version of XLA has its own
                errors.append(error)
    raise ExceptionGroup(f"No description of {chip} was understood.", errors)


class Program(NamedTuple):
    """A compiled program: its text, and bytes of memory on each device."""

    text: str
    temporary: int
    outputs: int

    def kernel(self) -> str:
        """What multiplies the rows: kernels, native ragged products, or the loop over blocks."""
        if 'custom_call_target="mosaic_gpu' in self.text:
            return "Mosaic"
        if re.search(r'%ragged-dot|"is_ragged_dot":true', self.text):
            return "Ragged"
        return "Blocks" if "braidax.Experts" in self.loops() else "dense"

    def loops(self) -> str:
        """What the loops with an unknown number of turns say of their source."""
        loops = (line for line in self.text.splitlines() if " while(" in line)
        return "".join(line for line in loops if "known_trip_count" not in line)

    def arrays(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The dtype and shape of every array that gets memory: of no result inside a fusion."""
        inside = set(re.findall(r"\bcalls=%?([\w.-]+)", self.text))
        for computation in re.split(r"\n(?=\S)", self.text):
            name = re.match(r"(?:ENTRY )?%?([\w.-]+)", computation)
            if name is None or name[1] not in inside:
                results = re.findall(r"^ .*? = (.*?) [\w-]+\(", computation, re.MULTILINE)
                for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", " ".join(results)):
                    yield dtype, tuple(int(size) for size in shape.split(",") if size)

    def largest(self) -> int:
        """Numbers in the largest array of floats."""
        floats = (shape for dtype, shape in self.arrays() if dtype in ("bf16", "f16", "f32"))
        return max(map(math.prod, floats))


def compiled(chip: str, function: Callable[..., Any], *arguments: Any) -> Program:
    """The program of `function` for `chip`. Shapes without a sharding are on one device."""
    alone = SingleDeviceSharding(devices(chip)[0])

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding or alone
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    options = {"xla_gpu_autotune_level": "0"} if chip in _GPUS else {}
    lowered = jax.jit(function).lower(*jax.tree.map(placed, arguments))
    program = lowered.compile(compiler_options=options)
    memory = program.memory_analysis()
    return Program(program.as_text(), memory.temp_size_in_bytes, memory.output_size_in_bytes)
