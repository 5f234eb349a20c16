"""One page, one data file and the figures from all analyses of a network."""

from fisherlens.report.run import report

__all__ = ["report"]
