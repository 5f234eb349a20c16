"""Models in the forms in which they come: wrapped, compiled, unfinished, of other dtypes, saturated; right, or a named error."""

from __future__ import annotations

import subprocess
import sys
import warnings

import mpmath
import pytest
import torch
from cases import fill
from fisher_checks import KINDS, case, error
from test_traps import DTYPE, agrees, filled, labels, mlp, noise, twelve
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, NonFiniteError, UnsupportedModuleError

# --- wrappers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["2GiB", 700])
@pytest.mark.parametrize("kind", [*KINDS, "hessian"])
def test_data_parallel(kind, memory, unchanged):
    """The module inside, under the names of the wrapper."""
    options = {"likelihood": "categorical", "kind": kind, "memory": memory}
    plain, wrapped = fl.Fisher(mlp(), twelve(), **options), nn.DataParallel(nn.DataParallel(mlp()))
    with unchanged(wrapped):
        F = fl.Fisher(wrapped, twelve(), **options)
        V = noise(F.n_params, 3)
        assert error(F @ V, plain @ V) < 1e-12
        assert error(F @ V[:, :1], plain @ V[:, :1]) < 1e-12
        assert error(F.dense(), plain.dense()) < 1e-12
    assert (
        list(F.layout)
        == [name for name, _ in wrapped.named_parameters()]
        == [f"module.module.{n}" for n in plain.layout]
    )
    assert [entry.storage for entry in F.plan] == [entry.storage for entry in plain.plan]


COMPILED = """
import torch
from test_traps import mlp, noise, twelve, error
import fisherlens as fl
from fisherlens import reference

truth = reference.fisher(mlp(), twelve(), "categorical")
whole, part, inside = torch.compile(mlp(), backend="eager"), mlp(), mlp()
part[0] = torch.compile(part[0], backend="eager")
inside.compile(backend="eager")
count = torch._dynamo.utils.counters["frames"]
for model in (whole, part, inside):
    for ran in (False, True):
        if ran:
            model(twelve()[0])
        before = dict(count)
        for memory in ("2GiB", 700):
            F = fl.Fisher(model, twelve(), likelihood="categorical", memory=memory)
            assert error(F @ noise(35, 2), truth @ noise(35, 2)) < 1e-10
            assert error(F.dense(), truth) < 1e-10
        assert dict(count) == before, "something was compiled"
        assert {entry.storage for entry in F.plan} == {"factors"}
        assert list(F.layout) == [name for name, _ in model.named_parameters()]
print("done")
"""


@pytest.mark.slow
def test_compiled_models():
    """Run as they were written: compiled kernels know nothing of hooks, and nothing is compiled anew. In a process of its own."""
    path = [str(p) for p in sys.path]
    code = f"import sys; sys.path[:0] = {path!r}\n{COMPILED}"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)  # noqa: S603
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.endswith("done\n")


