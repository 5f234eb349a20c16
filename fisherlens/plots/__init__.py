"""Pictures of results: finished Datasets in, Axes out.

Every function takes ``(dataset, ax=None, *, ...)``, draws without computing, shows nothing and changes no setting. Labels
come from the ``long_name`` and ``units`` of the variables.
"""

from fisherlens.plots._approximations import approximations
from fisherlens.plots._coupling import coupling
from fisherlens.plots._density import density
from fisherlens.plots._dependence import dependence
from fisherlens.plots._directions import directions
from fisherlens.plots._ellipse import ellipse
from fisherlens.plots._filters import filters
from fisherlens.plots._independence import independence, independence_panels
from fisherlens.plots._information import information
from fisherlens.plots._kinds import kinds
from fisherlens.plots._monitor import monitor
from fisherlens.plots._optimizers import optimizers
from fisherlens.plots._partition import partition
from fisherlens.plots._spatial import spatial_coupling
from fisherlens.plots._spectrum import spectrum
from fisherlens.plots._tuning import targets, tuning
from fisherlens.plots._verification import verification

__all__ = [
    "approximations",
    "coupling",
    "density",
    "dependence",
    "directions",
    "ellipse",
    "filters",
    "independence",
    "independence_panels",
    "information",
    "kinds",
    "monitor",
    "optimizers",
    "partition",
    "spatial_coupling",
    "spectrum",
    "targets",
    "tuning",
    "verification",
]
