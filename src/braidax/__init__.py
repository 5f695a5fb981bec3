"""Mixture-of-experts layers for Equinox and JAX: the public names, grouped by stage."""

# ruff: noqa: I001 - in the order of the stages

# Records
from ._routing import Routing as Routing
from ._routing import over_capacity as over_capacity

# Scoring
from ._scoring import sqrt_softplus as sqrt_softplus

# Routers, and tables from token to experts
from ._router import AbstractRouter as AbstractRouter
from ._router import ExpertChoiceRouter as ExpertChoiceRouter
from ._router import Gate as Gate
from ._router import HashRouter as HashRouter
from ._router import TopKRouter as TopKRouter
from . import hash_tables as hash_tables

# Products
from . import matmul as matmul
from ._matmul import AbstractGroupedMatmul as AbstractGroupedMatmul
from ._matmul import GroupedMatmul as GroupedMatmul

# Experts
from ._experts import AbstractExperts as AbstractExperts
from ._experts import Experts as Experts
from ._experts import FeedForward as FeedForward
from ._experts import activations as activations

# Dispatch
from ._dispatch import AbstractDispatch as AbstractDispatch
from ._dispatch import DenseDispatch as DenseDispatch
from ._dispatch import SortedDispatch as SortedDispatch

# Blocks
from ._moe import LatentProjection as LatentProjection
from ._moe import RoutedAndSharedMoE as RoutedAndSharedMoE
from ._moe import RoutedMoE as RoutedMoE
from ._common import top_k_moe as top_k_moe
from ._upcycle import upcycle as upcycle

# Configuration
from ._config import MoEConfig as MoEConfig

# Balance
from ._balance import dead_experts as dead_experts
from ._balance import expert_load as expert_load
from ._balance import load_entropy as load_entropy
from ._balance import max_violation as max_violation
from ._balance_losses import batch_balance_loss as batch_balance_loss
from ._balance_losses import router_z_loss as router_z_loss
from ._balance_losses import sequence_balance_loss as sequence_balance_loss
from ._loss_moments import LossMoments as LossMoments
from ._loss_moments import loss_moments as loss_moments
from ._quantile_bias import BiasHistogram as BiasHistogram
from ._quantile_bias import bias_histogram as bias_histogram
from ._quantile_bias import quantile_bias as quantile_bias
from ._sign_bias import updated_bias as updated_bias

# Training
from ._bias_update import rebalance as rebalance
from ._filters import cast as cast
from ._filters import decay_mask as decay_mask
from ._filters import routers as routers
from ._filters import trainable as trainable
from ._memory import keep_memory as keep_memory
from ._muon import muon_dimension_numbers as muon_dimension_numbers

# Weights
from ._checkpoint import Checkpoint as Checkpoint
from ._checkpoint import from_state_dict as from_state_dict
from ._checkpoint import load_moe as load_moe
from ._checkpoint import save_moe as save_moe
from ._checkpoint import to_state_dict as to_state_dict

# Scale
from . import exchange as exchange
from ._parallel import ExpertParallel as ExpertParallel
from ._parallel import plan as plan

# Looking
from ._inspect import plot_balance as plot_balance
from ._inspect import plot_bias as plot_bias
from ._inspect import plot_coactivation as plot_coactivation
from ._inspect import plot_load as plot_load
from ._inspect import plot_token_experts as plot_token_experts
from ._inspect import plot_weights as plot_weights
from ._inspect import report as report
from ._inspect import summary as summary
