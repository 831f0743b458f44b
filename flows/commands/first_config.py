"""The text of a first config: what `dmdr init` has found out, as commented YAML."""

from __future__ import annotations

import json
from dataclasses import dataclass

from dmdr.config.families import FamilyFacts

NO_REWARD = """\
  # No reward: none of their weights is in the cache of the hub's library, and the hub does not answer. So joint
  # training is distillation alone. DMDR fetches the weights of hpsv2.1, dfn-clip, pickscore, imagereward, aesthetic
  # and clip-score itself, or takes yours from a section of the config, for example
  # weights: {hpsv2.1: /models/HPS_v2.1_compressed.pt}
  # rl:
  #   algorithm: refl
  #   weight: 1.0
  #   weight_is: matched
  #   rewards: {hpsv2.1: 1.0}
"""


@dataclass(frozen=True)
class Size:
    """How much is trained and how. micro: None for the whole batch at once. rate: of both networks of a small teacher;
    None: those of the family, for LoRAs that begin as the authors' do."""

    updates: int
    batch: int
    rank: int
    precision: str
    micro: int | None = None
    checkpointing: bool = False
    tiled: bool = False
    rate: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Rewards:
    """The rewards whose weights were found. train, watch: of joint training; metrics: of evaluation."""

    train: tuple[str, ...] = ()
    watch: str | None = None
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """The prompts. share: that is held out; column: of the file, None for the usual one; note: what was counted."""

    path: str
    share: float
    column: str | None = None
    note: str = ""


@dataclass(frozen=True)
class FirstConfig:
    """All that a first config says. resolution: None for the family's own."""

    run: str
    facts: FamilyFacts
    teacher: str
    source: Source
    rewards: Rewards
    size: Size
    resolution: int | None = None

    def to_yaml(self, head: list[str]) -> str:
        """The config. head: lines of the comment at its top."""
        sections = (self._describe_inputs(), self._describe_student(), self._describe_training(), self._describe_rest())
        return "\n".join([*(f"# {line}".rstrip() for line in head), *sections])

    def _describe_inputs(self) -> str:
        facts, source = self.facts, self.source
        column = f"  column: {json.dumps(source.column)}\n" if source.column else ""
        resolution = f"  resolution: {self.resolution}        # its autoencoder's\n" if self.resolution else ""
        return f"""\
run: {self.run}
seed: 0

teacher:
  path: {json.dumps(self.teacher)}
  guidance_scale: {facts.guidance}   # {facts.guidance_source}
  steps: 25             # of the teacher in evaluation; DMDR, Table 1
{resolution}
prompts:
  sources: [{json.dumps(source.path)}]{f"   # {source.note}" if source.note else ""}
{column}  evaluation_share: {source.share:g}   # held out for the scorecard; or name a file of its own: evaluation: FILE
"""

    def _describe_student(self) -> str:
        size, wide = (
            self.size,
            "  lora_targets: wide    # authors' code, t2i: convolutions too\n" if self.facts.wide else "",
        )
        alpha = (
            f"  lora_alpha: {2.0 * size.rank:<9g} # authors' code, t2i: twice the rank\n" if size.rate is None else ""
        )
        init = (
            "  lora_init: gaussian   # authors' code, t2i; the rates below belong to it\n" if size.rate is None else ""
        )
        return f"""\
precision: {size.precision}

student:
  steps: 4              # 1, 2, 4 or 8
  form: lora
  lora_rank: {size.rank:<11} # authors' code, t2i: 64
{alpha}{init}  ema: 0.99             # ours

fake_score:
  lora_rank: {min(size.rank, 32):<11} # authors' code, t2i: 32
  scale: 2.0            # official demo; authors' code, t2i
{init}{wide}"""

    def _describe_training(self) -> str:
        size, facts = self.size, self.facts
        note = f"   # {size.note}" if size.note else ""
        length = size.updates if facts.is_dynamic else 0
        dynamic = f"{{updates: {length}, real_scale: 0.5, renoise: [4.0, 1.5]}}"
        why = "authors' code, t2i: the whole stage" if facts.is_dynamic else "off, as the authors have it for SDXL"
        source = facts.rate_source if size.rate is None else "for a small network"
        return f"""\
cold_start:             # distillation alone
  updates: {size.updates}{note}
  batch_size: {size.batch}        # the authors: 32 to 192
  # rates: {source}
  student: {{{self._describe_optimizer(facts.rate, 1, "0.01")}}}
  fake_score: {{{self._describe_optimizer(facts.fake_rate, 1, "0.0")}}}
  dynamic: {dynamic}   # {why}
  watch: {{every: 100, prompts: 32}}   # warns of blank, blurred or broken images

joint:                  # distillation and reward at once
  updates: {size.updates}
  batch_size: {size.batch}
  # rates: half of the cold start's (official demo)
  student: {{{self._describe_optimizer(facts.rate, 2, "0.01")}}}
  fake_score: {{{self._describe_optimizer(facts.fake_rate, 2, "0.0")}}}
{self._describe_reward()}"""

    def _describe_optimizer(self, rate: float, part: int, decay: str) -> str:
        """AdamW as in the authors' code, t2i. part: what the family's rate is divided by."""
        rate = (self.size.rate or rate) / part
        return f"learning_rate: {_rate(rate)}, kind: fused, betas: [0.9, 0.999], weight_decay: {decay}"

    def _describe_reward(self) -> str:
        rewards = self.rewards
        if not rewards.train:
            return NO_REWARD
        shares = ", ".join(f"{name}: 1.0" for name in rewards.train)
        decoder = "\n    decoder: tiled      # less memory than whole" if self.size.tiled else ""
        watch = f"  watch: {{every: 100, reward: {rewards.watch}}}   # held out: warns of reward hacking\n"
        return f"""\
  rl:
    algorithm: refl     # DMDR, 4.1
    weight: 1.0         # as large as the distribution matching loss when RL starts
    weight_is: matched
    rewards: {{{shares}}}{decoder}
{watch if rewards.watch else ""}"""

    def _describe_rest(self) -> str:
        size, metrics = self.size, self.rewards.metrics
        judged = f"  metrics: [{', '.join(metrics)}]"
        if not metrics:
            judged = "  metrics: []           # none has its weights here (see joint); diversity and speed are measured"
        micro = f"  micro_batch_size: {size.micro}   # samples in one pass of a network\n" if size.micro else ""
        saving = "  gradient_checkpointing: all\n" if size.checkpointing else ""
        return f"""\
evaluate:
{judged}
  limit: 500            # prompts at most
  seeds: {1 if metrics else 2}              # images of a prompt; with 2 or more, diversity is measured
  batch_size: 4

execution:              # changes no result
{micro}{saving}  checkpoint_every: 50
"""


def _rate(value: float) -> str:
    """A learning rate as people write it: 5.0e-5."""
    number, exponent = f"{value:.1e}".split("e")
    return f"{number}e{int(exponent)}"
