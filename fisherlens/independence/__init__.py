"""What an approximation costs: segmentations of the parameters and structured stand-ins for the Fisher, judged alike."""

from fisherlens.independence.comparison import compare_approximations
from fisherlens.independence.segmentations import independence

__all__ = ["compare_approximations", "independence"]
