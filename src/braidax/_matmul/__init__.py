"""Grouped matrix products: every row times the matrix of its group. A new kernel is one file."""

from .auto import Auto as Auto
from .base import AbstractGroupedMatmul as AbstractGroupedMatmul
from .base import check_kernel as check_kernel
from .block_loop import LARGEST_BLOCK as LARGEST_BLOCK
from .blocks import Blocks as Blocks
from .closure import GroupedMatmul as GroupedMatmul
from .dense import Dense as Dense
from .mosaic import Mosaic as Mosaic
from .network import Activation as Activation
from .network import FeedForwardWeights as FeedForwardWeights
from .network import accumulation_dtype as accumulation_dtype
from .network import num_inputs as num_inputs
from .ragged import Ragged as Ragged
from .ragged import Tokamax as Tokamax
