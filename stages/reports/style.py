"""The colours of the pages, in light and in dark; templates/style.css.jinja uses them.

Text has a contrast of at least 4.5 with what lies behind it, curves and bars of at least 3 (WCAG 2.1, AA).
"""

from __future__ import annotations

LIGHT = {
    "ink": "#1b1e24",
    "faint": "#565d68",
    "paper": "#ffffff",
    "card": "#f3f4f7",
    "line": "#d5d9e0",
    "good": "#11703a",
    "bad": "#b3261e",
    "mark": "#b23a08",
}
DARK = {
    "ink": "#e7e9ee",
    "faint": "#a6aebb",
    "paper": "#14161a",
    "card": "#1e2127",
    "line": "#3a404b",
    "good": "#5fd08b",
    "bad": "#ff8a80",
    "mark": "#ffa062",
}
COLOURS = (
    "#2457c5",
    "#c2410c",
    "#137a3e",
    "#8b3fb0",
    "#0e7c86",
    "#8a6410",
    "#b3266b",
    "#5d6470",
)  # of what is compared
DARK_COLOURS = ("#7fa8ff", "#ffa062", "#5fd08b", "#d29bf0", "#5cc8d6", "#dfba5c", "#ff8fbf", "#aeb6c4")
