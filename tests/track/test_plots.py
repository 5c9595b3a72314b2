"""The curves say what the numbers say, also when some are missing."""

from __future__ import annotations

import io

import numpy as np
import pytest

from llmjax.track.metrics import Series
from llmjax.track.plots import Width, loss_curve, smoothed, sweep_chart


def _pixels(png: bytes) -> np.ndarray:
    import matplotlib.image

    return matplotlib.image.imread(io.BytesIO(png))


def _series(values: np.ndarray) -> Series:
    return Series(np.arange(1, len(values) + 1), values)


@pytest.mark.parametrize(("width", "expected"), [("wide", 1350), ("narrow", 630)])
def test_widths(width: Width, expected: int) -> None:
    assert _pixels(loss_curve({"loss": _series(np.ones(4))}, title="t", width=width)).shape[1] == expected


def test_each_series_changes_the_picture() -> None:
    loss, rate = _series(np.linspace(5, 2, 50)), _series(np.linspace(1, 0, 50))
    pictures = [loss_curve(metrics, title="t") for metrics in (
        {}, {"loss": loss}, {"loss": loss, "eval_loss": Series(np.array([50]), np.array([2.1]))},
        {"loss": loss, "learning_rate": rate})]
    assert len(set(pictures)) == len(pictures)


def test_values_that_are_not_finite_are_left_out() -> None:
    values = np.linspace(5, 2, 50)
    values[20] = np.nan
    assert np.isfinite(smoothed(values, share=0.1)).all()
    loss_curve({"loss": _series(np.full(3, np.nan))}, title="t")


def test_smoothing_keeps_lines_and_calms_noise() -> None:
    line = np.linspace(5, 2, 200)
    np.testing.assert_allclose(smoothed(line, share=0.02)[20:-20], line[20:-20], rtol=1e-12)
    noise = np.random.default_rng(0).normal(size=200)
    assert smoothed(noise, share=0.05).std() < 0.5 * noise.std()


def test_a_sweep_of_one_run() -> None:
    assert _pixels(sweep_chart(["only"], [2.0], label="loss")).ndim == 3
