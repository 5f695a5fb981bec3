"""Expert parallelism: experts spread over the devices of a mesh axis, tokens moved to them."""

from .all_to_all import AllToAll as AllToAll
from .exchange import AbstractExchange as AbstractExchange
from .expert_parallel import ExpertParallel as ExpertParallel
from .gather import Gather as Gather
from .plan import Plan as Plan
from .plan import plan as plan
from .ragged import Ragged as Ragged
