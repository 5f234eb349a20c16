"""Eigenvalues of the Fisher and what follows from them."""

from fisherlens.spectrum.complete import WHOLE, spectrum
from fisherlens.spectrum.density import spectral_density
from fisherlens.spectrum.functions import effective_dimension, log_determinant
from fisherlens.spectrum.kinds import compare_kinds
from fisherlens.spectrum.operators import Operator, Symmetric, as_symmetric
from fisherlens.spectrum.rules import Quadrature, quadrature_of
from fisherlens.spectrum.side import Side, side_for
from fisherlens.spectrum.summary import spectral_summary
from fisherlens.spectrum.top import top_eigenvalues
from fisherlens.spectrum.traces import estimate_diagonal, estimate_trace

__all__ = [
    "WHOLE",
    "Operator",
    "Quadrature",
    "Side",
    "Symmetric",
    "as_symmetric",
    "compare_kinds",
    "effective_dimension",
    "estimate_diagonal",
    "estimate_trace",
    "log_determinant",
    "quadrature_of",
    "side_for",
    "spectral_density",
    "spectral_summary",
    "spectrum",
    "top_eigenvalues",
]
