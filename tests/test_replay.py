"""Inputs and output scores once more: the same rows as F's, whatever F kept, and nothing when model or data changed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from cases_more import MORE_CASES
from fisher_checks import KINDS, QUIET, ZOO, case, error
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, UnsupportedModuleError
from fisherlens.scores.replay import as_matrices, as_vectors, factor_pieces, has_factors

pytestmark = pytest.mark.filterwarnings(QUIET)
NAMES = [
    *(
        "softmax_regression",
        "mlp_tanh",
        "dense_on_positions",
        "frozen_first_layer",
        "conv_stride",
        "conv_groups",
        "conv_depthwise",
    ),
    *(
        "conv_everything",
        "conv_same",
        "conv_circular_same",
        "conv_reflect",
        "conv_1d",
        "conv_3d",
        "conv_one_position",
        "lenet",
    ),
    *(
        "segmentation",
        "gaussian_image",
        "bernoulli_image",
        "residual",
        "module_used_twice",
        "conv_used_twice",
        "batchnorm_2d",
    ),
]


def with_factors(F: fl.Fisher) -> list[str]:
    return [name for name in F.layout.layer_names if has_factors(F, name)]


def collected(F: fl.Fisher, names: list[str] | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Explicit rows of every layer with factors from its pieces, and the weights of the examples."""
    rows, weights, done = {}, [], 0
    for at, found in factor_pieces(F, names or with_factors(F)):
        assert at.start == done
        done = at.stop
        for name, factors in found.items():
            assert len(factors.inputs) == len(factors.outputs) == len(factors.weight) == at.stop - at.start
            matrices = factors.matrices().flatten(0, 1)  # (rows, groups, d_o, d)
            rows.setdefault(name, []).append(as_vectors(factors.layer, matrices).T)
        weights.append(next(iter(found.values())).weight)
    assert done == F.n_data
    return {name: torch.cat(pieces) for name, pieces in rows.items()}, torch.cat(weights)


def explicit(F: fl.Fisher, name: str) -> Tensor:
    return F.scores[name].rows_at(torch.arange(F.scores.rows))


