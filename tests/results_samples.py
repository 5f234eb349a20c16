"""Results that the tests of files save, and what "identical" means for them."""

import json
import re

import numpy as np
import xarray as xr

from fisherlens.results import SCHEMA_VERSION

WORDS = {"long_name": "eigenvalue of F", "units": "nat"}


def rich() -> xr.Dataset:
    """Every dtype, NaN, text beyond ASCII, scalars, an empty axis, and coordinates of several kinds."""
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            "f64": (("layer", "flag"), rng.standard_normal((3, 2)), WORDS),
            "f32": ("layer", np.array([1.5, np.nan, -np.inf], np.float32), {"long_name": "time", "units": "seconds"}),
            "f16": ("layer", np.array([1, np.nan, 3], np.float16)),
            "c128": ("layer", np.array([1, np.nan, 3j])),
            "i64": ("layer", np.array([1, -(2**62), 3])),
            "i32": ("layer", np.array([1, 2, 3], np.int32)),
            "u8": ("layer", np.array([1, 2, 255], np.uint8)),
            "dead": ("layer", np.array([True, False, True])),
            "converged": ((), np.array(True)),
            "trace": ((), np.float64(3.25), {"units": "days since 2020-01-01", "scale_factor_": 2.0}),
            "note": ("layer", np.array(["ünï", "", "層 ∑"])),
            "method": ((), np.array("exact Gram")),
            "none": ("empty", np.zeros(0)),
            "nothing": ("empty", np.zeros(0, dtype="<U3")),
        },
        coords={
            "layer": ["features.0", "(root)", "all"],
            "kind": ("layer", ["conv", "dense", "dense"]),
            "flag": [False, True],
            "damping": 1e-3,
        },
        attrs={
            "schema_version": SCHEMA_VERSION,
            "seed": 0,
            "damping": 1e-3,
            "plan": json.dumps({"0": {"path": "factors"}}),
            "empty": "",
            "text": "ünï",
            "sizes": [1, 2, 3],
            "names": ["a", "bc"],
            "array": np.arange(3.0),
            "big": 2**40,
            "missing": float("nan"),
        },
    )


def small(value: float = 1.0) -> xr.Dataset:
    return xr.Dataset({"x": ("rank", np.full(64, value), WORDS)}, {"rank": np.arange(64)}, {"schema_version": 1})


def full(message: str) -> str:
    return "^" + re.escape(message) + "$"


def check_same(left: xr.Dataset, right: xr.Dataset) -> None:
    xr.testing.assert_identical(left, right)
    for name, variable in left.variables.items():
        kept = right.variables[name]
        assert kept.dtype.kind == variable.dtype.kind
        if variable.dtype.kind != "U":
            assert kept.dtype == variable.dtype
            assert np.asarray(kept.values).tobytes() == np.asarray(variable.values).tobytes()
