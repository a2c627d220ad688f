"""When a run ends that takes no step any more: what the training loops share."""

from dataclasses import dataclass

import anybatch

LIMIT = 100  # a GradScaler needs about 20 skipped steps in a row to find its factor


@dataclass
class Attempts:
    """Counts skipped steps by the controller's own count: under a GradScaler the controller does not see them.

    Args:
        steps: steps that were taken.
        skipped: steps that were not.
        in_a_row: of these, those since the last step that was taken.
    """

    steps: int = 0
    skipped: int = 0
    in_a_row: int = 0

    def count(self, controller: anybatch.Controller) -> None:
        """To be called after every attempt at a step."""
        skipped = controller.steps == self.steps
        self.steps = controller.steps
        self.skipped += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    def give_up(self) -> None:
        """The weights are not finite."""
        self.in_a_row = LIMIT

    @property
    def hopeless(self) -> bool:
        """Whether no finite gradient is to be expected any more."""
        return self.in_a_row >= LIMIT