def as_rows(name: str = "conv_padding") -> tuple[fl.Fisher, nn.Module, tuple[Tensor, Tensor]]:
    """A network whose convolution is kept as explicit rows, so that its factors need another pass."""
    model, data, likelihood = ZOO[name]()
    F = fl.Fisher(model, data, likelihood=likelihood, kind="mc")
    assert F.plan["0"].storage == "rows"
    return F, model, data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_the_operator(name, kind, unchanged):
    model, data, likelihood = ZOO[name]()
    with unchanged(model):
        F = fl.Fisher(model, data, likelihood=likelihood, kind=kind, mc_samples=2, seed=3)
        rows, weight = collected(F)
    assert with_factors(F)
    for layer, found in rows.items():
        assert error(found, explicit(F, layer)) < 1e-12
    assert weight.sum().item() == pytest.approx(F.total_weight, rel=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dense_on_positions", "lenet", "conv_groups", "conv_used_twice", "residual"])
def test_streamed_and_kept_give_the_same(name, kind):
    model, data, likelihood = ZOO[name]()
    kept = fl.Fisher(model, data, likelihood=likelihood, kind=kind, mc_samples=2, seed=3)
    small = kept.plan.nbytes // 3
    streamed = fl.Fisher(model, data, likelihood=likelihood, kind=kind, mc_samples=2, seed=3, memory=small)
    assert not streamed.plan.kept
    truth, weight = collected(kept)
    rows, other = collected(streamed)
    assert torch.equal(weight, other)
    for layer, found in rows.items():
        assert error(found, truth[layer]) < 1e-12


def test_a_layer_that_is_never_called_has_no_position():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, x, y = Unused().double(), torch.eye(3, dtype=torch.float64), torch.tensor([0, 1, 1])
    for memory in ("1GiB", 100):
        F = fl.Fisher(model, (x, y), likelihood="categorical", memory=memory)
        rows, _ = collected(F)
        assert rows["idle"].shape == (3, 25)
        assert not rows["idle"].any()
        assert error(rows["used"], explicit(F, "used")) < 1e-12
    assert not F.plan.kept


def test_weights_splits_and_ignored_labels():
    model, (x, _), _ = ZOO["segmentation"]()
    y = torch.randint(3, (5, 3, 3), generator=torch.Generator().manual_seed(0))
    y[0, :2], y[3] = -100, -100
    likelihood = fl.Categorical(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64))
    expected = torch.tensor([0.2, 1.0, 3.0, 0.0], dtype=torch.float64)[y.where(y >= 0, 3)].flatten(1).sum(1)
    for data in ((x, y), [(x[:2], y[:2]), (x[2:], y[2:])], DataLoader(TensorDataset(x, y), batch_size=2)):
        for kind in KINDS:
            F = fl.Fisher(model, data, likelihood=likelihood, kind=kind)
            rows, weight = collected(F)
            assert torch.allclose(weight, expected, rtol=1e-14)
            for layer, found in rows.items():
                assert error(found, explicit(F, layer)) < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "empirical", "rows": "example"},
        {"kind": "mc", "mc_samples": 3, "mc_sampling": "stratified", "seed": 4},
    ],
)
def test_options_of_the_rows(options):
    model, data, likelihood = ZOO["segmentation"]()
    F = fl.Fisher(model, data, likelihood=likelihood, **options)
    rows, _ = collected(F)
    for layer, found in rows.items():
        assert error(found, explicit(F, layer)) < 1e-12
    G = fl.Fisher(model, data, likelihood=likelihood, memory=F.plan.nbytes // 2, **options)
    assert not G.plan.kept
    for layer, found in collected(G)[0].items():
        assert error(found, rows[layer]) < 1e-12


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_whatever_gradient_mode_surrounds_the_call(mode):
    F, _, _ = as_rows()
    truth, _ = collected(F)
    with mode():
        rows, _ = collected(F)
    for layer in truth:
        assert torch.equal(rows[layer], truth[layer])
        assert not rows[layer].requires_grad


def test_float32_and_bfloat16():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        model, (x, y), _ = ZOO["conv_padding"]()
        model, x = model.to(dtype), x.to(dtype)
        F = fl.Fisher(model, (x, y), likelihood="categorical", kind="mc")
        assert F.plan["0"].storage == "rows"
        rows, _ = collected(F)
        assert rows["0"].dtype == torch.float32
        assert error(rows["0"], explicit(F, "0")) < tolerance


def test_what_training_does_meanwhile_does_not_matter(unchanged):
    model, data, likelihood = ZOO["batchnorm_2d"]()
    F = fl.Fisher(model, data, likelihood=likelihood, kind="mc")
    assert F.plan["0"].storage == "rows"
    truth, _ = collected(F)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    model.train()
    model(data[0])  # running statistics move
    with unchanged(model):
        rows, _ = collected(F)
    assert model.training
    for layer in truth:
        assert torch.equal(rows[layer], truth[layer])


def test_a_parameter_that_was_not_selected_changed(unchanged):
    model, data, likelihood = ZOO["conv_padding"]()
    F = fl.Fisher(model, data, likelihood=likelihood, kind="mc", params="0")
    with torch.no_grad():
        model[3].weight.mul_(1 + 1e-5)
    with (
        unchanged(model),
        pytest.raises(InputError, match=r"score rows of layer '0' .* differ from those that F kept .* build F again"),
    ):
        collected(F)


def test_data_that_changed():
    F, _, (x, _) = as_rows()
    x += 0.1
    with pytest.raises(InputError, match="score rows of layer '0' on the data differ from those that F kept"):
        collected(F)


def test_a_loader_that_shuffles():
    model, (x, y), _ = ZOO["conv_padding"]()
    loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(0))
    F = fl.Fisher(model, loader, likelihood="categorical", kind="mc", check_deterministic=False)
    with pytest.raises(InputError, match="differ from those that F kept"):
        collected(F)


