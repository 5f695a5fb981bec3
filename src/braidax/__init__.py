"""Mixture-of-experts routing for Equinox and JAX."""

# Hash tables: token -> experts
from . import hash_tables as hash_tables
from ._balance import dead_experts as dead_experts
from ._balance import expert_load as expert_load
from ._balance import load_entropy as load_entropy
from ._balance import max_violation as max_violation
from ._balance import updated_bias as updated_bias

# Balance
from ._balance_losses import batch_balance_loss as batch_balance_loss
from ._balance_losses import router_z_loss as router_z_loss
from ._balance_losses import sequence_balance_loss as sequence_balance_loss

# Weights
from ._checkpoint import from_state_dict as from_state_dict
from ._checkpoint import load_moe as load_moe
from ._checkpoint import save_moe as save_moe
from ._checkpoint import to_state_dict as to_state_dict

# Configuration
from ._config import MoEConfig as MoEConfig
from ._config import is_hash_layer as is_hash_layer

# Experts
from ._experts import AbstractExperts as AbstractExperts
from ._experts import SwiGLU as SwiGLU
from ._experts import SwiGLUExperts as SwiGLUExperts

# Looking
from ._inspect import plot_balance as plot_balance
from ._inspect import plot_bias as plot_bias
from ._inspect import plot_coactivation as plot_coactivation
from ._inspect import plot_load as plot_load
from ._inspect import plot_token_experts as plot_token_experts
from ._inspect import plot_weights as plot_weights
from ._inspect import report as report
from ._inspect import summary as summary

# Blocks
from ._moe import RoutedAndSharedMoE as RoutedAndSharedMoE
from ._moe import RoutedMoE as RoutedMoE

# Scale
from ._parallel import ExpertParallel as ExpertParallel
from ._parallel import plan as plan

# Routers
from ._router import AbstractRouter as AbstractRouter
from ._router import HashRouter as HashRouter
from ._router import TopKRouter as TopKRouter

# Records
from ._routing import Routing as Routing

# Scoring
from ._scoring import sqrt_softplus as sqrt_softplus

# Training
from ._training.filters import decay_mask as decay_mask
from ._training.filters import rebalance as rebalance
from ._training.filters import trainable as trainable
