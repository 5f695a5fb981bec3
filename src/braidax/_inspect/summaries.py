"""`summary`: modules, shapes, parameters, bytes and FLOPs of a model."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._config import MoEConfig
from .._moe import RoutedAndSharedMoE, RoutedMoE
from .._text import size_text
from .pages import Note, Table, page_html, page_text
from .parts import BlockSummary, Counts, PartSummary, count_block, count_part, is_packed, sums
from .routers import is_array

_HEAD = ("module", "arrays", "parameters", "active", "bytes", "forward", "backward")
_NOTE = Note("active: parameters that one token uses; forward, backward: FLOPs per token")


@dataclasses.dataclass(frozen=True, repr=False)
class Summary(Counts):
    """The result of `braidax.summary`. Print it, or let a notebook show it as a table.

    - `name`: the class of what was summarised.
    - `blocks`: one `BlockSummary` for every mixture-of-experts block, in model order.
    - `other`: the rest of the model, or None.
    - `parameters`, `num_bytes`: of the whole model. `active`: the parameters that one token uses.
    - `forward_flops`, `backward_flops`: FLOPs per token, of the blocks alone.

    All numbers are exact Python integers.
    """

    name: str
    blocks: tuple[BlockSummary, ...]
    other: PartSummary | None

    def __repr__(self) -> str:
        return page_text(self._page())

    def _repr_html_(self) -> str:
        return page_html(self._page())

    def _page(self) -> list[str | Table]:
        rows = []
        for block in self.blocks:
            title = f"{block.path}: {block.module}" if block.path else block.module
            stacked = f", {block.layers} layers" if block.layers > 1 else ""
            chosen = f"{block.num_experts_per_token} of {block.num_experts} experts"
            rows.append((title, f"{block.router}, {chosen}{stacked}", *_numbers(block)))
            rows.append((f"  dispatch: {block.dispatch}", block.matmul, *[""] * 5))
            for part in block.parts:
                arrays = ", ".join(f"{name} {shape}" for name, shape in part.shapes.items())
                rows.append((f"  {part.name}: {part.module}", arrays, *_numbers(part)))
        if self.other is not None:
            rows.append((self.other.name, "", *_numbers(self.other)[:3], "-", "-"))
        if len(self.blocks) != 1 or self.other is not None:
            rows.append((f"{self.name}, all", "", *_numbers(self)))
        return [Table(_HEAD, rows, 2), "", _NOTE]


def summary(model: PyTree | MoEConfig) -> Summary:
    """Modules, shapes, parameters (all, and those that a token uses), bytes and FLOPs per token.

    `model` is a `MoEConfig`, a `RoutedMoE`, a `RoutedAndSharedMoE`, or any PyTree that holds some.
    A `MoEConfig` stands for one top-k layer of it, and nothing is allocated. Shapes are enough:
    `eqx.filter_eval_shape` gives them. A block stacked over layers, for `jax.lax.scan`,
    counts as so many layers, and every token passes each of them.

    What is counted:

    - Parameters: floating-point arrays, and the numbers that packed experts hold. The selection
      bias is a parameter, though no gradient trains it. A hash table counts in bytes only.
    - Active: `num_experts_per_token` of the routed experts; all of the gate, the shared expert and
      the rest of the model.
    - FLOPs, for one token: 2 for each multiply-add in the matrix products of the gate, the token's
      experts and the shared expert. Elementwise work, sorting and the rest of the model count 0.
      Backward is twice forward (gradients of inputs and of weights), and once for packed weights.
      Capacities, `remat` and a dispatch that computes every expert are not taken into account.
    - Experts and routers of another class: every matrix counts as one product per token, unless its
      name ends in `bias`. The first axis of every array of the experts is the expert axis.
    - The kernel that `Auto()` chooses is that of this machine's platform and the experts' dtype.

    **Example:** DeepSeek-V4-Flash: a token uses 177 million of a layer's 6.5 billion parameters.

        >>> import braidax as bx
        >>> layer = bx.summary(bx.MoEConfig.deepseek_v4_flash())
        >>> layer.parameters, layer.active, layer.forward_flops
        (6468665600, 177209600, 354418688)

    **Raises:** `TypeError` for a class instead of an instance, or if `model` holds no array.
    `ValueError` for a router without a weight, as in one half of `eqx.partition`.
    """
    if isinstance(model, MoEConfig):
        # The first layer that is not hashed.
        kind = RoutedAndSharedMoE if model.num_shared_experts else RoutedMoE
        key = jax.eval_shape(lambda: jax.random.key(0))
        model = eqx.filter_eval_shape(kind.from_config, model, model.num_hash_layers, key=key)
    if isinstance(model, type) or not any(map(is_array, jax.tree.leaves(model))):
        raise TypeError(
            f"`model` must be a MoEConfig or a PyTree that holds arrays. Got {model!r:.200}."
        )
    nodes = jax.tree_util.tree_leaves_with_path(
        model, is_leaf=lambda node: _is_block(node) or is_packed(node)
    )
    blocks = tuple(
        count_block(jax.tree_util.keystr(path).removeprefix("."), node)
        for path, node in nodes
        if _is_block(node)
    )
    rest = count_part("other", [leaf for _, leaf in nodes if not _is_block(leaf)], 0)
    rest = dataclasses.replace(rest, module="", forward_flops=0, backward_flops=0)
    other = dataclasses.replace(rest, shapes={}) if rest.shapes else None
    return Summary(name=type(model).__name__, blocks=blocks, other=other, **sums((*blocks, rest)))


def _is_block(node: Any) -> bool:
    return isinstance(node, RoutedMoE | RoutedAndSharedMoE)


def _numbers(counts: Counts) -> tuple[str, ...]:
    flops = (counts.forward_flops, counts.backward_flops)
    shown = (f"{counts.parameters:,}", f"{counts.active:,}", size_text(counts.num_bytes))
    return (*shown, *(size_text(count, "", 1) for count in flops))
