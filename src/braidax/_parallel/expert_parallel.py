"""`ExpertParallel`: the dispatch over a mesh, and where a model's arrays live on it."""

from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from .._dispatch import AbstractDispatch, checked_kernel
from .._matmul import AbstractGroupedMatmul
from .._routing import Routing
from .exchange import AbstractExchange
from .gather import Gather
from .layout import MeshLayout
from .placement import check_experts, is_block, placed, shardings
from .shards import experts_on_shards, route_on_shards, route_together

_NO_CHECKS = (
    "`checks` must be False over a mesh. Got True: an error that is raised on one device leaves "
    "the others waiting for it."
)


class ExpertParallel(AbstractDispatch):
    """Tokens spread over axes of a mesh, and experts over one of these axes or over none.

    Losses, loads and the bias update are functions of the returned global `Routing`, as on one
    device. Where experts are spread the block supports reverse mode once and no forward mode, and
    recomputes the experts' pre-activations in the backward pass. It is not meant for `jax.vmap`:
    give it leading axes instead. A `key` is folded with the device's number before it reaches the
    router.

    The fields are the arguments of the constructor.

    **Source:** GShard (arXiv:2006.16668), section 3.

    **Example:** on one device here; `(2, 4)` devices are used in the same way.

        >>> import braidax as bx, jax
        >>> auto = (jax.sharding.AxisType.Auto,) * 2
        >>> mesh = jax.make_mesh((1, 1), ("data", "expert"), axis_types=auto)
        >>> parallel = bx.ExpertParallel(mesh)
        >>> block = bx.RoutedAndSharedMoE.from_config(bx.MoEConfig.tiny(), 2, key=jax.random.key(0))
        >>> block = parallel.shard(block)  # called as before; the answer is that of one device
        >>> parallel.shardings(block).routed.experts.down.spec[0]
        'expert'
        >>> parallel.layout.size, parallel.layout.token_shards
        (1, 1)
    """

    mesh: Mesh = eqx.field(static=True)
    axis: str | None = eqx.field(static=True)
    tokens: tuple[str, ...] = eqx.field(static=True)
    exchange: AbstractExchange | None
    matmul: AbstractGroupedMatmul

    def __init__(
        self,
        mesh: Mesh,
        *,
        axis: str | None = "expert",
        tokens: tuple[str, ...] = ("data", "expert"),
        exchange: AbstractExchange | None = None,
        matmul: AbstractGroupedMatmul | None = None,
    ):
        """**Arguments:**

        - `mesh`: a `jax.sharding.Mesh` whose axes named here are all Auto or all Explicit.
        - `axis`: the mesh axis that experts are spread over. `None` is data parallelism alone: each
            device computes its own tokens by all experts, and no token moves.
        - `tokens`: the mesh axes that tokens are spread over, in order; `axis` is one of them. Over
            all other axes the work is repeated. On an Auto mesh a surrounding `jax.shard_map` may
            have taken those axes.
        - `exchange`: how tokens and experts meet: `exchange.Gather()`, the default,
            `exchange.AllToAll(capacity)` or `exchange.Ragged()`. `None` where `axis` is `None`.
        - `matmul`: the kernel of the experts' products; by default `Auto()`.

        Weights may be stored in parts over any axis of the mesh, as in FSDP. They are gathered
        over all axes but `axis` when they are used.

        **Raises:** `ValueError` or `TypeError` naming the argument.
        """
        MeshLayout(mesh, axis, tokens)  # raises the errors of these three
        if not isinstance(exchange, AbstractExchange | None):
            raise TypeError(
                "`exchange` must be an exchange, as `braidax.exchange.Gather()`. "
                f"Got {exchange!r:.60}."
            )
        if axis is None and exchange is not None:
            raise ValueError(f"`exchange` must be None where `axis` is None. Got {exchange!r}.")
        if axis is not None and exchange is None:
            exchange = Gather()
        self.mesh = mesh
        self.axis = axis
        self.tokens = tokens
        self.exchange = exchange
        self.matmul = checked_kernel(matmul)

    @property
    def layout(self) -> MeshLayout:
        """The mesh and its axes, with the number of devices on them."""
        return MeshLayout(self.mesh, self.axis, self.tokens)

    def route(self, router, hidden_states, input_ids, *, mask, key, indices):
        """As `AbstractDispatch.route`: `router` on the part of `hidden_states`, `input_ids`, `mask`
        and `indices` that each device has, with `key` folded with its number. A router that
        compares tokens, and has no `indices` to do without, sees all of them, and `key` as it is.
        """
        together = router.compares_tokens and indices is None
        route = route_together if together else route_on_shards
        return route(self.layout, router, (hidden_states, input_ids, mask, indices), key)

    def checked(self, routing: Routing) -> Routing:
        """**Raises:** `ValueError`, always: an error on one device leaves the others waiting."""
        raise ValueError(_NO_CHECKS)

    def __call__(self, experts, hidden_states, routing):
        """As `AbstractDispatch.__call__`."""
        how = (self.layout, self.exchange, self.matmul)
        return experts_on_shards(*how, experts, hidden_states, routing)

    def shard(self, model: PyTree) -> PyTree:
        """`model` with this dispatch in every `RoutedMoE`, and every array where `shardings` says.

        An optimizer state has to be sharded as well, alone or in one tree with the model. So does
        what was loaded from a checkpoint. Under `jax.jit` arrays are not placed.

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
            if block.dispatch != self:  # else a part of a model that was checked
                check_experts(self.layout, block)

        def replace(node: Any) -> Any:
            return eqx.tree_at(lambda b: b.dispatch, node, self) if is_block(node) else node

        return placed(self.layout, jax.tree.map(replace, model, is_leaf=is_block))

    def shardings(self, model: PyTree) -> PyTree:
        """One `NamedSharding` for every array of `model`: for `jax.jit(out_shardings=...)`,
        `jax.device_put` and checkpoint libraries.

        `model` may be the model, its gradient or an optimizer state, of arrays or
        `jax.ShapeDtypeStruct`s. Experts are spread over `axis`. Otherwise an array keeps the
        sharding that it has on this mesh, and is on every device if it has none. `None` for
        everything that is not an array.
        """
        return shardings(self.layout, model)
