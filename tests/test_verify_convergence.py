"""The claim on convergence, on quadratic problems in which the order of the optimizers is known; and how its target is read off runs."""

from __future__ import annotations

import math

import torch
from test_verify_training import line, pairs, rows_of, subject

import fisherlens as fl
from fisherlens.training.verify.convergence import convergence, steps_to_target

RIGHT = {"a": [0, 1], "b": [2, 3], "c": [4, 5]}
WRONG = {"a": [0, 2], "b": [1, 4], "c": [3, 5]}
LOOSE = {"a": [0, 1], "b": [2, 4], "c": [3, 5]}
CUTS = {"right": RIGHT, "loose": LOOSE, "wrong": WRONG}
RATES = [0.1, 0.3, 0.9]


def slow_line():
    """Pairs of inputs that are nearly one, and weights that tell them apart."""
    return line(pairs([0.98, 0.6, 0.6]), [4.0, -4.0, 3.0, -3.0, 5.0, -5.0])


def swapped(F):
    """Claims that the wrong pairs are the coupled ones."""
    order = torch.tensor([0, 2, 1, 4, 3, 5])
    inverse = order.argsort()
    return F.dense()[inverse][:, inverse]


def test_order_of_optimizers_is_that_of_condition_numbers():
    options = {"partitions": CUTS, "num_steps": 12, "rates": RATES}
    claim = convergence([subject(slow_line(), damping=1e-3)], **options)
    rows = rows_of(claim)
    assert rows["condition-number"].holds
    assert rows["decrease-ratio"].holds
    kappa, steps = (claim.curves[f"convergence_{name}"].values for name in ("condition_number", "steps"))
    assert (kappa[:, 0] == 1).all()
    assert 1 < kappa[0, 1] < kappa[0, 2] < 20 < kappa[0, 3]
    assert steps[0, 1] < steps[0, 2] < steps[0, 3]
    assert rows["exact"].measured == steps[0, 0]
    false = rows_of(convergence([subject(slow_line(), damping=1e-3, operator=swapped)], **options))
    assert not false["condition-number"].holds
    assert false["condition-number"].decided


def test_unreached_targets_rank_last():
    def diverging(model):
        return torch.optim.SGD(model.parameters(), lr=1e6)

    entries = {"good": lambda m: torch.optim.SGD(m.parameters(), lr=0.3), "bad": diverging}
    runs = fl.compare_optimizers(line(torch.eye(3)), entries, num_steps=8, seeds=1, record_every=2, progress=False)
    good, bad = steps_to_target(runs.isel(seed=0), 0.5)
    assert 0 < good < 8
    assert bad == math.inf