def test_wrapper_of_compiled_models():
    """What torch.compile returns, without the seconds that its import takes: the name tells it, the module inside is run."""

    class OptimizedModule(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self._orig_mod = model

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the compiled form was run")

    F = fl.Fisher(OptimizedModule(mlp()), twelve(), likelihood="categorical")
    assert list(F.layout) == [f"_orig_mod.{name}" for name, _ in mlp().named_parameters()]
    agrees(F, truth())


@pytest.mark.parametrize("inner", [False, True])
def test_torchscript_is_refused(inner, unchanged):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = [torch.jit.script(mlp()), torch.jit.trace(mlp(), twelve()[0])]
    for script in scripted:
        model = nn.Sequential(script) if inner else script
        name = "'0'" if inner else r"'\(root\)'"
        expected = rf"Module {name} \(\w+\) is compiled TorchScript.*Pass the module from which it was"
        with unchanged(model), pytest.raises(UnsupportedModuleError, match=expected):
            fl.Fisher(model, twelve(), likelihood="categorical")


def test_hooks_of_the_user_take_part_and_leave_nothing(unchanged):
    """A hook is part of the function; what it writes into its module is undone."""

    def remember(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        module.last, module.calls = output, module.calls + 1
        return output * output

    model = mlp()
    model[0].calls = 0
    model[0].register_forward_hook(remember)
    with unchanged(model):
        F = fl.Fisher(model, twelve(), likelihood="categorical")
        streamed = fl.Fisher(model, twelve(), likelihood="categorical", memory=700)
        V = noise(35, 3)
        streamed @ V
    assert model[0].calls == 0
    assert not hasattr(model[0], "last")
    truth = reference.fisher(model, twelve(), "categorical")
    assert error(F.dense(), truth) < 1e-10
    assert error(streamed @ V, truth @ V) < 1e-10


def test_a_model_that_counts_its_calls_is_analysed_as_it_stands():
    class Warm(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    with torch.random.fork_rng(devices=[]):
        model, first_call = filled(Warm(4, 3)), filled(nn.Linear(4, 3))
    F = fl.Fisher(model, twelve(), likelihood="categorical", memory=500)
    first = F @ noise(15, 2)
    assert torch.equal(F @ noise(15, 2), first)
    assert model.calls == 0
    assert error(F.dense(), reference.fisher(first_call, twelve(), "categorical")) < 1e-10


# --- unfinished models -----------------------------------------------------------------------------------------------


def test_lazy_modules(unchanged):
    x, y = twelve()
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, 3)).double()
    for act in (
        lambda: fl.Fisher(model, (x, y), likelihood="categorical"),
        lambda: fl.Fisher(model, (x, y), likelihood="categorical", params="2"),
        lambda: fl.Fisher(model, (x, y), likelihood="categorical", kind="hessian"),
        lambda: fl.partition(model, "unit"),
    ):
        with pytest.raises(
            InputError, match=r"Parameter '0\.weight' belongs to a lazy module.*Run one forward pass first"
        ):
            act()
    statistics = nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d(affine=False)).double().eval()
    with pytest.raises(InputError, match=r"Buffer '1\.running_mean' is on the meta device, or of a lazy module"):
        fl.Fisher(statistics, (x, y), likelihood="categorical")
    model(x)
    agrees(fl.Fisher(model, (x, y), likelihood="categorical"), reference.fisher(model, (x, y), "categorical"))


def test_parameters_without_values_or_in_two_places():
    whole, part = mlp().to("meta"), mlp()
    part[2].to("meta")
    for model, params, expected in (
        (whole, None, r"Parameter '0\.weight' is on the meta device.*Load the model's state"),
        (part, "0", r"Parameter '2\.weight' is on the meta device"),
        (part, None, r"share one device and one real dtype; got float64 on cpu, float64 on meta.*model\.to\(device\)"),
    ):
        with pytest.raises(InputError, match=expected):
            fl.Fisher(model, twelve(), likelihood="categorical", params=params)
    with pytest.raises(InputError, match="Parameter 'w' is on the meta device"):
        fl.Fisher(
            lambda p, x: x @ p["w"], twelve(), likelihood="categorical", params={"w": torch.ones(4, 3, device="meta")}
        )


def test_parameters_of_other_dtypes(unchanged):
    def with_extra(extra: Tensor, grad: bool) -> nn.Module:
        model = mlp()
        model.extra = nn.Parameter(extra, requires_grad=grad)
        return model

    for extra, kind in (
        (torch.ones(2, dtype=torch.complex128), "complex"),
        (torch.arange(2), "int64"),
        (torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ):
        model = with_extra(extra, False)
        with unchanged(model):
            assert error(fl.Fisher(model, twelve(), likelihood="categorical").dense(), truth()) < 1e-10
        with pytest.raises(
            InputError, match=rf"one real dtype \(float64, .*'extra' is {kind}\. Write a complex parameter"
        ):
            fl.Fisher(model, twelve(), likelihood="categorical", params=["extra"])
    with pytest.raises(InputError, match=r"'extra' is complex"):
        fl.Fisher(with_extra(torch.ones(2, dtype=torch.complex128), True), twelve(), likelihood="categorical")
    with pytest.raises(InputError, match=r"Parameter 'extra' has no entries \(shape \(0, 2\)\)"):
        fl.Fisher(with_extra(torch.ones(0, 2, dtype=DTYPE), True), twelve(), likelihood="categorical")


def truth() -> Tensor:
    return reference.fisher(mlp(), twelve(), "categorical")


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda f: f.argmax(1), r"outputs have dtype torch\.int64; .*not labels \(argmax\)"),
        (lambda f: torch.fft.fft(f), r"outputs have dtype torch\.complex128.*view_as_real"),
        (lambda f: f > 0, r"outputs have dtype torch\.bool"),
        (lambda f: f.sum(), "returned one number for 8 examples.*not the loss"),
        (lambda f: f.to_sparse(), r"outputs are sparse or nested.*to_dense\(\)"),
        (lambda f: f[:3], r"outputs for 8 examples have shape \(3, 3\); expected \(8, …\)"),
        (lambda f: f[:, :0], r"outputs for 8 examples have shape \(8, 0\); expected \(8, …\), with at least one"),
    ],
    ids=["labels", "complex", "bool", "loss", "sparse", "few", "none"],
)
def test_outputs_without_a_likelihood(forward, expected, unchanged):
    class Last(nn.Module):
        def forward(self, x):
            return forward(x)

    model = nn.Sequential(mlp(), Last())
    for kind in ("exact", "hessian"):
        with unchanged(model), pytest.raises(InputError, match=expected):
            fl.Fisher(model, twelve(), likelihood="categorical", kind=kind)


