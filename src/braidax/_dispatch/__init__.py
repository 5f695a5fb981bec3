"""Dispatch: how tokens meet experts. A new dispatch is one file."""

from .base import AbstractDispatch as AbstractDispatch
from .base import checked_kernel as checked_kernel
from .dense import DenseDispatch as DenseDispatch
from .rows import plan_rows as plan_rows
from .sorted import SortedDispatch as SortedDispatch
from .sorted import weighted_sum as weighted_sum
