"""Problems, the training loop, and optimizers side by side."""

from fisherlens.training import adapters
from fisherlens.training.compare import compare_optimizers
from fisherlens.training.loop import train
from fisherlens.training.monitor import Monitor
from fisherlens.training.problems import Problem, problem, problems
from fisherlens.training.tune import LogUniform, Tuning
from fisherlens.training.verify import verify

__all__ = [
    "LogUniform",
    "Monitor",
    "Problem",
    "Tuning",
    "adapters",
    "compare_optimizers",
    "problem",
    "problems",
    "train",
    "verify",
]
