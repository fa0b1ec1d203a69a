"""Numbers for people: short, and of the same width as they change, so that a display does not jump."""

import math


def count(value: float) -> str:
    """A count of something: "999", "10.2k", "1.54M", "2.10B"."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= unit:
            scaled = value / (1e3 if name == "k" else unit)
            return f"{scaled:.3g}{name}" if scaled < 999.5 else f"{scaled:.0f}{name}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A length of time: "0.4 s", "12 s", "3:05", "1:02:03", "2d 03:00"."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, minutes, seconds_left = rest // 3600, rest // 60 % 60, rest % 60
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"


def nats(value: float) -> str:
    """A loss: four decimals, "nan" and "inf" as they are."""
    return f"{value:.4f}"
