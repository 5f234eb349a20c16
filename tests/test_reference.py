"""The reference against closed forms, definitions written in another way, and libraries that nobody here wrote."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from cases import ALL_CASES, EXTRA_CASES, cast
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal, kl_divergence
from torch.nn import functional

from fisherlens import reference
from fisherlens.layout import Layout

EVERY = {**ALL_CASES, **EXTRA_CASES}
DISTRIBUTION = {
    "categorical": lambda f: Categorical(logits=f.movedim(1, -1)),
    "bernoulli": lambda f: Independent(Bernoulli(logits=f), f.ndim - 1),
    "gaussian": lambda f: Independent(Normal(f, 1.0), f.ndim - 1),
}


def close(ours, theirs, rtol=1e-10):
    """Relative to the largest entry, so that a zero is compared with the size of its neighbours."""
    atol = rtol * max(theirs.detach().abs().max().item(), 1e-300)
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=atol)


def call(model, inputs):
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def categorical(weight=None, ignore_index=-100, class_axis=1):
    weight = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    return SimpleNamespace(weight=weight, ignore_index=ignore_index, class_axis=class_axis)


def hessian(model, data, likelihood, loss):
    """The Hessian of a loss of the outputs by double backward, flat; the GGN where the outputs are linear in θ."""
    own, layout = dict(model.named_parameters()), Layout.from_model(model)

    def function(theta):
        return loss(torch.func.functional_call(model, layout.unflatten(theta), data[0]), data[1])

    return torch.autograd.functional.hessian(function, torch.cat([own[name].detach().reshape(-1) for name in layout]))


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [1.0, 0.3])
def test_linear_gaussian_is_the_second_moment_of_the_inputs_over_the_variance(variance):
    model, (x, y), _ = ALL_CASES["gaussian_linear"]()
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    per_output = ones.T @ ones / (len(x) * variance)  # (4, 4): three weights and the bias of one output
    order = torch.tensor([0, 1, 2, 6, 3, 4, 5, 7])  # output 0 then output 1, each with its bias
    expected = torch.zeros(8, 8, dtype=x.dtype)
    expected[order[:, None], order] = torch.block_diag(per_output, per_output)
    close(reference.fisher(model, (x, y), SimpleNamespace(variance=variance)), expected)


def test_softmax_regression_is_the_kronecker_form_of_the_textbook():
    model, (x, y), _ = ALL_CASES["softmax_regression"]()
    p = model(x).softmax(1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    expected = torch.einsum("ncd,ni,nj->cidj", H, x, x).reshape(12, 12).detach() / len(x)
    close(reference.fisher(model, (x, y), "categorical")[:12, :12], expected)


LINEAR = {
    "categorical": ("softmax_regression", "categorical", functional.cross_entropy),
    "class weights": (
        "softmax_regression",
        categorical(weight=[0.2, 1.0, 3.0]),
        lambda f, y: functional.cross_entropy(f, y, weight=torch.tensor([0.2, 1.0, 3.0], dtype=f.dtype)),
    ),
    "ignored label": (
        "softmax_regression",
        categorical(ignore_index=1),
        lambda f, y: functional.cross_entropy(f, y, ignore_index=1),
    ),
    "bernoulli": (
        "bernoulli_linear",
        "bernoulli",
        lambda f, y: functional.binary_cross_entropy_with_logits(f, y) * f.shape[1],
    ),
    "pos_weight": (
        "bernoulli_linear",
        SimpleNamespace(pos_weight=torch.tensor([2.5, 0.3], dtype=torch.float64)),
        lambda f, y: (
            functional.binary_cross_entropy_with_logits(f, y, pos_weight=torch.tensor([2.5, 0.3], dtype=f.dtype)) * 2
        ),
    ),
    "gaussian": ("gaussian_linear", "gaussian", lambda f, y: functional.mse_loss(f, y) * f.shape[1] / 2),
}


@pytest.mark.parametrize("name", LINEAR)
def test_exact_fisher_of_a_linear_model_is_the_hessian_of_the_loss(name):
    case, likelihood, loss = LINEAR[name]
    model, (x, y), _ = ALL_CASES["gaussian_linear" if case == "bernoulli_linear" else case]()
    y = (y > 0).double() if case == "bernoulli_linear" else y
    close(reference.fisher(model, (x, y), likelihood), hessian(model, (x, y), likelihood, loss))


@pytest.mark.parametrize(
    ("loss", "factor"),
    [(nn.MSELoss(), 2 / 2), (nn.MSELoss(reduction="sum"), 2 * 8)],
    ids=["mean: 2/C", "sum: 2N"],
)
def test_squared_errors_are_these_multiples_of_the_gaussian_fisher(loss, factor):
    model, data, _ = ALL_CASES["gaussian_linear"]()
    close(factor * reference.fisher(model, data, "gaussian"), hessian(model, data, "gaussian", loss))


# --- every case, in two ways -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_jacobian_agrees_with_torch_func(name):
    model, (x, _), _ = EVERY[name]()
    own, layout = dict(model.named_parameters()), Layout.from_model(model)
    theta = {n: own[n].detach() for n in layout}
    by_name = torch.func.jacrev(lambda t: torch.func.functional_call(model, t, x))(theta)
    N_and_outputs = call(model, x).ndim
    expected = torch.cat([by_name[n].flatten(N_and_outputs) for n in layout], dim=-1)
    close(reference.jacobian(model, x), expected)


@pytest.mark.parametrize("name", EVERY)
def test_gradient_and_loss_agree_with_the_ordinary_training_step(name):
    model, (x, y), likelihood = EVERY[name]()
    loss = -DISTRIBUTION[likelihood](call(model, x)).log_prob(y).mean()
    loss.backward()
    selected = [p for p in model.parameters() if p.requires_grad]
    expected = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in selected])
    close(reference.gradient(model, (x, y), likelihood), expected)
    close(reference.negative_log_likelihood(model, (x, y), likelihood), loss)


@pytest.mark.parametrize("name", [n for n in EVERY if EVERY[n]()[2] == "categorical"])
def test_exact_fisher_is_the_sum_over_all_labels_of_their_probability_times_their_scores(name):
    model, (x, y), likelihood = EVERY[name]()
    p = call(model, x).softmax(1).detach()  # (N, C, ...)
    total, mean_score = 0, 0
    for label in range(p.shape[1]):
        rows, count = reference.score_matrix(model, (x, torch.full_like(y, label)), likelihood, "empirical")
        weight = p[:, label].reshape(-1, 1)  # (N·T, 1)
        total = total + (weight * rows).T @ rows / count
        mean_score = mean_score + weight * rows
    close(reference.fisher(model, (x, y), likelihood), total)
    # the mean score under the model's own labels is zero, for every term
    assert mean_score.abs().max() <= 1e-12 * max(1.0, float(rows.abs().max()))


@pytest.mark.parametrize("name", EVERY)
def test_score_rows_reproduce_the_matrix_and_its_spectrum(name):
    model, data, likelihood = EVERY[name]()
    F = reference.fisher(model, data, likelihood)
    U, W = reference.score_matrix(model, data, likelihood)
    close(U.T @ U / W, F)
    dense, gram = reference.spectrum(F), reference.spectrum(reference.gram(U, W))
    both = min(len(dense), len(gram))
    close(gram[:both], dense[:both])
    leftover = torch.cat([dense[both:], gram[both:]])
    assert not len(leftover) or leftover.abs().max() <= 1e-12 * max(float(dense[0]), 1e-300)


def test_the_zoo_is_small_valid_and_always_the_same(unchanged):
    for name, build in EVERY.items():
        with unchanged():
            model, (_, y), likelihood = build()
            again, (_, y2), _ = build()
        assert not any(module.training for module in model.modules()), name
        assert sum(p.numel() for p in model.parameters()) < 400, name
        assert 5 <= len(y) <= 9, name
        assert likelihood in DISTRIBUTION, name
        assert torch.equal(y, y2), name
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
        )


@pytest.mark.parametrize("name", ["mlp_tanh", "batchnorm_2d", "bernoulli_two_outputs", "gaussian_image"])
def test_float32_gives_float32_close_to_float64(name):
    F = reference.fisher(*(case := EVERY[name]())[:2], case[2])
    model, data, likelihood = cast(EVERY[name](), torch.float32)
    single = reference.fisher(model, data, likelihood)
    assert single.dtype == torch.float32
    close(single.double(), F, rtol=1e-4)


# --- weights, masks, axes, selections --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_class_weight_is_a_repetition_count(kind):
    model, (x, y), _ = ALL_CASES["mlp_tanh"]()
    weighted = reference.fisher(model, (x, y), categorical(weight=[1.0, 2.0, 3.0]), kind)
    repeats = y + 1
    assert len(set(repeats.tolist())) > 1
    repeated = (x.repeat_interleave(repeats, 0), y.repeat_interleave(repeats))
    close(weighted, reference.fisher(model, repeated, "categorical", kind))


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_the_weight_of_a_positive_label_repeats_it_in_the_sum_and_not_in_the_count(kind):
    """One output: positives count three times, but the mean is still over the examples."""
    model, (x, y), _ = ALL_CASES["bernoulli_one_output"]()
    repeats = 1 + 2 * y[:, 0].long()
    assert len(x) < repeats.sum() < 3 * len(x)
    repeated = (x.repeat_interleave(repeats, 0), y.repeat_interleave(repeats, 0))
    expected = reference.fisher(model, repeated, "bernoulli", kind) * repeats.sum() / len(x)
    close(reference.fisher(model, (x, y), SimpleNamespace(pos_weight=3.0), kind), expected)


@pytest.mark.parametrize("kind", ["exact", "empirical", "mc"])
def test_a_variance_of_each_output_is_a_change_of_units(kind):
    """Outputs and targets in units of their standard deviation have unit variance."""
    model, (x, y), _ = ALL_CASES["gaussian_three_outputs"]()
    std = torch.tensor([0.5, 2.0, 3.0], dtype=x.dtype)
    sample = (model(x).detach() + std * y)[..., None]
    F = reference.fisher(model, (x, y), SimpleNamespace(variance=std**2), kind, labels=sample)
    with torch.no_grad():
        model[2].weight /= std[:, None]
        model[2].bias /= std
    in_units = reference.fisher(model, (x, y / std), "gaussian", kind, labels=sample / std[:, None])
    scale = torch.cat([torch.ones(24, dtype=x.dtype), std.repeat_interleave(6), std])  # dθ'/dθ = 1/std
    close(F, in_units / scale / scale[:, None])


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_an_ignored_label_is_as_good_as_absent(kind):
    model, (x, y), _ = ALL_CASES["mlp_tanh"]()
    masked = y.clone()
    masked[[1, 4]] = -100
    kept = torch.tensor([0, 2, 3, 5, 6])
    close(
        reference.fisher(model, (x, masked), "categorical", kind),
        reference.fisher(model, (x[kept], y[kept]), "categorical", kind),
    )
    close(
        reference.gradient(model, (x, masked), "categorical"),
        reference.gradient(model, (x[kept], y[kept]), "categorical"),
    )


class ClassesLast(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).movedim(1, -1)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_the_class_axis_is_taken_from_the_likelihood(kind):
    """Outputs (N, 3, 3, 3): no size tells which axis holds the classes."""
    model, data, _ = ALL_CASES["segmentation"]()
    last = reference.fisher(ClassesLast(model), data, categorical(class_axis=-1), kind)
    close(last, reference.fisher(model, data, "categorical", kind))


def test_positions_are_terms_of_the_mean():
    """A 1 × 1 convolution on a map is a softmax regression on its pixels."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 4, 2, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (5, 2, 2), generator=generator)
    dense, _, _ = ALL_CASES["softmax_regression"]()
    conv = nn.Conv2d(4, 3, 1).double().eval()
    with torch.no_grad():
        conv.weight.copy_(dense.weight[:, :, None, None])
        conv.bias.copy_(dense.bias)
    pixels = (x.movedim(1, -1).reshape(20, 4), y.reshape(20))
    for kind in ("exact", "empirical"):
        close(reference.fisher(conv, (x, y), "categorical", kind), reference.fisher(dense, pixels, "categorical", kind))


