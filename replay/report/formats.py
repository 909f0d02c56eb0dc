"""Numbers as people read them: one place, so that terminal, Markdown and page agree to the digit."""

from __future__ import annotations

import math
from typing import Final

NOT_MEASURED: Final = "–"
BEYOND: Final = "> time-out"


def significant(number: float, digits: int = 3) -> str:
    """``number`` to ``digits`` significant digits, thousands with commas, never in scientific notation.

    >>> significant(1234.5), significant(0.012345), significant(12.0)
    ('1,234', '0.0123', '12.0')
    """
    if number == 0:
        return "0"
    magnitude = int(f"{number:.{digits - 1}e}".split("e")[1])  # of the rounded number: 0.9996 is 1.00, not 1.000
    return f"{number:,.{max(0, digits - 1 - magnitude)}f}"


def seconds(value_s: float) -> str:
    """A duration in the unit that keeps it short.

    >>> seconds(0.0123), seconds(1.5), seconds(0.0)
    ('12.3 ms', '1.50 s', '0 ms')
    """
    return f"{significant(value_s * 1000)} ms" if abs(value_s) < 0.9995 else f"{significant(value_s)} s"


def share(value: float | None) -> str:
    """A share of 1 as a percentage that never rounds up to 100 %.

    >>> share(0.9999), share(1.0), share(0.953)
    ('99.9 %', '100 %', '95.3 %')
    """
    if value is None:
        return NOT_MEASURED
    if value in (0, 1):
        return f"{value:.0%}".replace("%", " %")
    return f"{min(max(value * 100, 0.1), 99.9):.1f} %"


def percent(value: float | None) -> str:
    """A signed percentage.

    >>> percent(-12.345), percent(0.04), percent(250.0)
    ('−12.3 %', '+0.0 %', '+250 %')
    """
    if value is None:
        return NOT_MEASURED
    digits = 1 if abs(value) < 100 else 0
    return f"{'−' if value < 0 else '+'}{abs(value):,.{digits}f} %"


def value(number: float | None, unit: str) -> str:
    """A figure with its unit; null and infinite in words."""
    if number is None:
        return NOT_MEASURED
    if math.isinf(number):
        return BEYOND
    if unit == "s":
        return seconds(number)
    if unit == "share":
        return share(number)
    if unit.startswith("USD"):
        return f"${number:,.2f}" if number >= 1 else f"${significant(number)}"
    if unit in ("requests", "replicas"):
        return f"{number:,.0f}" if number == round(number) else f"{number:,.{1 if unit == 'requests' else 2}f}"
    suffix = {"1/s": " /s", "tokens/s": " /s"}.get(unit, "")
    return f"{significant(number)}{suffix}"


def difference(number: float | None, unit: str) -> str:
    """A signed absolute difference; of shares in percentage points."""
    if number is None:
        return NOT_MEASURED
    sign = "−" if number < 0 else "+"
    if unit == "share":
        return f"{sign}{abs(number) * 100:.2f} pp"
    return f"{sign}{value(abs(number), unit)}"
