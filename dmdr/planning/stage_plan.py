"""What a plan of a training stage holds. No torch: it is shown, compared and timed without it."""

from __future__ import annotations

from dataclasses import dataclass, field

from dmdr.planning.work import Tally


@dataclass
class StagePlan:
    """What one training stage needs: memory in bytes on each of `ranks` GPUs, work in FLOPs of one update on all GPUs.

    parts: memory that the stage holds all the time, by name.
    update: the most memory that an update holds beside the parts.
    forward: F, the work of one forward of the bare base on the whole batch, without gradients.
    work: work of one update, by name.
    tallies: the same by operators; the optimizers are one of their own.
    load: memory that is held for a moment while the teacher is loaded in float32.
    teacher: number of the teacher's parameters.
    trained: number of trained parameters of the student and of the fake score.
    warmup: updates of the fake score alone. fake_updates: K, its steps in an update.
    prompts: those that one update rolls out. conditioning: the numbers of a typical prompt's conditioning.
    noise, read: bytes that the CPU of a rank draws and reads for an update.
    reduced, gathered: bytes that an update sends to each rank: gradients that are summed, and with FSDP the weights.
    """

    stage: str
    updates: int
    ranks: int
    parts: dict[str, int] = field(default_factory=dict)
    update: int = 0
    forward: float = 0.0
    work: dict[str, float] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    load: int = 0
    teacher: int = 0
    trained: dict[str, int] = field(default_factory=dict)
    warmup: int = 0
    fake_updates: int = 1
    prompts: int = 0
    conditioning: int = 0
    noise: int = 0
    read: int = 0
    reduced: int = 0
    gathered: int = 0

    @property
    def total(self) -> float:
        """Work of the whole stage, the fake score's updates alone included."""
        return self.updates * self.flops + self.warmup * self.warmup_flops

    @property
    def warmup_flops(self) -> float:
        """Work of one update of the fake score alone: a rollout, K of its steps, and one forward of the teacher."""
        step = self.work.get("fake score", 0.0) / (self.fake_updates - 1) if self.fake_updates > 1 else 3 * self.forward
        return self.work["rollout"] + self.fake_updates * step + self.forward

    @property
    def peak(self) -> int:
        return sum(self.parts.values()) + self.update

    @property
    def flops(self) -> float:
        return sum(self.work.values())

    @property
    def equivalents(self) -> float:
        """Work of one update without the reward, in units of F."""
        return (self.flops - self.work.get("reward", 0.0)) / self.forward

    @property
    def needed(self) -> float:
        """Work of one update of which nothing is computed twice to save memory."""
        return self.flops - sum(tally.again for tally in self.tallies.values())

    @property
    def floor(self) -> float:
        """What `equivalents` would be without gradient checkpointing."""
        again = sum(tally.again for name, tally in self.tallies.items() if name != "reward")
        return self.equivalents - again / self.forward

    def set_work(self, name: str, tally: Tally) -> None:
        """Note the work of a part of one update, on all GPUs."""
        self.work[name], self.tallies[name] = tally.flops, tally
