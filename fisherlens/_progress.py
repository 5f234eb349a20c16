"""The one place that draws progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm.auto import tqdm


def progress(iterable_or_total: Iterable[Any] | int, *, desc: str, enabled: bool | None = None) -> tqdm:
    """Wrap an iterable, or count to a total, with a progress bar on standard error.

    Parameters
    ----------
    iterable_or_total
        What to iterate over, or the number of steps; the latter bar is moved on by its ``update(steps)``.
    desc
        What is being done, in a few words.
    enabled
        True draws and False is silent. None draws where standard error is a terminal, so that tests, logs and
        pipes stay clean.

    Returns
    -------
    A ``tqdm`` bar: iterable, and a context manager that clears up after an exception too.

    Examples
    --------
    >>> with progress(3, desc="Capture", enabled=False) as bar:
    ...     for step in range(3):
    ...         _ = bar.update(1)
    >>> list(progress("abc", desc="Letters", enabled=False))
    ['a', 'b', 'c']
    """
    from tqdm.auto import tqdm

    if enabled is None:
        enabled = sys.stderr is not None and sys.stderr.isatty()
    if isinstance(iterable_or_total, int):
        return tqdm(total=iterable_or_total, desc=desc, disable=not enabled)
    return tqdm(iterable_or_total, desc=desc, disable=not enabled)
