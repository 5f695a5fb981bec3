"""A small byte-level language model, its corpus and a minimal training loop.

`python -m braidax train` and `python -m braidax report` are this package on the command line.
"""

from .corpus import Corpus as Corpus
from .corpus import held_out_windows as held_out_windows
from .corpus import read_corpus as read_corpus
from .corpus import training_windows as training_windows
from .loop import resume as resume
from .loop import train as train
from .model import LanguageModel as LanguageModel
from .reports import report_run as report_run
from .settings import Settings as Settings
from .settings import UserError as UserError
from .step import State as State
from .step import evaluate as evaluate
from .step import initial_state as initial_state
from .step import make_optimizer as make_optimizer
from .step import make_step as make_step
from .step import next_byte_loss as next_byte_loss
