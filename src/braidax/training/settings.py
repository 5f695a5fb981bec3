"""The options of a training run: one table for the command line, the checkpoint and the report."""

import dataclasses
import math
from typing import Any

from .._config import MoEConfig

VOCAB_SIZE = 256  # a token is a byte


class UserError(ValueError):
    """A mistake in what the user gave, in one line: the command line shows no traceback."""


def _option(default: Any, help: str, minimum: int | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "minimum": minimum})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run, and nothing else.

    `python -m braidax train --help` explains every field. Raises `UserError` for a bad value.
    """

    text: str | None = _option(
        None,
        "file or folder to read as bytes; hidden and binary files are skipped, about one file in"
        " ten is held out (default: the Python standard library's own source, read in place)",
    )
    steps: int = _option(400, "optimizer steps", 1)
    batch: int = _option(16, "windows per step", 1)
    length: int = _option(128, "bytes per window that are predicted", 1)
    seed: int = _option(0, "seed of the initial weights and of the windows", 0)
    learning_rate: float = _option(
        3e-3, "peak of the schedule: linear warm-up over a tenth of the steps, cosine to 10 %%", 0
    )
    balance_rate: float = _option(
        0.01,
        "how far a step moves the selection bias of every top-k router, at the peak of the same"
        " schedule; 0 turns balancing off. DeepSeek-V4 uses 0.001, which suits long runs",
        0,
    )
    dense: bool = _option(
        False,
        "replace every mixture-of-experts block by one dense SwiGLU with at least as many active"
        " parameters, gate included: the baseline",
    )
    hidden: int = _option(64, "width of the residual stream", 1)
    layers: int = _option(4, "decoder layers", 1)
    heads: int = _option(4, "attention heads; twice this must divide --hidden", 1)
    experts: int = _option(16, "routed experts per layer", 1)
    experts_per_token: int = _option(2, "routed experts each byte uses", 1)
    intermediate: int = _option(64, "width of one expert", 1)
    shared_experts: int = _option(1, "widths of --intermediate that every byte uses as well", 1)
    hash_layers: int = _option(1, "first layers, routed by byte value instead of by content", 0)
    log_every: int = _option(20, "steps between two lines of progress and rows of metrics.csv", 1)
    checkpoint_every: int = _option(100, "steps between two checkpoints", 1)
    eval_windows: int = _option(512, "held-out windows of the final report, at most", 1)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, minimum = getattr(self, field.name), field.metadata["minimum"]
            if minimum is not None and not minimum <= value < 2**31:
                raise UserError(
                    f"{flag(field.name)} must be at least {minimum} and below 2**31."
                    f" Got {value!s:.60}."
                )
        if self.hidden % (2 * self.heads):
            raise UserError(
                "--hidden must be a multiple of twice --heads (positions rotate pairs)."
                f" Got {self.hidden} and {self.heads}."
            )
        for part, whole in (("experts_per_token", "experts"), ("hash_layers", "layers")):
            if getattr(self, part) > getattr(self, whole):
                raise UserError(
                    f"{flag(part)} must be at most {flag(whole)}."
                    f" Got {getattr(self, part)} and {getattr(self, whole)}."
                )

    def moe_config(self) -> MoEConfig:
        """The routed layers of this run."""
        return MoEConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_experts=self.experts,
            num_experts_per_token=self.experts_per_token,
            vocab_size=VOCAB_SIZE,
            num_shared_experts=self.shared_experts,
            num_hash_layers=self.hash_layers,
        )

    def layer_names(self) -> tuple[str, ...]:
        """One name per routed layer, hash layers marked; none for a dense model."""
        names = (f"{i} (hash)" if i < self.hash_layers else str(i) for i in range(self.layers))
        return () if self.dense else tuple(names)

    def dense_width(self) -> int:
        """Width of the dense SwiGLU whose `3 * hidden * width` parameters are at least the active
        ones of a routed layer: experts in use, shared experts and the gate."""
        active = (self.experts_per_token + self.shared_experts) * self.intermediate
        return active + math.ceil(self.experts / 3)


def flag(name: str) -> str:
    """`balance_rate` -> `--balance-rate`."""
    return "--" + name.replace("_", "-")
