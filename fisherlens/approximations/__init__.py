"""Structured stand-ins for the Fisher, built from the same captured scores."""

from fisherlens.approximations.base import Approximation
from fisherlens.approximations.block_diagonal import BlockDiagonal
from fisherlens.approximations.blocks import MomentBlocks, RowBlocks, ScoreBlock, SharedBlocks
from fisherlens.approximations.diagonal import Diagonal
from fisherlens.approximations.ekfac import EKFAC
from fisherlens.approximations.kronecker import KFAC
from fisherlens.approximations.low_rank import LowRank
from fisherlens.approximations.projected import ProjectedKFAC
from fisherlens.approximations.quasi_diagonal import QuasiDiagonal
from fisherlens.approximations.shared import SharedBlockDiagonal

__all__ = [
    "EKFAC",
    "KFAC",
    "Approximation",
    "BlockDiagonal",
    "Diagonal",
    "LowRank",
    "MomentBlocks",
    "ProjectedKFAC",
    "QuasiDiagonal",
    "RowBlocks",
    "ScoreBlock",
    "SharedBlockDiagonal",
    "SharedBlocks",
]
