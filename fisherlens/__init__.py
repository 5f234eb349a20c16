"""fisherlens: what the Fisher information of a network on data looks like, and whether training agrees."""

from __future__ import annotations

import importlib
from typing import Any

from fisherlens import errors, optim
from fisherlens._version import __version__
from fisherlens.approximations import EKFAC, KFAC, BlockDiagonal, Diagonal, LowRank, ProjectedKFAC, QuasiDiagonal
from fisherlens.coupling import coupling, dependence, spatial_coupling
from fisherlens.directions import directions
from fisherlens.ellipse import ellipse
from fisherlens.errors import (
    ConvergenceWarning,
    FileFormatError,
    FisherLensError,
    InputError,
    MemoryBudgetError,
    NonFiniteError,
    NumericalWarning,
    UnsupportedModuleError,
)
from fisherlens.fisher import Fisher
from fisherlens.independence import compare_approximations, independence
from fisherlens.information import information, information_table
from fisherlens.likelihoods import (
    Bernoulli,
    BoundLikelihood,
    Categorical,
    ElementwiseLikelihood,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
)
from fisherlens.partitions import Partition, partition
from fisherlens.report import report
from fisherlens.results import load, save
from fisherlens.spectrum import (
    Operator,
    compare_kinds,
    effective_dimension,
    estimate_diagonal,
    estimate_trace,
    log_determinant,
    spectral_density,
    spectral_summary,
    spectrum,
    top_eigenvalues,
)
from fisherlens.training import (
    LogUniform,
    Monitor,
    Problem,
    Tuning,
    adapters,
    compare_optimizers,
    problem,
    problems,
    train,
    verify,
)

__all__ = [  # noqa: RUF022 - grouped by topic
    # the operator
    "Fisher",
    "Categorical",
    "Bernoulli",
    "Gaussian",
    "HeteroscedasticGaussian",
    # a likelihood of one's own
    "ElementwiseLikelihood",
    "Likelihood",
    "BoundLikelihood",
    # spectra
    "spectrum",
    "top_eigenvalues",
    "spectral_density",
    "Operator",
    "spectral_summary",
    "effective_dimension",
    "log_determinant",
    "estimate_trace",
    "estimate_diagonal",
    "compare_kinds",
    # blocks and their independence
    "partition",
    "Partition",
    "coupling",
    "dependence",
    "spatial_coupling",
    "independence",
    "compare_approximations",
    "BlockDiagonal",
    "KFAC",
    "EKFAC",
    "Diagonal",
    "QuasiDiagonal",
    "LowRank",
    "ProjectedKFAC",
    # parameter space
    "information",
    "information_table",
    "directions",
    "ellipse",
    # training
    "optim",
    "problem",
    "problems",
    "Problem",
    "train",
    "compare_optimizers",
    "Tuning",
    "LogUniform",
    "verify",
    "Monitor",
    "adapters",
    # results
    "save",
    "load",
    "report",
    "plot",
    # errors and warnings
    "errors",
    "FisherLensError",
    "InputError",
    "NonFiniteError",
    "UnsupportedModuleError",
    "MemoryBudgetError",
    "FileFormatError",
    "ConvergenceWarning",
    "NumericalWarning",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Load plotting on first use: matplotlib is not needed by analyses."""
    if name == "plot":
        return importlib.import_module("fisherlens.plots")
    message = f"module 'fisherlens' has no attribute {name!r}"
    raise AttributeError(message)
