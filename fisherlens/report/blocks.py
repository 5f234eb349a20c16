"""The segmentations that a report compares, which other analyses of training compare too."""

from fisherlens.training.segments import CONTROLS, NAMED, SEGMENTS, as_blocks, segmentations, shifted, shuffled

__all__ = ["CONTROLS", "NAMED", "SEGMENTS", "as_blocks", "segmentations", "shifted", "shuffled"]
