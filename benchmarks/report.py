"""What every benchmark prints: the machine, the versions, a table."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax


def heading(title: str) -> None:
    """The title, the machine and the versions."""
    print(title)
    print(f"  {machine()}")


def machine() -> str:
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if "model name" in line]
        processor = names[0].split(":")[1].strip() if names else processor
    packages = ("centralflow", "jax", "equinox", "diffrax", "lineax")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    kind = jax.devices()[0].device_kind
    return f"{kind}, {os.cpu_count()} cores, {processor}; {versions}"


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print("\n".join(table_lines(head, rows)))


def table_lines(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = lambda row: (
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        + " |"
    )
    return [line(head), line(["-" * w for w in widths]), *map(line, rows)]
