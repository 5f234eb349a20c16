"""What a network's layers tell: captured once, asked many times."""

from fisherlens.scores.capture import KINDS, Capture, capture
from fisherlens.scores.curvature import LossCurvature
from fisherlens.scores.matrix import ScoreMatrix
from fisherlens.scores.plan import LayerPlan, Plan, parse_memory

__all__ = ["KINDS", "Capture", "LayerPlan", "LossCurvature", "Plan", "ScoreMatrix", "capture", "parse_memory"]
