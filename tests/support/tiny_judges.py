"""The models behind GenEval and DPG-Bench, small and random, as real folders; and some questions of the latter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from dmdr.metrics.detector import NAMES

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
)
ROWS = """\
one,a red dog,,1,0,entity,whole,entity - whole (dog),Is there a dog?
one,a red dog,,2,1,attribute,color,"attribute - color (dog, red)",Is the dog red?
one,a red dog,,3,2,attribute,texture,"attribute - texture (dog, shiny)",Is the red dog shiny?
two,a cup on a table,,1,0,entity,whole,entity - whole (cup),Is there a cup?
two,a cup on a table,,2,0,entity,whole,entity - whole (table),Is there a table?
two,a cup on a table,,3,"1,2",relation,spatial,"relation - spatial (cup, table, on)",Is the cup on the table?
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "dpg_bench.csv").write_text(HEADER + ROWS)
    return tmp_path / "dpg_bench.csv"


@pytest.fixture
def tiny_mask2former(tmp_path):
    """A real Mask2Former with COCO's classes, small and random, as transformers saves it."""
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=10,
        id2label=dict(enumerate(NAMES)),
    )
    network = Mask2FormerForUniversalSegmentation(config)
    torch.nn.init.normal_(network.class_predictor.weight, std=3.0)  # or no class would reach a threshold
    network.save_pretrained(tmp_path / "mask2former")
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, ignore_index=255).save_pretrained(
        tmp_path / "mask2former"
    )
    return tmp_path / "mask2former"


@pytest.fixture
def tiny_blip(tmp_path) -> Path:
    """A real BLIP that answers questions, small and random, as transformers saves it."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "yes",
        "no",
        "is",
        "there",
        "a",
        "dog",
        "cup",
        "the",
        "on",
        "red",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    text = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "encoder_hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
        "projection_dim": 16,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    network = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision, projection_dim=16))
    folder = tmp_path / "blip"
    network.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder
