"""Eigenvalues of the Fisher and what follows from them."""

from fisherlens.spectrum.complete import WHOLE, spectrum
from fisherlens.spectrum.functions import effective_dimension, log_determinant
from fisherlens.spectrum.kinds import compare_kinds
from fisherlens.spectrum.operators import Operator, Symmetric, as_symmetric

__all__ = [
    "WHOLE",
    "Operator",
    "Symmetric",
    "as_symmetric",
    "compare_kinds",
    "effective_dimension",
    "log_determinant",
    "spectrum",
]
