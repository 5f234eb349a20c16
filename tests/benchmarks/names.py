"""What the contestants are called in figures and tables."""

from __future__ import annotations

TORCH = "torch.func recipe"
CURVLINOPS, NNGEOMETRY, PYHESSIAN = "curvlinops GGN", "nngeometry implicit", "PyHessian"
RECIPE = "double backward (PyHessian's recipe)"
OURS, LINEARISED = "fisherlens", "fisherlens, linearised"
STREAMED, HESSIAN = "fisherlens, streamed", "fisherlens, Hessian"
