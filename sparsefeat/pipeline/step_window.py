"""When an instrument acts: a window of the schedule's steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from sparsefeat.arguments import wholes
from sparsefeat.pipeline.context import Context

Steps: TypeAlias = tuple[float, float] | Iterable[int] | None


@dataclass(frozen=True)
class StepWindow:
    """The steps in which an instrument acts: a half-open range of fractions of the schedule, or a set of step indices."""

    fractions: tuple[float, float] | None
    indices: frozenset[int] | None

    @classmethod
    def parse(cls, steps: Steps) -> StepWindow:
        """A tuple is a pair of fractions, (0.0, 0.5) for the first half; a list, set or range holds step indices."""
        if steps is None:
            return cls(None, None)
        if isinstance(steps, tuple):
            numbers = all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in steps)
            if len(steps) != 2 or not numbers or not 0 <= steps[0] < steps[1] <= 1:
                raise ValueError(
                    f"steps={steps!r} must be (start, stop) with 0 <= start < stop <= 1, fractions of the schedule; "
                    "step indices go in a list, steps=[0, 1, 2]."
                )
            return cls((float(steps[0]), float(steps[1])), None)
        try:
            indices = wholes("steps", steps)
        except ValueError:
            raise ValueError(
                f"steps={steps!r} must be a list of step indices, counted from 0, or a tuple of two fractions, "
                "(0.0, 0.5)."
            ) from None
        return cls(None, frozenset(indices))

    def contains(self, context: Context) -> bool:
        if self.fractions is None and self.indices is None:
            return True
        if context.step is None:
            raise ValueError(
                f"a steps= window means nothing at {context.hookpoint}, which runs before the schedule; leave it out."
            )
        fraction = context.fraction
        return self.has(context.step, context.step / (context.n_steps or 1) if fraction is None else fraction)

    def has(self, step: int, fraction: float) -> bool:
        """Whether the step that begins at this fraction of the schedule is in it."""
        if self.indices is not None:
            return step in self.indices
        start, stop = self.fractions or (0.0, 1.0)
        # The fraction a step began at, with room for its rounding: step 3 of 10 lies in (0.3, 0.5) and not in (0, 0.3).
        return start - 1e-6 <= fraction and (fraction < stop - 1e-6 or stop == 1)

    def to_json(self) -> Any:
        if self.fractions is not None:
            return {"fractions": list(self.fractions)}
        return None if self.indices is None else {"indices": sorted(self.indices)}

    @classmethod
    def from_json(cls, saved: Any) -> StepWindow:
        if saved is None:
            return cls(None, None)
        if "fractions" in saved:
            return cls.parse((saved["fractions"][0], saved["fractions"][1]))
        return cls.parse([int(i) for i in saved["indices"]])
