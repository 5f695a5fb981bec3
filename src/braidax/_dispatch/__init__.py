"""Dispatch: how tokens meet experts. A new dispatch is one file."""

from .base import AbstractDispatch as AbstractDispatch
from .base import checked_kernel as checked_kernel
from .dense import DenseDispatch as DenseDispatch
from .sorted import SortedDispatch as SortedDispatch
