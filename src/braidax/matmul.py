"""Kernels of grouped products: how rows are multiplied by the matrices of their groups."""

from ._matmul import Auto as Auto
from ._matmul import Blocks as Blocks
from ._matmul import Dense as Dense
from ._matmul import FeedForwardWeights as FeedForwardWeights
from ._matmul import Mosaic as Mosaic
from ._matmul import Ragged as Ragged
from ._matmul import Tokamax as Tokamax
