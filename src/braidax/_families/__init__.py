"""Tables of released models: one file a family."""

from .deepseek import DEEPSEEK as DEEPSEEK
from .family import Family as Family

FAMILIES = (DEEPSEEK,)