def test_a_model_that_was_rebuilt_or_fails():
    F, model, _ = as_rows()
    model[1] = nn.Linear(7, 7).double()
    with pytest.raises(InputError, match="The model failed on the data, on which F was built: RuntimeError"):
        collected(F)
    F, model, _ = as_rows()
    model[0] = nn.Conv2d(2, 3, 3).double()
    with pytest.raises(InputError, match="The model has other parameters than when F was built"):
        collected(F)


def test_a_model_that_uses_its_layer_in_another_way():
    class Repeats(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.times = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(16, 3), 1

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = torch.tanh(self.conv(x))
            return self.head(x.flatten(1))

    model = Repeats().double()
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    F = fl.Fisher(model, (x, torch.tensor([0, 1, 2, 1])), likelihood="categorical", kind="mc")
    assert F.plan["conv"].storage == "rows"
    model.times = 2
    with pytest.raises(InputError, match="uses layer 'conv' on the data in another way than when F was built"):
        collected(F)


def test_restricted_copied_and_pickled():
    F, model, _ = as_rows()
    truth, _ = collected(F)
    part = F.restrict("0")
    assert torch.equal(collected(part)[0]["0"], truth["0"])
    twin = copy.deepcopy(F)
    assert twin.replay is F.replay
    assert torch.equal(collected(twin)[0]["0"], truth["0"])
    other = pickle.loads(pickle.dumps(F))  # noqa: S301 - its own pickle
    assert torch.equal(collected(other, ["3"])[0]["3"], truth["3"])  # kept as factors, so no pass is needed
    with pytest.raises(InputError, match=r"layer '0' need another pass .* this F was unpickled"):
        collected(other)
    del model


def test_the_network_is_held_only_where_a_pass_may_be_needed():
    gc.disable()
    try:
        for name, kind, held in (("mlp_tanh", "exact", False), ("conv_padding", "mc", True)):
            model, data, likelihood = ZOO[name]()
            F = fl.Fisher(model, data, likelihood=likelihood, kind=kind)
            network = weakref.ref(model)
            del model
            assert (network() is not None) == held
            del F
            assert network() is None
    finally:
        gc.enable()


def test_layers_without_factors_are_refused():
    for name, zoo in (("batchnorm_2d", ZOO), ("tied_weights", ZOO), ("root_parameter", ZOO), ("lstm", ZOO)):
        model, data, likelihood = zoo[name]()
        F = fl.Fisher(model, data, likelihood=likelihood)
        wrong = next(layer for layer in F.layout.layer_names if not has_factors(F, layer))
        with pytest.raises(UnsupportedModuleError, match=r"Linear and Conv1d/2d/3d have.* F.restrict"):
            next(factor_pieces(F, [wrong]))
    model, data, likelihood = MORE_CASES["embedding on a plane"]()
    F = fl.Fisher(model, data, likelihood=likelihood)
    assert not all(has_factors(F, layer) for layer in F.layout.layer_names)


def test_the_witness_of_a_replay_is_exact_on_a_dense_network():
    """The rows of a dense layer from its factors are the gradients of the log-likelihood at sampled labels, which no other code of ours computes."""
    c = case("dense_on_positions", "mc")
    rows, _ = collected(c.fisher())
    U = torch.cat([rows[name] for name in c.fisher().layout.layer_names], dim=1)
    assert error(U.T @ U / len(c.data[0]), c.matrix) < 1e-12
    assert error(c.matrix, reference.fisher(c.model, c.data, c.likelihood, "exact")) > 1e-3


def test_matrices_and_vectors():
    c = case("conv_groups")
    layer = c.fisher().layout.layer("0")
    v = torch.randn(layer.size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = as_matrices(layer, v)
    assert w.shape == (3, 2, 3, 19)
    assert torch.equal(as_vectors(layer, w), v)
    assert torch.equal(w[1, 1, 2, :18], v[5 * 18 : 6 * 18, 1])
    assert torch.equal(w[:, 1, 0, 18], v[6 * 18 + 3])
