r"""The slow, obvious, dense twin of every quantity: to be read aloud, and to test the fast code against.

A network f(x; θ) with P parameters meets a likelihood p(y | f) on N examples. Its Fisher matrix is

.. math:: F = \frac{1}{W} \sum_t w_t J_t^\top H_t J_t, \qquad H_t = \mathrm{E}_{y \sim p(\cdot | f_t)} [ s s^\top ],
   \qquad s = -\nabla_f \log p(y | f_t), \qquad W = \sum_t w_t

over the terms t of the mean: one per example, or one per position of a structured categorical output. Everything here
is a few lines of plain dense tensors from its definition and shares no code with the fast operators. N examples, T
terms per example, C elements per term, P parameters, S label draws per example, B blocks. Arguments:

- ``model``: any ``nn.Module`` in evaluation mode; it is left exactly as it was.
- ``params``: None for all that require grad, or names and glob patterns. Flat vectors follow ``named_parameters()``.
- ``data``: ``(inputs, targets)``; inputs are a tensor, a tuple (positional arguments) or a dict (keyword arguments).
- ``likelihood``: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, or an object with the attributes of one of them:
  ``class_axis``, ``weight``, ``ignore_index``; or ``pos_weight``; or ``variance``.
- ``F``: ``(P, P)``; ``F_hat``: a stand-in for F; ``blocks``: flat index tensors; ``damping``: λ > 0, in units of F.

Fishers, traces and divergences are in nat. Cost: N T C backward passes, P³ operations: for a few thousand parameters.

Examples
--------
>>> import torch
>>> from torch import nn
>>> model, x, y = nn.Linear(2, 3).double(), torch.eye(2).double(), torch.tensor([0, 2])
>>> F = fisher(model, (x, y), "categorical")
>>> round(effective_dimension(F, 1e-6), 2)  # two examples, each with two free logits
4.0
"""

from __future__ import annotations

from fisherlens.reference.block_steps import (
    best_step,
    linear_gaussian_loss,
    promised_decrease,
    removal_divergence,
    shared_way,
)
from fisherlens.reference.blocks import (
    Blocks,
    block,
    block_diagonal,
    condition_number,
    coupling,
    coupling_noise_floor,
    decrease_ratio,
    energy_captured,
    energy_noise_floor,
    gaussian_kl,
    information,
    natural_gradient_cosine,
    permuted_block,
    preconditioned_spectrum,
)
from fisherlens.reference.dependence import (
    distance_correlation,
    false_discovery,
    hsic,
    position_coupling,
    position_traces,
    u_centred,
    u_product,
)
from fisherlens.reference.directions import (
    block_share,
    determined,
    eigenvectors,
    ellipse_semi_axes,
    participation,
    plane_metric,
    projector,
    share_of_trace,
)
from fisherlens.reference.judgement import error_split, metric_cosine, predicted_steps
from fisherlens.reference.kronecker import (
    best_kronecker_error,
    ekfac_block,
    factored_damping,
    inputs_and_scores,
    kronecker_block,
    kronecker_factors,
    with_bias,
)
from fisherlens.reference.matrix import (
    damped,
    diagonal,
    effective_dimension,
    frobenius_norm,
    gram,
    log_determinant,
    solve,
    spectrum,
    trace,
)
from fisherlens.reference.monitoring import space_gap, space_overlap, top_share, top_space
from fisherlens.reference.network import (
    Data,
    Names,
    Terms,
    Theta,
    by_term,
    empirical_fisher,
    fisher,
    gradient,
    jacobian,
    kl_divergence,
    labels_by_term,
    log_probability,
    mc_fisher,
    negative_log_likelihood,
    output_fisher,
    outputs_at,
    score,
    score_matrix,
    terms,
)
from fisherlens.reference.optim_kronecker import (
    bfgs,
    ekfac_mean_block,
    kbfgs_first_factor,
    powell_damped,
    recursive_inverse,
    step_with,
)
from fisherlens.reference.optim_means import (
    along,
    contraction,
    mbf_kernels,
    mbf_scalar_rule,
    mbf_statistic,
    shampoo_direction,
    symmetric_power,
    tnt_direction,
)
from fisherlens.reference.optim_rows import blockwise_step, fngd_step, ngd_step, reduced_rows, tengrad_step
from fisherlens.reference.optimizers import cw_ngd_step
from fisherlens.reference.standins import low_rank, projected_factor, quasi_diagonal, shared_blocks
from fisherlens.reference.verification import energies, stable_rate

__all__ = [
    "Blocks",
    "Data",
    "Names",
    "Terms",
    "Theta",
    "along",
    "best_kronecker_error",
    "best_step",
    "bfgs",
    "block",
    "block_diagonal",
    "block_share",
    "blockwise_step",
    "by_term",
    "condition_number",
    "contraction",
    "coupling",
    "coupling_noise_floor",
    "cw_ngd_step",
    "damped",
    "decrease_ratio",
    "determined",
    "diagonal",
    "distance_correlation",
    "effective_dimension",
    "eigenvectors",
    "ekfac_block",
    "ekfac_mean_block",
    "ellipse_semi_axes",
    "empirical_fisher",
    "energies",
    "energy_captured",
    "energy_noise_floor",
    "error_split",
    "factored_damping",
    "false_discovery",
    "fisher",
    "fngd_step",
    "frobenius_norm",
    "gaussian_kl",
    "gradient",
    "gram",
    "hsic",
    "information",
    "inputs_and_scores",
    "jacobian",
    "kbfgs_first_factor",
    "kl_divergence",
    "kronecker_block",
    "kronecker_factors",
    "labels_by_term",
    "linear_gaussian_loss",
    "log_determinant",
    "log_probability",
    "low_rank",
    "mbf_kernels",
    "mbf_scalar_rule",
    "mbf_statistic",
    "mc_fisher",
    "metric_cosine",
    "natural_gradient_cosine",
    "negative_log_likelihood",
    "ngd_step",
    "output_fisher",
    "outputs_at",
    "participation",
    "permuted_block",
    "plane_metric",
    "position_coupling",
    "position_traces",
    "powell_damped",
    "preconditioned_spectrum",
    "predicted_steps",
    "projected_factor",
    "projector",
    "promised_decrease",
    "quasi_diagonal",
    "recursive_inverse",
    "reduced_rows",
    "removal_divergence",
    "score",
    "score_matrix",
    "shampoo_direction",
    "share_of_trace",
    "shared_blocks",
    "shared_way",
    "solve",
    "space_gap",
    "space_overlap",
    "spectrum",
    "stable_rate",
    "step_with",
    "symmetric_power",
    "tengrad_step",
    "terms",
    "tnt_direction",
    "top_share",
    "top_space",
    "trace",
    "u_centred",
    "u_product",
    "with_bias",
]
