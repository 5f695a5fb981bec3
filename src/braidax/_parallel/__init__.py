"""Expert parallelism: experts spread over the devices of a mesh axis, tokens moved to them."""

from .expert_parallel import ExpertParallel as ExpertParallel
from .plan import Plan as Plan
from .plan import plan as plan
