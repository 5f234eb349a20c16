"""Numbers as a reader wants them, and small pieces of sentences that depend on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
UNKNOWN = "–"


def num(value: float, digits: int = 3) -> str:
    """A number with some significant digits: ``1,234``, ``0.0123``, ``2.4 × 10⁻⁷``; a dash where it is not finite.

    Examples
    --------
    >>> num(1234.5), num(0.012345), num(2.4e-7, 2), num(float("nan"))
    ('1,230', '0.0123', '2.4 × 10⁻⁷', '–')
    """
    value = float(value)
    if not math.isfinite(value):
        return UNKNOWN if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    size = math.floor(math.log10(abs(rounded)))
    if size < -3 or size >= 6:
        lead = rounded / 10.0**size
        return f"{lead:.{digits - 1}f} × 10{str(size).translate(_RAISED)}".replace("-", "−")
    return f"{rounded:,.{max(0, digits - 1 - size)}f}".replace("-", "−")


def fixed(value: float, places: int = 2) -> str:
    """A number between 0 and 1 with this many decimals, so that columns can be compared."""
    return f"{float(value):.{places}f}".replace("-", "−") if math.isfinite(float(value)) else UNKNOWN


def plain(value: float) -> str:
    """A setting as a person would write it: ``0.003``, ``1e-4``, ``10``.

    Examples
    --------
    >>> plain(0.003), plain(1e-4), plain(10.0)
    ('0.003', '1e-4', '10')
    """
    lead, _, power = f"{float(value):g}".partition("e")
    if not power and abs(value) < 1e-3 and value:
        lead, _, power = f"{float(value):.6e}".partition("e")
        lead = lead.rstrip("0").rstrip(".")
    return f"{lead}e{int(power)}" if power else lead


def count(value: float) -> str:
    """A whole number with thousands separated; a dash where it is not finite."""
    return f"{round(float(value)):,}" if math.isfinite(float(value)) else UNKNOWN


def share(value: float) -> str:
    """A share in [0, 1] as per cent.

    Examples
    --------
    >>> share(0.1234), share(0.0123), share(0.99997), share(0.0)
    ('12 %', '1.2 %', '> 99.9 %', '0 %')
    """
    value = float(value)
    if not math.isfinite(value):
        return UNKNOWN
    if 0 < value < 0.0005:
        return "< 0.1 %"
    if 0.9995 < value < 1:
        return "> 99.9 %"
    whole = 100 * value
    close = (0 < abs(whole) < 9.95 or 98.95 < whole < 100) and abs(whole - round(whole)) > 1e-9
    return f"{whole:.1f} %" if close else f"{whole:.0f} %"


def p_value(value: float, draws: int) -> str:
    """A permutation p-value; its smallest possible value is a bound set by the number of permutations."""
    if not math.isfinite(value):
        return UNKNOWN
    least = 1 / (1 + draws)
    return f"≤ {least:.3f}" if value <= least * 1.0001 else f"{value:.3f}"


def seconds(value: float) -> str:
    """A duration: ``0.42 s``, ``12 s``, ``2 min 05 s``."""
    if not math.isfinite(value):
        return UNKNOWN
    if value < 9.95:
        return f"{value:.2f} s" if value < 0.995 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def times(factor: float) -> str:
    """A factor in words: ``3.2 times``, ``0.4 times``.

    Examples
    --------
    >>> times(3.21), times(40.2), times(0.41)
    ('3.2 times', '40 times', '0.41 times')
    """
    return f"{num(factor, 2)} times" if math.isfinite(factor) else "an unknown factor"


def change(before: float, after: float) -> str:
    """What became of a positive number, as a verb phrase.

    Examples
    --------
    >>> change(1.0, 8.0), change(8.0, 1.0), change(1.0, 1.01)
    ('grew 8.0 times', 'fell to 12 % of that', 'hardly changed')
    """
    if not (math.isfinite(before) and math.isfinite(after)) or before <= 0 or after < 0:
        return f"went from {num(before)} to {num(after)}"
    factor = after / before
    if 0.95 < factor < 1.05:
        return "hardly changed"
    return f"grew {times(factor)}" if factor > 1 else f"fell to {share(factor)} of that"


def listing(items: Sequence[str], last: str = "and") -> str:
    """``a, b and c``; a dash for nothing."""
    items = list(items)
    if len(items) < 2:
        return items[0] if items else UNKNOWN
    return f"{', '.join(items[:-1])} {last} {items[-1]}"


def plural(number: int, one: str, many: str | None = None) -> str:
    """``1 pair``, ``2 pairs``, ``no pair``."""
    return f"{count(number) if number else 'no'} {one if number in (0, 1) else many or one + 's'}"
