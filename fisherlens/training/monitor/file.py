"""The file of a run, written in full after each measurement: whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fisherlens.results import save
from fisherlens.results.files import write_netcdf
from fisherlens.results.seal import replacing, seal

if TYPE_CHECKING:
    import xarray as xr


class RunFile:
    """Writes the growing result of one run to one file, as :func:`fisherlens.save` does.

    The first time it is read back and compared, as after every save. Later results have the same variables with more steps; to read
    each of them back would double the cost of the smallest measurements.
    """

    def __init__(self, path: Path):
        self.path = path
        self._compared: set[str] = set()

    def write(self, result: xr.Dataset) -> None:
        """Replace the file."""
        form = repr([(name, variable.dims, variable.dtype.kind) for name, variable in result.variables.items()])
        if form not in self._compared:
            save(result, self.path)
            self._compared.add(form)
            return
        with replacing(self.path) as temporary:
            seal(temporary, write_netcdf(result, temporary))
