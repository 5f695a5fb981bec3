"""Which arrays of a model are matrices to Muon, and along which of their axes."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers

from ._experts import Experts, FeedForward
from ._filters import check_tree, is_router
from ._moe import LatentProjection

# Counted from the last axis: experts, gate and up, and stacked layers are then batch axes.
_INPUT_LAST = MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
_OUTPUT_LAST = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
_FEED_FORWARD = {"gate_up": _INPUT_LAST, "down": _OUTPUT_LAST}
_MATRICES: dict[type, dict[str, MuonDimensionNumbers]] = {
    Experts: _FEED_FORWARD,
    FeedForward: _FEED_FORWARD,
    LatentProjection: {"down": _INPUT_LAST, "up": _INPUT_LAST},
    eqx.nn.Linear: {"weight": _INPUT_LAST},
}


def _has_rule(node: Any) -> bool:
    return is_router(node) or isinstance(node, tuple(_MATRICES))


def _numbers(node: Any) -> PyTree[MuonDimensionNumbers | None]:
    """The numbers of a module with a rule. Of anything else, a router too, None everywhere."""
    matrices = next((found for kind, found in _MATRICES.items() if isinstance(node, kind)), {})

    def number(path: tuple, _: Any) -> MuonDimensionNumbers | None:
        # A module that stands in for an array of `Experts` has a longer path.
        return matrices.get(path[0].name) if len(path) == 1 and matrices else None

    return jax.tree_util.tree_map_with_path(number, node)


def muon_dimension_numbers(params: PyTree) -> PyTree[MuonDimensionNumbers | None]:
    """What `optax.contrib.muon` orthogonalizes in `params`, as its
    `muon_weight_dimension_numbers=braidax.muon_dimension_numbers`.

    Same structure as `params`. Each matrix is orthogonalized by itself: the axes of experts, of
    gate and up and of stacked layers are batch axes. `None` leaves an array to AdamW.

    - Matrices are `gate_up` and `down` of `Experts` and `FeedForward`, `down` and `up` of
        `LatentProjection`, and the `weight` of every `eqx.nn.Linear`.
    - AdamW takes all else: routers, biases, norms, embeddings, shared gates, adapters that stand in
        for an array, experts of a class of your own.

    An output head is an `eqx.nn.Linear` too, which most recipes leave to AdamW: take the head out
    by `eqx.tree_at`, as below. Other matrices of yours are put in the same way.

    `params` may be the model, the trainable half of `eqx.partition(model, trainable(model))`, or a
    tree that holds `None` or `optax.MaskedNode`s. Give optax a function, never a tree: optax calls
    a tree that is a callable module. In `optax.inject_hyperparams` name the function, by
    `static_args="muon_weight_dimension_numbers"`.

    The factor of `optax.contrib.muon` for a shape is that of one matrix. Leave `adaptive` off: in
    optax 0.2.8 its scale is one for a whole array, made of the gradients of all experts.

    **Raises:** `TypeError` if `params` is no tree, as the step count of such a call.

    **Source:** Muon for mixtures of experts: arXiv:2502.16982.

    **Example:** a linear layer as the head, left to AdamW.

        >>> import braidax as bx, equinox as eqx, jax, optax
        >>> block_key, head_key = jax.random.split(jax.random.key(0))
        >>> model = {"block": bx.top_k_moe(32, 16, 8, 2, key=block_key),
        ...          "head": eqx.nn.Linear(32, 100, key=head_key)}
        >>> def numbers(params):
        ...     found = bx.muon_dimension_numbers(params)
        ...     return eqx.tree_at(lambda found: found["head"].weight, found, None)
        >>> optimizer = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=numbers)
        >>> numbers(model)["block"].experts.down
        MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        >>> numbers(model)["block"].router.gate.weight, numbers(model)["head"].weight
        (None, None)
    """
    check_tree("params", params)
    return jax.tree.map(_numbers, params, is_leaf=_has_rule)
