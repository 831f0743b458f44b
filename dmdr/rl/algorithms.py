"""The RL algorithms by the name that a config gives them."""

from __future__ import annotations

from dmdr.rl.dpo import DPO
from dmdr.rl.grpo import GRPO
from dmdr.rl.refl import ReFL

ALGORITHMS = {"refl": ReFL, "dpo": DPO, "grpo": GRPO}
