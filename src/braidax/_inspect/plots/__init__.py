"""Pictures of routing. Matplotlib is imported when a plot is drawn."""

from .curves import plot_balance as plot_balance
from .curves import plot_bias as plot_bias
from .heat_maps import plot_coactivation as plot_coactivation
from .heat_maps import plot_load as plot_load
from .token_experts import plot_token_experts as plot_token_experts
from .weights import plot_weights as plot_weights
