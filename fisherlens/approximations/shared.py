"""Block-diagonal stand-ins in which the equal blocks of a dense layer share one matrix, as MBF keeps them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fisherlens.approximations.block_diagonal import BlockDiagonal
from fisherlens.approximations.blocks import Blocks, MomentBlocks, SharedBlocks
from fisherlens.approximations.pieces import score_parts, squared_block_norms, sum_of_blocks
from fisherlens.fisher import Fisher
from fisherlens.partitions import BlockGroup, Partition
from fisherlens.scores.base import Total


class SharedBlockDiagonal(BlockDiagonal):
    r"""``BlockDiagonal(F, partition, shared=True)``: in each dense layer, blocks of one size are replaced by their mean.

    .. math:: \hat F_{bb} = \bar F = \frac{1}{B} \sum_{b'=1}^{B} F_{b'b'}, \qquad
       \sum_b \|F_{bb} - \bar F\|^2 = \sum_b \|F_{bb}\|^2 - B \|\bar F\|^2

    The mean is the best matrix that the blocks can share, so the error is the spread between them. Blocks of other layers, and blocks that
    cross layers, are their own. With the partition "mbf" this is what MBF estimates: variant B shares among the inputs of a dense layer (the
    bias is one of them), variant A among its units; a convolution has a matrix of its own for every channel pair.

    Parameters
    ----------
    F, partition, shared
        As for :class:`BlockDiagonal`.

    Notes
    -----
    Source: MBF (arXiv 2202.04124, released code). Means are contractions of inputs and scores where those are kept: 2 N dᵢ² operations
    for units, 2 N R dₒ² for inputs.
    """

    def _take(self, F: Fisher, partition: Partition, groups: Sequence[BlockGroup]) -> None:
        super()._take(F, partition, groups)
        self.name = f"{partition.scheme} shared"

    def _entries(self, F: Fisher, group: BlockGroup) -> int:
        return group.size**2 if _is_shared(F, group) else super()._entries(F, group)

    def _build(self, F: Fisher, group: BlockGroup) -> tuple[slice, Blocks]:
        if not _is_shared(F, group):
            return super()._build(F, group)
        layer, total = F.layout.layer(group.layer), Total()
        index = (group.index - layer.start).to(F.device)
        for scores in score_parts(F.scores.restrict([group.layer])):
            total.add(sum_of_blocks(scores[group.layer], index))
        return slice(layer.start, layer.stop), SharedBlocks(index, total.value() / (F.total_weight * len(group)))

    def diagonal(self) -> Tensor:
        """F̂_ii, flat ``(P,)``: of shared blocks the mean over them, else that of F."""
        out = self._fisher.diagonal()
        for at, blocks in self._parts:
            if isinstance(blocks, SharedBlocks):
                out[at][blocks.index] = blocks.matrix.diagonal()
        return out

    def within_block_error(self) -> float:
        """Σ_b ‖F_bb - F̄‖², the spread between the blocks that share a matrix."""
        total = 0.0
        for group, (_, blocks) in zip(self._groups, self._parts, strict=True):
            if isinstance(blocks, SharedBlocks):
                total += max(squared_block_norms(self._fisher, group).sum().item() - blocks.squared_norm(), 0.0)
        return total

    def __repr__(self) -> str:
        return super().__repr__().replace("', ", "', shared, ", 1)


def as_single_blocks(blocks: Blocks) -> Blocks:
    """Shared blocks as a batch of single ones, which are views of one matrix; any other as they are."""
    if not isinstance(blocks, SharedBlocks):
        return blocks
    return MomentBlocks(blocks.index, blocks.matrix.expand(len(blocks.index), *blocks.matrix.shape))


def _is_shared(F: Fisher, group: BlockGroup) -> bool:
    return group.layer is not None and len(group) > 1 and F.layout.layer(group.layer).kind == "dense"
