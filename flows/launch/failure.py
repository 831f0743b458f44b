"""How a stage fails, wherever it ran."""

from __future__ import annotations

FINAL = (64, 65, 66)  # exit codes: config, data, missing input (sysexits.h)


class StageFailed(RuntimeError):
    """A stage ended without its seal.

    code: its exit code. final: trying again would change nothing. says_more: than the lines of the stage do.
    """

    def __init__(self, stage: str, code: int, why: str, *, final: bool = False, says_more: bool = True) -> None:
        super().__init__(f"{stage}: {why}")
        self.code, self.final, self.says_more = code, final or code in FINAL, says_more
