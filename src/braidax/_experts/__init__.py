"""Experts: see rows grouped by expert, and never know what a token is."""

from . import activations as activations
from .base import AbstractExperts as AbstractExperts
from .experts import Experts as Experts
from .experts import FeedForward as FeedForward
