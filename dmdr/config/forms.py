"""The forms in which a student is exported. Without pydantic, so that help texts read them quickly."""

from __future__ import annotations

from typing import Literal, get_args

Form = Literal["pipeline", "lora", "weights", "single-file"]
FORMS: tuple[Form, ...] = get_args(Form)
