"""Every method of ``fl.optim`` with options that bring all of it to work within a few steps, for the tests of what they share."""

from fisherlens.optim import (
    CWNGD,
    EKFAC,
    FNGD,
    KBFGS,
    KFAC,
    MBF,
    NGD,
    TNT,
    ProjectedKFAC,
    QuasiDiagonal,
    Shampoo,
    TENGraD,
    UnitWise,
)

FACTORS = {
    "mbf": lambda m, **k: MBF(m, **{"lr": 1e-3, "damping": 0.01} | k),
    "mbf sampled": lambda m, **k: MBF(m, **{"lr": 1e-3, "damping": 0.01, "labels": "sampled", "refresh": 1} | k),
    "kfac": lambda m, **k: KFAC(m, **{"labels": "true"} | k),
    "kfac factored": lambda m, **k: KFAC(m, **{"preset": "paper"} | k),
    "ekfac": lambda m, **k: EKFAC(m, **{"inverse_refresh": 2} | k),
    "projected": lambda m, **k: ProjectedKFAC(m, **{"rank": 3, "labels": "true", "inverse_refresh": 2} | k),
    "shampoo": lambda m, **k: Shampoo(m, **{"lr": 0.05, "inverse_refresh": 2} | k),
    "tnt": lambda m, **k: TNT(m, **{"lr": 1e-3, "damping": 0.1, "refresh": 2} | k),
    "k-bfgs": lambda m, **k: KBFGS(m, **{"lr": 0.1} | k),
    "k-bfgs(l)": lambda m, **k: KBFGS(m, **{"lr": 0.1, "memory": 2} | k),
}
_COMMON = {"lr": 0.05, "damping": 0.1}
ROWS = {
    "ngd": lambda m, **k: NGD(m, **_COMMON | {"labels": "true"} | k),
    "ngd by products": lambda m, **k: NGD(m, **_COMMON | {"solver": "cg"} | k),
    "tengrad": lambda m, **k: TENGraD(m, **_COMMON | {"labels": "true", "refresh": 2} | k),
    "tengrad paper": lambda m, **k: TENGraD(m, **_COMMON | {"preset": "paper", "refresh": 2} | k),
    "fngd": lambda m, **k: FNGD(m, **_COMMON | {"epoch_steps": 2} | k),
    "unit-wise": lambda m, **k: UnitWise(m, **_COMMON | {"labels": "true"} | k),
    "unit-wise averaged": lambda m, **k: UnitWise(m, **_COMMON | {"ema": 0.5} | k),
    "quasi-diagonal": lambda m, **k: QuasiDiagonal(m, **_COMMON | {"labels": "true"} | k),
    "cw-ngd": lambda m, **k: CWNGD(m, **_COMMON | {"momentum": 0.5} | k),
}
ALL = FACTORS | ROWS
WITHOUT_CLIP = ("fngd",)  # no option kl_clip: its gradients are weighted


def unclipped(name):
    """The option that turns clipping off, where there is one."""
    return {} if name in WITHOUT_CLIP else {"kl_clip": None}


# Where a change in the order of rounding counts: random signs belong to the parts of a batch; rounding chooses the basis of a null space,
# and shows where roots are large.
SETTLED = {"projected": {"ema": 0.0}, "ekfac": {"inverse_refresh": 1}, "shampoo": {"damping": 0.05}}
