"""Save and load a Dataset or DataTree as one netCDF file.

``docs/schema.md`` describes the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens import errors
from fisherlens.errors import FileFormatError, InputError
from fisherlens.results.build import SCHEMA_VERSION, check_attrs
from fisherlens.results.seal import replacing, require_writable, seal, sweep, verify

if TYPE_CHECKING:
    import xarray as xr

_TREE_NAME = "fisherlens_tree_name"  # netCDF has no name for its root group, a DataTree has


def save(result: xr.Dataset | xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a result to one netCDF file, whole or not at all.

    The file appears under its name only when it is complete, on disk, and has been read back and found identical: a
    killed process leaves the earlier file as it was. What killed processes left behind is swept at the next save into
    the folder. The file is ordinary netCDF-4 (``xarray.open_dataset(path, engine="h5netcdf")`` opens it) with a
    fletcher32 checksum on each numeric array and, behind the HDF5 data, one line with the sha256 of all bytes.

    Parameters
    ----------
    result
        A Dataset, or a DataTree of them, with variables of numbers, booleans and text. Encodings are ignored.
    path
        The file to write, by custom ending in ``.nc``; an existing one is replaced.

    Returns
    -------
    The path of the file, links followed.

    Raises
    ------
    TypeError: ``result`` is neither Dataset nor DataTree, or has an attribute that netCDF cannot hold.
    InputError: the folder is missing or cannot be written (found before any work), or the result cannot be stored
    without change.

    Notes
    -----
    Cost: one write and two reads of the file. :func:`load` is the way back.

    Examples
    --------
    >>> import tempfile, xarray as xr
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(xr.Dataset({"x": ("rank", [2.0, 1.0])}), f"{folder}/run.nc")
    ...     print(load(path)["x"].values)
    [2. 1.]
    """
    import xarray as xr

    if not isinstance(result, xr.Dataset | xr.DataTree):
        raise TypeError(
            f"save takes an xarray Dataset or DataTree, as every analysis returns it; got {type(result).__name__}. "
            "A DataArray becomes one by .to_dataset(name=...)."
        )
    target = require_writable(path)
    if isinstance(result, xr.DataTree) and not result.is_root:
        result = result.copy()  # a branch becomes a tree of its own, with the coordinates it inherited
    _check_storable(result)
    sweep(target.parent)
    try:
        with replacing(target) as temporary:
            container = write_netcdf(result, temporary)
            seal(temporary, container)
            _compare(result, _read(temporary, container), target)
    except OSError as error:
        raise InputError(
            f"Writing {target} failed: {error}. An earlier file of that name is untouched. Is the disk full, or the folder gone?"
        ) from error
    return target


def load(path: str | os.PathLike[str]) -> xr.Dataset | xr.DataTree:
    """Read a result that :func:`save` wrote: identical to what was saved, in memory, the file closed.

    The sha256 of the file is verified before anything in it is interpreted, so a file with any changed, missing or added
    byte is refused and never half believed. It guards against accidents, not against forgery.

    Parameters
    ----------
    path
        A file written by :func:`save`.

    Returns
    -------
    Dataset or DataTree, as saved.

    Raises
    ------
    InputError: there is no such file, or it may not be read.
    FileFormatError: the file is damaged, cut short, not written by fisherlens, changed since by another program, or of
    a newer schema than this version reads.

    Notes
    -----
    Cost: two reads of the file. A netCDF file of another program opens with ``xarray.open_dataset``.
    """
    source = _existing(Path(path))
    try:
        container = verify(source)
    except OSError as error:
        raise InputError(f"Cannot read {source}: {error.strerror}. Check its permissions and the disk.") from error
    try:
        result = _read(source, container)
    except Exception as error:  # HDF5, h5netcdf and xarray raise many types on what they cannot interpret
        raise FileFormatError(
            f"{source} is sealed as a fisherlens file, yet its content cannot be read: {type(error).__name__}: {error}. "
            "Was it written by a very different version of xarray or h5netcdf?"
        ) from error
    for where, node in _nodes(result).items():
        version = node.attrs.get("schema_version", SCHEMA_VERSION)
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise FileFormatError(
                f"{source} has schema_version {version!r} (at {where}); this fisherlens reads up to {SCHEMA_VERSION}. "
                "It was written by a newer release: upgrade fisherlens to read it."
            )
    return result


def _existing(source: Path) -> Path:
    if source.is_dir():
        raise InputError(f"{source} is a folder; name the file in it, such as {source / 'run.nc'}.")
    if not source.exists():
        if not source.parent.is_dir():
            raise InputError(f"No such file: {source}. There is no folder {source.parent} either; check the path.")
        names = sorted(entry.name for entry in source.parent.iterdir() if entry.is_file() and entry.name[0] != ".")
        hint = errors.nearest(source.name, names) if names else "That folder holds no files."
        raise InputError(f"No such file: {source}. {hint}")
    return source


