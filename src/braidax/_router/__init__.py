"""Routers: which experts, with what weight. A new router is one file here."""

from .base import AbstractRouter as AbstractRouter
from .from_config import router_from_config as router_from_config
from .hash import HashRouter as HashRouter
from .top_k import TopKRouter as TopKRouter
