"""Tables as the page shows them, and how their numbers are written."""

import dataclasses

import markupsafe

from mtl_jax import tables


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    small: str = ""
    style: str = ""
    drawing: markupsafe.Markup | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One row; `total` rows stay below the others when the table is sorted."""

    tokens: str
    hidden: bool
    cells: tuple[Cell, ...]
    total: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns as (title, whether it is of texts), rows, and how many rows found no place."""

    columns: tuple[tuple[str, bool], ...]
    rows: tuple[Row, ...]
    left_out: int = 0


def p_text(p: float) -> str:
    """A p-value with three decimals."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def name_cell(text: str, small: str) -> Cell:
    """The first cell of a row, with small print below."""
    return Cell(text, small, "left name")


def ends_text(ends: tuple[float, float] | None, places: int, unknown: str = tables.UNKNOWN) -> str:
    """An interval as text."""
    return unknown if ends is None else f"{ends[0]:.{places}f} to {ends[1]:.{places}f}"
