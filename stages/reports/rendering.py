"""Fills in the jinja2 templates of templates/, which are the HTML pages and the model card.

Python computes values; a template shows them. In HTML every value is escaped, and a template that names a value which
it was not given is an error.
"""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from stages.reports.numbers import format_count
from stages.reports.style import COLOURS, DARK, DARK_COLOURS, LIGHT
from stages.reports.verdict import format_number


@cache
def load_environment() -> Environment:
    """The templates' environment, with the filters `number` and `count` and the colours of the themes."""
    environment = Environment(
        loader=PackageLoader("stages.reports"),
        autoescape=select_autoescape(("html.jinja",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(number=format_number, count=format_count)
    environment.globals.update(light=LIGHT, dark=DARK, colours=COLOURS, dark_colours=DARK_COLOURS)
    return environment


def render_template(name: str, **values: object) -> str:
    """The text of one template, such as `report.html.jinja`, with these values."""
    return load_environment().get_template(name).render(**values)
