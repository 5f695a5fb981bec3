"""`plan`: what each exchange would cost, before a cluster is rented."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import DTypeLike

from .._checks import floating_dtype, positive_integer, positive_number
from .._config import MoEConfig, activation
from .._matmul import num_inputs
from .all_to_all import AllToAll
from .exchange import AbstractExchange, Sizes
from .gather import Gather
from .ragged import Ragged
from .shards import CHUNK

_EXCHANGES = (Gather(), AllToAll(1.25), Ragged())
_SUM = 4  # bytes of an element on its way back: a float32 sum, whatever the dtype of the tokens
_SLOT = 8  # bytes of an int32 id and its float32 weight
_HEADER = (
    "EP  exchange    KiB/token  comm us/token  compute us/token  weights GB  buffers GB",
    "--  ----------  ---------  -------------  ----------------  ----------  ----------",
)


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One exchange at one size of the expert axis; forward pass of one layer.

    Bytes and seconds are per token of a device; memory is per device, in bytes: the expert weights,
    and the largest buffers.
    """

    size: int
    exchange: AbstractExchange
    bytes_per_token: float
    communication_seconds: float
    compute_seconds: float
    weight_bytes: int
    buffer_bytes: int

    def __str__(self) -> str:
        name = type(self.exchange).__name__
        return (
            f"{self.size:>2}  {name:<10}  {self.bytes_per_token / 1024:>9.1f}"
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
    exchanges: tuple[AbstractExchange, ...] = _EXCHANGES,
    dtype: DTypeLike = jnp.bfloat16,
) -> Plan:
    """Bytes, time and memory of one layer's routed experts, for each exchange and expert axis.

    The sizes of the expert axis are those that divide both `devices` and the experts. This is
    arithmetic, not a measurement. Routing is taken to be even, and communication not to overlap
    with compute. Experts that hand a token on have no weights and take no rows. Their part of an
    even routing is no traffic of `Ragged` and no compute.

    **Arguments:**

    - `config`: the layer.
    - `devices`: how many there are.
    - `tokens_per_device`: tokens of one device in one step.
    - `bandwidth`: bytes per second that a device can send.
    - `flops`: floating-point operations per second that a device reaches in the experts.
    - `exchanges`: those to compare, as for `ExpertParallel`.
    - `dtype`: of tokens and weights.

    **Returns:** a `Plan` of `PlanRow`s; printed, it is a table.

    **Raises:** `ValueError` or `TypeError` naming the argument.

    **Example:**

        >>> import braidax as bx
        >>> config = bx.MoEConfig.deepseek_v4_flash()
        >>> plan = bx.plan(config, 8, tokens_per_device=8192, bandwidth=450e9, flops=400e12)
        >>> print([row for row in plan.rows if row.size == 8][1])
         8  AllToAll        157.8          0.359             0.755        1.61        3.02
    """
    devices = positive_integer("devices", devices)
    tokens = positive_integer("tokens_per_device", tokens_per_device)
    bandwidth = positive_number("bandwidth", bandwidth)
    flops = positive_number("flops", flops)
    item = floating_dtype("dtype", dtype).itemsize
    latent = config.latent_size
    widths = (config.hidden_size if latent is None else latent, config.intermediate_size)
    routed = (config.num_experts, config.num_experts_per_token)
    sizes = Sizes(*widths, *routed, tokens, item, config.num_identity_experts)
    parts = num_inputs(activation(config.activation, config.swiglu_limit)) + 1
    matrices = parts * sizes.hidden * sizes.intermediate
    rows = []
    for size in range(1, devices + 1):
        if devices % size or sizes.experts % size:
            continue
        for exchange in exchanges:
            sent = bytes_forward(exchange, sizes, size)
            seconds = (sent / bandwidth, 2 * matrices * sizes.computed() / flops)
            weights = sizes.experts // size * matrices * sizes.item
            buffers = working_bytes(exchange, sizes, size, CHUNK)
            rows.append(PlanRow(size, exchange, sent, *seconds, weights, buffers))
    return Plan(tuple(rows))


def bytes_forward(exchange: AbstractExchange, sizes: Sizes, size: int) -> float:
    """Bytes that one device sends for each of its tokens: every row there with its slots, and its
    sum back. Checked against compiled programs; for `Ragged` against the rows that its emulation
    moves and what is lowered for accelerators."""
    row = sizes.hidden * (sizes.item + _SUM) + sizes.experts_per_token * _SLOT
    return exchange.rows_sent(sizes, size) * row


def working_bytes(exchange: AbstractExchange, sizes: Sizes, size: int, chunk: float) -> int:
    """The largest buffers of the forward pass: rows of the exchange with their sums, and one chunk
    of assignments in the experts, rows and outputs. Checked against compiled programs.

    What is of intermediate width is not counted. `Blocks` never stores it, and of `Mosaic` it is
    smaller than what is gone by then."""
    held = sum(exchange.rows_held(sizes, size))
    own = math.ceil(chunk * sizes.tokens * sizes.experts_per_token)
    own = min(own, held * sizes.experts_per_token)  # no more than arrive
    return (held + own) * sizes.hidden * (sizes.item + _SUM)