# --- answers that are not finite -------------------------------------------------------------------------------------


def overflowing(kind: str = "empirical", **options) -> fl.Fisher:
    """Scores near 1e25: finite in float32, their squares are not."""
    with torch.random.fork_rng(devices=[]):
        model = fill(nn.Linear(4, 3), torch.Generator().manual_seed(0))
    x, y = twelve()
    return fl.Fisher(model, ((1e25 * x).float(), y), likelihood="categorical", kind=kind, **options)


@pytest.mark.parametrize("memory", ["2GiB", 250])
def test_squares_that_overflow_are_an_error(memory):
    F = overflowing(memory=memory)
    assert torch.isfinite(F.gradient()).all()
    v = torch.arange(15.0)
    for act, name in (
        (F.diagonal, r"F\.diagonal\(\)"),
        (F.trace, r"F\.trace\(\)"),
        (F.frobenius_norm, r"F\.frobenius_norm\(\)"),
        (F.gram, r"F\.gram\(\)"),
        (F.dense, r"F\.dense\(\)"),
        (lambda: F.block("weight"), "The block 'weight' of F"),
        (lambda: F @ v, "The product"),
        (lambda: F @ torch.stack([v] * 4, 1), "The product"),
        (lambda: F @ F.layout.unflatten(v), "The product"),
        (lambda: F.damped(1.0) @ v, "The product"),
        (lambda: F.restrict(F.layout.layer_names[0]).trace(), r"F\.trace\(\)"),
        (lambda: F.solve(v, 1.0), "NaN or infin"),
        (lambda: F.natural_gradient(1.0), "NaN or infin"),
    ):
        with pytest.raises(NonFiniteError, match=name):
            act()
    with pytest.raises(NonFiniteError, match=r"exceed what float32 holds \(3e\+38\)\. Use model\.double\(\)"):
        F.trace()
    with torch.random.fork_rng(devices=[]):
        model = fill(nn.Linear(4, 3).double(), torch.Generator().manual_seed(0))
    x, y = twelve()
    wide = fl.Fisher(model, (1e25 * x, y), likelihood="categorical", kind="empirical", memory=memory)
    assert wide.trace() > 1e49


def test_products_and_hessians_that_overflow():
    F = fl.Fisher(mlp().float(), (twelve()[0].float(), twelve()[1]), likelihood="categorical")
    assert torch.isfinite(F @ torch.full((35,), 1e30)).all()
    with pytest.raises(NonFiniteError, match="The product or solve with this vector is NaN or infinite"):
        F.solve(torch.full((35,), 1e38), 1e-3)
    x = 1e20 * twelve()[0].float()
    with torch.random.fork_rng(devices=[]):
        model = fill(nn.Linear(4, 3), torch.Generator().manual_seed(0))
    H = fl.Fisher(model, (x, model(x).detach()), likelihood="gaussian", kind="hessian")
    assert not H.gradient().any()
    for act in (H.dense, H.diagonal, H.trace, H.frobenius_norm, lambda: H.block("weight"), lambda: H @ torch.ones(15)):
        with pytest.raises(NonFiniteError):
            act()


# --- the Hessian's arguments, tables without gradient, saturation ----------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "hessian"])
def test_arguments_are_checked_for_every_kind(kind):
    for options, expected in (
        ({"mc_samples": 0}, "mc_samples must be an integer >= 1.*got 0"),
        ({"mc_samples": 2.0}, "mc_samples must be an integer"),
        ({"seed": -1}, "seed must be an integer >= 0; got -1"),
        ({"seed": 2**63}, r"seed must be an integer >= 0; got 9223372036854775808\. .*below 2\*\*63"),
        ({"seed": None}, "seed must be an integer"),
        ({"mc_sampling": "stratifed"}, "Unknown mc_sampling 'stratifed'. Did you mean 'stratified'"),
        ({"rows": "terms"}, "Unknown rows 'terms'. Did you mean 'term'"),
        ({"memory": "much"}, "memory must be a positive number"),
    ):
        with pytest.raises(InputError, match=expected):
            fl.Fisher(mlp(), twelve(), likelihood="categorical", kind=kind, **options)
    numpy = pytest.importorskip("numpy")
    F = fl.Fisher(mlp(), twelve(), likelihood="categorical", kind=kind, seed=numpy.int64(3), mc_samples=numpy.int32(2))
    assert (F.seed, F.mc_samples) == (3, 2)
    assert type(F.seed) is type(F.mc_samples) is int


