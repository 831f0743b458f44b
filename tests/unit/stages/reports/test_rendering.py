"""The templates: all compile and are part of the package, HTML is escaped, and a missing value is an error."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from stages.reports.rendering import load_environment, render_template
from tests.support.html import EVIL

ROOT = Path(__file__).parents[4]
TEMPLATES = sorted(path.name for path in (ROOT / "stages" / "reports" / "templates").iterdir())


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_compiles_and_says_what_it_is_for(name: str):
    environment = load_environment()
    environment.get_template(name)
    assert name.endswith((".html.jinja", ".css.jinja", ".md.jinja"))
    assert environment.loader.get_source(environment, name)[0].startswith("{#")


def test_the_package_has_all_templates():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    packed = {path.name for pattern in data["stages"] for path in (ROOT / "stages").glob(pattern)}
    assert packed == set(TEMPLATES)


def test_html_is_escaped_and_markdown_is_not():
    environment = load_environment()
    assert environment.autoescape("report.html.jinja")
    assert not environment.autoescape("model_card.md.jinja")
    macros = environment.get_template("macros.html.jinja").module
    assert "<script>" not in macros.metric(EVIL, False)


def test_a_value_that_nobody_gave_is_an_error():
    with pytest.raises(UndefinedError, match="page"):
        render_template("report.html.jinja")
