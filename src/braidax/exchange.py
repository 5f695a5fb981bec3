"""Exchanges of expert parallelism: how tokens reach the devices of their experts, and return."""

from ._parallel import AllToAll as AllToAll
from ._parallel import Gather as Gather
from ._parallel import Ragged as Ragged
