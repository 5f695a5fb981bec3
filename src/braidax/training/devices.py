"""Which devices a run uses, and what each of its processes may write.

`--expert-parallel` and `--distributed` belong to a run and not to its settings: a run may stop on
one device and continue on many, or the other way.
"""

import dataclasses
import errno
import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from .._parallel import ExpertParallel
from .settings import Settings, UserError


@dataclasses.dataclass(frozen=True)
class Devices:
    """Places the arrays of a run. `parallel` is None on one device."""

    parallel: ExpertParallel | None

    def place(self, state: PyTree) -> PyTree:
        """The training state over all devices."""
        if self.parallel is None:
            return state
        return self.parallel.shard(state)

    def spread(self, windows: Int[np.ndarray, "batch _"]) -> Int[Array, "batch _"]:
        """The windows over all devices if they divide, else on every device."""
        if self.parallel is None:
            return jnp.asarray(windows)
        divides = len(windows) % self.parallel.layout.token_shards == 0
        spec = PartitionSpec(self.parallel.tokens) if divides else PartitionSpec()
        return jax.device_put(windows, NamedSharding(self.parallel.mesh, spec))

    def on_host(self, tree: PyTree) -> PyTree:
        """The whole of every array, on every process."""
        arrays, static = eqx.partition(tree, eqx.is_array)
        return eqx.combine(process_allgather(arrays, tiled=True), static)

    def largest(self, number: int) -> int:
        """The largest number that any process has."""
        return int(np.max(process_allgather(np.int32(number))))

    def write(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function(*arguments)` on the first process alone.

        An `OSError` there becomes one of all processes: none waits for another that has ended.
        """
        failure = None
        try:
            if jax.process_index() == 0:
                function(*arguments)
        except OSError as error:
            failure = error
        number = self.largest(0 if failure is None else failure.errno or errno.EIO)
        if number:
            raise failure or OSError(number, f"{os.strerror(number)} (another process)")


def find_devices(settings: Settings, expert_parallel: int | None, distributed: bool) -> Devices:
    """One device, or all: `expert_parallel` of them along the expert axis, the rest along the
    data axis. Raises `UserError` where the numbers do not fit."""
    if distributed:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--distributed: cannot join the other processes: {reason}") from error
    elif expert_parallel is None:
        return Devices(None)
    count = jax.device_count()
    size = count if expert_parallel is None else expert_parallel
    if size < 1 or count % size:
        raise UserError(f"--expert-parallel must divide the {count} devices. Got {size}.")
    if settings.dense:
        raise UserError("--expert-parallel and --distributed need experts: remove --dense.")
    if settings.experts % size:
        raise UserError(
            f"--expert-parallel must divide --experts. Got {size} and {settings.experts}."
        )
    axes, shape = ("data", "expert"), (count // size, size)
    return Devices(ExpertParallel(jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 2)))
