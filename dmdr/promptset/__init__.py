"""The PromptSet: prompts and their conditioning on disk, written shard by shard and read at random."""

from dmdr.promptset.layout import Split, spread_evenly
from dmdr.promptset.read import PromptSet
from dmdr.promptset.write import write_shard, write_unconditional

__all__ = ["PromptSet", "Split", "spread_evenly", "write_shard", "write_unconditional"]
