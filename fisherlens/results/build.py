"""Build the Dataset of an analysis, stamped with how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens._version import __version__
from fisherlens.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

SCHEMA_VERSION = 1


def make_dataset(
    variables: Mapping[str, tuple[Any, Any, Mapping[str, Any]]],
    coords: Mapping[str, Any],
    *,
    operator: Any = None,
    method: str,
    num_matvecs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    **attrs: Any,
) -> xr.Dataset:
    """Build the Dataset of an analysis, stamped with how it was made.

    Parameters
    ----------
    variables
        Name → ``(dims, values, {"long_name": ..., "units": ...})``; values are numbers, arrays or tensors of any
        device. bfloat16, which numpy lacks, becomes float32. Flags such as ``converged`` are variables, not attributes.
    coords
        Name → values (a coordinate of the dim of that name) or ``(dims, values)`` or ``(dims, values, attrs)``.
    operator
        What was analysed, if it is one: its ``kind`` with what belongs to it, ``likelihood``, ``n_data``, ``n_params``, ``dtype``, ``device``, ``seed`` and
        ``plan`` are recorded where it has them.
    method
        The algorithm that produced the numbers, in words.
    num_matvecs
        Products with the operator that were spent, where that is the measure of the cost.
    settings
        The remaining options of the call; recorded as one JSON string.
    **attrs
        Further attributes: strings, numbers or arrays of them. None is left out.

    Returns
    -------
    Dataset with the attributes of ``docs/schema.md``: ``schema_version``, ``fisherlens_version``, ``torch_version``,
    ``created_at`` (UTC, ISO 8601) and those above.

    Raises
    ------
    InputError: a variable without ``long_name`` or ``units``, or with a repeated dim. TypeError: an attribute that a
    file cannot hold (a dict, a boolean, an object).

    Examples
    --------
    >>> ds = make_dataset(
    ...     {"eigenvalue": ("rank", [2.0, 1.0], {"long_name": "eigenvalue of F", "units": "nat"})},
    ...     {"rank": [0, 1]}, method="dense", damping=1e-3)
    >>> float(ds["eigenvalue"][0]), ds.attrs["damping"]
    (2.0, 0.001)
    """
    import xarray as xr

    data = {}
    for name, (dims, values, words) in variables.items():
        missing = [word for word in ("long_name", "units") if not isinstance(words.get(word), str)]
        if missing:
            raise InputError(
                f"Variable {name!r} needs the attribute {missing[0]!r}, a string: plots take labels from it."
            )
        names = (dims,) if isinstance(dims, str) else tuple(dims)
        if len(set(names)) < len(names):
            raise InputError(
                f"Variable {name!r} repeats a dim in {names}; give the two axes two names (block_i, block_j)."
            )
        data[name] = (names, _to_numpy(values), dict(words))
    placed = {}
    for name, entry in coords.items():
        if isinstance(entry, tuple) and len(entry) in (2, 3) and isinstance(entry[0], str | tuple | list):
            placed[name] = (entry[0], _to_numpy(entry[1]), *(dict(extra) for extra in entry[2:]))
        else:
            placed[name] = (name, _to_numpy(entry))
    stamp = {
        "schema_version": SCHEMA_VERSION,
        "fisherlens_version": __version__,
        "torch_version": _torch_version(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **_operator_facts(operator),
        "method": method,
        "num_matvecs": num_matvecs,
        **attrs,
        "settings": None if settings is None else json.dumps(dict(settings), default=_plain, sort_keys=True),
    }
    known = {name: value.item() if isinstance(value, np.generic) else value for name, value in stamp.items()}
    known = {name: value for name, value in known.items() if value is not None}
    check_attrs(known, "the result")
    return xr.Dataset(data, placed, known)


def _operator_facts(operator: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if operator is None:
        return facts
    for name in ("kind", "n_data", "n_params", "seed"):
        facts[name] = getattr(operator, name, None)
    for name in {"mc": ("mc_samples", "mc_sampling"), "empirical": ("rows",)}.get(facts["kind"], ()):
        facts[name] = getattr(operator, name, None)
    likelihood = getattr(operator, "likelihood", None)
    if likelihood is not None:
        facts["likelihood"] = str(getattr(likelihood, "name", likelihood))
    for name in ("dtype", "device"):
        value = getattr(operator, name, None)
        facts[name] = None if value is None else str(value).removeprefix("torch.")
    plan = getattr(operator, "plan", None)
    if plan is not None:
        facts["plan"] = plan.to_json() if hasattr(plan, "to_json") else json.dumps(str(plan))
    return facts


def _to_numpy(values: Any) -> np.ndarray:
    """Any array or tensor as numpy; bfloat16 as float32; lists of words as fixed-width text."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().resolve_conj().resolve_neg()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values
        return np.array(values.numpy())  # a copy: a result must not change with the tensor it came from
    array = np.array(values)
    if array.dtype.kind == "O" and all(isinstance(entry, str) for entry in array.flat):
        return array.astype(str)
    return array


def _plain(value: Any) -> Any:
    """What JSON can hold in place of a value that it cannot."""
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def _torch_version() -> str:
    """The version of torch that made the numbers, read without importing it."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "unknown"


def check_attrs(attrs: Mapping[Any, Any], owner: str) -> None:
    """Refuse the attributes that netCDF cannot hold or hands back as something else."""
    for name, value in attrs.items():
        array = value if isinstance(value, np.ndarray) else None
        if isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value):
            array = np.array(value, dtype=str)
        elif isinstance(value, list | tuple) and all(type(entry) in (int, float) for entry in value):
            array = np.array(value)
        if array is not None:
            fits = array.dtype.kind in "iufU" and array.ndim == 1 and array.size >= 2
        else:
            fits = isinstance(value, str | int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not fits or not isinstance(name, str):
            raise TypeError(
                f"Attribute {name!r} of {owner} must be a string, a number, or a one-dimensional array of at least two of them; "
                f"got {type(value).__name__} {value!r}. netCDF holds nothing else: put a flag into a data variable, "
                "anything nested into a JSON string, and leave None out."
            )
