"""The questions that a report answers, one file each: results in, a section of the page out."""

from fisherlens.report.sections.coupling import coupling
from fisherlens.report.sections.information import information
from fisherlens.report.sections.made import made, words_used
from fisherlens.report.sections.segmentations import segmentations
from fisherlens.report.sections.segments import segments
from fisherlens.report.sections.spectrum import spectrum
from fisherlens.report.sections.steps import steps
from fisherlens.report.sections.training import training
from fisherlens.report.sections.verification import verification

# In the order of the page.
ANSWERS = (information, spectrum, coupling, segments, segmentations, steps, training, verification)

__all__ = ["ANSWERS", "made", "words_used"]
