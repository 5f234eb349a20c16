"""Examples in docstrings draw their weights from one seed, so that they show the same in every run, and leave no figures open."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from matplotlib import pyplot as plt


@pytest.fixture(autouse=True)
def _one_seed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed torch's global generator for a docstring's example alone, and close what it drew."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    plt.close("all")
