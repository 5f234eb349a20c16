"""The Fisher information of a network on data, as an operator."""

from fisherlens.fisher.damped import DampedFisher, check_damping
from fisherlens.fisher.operator import Fisher, require_fisher
from fisherlens.fisher.solve import DIRECT_LIMIT

__all__ = ["DIRECT_LIMIT", "DampedFisher", "Fisher", "check_damping", "require_fisher"]