def exact_softmax(logits: Tensor) -> Tensor:
    """diag(p) - p pᵀ with 60 digits, each entry rounded once."""
    with mpmath.workdps(60):
        blocks = []
        for row in logits.tolist():
            top = max(row)
            e = [mpmath.exp(mpmath.mpf(f) - mpmath.mpf(top)) for f in row]
            p = [value / mpmath.fsum(e) for value in e]
            blocks.append([[float(p[i] * ((i == j) - p[j])) for j in range(len(p))] for i in range(len(p))])
    return torch.tensor(blocks, dtype=DTYPE)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("memory", ["2GiB", 700])
def test_saturated_and_flat_logits(scale, memory):
    """Against a Fisher with 60 digits: 1 - p is not lost where p rounds to one."""
    model, (x, y) = mlp(), twelve()
    with torch.no_grad():
        model[2].weight.mul_(scale)
        model[2].bias.mul_(scale)
        f = model(x)
    J = reference.jacobian(model, x)
    T = torch.einsum("ncp,ncd,ndq->pq", J, exact_softmax(f), J) / 12
    F = fl.Fisher(model, (x, y), likelihood="categorical", memory=memory)
    V = noise(35, 3)
    for found, expected in ((F @ V, T @ V), (F @ V[:, :1], T @ V[:, :1]), (F.dense(), T), (F.diagonal(), T.diagonal())):
        assert error(found, expected) < 1e-9
    if scale == 300.0:
        assert T.norm() < 1e-10 * fl.Fisher(mlp(), (x, y), likelihood="categorical").frobenius_norm()


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_few_examples_few_parameters_few_classes(kind):
    for n, inputs, outputs, present in ((1, 4, 3, 1), (12, 1, 2, 2), (3, 4, 5, 2), (12, 4, 3, 1)):
        x, y = noise(n, inputs), labels(n, present)
        model = mlp(inputs, outputs)
        agrees(
            fl.Fisher(model, (x, y), likelihood="categorical", kind=kind),
            reference.fisher(model, (x, y), "categorical", kind),
        )


def test_random_modules_are_named_in_any_depth():
    c = case("mlp_tanh")

    class Jitter(nn.Module):
        def forward(self, x):
            return x * (1 + 0.1 * torch.rand(1))

    model = nn.Sequential(c.model, nn.ModuleDict({"deep": nn.Sequential(nn.Identity(), Jitter())})["deep"])
    with pytest.raises(InputError, match=r"Module '1\.1' \(Jitter\) draws random numbers"):
        fl.Fisher(model, c.data, likelihood="categorical")

    class Root(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.rand(1)

    with torch.random.fork_rng(devices=[]), pytest.raises(InputError, match=r"Module '\(root\)' \(Root\) draws random"):
        fl.Fisher(Root(5, 3).double(), c.data, likelihood="categorical")


# --- a parameter without axes ----------------------------------------------------------------------------------------


class Tempered(nn.Module):
    """Logits divided by a learnt temperature, a scalar."""

    def __init__(self):
        super().__init__()
        self.temperature, self.inner = nn.Parameter(torch.tensor(0.8)), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / self.temperature.exp()


def test_a_scalar_parameter_in_dicts_and_in_claims():
    x, y = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=DTYPE), torch.arange(12) % 3
    model = Tempered().to(DTYPE)
    F = fl.Fisher(model, (x, y), likelihood="categorical")
    v = noise(F.n_params)
    named = F.layout.unflatten(v)
    assert named["temperature"].shape == ()
    assert torch.equal(F.layout.flatten(F @ named), F @ v)
    assert torch.equal(F.layout.flatten(fl.Diagonal(F).solve(named, 0.1)), fl.Diagonal(F).solve(v, 0.1))
    problem = fl.Problem("tempered", "A learnt temperature.", Tempered, (x.float(), y), (x.float(), y))
    assert fl.verify(problem, "metric/top", seeds=1).holds.all()
