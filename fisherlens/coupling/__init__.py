"""How strongly blocks depend on each other, linearly or at all, and how much of that is chance."""

from fisherlens.coupling.dependence import dependence
from fisherlens.coupling.pairs import coupling
from fisherlens.coupling.spatial import spatial_coupling

__all__ = ["coupling", "dependence", "spatial_coupling"]
