"""A circuit as a picture of two columns, in SVG."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsefeat.attribution.circuit import Circuit

WIDTH, ROW, TOP = 720, 34, 56
LEFT, RIGHT = 240, 480  # where the lines begin and end
MORE, LESS = "#1f5fbf", "#c0392b"


def drawing(circuit: Circuit) -> str:
    """The text of the file."""
    columns = [
        list(dict.fromkeys(edge.upstream for edge in circuit.edges)),
        list(dict.fromkeys(edge.downstream for edge in circuit.edges)),
    ]
    height = TOP + ROW * max(1, *map(len, columns)) + 40
    places = [
        {latent: TOP + (i + 0.5) * (height - TOP - 40) / len(column) for i, latent in enumerate(column)}
        for column in columns
    ]
    strongest = max((abs(edge.ablation) for edge in circuit.edges), default=1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="20" font-weight="bold">{escape("; ".join(circuit.prompts))}</text>',
        f'<text x="{LEFT}" y="42" text-anchor="end" fill="#555">{escape(circuit.upstream[-38:])}</text>',
        f'<text x="{RIGHT}" y="42" fill="#555">{escape(circuit.downstream[-38:])}</text>',
    ]
    for edge in reversed(circuit.edges):  # the strongest on top
        begin, end, middle = places[0][edge.upstream], places[1][edge.downstream], (LEFT + RIGHT) / 2
        parts.append(
            f'<path d="M{LEFT + 6} {begin:.1f} C{middle} {begin:.1f} {middle} {end:.1f} {RIGHT - 6} {end:.1f}" fill="none" '
            f'stroke="{MORE if edge.ablation > 0 else LESS}" stroke-opacity="0.65" '
            f'stroke-width="{max(0.6, 9 * abs(edge.ablation) / strongest):.2f}">'
            f"<title>{edge.upstream} to {edge.downstream}: {edge.ablation:+.4g} ({edge.gradient:+.4g})</title></path>"
        )
    for side, (x, anchor, shift) in enumerate(((LEFT, "end", -8), (RIGHT, "start", 8))):
        for latent, y in places[side].items():
            name = f"{latent} {circuit.names[side].get(latent, '')}".strip()
            parts.append(f'<circle cx="{x}" cy="{y:.1f}" r="5" fill="#222"/>')
            parts.append(f'<text x="{x + shift}" y="{y + 4:.1f}" text-anchor="{anchor}">{escape(name[:34])}</text>')
    legend = f"width: change of activation when the left latent is taken out; the widest {strongest:.3g}"
    parts.append(
        f'<text x="12" y="{height - 12}" fill="#555">{legend}. <tspan fill="{MORE}">blue: makes more active</tspan>, '
        f'<tspan fill="{LESS}">red: less</tspan></text>'
    )
    return "\n".join([*parts, "</svg>"])
