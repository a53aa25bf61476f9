"""The part of the config that says which steps are looked into."""

from __future__ import annotations

from pydantic import Field

from t2i.config_base import Section


class ProfilingConfig(Section):
    """Traces of chosen steps of a stage, counted from 1 as in metrics.jsonl."""

    trace_step: int = Field(0, ge=0)
    """First step of the trace (Chrome's format, one file a rank); 0 traces none."""
    trace_steps: int = Field(3, gt=0)
    """Steps in the trace; each takes some MiB of memory and disk on every rank."""
    memory_step: int = Field(0, ge=0)
    """Step whose allocations on the GPU are written down, one file a rank for pytorch.org/memory_viz; 0: none."""
