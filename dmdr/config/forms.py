"""The forms in which a student can be exported, and the precision of their files. No pydantic here, because help texts
need this file quickly."""

from __future__ import annotations

from typing import Literal, get_args

Form = Literal["pipeline", "lora", "weights", "single-file"]
FORMS: tuple[Form, ...] = get_args(Form)
Dtype = Literal["bfloat16", "float16", "float32"]