def _nodes(result: xr.Dataset | xr.DataTree) -> dict[str, xr.Dataset]:
    """Path → Dataset without inherited coordinates; a Dataset is its own root."""
    if hasattr(result, "subtree"):
        return {node.path: node.to_dataset(inherit=False) for node in result.subtree}
    return {"/": result}


def _check_storable(result: xr.Dataset | xr.DataTree) -> None:
    for path, node in _nodes(result).items():
        where = "" if path == "/" else f" of {path}"
        check_attrs(node.attrs, f"the result{where}")
        for name, variable in node.variables.items():
            check_attrs(variable.attrs, f"variable {name!r}{where}")
            if hasattr(node.indexes.get(name), "levels"):
                raise InputError(
                    f"Coordinate {name!r}{where} is a MultiIndex, which a file cannot hold. "
                    f"Make it plain coordinates first: result.reset_index({name!r})."
                )
            words = variable.dtype.kind == "O" and all(isinstance(entry, str) for entry in variable.values.flat)
            if variable.dtype.kind not in "iufcbUT" and not words:
                raise InputError(
                    f"Variable {name!r}{where} has dtype {variable.dtype}, which a file cannot hold without change. "
                    "Numbers, booleans and text can be saved; write times as text or as seconds."
                )


def write_netcdf(result: xr.Dataset | xr.DataTree, path: Path) -> str:
    """Write the netCDF file alone, neither sealed nor read back, and say which container it holds, as :func:`fisherlens.results.seal.seal` takes it."""
    import xarray as xr

    nodes = {where: node.drop_encoding() for where, node in _nodes(result).items()}
    encodings = {where: _encoding(node) for where, node in nodes.items()}
    try:
        if isinstance(result, xr.Dataset):
            nodes["/"].to_netcdf(path, engine="h5netcdf", encoding=encodings["/"])
            return "dataset"
        if result.name is not None:
            nodes["/"] = nodes["/"].assign_attrs({_TREE_NAME: result.name})
        xr.DataTree.from_dict(nodes).to_netcdf(path, engine="h5netcdf", encoding=encodings)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(f"This result cannot be written as netCDF: {error}") from error
    return "datatree"


def _encoding(node: xr.Dataset) -> dict[Any, dict[str, Any]]:
    """Checksums on each numeric array (a scalar or text cannot carry one), and no fill value put in place of NaN."""
    encoding: dict[Any, dict[str, Any]] = {}
    for name, variable in node.variables.items():
        if variable.dtype.kind in "iufcb":
            encoding[name] = {"_FillValue": None}
            if variable.ndim and variable.size and variable.dtype.kind != "c":
                encoding[name]["fletcher32"] = True
    return encoding


def _compare(result: xr.Dataset | xr.DataTree, back: xr.Dataset | xr.DataTree, target: Path) -> None:
    """Refuse to publish a file that would not give back what was saved."""
    import xarray as xr

    try:
        xr.testing.assert_identical(result, back)
        other = _nodes(back)
        for where, node in _nodes(result).items():
            for name, variable in node.variables.items():
                kept = other[where].variables[name].dtype
                if variable.dtype.kind not in "OUT" and kept != variable.dtype:
                    raise AssertionError(f"Variable {name!r} of dtype {variable.dtype} comes back as {kept}.")
    except AssertionError as error:
        raise InputError(
            f"netCDF would not give this result back unchanged, so {target.name} was not written. {error}\n"
            "Rename or convert what differs."
        ) from None


def _read(path: Path, container: str) -> xr.Dataset | xr.DataTree:
    """The content, in memory and as stored: units and fill values stay words, and never turn numbers into times."""
    import xarray as xr

    as_stored: dict[str, Any] = {"mask_and_scale": False, "decode_times": False, "decode_timedelta": False}
    if container == "dataset":
        return _tidy(xr.load_dataset(path, engine="h5netcdf", **as_stored))
    tree = xr.load_datatree(path, engine="h5netcdf", **as_stored)
    nodes = {where: _tidy(node) for where, node in _nodes(tree).items()}
    return xr.DataTree.from_dict(nodes, name=nodes["/"].attrs.pop(_TREE_NAME, None))


def _tidy(node: xr.Dataset) -> xr.Dataset:
    """Text as fixed-width arrays, attributes as Python numbers, and nothing left of the file it came from."""
    node = node.drop_encoding()
    words = {name: v for name, v in node.variables.items() if v.dtype.kind == "O"}
    node = node.assign({name: (v.dims, v.values.astype(str), v.attrs) for name, v in words.items()})
    for attrs in (node.attrs, *(variable.attrs for variable in node.variables.values())):
        for name, value in attrs.items():
            if isinstance(value, np.integer | np.floating):
                attrs[name] = value.item()
    return node
