"""The base of every body that the server reads."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A body, or a part of one: unknown fields and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    allowed: ClassVar[Mapping[str, str]] = {}
    """Field -> what it may be, where the types alone do not read well."""
