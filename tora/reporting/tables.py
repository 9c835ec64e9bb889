"""Tables of completions in metric loggers: torchtune's, or any with a `log_table`."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
TABLE = "completions"
_MOST_ROWS = 64
"""Rows of a table that go to a logger; the Parquet file has all."""
_SIDE = 256
"""Pixels of the longer side of an image in a table."""


def log_table(logger: Any, rows: Sequence[Row], step: int) -> None:
    """Show the first rows, and their images, in a logger that can; others are left alone."""
    kind = type(logger).__name__
    if hasattr(logger, "log_table"):
        logger.log_table(rows, step)
    elif kind == "WandBLogger":
        _to_wandb(rows, step)
    elif kind == "TensorBoardLogger":
        _to_tensorboard(logger._writer, rows, step)


def _to_wandb(rows: Sequence[Row], step: int) -> None:
    import wandb

    if wandb.run is not None:
        names, cells = table_cells(rows, wandb.Image)
        table: Any = wandb.Table
        wandb.run.log({TABLE: table(columns=names, data=cells), "global_step": step})


def _to_tensorboard(writer: Any, rows: Sequence[Row], step: int) -> None:
    """As Markdown, and the first rows' images as images."""
    import numpy as np

    if writer is None:
        return
    names, cells = table_cells(rows, None)
    lines = [names, ["---"] * len(names), *([_escaped(cell) for cell in row] for row in cells)]
    writer.add_text(TABLE, "\n".join("| " + " | ".join(line) + " |" for line in lines), step)
    for number, row in enumerate(rows[:4]):
        for image in row.get("images") or ():
            writer.add_image(f"{TABLE}/{number}", np.asarray(_picture(image["bytes"])), step, dataformats="HWC")


def table_cells(rows: Sequence[Row], show: Callable[[Any], Any] | None) -> tuple[list[str], list[list[Any]]]:
    """Column names and cells of the first rows. `show` turns a prompt's first image into a cell; None leaves images
    out."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "images" or show is not None))

    def cell(row: Row, name: str) -> Any:
        if name != "images":
            return row.get(name)
        images = row.get("images") or ()
        return show(_picture(images[0]["bytes"])) if images and show is not None else None

    return names, [[cell(row, name) for name in names] for row in rows[:_MOST_ROWS]]


def _picture(encoded: bytes) -> Any:
    from PIL import Image

    picture = Image.open(io.BytesIO(encoded)).convert("RGB")
    picture.thumbnail((_SIDE, _SIDE))
    return picture


def _escaped(cell: Any) -> str:
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|").replace("\n", "<br>")
