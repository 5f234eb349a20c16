"""What the reference refuses, with which words; and that neither its calls nor its errors leave a trace."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import ALL_CASES
from torch import nn

from fisherlens import reference
from fisherlens.errors import InputError, NonFiniteError
from fisherlens.layout import Layout

# --- what is refused -------------------------------------------------------------------------------------------------

X, Y = torch.ones(3, 4), torch.tensor([0, 2, 1])
REFUSED = {
    "unknown likelihood": (
        *("categoricl", X, Y, InputError),
        "Unknown likelihood 'categoricl'. Did you mean 'categorical'? Known: 'categorical', 'bernoulli', 'gaussian'.",
    ),
    "a loss": (
        *(nn.CrossEntropyLoss(), X, Y, TypeError),
        "likelihood must be one of ['categorical', 'bernoulli', 'gaussian'], or an object with one of the attributes "
        "['class_axis', 'pos_weight', 'variance']; got CrossEntropyLoss. A loss does not fix the scale of a Fisher: "
        "name the distribution behind it.",
    ),
    "a loss with pos_weight": (
        *(nn.BCEWithLogitsLoss(), X, Y, TypeError),
        "likelihood must be one of ['categorical', 'bernoulli', 'gaussian'], or an object with one of the attributes "
        "['class_axis', 'pos_weight', 'variance']; got BCEWithLogitsLoss. A loss does not fix the scale of a Fisher: "
        "name the distribution behind it.",
    ),
    "short targets": (
        *("categorical", X, Y[:2], InputError),
        "Targets of a categorical likelihood must have shape (3,) for outputs of shape (3, 3); got (2,). "
        "Check the class axis and the number of examples.",
    ),
    "targets that would broadcast": (
        *("gaussian", X, torch.ones(3, 1), InputError),
        "Targets of a gaussian likelihood must have shape (3, 3) for outputs of shape (3, 3); got (3, 1). "
        "Check the class axis and the number of examples.",
    ),
    "a label too large": ("categorical", X, Y + 1, InputError, "Labels must lie in 0..2; got 1..3."),
    "a negative label": ("categorical", X, Y - 1, InputError, "Labels must lie in 0..2; got -1..1."),
    "every label ignored": (
        *("categorical", X, torch.full((3,), -100), InputError),
        "The weights of all terms add up to 0: no example, or every label ignored or of weight 0.",
    ),
    "no example": (
        *("categorical", X[:0], Y[:0], InputError),
        "The weights of all terms add up to 0: no example, or every label ignored or of weight 0.",
    ),
    "weights without targets": (
        *(SimpleNamespace(class_axis=1, weight=[1.0, 2.0, 3.0]), X, None, InputError),
        "Observed labels are needed, but the targets are None. Give data as (inputs, targets).",
    ),
    "classes on the axis of the examples": (
        *(SimpleNamespace(class_axis=0), X, Y, InputError),
        "Axis 0 of outputs (3, 3) cannot hold classes. One logit is Bernoulli.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_data_is_refused(name, unchanged):
    likelihood, x, y, error, message = REFUSED[name]
    model = nn.Linear(4, 3)
    with unchanged(model), pytest.raises(error, match=f"^{re.escape(message)}$"):
        reference.fisher(model, (x, y), likelihood)


def test_kinds_that_lack_their_labels_are_refused():
    model, (x, y), likelihood = ALL_CASES["softmax_regression"]()
    for kind in ("mc", "exakt"):
        message = f"kind must be 'exact', 'empirical', or 'mc' together with labels; got {kind!r}."
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            reference.fisher(model, (x, y), likelihood, kind)
    for call in (reference.empirical_fisher, reference.gradient, reference.negative_log_likelihood):
        with pytest.raises(InputError, match=r"^Observed labels are needed, but the targets are None\. Give data as"):
            call(model, (x, None), likelihood)


PER_BATCH = {
    "BatchNorm1d": nn.BatchNorm1d(4),
    "Dropout": nn.Dropout(),
    "BatchNorm1d in evaluation": nn.BatchNorm1d(4, track_running_stats=False).eval(),
}


@pytest.mark.parametrize("name", PER_BATCH)
def test_a_module_that_couples_examples_is_refused(name, unchanged):
    model = nn.Sequential(nn.Linear(4, 4), PER_BATCH[name])
    message = (
        f"Each output must depend on its own example only; module '1' ({name.split()[0]}) uses batch statistics or chance. "
        "Call model.eval(), and keep running statistics in batch normalisation."
    )
    with unchanged(model), pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        reference.fisher(model, (X, Y), "categorical")


@pytest.mark.parametrize("damping", [0.0, -1.0, math.inf, math.nan])
def test_damping_must_be_positive_and_finite(damping):
    message = rf"^damping must be a finite number > 0; got {damping!r}\. It is added to F, in the units of its eigen"
    for function in (reference.effective_dimension, reference.log_determinant, reference.damped):
        with pytest.raises(InputError, match=message):
            function(torch.eye(2), damping)


NEED_FINITE = {
    "spectrum": reference.spectrum,
    "solve": lambda F: reference.solve(F, F, 1.0),
    "log determinant": lambda F: reference.log_determinant(F, 1.0),
    "stand-in": lambda F: reference.condition_number(torch.eye(3), F, 1.0),
}


@pytest.mark.parametrize("name", NEED_FINITE)
@pytest.mark.parametrize("where", [(0, 0), (2, 2), (1, 2)])
def test_a_matrix_with_a_nan_has_no_spectrum(name, where):
    F = torch.eye(3)
    F[where] = math.nan
    with pytest.raises(
        NonFiniteError, match=r"^A matrix must be finite; it holds NaN or infinity\. Look at the weights"
    ):
        NEED_FINITE[name](F)


# --- what is left alone ----------------------------------------------------------------------------------------------

MODEL_CALLS = {
    "fisher": lambda m, d, lik: reference.fisher(m, d, lik),
    "empirical": lambda m, d, lik: reference.empirical_fisher(m, d, lik),
    "mc": lambda m, d, lik: reference.mc_fisher(m, d, lik, d[1][..., None]),
    "gradient": lambda m, d, lik: reference.gradient(m, d, lik),
    "loss": lambda m, d, lik: reference.negative_log_likelihood(m, d, lik),
    "divergence": lambda m, d, lik: reference.kl_divergence(
        m, None, torch.ones(Layout.from_model(m).n_params), d[0], lik
    ),
}


@pytest.mark.parametrize("call", MODEL_CALLS)
@pytest.mark.parametrize("name", ["frozen_first_layer", "batchnorm_2d", "conv_inplace_relu"])
def test_nothing_is_changed_by_a_call_or_by_an_error(name, call, unchanged):
    model, (x, y), likelihood = ALL_CASES[name]()
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)
    before = x.clone(), y.clone()
    with unchanged(model):
        MODEL_CALLS[call](model, (x, y), likelihood)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    bad = x.clone()
    bad[0].view(-1)[0] = math.nan
    with (
        unchanged(model),
        pytest.raises(NonFiniteError, match=r"^The network's output must be finite; it holds NaN or inf"),
    ):
        MODEL_CALLS[call](model, (bad, y), likelihood)


def test_a_frozen_parameter_may_be_chosen_and_stays_frozen(unchanged):
    model, data, likelihood = ALL_CASES["frozen_first_layer"]()
    with unchanged(model):
        F = reference.fisher(model, data, likelihood, params="0")
    assert F.shape == (25, 25)
    assert reference.trace(F) > 0


SPOILERS = {
    "a value": lambda m: m[0].weight.data.mul_(1 + 1e-15),
    "a flag": lambda m: m[0].weight.requires_grad_(False),
    "a gradient": lambda m: setattr(m[0].weight, "grad", torch.zeros_like(m[0].weight)),
    "a buffer": lambda m: m[1].num_batches_tracked.add_(1),
    "the mode": lambda m: m[2].train(),
    "a hook": lambda m: m[0].register_forward_hook(lambda *_: None),
    "a tensor hook": lambda m: m[0].weight.register_hook(lambda grad: grad),
    "a parameter's identity": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().clone())),
    "an attribute": lambda m: setattr(m[0], "left_behind", 1),
    "torch's generator": lambda m: torch.rand(1),
    "numpy's generator": lambda m: np.random.rand(),  # noqa: NPY002
    "the default dtype": lambda m: torch.set_default_dtype(torch.float64),
}


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("what", SPOILERS)
def test_the_witness_sees_every_kind_of_change(what, error, unchanged):
    model, _, _ = ALL_CASES["batchnorm_2d"]()
    numpy_state = np.random.get_state()  # noqa: NPY002

    def spoil():
        with unchanged(model):
            SPOILERS[what](model)
            if error:
                raise ValueError(what)

    try:
        with torch.random.fork_rng(devices=[]), pytest.raises(AssertionError, match=r"^changed by the call: \['"):
            spoil()
    finally:
        torch.set_default_dtype(torch.float32)
        np.random.set_state(numpy_state)  # noqa: NPY002
