"""Dispatch and combine: move rows. Neither knows which router chose them."""

from .base import AbstractDispatch as AbstractDispatch
from .dense import DenseDispatch as DenseDispatch
from .dense import dense_dispatch as dense_dispatch
from .sorting import SortedDispatch as SortedDispatch
from .sorting import sorted_dispatch as sorted_dispatch
