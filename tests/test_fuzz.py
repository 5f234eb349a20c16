"""Malformed input by chance: an answer, or one of our errors, TypeError or ValueError; and nothing of the user's is changed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_traps import mlp, noise
from torch import Tensor, nn

import fisherlens as fl
from conftest import snapshot
from fisherlens.errors import FisherLensError

EXPECTED = (FisherLensError, TypeError, ValueError)
FEW = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

# --- what a user may hand over ---------------------------------------------------------------------------------------

DTYPES = st.sampled_from(
    [torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex128]
)
SIZES = st.sampled_from([0, 1, 2, 3, 4, 5])


@st.composite
def tensors(draw: Any) -> Tensor:
    shape = draw(st.lists(SIZES, max_size=4))
    size = math.prod(shape)
    fill = draw(st.sampled_from(["zeros", "ones", "noise", "count", "nan", "infinity", "huge"]))
    values = {
        "zeros": torch.zeros(size, dtype=torch.float64),
        "ones": torch.ones(size, dtype=torch.float64),
        "noise": noise(size),
        "count": torch.arange(size, dtype=torch.float64) - 1,
        "nan": torch.full((size,), float("nan"), dtype=torch.float64),
        "infinity": torch.full((size,), float("-inf"), dtype=torch.float64),
        "huge": torch.full((size,), 1e300, dtype=torch.float64),
    }[fill]
    dtype = draw(DTYPES)
    whole = (
        values if dtype.is_floating_point or dtype.is_complex else torch.nan_to_num(values, posinf=9, neginf=-9) % 99
    )
    x = whole.to(dtype).reshape(shape)
    return draw(st.sampled_from([x, x, x, x.T if x.ndim == 2 else x, x.expand(3, *x.shape)]))


GOOD = st.sampled_from([(noise(6, 4), torch.arange(6) % 3), (noise(3, 4), torch.arange(3))])
LEAVES = st.one_of(
    tensors(),
    st.none(),
    st.integers(-2, 3),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from([object(), nn.Linear(4, 3), nn.Linear, np.ones((3, 4)), torch.ones(3).to_sparse(), print, ...]),
)
NAMES = st.sampled_from(["labels", "inputs", "input", "x", "logits", ""])


def nests(leaves: Any) -> Any:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(NAMES, inner, max_size=3),
            st.lists(inner, max_size=2).map(iter),
        ),
        max_leaves=5,
    )


ANYTHING = nests(LEAVES)
DATA = st.one_of(GOOD, GOOD.map(lambda pair: [pair, pair]), st.tuples(tensors(), tensors()), ANYTHING)
LIKELIHOODS = st.one_of(
    st.sampled_from(["categorical", "bernoulli", "gaussian", fl.Gaussian(2.0), fl.Categorical(class_axis=-1)]),
    st.builds(lambda w: (fl.Categorical, {"weight": w}), LEAVES),
    st.builds(lambda w: (fl.Bernoulli, {"pos_weight": w}), LEAVES),
    st.builds(lambda w: (fl.Gaussian, {"variance": w}), LEAVES),
    LEAVES,
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.one_of(st.sampled_from(["exact", "mc", "empirical", "hessian"]), LEAVES),
        "params": st.one_of(st.sampled_from(["0", "*.bias", ["2.weight"], "nothing"]), ANYTHING),
        "mc_samples": st.one_of(st.integers(-1, 3), LEAVES),
        "mc_sampling": st.one_of(st.sampled_from(["independent", "stratified"]), LEAVES),
        "rows": st.one_of(st.sampled_from(["term", "example"]), LEAVES),
        "seed": st.one_of(st.integers(-1, 2**70), LEAVES),
        "memory": st.one_of(st.sampled_from(["2GiB", 700, 1, "3 parsecs"]), LEAVES),
        "progress": st.sampled_from([None, False]),
        "check_deterministic": st.one_of(st.booleans(), LEAVES),
    },
)
MODEL = mlp()


def require_text(error: Exception) -> None:
    assert len(str(error)) > 20, repr(error)


@pytest.mark.filterwarnings("ignore")
@FEW
@given(DATA, LIKELIHOODS, OPTIONS)
def test_operators_of_anything(data, likelihood, options):
    before = snapshot(MODEL)
    try:
        if isinstance(likelihood, tuple):
            likelihood = likelihood[0](**likelihood[1])
        F = fl.Fisher(MODEL, data, likelihood=likelihood, **options)
        assert math.isfinite(F.trace())
        assert torch.isfinite(F @ noise(F.n_params)).all()
    except EXPECTED as error:
        require_text(error)
    assert snapshot(MODEL) == before


class Anything(nn.Module):
    """A model that answers with what it was made of, beside a dense layer."""

    def __init__(self, answer: Any, how: str):
        super().__init__()
        self.layer, self.answer, self.how = nn.Linear(4, 3, dtype=torch.float64), answer, how

    def forward(self, x: Tensor) -> Any:
        f = self.layer(x)
        if self.how == "instead":
            return self.answer
        return f * self.answer if self.how == "times" else {"logits": f, "more": self.answer}


@pytest.mark.filterwarnings("ignore")
@FEW
@given(
    ANYTHING, st.sampled_from(["instead", "times", "beside"]), GOOD, st.sampled_from(["exact", "empirical", "hessian"])
)
def test_models_of_anything(answer, how, data, kind):
    with torch.random.fork_rng(devices=[]):
        model = Anything(answer, how)
    before = snapshot(model)
    try:
        F = fl.Fisher(model, data, likelihood="categorical", kind=kind)
        assert math.isfinite(F.trace())
    except EXPECTED as error:
        require_text(error)
    assert snapshot(model) == before


MEMBERS = st.sampled_from(["@", "solve", "block", "restrict", "damped", "dense", "natural_gradient", "single_sample"])
F_KEPT = fl.Fisher(MODEL, (noise(6, 4), torch.arange(6) % 3), likelihood="categorical")
F_STREAMED = fl.Fisher(MODEL, (noise(6, 4), torch.arange(6) % 3), likelihood="categorical", memory=400)
VECTORS = st.one_of(
    ANYTHING, st.sampled_from([noise(35), noise(35, 2), F_KEPT.layout.unflatten(noise(35, 3)), "0", ["2"]])
)


@pytest.mark.filterwarnings("ignore")
@FEW
@given(MEMBERS, VECTORS, st.one_of(st.floats(1e-3, 1.0), LEAVES), st.sampled_from([F_KEPT, F_STREAMED]))
def test_members_with_anything(member, argument, number, F):
    calls = {
        "@": lambda: F @ argument,
        "solve": lambda: F.solve(argument, number),
        "block": lambda: F.block(argument),
        "restrict": lambda: F.restrict(argument).trace(),
        "damped": lambda: F.damped(number) @ argument,
        "dense": lambda: F.dense(number),
        "natural_gradient": lambda: F.natural_gradient(number),
        "single_sample": lambda: F_KEPT.single_sample(number),
    }
    before = snapshot(MODEL)
    try:
        calls[member]()
    except EXPECTED as error:
        require_text(error)
    assert snapshot(MODEL) == before
