"""Layers of every family from their folders, Llama-4's as the guide opens them."""

import dataclasses
import pathlib

import equinox as eqx
from pages import definition

import braidax as bx

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "guide" / "families.md"


def read_config(folder):
    """The configuration, to be used with `as_the_guide`."""
    return dataclasses.replace(bx.MoEConfig.from_hf(folder), weighted_input=False)


def as_the_guide(block, folder):
    """`block` with the experts of the guide, if the family needs them."""
    if not bx.MoEConfig.from_hf(folder).weighted_input:
        return block
    wrap = definition(PAGE, "WeightedInput", bx=bx)
    return eqx.tree_at(lambda block: block.routed.experts, block, replace_fn=wrap)


def as_released(block):
    """`block`, or its gradient, with the experts of the library, as `to_state_dict` takes it."""
    routed = getattr(block, "routed", block)
    if isinstance(routed.experts, bx.Experts):
        return block
    return eqx.tree_at(lambda block: block.routed.experts, block, replace_fn=lambda e: e.experts)


def load_moe(folder, layer_idx, **options):
    """Layer `layer_idx` of the checkpoint."""
    block = bx.load_moe(folder, layer_idx, config=read_config(folder), **options)
    return as_the_guide(block, folder)
