"""Types of settings with their ranges."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0, lt=1 << 62)]
NotNegativeInt = Annotated[int, Field(ge=0, lt=1 << 62)]
Count = Annotated[int, Field(gt=0, le=1_000_000)]  # of things that are in memory at the same time
Seed = Annotated[int, Field(ge=0, lt=1 << 31)]
