"""Options of the sampled and of the empirical kind, and the uniform numbers from which labels are drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlens import errors
from fisherlens.errors import InputError

MC_SAMPLING = ("independent", "stratified")
ROWS = ("term", "example")
# Sets the generator of the strata apart from that of the uniforms: torch takes the lower 32 bits of a seed, and these differ.
_STRATA = 0x5DEECE66


def check_options(kind: str, mc_sampling: str, rows: str) -> None:
    """Refuse unknown ways of sampling and kinds of rows, and rows that only the empirical kind has."""
    for what, name, known in (("mc_sampling", mc_sampling, MC_SAMPLING), ("rows", rows, ROWS)):
        if name not in known:
            raise InputError(errors.UNKNOWN_NAME.format(what=what, name=name, hint=errors.nearest(name, known)))
    if rows != "term" and kind != "empirical":
        raise InputError(
            f"rows={rows!r} goes with kind='empirical', whose scores at observed labels are one row per term or one per example; got "
            f"kind={kind!r}. Its columns come from the likelihood: leave rows out."
        )


class Draws:
    """Uniform numbers on the CPU, one per term and draw, in data order: whatever the split into batches, and the device.

    Stratified, draw s of a term takes (k + u)/S with k = π(s): each of the S intervals of length 1/S once, in an order π of the
    term's own. A single draw is uniform whatever the others are, and the draws of two terms are independent, so that the mean
    of the sampled Fisher is the exact one as for independent draws; only its variance is smaller.

    Parameters
    ----------
    num_uniforms
        Uniform numbers that one draw takes per example.
    mc_samples
        Draws, S.
    mc_sampling
        ``"independent"`` or ``"stratified"``.
    seed
        Seeds generators of its own.
    """

    def __init__(self, num_uniforms: int, mc_samples: int, mc_sampling: str, seed: int):
        self._per_example, self._stratified = (num_uniforms, mc_samples), mc_sampling == "stratified"
        self._uniforms = torch.Generator().manual_seed(seed)
        self._strata = torch.Generator().manual_seed(seed ^ _STRATA)

    def take(self, size: int) -> Tensor:
        """Those of the next ``size`` examples, float64, ``(size, num_uniforms, mc_samples)``."""
        shape = (size, *self._per_example)
        uniforms = torch.rand(shape, generator=self._uniforms, dtype=torch.float64, device="cpu")
        if not self._stratified:
            return uniforms
        order = torch.rand(shape, generator=self._strata, dtype=torch.float64, device="cpu").argsort(dim=-1)
        return ((order + uniforms) / shape[-1]).clamp_(max=1 - 2**-53)  # (S - 1 + u)/S may round to 1
