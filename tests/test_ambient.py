"""Torch's ambient state is the user's: whatever is in force around a call, the answer is that of the model in its own dtype and place."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
import time
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from ambient_samples import CALLS, KINDS, OTHERWISE_GUARDED, QUIET, Sample, numbers, products
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fisherlens as fl
from fisherlens.errors import InputError, NumericalWarning
from fisherlens.fisher import DampedFisher
from fisherlens.fisher.solve import Solver
from fisherlens.linalg import precision
from fisherlens.linalg.precision import OwnPrecision, own_precision, without_autocast
from fisherlens.scores import ScoreMatrix
from fisherlens.scores.base import LayerScores

AUTOCAST = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)


@contextmanager
def set_and_back(change, value, back):
    change(value)
    try:
        yield
    finally:
        change(back)


class Watched(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


STATES = {
    "autocast bfloat16": AUTOCAST,
    "autocast float16": functools.partial(torch.autocast, "cpu", dtype=torch.float16),
    "default dtype float64": lambda: set_and_back(torch.set_default_dtype, torch.float64, torch.float32),
    "default device meta": lambda: set_and_back(torch.set_default_device, "meta", None),
    "matmul medium": lambda: set_and_back(torch.set_float32_matmul_precision, "medium", "highest"),
    "device context": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "deterministic": lambda: set_and_back(torch.use_deterministic_algorithms, True, False),
    "function mode": Watched,
    "dispatch mode": Dispatched,
    "warnings": lambda: warnings.catch_warnings(action="error"),
}
#: modes that take operations apart, or ask for copies, change the order of sums
ROUNDING = {"dispatch mode": 1e-6, "inference mode": 1e-5}


def same(found, truth, tolerance: float = 0.0) -> None:
    assert len(found) == len(truth) > 0
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        scale = np.abs(b[np.isfinite(b)]).max(initial=0.0) if b.dtype.kind == "f" else 0.0
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(scale))


@functools.cache
def known(name: str, call: str):
    return numbers(CALLS[call](Sample(name)))


# --- the interface ---------------------------------------------------------------------------------------------------


def test_every_public_name_is_called_here_or_said_to_compute_nothing():
    assert not set(CALLS) & QUIET
    assert set(fl.__all__) == set(CALLS) | QUIET


@pytest.mark.parametrize("name", sorted(set(fl.__all__) - {"plot"}))
def test_every_public_name_that_computes_is_guarded(name):
    found = getattr(fl, name)
    if name in OTHERWISE_GUARDED or (name in QUIET and name not in ("verify", "report")):
        return
    if isinstance(found, type):
        assert issubclass(found, OwnPrecision)
        for cls in found.__mro__:
            methods = [m for key, m in vars(cls).items() if callable(m) and not key.startswith("_")]
            assert all(hasattr(m, "own_precision") for m in methods if not isinstance(m, type)), cls
    else:
        assert found.own_precision


@pytest.mark.parametrize(
    "cls", [DampedFisher, Solver, ScoreMatrix, LayerScores, type(Sample("dense").fisher("hessian"))]
)
def test_what_public_names_hand_out_is_guarded_too(cls):
    assert issubclass(cls, OwnPrecision)
    assert any(hasattr(member, "own_precision") for member in vars(cls).values())


#: states in which something went wrong before; the others are looked at with the slow tests
TELLING = ("autocast bfloat16", "matmul medium", "default device meta", "default dtype float64", "inference mode")


def states(*kept: str):
    slow = pytest.mark.slow
    return pytest.mark.parametrize("state", [s if s in kept else pytest.param(s, marks=slow) for s in sorted(STATES)])


@pytest.mark.parametrize("call", sorted(CALLS))
@states(*TELLING)
def test_nothing_changes_in(state, call, unchanged):
    truth = known("dense", call)
    sample = Sample("dense").made()
    with STATES[state](), unchanged(sample.model):
        found = CALLS[call](sample)
    same(numbers(found), truth, ROUNDING.get(state, 0.0))


@pytest.mark.parametrize("budget", ["kept", pytest.param("streamed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["conv", "attention"])
@states("autocast bfloat16", "matmul medium", "default device meta")
def test_operators_do_not_change_in(state, name, kind, budget):
    sample = Sample(name).made()
    V = sample.vectors()
    outside = sample.fisher(kind, budget)

    def asked(F):
        few = [] if kind == "hessian" else [F.diagonal(), F.solve(V[:, 0], 0.1)]  # of a Hessian they are many products
        return numbers([F @ V, F @ V[:, 0], *few])

    truth = asked(outside)
    with STATES[state]():
        inside = sample.fisher(kind, budget)
        same(asked(inside), truth, ROUNDING.get(state, 0.0))
        same(asked(outside), truth, ROUNDING.get(state, 0.0))
    same(asked(inside), truth, ROUNDING.get(state, 0.0))


# --- precision -------------------------------------------------------------------------------------------------------


def test_scores_solver_and_their_layers_answer_in_full_precision_too():
    F = Sample("dense").F
    v = Sample("dense").vectors()

    def asked():
        first = F.scores[F.layout.layer_names[0]]
        scores = [F.scores.matmat(v), F.scores.gram(), first.gram(), first.moments(torch.arange(4)[None])]
        return numbers([*scores, Solver(F.scores, F.total_weight).log_determinant(0.1)])

    truth = asked()
    with AUTOCAST():
        same(asked(), truth)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda F: pickle.loads(pickle.dumps(F))], ids=["deepcopy", "pickle"])  # noqa: S301
def test_graphs_that_a_copy_makes_again_are_in_full_precision(again):
    F = Sample("dense").fisher("hessian")
    assert F.plan.linearised
    v = Sample("dense").vectors()
    with AUTOCAST():
        copied = again(F)
    assert torch.equal(copied @ v, F @ v)


def test_an_autocast_of_the_models_own_is_part_of_it():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(Sample("dense").model)

        def forward(self, x):
            with AUTOCAST():
                return self.net(x)

    data, v = Sample("dense").data, Sample("dense").vectors()
    plain = Sample("dense").F @ v
    for budget in (2**31, 1000):
        F = fl.Fisher(Inner(), data, likelihood="categorical", memory=budget)
        gap = (F @ v - plain).norm() / plain.norm()
        assert F.dtype == torch.float32
        assert 1e-5 < gap < 3e-2  # the rounding of its activations, and no more


def test_guards_nest_and_give_autocast_back():
    @own_precision
    def inner():
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    with AUTOCAST():
        with without_autocast():
            assert inner() == torch.float32
        assert torch.is_autocast_enabled("cpu")
        assert inner() == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        with pytest.raises(InputError):
            fl.spectrum(Sample("dense").F, by="no such scheme")
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "xpu", "mps", "hpu", "xla"])
def test_autocast_of_every_kind_of_device_is_seen(kind, quick, monkeypatch):
    seen = own_precision(lambda: torch.is_autocast_enabled(kind))
    if not quick:
        monkeypatch.setattr(precision, "_quick", None)  # as where torch has no such function
    torch.set_autocast_enabled(kind, True)
    try:
        assert not seen()
        assert torch.is_autocast_enabled(kind)
    finally:
        torch.set_autocast_enabled(kind, False)


def test_bfloat16_products_of_a_process_are_lifted_while_anybody_is_inside():
    entered, leave, seen = threading.Event(), threading.Event(), []

    @own_precision
    def long():
        entered.set()
        leave.wait(10)
        seen.append(torch.get_float32_matmul_precision())

    @own_precision
    def short():
        return torch.get_float32_matmul_precision()

    with set_and_back(torch.set_float32_matmul_precision, "medium", "highest"):
        thread = threading.Thread(target=long)
        thread.start()
        assert entered.wait(10)
        assert short() == torch.get_float32_matmul_precision() == "high"
        leave.set()
        thread.join()
        assert seen == ["high"]
        assert torch.get_float32_matmul_precision() == "medium"
    assert short() == "highest"


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has one setting for all")
def test_bfloat16_products_that_are_asked_for_by_device_are_lifted_too():
    kind = torch.backends.mkldnn.matmul

    @own_precision
    def seen():
        return kind.fp32_precision

    with set_and_back(lambda value: setattr(kind, "fp32_precision", value), "bf16", "none"):
        assert seen() == "ieee"
        assert kind.fp32_precision == "bf16"


def test_a_guard_is_cheap():
    @own_precision
    def nothing():
        pass

    def seconds():
        start = time.process_time()
        for _ in range(2000):
            nothing()
        return (time.process_time() - start) / 2000

    assert min(seconds() for _ in range(5)) < 1e-5


def test_warnings_name_the_line_of_the_user_through_guards():
    F = Sample("dense").F
    calls = (
        lambda: F.solve(F.gradient(), 1e-9),
        lambda: F.damped(2e-9).solve(F.gradient()),
        lambda: fl.spectral_density(F, num_probes=2),
        lambda: fl.estimate_trace(F, num_matvecs=1),
    )
    for call in calls:
        with pytest.warns(NumericalWarning) as caught:
            call()
        assert {w.filename for w in caught} == {__file__}


# --- threads ---------------------------------------------------------------------------------------------------------


def test_what_is_made_in_inference_mode_is_of_use_outside():
    sample, truth = Sample("dense").made(), known_products()
    with torch.inference_mode():
        v = sample.vectors() + 0
        F = sample.fisher()
        made = F @ v
        K = fl.BlockDiagonal(F, "layer")
        fl.independence(F, ("layer", "unit"), progress_bar=False, method="estimate")
        same(numbers([F @ v, F.solve(v, 0.1), K @ v, K.solve(v, 0.1)]), truth)
        assert torch.is_inference_mode_enabled()
    assert v.is_inference()
    assert not made.is_inference()
    same(numbers([F @ v, F.solve(v, 0.1), K @ v, K.solve(v, 0.1)]), truth)
    for kind in KINDS:
        for budget in ("kept", "streamed"):
            F = sample.fisher(kind, budget)
            same(numbers(F @ v), numbers(F @ sample.vectors()))


def known_products():
    F, v = Sample("dense").F, Sample("dense").vectors()
    K = fl.BlockDiagonal(F, "layer")
    return numbers([F @ v, F.solve(v, 0.1), K @ v, K.solve(v, 0.1)])


def test_another_thread_gets_the_same_answers():
    truth, found = known("dense", "Fisher"), []

    def work():
        for call in ("Fisher", "spectrum", "KFAC", "coupling"):
            found.append((call, numbers(CALLS[call](Sample("dense")))))

    thread = threading.Thread(target=work)
    with torch.inference_mode(), AUTOCAST():
        thread.start()
        thread.join()
    same(dict(found)["Fisher"], truth)
    assert [call for call, _ in found] == ["Fisher", "spectrum", "KFAC", "coupling"]


def test_threads_share_an_operator():
    F, v = Sample("conv").F, Sample("conv").vectors()
    truth, wrong = numbers(products(F, v)), []

    def work():
        for _ in range(5):
            wrong.extend(not np.array_equal(a, b) for a, b in zip(numbers(products(F, v)), truth, strict=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 20 * len(truth)
    assert not any(wrong)


def test_anomaly_detection_changes_nothing():
    truth = known("dense", "Fisher")
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly(check_nan=True):
        found = CALLS["Fisher"](Sample("dense"))
    same(numbers(found), truth)


# --- what cannot be computed is said ---------------------------------------------------------------------------------


class WritesOver(nn.Module):
    """Changes in place what the gradient of the sigmoid needs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        y = torch.sigmoid(self.layer(x))
        y += 1
        return y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [2**31, 1000])
