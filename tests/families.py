"""Layers of every family from their folders, Llama-4's as the guide opens them."""

import dataclasses
import pathlib

import equinox as eqx
import jax
from pages import definition

import braidax as bx

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "guide" / "families.md"


def read_config(folder):
    """The configuration, to be used with `with_dispatch`."""
    return dataclasses.replace(bx.MoEConfig.from_hf(folder), weighted_input=False)


def with_dispatch(block, folder):
    """`block` with the dispatch of the guide, if the family needs it."""
    if not bx.MoEConfig.from_hf(folder).weighted_input:
        return block
    dispatch = definition(PAGE, "WeightedInput", bx=bx, jax=jax)()
    return eqx.tree_at(lambda block: block.routed.dispatch, block, dispatch)


def load_moe(folder, layer_idx, **options):
    """Layer `layer_idx` of the checkpoint."""
    block = bx.load_moe(folder, layer_idx, config=read_config(folder), **options)
    return with_dispatch(block, folder)
