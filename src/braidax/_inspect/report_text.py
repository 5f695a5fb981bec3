"""A `Report` as lines of text and as HTML."""

import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

from .._checkpoint.summary_text import text_table
from .html import html_details, html_table
from .report_record import Report

_COLUMNS = (
    *("layer", "MaxVio", "batch MaxVio", "entropy", "dead", "top-1"),
    *("confidence", "router entropy", "load"),
)
_NOTE = (
    "MaxVio: max/mean load - 1, over everything and as the mean over batches; entropy: of the load;"
    " top-1: load of the busiest expert; confidence: largest share of a token's weights on one"
    " expert; router entropy: of a token's scores; entropies from 0 to 1. Bars: load of each"
    " expert, half height is the mean, · no load"
)
_BARS = "·▁▂▃▄▅▆▇█"
_MOST_BARS = 32
_GROUPED = ", each bar the largest of {} neighbours"
_MOST_TOKEN_LAYERS = 12
_EXPERTS_SHOWN = 3
_MOST_EXPERTS_IN_HTML = 256  # of all layers; a notebook keeps what it shows


def report_text(report: Report) -> str:
    """Tables of top-k and hash layers, what went wrong, and the most one-sided experts."""
    lines = [_title(report), *_warnings(report), ""]
    for heading, layers in _sections(report):
        lines += [heading, *text_table([_COLUMNS, *_rows(report, layers)], 1), ""]
    lines += _token_lines(report)
    return "\n".join([*lines, *textwrap.wrap(_note(report), 98)])


def report_html(report: Report) -> str:
    """The same, with the top tokens of every expert, in the colours of the page."""
    lines = (_title(report), *_warnings(report))
    parts = [html_details(line) for line in lines]
    for heading, layers in _sections(report):
        parts += [html_details(heading), html_table(_COLUMNS, _rows(report, layers), left=1)]
    parts += _token_tables(report)
    return "".join([*parts, html_details(_note(report))])


def _token_tables(report: Report) -> list[str]:
    """A table of every layer's experts to unfold; the lines of the text where that is too much."""
    if report.top_tokens is None:
        return []
    if report.load.size > _MOST_EXPERTS_IN_HTML:
        return [html_details(line) for line in _token_lines(report)]
    parts = []
    for layer, name in enumerate(report.layer_names):
        rows = [
            (str(expert), _tokens(report, layer, expert), f"{load:,}")
            for expert, load in enumerate(report.load[layer])
        ]
        table = html_table(("expert", "tokens", "load"), rows, left=2)
        parts.append(html_details(f"top tokens of layer {name}", table))
    return parts


def load_bars(load: Int64[np.ndarray, " experts"]) -> str:
    """One block character for each expert: the mean is half height, twice the mean or more full.

    Beyond 32 experts each stands for a group of neighbours and shows the largest load of them.
    """
    size = _group_size(len(load))
    largest = np.maximum.reduceat(load, np.arange(0, len(load), size))
    mean = max(float(load.mean()), 1e-300)
    heights = np.clip(np.rint(4 * largest / mean), largest > 0, 8).astype(int)
    return "".join(_BARS[height] for height in heights)


def _group_size(num_experts: int) -> int:
    return -(-num_experts // _MOST_BARS)


def _note(report: Report) -> str:
    size = _group_size(report.load.shape[1])
    return _NOTE + (_GROUPED.format(size) if size > 1 else "") + "."


def _title(report: Report) -> str:
    batches, tokens = len(report.batch_max_violation), report.num_tokens
    few, most = int(tokens.min()), int(tokens.max())
    layers, experts = report.load.shape
    fewest = "" if few == most else f"{few:,} to "
    return (
        f"{_counted(layers, 'layer')} of {_counted(experts, 'expert')},"
        f" {fewest}{_counted(most, 'token')} in {_counted(batches, 'batch', 'es')}"
    )


def _counted(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _batch_means(report: Report) -> Float64[np.ndarray, " layers"]:
    """Of MaxVio, over the batches with a token; NaN where there is none."""
    known = ~np.isnan(report.batch_max_violation)
    total = np.sum(report.batch_max_violation, axis=0, where=known)
    number = known.sum(axis=0)
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


def _warnings(report: Report) -> list[str]:
    lines = []
    for what, counts in (
        ("assignments dropped", report.dropped),
        ("tokens with a weight or score that is not finite", report.undefined),
    ):
        if counts.any():
            each = zip(report.layer_names, counts, strict=True)
            found = ", ".join(f"{count:,} in layer {name}" for name, count in each if count)
            lines.append(f"{what}: {found}")
    return lines


def _sections(report: Report) -> list[tuple[str, list[int]]]:
    """A heading and the positions of its layers; hash layers last."""
    if report.routers is None:
        everything = list(range(len(report.layer_names)))
        return [("layers (give `model=` to tell hash from top-k)", everything)]
    kinds = sorted(set(report.routers), key=lambda kind: (kind == "hash", kind))
    sections = []
    for kind in kinds:
        fixed = ": fixed by token id, no training moves their load" if kind == "hash" else ""
        layers = [layer for layer, router in enumerate(report.routers) if router == kind]
        sections.append((f"{kind} layers{fixed}", layers))
    return sections


def _rows(report: Report, layers: Sequence[int]) -> list[tuple[str, ...]]:
    batches = _batch_means(report)
    return [
        (
            report.layer_names[layer],
            f"{report.max_violation[layer]:.2f}",
            f"{batches[layer]:.2f}",
            f"{report.load_entropy[layer]:.3f}",
            str(report.dead_experts[layer]),
            f"{report.top_1_share[layer]:.1%}",
            f"{report.confidence[layer]:.3f}",
            f"{report.router_entropy[layer]:.3f}",
            load_bars(report.load[layer]),
        )
        for layer in layers
    ]


def _token_lines(report: Report) -> list[str]:
    """For each layer the experts that one token fills most, of those with half the mean load."""
    if report.top_tokens is None:
        return []
    lines = ["experts with the most one-sided load; `.top_tokens[layer][expert]` has all:"]
    for layer in range(min(len(report.layer_names), _MOST_TOKEN_LAYERS)):
        load = report.load[layer]
        busy = [expert for expert in range(len(load)) if load[expert] * 2 >= load.mean() > 0]
        share = {e: report.top_tokens[layer][e][0].count / load[e] for e in busy}
        for expert in sorted(busy, key=lambda e: -share[e])[:_EXPERTS_SHOWN]:
            name = report.layer_names[layer]
            lines.append(f"  layer {name}, expert {expert}: {_tokens(report, layer, expert)}")
    left = len(report.layer_names) - _MOST_TOKEN_LAYERS
    return [*lines, *([f"  and {left} more layers"] if left > 0 else []), ""]


def _tokens(report: Report, layer: int, expert: int) -> str:
    assert report.top_tokens is not None
    load = report.load[layer, expert]
    tokens = report.top_tokens[layer][expert]
    return "  ".join(f"{_shown(token.text)} {_percent(token.count / load)}" for token in tokens)


def _percent(share: float) -> str:
    return "<1%" if share < 0.005 else f"{share:.0%}"


def _shown(text: str) -> str:
    """Quoted, so that a space or a line end is seen, and cut."""
    return repr(text if len(text) <= 20 else text[:19] + "…")