def test_an_in_place_operation_that_breaks_the_gradient_is_named(kind, memory, unchanged):
    model = WritesOver()
    with (
        unchanged(model),
        pytest.raises(InputError, match=r"(?s)backward pass of the model failed.*in-?place.*clone\(\)"),
    ):
        fl.Fisher(model, Sample("dense").data, likelihood="categorical", kind=kind, memory=memory)


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e-120, 1e120, 1e170, 1e290])
@pytest.mark.parametrize("method", ["hutch++", "hutchinson", "xtrace", "xnystrace"])
def test_traces_scale_with_the_operator(size, method):
    d = 0.8 ** torch.arange(40, dtype=torch.float64)

    def found(factor):
        A = fl.Operator(lambda v: factor * (d[:, None] * v + 0.1 * v.sum(0)), 40, block=True, psd=True)
        return fl.estimate_trace(A, method=method, num_matvecs=12, seed=1)

    one, scaled = found(1.0), found(size)
    assert float(one["trace_sem"]) > 0
    for name in ("trace", "trace_sem", "trace_low", "trace_high"):
        assert float(scaled[name]) / size == pytest.approx(float(one[name]), rel=1e-9)
    if method == "hutchinson":
        target = 0.5 * size * float(one["trace_sem"])
        A = fl.Operator(lambda v: size * (d[:, None] * v + 0.1 * v.sum(0)), 40, block=True)
        aimed = fl.estimate_trace(A, method=method, num_matvecs=12, target_sem=target)
        assert 0 < float(aimed["trace_sem"]) <= target


