"""Blocks: the stages of a mixture-of-experts layer, put together."""

from .latent import LatentProjection as LatentProjection
from .routed import RoutedMoE as RoutedMoE
from .shared import RoutedAndSharedMoE as RoutedAndSharedMoE
