"""Routers: which experts, with what weight. A new router is one file here."""

from .base import AbstractRouter as AbstractRouter
from .hash import HashRouter as HashRouter
from .top_k import TopKRouter as TopKRouter
