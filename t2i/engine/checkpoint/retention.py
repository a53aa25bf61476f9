"""Which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """The newest `keep` regular checkpoints, and those at multiples of `keep_every` steps for ever (0: none).

    Of the ephemeral ones the newest is kept, until a regular one is newer.
    """

    keep: int
    keep_every: int = 0

    def outdated(self, ephemeral: Mapping[int, bool], latest: int, needed_before: int | None = None) -> list[int]:
        """The steps of checkpoints that may go.

        Args:
            ephemeral: for the step of each checkpoint there is, whether it is ephemeral.
            latest: step of the one just written. Later ones are damaged, or training would have gone on from them:
                they neither count nor go.
            needed_before: the newest from before this step is kept, for a rollback.
        """
        present = sorted(step for step in ephemeral if step <= latest)
        regular = [step for step in present if not ephemeral[step]]
        stay = {latest, *regular[-self.keep :]}
        stay |= {step for step in regular if self.keep_every and step % self.keep_every == 0}
        if needed_before is not None:  # the newest such: going further back costs steps
            stay |= set([step for step in present if step < needed_before][-1:])
        return [step for step in present if step not in stay]
