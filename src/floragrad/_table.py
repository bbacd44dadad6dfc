"""Base of the reports: rows of a table as text, as HTML for notebooks, and as records."""

from dataclasses import asdict
from html import escape
from typing import Any, ClassVar, Generic, TypeVar

from floragrad._text import format_table

Row = TypeVar("Row")


class TableReport(Generic[Row]):
    """Table with totals below it; a subclass is a dataclass with ``rows`` of dataclasses."""

    header: ClassVar[tuple[str, ...]]
    rows: tuple[Row, ...]

    def cells(self, row: Row) -> tuple[str, ...]:
        """Return a line of the table."""
        raise NotImplementedError

    def totals(self) -> list[str]:
        """Return the lines below the table."""
        raise NotImplementedError

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return each row as a dictionary of plain values."""
        return [asdict(row) for row in self.rows]  # type: ignore[call-overload]

    def to_pandas(self) -> Any:
        """Return the rows as a :class:`pandas.DataFrame`, which needs pandas."""
        from pandas import DataFrame

        return DataFrame(self.to_dicts())

    def __str__(self) -> str:
        return "\n".join([*format_table([self.header, *map(self.cells, self.rows)]), "", *self.totals()])

    def _repr_html_(self) -> str:
        """Return the totals, and the table to unfold, for a notebook."""
        lines = [_html_row("th", self.header), *(_html_row("td", self.cells(row)) for row in self.rows)]
        summary = "<br>".join(map(escape, self.totals()))
        count = f"<summary>{len(self.rows)} tensors</summary>"
        return f"<p>{summary}</p><details>{count}<table>{''.join(lines)}</table></details>"


def _html_row(tag: str, cells: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