@pytest.mark.parametrize("method", ["hutch++", "hutchinson", "xdiag"])
def test_diagonals_scale_with_the_operator(method):
    d = torch.linspace(1, 2, 30, dtype=torch.float64)

    def found(factor):
        A = fl.Operator(lambda v: factor * (d[:, None] * v + 0.1 * v.sum(0)), 30, block=True)
        return fl.estimate_diagonal(A, method=method, num_matvecs=12, seed=1)

    one, scaled = found(1.0), found(1e-200)
    for name in ("diagonal", "diagonal_sem"):
        np.testing.assert_allclose(scaled[name].values / 1e-200, one[name].values, rtol=1e-9)


@pytest.mark.parametrize("size", [1e-170, 1e170])
@pytest.mark.parametrize("options", [{"deflate": None}, {"deflate": None, "method": "kpm", "grid": "linear"}])
def test_densities_refuse_eigenvalues_whose_squares_are_lost(size, options):
    d = 0.8 ** torch.arange(40, dtype=torch.float64)
    A = fl.Operator(lambda v: (size * d)[:, None] * v, 40, block=True, psd=True)
    with pytest.raises(InputError, match=r"are of the order .* leave the range of float64.*Scale"):
        fl.spectral_density(A, num_probes=3, num_matvecs=6, **options)


