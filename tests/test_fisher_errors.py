"""Bad input: a clear named error that says what was expected, what came and what to do, and no trace of the call."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from cases import fill
from fisher_checks import KINDS, ZOO, case
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherlens as fl
from fisherlens.errors import InputError, MemoryBudgetError, NonFiniteError, NumericalWarning

NAN, INF = float("nan"), float("inf")


def build(model=None, data=None, *, likelihood="categorical", **options):
    c = case("mlp_tanh")
    model, data = c.model if model is None else model, c.data if data is None else data
    return fl.Fisher(model, data, likelihood=likelihood, **options)


def refuse(unchanged, expected, text, model=None, data=None, **options):
    """The call raises this error, with nothing changed by it."""
    model = case("mlp_tanh").model if model is None else model
    models = [model] if isinstance(model, nn.Module) else []
    with unchanged(*models), pytest.raises(expected, match=text):
        build(model, data, **options)


def net(*layers: nn.Module, seed: int = 0) -> nn.Module:
    return fill(nn.Sequential(*layers).double(), torch.Generator().manual_seed(seed))


def prepared(model: nn.Module) -> nn.Module:
    """Gradients, frozen parameters and hooks that a call must leave alone."""
    for k, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(k))
    model.register_forward_hook(lambda module, inputs, output: None)
    return model


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_mode(kind, unchanged):
    x, y = case("mlp_tanh").data
    norm = net(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    norm.train()
    refuse(unchanged, InputError, r"'1' \(BatchNorm1d\) is in training mode.*model\.eval\(\)", norm, (x, y), kind=kind)
    norm.eval()
    build(norm, (x, y), kind=kind)
    drop = net(nn.Linear(5, 4), nn.Dropout(0.3), nn.Linear(4, 3)).train()
    refuse(unchanged, InputError, r"'1' \(Dropout\) is in training mode with p=0\.3.*model\.eval", drop, kind=kind)
    drop[1].p = 0.0  # drops nothing
    build(drop, (x, y), kind=kind)
    free = net(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).eval()
    refuse(unchanged, InputError, r"'1' \(BatchNorm1d\) has no running statistics", free, kind=kind)
    refuse(unchanged, InputError, r"'\(root\)' \(BatchNorm1d\) is in training mode", nn.BatchNorm1d(5).double())


class FunctionalDropout(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


class BatchMean(nn.Linear):
    def forward(self, x):
        x = super().forward(x)
        return x - x.mean(0)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Summed(nn.Linear):
    def forward(self, x):
        return super().forward(x).sum(0, keepdim=True)


class Falls(nn.Linear):
    def forward(self, x):
        raise ValueError("no way")


@pytest.mark.parametrize(
    ("model", "kind", "text"),
    [
        (FunctionalDropout, InputError, "same batch gave two different outputs.*model.eval"),
        (BatchMean, InputError, "depends on the other examples of its batch"),
        (
            Pair,
            InputError,
            r"must return one tensor of outputs, .* as logits; it returned tuple of length 2\. Wrap it.*self\.model\(x\)\[0\]",
        ),
        (Falls, InputError, r"The model failed on the data.*ValueError: no way\. Inputs: \(7, 5\) float64"),
        (Summed, InputError, "other examples of its batch|have shape"),
    ],
)
def test_models_without_a_fisher(model, kind, text, unchanged):
    with torch.random.fork_rng(devices=[]):
        model = prepared(fill(model(5, 3).double(), torch.Generator().manual_seed(0)))
    refuse(unchanged, kind, text, model)


def test_what_is_no_model(unchanged):
    for wrong in (nn.Linear, torch.ones(3), 3, [nn.Linear(5, 3)]):
        refuse(unchanged, TypeError, "model must be a torch.nn.Module; got", wrong)
    with pytest.raises(InputError, match=r"plain function.*params=\{"):
        build(lambda x: x)
    frozen = net(nn.Linear(5, 3)).requires_grad_(False)
    refuse(unchanged, InputError, "no parameter that requires grad", frozen)
    refuse(unchanged, InputError, "no parameter", nn.ReLU())


class Unplugged(nn.Linear):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def test_outputs_that_depend_on_no_parameter(unchanged):
    model = fill(Unplugged(5, 3).double(), torch.Generator().manual_seed(0))
    for network, options in ((model, {}), (nn.ModuleList([net(nn.Linear(5, 3)), model])[1], {"kind": "mc"})):
        text = r"do not depend on any of the selected parameters, so F is zero.*torch\.no_grad"
        with unchanged(network), pytest.warns(NumericalWarning, match=text) as caught:
            F = build(network, **options)
        assert caught[0].filename == __file__
        assert F.trace() == 0


def test_mixed_dtypes_and_inputs_of_another(unchanged):
    model = net(nn.Linear(5, 4), nn.Linear(4, 3))
    model[1].float()
    refuse(unchanged, InputError, "must share one device and one real dtype.*float32.*float64.*model.double", model)
    x, y = case("mlp_tanh").data
    text = r"The model failed on the data.*Inputs: \(7, 5\) float32; parameters: torch\.float64.*inputs\.to\(dtype\)"
    refuse(unchanged, InputError, text, None, (x.float(), y))
    refuse(unchanged, InputError, r"The model failed on the data.*Inputs: \(7, 4\) float64", None, (x[:, :4], y))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_parameters_that_are_not_finite(value, unchanged):
    for name in ("0.weight", "4.bias"):
        model, data, _ = ZOO["mlp_tanh"]()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[1] = value
        refuse(unchanged, NonFiniteError, f"Parameter '{name}' holds NaN or infinity", model, data)
    # one that was not selected spoils the outputs all the same
    refuse(unchanged, NonFiniteError, "Parameter '4.bias'", model, data, params="0.weight")


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=["rewrites its table", "scales its gradient"]
)
def test_embeddings_that_are_no_function_of_their_table(options, unchanged):
    with torch.random.fork_rng(devices=[]):
        model = net(nn.Embedding(5, 3, **options), nn.Flatten(), nn.Linear(6, 3))
    data = (torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, dtype=torch.long))
    refuse(unchanged, InputError, r"'0' \(Embedding\): (max_norm|scale_grad_by_freq)", model, data)


def test_unknown_parameters(unchanged):
    refuse(
        unchanged,
        InputError,
        r"Unknown parameter or pattern '0\.wieght'\. Did you mean '0\.weight'\?",
        params="0.wieght",
    )
    refuse(
        unchanged,
        InputError,
        r"Unknown parameter or pattern '\*\.gain'\. .*Known: '0\.weight'",
        params=["0.weight", "*.gain"],
    )
    refuse(unchanged, InputError, "params is an empty list", params=[])
    for wrong in (3, [0], ["0.weight", None]):
        refuse(unchanged, TypeError, "params must be None, a name, or a list of names", params=wrong)
    refuse(unchanged, InputError, r"params is a dict.*function f\(params, inputs\)", params={"0.weight": torch.ones(1)})


# --- the data --------------------------------------------------------------------------------------------------------


def test_data_of_the_wrong_form(unchanged):
    x, y = case("mlp_tanh").data
    for data, text in (
        ((x[:0], y[:0]), "The data set is empty"),
        ([], "The data set is empty"),
        ([(x[:0], y[:0])], "The data set is empty"),
        (((x, y) for _ in range(1)), r"one-shot generator.*list\(data\), or a DataLoader"),
        (zip([x], [y], strict=True), "one-shot zip"),
        (iter([(x, y)]), "one-shot list_iterator"),
        (iter(DataLoader(TensorDataset(x, y))), "one-shot"),
        (x, r"re-iterable of such batches; got Tensor.*\(inputs, None\)"),
        (None, "got NoneType"),
        ({"x": x}, "got dict"),
        (TensorDataset(x, y), "got TensorDataset"),
        ([(x, y, y)], "Batch 0 .* must be a pair .*; got tuple of length 3"),
        ([(x, y), x, y], "Batch 1 .* must be a pair .*; got Tensor"),
        ((x.numpy(), y.numpy()), "Batch 0 .* must be a pair .*; got ndarray"),
        ("data", "re-iterable of such batches; got str"),
        ([(x, y.tolist())], "targets of batch 0 must be a tensor or None; got list"),
        ([("x", y)], "inputs of a batch must hold tensors; got str"),
        ([(torch.tensor(1.0), y)], "inputs of batch 0 are a scalar"),
        ((x, y[:-1]), "differ in length: 7 inputs, targets of length 6"),
        ((x, y[0]), "differ in length: 7 inputs, targets of a scalar"),
        ([(x, y), (x, y[:3])], "Inputs and targets of batch 1 differ in length: 7 inputs, targets of length 3"),
    ):
        if data is not None:
            refuse(unchanged, InputError, text, None, data)
    with pytest.raises(InputError, match="got NoneType"):
        fl.Fisher(case("mlp_tanh").model, None, likelihood="categorical")


@pytest.mark.parametrize("value", [NAN, INF])
def test_data_that_are_not_finite(value, unchanged):
    x, y = (t.clone() for t in case("mlp_tanh").data)
    x[4, 2] = value
    refuse(unchanged, NonFiniteError, "The inputs of the data hold NaN or infinity, first at example 4", None, (x, y))
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    refuse(unchanged, NonFiniteError, "The inputs of batch 1 hold NaN or infinity, first at example 1", None, batches)
    c = case("two_inputs")
    (a, b), y = c.data
    b = b.clone()
    b[2] = value
    refuse(unchanged, NonFiniteError, "Input 1 of the data hold NaN", c.model, ((a, b), y))


def test_outputs_that_are_not_finite(unchanged):
    model = net(nn.Linear(5, 3))
    x, y = case("mlp_tanh").data
    huge = x.clone()
    huge[5] = 1.5e308
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    text = "output is NaN or infinite in the data.*first at its example 5"
    refuse(unchanged, NonFiniteError, text, model, (huge, y))
    batches = [(x, y), (huge, y)]
    refuse(unchanged, NonFiniteError, "output is NaN or infinite in batch 1.*first at its example 5", model, batches)


def test_outputs_of_another_shape_in_a_later_batch(unchanged):
    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x):
            return self.layer(x[..., None])[..., 0]

    with torch.random.fork_rng(devices=[]):
        model = Any().double()
    x, y = case("mlp_tanh").data
    batches = [(x, y), (x[:, :4], y)]
    refuse(
        unchanged, InputError, r"outputs of batch 1 have shape \(7, 4\); expected \(7, …\) with \(5,\)", model, batches
    )


def test_data_that_shrink_between_passes(unchanged):
    class Shrinking:
        def __init__(self):
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002, S311
            for i in range(4 if self.passes < 2 else 3):
                yield torch.ones(1, 5, dtype=torch.float64) * i, torch.tensor([1])

    refuse(unchanged, InputError, "4 examples in the first pass and 3 in a later one", None, Shrinking())


def test_errors_of_a_loader_pass_through_and_leave_no_trace(unchanged):
    class Broken:
        def __iter__(self):
            yield torch.ones(1, 5, dtype=torch.float64), torch.tensor([1])
            torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002, S311
            raise OSError("disk")

    refuse(unchanged, OSError, "disk", None, Broken())


# --- targets ---------------------------------------------------------------------------------------------------------


def test_categorical_targets(unchanged):
    x, y = case("mlp_tanh").data
    one_hot = nn.functional.one_hot(y, 3)
    for targets, text in (
        (y.double(), r"class indices of an integer dtype; .* holds torch\.float64.*argmax"),
        (y > 0, r"holds torch\.bool.*likelihood='bernoulli'"),
        (y.index_fill(0, torch.tensor(3), 3), r"Label 3 in the data.* is outside 0\.\.2.*3 outputs"),
        (y.index_fill(0, torch.tensor(3), -1), r"Label -1 in the data.* is outside 0\.\.2.*-100 marks ignored"),
        (one_hot, r"shape \(7, 3\), but .* leave \(7,\)"),
        (y[:, None], r"shape \(7, 1\), but .* leave \(7,\).*class_axis=-1"),
        (torch.full_like(y, -100), "Every term has weight 0"),
    ):
        refuse(unchanged, InputError, text, None, (x, targets))
    late = [(x, y), (x, y + 3)]
    refuse(unchanged, InputError, "in batch 1 is outside", None, late)
    refuse(unchanged, InputError, r"holds torch\.float64", None, [(x, y), (x, y.double())])
    zero = fl.Categorical(weight=[0.0, 0.0, 0.0])
    refuse(unchanged, InputError, "Every term has weight 0", likelihood=zero)
    few = fl.Categorical(weight=[1.0, 1.0])
    refuse(unchanged, InputError, "2 class weights for 3 classes", likelihood=few)


def test_targets_that_are_needed(unchanged):
    x, _ = case("mlp_tanh").data
    refuse(unchanged, InputError, "targets are None, but the empirical kind", None, (x, None), kind="empirical")
    for likelihood in (fl.Categorical(weight=[1.0, 2.0, 3.0]), fl.Categorical(ignore_index=1)):
        text = "targets are None, but class weights and ignored labels follow the observed label"
        refuse(unchanged, InputError, text, None, (x, None), likelihood=likelihood)
    model, (x, _), _ = ZOO["bernoulli_two_outputs"]()
    refuse(unchanged, InputError, "targets are None", model, (x, None), likelihood=fl.Bernoulli(2.0))


def test_class_axes(unchanged):
    for axis in (0, -2, 2, 5):
        refuse(unchanged, InputError, f"classes on axis {axis}", likelihood=fl.Categorical(class_axis=axis))
    flat = net(nn.Linear(5, 1), nn.Flatten(0))
    refuse(unchanged, InputError, r"outputs of shape \(\d+,\).*Bernoulli for one logit", flat)


def test_bernoulli_and_gaussian_targets(unchanged):
    model, (x, y), _ = ZOO["bernoulli_two_outputs"]()
    for likelihood, targets, kind, text in (
        ("bernoulli", 2 * y, InputError, r"must lie in \[0, 1\]"),
        ("bernoulli", -y, InputError, r"must lie in \[0, 1\]"),
        ("bernoulli", y * NAN, NonFiniteError, "Bernoulli targets hold NaN"),
        ("bernoulli", y[:, :1], InputError, r"shape of the outputs, \(\d, 2\); .*Broadcasting is refused"),
        ("bernoulli", y[:, 0], InputError, "Broadcasting is refused"),
        ("gaussian", y * NAN, NonFiniteError, "Gaussian targets hold NaN"),
        ("gaussian", y + INF, NonFiniteError, "Gaussian targets hold NaN or infinity"),
        ("gaussian", y[:, :1], InputError, "Broadcasting is refused"),
        ("gaussian", y + 1j, InputError, r"must be real numbers; got torch\.complex128"),
    ):
        refuse(unchanged, kind, text, model, (x, targets), likelihood=likelihood)


# --- settings --------------------------------------------------------------------------------------------------------


def test_losses_are_not_likelihoods(unchanged):
    for wrong, advice in (
        (nn.CrossEntropyLoss(), "use likelihood='categorical'"),
        (nn.MSELoss(), "use likelihood='gaussian'"),
        (nn.BCEWithLogitsLoss(), "use likelihood='bernoulli'"),
        (nn.NLLLoss(), "use likelihood='categorical'"),
        (nn.functional.cross_entropy, "got cross_entropy.*use likelihood='categorical'"),
        (nn.functional.mse_loss, "use likelihood='gaussian'"),
        (nn.HuberLoss(), "use one of"),
        (lambda f, y: f, "use one of"),
        (None, "got NoneType"),
        (3, "got int"),
    ):
        refuse(
            unchanged, TypeError, rf"likelihood must be a name or a fisherlens likelihood.*{advice}", likelihood=wrong
        )
    refuse(
        unchanged, InputError, "Unknown likelihood 'categorial'. Did you mean 'categorical'?", likelihood="categorial"
    )


def test_settings_of_likelihoods():
    for make, text in (
        (lambda: fl.Categorical(weight=[1.0, -1.0]), "Class weights must be finite numbers >= 0"),
        (lambda: fl.Categorical(weight=[1.0, NAN]), "Class weights must be finite"),
        (lambda: fl.Categorical(weight=[[1.0]]), "Class weights must be finite"),
        (lambda: fl.Bernoulli(-1.0), "pos_weight must be finite and >= 0"),
        (lambda: fl.Bernoulli(INF), "pos_weight must be finite"),
        (lambda: fl.Gaussian(0.0), "variance must be finite and > 0"),
        (lambda: fl.Gaussian([1.0, -1.0]), "variance must be finite and > 0"),
        (lambda: fl.Gaussian(NAN), "variance must be finite"),
    ):
        with pytest.raises(InputError, match=text):
            make()


@pytest.mark.parametrize("shape", [(4,), (8, 2), (8, 1), (1, 2), (3, 2), (1, 1, 1)])
def test_settings_that_do_not_fit_the_outputs(shape, unchanged):
    """Eight examples of two outputs: a vector of examples must not be taken for one of outputs."""
    model, data, _ = ZOO["bernoulli_two_outputs"]()
    values = torch.ones(shape)
    text = rf"pos_weight must be .* one example's outputs of shape \(2,\); got shape \({shape[0]},"
    refuse(unchanged, InputError, text, model, data, likelihood=fl.Bernoulli(values))
    if shape[0] != 8:
        text = rf"variance must be a scalar.*\(2,\).*got shape \({shape[0]},|shape \({shape[0]}, 2\) gives {shape[0]} examples"
        refuse(unchanged, InputError, text, model, data, likelihood=fl.Gaussian(values))


def test_settings_that_would_broadcast_along_the_examples(unchanged):
    flat = net(nn.Linear(3, 1), nn.Flatten(0))
    x, y = ZOO["bernoulli_two_outputs"]()[1]
    refuse(unchanged, InputError, r"outputs of shape \(\)", flat, (x, y[:, 0]), likelihood=fl.Bernoulli(torch.ones(8)))


def test_other_settings(unchanged):
    for options, text in (
        ({"kind": "exakt"}, "Unknown kind 'exakt'. Did you mean 'exact'?"),
        ({"kind": None}, "Unknown kind None"),
        ({"kind": "mc", "mc_samples": 0}, "mc_samples must be an integer >= 1.*got 0"),
        ({"kind": "mc", "mc_samples": 1.5}, "mc_samples must be an integer"),
        ({"kind": "mc", "mc_samples": True}, "mc_samples must be an integer"),
        ({"seed": -1}, "seed must be an integer >= 0; got -1"),
        ({"seed": "a"}, "seed must be an integer"),
        ({"memory": "much"}, "memory must be a positive number of bytes or a text such as '2GiB'.*'much'"),
        ({"memory": 0}, "memory must be a positive number"),
        ({"memory": NAN}, "memory must be a positive number"),
        ({"memory": "2 parsecs"}, "memory must be"),
        ({"memory": None}, "memory must be"),
    ):
        refuse(unchanged, InputError, text, **options)
    refuse(unchanged, MemoryBudgetError, "a single example", memory="10 B")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2**31),
        ("1.5 MiB", 1572864),
        ("500MB", 5e8),
        ("3 kB", 3000),
        ("800", 800),
        (1e6, 10**6),
        ("1TiB", 2**40),
    ],
)
def test_memory_in_words(text, size):
    assert build(memory=text).memory == size


def test_unknown_layers():
    F = build()
    for act in (F.restrict, lambda name: F.restrict(["0", name]), F.layout.layer):
        with pytest.raises(InputError, match=r"Unknown layer '3'\. Known: '0', '2', '4'"):
            act("3")
    with pytest.raises(InputError, match=r"Unknown layer or parameter '0\.wieght'. Did you mean '0\.weight'"):
        F.block("0.wieght")
    with pytest.raises(InputError, match="at least one layer name"):
        F.restrict([])
    with pytest.raises(InputError, match=r"No layer or parameter was named; print\(F\.layout\) lists them"):
        F.block([])
    for act in (F.restrict, F.block):
        for wrong in (3, None, ["0", 2]):
            with pytest.raises(
                TypeError, match="Expected names of layers or parameters, a text or a list of texts; got"
            ):
                act(wrong)


def test_analyses_take_operators():
    model = case("mlp_tanh").model
    for act in (fl.spectrum, fl.coupling, fl.independence, fl.information, lambda m: fl.BlockDiagonal(m, "layer")):
        with pytest.raises(
            TypeError, match=r"(takes|Expected) a fisherlens\.Fisher.* got Sequential.*F = fl\.Fisher\("
        ):
            act(model)


def test_buffers_that_a_forward_pass_writes_are_put_back(unchanged):
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(5, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    with torch.random.fork_rng(devices=[]):
        spectral = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3).double()))
        counting = Counting().double()
    for model in (counting, spectral.train()):
        with unchanged(model):
            F = build(model)
            assert F.trace() > 0
        with unchanged(model):
            F = build(model, memory=F.plan.nbytes // 5)
            assert torch.isfinite(F @ torch.ones(F.n_params, 3, dtype=F.dtype)).all()


def test_prepared_models_stay_prepared(unchanged):
    model = prepared(ZOO["lenet"]()[0])
    model[0].requires_grad_(False)
    with unchanged(model), torch.no_grad():
        build(model, case("lenet").data)
    with unchanged(model), torch.inference_mode():
        F = build(model, case("lenet").data, kind="mc")
        F @ torch.ones(F.n_params, dtype=F.dtype)
