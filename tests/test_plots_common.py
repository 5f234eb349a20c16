"""What plots share: names that fit, labels that wrap, colours that all readers tell apart."""

from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import plot_samples as samples
import pytest
from plot_samples import figures  # noqa: F401 - the fixture acts by its presence

from fisherlens.plots import _common as common


def test_short_names_fit_and_stay_different():
    assert common.shorten(["conv1", "hidden"]) == ["conv1", "hidden"]
    assert common.shorten(samples.DEEP[:4]) == ["…0.attention.query", "…0.mlp.expand", "…0.norm", "…1.attention.query"]
    alike = ["a" * 40 + "1" + "b" * 40, "a" * 40 + "2" + "b" * 40]
    assert len(set(common.shorten(alike))) == 2
    assert all(len(name) <= 26 for name in common.shorten(["x" * 80, "y" * 80]))


def test_names_that_do_not_fit_are_turned_then_thinned():
    ax = plt.subplots(figsize=(4, 3))[1]
    ax.set_xlim(-0.5, 3.5)
    common.name_ticks(ax, "x", range(4), ["a", "b", "c", "d"])
    assert {text.get_rotation() for text in ax.get_xticklabels()} == {0}
    common.name_ticks(ax, "x", range(4), [f"features.{i}.conv" for i in range(4)])
    assert {text.get_rotation() for text in ax.get_xticklabels()} == {40}
    ax.set_xlim(-0.5, 199.5)
    common.name_ticks(ax, "x", range(200), [f"block {i}" for i in range(200)])
    assert {text.get_rotation() for text in ax.get_xticklabels()} == {90}
    ax.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.get_xticklabels()]
    assert 10 < len(boxes) < 100
    assert all(left.x1 <= right.x0 + 0.5 for left, right in pairwise(boxes))


def test_long_labels_are_wrapped_and_formulas_kept_whole():
    text = r"a label of many words with $x \over y$ in it"
    lines = common.wrap(text, 1.5).split("\n")
    assert len(lines) > 1
    assert any(r"$x \over y$" in line for line in lines)
    assert " ".join(lines) == text


@pytest.mark.parametrize(
    "matrix",
    [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ],
    ids=["protanopia", "deuteranopia"],
)
def test_colours_are_distinct_for_colour_blind_readers(matrix):
    """Simulated in linear light (Machado, Oliveira, Fernandes 2009), any two colours of the palette stay apart."""
    tones = np.array([mpl.colors.to_rgb(shade) for shade in common.PALETTE])
    linear = np.where(tones <= 0.04045, tones / 12.92, ((tones + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.4)
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert distance[np.triu_indices(len(tones), 1)].min() > 0.12
