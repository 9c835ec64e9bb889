"""A plan as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tora.plan.places import GIB, RunPlan, gib


def print_plan(name: str, plan: RunPlan, console: Console | None = None) -> None:
    console = console or Console(soft_wrap=True, highlight=False)
    for place in plan.places:
        size = "" if place.capacity is None else f" of {gib(place.capacity)}"
        table = Table(title=f"{name}: {place.title}{size}", title_justify="left", box=None, pad_edge=False)
        table.add_column("what")
        table.add_column("GiB", justify="right")
        for part, size_bytes in place.parts.items():
            if size_bytes:
                table.add_row(part, f"{size_bytes / GIB:.2f}")
        table.add_row("total", f"{place.total / GIB:.2f}")
        if place.capacity is not None:
            table.add_row("left", f"{(place.capacity - place.total) / GIB:.2f}")
        console.print(table)
    console.print(
        f"The key-value cache holds {plan.rollouts:,} rollouts of {plan.longest:,} tokens; an engine has up to "
        f"{plan.wanted:,} at once."
    )
