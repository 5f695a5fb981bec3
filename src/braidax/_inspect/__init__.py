"""Looking at a model: summaries, reports and plots."""

from .plots import plot_balance as plot_balance
from .plots import plot_load as plot_load
