"""Figures as people read them: three digits and a unit that fits."""

from __future__ import annotations

MINUS = "−"


def seconds(value: float) -> str:
    """A duration: 1.49 s, 43 ms, 12.5 µs."""
    return scaled(value, {1: "s", 1e-3: "ms", 1e-6: "µs", 1e-9: "ns"})


def size(value: float) -> str:
    """A number of bytes: 1.2 MB."""
    return scaled(value, {1e12: "TB", 1e9: "GB", 1e6: "MB", 1e3: "kB", 1: "B"})


def scaled(value: float, units: dict[float, str]) -> str:
    """The value in the largest of the units, largest first, of which it is at least one."""
    if not value:
        return "0"
    fitting = (unit for unit in units if abs(value) >= 0.9995 * unit)
    unit = next(fitting, min(units))
    return f"{digits(value / unit)} {units[unit]}"


def digits(value: float) -> str:
    """Three digits, or all of a large number: 0.0123, 1.5, 1,024."""
    rounded = float(f"{value:.3g}")
    text = f"{value:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"
    return text.replace("-", MINUS)
