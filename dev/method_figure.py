"""Draw docs/method.svg, a step of one row of a tensor: ``python -m dev.method_figure > docs/method.svg``."""

import numpy as np

COLUMNS, BUCKETS, BETA1 = 8, 4, 0.9
COLOURS = ("#00796b", "#c2571a", "#5e4bb5", "#8a6d00")
BAR, UNIT, HALF = 22, 30, 62
"""Pixels: width of a bar, height of 1, and half the height of a chart."""


def row() -> dict[str, np.ndarray]:
    """Compute a step of one row, with k = 4 buckets and random signs."""
    draw = np.random.default_rng(3)
    signs = draw.choice([-1.0, 1.0], COLUMNS)
    columns = np.arange(COLUMNS)
    projection = np.zeros((BUCKETS, COLUMNS))
    projection[columns % BUCKETS, columns] = signs
    update = draw.normal(size=COLUMNS).clip(-1.6, 1.6)
    encoded = projection @ update
    previous = draw.normal(size=BUCKETS) * 1.2
    momentum = BETA1 * previous + (1 - BETA1) * encoded
    decoder = projection.T / (COLUMNS // BUCKETS)
    inside, outside = decoder @ momentum, update - decoder @ encoded
    parts = {"previous": previous, "momentum": momentum, "inside": inside, "outside": outside}
    return {"signs": signs, "update": update, "encoded": encoded, "direction": inside + outside, **parts}


def text(x: float, y: float, content: str, size: int = 14, weight: str = "normal", anchor: str = "middle") -> str:
    """Return a line of text."""
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{content}</text>'


def chart(x: float, y: float, values: np.ndarray, title: str, note: str, signs: np.ndarray | None = None) -> list[str]:
    """Return a bar for each value, coloured by bucket, around a zero line at ``y``."""
    width = BAR * len(values)
    parts = [
        text(x + width / 2, y - HALF - 22, title, 15, "bold"),
        text(x + width / 2, y - HALF - 5, note, 12),
        f'<line x1="{x - 4:g}" x2="{x + width + 4:g}" y1="{y:g}" y2="{y:g}" stroke="#888"/>',
    ]
    for column, value in enumerate(values):
        left, height = x + BAR * column + 2, abs(value) * UNIT
        top = y - height if value > 0 else y
        colour = COLOURS[column % BUCKETS]
        parts.append(f'<rect x="{left:g}" y="{top:.1f}" width="{BAR - 4}" height="{height:.1f}" fill="{colour}"/>')
        if signs is not None:
            parts.append(text(left + BAR / 2 - 2, y + HALF + 8, "+" if signs[column] > 0 else "−", 14, "bold"))
    return parts


def arrow(x1: float, y1: float, x2: float, y2: float, label: str, above: float = -8) -> list[str]:
    """Return an arrow with a label beside its middle."""
    line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#444" stroke-width="1.6" marker-end="url(#tip)"/>'
    return [line, text((x1 + x2) / 2, (y1 + y2) / 2 + above, label, 13)]


def figure() -> str:
    """Return the picture as SVG."""
    found = row()
    wide, narrow, top, bottom = BAR * COLUMNS, BAR * BUCKETS, 130, 330
    second, third = 350, 620
    parts = [
        *chart(30, top, found["update"], "U, this step", f"{COLUMNS} columns; signs of P below", found["signs"]),
        *arrow(30 + wide + 12, top, second - 14, top, "encode"),
        *chart(second, top, found["encoded"], "U Pᵀ", f"{BUCKETS} buckets"),
        *arrow(second + narrow + 12, top, third - 14, top, "average"),
        *chart(third, top, found["momentum"], "M, stored", "β₁ M + (1 − β₁) U Pᵀ"),
        *arrow(third + narrow / 2, top + HALF + 12, third + narrow / 2, bottom - HALF - 44, "", 0),
        text(third + narrow / 2 + 12, (top + bottom) / 2 - 12, "decode", 13, anchor="start"),
        *chart(third - 44, bottom, found["inside"], "inside the sketch", "momentum: M (P Pᵀ)⁻¹ P"),
        *arrow(30 + wide / 2, top + HALF + 18, 30 + wide / 2, bottom - HALF - 44, "", 0),
        text(30 + wide / 2 + 12, (top + bottom) / 2 - 8, "minus its own decoded sketch", 13, anchor="start"),
        *chart(30, bottom, found["outside"], "outside: the residual", "fresh: U − U Pᵀ (P Pᵀ)⁻¹ P"),
        *arrow(30 + wide + 12, bottom, second - 58, bottom, "+"),
        *arrow(third - 58, bottom, second - 44 + wide + 14, bottom, "+"),
        *chart(second - 44, bottom, found["direction"], "D, the update", "all 8 columns move"),
    ]
    style = 'viewBox="0 0 780 420" font-family="Helvetica, Arial, sans-serif" fill="#222"'
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    head = f'<defs>{tip}<path d="M0 0 8 4 0 8z" fill="#444"/></marker></defs>'
    title = "<title>One row of a tensor: encode, decode and residual</title>"
    page = f'<svg xmlns="http://www.w3.org/2000/svg" {style}>'
    return "\n".join([page, title, head, '<rect width="780" height="420" fill="#fff"/>', *parts, "</svg>"])


if __name__ == "__main__":
    print(figure())
