"""What a Monitor is told, checked before the training starts."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from fisherlens import errors
from fisherlens.errors import InputError
from fisherlens.fisher import check_damping
from fisherlens.training.monitor.table import QUANTITIES

KINDS = ("exact", "mc", "empirical")
EXISTING = ("refuse", "replace", "continue")
_NEED_TARGETS = ("loss", "alignment")


def choose_quantities(quantities: Sequence[str] | str | None, labelled: bool) -> tuple[str, ...]:
    """The quantities in their order; all that the data allow for None."""
    if quantities is None:
        return tuple(name for name in QUANTITIES if labelled or name not in _NEED_TARGETS)
    wanted = [quantities] if isinstance(quantities, str) else list(quantities)
    for name in wanted:
        if name not in QUANTITIES:
            hint = errors.nearest(str(name), QUANTITIES)
            raise InputError(errors.UNKNOWN_NAME.format(what="quantity", name=name, hint=hint))
        if name in _NEED_TARGETS and not labelled:
            raise InputError(
                f"The quantity {name!r} needs observed labels, but the data have targets=None. Give (inputs, targets), or leave it out."
            )
    if not wanted:
        raise InputError(f"quantities is empty, so there is nothing to measure. Known: {', '.join(QUANTITIES)}.")
    return tuple(name for name in QUANTITIES if name in wanted)


def check_options(
    every: Any,
    k: Any,
    damping: Any,
    kind: Any,
    num_examples: Any,
    max_share: Any,
    existing: Any,
    start: Any,
    strict: Any,
    keep_hooks: Any,
) -> None:
    """Refuse numbers out of their range, unknown words, and what is no flag."""
    meant = {
        "every": (every, "the optimizer steps between measurements"),
        "k": (k, "the number of leading eigenvalues"),
        "num_examples": (num_examples, "the number of monitored examples, or None for all"),
    }
    for name, (value, meaning) in meant.items():
        if name == "num_examples" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise InputError(f"{name} must be an integer >= 1, {meaning}; got {value!r}.")
    check_damping(damping)
    for name, value, known in (("kind", kind, KINDS), ("option existing=", existing, EXISTING)):
        if value not in known:
            raise InputError(errors.UNKNOWN_NAME.format(what=name, name=value, hint=errors.nearest(str(value), known)))
    number = isinstance(max_share, numbers.Real) and not isinstance(max_share, bool)
    if max_share is not None and not (number and 0 < max_share < 1):
        raise InputError(
            f"max_share must be a number between 0 and 1, a share of the wall time such as 0.05, or None; got {max_share!r}."
        )
    for name, value in (("start", start), ("strict", strict)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {value!r}.")
    if keep_hooks is not None and not isinstance(keep_hooks, bool):
        raise TypeError(f"keep_hooks must be True, False or None; got {keep_hooks!r}.")