def test_selected_parameters_give_the_block_of_the_whole():
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    layout = Layout.from_model(model)
    F = reference.fisher(model, data, likelihood)
    for params in (["2"], ["*.bias"], "0.weight", ["4.bias", "0.weight"]):
        index = layout.index_of(params)
        close(reference.fisher(model, data, likelihood, params=params), reference.block(F, index))
        close(reference.gradient(model, data, likelihood, params), reference.gradient(model, data, likelihood)[index])
    model.requires_grad_(False)
    close(reference.fisher(model, data, likelihood, params=["2"]), reference.block(F, layout.index_of("2")))


def test_targets_may_be_missing_where_they_are_not_needed():
    model, (x, y), likelihood = ALL_CASES["mlp_tanh"]()
    close(reference.fisher(model, (x, None), likelihood), reference.fisher(model, (x, y), likelihood))


def test_inputs_may_be_a_dict_and_the_grad_mode_does_not_matter():
    model, ((a, b), y), likelihood = EXTRA_CASES["two_inputs"]()
    expected = reference.fisher(model, ((a, b), y), likelihood)
    with torch.no_grad():
        close(reference.fisher(model, ({"b": b, "a": a}, y), likelihood), expected)


# --- what F means ----------------------------------------------------------------------------------------------------

MEANINGS = {
    "categorical": ("mlp_tanh", "categorical"),
    "weights": ("mlp_tanh", categorical(weight=[0.2, 1.0, 3.0])),
    "positions": ("segmentation", "categorical"),
    "bernoulli": ("bernoulli_two_outputs", "bernoulli"),
    "pos_weight": ("bernoulli_two_outputs", SimpleNamespace(pos_weight=torch.tensor(2.5))),
    "gaussian": ("gaussian_three_outputs", SimpleNamespace(variance=torch.tensor([0.5, 2.0, 3.0]))),
    "batchnorm": ("batchnorm_2d", "categorical"),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_divergence_tends_to_half_the_quadratic_form(name):
    model, (x, y), _ = ALL_CASES[MEANINGS[name][0]]()
    likelihood = MEANINGS[name][1]
    F = reference.fisher(model, (x, y), likelihood)
    direction = torch.randn(len(F), generator=torch.Generator().manual_seed(5), dtype=F.dtype)
    direction /= (direction @ F @ direction).sqrt()
    sizes = (1e-2, 1e-3, 1e-4)
    errors = [
        abs(reference.kl_divergence(model, None, h * direction, x, likelihood, y) / (h**2 / 2) - 1) for h in sizes
    ]
    assert errors[0] <= 0.1
    assert errors[1] <= errors[0] / 8  # the error is of first order in h, or higher
    assert errors[2] <= max(errors[1] / 8, 1e-6)


@pytest.mark.parametrize("name", ["segmentation", "bernoulli_two_outputs", "gaussian_three_outputs"])
def test_divergence_agrees_with_torch_distributions_at_any_distance(name):
    model, (x, _), likelihood = ALL_CASES[name]()
    layout = Layout.from_model(model, "0")
    delta = torch.randn(layout.n_params, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    ours = reference.kl_divergence(model, "0", delta, x, likelihood)
    before = DISTRIBUTION[likelihood](model(x))
    with torch.no_grad():
        for parameter, step in zip(model[0].parameters(), layout.unflatten(delta).values(), strict=True):
            parameter += step
    theirs = kl_divergence(before, DISTRIBUTION[likelihood](model(x))).mean()
    assert theirs > 0.01
    assert ours == pytest.approx(theirs.item(), rel=1e-10)


SAMPLED = ["mlp_tanh", "segmentation", "bernoulli_two_outputs", "gaussian_three_outputs"]


def sampled(name, seed, num_samples):
    """Score rows at labels drawn from the model with an own generator, ``(N, S, P)`` without their 1/√S."""
    model, (x, y), likelihood = ALL_CASES[name]()
    with torch.no_grad(), own_generator(seed):
        labels = DISTRIBUTION[likelihood](model(x)).sample((num_samples,)).movedim(0, -1)
    U, W = reference.score_matrix(model, (x, y), likelihood, "mc", labels=labels)
    F = reference.fisher(model, (x, y), likelihood)
    close(reference.mc_fisher(model, (x, y), likelihood, labels), U.T @ U / W)
    return U.reshape(len(y), num_samples, -1) * num_samples**0.5, W, F


@contextmanager
def own_generator(seed):
    """torch.distributions draws from the global generator only: seed it, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_fisher_is_unbiased(name, seed):
    """The size of the sample is fixed beforehand; 5 standard errors."""
    U, W, F = sampled(name, seed, 2000)
    V = torch.randn(U.shape[-1], 4, generator=torch.Generator().manual_seed(1), dtype=U.dtype)
    forms = (U @ V).square().sum(0) / W  # (S, 4): vᵀ F_s v of every draw
    deviation = forms.mean(0) - torch.einsum("pk,pq,qk->k", V, F, V)
    assert (deviation.abs() <= 5 * forms.std(0) / len(forms) ** 0.5).all()


@pytest.mark.parametrize("name", SAMPLED)
def test_mean_score_under_model_labels_is_zero(name):
    U, _, _ = sampled(name, 3, 2000)
    V = torch.randn(U.shape[-1], 4, generator=torch.Generator().manual_seed(1), dtype=U.dtype)
    projected = U @ V  # (N, S, 4)
    assert (projected.mean(1).abs() <= 5 * projected.std(1) / 2000**0.5).all()


def test_the_three_kinds_differ():
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    exact = reference.fisher(model, data, likelihood)
    empirical = reference.empirical_fisher(model, data, likelihood)
    assert (empirical - exact).norm() > 0.1 * exact.norm()
    observed_as_sample = reference.mc_fisher(model, data, likelihood, data[1][:, None])
    close(observed_as_sample, empirical)


# --- libraries that nobody here wrote --------------------------------------------------------------------------------

LOSSES = {
    "categorical": (nn.CrossEntropyLoss(), lambda f: 1.0),
    "bernoulli": (nn.BCEWithLogitsLoss(), lambda f: float(f[0].numel())),
    "gaussian": (nn.MSELoss(), lambda f: f[0].numel() / 2),
}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # their own deprecations are not ours to mend
@pytest.mark.parametrize("name", ALL_CASES)
def test_exact_fisher_agrees_with_curvlinops(name):
    curvlinops = pytest.importorskip("curvlinops")
    model, (x, y), likelihood = ALL_CASES[name]()
    loss, factor = LOSSES[likelihood]
    params = [p for p in model.parameters() if p.requires_grad]
    ggn = curvlinops.GGNLinearOperator(model, loss, params, [(x, y)], check_deterministic=False)
    theirs = ggn @ torch.eye(ggn.shape[1], dtype=x.dtype)
    close(reference.fisher(model, (x, y), likelihood), factor(model(x)) * theirs)


NNGEOMETRY = {
    **dict.fromkeys(("softmax_regression", "mlp_tanh", "lenet", "conv_stride", "conv_padding"), "classif_logits"),
    **dict.fromkeys(("batchnorm_2d", "batchnorm_1d", "layer_norm", "conv_1d"), "classif_logits"),
    "bernoulli_one_output": "classif_binary_logits",
    "gaussian_three_outputs": "regression",
}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # their own deprecations are not ours to mend
@pytest.mark.parametrize("name", NNGEOMETRY)
def test_exact_fisher_agrees_with_nngeometry(name):
    metrics = pytest.importorskip("nngeometry.metrics")
    dense = pytest.importorskip("nngeometry.object").PMatDense
    model, (x, y), likelihood = ALL_CASES[name]()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x))
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)  # nngeometry 0.4 builds constants in the default dtype
        theirs = metrics.FIM(model, loader, dense, variant=NNGEOMETRY[name]).to_torch()
    finally:
        torch.set_default_dtype(default)
    close(reference.fisher(model, (x, y), likelihood), theirs.detach(), rtol=1e-8)
