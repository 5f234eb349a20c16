r"""Synthetic problems whose Fisher is known in closed form: one linear layer f = W x + b under three likelihoods.

With x̃ = (x, 1) and the Fisher H of the output distribution at f, the Fisher of (W, b) on inputs x_1, …, x_N is

.. math:: F = \frac{1}{N} \sum_n H_n \otimes \tilde x_n \tilde x_n^\top,

with H = I/σ² for Gaussian outputs of variance σ² (so that F = I ⊗ X̃ᵀX̃/(Nσ²), whatever the parameters, and the loss is quadratic
with F as its Hessian), H = p(1 − p) for one Bernoulli logit, F = X̃ᵀ diag(p(1 − p)) X̃/N, and H = diag(p) − ppᵀ for a softmax. The
labels are drawn from the model at parameters of its own, so the model is well specified; data and weights are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fisherlens.errors import InputError
from fisherlens.likelihoods import Gaussian, Likelihood
from fisherlens.linalg.precision import own_precision
from fisherlens.training.base import Problem, check_count

INPUTS = 6
VARIANCE = 0.25
_NUM_TRAIN, _NUM_TEST = 200, 100

_UNKNOWN = "The Fisher of problem {name!r} is not known in closed form. It is for {known}, and for a fl.Problem that is given known_fisher=."


@own_precision
def known_fisher(problem: Problem, model: nn.Module) -> Tensor:
    """The Fisher of a problem with ``kind="exact"`` on its training data, in closed form.

    Parameters
    ----------
    problem
        ``"linear-gaussian"``, ``"logistic"``, ``"softmax-regression"``, or one of your own with ``known_fisher``.
    model
        A network of the problem, at any parameters.

    Returns
    -------
    ``(P, P)`` in nat, in the order of ``named_parameters()``; float64 on the CPU for the problems of this module.

    Raises
    ------
    InputError: no closed form is known. TypeError: another network than the problem's.

    Examples
    --------
    >>> import fisherlens as fl
    >>> line = fl.problem("linear-gaussian")
    >>> model = line.model(0)
    >>> F = fl.Fisher(model, line.train, likelihood=line.likelihood)
    >>> torch.allclose(F.dense(), known_fisher(line, model), rtol=1e-12)
    True
    """
    if problem.known_fisher is None:
        names = ", ".join(repr(name) for name in SYNTHETIC)
        raise InputError(_UNKNOWN.format(name=problem.name, known=names))
    return problem.known_fisher(model)


def linear_fisher(model: nn.Module, inputs: Tensor, outputs: int, output_fisher: Callable[[Tensor], Tensor]) -> Tensor:
    """1/N Σ_n H_n ⊗ x̃_n x̃_nᵀ in the order of a linear layer's parameters, weights by rows and then biases.

    Parameters
    ----------
    model
        A linear layer with bias, d inputs and C outputs.
    inputs
        ``(N, d)``.
    outputs
        C.
    output_fisher
        Outputs ``(N, C)`` → H ``(N, C, C)``.
    """
    sizes = (inputs.shape[1], outputs)
    if not isinstance(model, nn.Linear) or model.bias is None or (model.in_features, model.out_features) != sizes:
        raise TypeError(
            f"The closed form is that of a linear layer with bias, {sizes[0]} inputs and {outputs} outputs; got {model}. "
            "Use problem.model(seed)."
        )
    weight, bias = model.weight.detach().double().cpu(), model.bias.detach().double().cpu()
    H = output_fisher(inputs @ weight.T + bias)
    extended = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    width = extended.shape[1]
    F = torch.einsum("ncd,ni,nj->cidj", H, extended, extended).reshape(outputs * width, outputs * width) / len(inputs)
    # row c: the weights of output c, then its bias
    place = torch.arange(outputs * width, device="cpu").reshape(outputs, width)
    order = torch.cat([place[:, :-1].flatten(), place[:, -1]])
    return F[order][:, order]


def gaussian_fisher(outputs: Tensor) -> Tensor:
    """H = I/σ²."""
    return (torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device) / VARIANCE).expand(
        len(outputs), -1, -1
    )


def bernoulli_fisher(outputs: Tensor) -> Tensor:
    """H = p(1 − p), written so that it holds for large logits too."""
    return (torch.sigmoid(outputs) * torch.sigmoid(-outputs))[:, :, None]


def softmax_fisher(outputs: Tensor) -> Tensor:
    """H = diag(p) − p pᵀ."""
    p = outputs.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def _draw_numbers(outputs: Tensor, generator: torch.Generator) -> Tensor:
    return outputs + VARIANCE**0.5 * torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device="cpu")


def _draw_bits(outputs: Tensor, generator: torch.Generator) -> Tensor:
    uniforms = torch.rand(outputs.shape, generator=generator, dtype=outputs.dtype, device="cpu")
    return (uniforms < torch.sigmoid(outputs)).to(outputs.dtype)


def _draw_classes(outputs: Tensor, generator: torch.Generator) -> Tensor:
    uniforms = torch.rand(len(outputs), 1, generator=generator, dtype=outputs.dtype, device="cpu")
    return (uniforms > outputs.softmax(1).cumsum(1)[:, :-1]).sum(1)


@dataclass(frozen=True)
class Synthetic:
    """One of the synthetic problems: what it is called, its likelihood with the way to draw labels, and the Fisher of its outputs."""

    name: str
    title: str
    outputs: int
    likelihood: str | Likelihood
    draw: Callable[[Tensor, torch.Generator], Tensor]
    output_fisher: Callable[[Tensor], Tensor]
    targets: Mapping[str, float]

    def describe(self, num_train: int = _NUM_TRAIN, num_test: int = _NUM_TEST) -> str:
        """One sentence, with the sizes of the halves."""
        return (
            f"{self.title} (synthetic, {num_train:,} to train on and {num_test:,} to test): {INPUTS} inputs, {self.outputs} "
            f"output{'s' if self.outputs > 1 else ''}, {self.outputs * (INPUTS + 1)} parameters, Fisher known in closed form."
        )

    def build(self, num_train: int | None, num_test: int | None) -> Problem:
        """The problem with its data drawn, always the same for the same sizes."""
        targets = self.targets if num_train is None and num_test is None else {}
        num_train = _NUM_TRAIN if num_train is None else check_count(num_train, "num_train")
        num_test = _NUM_TEST if num_test is None else check_count(num_test, "num_test")
        truth = torch.Generator().manual_seed(7)
        # Variances from 1 down to 1/100, along axes that a reflection turns against the coordinates.
        normal = nn.functional.normalize(torch.randn(INPUTS, generator=truth, dtype=torch.float64, device="cpu"), dim=0)
        scales = torch.logspace(0, -1, INPUTS, dtype=torch.float64, device="cpu")
        axes = scales[:, None] * (
            torch.eye(INPUTS, dtype=torch.float64, device="cpu") - 2 * torch.outer(normal, normal)
        )
        weight = 1.5 * torch.randn(INPUTS, self.outputs, generator=truth, dtype=torch.float64, device="cpu")
        pairs = []
        for count, seed in ((num_train, 8), (num_test, 9)):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(count, INPUTS, generator=generator, dtype=torch.float64, device="cpu") @ axes
            pairs.append((x, self.draw(x @ weight, generator)))
        return Problem(
            self.name,
            self.describe(num_train, num_test),
            partial(nn.Linear, INPUTS, self.outputs, dtype=torch.float64),
            *pairs,
            likelihood=self.likelihood,
            batch_size=min(50, num_train),
            targets=targets,
            known_fisher=partial(
                linear_fisher, inputs=pairs[0][0], outputs=self.outputs, output_fisher=self.output_fisher
            ),
        )


# Targets are the smallest training loss that there is, plus 0.01 nat.
SYNTHETIC: dict[str, Synthetic] = {
    problem.name: problem
    for problem in (
        Synthetic(
            "linear-gaussian",
            f"Linear regression with Gaussian noise of variance {VARIANCE}",
            2,
            Gaussian(variance=VARIANCE),
            _draw_numbers,
            gaussian_fisher,
            {"train_loss": 1.435},
        ),
        Synthetic(
            "logistic", "Logistic regression", 1, "bernoulli", _draw_bits, bernoulli_fisher, {"train_loss": 0.585}
        ),
        Synthetic(
            "softmax-regression",
            "Softmax regression",
            3,
            "categorical",
            _draw_classes,
            softmax_fisher,
            {"train_loss": 0.496},
        ),
    )
}
