"""`python -m braidax report`: what the routers of a trained run do with its held-out text."""

import html
import pathlib
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._inspect import Report, plot_coactivation, plot_load, plot_token_experts, report
from .._routing import Routing
from . import checkpoint
from .checkpoint import CheckpointError
from .held_out import HeldOutPass
from .language_model import LanguageModel
from .memory import memory_errors_named
from .settings import Settings, UserError
from .step import initial_state, make_optimizer, next_byte_loss

_TOKENS_DRAWN = 256


def report_run(path: pathlib.Path, out: pathlib.Path | None) -> int:
    """Report on the run in the folder `path`, or whose checkpoint it is, and return the exit code.

    Prints the report; writes it as report.html, with pictures where matplotlib is installed, to
    `out`, by default the run's folder. Raises `UserError`.
    """
    folder = path.parent if path.name == checkpoint.FILE_NAME else path
    header = checkpoint.read_header(folder)
    settings = header.settings
    if settings.dense:
        raise UserError(f"{folder} holds a dense model, which has no routing to report on")
    corpus = checkpoint.read_same_corpus(header)
    with memory_errors_named():
        like = initial_state(settings, make_optimizer(settings))
        model = checkpoint.load_state(folder, like).model
    held_out = HeldOutPass(
        settings, corpus, lambda windows: _loss_and_routings(model, jnp.asarray(windows))
    )
    last_layer: list[Routing] = []
    with memory_errors_named():
        figures = report(
            _keep_last_layer(held_out, last_layer),
            model=model,
            input_ids=held_out.windows[:, :, :-1],
            layer_names=[str(layer) for layer in range(settings.layers)],
            decode=byte_text,
        )
    title = (
        f"{folder}: step {header.step:,} of {settings.steps:,},"
        f" {held_out.bits_per_byte:.4f} bits/byte on {held_out.num_bytes:,} held-out bytes of"
        f" {corpus.source}"
    )
    print(f"{title}\n\n{figures}")
    out = folder if out is None else out
    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures, note = _draw(out, settings, figures, last_layer, held_out.windows)
        (out / "report.html").write_text(_page(title, figures, pictures), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write to {out}: {error.strerror}") from error
    print(f"\n{note}written: {', '.join(str(out / name) for name in ('report.html', *pictures))}")
    return 0


def byte_text(token_id: int) -> str:
    """A byte as the character it is in ASCII, else in hexadecimal: alone it is none in UTF-8."""
    return chr(token_id) if token_id < 128 else f"0x{token_id:02x}"


def _keep_last_layer(
    held_out: HeldOutPass, last_layer: list[Routing]
) -> Iterator[tuple[Routing, ...]]:
    """The routings of every batch; what pictures need of them is added to `last_layer`."""
    for routings in held_out:
        last_layer.append(jax.device_get(routings[-1]))
        yield routings


@eqx.filter_jit
def _loss_and_routings(
    model: LanguageModel, windows: Int[Array, "batch _"]
) -> tuple[Float[Array, ""], tuple[Routing, ...]]:
    return next_byte_loss(model, windows)


def _draw(
    out: pathlib.Path,
    settings: Settings,
    figures: Report,
    last_layer: list[Routing],
    batches: Int[np.ndarray, "batches batch _"],
) -> tuple[list[str], str]:
    """The names of the pictures written, and a line to print if there are none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return [], 'no pictures: matplotlib is missing (pip install "braidax[plot]")\n'
    last = f"layer {settings.layers - 1}"
    drawn = {"load.png": plot_load(figures.load, layer_names=settings.layer_names())}
    if settings.experts_per_token > 1:
        ax = drawn["coactivation.png"] = plot_coactivation(last_layer)
        ax.set_title(f"{ax.get_title()}, {last}")
    count = min(settings.length, _TOKENS_DRAWN)
    first = jax.tree.map(lambda array: array[0, :count] if array.ndim else array, last_layer[0])
    ax = drawn["token_experts.png"] = plot_token_experts(
        first, batches[0, 0, :count], decode=byte_text
    )
    ax.set_title(f"{ax.get_title()}, {last}")
    for name, ax in drawn.items():
        ax.figure.savefig(out / name, dpi=150)
    return list(drawn), ""


def _page(title: str, figures: Report, pictures: list[str]) -> str:
    """A page that follows the browser's light or dark colours."""
    images = "".join(
        f'<p><img src="{name}" alt="{name}" style="max-width:100%"></p>' for name in pictures
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="color-scheme" content="light dark"><title>braidax report</title></head>'
        f'<body style="font-family:sans-serif"><h1>{html.escape(title)}</h1>'
        f"{figures._repr_html_()}{images}</body></html>\n"
    )