@pytest.mark.parametrize("size", [1e-130, 1e130])
def test_functions_of_a_spectrum_scale_with_the_operator(size):
    d = 0.8 ** torch.arange(40, dtype=torch.float64)

    def found(factor):
        A = fl.Operator(lambda v: (factor * d)[:, None] * v, 40, block=True, psd=True)
        return fl.effective_dimension(A, factor, num_probes=3, num_matvecs=6)

    assert float(found(size)) == pytest.approx(float(found(1.0)), rel=1e-9)


@pytest.mark.parametrize(
    ("dtype", "confidence", "tiny"), [(torch.float32, 100.0, 1e-20), (torch.float64, 400.0, 1e-80)]
)
def test_scores_too_small_for_their_squares_are_warned_of(dtype, confidence, tiny):
    x, y = torch.eye(3, dtype=dtype), torch.arange(3)
    model = nn.Linear(3, 3, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(confidence * torch.eye(3))
    with pytest.warns(NumericalWarning, match=r"scores of layer '\(root\)' .* come out as 0") as caught:
        fl.Fisher(model, (x, y), likelihood="categorical")
    assert {w.filename for w in caught} == {__file__}
    with pytest.warns(NumericalWarning, match="come out as 0"):
        fl.Fisher(nn.Linear(3, 3, bias=False).to(dtype), (x * tiny, y), likelihood="categorical")
    assert fl.Fisher(nn.Linear(3, 3).to(dtype), (x * tiny, y), likelihood="categorical").trace() > 0
