"""Experts: see rows grouped by expert, and never know what a token is."""

from .base import AbstractExperts as AbstractExperts
from .block_feed_forward import FEED_FORWARD as FEED_FORWARD
from .blocks import BLOCKS as BLOCKS
from .dense import dense_matmul as dense_matmul
from .grouped_matmul import GroupedMatmul as GroupedMatmul
from .grouped_matmul import Kernels as Kernels
from .grouped_matmul import grouped_matmul as grouped_matmul
from .ragged import ragged_matmul as ragged_matmul
from .swiglu import SwiGLU as SwiGLU
from .swiglu import SwiGLUExperts as SwiGLUExperts
from .tokamax import require_tokamax as require_tokamax
from .tokamax import tokamax_matmul as tokamax_matmul
