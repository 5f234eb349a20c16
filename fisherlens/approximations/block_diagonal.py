"""The Fisher with every coupling between blocks dropped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherlens.approximations.base import Approximation
from fisherlens.approximations.blocks import Blocks, MomentBlocks, RowBlocks, ScoreBlock
from fisherlens.approximations.pieces import structure_of
from fisherlens.approximations.shelf import Shelf, large_moments
from fisherlens.approximations.structured import InputBlocks, UnitBlocks
from fisherlens.errors import InputError, MemoryBudgetError, readable_bytes
from fisherlens.fisher import Fisher, check_damping, require_fisher
from fisherlens.partitions import BlockGroup, Partition
from fisherlens.partitions import partition as make_partition
from fisherlens.scores.base import PART

# What a batch of blocks does with its entries of vectors, the answer written to the third.
Action = Callable[[Blocks, Tensor, Tensor], None]


def product_of(blocks: Blocks, v: Tensor, out: Tensor) -> None:
    """M_b V."""
    blocks.product(v, out)


def solve_of(damping: float) -> Action:
    """(M_b + λI)⁻¹ V."""
    return lambda blocks, v, out: blocks.solve(v, damping, out)


def precondition_of(damping: float) -> Action:
    """Roughly (M_b + λI)⁻¹ V, exact where blocks know nothing cheaper."""
    return lambda blocks, v, out: getattr(blocks, "precondition", blocks.solve)(v, damping, out)


class BlockDiagonal(Approximation):
    r"""Block-diagonal part of F on a partition of the parameters.

    .. math:: F_b = \mathrm{diag}(F_{11}, \dots, F_{BB}), \qquad F_{bb} = U_b^\top U_b / W

    Blocks of one size are one batch. A block larger than the number of its score rows is kept as those rows, and a block
    that is a whole layer as its Gram matrix, so that no block costs more than the smaller of its two sides.

    Parameters
    ----------
    F
        The Fisher operator.
    partition
        A scheme name, a :class:`Partition` of F's parameters, or a dict label → indices.
    shared
        Whether the blocks of one size in a dense layer share one matrix, their mean. With the partition "mbf" (variant A: units, B:
        inputs) this is what MBF keeps (arXiv 2202.04124); blocks of other layers stay their own. The error is then the spread between
        the blocks that share, Σ_b ‖F_bb‖² - B ‖F̄‖².

    Raises
    ------
    InputError: a partition of another model. MemoryBudgetError: blocks over the budget of F; names the partition.

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> B = fl.BlockDiagonal(F, "unit")
    >>> B.solve(F.gradient(), damping=1e-3).shape
    torch.Size([8])
    """

    def __new__(cls, *_: Any, shared: bool = False, **__: Any) -> BlockDiagonal:
        if cls is BlockDiagonal and shared is True:
            from fisherlens.approximations.shared import SharedBlockDiagonal  # which is a BlockDiagonal

            cls = SharedBlockDiagonal
        return super().__new__(cls)

    def __init__(self, F: Fisher, partition: Any, *, shared: bool = False):
        require_fisher(F)
        if not isinstance(shared, bool):
            raise TypeError(
                f"shared must be True or False; got {shared!r}. True replaces the blocks of one size in a dense layer by their mean."
            )
        parts: Partition = make_partition(F, partition)
        if parts.layout != F.layout:
            raise InputError(
                f"The partition covers {parts.layout.n_params} parameters of another layout; F has {F.n_params}. "
                "Build it from this operator: fl.partition(F, scheme)."
            )
        self._take(F, parts, parts.groups)

    _shelf: Shelf | None = None  # blocks that other partitions of the same layer have built

    def _take(self, F: Fisher, partition: Partition, groups: Sequence[BlockGroup]) -> None:
        super().__init__(F, partition.scheme, partition)
        self._groups = groups
        needed = sum(self._entries(F, group) for group in groups) * F.dtype.itemsize
        if needed > F.memory:
            raise MemoryBudgetError(
                f"The blocks of partition {partition.scheme!r} need {readable_bytes(needed)}, over the budget of {readable_bytes(F.memory)} (largest "
                f"block: {partition.largest_block} parameters). Choose a finer partition, look at single layers with F.restrict(name), "
                "or raise memory= of the Fisher."
            )
        self._parts = [self._build(F, group) for group in groups]

    def _entries(self, F: Fisher, group: BlockGroup) -> int:
        """Numbers that the blocks of a group hold."""
        return _entries(F, group)

    def _build(self, F: Fisher, group: BlockGroup) -> tuple[slice, Blocks]:
        """The blocks of a group, and the piece of the flat vector that they count from."""
        if self._shelf is None:
            return _build(F, group)
        at, index, _ = _relative(F, group)
        found = self._shelf.find(index)
        return (at, self._shelf.keep(_build(F, group)[1])) if found is None else (at, found)

    @property
    def storage_bytes(self) -> int:
        """Bytes that the blocks hold as they are kept here."""
        return sum(blocks.storage_entries for _, blocks in self._parts) * self.dtype.itemsize

    @property
    def solve_flops(self) -> float:
        """Operations of the Cholesky factors, each of the smaller side of its block."""
        return sum(blocks.factor_flops for _, blocks in self._parts)

    @property
    def held_bytes(self) -> int:
        """Bytes that the blocks hold once :meth:`prefer_inverses` has taken effect."""
        held = sum(getattr(blocks, "held_entries", 2 * blocks.storage_entries) for _, blocks in self._parts)
        return held * self.dtype.itemsize

    def prefer_inverses(self) -> None:
        """Solve by explicit inverses where blocks are kept as matrices, which pays where many are asked for."""
        for _, blocks in self._parts:
            if isinstance(blocks, MomentBlocks):
                blocks.prefer_inverses()

    @property
    def preconditions(self) -> bool:
        """Whether :meth:`precondition` is much cheaper than a solve, after :meth:`prefer_inverses`."""
        return any(isinstance(blocks, InputBlocks) and blocks.inverts for _, blocks in self._parts)

    def precondition(self, v: Tensor, damping: float) -> Tensor:
        """Roughly (F_b + λ)⁻¹ V, symmetric and positive definite: exact for all blocks but those of a dense layer's inputs."""
        return self._apply(v, precondition_of(damping))

    def on_layer(self, layer: str) -> BlockDiagonal:
        """The blocks of one layer, as a stand-in for ``F.restrict(layer)``; a block that crosses layers is cut."""
        return self.part_of(self._fisher, self.partition, layer)

    @classmethod
    def part_of(cls, F: Fisher, partition: Partition, layer: str, shelf: Shelf | None = None) -> BlockDiagonal:
        """Only the blocks of one layer, without those of the others; what a shelf of this layer holds is not built again."""
        part, info = object.__new__(cls), F.layout.layer(layer)
        flat = partition.flat
        inside = len(flat) == info.size and int(flat.min()) >= info.start and int(flat.max()) < info.stop
        own = partition if inside else partition.restrict(layer)
        restricted = F.restrict(layer)
        # the partition keeps the flat indices of the whole network, in which the layer does not begin at 0
        groups = [
            replace(group, layer=restricted.layout.layer_names[0], index=group.index - info.start)
            for group in own.groups
        ]
        part._shelf = shelf
        part._take(restricted, own, groups)
        part._shelf = None
        return part

    def apply(self, v: Tensor, out: Tensor, act: Action) -> None:
        """Let every batch of blocks act on its own entries of vectors ``(P, K)`` and write them to the answer."""
        for at, blocks in self._parts:
            act(blocks, v[at], out[at])

    def _apply(self, v: Tensor, act: Action) -> Tensor:
        out = torch.empty(
            v.shape[::-1], dtype=v.dtype, device=v.device
        ).T  # each vector contiguous; blocks cover all entries
        self.apply(v, out, act)
        return out

    def _product(self, v: Tensor) -> Tensor:
        return self._apply(v, product_of)

    def _solve(self, v: Tensor, damping: float) -> Tensor:
        return self._apply(v, solve_of(damping))

    def _log_determinant(self, damping: float) -> float:
        return sum(blocks.log_determinant(damping) for _, blocks in self._parts)

    def effective_dimension(self, damping: float) -> Tensor:
        """Tr F_bb (F_bb + λI)⁻¹ of every block, in the partition's order, float64."""
        damping = check_damping(damping)
        out = torch.zeros(self.partition.num_blocks, dtype=torch.float64, device=self.device)
        for group, (_, blocks) in zip(self._groups, self._parts, strict=True):
            out[group.block_ids.to(self.device)] = blocks.effective_dimension(damping)
        return out

    def squared_norm(self) -> float:
        """Σ_b of the blocks' squared Frobenius norms."""
        return sum(blocks.squared_norm() for _, blocks in self._parts)

    def diagonal(self) -> Tensor:
        """The diagonal of F itself, flat ``(P,)``."""
        return self._fisher.diagonal()

    def within_block_error(self) -> float:
        """0: the blocks are those of F."""
        return 0.0

    def _dense(self) -> Tensor:
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for at, blocks in self._parts:
            for index, matrix in blocks.matrices_at():
                where = index + at.start
                out[where[:, None], where] = matrix
        return out

    def __repr__(self) -> str:
        return f"BlockDiagonal({self.partition.scheme!r}, {self.partition.num_blocks} blocks, P={self.n_params}, {readable_bytes(self.storage_bytes)})"


