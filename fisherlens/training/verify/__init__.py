"""Does the analysis come true? Every diagnosis makes a prediction, and a run of the reference optimizer shows whether it holds."""

from fisherlens.training.verify.claim import Claim, Curve, Row, at_least, at_most, equal, order
from fisherlens.training.verify.run import CLAIMS, verify
from fisherlens.training.verify.subject import Budget, Subject

__all__ = ["CLAIMS", "Budget", "Claim", "Curve", "Row", "Subject", "at_least", "at_most", "equal", "order", "verify"]
