"""Looking at a model: summaries, reports and plots."""

from .plots.curves import plot_balance as plot_balance
from .plots.curves import plot_bias as plot_bias
from .plots.heat_maps import plot_coactivation as plot_coactivation
from .plots.heat_maps import plot_load as plot_load
from .plots.token_experts import plot_token_experts as plot_token_experts
from .plots.weights import plot_weights as plot_weights
from .records import Report as Report
from .reports import report as report
from .summaries import Summary as Summary
from .summaries import summary as summary
