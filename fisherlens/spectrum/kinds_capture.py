"""The score rows of several kinds of Fisher side by side, from one capture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fisherlens.errors import InputError
from fisherlens.fisher import Fisher
from fisherlens.likelihoods import BoundLikelihood, Likelihood
from fisherlens.scores.draws import Draws


@dataclass(frozen=True)
class Member:
    """One matrix of a comparison: a kind, and of the mc kind the seed of its labels."""

    kind: str
    seed: int = 0


class SideBySide(Likelihood):
    """A likelihood whose columns are those of several kinds, one kind after the other.

    A Fisher that is built with it holds the score rows of every kind, and its Gram matrix the products of any two of them. Its own
    product is the sum of the kinds, which nobody needs.

    Parameters
    ----------
    base
        The likelihood of the model.
    members
        Kinds with score rows: ``exact``, ``mc``, ``empirical``.
    mc_samples
        Label draws per example of each mc member.
    """

    name = "side_by_side"

    def __init__(self, base: Likelihood, members: Sequence[Member], mc_samples: int):
        self.base, self.members, self.mc_samples = base, tuple(members), mc_samples
        self.needs_targets = base.needs_targets
        self.n_data = 0
        self.ranges: list[range] = []  # columns of each member, known once it is bound
        self._uniforms: dict[int, Tensor] = {}

    def check_data(self, output_shape: torch.Size, n_data: int) -> None:
        self.n_data = n_data
        self.base.check_data(output_shape, n_data)

    def rank_per_term(self, output_shape: torch.Size) -> int:
        return self.base.rank_per_term(output_shape)

    def bind(
        self, outputs: Tensor, targets: Tensor | None, where: str = "the data", at: slice | None = None
    ) -> BoundLikelihood:
        """The base likelihood at one batch, with labels drawn for its place ``at`` in the data."""
        if targets is None and any(member.kind == "empirical" for member in self.members):
            raise InputError(
                f"The targets of {where} are None, but the empirical kind takes scores at observed labels. Give data as (inputs, targets), or "
                "leave 'empirical' out of kinds."
            )
        bound = self.base.bind(outputs, targets, where, at)
        widths = {"exact": bound.num_columns, "mc": self.mc_samples, "empirical": bound.num_terms}
        starts = [0]
        for member in self.members:
            starts.append(starts[-1] + widths[member.kind])
        self.ranges = [range(start, stop) for start, stop in pairwise(starts)]
        at = slice(0, len(outputs)) if at is None else at
        uniforms = [
            self._draws(member.seed, bound.num_uniforms)[at] if member.kind == "mc" else None for member in self.members
        ]
        return _BoundSideBySide(bound, self.members, self.ranges, uniforms)

    def _draws(self, seed: int, num_uniforms: int) -> Tensor:
        """The numbers that a Fisher of this seed would take, of all examples."""
        if seed not in self._uniforms:
            known = max(self.n_data, 1)
            self._uniforms[seed] = Draws(num_uniforms, self.mc_samples, "independent", seed).take(known)
        return self._uniforms[seed]


class _BoundSideBySide(BoundLikelihood):
    def __init__(
        self,
        bound: BoundLikelihood,
        members: Sequence[Member],
        ranges: Sequence[range],
        uniforms: Sequence[Tensor | None],
    ):
        super().__init__(
            bound.outputs, num_columns=ranges[-1].stop, num_uniforms=bound.num_uniforms, weight=bound.weight
        )
        self.bound, self.members, self.ranges, self.uniforms = bound, members, ranges, uniforms

    def column(self, r: int) -> Tensor:
        place = next(i for i, columns in enumerate(self.ranges) if r in columns)
        kind, local, uniforms = self.members[place].kind, r - self.ranges[place].start, self.uniforms[place]
        if kind == "exact":
            return self.bound.column(local)
        if uniforms is not None:
            return self.bound.sampled_score(uniforms[..., local]) / uniforms.shape[-1] ** 0.5
        return self.bound.observed_score() if self.bound.num_terms == 1 else self.bound.observed_score(local)

    def sampled_score(self, uniforms: Tensor) -> Tensor:
        return self.bound.sampled_score(uniforms)

    def observed_score(self, term: int | None = None) -> Tensor:
        return self.bound.observed_score(term)

    def loss_gradient(self) -> Tensor:
        return self.bound.loss_gradient()

    def gradient_coefficients(self) -> Tensor:
        # asked for by the capture; nothing here solves in the row space of all kinds together
        return self.outputs.new_full((len(self.outputs), self.num_columns), torch.nan)

    def kept_rows(self) -> Tensor:
        some = (self.weight > 0).any(1, keepdim=True)
        pieces = []
        for member, columns in zip(self.members, self.ranges, strict=True):
            if member.kind == "exact":
                pieces.append(self.bound.kept_rows())
            elif member.kind == "mc":
                pieces.append(some.expand(-1, len(columns)))
            else:
                pieces.append(self.weight > 0)
        return torch.cat(pieces, dim=1)


def rows_of(F: Fisher, columns: range) -> Tensor:
    """Indices of the score rows with weight that belong to some columns."""
    first = torch.arange(F.scores.n, device=F.device) * F.scores.r
    index = (first[:, None] + torch.tensor(list(columns), device=F.device)).reshape(-1)
    return index if F.scores.kept is None else index[F.scores.kept[index]]
