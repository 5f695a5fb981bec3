"""Weights in and out: names, shapes and dtypes of released checkpoints."""

from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import load_moe as load_moe
from .save import save_moe as save_moe
from .state_dict import from_state_dict as from_state_dict
from .state_dict import to_state_dict as to_state_dict
