"""How a stage fails, wherever it runs."""

from __future__ import annotations

from dmdr.errors import FINAL


class StageFailed(RuntimeError):
    """A stage ended without its seal.

    exit_code: of the stage. final: another try would end the same. says_more: the message says more than the stage's
    own lines do.
    """

    def __init__(self, stage: str, exit_code: int, why: str, *, final: bool = False, says_more: bool = True) -> None:
        super().__init__(f"{stage}: {why}")
        self.exit_code, self.final, self.says_more = exit_code, final or exit_code in FINAL, says_more
