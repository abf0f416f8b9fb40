"""Numbers with units, as they are shown."""


def shown(size: float) -> str:
    """'12.3 GB', '4.0 MB' or '700 B' of bytes."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:.0f} B"


def scaled(number: float) -> str:
    """'3.97 G' of 3.97e9."""
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.3g} "