# ``help(BlockDiagonal)`` shows the arguments of __init__ rather than those that __new__ looks at.
BlockDiagonal.__signature__ = inspect.signature(BlockDiagonal.__init__).replace(
    parameters=list(inspect.signature(BlockDiagonal.__init__).parameters.values())[1:]
)


def _is_whole(F: Fisher, group: BlockGroup) -> bool:
    """Whether a group is one block with all parameters of a layer, or of the network, in order."""
    if len(group) != 1:
        return False
    start, stop = 0, F.n_params
    if group.layer is not None:
        layer = F.layout.layer(group.layer)
        start, stop = layer.start, layer.stop
    return group.size == stop - start and bool(
        (group.index[0] == torch.arange(start, stop, device=group.index.device)).all()
    )


def _relative(F: Fisher, group: BlockGroup) -> tuple[slice, Tensor, Any]:
    """The piece of the flat vector a group lives in, its indices there, and the scores to ask."""
    if group.layer is None:
        return slice(0, F.n_params), group.index.to(F.device), None
    layer = F.layout.layer(group.layer)
    return slice(layer.start, layer.stop), (group.index - layer.start).to(F.device), F.scores[group.layer]


def _rows_needed(F: Fisher, group: BlockGroup) -> int:
    _, index, scores = _relative(F, group)
    return F.scores.rows if scores is None else scores.block_row_count(index)


