"""Fisher diagnostics along any training loop: what to measure, when, on which copy, and where it is kept."""

from fisherlens.training.monitor.monitor import Monitor
from fisherlens.training.monitor.table import QUANTITIES

__all__ = ["QUANTITIES", "Monitor"]
