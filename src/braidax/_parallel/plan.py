"""`plan`: what each strategy would cost, before a cluster is rented."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import DTypeLike

from .._checks import floating_dtype, positive_integer, positive_number
from .._config import MoEConfig
from . import traffic
from .expert_parallel import STRATEGIES
from .shards import CHUNK

_HEADER = (
    "EP  strategy    KiB/token  comm us/token  compute us/token  weights GB  buffers GB",
    "--  ----------  ---------  -------------  ----------------  ----------  ----------",
)


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One strategy at one size of the expert axis; forward pass of one layer.

    Bytes and seconds are per token of a device; memory is per device, in bytes: the expert weights,
    and the largest buffers.
    """

    size: int
    strategy: str
    bytes_per_token: float
    communication_seconds: float
    compute_seconds: float
    weight_bytes: int
    buffer_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.size:>2}  {self.strategy:<10}  {self.bytes_per_token / 1024:>9.1f}"
            f"  {self.communication_seconds * 1e6:>13.3f}  {self.compute_seconds * 1e6:>16.3f}"
            f"  {self.weight_bytes / 1e9:>10.2f}  {self.buffer_bytes / 1e9:>10.2f}"
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of `plan`; `str(plan)` is a table."""

    rows: tuple[PlanRow, ...]

    def __str__(self) -> str:
        return "\n".join([*_HEADER, *map(str, self.rows)])


def plan(
    config: MoEConfig,
    devices: int,
    tokens_per_device: int,
    bandwidth: float | int,
    flops: float | int,
    *,
    capacity: float | int = 1.25,
    dtype: DTypeLike = jnp.bfloat16,
) -> Plan:
    """Bytes, time and memory of one layer's routed experts, for each strategy and expert axis.

    The sizes of the expert axis are those that divide both `devices` and the experts. This is
    arithmetic, not a measurement. Routing is taken to be even, and communication not to overlap
    with compute.

    **Arguments:**

    - `config`: the layer.
    - `devices`: how many there are.
    - `tokens_per_device`: tokens of one device in one step.
    - `bandwidth`: bytes per second that a device can send.
    - `flops`: floating-point operations per second that a device reaches in the experts.
    - `capacity`: of `"all_to_all"`, as in `ExpertParallel`.
    - `dtype`: of tokens and weights.

    **Returns:** a `Plan` of `PlanRow`s; printed, it is a table.

    **Raises:** `ValueError` or `TypeError` naming the argument.

    **Example:**

        >>> import braidax as bx
        >>> config = bx.MoEConfig.deepseek_v4_flash()
        >>> plan = bx.plan(config, 8, tokens_per_device=8192, bandwidth=450e9, flops=400e12)
        >>> print([row for row in plan.rows if row.size == 8][1])
         8  all_to_all      157.8          0.359             0.755        1.61        5.79
    """
    devices = positive_integer("devices", devices)
    tokens = positive_integer("tokens_per_device", tokens_per_device)
    bandwidth = positive_number("bandwidth", bandwidth)
    flops = positive_number("flops", flops)
    capacity = positive_number("capacity", capacity)
    item = floating_dtype("dtype", dtype).itemsize
    sizes = traffic.Sizes(
        config.hidden_size,
        config.intermediate_size,
        config.num_experts,
        config.num_experts_per_token,
        tokens,
        item,
    )
    work = 6 * sizes.hidden * sizes.intermediate * sizes.experts_per_token
    rows = []
    for size in range(1, devices + 1):
        if devices % size or sizes.experts % size:
            continue
        for strategy in STRATEGIES:
            sent = traffic.bytes_forward(strategy, sizes, size, capacity)
            buffers = traffic.working_bytes(strategy, sizes, size, capacity, CHUNK)
            weights = traffic.weight_bytes(sizes, size)
            rows.append(
                PlanRow(size, strategy, sent, sent / bandwidth, work / flops, weights, buffers)
            )
    return Plan(tuple(rows))
