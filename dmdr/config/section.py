"""The base class of all config sections, and the types of values that sections share."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dmdr.config.secrets import refuse_secret

Argument = Annotated[str, Field(min_length=1)]  # of a flow: Prefect repeats a value that it refuses
Address = Annotated[str, Field(min_length=1), AfterValidator(refuse_secret)]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the config. It is immutable, refuses unknown keys, and does not convert text to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
