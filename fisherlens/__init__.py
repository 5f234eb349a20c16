"""fisherlens: what the Fisher information of a network on data looks like, and whether training agrees."""

from fisherlens._version import __version__
from fisherlens.fisher import Fisher
from fisherlens.likelihoods import Bernoulli, Categorical, Gaussian

__all__ = ["Bernoulli", "Categorical", "Fisher", "Gaussian", "__version__"]
