"""`ExpertParallel`: the dispatch over a mesh, and where a model's arrays live on it."""

from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray, PyTree

from .._checks import positive_number
from .._dispatch import AbstractDispatch, checked_kernel
from .._experts import AbstractExperts
from .._matmul import AbstractGroupedMatmul
from .._router import AbstractRouter
from .._routing import Routing
from .all_to_all import all_to_all
from .exchange import Exchange
from .gather import gather
from .layout import MeshLayout
from .placement import check_experts, is_block, place_block, shardings
from .ragged import ragged
from .shards import experts_on_shards, route_on_shards

# A new strategy is one file and one row.
STRATEGIES: dict[str, Exchange] = {"gather": gather, "all_to_all": all_to_all, "ragged": ragged}

_NO_CHECKS = (
    "`checks` must be False over a mesh. Got True: an error that is raised on one device leaves "
    "the others waiting for it."
)


class ExpertParallel(AbstractDispatch):
    """Experts spread over one axis of a mesh, tokens over that axis and others.

    Losses, loads and the bias update are functions of the returned global `Routing`, as on one
    device. The block then supports reverse mode once, no forward mode, and is not meant for
    `jax.vmap`: give it leading axes instead. The experts' pre-activations are always recomputed in
    the backward pass. A `key` is folded with the device's number before it reaches the router.

    The fields are the arguments of the constructor.

    **Source:** `"gather"` and `"all_to_all"` are GShard's (arXiv:2006.16668) exchanges.

    **Example:** on one device here; `(2, 4)` devices are used in the same way.

        >>> import braidax as bx, jax
        >>> mesh = jax.make_mesh((1, 1), ("data", "expert"))
        >>> parallel = bx.ExpertParallel(mesh)
        >>> block = bx.RoutedAndSharedMoE.from_config(bx.MoEConfig.tiny(), 2, key=jax.random.key(0))
        >>> block = parallel.shard(block)  # called as before; the answer is that of one device
        >>> parallel.shardings(block).routed.experts.down.spec[0]
        'expert'
        >>> parallel.layout.size, parallel.layout.token_shards
        (1, 1)
    """

    mesh: Mesh = eqx.field(static=True)
    axis: str = eqx.field(static=True)
    tokens: tuple[str, ...] = eqx.field(static=True)
    strategy: str = eqx.field(static=True)
    capacity: float | None = eqx.field(static=True)
    matmul: AbstractGroupedMatmul

    def __init__(
        self,
        mesh: Mesh,
        *,
        axis: str = "expert",
        tokens: tuple[str, ...] = ("data", "expert"),
        strategy: str = "gather",
        capacity: float | int | None = None,
        matmul: AbstractGroupedMatmul | None = None,
    ):
        """**Arguments:**

        - `mesh`: a `jax.sharding.Mesh` whose axes named here are all Auto or all Explicit.
        - `axis`: the mesh axis that experts are spread over.
        - `tokens`: the mesh axes that tokens are spread over, in order; `axis` is one of them. Over
            all other axes of the mesh, weights keep their layout. Weights are gathered over those
            axes when they are used, and the work is repeated. On an Auto mesh a surrounding
            `jax.shard_map` may have taken those axes.
        - `strategy`: how tokens and experts meet.
            - `"gather"`: all-gather, then reduce-scatter. Dropless; the traffic of a token grows
              with the number of devices.
            - `"all_to_all"`: one row for each token and destination device, in a fixed number of
              slots. Drops assignments if slots run out, and counts them in `Routing.dropped`.
            - `"ragged"`: the same rows without slots, dropless. Experimental: depends on
              `jax.lax.ragged_all_to_all`, which a CPU emulates.
        - `capacity`: only for `"all_to_all"`: slots for each pair of devices, as a multiple of the
            even share of assignments. Tokens earlier on their device win. `None` drops nothing and
            moves as many bytes as `"gather"`.
        - `matmul`: the kernel of the experts' products; by default `Auto()`.

        **Raises:** `ValueError` or `TypeError` naming the argument.
        """
        MeshLayout(mesh, axis, tokens)  # raises the errors of these three
        if strategy not in STRATEGIES:
            raise ValueError(f"`strategy` must be one of {list(STRATEGIES)}. Got {strategy!r}.")
        if capacity is not None:
            if strategy != "all_to_all":
                raise ValueError(
                    "`capacity` must be None unless `strategy` is 'all_to_all'. "
                    f"Got {capacity!r} for {strategy!r}."
                )
            capacity = positive_number("capacity", capacity)
        self.mesh = mesh
        self.axis = axis
        self.tokens = tokens
        self.strategy = strategy
        self.capacity = capacity
        self.matmul = checked_kernel(matmul)

    @property
    def layout(self) -> MeshLayout:
        """The mesh and its axes, with the number of devices on them."""
        return MeshLayout(self.mesh, self.axis, self.tokens)

    def route(
        self,
        router: AbstractRouter,
        hidden_states: Float[Array, "*batch hidden"],
        input_ids: Integer[Array, "*batch"] | None,
        *,
        mask: Bool[Array, "*batch"] | None,
        key: PRNGKeyArray | None,
    ) -> Routing:
        """As `AbstractDispatch.route`: `router` on the part of `hidden_states`, `input_ids` and
        `mask` that each device has, with `key` folded with its number."""
        return route_on_shards(self.layout, router, hidden_states, input_ids, mask, key)

    def checked(self, routing: Routing) -> Routing:
        """**Raises:** `ValueError`, always: an error on one device leaves the others waiting."""
        raise ValueError(_NO_CHECKS)

    def __call__(
        self,
        experts: AbstractExperts,
        hidden_states: Float[Array, "*batch hidden"],
        routing: Routing,
    ) -> tuple[Float[Array, "*batch hidden"], Int[Array, ""]]:
        """As `AbstractDispatch.__call__`."""
        exchange = STRATEGIES[self.strategy]
        return experts_on_shards(
            self.layout, exchange, self.capacity, self.matmul, experts, hidden_states, routing
        )

    def shard(self, model: PyTree) -> PyTree:
        """`model` with this dispatch in every `RoutedMoE`, its experts placed over `axis` and its
        router on every device. Everything else in `model` is left alone. An optimizer state made
        before has to be sharded as well, alone or in one tree with the model.

        Experts that do not divide over `axis` are kept whole on every device, with a warning. When
        they are used, they are padded by experts that nobody is routed to.

        **Raises:** `ValueError` for a model without a `RoutedMoE`, and for run-time checks. Also
        for experts whose arrays do not all start with the expert axis.
        """
        blocks = [node for node in jax.tree.leaves(model, is_leaf=is_block) if is_block(node)]
        if not blocks:
            raise ValueError("`model` must hold at least one RoutedMoE. Got none.")
        for block in blocks:
            if block.checks:
                raise ValueError(_NO_CHECKS)
            check_experts(self.layout, block)

        def place(node: Any) -> Any:
            if not is_block(node):
                return node
            return place_block(self.layout, eqx.tree_at(lambda b: b.dispatch, node, self))

        return jax.tree.map(place, model, is_leaf=is_block)

    def shardings(self, model: PyTree) -> PyTree:
        """One `NamedSharding` for every array of `model`: for `jax.jit(out_shardings=...)`,
        `jax.device_put` and checkpoint libraries.

        `model` may be the model, its gradient or an optimizer state, of arrays or
        `jax.ShapeDtypeStruct`s. Experts are spread over `axis` and routers are on every device.
        Anything else keeps the sharding that it has on this mesh, and is on every device if it has
        none. `None` for everything that is not an array.
        """
        return shardings(self.layout, model)
