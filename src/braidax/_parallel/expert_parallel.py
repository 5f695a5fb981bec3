"""`ExpertParallel`: which mesh, where experts and tokens live on it, and how they meet."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray, PyTree

from .._checks import positive_number
from .._moe import RoutedMoE
from .._routing import Routing
from .all_to_all import all_to_all
from .exchange import Exchange
from .gather import gather
from .placement import check_experts, is_block, place_block, shardings, with_parallel
from .ragged import ragged
from .shards import parallel_routed_sum

# A new strategy is one file and one row.
STRATEGIES: dict[str, Exchange] = {"gather": gather, "all_to_all": all_to_all, "ragged": ragged}


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
    """Experts spread over one axis of a mesh, tokens over that axis and others.

    - `mesh`: a `jax.sharding.Mesh` whose axes named here are all Auto or all Explicit.
    - `axis`: the mesh axis that experts are spread over.
    - `tokens`: the mesh axes that tokens are spread over, in order; `axis` is one of them. Over
      axes of the mesh not named here weights keep their layout; they are gathered over those when
      they are used, and the work is repeated. On an Auto mesh a `shard_map` may have taken those.
    - `strategy`: how tokens and experts meet.
        - `"gather"`: all-gather, then reduce-scatter. Dropless; the traffic of a token grows with
          the number of devices.
        - `"all_to_all"`: one row for each token and destination device, in a fixed number of
          slots. Drops assignments where slots run out, and counts them in `Routing.dropped`.
        - `"ragged"`: the same rows without slots, dropless. Experimental: depends on
          `jax.lax.ragged_all_to_all`, which a CPU emulates.
    - `capacity`: only for `"all_to_all"`: slots for each pair of devices, as a multiple of the even
      share of assignments. Tokens earlier on their device win. `None` drops nothing and moves as
      many bytes as `"gather"`.

    Losses, loads and the bias update are functions of the returned global `Routing`, as on one
    device. The block then supports reverse mode once, no forward mode, and is not meant for
    `jax.vmap`: give it leading axes instead. A `key` is folded with the device's number before it
    reaches the router.

    **Raises:** `ValueError` or `TypeError` naming the argument.

    **Source:** `"gather"` and `"all_to_all"` are GShard's (arXiv:2006.16668) exchanges.

    **Example:** on one device here; `(2, 4)` devices are used in the same way.

        >>> import braidax as bx, jax
        >>> mesh = jax.make_mesh((1, 1), ("data", "expert"))
        >>> parallel = bx.ExpertParallel(mesh)
        >>> block = bx.RoutedAndSharedMoE.from_config(bx.MoEConfig.tiny(), 2, key=jax.random.key(0))
        >>> block = parallel.shard(block)  # called as before; the answer is that of one device
        >>> parallel.shardings(block).routed.experts.down.spec[0]
        'expert'
        >>> parallel.size, parallel.token_shards, parallel.exchange.__name__
        (1, 1, 'gather')
    """

    mesh: Mesh
    _: dataclasses.KW_ONLY
    axis: str = "expert"
    tokens: tuple[str, ...] = ("data", "expert")
    strategy: str = "gather"
    capacity: float | int | None = None

    def __post_init__(self):
        if not isinstance(self.mesh, Mesh):
            raise TypeError(f"`mesh` must be a jax.sharding.Mesh. Got {type(self.mesh).__name__}.")
        if not isinstance(self.tokens, tuple):
            raise TypeError(f"`tokens` must be a tuple of axis names. Got {self.tokens!r}.")
        if self.axis not in self.tokens or len(set(self.tokens)) != len(self.tokens):
            raise ValueError(
                f"`tokens` must hold `axis`, {self.axis!r}, and no name twice. Got {self.tokens}."
            )
        missing = [name for name in self.tokens if name not in self.mesh.axis_names]
        if missing:
            raise ValueError(
                f"`mesh` must hold the axes {self.tokens}. Got {dict(self.mesh.shape)}."
            )
        types = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        types = {types[name] for name in self.tokens}
        if types not in ({AxisType.Auto}, {AxisType.Explicit}):
            raise ValueError(
                f"`mesh` must have the axes {self.tokens} all Auto or all Explicit. "
                f"Got {self.mesh.axis_types}."
            )
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"`strategy` must be one of {list(STRATEGIES)}. Got {self.strategy!r}."
            )
        if self.capacity is not None:
            if self.strategy != "all_to_all":
                raise ValueError(
                    "`capacity` must be None unless `strategy` is 'all_to_all'. "
                    f"Got {self.capacity!r} for {self.strategy!r}."
                )
            object.__setattr__(self, "capacity", positive_number("capacity", self.capacity))

    @property
    def size(self) -> int:
        """Devices on the expert axis."""
        return self.mesh.shape[self.axis]

    @property
    def token_shards(self) -> int:
        """Parts that tokens are split into."""
        return math.prod(self.mesh.shape[name] for name in self.tokens)

    @property
    def exchange(self) -> Exchange:
        """The function behind `strategy`."""
        return STRATEGIES[self.strategy]

    def shard(self, model: PyTree) -> PyTree:
        """`model` with every `RoutedMoE` in it computed this way, its experts placed over `axis`
        and its router on every device. Everything else in `model` is left alone. An optimizer
        state made before has to be sharded as well, alone or in one tree with the model.

        Experts that do not divide over `axis` are kept whole on every device, with a warning, and
        padded by experts that nobody is routed to when they are used.

        **Raises:** `ValueError` for a model without a `RoutedMoE`, for one with the dense backend
        or run-time checks, and for experts whose arrays do not all start with the expert axis.
        """
        blocks = [node for node in jax.tree.leaves(model, is_leaf=is_block) if is_block(node)]
        if not blocks:
            raise ValueError("`model` must hold at least one RoutedMoE. Got none.")
        for block in blocks:
            check_experts(self, block)

        def place(node: Any) -> Any:
            if not is_block(node):
                return node
            return place_block(self, with_parallel(self, node))

        return jax.tree.map(place, model, is_leaf=is_block)

    def shardings(self, model: PyTree) -> PyTree:
        """One `NamedSharding` for every array of `model`, which may be the model, its gradient or
        an optimizer state, of arrays or `jax.ShapeDtypeStruct`s: for `jax.jit(out_shardings=...)`,
        `jax.device_put` and checkpoint libraries.

        Experts are spread over `axis` and routers are on every device; anything else keeps the
        sharding that it has on this mesh, and is on every device where it has none. `None` for
        everything that is not an array.
        """
        return shardings(self, model)

    def routed_sum(
        self,
        block: RoutedMoE,
        hidden_states: Float[Array, "*batch hidden"],
        input_ids: Integer[Array, "*batch"] | None,
        mask: Bool[Array, "*batch"] | None,
        routing: Routing | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "*batch hidden"], Routing]:
        """What a sharded `RoutedMoE` calls instead of its own four stages."""
        return parallel_routed_sum(self, block, hidden_states, input_ids, mask, routing, key)
