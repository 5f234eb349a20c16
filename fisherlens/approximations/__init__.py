"""Structured stand-ins for the Fisher, built from the same captured scores."""

from fisherlens.approximations.base import Approximation
from fisherlens.approximations.block_diagonal import BlockDiagonal
from fisherlens.approximations.blocks import MomentBlocks, RowBlocks, ScoreBlock
from fisherlens.approximations.ekfac import EKFAC
from fisherlens.approximations.kronecker import KFAC

__all__ = ["EKFAC", "KFAC", "Approximation", "BlockDiagonal", "MomentBlocks", "RowBlocks", "ScoreBlock"]
