"""Fisher ellipses against dense matrices, and divergences against their formulas."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from cases import fill, make_case
from fisher_checks import QUIET, case, in_float32
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, NonFiniteError

pytestmark = pytest.mark.filterwarnings(QUIET)
NAMES = ["mlp_tanh", "conv_groups", "lenet", "batchnorm_first", "bernoulli_two_outputs", "gaussian_three_outputs"]


def full(message: str) -> str:
    return "^" + re.escape(message) + "$"


def plane_of(F: fl.Fisher, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(F.n_params, 2, generator=g, dtype=torch.float64)


def unit(plane: torch.Tensor) -> torch.Tensor:
    return plane / plane.norm(dim=0)


@pytest.mark.parametrize("name", NAMES)
def test_ellipse_and_divergence(name, unchanged):
    c = case(name)
    F, inputs = c.fisher(), c.data[0]
    plane = plane_of(F)
    with unchanged(c.model):
        ds = fl.ellipse(F, plane, radius=[0.01, 0.1], model=c.model, data=c.data, grid=5, progress=False)
    e, T = unit(plane), c.matrix
    metric = reference.plane_metric(T, e)
    np.testing.assert_allclose(ds["metric"], metric, rtol=1e-9)
    np.testing.assert_allclose(ds["overlap"], e[:, 0] @ e[:, 1], atol=1e-14)
    for k, r in enumerate((0.01, 0.1)):
        np.testing.assert_allclose(ds["semi_axis"].values[k], reference.ellipse_semi_axes(T, plane, r), rtol=1e-8)
        points = torch.from_numpy(np.stack([ds["boundary_x"].values[k], ds["boundary_y"].values[k]]))
        delta = e @ points
        np.testing.assert_allclose(0.5 * ((T @ delta) * delta).sum(0), r, rtol=1e-8)
        inverse = torch.linalg.inv(metric)
        np.testing.assert_allclose(ds["half_width"].values[k], (2 * r * inverse.diagonal()).sqrt(), rtol=1e-8)
        assert np.abs(ds["boundary_x"].values[k]).max() == pytest.approx(ds["half_width"].values[k, 0], rel=1e-3)
    principal = e @ torch.tensor(ds["principal"].values.T.copy())
    np.testing.assert_allclose(principal.T @ principal, np.eye(2), atol=1e-10)
    np.testing.assert_allclose(principal.T @ T @ principal, np.diag(ds["eigenvalue"].values), atol=1e-10)
    np.testing.assert_allclose(ds["x"], 1.6 * ds["half_width"].values[1, 0] * np.linspace(-1, 1, 5), atol=1e-12)
    for i, y in enumerate(ds["y"].values):
        for j, x in enumerate(ds["x"].values):
            delta = e @ torch.tensor([x, y], dtype=torch.float64)
            exact = reference.kl_divergence(c.model, None, delta, inputs, c.likelihood, c.data[1])
            assert float(ds["kl"][i, j]) == pytest.approx(exact, rel=1e-8, abs=1e-13)
            assert float(ds["kl_quadratic"][i, j]) == pytest.approx(0.5 * (delta @ T @ delta).item(), rel=1e-8)
    assert float(ds["kl"].sel(x=0, y=0)) == 0
    assert bool(ds["bounded"])


def test_near_the_centre_the_two_agree():
    c = case("lenet")
    F = c.fisher()
    ds = fl.ellipse(F, plane_of(F), radius=1e-8, model=c.model, data=c.data, grid=4)
    np.testing.assert_allclose(ds["kl"], ds["kl_quadratic"], rtol=1e-2)


def test_a_linear_gaussian_model_agrees_everywhere():
    model, data, likelihood = make_case("line", lambda: nn.Linear(3, 2), (3,), "gaussian", n=8)
    for own in (likelihood, fl.Gaussian([0.5, 3.0])):
        F = fl.Fisher(model, data, likelihood=own)
        ds = fl.ellipse(F, plane_of(F), radius=5.0, model=model, data=data, grid=3)
        np.testing.assert_allclose(ds["kl"], ds["kl_quadratic"], rtol=1e-10)


@pytest.mark.parametrize(
    "likelihood",
    [
        fl.Categorical(weight=[1.0, 2.0, 0.5], ignore_index=1),
        fl.Bernoulli(pos_weight=[3.0, 0.5, 1.0]),
        fl.Gaussian(torch.linspace(0.5, 2.0, 6)[:, None]),
    ],
    ids=["categorical", "bernoulli", "gaussian"],
)
def test_weights_count_as_in_the_fisher(likelihood):
    name = likelihood.name
    model, data, _ = make_case(f"weights {name}", lambda: nn.Linear(4, 3), (4,), name)
    F = fl.Fisher(model, data, likelihood=likelihood)
    plane = plane_of(F)
    ds = fl.ellipse(
        F, plane, radius=0.05, model=model, data=[(data[0][:4], data[1][:4]), (data[0][4:], data[1][4:])], grid=3
    )
    e = unit(plane)
    delta = e @ torch.tensor([float(ds["x"][0]), float(ds["y"][2])], dtype=torch.float64)
    exact = reference.kl_divergence(model, None, delta, data[0], likelihood, data[1])
    assert float(ds["kl"][2, 0]) == pytest.approx(exact, rel=1e-9)


def test_positions_are_terms():
    g = torch.Generator().manual_seed(1)
    model = fill(nn.Conv2d(2, 3, 2).double(), g)
    data = torch.randn(4, 2, 4, 3, generator=g, dtype=torch.float64), torch.randint(3, (4, 3, 2), generator=g)
    F = fl.Fisher(model, data, likelihood="categorical")
    plane = plane_of(F)
    ds = fl.ellipse(F, plane, radius=0.05, model=model, data=data, grid=2)
    delta = unit(plane) @ torch.tensor([float(ds["x"][1]), float(ds["y"][0])], dtype=torch.float64)
    exact = reference.kl_divergence(model, None, delta, data[0], "categorical", data[1])
    assert float(ds["kl"][0, 1]) == pytest.approx(exact, rel=1e-9)


def test_a_predicted_variance_has_its_own_divergence():
    g = torch.Generator().manual_seed(2)
    model = fill(nn.Linear(3, 4).double(), g)
    x, y = torch.randn(6, 3, generator=g, dtype=torch.float64), torch.randn(6, 2, generator=g, dtype=torch.float64)
    F = fl.Fisher(model, (x, y), likelihood=fl.HeteroscedasticGaussian())
    plane = plane_of(F)
    ds = fl.ellipse(F, plane, radius=0.3, model=model, data=(x, y), grid=3)
    theta = F.parameters + unit(plane) @ torch.tensor([float(ds["x"][2]), float(ds["y"][0])], dtype=torch.float64)
    values = F.layout.unflatten(theta)
    with torch.no_grad():
        old, new = model(x), torch.func.functional_call(model, values, (x,))
    normal = [torch.distributions.Normal(f[:, :2], (f[:, 2:] / 2).exp()) for f in (old, new)]
    exact = torch.distributions.kl_divergence(*normal).sum(1).mean()
    assert float(ds["kl"][0, 2]) == pytest.approx(exact.item(), rel=1e-10)


def test_saturated_predictions_stay_finite():
    """Where the direct formula loses all digits, and where it overflows."""
    bound = fl.Categorical().bind(torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64), None)
    near = bound.divergence(bound.outputs + torch.tensor([[1e-7, 0, 0]], dtype=torch.float64))
    p = bound.outputs.softmax(-1)[0, 0]
    assert near.item() == pytest.approx(0.5e-14 * (p * (1 - p)).item(), rel=1e-6)
    far = bound.divergence(torch.tensor([[2000.0, 0, -1.0]], dtype=torch.float64))
    p = bound.outputs.softmax(-1)[0]
    assert far.item() == pytest.approx(
        (p * p.log()).sum().item() + (p * torch.tensor([0.0, 2000, 2001])).sum().item(), rel=1e-12
    )
    two = fl.Bernoulli().bind(torch.tensor([[3.0]], dtype=torch.float64), None)
    moved = torch.tensor([[-2.0]], dtype=torch.float64)
    exact = torch.distributions.kl_divergence(*(torch.distributions.Bernoulli(logits=f) for f in (two.outputs, moved)))
    assert two.divergence(moved).item() == pytest.approx(exact.item(), rel=1e-12)


# --- forms of directions -----------------------------------------------------------------------------------------------


def test_every_form_of_two_directions():
    F = case("mlp_tanh").fisher()
    plane = plane_of(F)
    one, two = plane.unbind(1)
    whole = fl.ellipse(F, plane, radius=1.0)
    forms = {
        "vectors": (one, two),
        "numpy": (one.numpy(), 2 * two.numpy()),
        "dicts": [F.layout.unflatten(one), F.layout.unflatten(two)],
        "dict of blocks": F.layout.unflatten(plane),
        "dict of pairs": {
            k: (a, b)
            for (k, a), b in zip(F.layout.unflatten(one).items(), F.layout.unflatten(two).values(), strict=True)
        },
        "float32": (one.float(), two),
    }
    for name, form in forms.items():
        found = fl.ellipse(F, form, radius=1.0)
        np.testing.assert_allclose(
            found["boundary_x"], whole["boundary_x"], rtol=1e-6 if name == "float32" else 1e-10, atol=1e-6
        )
    assert list(whole["axis_i"].values) == ["direction 1", "direction 2"]
    assert whole["boundary_x"].attrs["long_name"] == "step along direction 1"
    assert "kl" not in whole


def test_parameters_by_label_and_by_index():
    c = case("mlp_tanh")
    F = c.fisher()
    labels = list(F.layout.parameter_labels())
    ds = fl.ellipse(F, ("0.weight[1,2]", "4.bias[0]"), radius=1.0)
    places = [labels.index("0.weight[1,2]"), labels.index("4.bias[0]")]
    np.testing.assert_allclose(ds["metric"], c.matrix[places][:, places], rtol=1e-10)
    same = fl.ellipse(F, places, radius=1.0)
    assert same.identical(
        ds.assign_attrs(same.attrs)
    )  # but for the time at which each was made, and the words of the question
    assert list(ds["axis_i"].values) == ["0.weight[1,2]", "4.bias[0]"]


def test_of_what_directions_returns():
    F = case("mlp_tanh").fisher()
    found = fl.directions(F, 4, vectors=True)
    pair = found.sel(rank=[0, 3])
    ds = fl.ellipse(F, pair, radius=0.5)
    np.testing.assert_allclose(ds["eigenvalue"], pair["eigenvalue"], rtol=1e-8)
    np.testing.assert_allclose(ds["semi_axis"][0], (1 / pair["eigenvalue"]) ** 0.5, rtol=1e-8)
    assert list(ds["axis_i"].values) == ["stiff direction 1", "stiff direction 4"]
    with pytest.raises(InputError, match=r"A plane needs two directions; the Dataset holds 8\. Select two ranks"):
        fl.ellipse(F, found, radius=0.5)
    with pytest.raises(InputError, match=r"must hold eigenvector \(rank, param\)"):
        fl.ellipse(F, fl.directions(F, 2), radius=0.5)


def test_directions_at_an_angle_keep_their_own_coordinates():
    F = case("mlp_tanh").fisher()
    one, two = plane_of(F).unbind(1)
    ds = fl.ellipse(F, (one, one + 0.1 * two), radius=1.0)
    assert 0.9 < float(ds["overlap"]) < 1
    e = unit(torch.stack([one, one + 0.1 * two], 1))
    delta = e @ torch.from_numpy(np.stack([ds["boundary_x"].values[0], ds["boundary_y"].values[0]]))
    np.testing.assert_allclose(0.5 * (delta * (case("mlp_tanh").matrix @ delta)).sum(0), 1.0, rtol=1e-7)


def test_streamed_and_restricted():
    c = case("conv_groups")
    whole, F = c.fisher(), c.fisher(memory=2000)
    assert F.plan.streamed
    plane = plane_of(F)
    np.testing.assert_allclose(
        fl.ellipse(F, plane, radius=1.0)["metric"], fl.ellipse(whole, plane, radius=1.0)["metric"], rtol=1e-10
    )
    part = whole.restrict("3")
    ds = fl.ellipse(part, plane_of(part), radius=0.01, model=c.model, data=c.data, grid=2)
    index = whole.layout.index_of("3")
    delta = torch.zeros(whole.n_params, dtype=torch.float64)
    delta[index] = unit(plane_of(part)) @ torch.tensor([float(ds["x"][0]), float(ds["y"][0])], dtype=torch.float64)
    exact = reference.kl_divergence(c.model, None, delta, c.data[0], c.likelihood)
    assert float(ds["kl"][0, 0]) == pytest.approx(exact, rel=1e-8)


def test_float32():
    F = in_float32("mlp_tanh")
    plane = plane_of(F)
    ds = fl.ellipse(F, plane, radius=0.1)
    np.testing.assert_allclose(ds["metric"], reference.plane_metric(case("mlp_tanh").matrix, unit(plane)), rtol=1e-4)


def test_the_parameters_are_those_of_the_operator():
    model, data, likelihood = make_case(
        "trained on", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (3,)
    )
    F = fl.Fisher(model, data, likelihood=likelihood)
    before = fl.ellipse(F, plane_of(F), radius=0.1, model=model, data=data, grid=3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7)
    after = fl.ellipse(F, plane_of(F), radius=0.1, model=model, data=data, grid=3)
    np.testing.assert_array_equal(after["kl"], before["kl"])


def test_a_function_as_model():
    g = torch.Generator().manual_seed(3)
    params = {"w": torch.randn(3, 2, generator=g, dtype=torch.float64)}
    x = torch.randn(5, 3, generator=g, dtype=torch.float64)

    def f(p, inputs):
        return inputs @ p["w"]

    F = fl.Fisher(f, (x, None), likelihood="gaussian", params=params)
    ds = fl.ellipse(F, ["w[0,0]", "w[2,1]"], radius=0.1, model=f, data=(x, None), grid=3)
    np.testing.assert_allclose(ds["kl"], ds["kl_quadratic"], rtol=1e-10)


# --- no information ----------------------------------------------------------------------------------------------------


def line() -> tuple[nn.Module, fl.Fisher, torch.Tensor]:
    """Two weights that the data see, two of which only the sum is seen, one that nothing sees."""
    x = torch.tensor([[1.0, 2, 2, 0], [0, 1, 1, 0], [3, 0, 0, 0]], dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    return model, fl.Fisher(model, (x, None), likelihood="gaussian"), x


@pytest.mark.parametrize(("pair", "reach"), [((0, 3), (True, False)), ((1, 2), (False, False)), ((0, 1), (True, True))])
def test_a_direction_without_information_bounds_nothing(pair, reach):
    model, F, x = line()
    ds = fl.ellipse(F, pair, radius=[0.1, 1.0], model=model, data=(x, None), grid=3)
    assert bool(ds["bounded"]) == all(reach)
    assert (np.isfinite(ds["half_width"].values) == np.array(reach)).all()
    assert np.isfinite(ds["kl"]).all()
    if not all(reach):
        assert ds["eigenvalue"].values[1] == 0
        assert np.isinf(ds["semi_axis"].values[:, 1]).all()
        assert np.isinf(ds["boundary_x"].values).any()
        e = np.eye(4)[:, list(pair)] @ ds["principal"].values[1]
        np.testing.assert_allclose(F.dense().numpy() @ e, 0, atol=1e-14)
        np.testing.assert_allclose(
            ds["semi_axis"].values[:, 0], np.sqrt(2 * np.array([0.1, 1]) / ds["eigenvalue"].values[0])
        )


def test_a_plane_without_any_information():
    x = torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    F = fl.Fisher(nn.Linear(3, 1, bias=False).double(), (x, None), likelihood="gaussian")
    ds = fl.ellipse(F, (1, 2), radius=1.0)
    assert not bool(ds["bounded"])
    assert (ds["eigenvalue"] == 0).all()
    assert np.isinf(ds["half_width"]).all()
    assert (float(ds["x"].max()), float(ds["y"].max())) == (1.0, 1.0)


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_bad_directions():
    F = case("mlp_tanh").fisher()
    one, two = plane_of(F).unbind(1)
    nan = one.clone()
    nan[3] = np.nan
    P = F.n_params
    cases = [
        (
            (one, 3 * one),
            InputError,
            "The two directions must span a plane; 'direction 1' and 'direction 2' are parallel (cosine 1.0000000000).",
        ),
        ((one, torch.zeros(P)), InputError, "The direction 'direction 2' is zero, so it is none."),
        ((one, nan), NonFiniteError, "The direction 'direction 2' holds NaN or infinity."),
        (
            (one, two[:-1]),
            InputError,
            f"A direction must be flat, of shape ({P},), one number per parameter of F; 'direction 2' has shape ({P - 1},).",
        ),
        (one, InputError, f"directions as one tensor must have shape ({P}, 2), one vector per column; got ({P},)."),
        ((one, two, one), TypeError, "directions must be two flat vectors (P,)"),
        ("0.weight[1,2]", TypeError, "directions must be two flat vectors (P,)"),
        ((one, None), TypeError, "directions must be two flat vectors (P,)"),
        ((one, two + 1j), TypeError, "A direction must hold real numbers; 'direction 2' is torch.complex128."),
        (("0.weight[1,2]", "0.wieght[1,2]"), InputError, "Unknown parameter '0.wieght'. Did you mean '0.weight'?"),
        (
            ("0.weight[1,2]", "0.weight[9,2]"),
            InputError,
            "'0.weight[9,2]' is no entry of parameter '0.weight' of shape (6, 5). Write '0.weight[0,0]', say",
        ),
        (("0.weight[1,2]", "0.weight"), InputError, "'0.weight' is no entry of parameter '0.weight' of shape (6, 5)."),
        (("0.weight[1,2]", "0.weight[1,2]"), InputError, "The two directions must span a plane"),
        ((0, P), InputError, f"A flat index must lie in 0..{P - 1}; got {P}."),
        ({"0.weight": one}, InputError, "directions as a dict must map each name to a pair of tensors"),
    ]
    for directions, kind, message in cases:
        with pytest.raises(kind, match="^" + re.escape(message)):
            fl.ellipse(F, directions, radius=1.0)


def test_bad_options():
    F = case("mlp_tanh").fisher()
    plane = plane_of(F)
    for radius in (0, -1.0, np.nan, np.inf, [], [1.0, 0.0], "big", None, True, [[1.0]]):
        with pytest.raises(
            InputError,
            match=re.escape(
                f"radius must be a finite number > 0 or several, a divergence in nat per example; got {radius!r}."
            ),
        ):
            fl.ellipse(F, plane, radius=radius)
    with pytest.raises(InputError, match="grid must be an integer >= 2"):
        fl.ellipse(F, plane, radius=1.0, grid=1)
    with pytest.raises(InputError, match="num_angles must be an integer >= 8"):
        fl.ellipse(F, plane, radius=1.0, num_angles=3)
    for extent in (0, np.nan, (1.0, -1.0), "wide", (1, 2, 3)):
        with pytest.raises(InputError, match=r"extent must be a finite number > 0, or two"):
            fl.ellipse(F, plane, radius=1.0, extent=extent)
    ds = fl.ellipse(F, plane, radius=1.0, extent=(0.5, 2))
    assert (float(ds["x"].max()), float(ds["y"].max())) == (0.5, 2.0)
    with pytest.raises(TypeError, match=r"takes a fisherlens\.Fisher"):
        fl.ellipse(None, plane, radius=1.0)


def test_another_model_or_other_data():
    c, other = case("mlp_tanh"), case("softmax_regression")
    F, plane = c.fisher(), plane_of(c.fisher())
    x, y = c.data
    options = {"radius": 0.1, "grid": 2}
    with pytest.raises(
        InputError,
        match=full(
            "The true divergence needs both model= and data=, those of F; got one of them. Give both, or neither for the quadratic model alone."
        ),
    ):
        fl.ellipse(F, plane, model=c.model, **options)
    with pytest.raises(InputError, match=r"Unknown parameter or pattern"):
        fl.ellipse(F, plane, model=other.model, data=other.data, **options)
    wider = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with pytest.raises(InputError, match="The model is not that of F: F covers 6 parameters"):
        fl.ellipse(F, plane, model=wider, data=c.data, **options)
    with pytest.raises(InputError, match="The data are not those of F: it was built on 7 examples, these are 5"):
        fl.ellipse(F, plane, model=c.model, data=(x[:5], y[:5]), **options)
    with pytest.raises(InputError, match="The model does not give on these data what it gave when F was built"):
        fl.ellipse(F, plane, model=c.model, data=(x + 1, y), **options)
    weighted = fl.Fisher(c.model, c.data, likelihood=fl.Categorical(weight=[1.0, 5.0, 2.0]))
    with pytest.raises(InputError, match="The data are not those of F: the weights of their terms add up to"):
        fl.ellipse(weighted, plane, model=c.model, data=(x, (y + 1) % 3), **options)


def test_a_likelihood_without_a_divergence():
    class Exponential(fl.ElementwiseLikelihood):
        def fisher_root(self, outputs):
            return torch.ones_like(outputs)

        def score(self, outputs, targets):
            return targets * outputs.exp() - 1

        def sample(self, outputs, uniforms):
            return -torch.log1p(-uniforms) * (-outputs).exp()

    class Complete(Exponential):
        def divergence(self, outputs, moved):
            return torch.expm1(moved - outputs) - (moved - outputs)

    g = torch.Generator().manual_seed(4)
    model = fill(nn.Linear(2, 1).double(), g)
    data = torch.randn(5, 2, generator=g, dtype=torch.float64), torch.ones(5, 1, dtype=torch.float64)
    F = fl.Fisher(model, data, likelihood=Exponential())
    with pytest.raises(
        InputError, match=r"between two outputs is needed here, but Exponential does not say it\. Give it a method"
    ):
        fl.ellipse(F, (0, 1), radius=0.1, model=model, data=data)
    assert "kl" not in fl.ellipse(F, (0, 1), radius=0.1)
    F = fl.Fisher(model, data, likelihood=Complete())
    ds = fl.ellipse(F, (0, 1), radius=1e-8, model=model, data=data, grid=3)
    np.testing.assert_allclose(ds["kl"], ds["kl_quadratic"], rtol=1e-3)


def test_saved_and_loaded(tmp_path):
    c = case("mlp_tanh")
    ds = fl.ellipse(c.fisher(), (0, 1), radius=[0.1, 1.0], model=c.model, data=c.data, grid=2)
    fl.save(ds, tmp_path / "e.nc")
    assert fl.load(tmp_path / "e.nc").identical(ds)
