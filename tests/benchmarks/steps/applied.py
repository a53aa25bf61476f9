"""A step that is timed must have been one."""

from __future__ import annotations

from t2i.engine.engine import StepResult


def applied(result: StepResult) -> None:
    """Raises RuntimeError where the update was not applied: a benchmark of such steps means nothing."""
    if result.skip_reason is not None:
        where = f", in {', '.join(result.not_finite[:3])} ..." if result.not_finite else ""
        raise RuntimeError(f"the update was not applied: {result.skip_reason}{where}")
