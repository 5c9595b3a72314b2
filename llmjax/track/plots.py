"""The curves of a run and of a sweep, as PNG files that are read without a legend."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmjax.track.metrics import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Width = Literal["wide", "narrow"]
INCHES: dict[Width, tuple[float, float]] = {"wide": (9.0, 5.4), "narrow": (4.2, 4.8)}
DPI = 150
INK, FAINT, TRAIN, HELD_OUT, RATE = "#22272e", "#d5dae1", "#2b6cb0", "#d9480f", "#2f855a"
STYLE: Any = {
    "font.size": 9.5, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": FAINT,
    "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.titlesize": 10.5,
}  # fmt: skip


def loss_curve(metrics: Mapping[str, Series], *, title: str, width: Width = "wide") -> bytes:
    """PNG of the training loss (raw and smoothed), held-out losses, and the learning rate below."""
    figure, (top, bottom) = _figure(width, rows=2, heights=(3.2, 1))
    top.set_title(title, fontweight="bold", loc="left")
    top.set_ylabel("loss (nats a token)")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    labels = []
    if "loss" in metrics:
        series = metrics["loss"]
        smooth = smoothed(series.values)
        top.plot(series.steps, series.values, color=TRAIN, alpha=0.3, linewidth=0.9)
        top.plot(series.steps, smooth, color=TRAIN, linewidth=1.9)
        labels.append(_Label("training", series.steps[-1], smooth[-1], TRAIN))
        top.set_ylim(*_limits(series.values, smooth))
    if "eval_loss" in metrics:
        series = metrics["eval_loss"]
        top.plot(series.steps, series.values, color=HELD_OUT, marker="o", markersize=4, linewidth=1.1)
        labels.append(_Label("held out", series.steps[-1], series.values[-1], HELD_OUT))
    _label_ends(top, labels)
    if "learning_rate" in metrics:
        series = metrics["learning_rate"]
        bottom.plot(series.steps, series.values, color=RATE, linewidth=1.5)
        bottom.fill_between(series.steps, series.values, color=RATE, alpha=0.12, linewidth=0)
        bottom.set_ylim(bottom=0)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return _png(figure)


def sweep_chart(names: Sequence[str], values: Sequence[float], *, label: str, width: Width = "wide") -> bytes:
    """PNG of one point a run, the best one on top; `label` says what the values are (lower is better)."""
    figure, (axes,) = _figure(width, rows=1, heights=(1,), height=1.0 + 0.32 * len(names))
    places = np.arange(len(names))[::-1]
    axes.scatter(values, places, s=46, color=[TRAIN, *[HELD_OUT] * (len(names) - 1)], zorder=3)
    for place, value in zip(places, values, strict=True):
        axes.annotate(f"{value:.4f}", (value, place), xytext=(8, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.margins(x=0.12)
    axes.set_title(f"{label}: lower is better", fontweight="bold", loc="left")
    return _png(figure)


def smoothed(values: np.ndarray, *, share: float = 0.015) -> np.ndarray:
    """Mean of each point's neighbours under a Gaussian whose deviation is a `share` of the curve.

    It looks both ways, so a falling curve is not delayed; what is not finite has no weight (nan where nothing has).
    """
    sigma = max(share * len(values), 1e-9)
    offsets = np.arange(-int(3 * sigma), int(3 * sigma) + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="full")
    weight = np.convolve(finite.astype(float), kernel, mode="full")
    inner = slice(len(offsets) // 2, len(offsets) // 2 + len(values))
    return np.divide(total[inner], weight[inner], out=np.full(len(values), np.nan), where=weight[inner] > 0)


@dataclasses.dataclass(frozen=True)
class _Label:
    """A name at the end of a curve."""

    text: str
    step: float
    value: float
    color: str


def _label_ends(axes: Axes, labels: Sequence[_Label]) -> None:
    """Name the curves at their ends; where two ends are close, one name goes above and one below."""
    ordered = sorted((label for label in labels if np.isfinite(label.value)), key=lambda label: label.value)
    for rank, label in enumerate(ordered):
        above = rank > 0  # a curve alone has its name below: it falls
        axes.annotate(f"{label.text} {label.value:.3f}", (label.step, label.value), xytext=(0, 7 if above else -7),
                      textcoords="offset points", ha="right", va="bottom" if above else "top", color=label.color,
                      fontweight="bold", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8})


def _limits(values: np.ndarray, smooth: np.ndarray) -> tuple[float, float]:
    """Lower and upper end of the loss axis: all of the smoothed curve, and raw points but the wildest."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.nanmin(smooth), np.nanmax(smooth)
    low, high = min(low, np.quantile(finite, 0.01)), max(high, np.quantile(finite, 0.99))
    margin = 0.08 * (high - low) or 0.5
    return float(low - 1.6 * margin), float(high + margin)


def _figure(width: Width, *, rows: int, heights: tuple[float, ...], height: float | None = None) -> tuple[Figure, list]:
    """A figure of stacked panels that share the steps; drawn by Agg, so no display and no global state is touched."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(INCHES[width][0], height or INCHES[width][1]), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=heights)
    return figure, list(panels[:, 0])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
