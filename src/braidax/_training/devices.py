"""Which devices a run uses, and what each of its processes may read and write.

`--expert-parallel` and `--distributed` belong to a run and not to its settings: a run may stop on
one device and continue on many, or the other way.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import tempfile
from collections.abc import Generator
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from .._parallel import ExpertParallel
from .settings import Settings, UserError


def join_processes() -> None:
    """Connect to the other processes, which `jax.distributed` finds in the environment."""
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--distributed: cannot join the other processes: {reason}") from error


@dataclasses.dataclass(frozen=True)
class Devices:
    """Places a run's arrays. `parallel` is None on one device."""

    parallel: ExpertParallel | None

    @property
    def several_processes(self) -> bool:
        """Whether other processes take part."""
        return jax.process_count() > 1

    def place(self, state: Any) -> Any:
        """The training state over all devices."""
        if self.parallel is None:
            return state
        arrays, static = eqx.partition(self.parallel.shard(state), eqx.is_array)
        return eqx.combine(jax.device_put(arrays, self.parallel.shardings(arrays)), static)

    def spread(self, windows: Int[np.ndarray, "batch _"]) -> Int[Array | np.ndarray, "batch _"]:
        """Windows over all devices where they divide, else on every device."""
        if self.parallel is None:
            return windows
        divides = len(windows) % self.parallel.layout.token_shards == 0
        spec = PartitionSpec(self.parallel.tokens) if divides else PartitionSpec()
        return jax.device_put(windows, NamedSharding(self.parallel.mesh, spec))

    def on_host(self, tree: Any) -> Any:
        """The whole of every array, on every process."""
        if not self.several_processes:
            return tree
        arrays, static = eqx.partition(tree, eqx.is_array)
        return eqx.combine(multihost_utils.process_allgather(arrays, tiled=True), static)

    def agreed(self, value: int | None) -> int | None:
        """The largest value that any process has, so that all stop at the same step."""
        if not self.several_processes:
            return value
        return int(np.max(multihost_utils.process_allgather(np.int32(value or 0)))) or None

    @contextlib.contextmanager
    def failing_together(self) -> Generator[None, None, None]:
        """An `OSError` of one process becomes one of all: none waits for another that has ended.

        Every process enters, and none waits for another inside after it may have failed.
        """
        failure = None
        try:
            yield
        except OSError as error:
            failure = error
        number = self.agreed(None if failure is None else failure.errno or errno.EIO)
        if failure is not None:
            raise failure
        if number is not None:
            raise OSError(number, f"{os.strerror(number)} (another process)")

    @contextlib.contextmanager
    def only_one_writes(self, folder: pathlib.Path) -> Generator[pathlib.Path, None, None]:
        """`folder` on the first process; the others are silent and write where it is lost."""
        if jax.process_index() == 0:
            yield folder
            return
        with (
            tempfile.TemporaryDirectory() as lost,
            open(os.devnull, "w") as silence,
            contextlib.redirect_stdout(silence),
        ):
            try:
                yield pathlib.Path(lost)
            except UserError as error:
                # About the folder that was asked for.
                raise type(error)(str(error).replace(lost, str(folder))) from error


def find_devices(settings: Settings, expert_parallel: int | None, distributed: bool) -> Devices:
    """One device, or all of them with `expert_parallel` along the expert axis and the rest along
    the data axis. Raises `UserError` where the numbers do not fit."""
    if distributed:
        join_processes()
    if expert_parallel is None and not distributed:
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
    mesh = jax.make_mesh(
        (count // size, size),
        ("data", "expert"),
        axis_types=(jax.sharding.AxisType.Auto, jax.sharding.AxisType.Auto),
    )
    return Devices(ExpertParallel(mesh))
