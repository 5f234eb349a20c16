"""Likelihoods p(y | f): what turns a network's outputs into scores and into a Fisher information.

A likelihood is bound to the outputs (and targets) of one batch. The bound object answers, in output space, what every
kind of Fisher needs: the columns of a root S of the output Fisher H = S Sᵀ, the score at sampled labels, the score at
the observed labels, and the weight of each term of the mean.
"""

from __future__ import annotations

from torch import nn

from fisherlens.errors import UNKNOWN_NAME, InputError, nearest
from fisherlens.likelihoods.base import BoundLikelihood, Likelihood
from fisherlens.likelihoods.bernoulli import Bernoulli
from fisherlens.likelihoods.categorical import Categorical
from fisherlens.likelihoods.elementwise import ElementwiseLikelihood
from fisherlens.likelihoods.gaussian import Gaussian, HeteroscedasticGaussian

__all__ = [
    "Bernoulli",
    "BoundLikelihood",
    "Categorical",
    "ElementwiseLikelihood",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "as_likelihood",
]

_BY_NAME = {cls.name: cls for cls in (Categorical, Bernoulli, Gaussian, HeteroscedasticGaussian)}
_FOR_LOSS = {
    "CrossEntropyLoss": "categorical",
    "cross_entropy": "categorical",
    "NLLLoss": "categorical",
    "nll_loss": "categorical",
    "BCEWithLogitsLoss": "bernoulli",
    "binary_cross_entropy_with_logits": "bernoulli",
    "BCELoss": "bernoulli",
    "binary_cross_entropy": "bernoulli",
    "MSELoss": "gaussian",
    "mse_loss": "gaussian",
    "GaussianNLLLoss": "heteroscedastic_gaussian",
    "gaussian_nll_loss": "heteroscedastic_gaussian",
}


def as_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """A likelihood from its name; a loss is refused with the name of the likelihood to use.

    A loss has no normalisation of its own: the GGN of ``MSELoss`` is 2/C or 2N times a Fisher, so a Fisher is never built from one.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str):
        if likelihood not in _BY_NAME:
            raise InputError(
                UNKNOWN_NAME.format(what="likelihood", name=likelihood, hint=nearest(likelihood, _BY_NAME))
            )
        return _BY_NAME[likelihood]()
    if isinstance(likelihood, type) and issubclass(likelihood, Likelihood):
        raise TypeError(
            f"likelihood must be a name or a fisherlens likelihood; got the class {likelihood.__name__}. Make one of it: {likelihood.__name__}()."
        )
    label = (
        type(likelihood).__name__
        if isinstance(likelihood, nn.Module)
        else getattr(likelihood, "__name__", type(likelihood).__name__)
    )
    named = f"use one of {sorted(_BY_NAME)}, or write your own as an ElementwiseLikelihood (docs/howto/own_likelihood.md has Poisson)"
    advice = f"use likelihood={_FOR_LOSS[label]!r}" if label in _FOR_LOSS else named
    raise TypeError(
        f"likelihood must be a name or a fisherlens likelihood; got {label}. A loss does not fix the scale of a Fisher: {advice}, "
        "and the outputs stay logits (categorical, bernoulli) or means (gaussian)."
    )