def _entries(F: Fisher, group: BlockGroup) -> int:
    if group.size == 1:
        return len(group)
    rows = _rows_needed(F, group)
    if group.size <= rows:
        return len(group) * group.size**2
    if _is_whole(F, group):
        return F.scores.rows**2
    if _structure(F, group) == "units":
        return len(group) * rows**2
    return len(group) * (rows * group.size + rows**2)


def _build(F: Fisher, group: BlockGroup) -> tuple[slice, Blocks]:
    at, index, scores = _relative(F, group)
    if group.size == 1 and scores is not None and 8 * len(group) < scores.size:
        return at, MomentBlocks(index, scores.moments(index).div_(F.total_weight))
    if group.size == 1:
        diagonal = F.diagonal()[at] if scores is None else scores.diagonal() / F.total_weight
        return at, MomentBlocks(index, diagonal[index[:, 0], None, None])
    if group.size > _rows_needed(F, group):
        if _is_whole(F, group):
            whole = F.scores if group.layer is None else F.scores.restrict([group.layer])
            return at, ScoreBlock(whole, F.total_weight)
        if _structure(F, group) == "units":
            return at, UnitBlocks(index, scores, F.total_weight)
        rows = _cross_rows(F, index) if scores is None else scores.block_rows(index)
        return at, RowBlocks(index, rows / F.total_weight**0.5)
    if scores is None and _is_whole(F, group):
        return at, MomentBlocks(index, F.scores.dense()[None] / F.total_weight)
    if scores is None:
        rows = _cross_rows(F, index)
        return at, MomentBlocks(index, torch.bmm(rows.mT, rows) / F.total_weight)
    if _structure(F, group) == "inputs":
        return at, InputBlocks(index, scores, F.total_weight)
    matrices = large_moments(scores, index) if scores.n <= PART else None
    matrices = scores.moments(index) if matrices is None else matrices
    return at, MomentBlocks(index, matrices.div_(F.total_weight))


def _structure(F: Fisher, group: BlockGroup) -> str | None:
    """``"units"`` or ``"inputs"`` where these are all of a dense layer of one position, for which contractions are known."""
    _, index, scores = _relative(F, group)
    if scores is None or getattr(scores, "t", None) != 1 or scores.n > PART:
        return None
    return structure_of(scores, index)


def _cross_rows(F: Fisher, index: Tensor) -> Tensor:
    return F.scores.columns(index.reshape(-1)).reshape(F.scores.rows, *index.shape).transpose(0, 1)
