"""What a model is made of: modules, shapes, parameters, bytes and FLOPs."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._config import MoEConfig
from .._moe import RoutedAndSharedMoE, RoutedMoE
from .summary_count import (
    TOTALS,
    BlockSummary,
    PartSummary,
    count_block,
    count_rest,
    is_array,
    is_packed,
)
from .summary_text import summary_html, summary_text


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """What `braidax.summary` returns; print it, or let a notebook show it as a table.

    - `name`: the class of what was summarised.
    - `blocks`: one `BlockSummary` for every mixture-of-experts block, in model order.
    - `other`: the rest of the model, or None where there is none.

    The totals are exact Python integers. `parameters` and `num_bytes` are of the whole model,
    `active` is the parameters that one token uses. FLOPs are per token, of the blocks alone.
    """

    name: str
    blocks: tuple[BlockSummary, ...]
    other: PartSummary | None

    @property
    def parameters(self) -> int:
        """Parameters of the blocks and of the rest."""
        return self._sum("parameters")

    @property
    def active(self) -> int:
        """Parameters that one token uses: K of E routed experts, and everything else."""
        return self._sum("active")

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays, hash tables included."""
        return self._sum("num_bytes")

    @property
    def forward_flops(self) -> int:
        """FLOPs of the blocks for one token, forward."""
        return self._sum("forward_flops")

    @property
    def backward_flops(self) -> int:
        """FLOPs of the blocks for one token, backward."""
        return self._sum("backward_flops")

    def _sum(self, name: str) -> int:
        parts = self.blocks if self.other is None else (*self.blocks, self.other)
        return sum(getattr(part, name) for part in parts)

    def _rows(self) -> tuple[tuple[BlockSummary, ...], PartSummary | None, PartSummary]:
        total = PartSummary(f"{self.name}, all", "", {}, *map(self._sum, TOTALS))
        return self.blocks, self.other, total

    def to_dict(self) -> dict[str, Any]:
        """All of it as what JSON can hold."""
        return {
            "name": self.name,
            **{name: self._sum(name) for name in TOTALS},
            "blocks": [block.to_dict() for block in self.blocks],
            "other": None if self.other is None else self.other.to_dict(),
        }

    def __repr__(self) -> str:
        return summary_text(*self._rows())

    def _repr_html_(self) -> str:
        return summary_html(*self._rows())


def summary(model: PyTree | MoEConfig) -> Summary:
    """Modules, shapes, parameters (all and those a token uses), bytes and FLOPs per token.

    `model` is a `MoEConfig` (one top-k layer of it, in float32, of which nothing is allocated), a
    `RoutedMoE` or `RoutedAndSharedMoE`, or any PyTree that holds some. What
    `eqx.filter_eval_shape` returns will do. A block stacked over layers, for `jax.lax.scan`,
    counts as so many layers, each of which every token passes.

    What is counted:

    - Parameters: floating-point arrays, and the numbers that packed experts hold. The selection
      bias is one, though no gradient trains it; a hash table is not, but its bytes count.
    - Active: of E routed experts the K that a token uses; gate, shared expert and the rest of the
      model wholly.
    - FLOPs, for one token: 2 for each multiply-add in the matrix products of gate, K experts and
      shared expert; nothing for elementwise work, sorting or the rest of the model. Backward is
      twice forward (gradients of inputs and of weights), and once where weights are packed.
      `remat`, capacities and the backend `"dense"`, which computes all experts, are not.
    - Experts and routers of another class: every matrix is taken as one product per token, and
      the first axis of every array of the experts as the expert axis.

    **Example:** DeepSeek-V4-Flash: a token uses 177 million of a layer's 6.5 billion parameters.

        >>> import braidax as bx
        >>> layer = bx.summary(bx.MoEConfig.deepseek_v4_flash())
        >>> layer.parameters, layer.active, layer.forward_flops
        (6468665600, 177209600, 354418688)

    **Raises:** `TypeError` for a class instead of an instance, or if `model` holds no array, and
    `ValueError` for a router without a weight, as in one half of `eqx.partition`.
    """
    if isinstance(model, MoEConfig):
        model = _layer_of(model)
    if isinstance(model, type) or not any(map(is_array, jax.tree.leaves(model))):
        raise TypeError(
            f"`model` must be a MoEConfig or a PyTree that holds arrays. Got {model!r:.200}."
        )
    nodes = jax.tree_util.tree_leaves_with_path(
        model, is_leaf=lambda node: _is_block(node) or is_packed(node)
    )
    blocks = tuple(count_block(_path(path), node) for path, node in nodes if _is_block(node))
    rest = count_rest([leaf for _, leaf in nodes if not _is_block(leaf)])
    return Summary(type(model).__name__, blocks, rest)


def _layer_of(config: MoEConfig) -> PyTree:
    """The shapes of the first layer of `config` that is not hashed."""
    kind = RoutedAndSharedMoE if config.num_shared_experts else RoutedMoE
    key = jax.eval_shape(lambda: jax.random.key(0))
    return eqx.filter_eval_shape(kind.from_config, config, config.num_hash_layers, key=key)


def _is_block(node: Any) -> bool:
    return isinstance(node, RoutedMoE | RoutedAndSharedMoE)


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path).removeprefix(".")
