"""Routers: which experts, with what weight. A new router is one file here."""

from .base import AbstractRouter as AbstractRouter
from .base import check_hidden_states as check_hidden_states
from .base import check_mask as check_mask
from .base import checked_ids as checked_ids
from .base import checked_indices as checked_indices
from .base import named_experts as named_experts
from .expert_choice import ExpertChoiceRouter as ExpertChoiceRouter
from .from_config import router_from_config as router_from_config
from .gate import Gate as Gate
from .gate import GateOptions as GateOptions
from .hash import HashRouter as HashRouter
from .top_k import TopKRouter as TopKRouter
