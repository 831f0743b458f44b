"""What the ways to encode prompts cost, by the plan and by the files that the stage prompts writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, Qwen3Config, Qwen3Model, T5Config
from transformers import T5EncoderModel as T5

from dmdr.config.inputs import Prompts, Teacher
from dmdr.config.load import load_config
from dmdr.planning import architectures
from dmdr.planning.gpus import GIB
from dmdr.planning.prompts import add_text_encoders, choose, list_ways
from dmdr.planning.stage_plan import StagePlan
from dmdr.planning.text_encoders import count_text_bytes
from dmdr.promptset.encode import MOST_STORED, choose_layout, count_numbers
from dmdr.teacher.load import load_pipeline
from stages.prompt_sources.counting import count_prompts
from tests.support.tiny_teachers import copy_teacher
from tests.support.trained_run import run_stage

PUBLISHED = {
    architectures.CLIP_L: (CLIPTextModel, CLIPTextConfig(hidden_size=768, intermediate_size=3072)),
    architectures.CLIP_G: (
        CLIPTextModelWithProjection,
        CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            projection_dim=1280,
        ),
    ),
    architectures.T5_XXL: (
        T5,
        T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        ),
    ),
    architectures.QWEN3_4B: (
        Qwen3Model,
        Qwen3Config(
            vocab_size=151936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
        ),
    ),
}


@pytest.mark.parametrize("parameters", PUBLISHED)
def test_text_encoders_have_the_parameters_of_their_configs(parameters: int) -> None:
    kind, config = PUBLISHED[parameters]
    with torch.device("meta"):
        encoder = kind(config)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters


@pytest.mark.parametrize("family", ["sd3", "sdxl", "z_image", "flux"])
def test_text_encoders_of_a_folder(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    parts = {name: part for name, part in load_pipeline(folder).components.items() if name.startswith("text_encoder")}
    size = sum(each.numel() * 4 for part in parts.values() if part is not None for each in part.parameters())
    assert count_text_bytes(Teacher(path=str(folder), guidance_scale=1.0)) == size


def test_the_choice_goes_by_size() -> None:
    numbers = 333 * 4096 + 2048  # of SD3.5-Large
    few = MOST_STORED // (4 * numbers)
    asked = {
        ("auto", "float32", few): "joined",
        ("auto", "float32", few + 1): "text",
        ("auto", "bfloat16", few + 1): "rows",
        ("auto", "bfloat16", 2 * few + 2): "text",
        ("stage", "float32", few): "joined",
        ("stage", "float32", few + 1): "rows",  # too large to hold whole shards in memory
        ("stage", "bfloat16", 1): "rows",
        ("on_the_fly", "float32", 1): "text",
    }
    for (encode, dtype, count), layout in asked.items():
        assert choose_layout(Prompts(sources=["a"], encode=encode, dtype=dtype), count, numbers) == layout


def test_a_plan_is_what_the_stage_stores(tiny_config, tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    """SDXL's prompts all have the same size. The plan's figure for a record is a round one."""
    teacher = {"path": str(tiny_sdxl_folder), "guidance_scale": 3.0}
    numbers = count_numbers(copy_teacher(tiny_sdxl_folder).blank())
    config = load_config(tiny_config(teacher=teacher))
    plans = [StagePlan("cold_start", 10, 1, prompts=3, conditioning=numbers)]
    count = count_prompts(config.prompts)
    assert (count.train, count.evaluation, count.exact) == (14, 6, True)
    stored = {way.dtype: way for way in list_ways(config, count.total, plans, 5) if way.name == "stage"}
    for dtype, way in stored.items():
        sized = load_config(tiny_config(teacher=teacher, prompts={**config.prompts.model_dump(), "dtype": dtype}))
        folder = run_stage(sized, tmp_path / dtype, "prompts")
        is_shard = re.compile(r"(train|evaluation)-\d+\.(items|safetensors)").fullmatch
        shards = [path for path in folder.iterdir() if is_shard(path.name)]
        items = sum(path.stat().st_size for path in shards)
        assert items == pytest.approx(way.stored, rel=0.1)
    assert stored["float32"].read == min(30 * stored["float32"].each, 2 * stored["float32"].stored)


def test_the_way_is_marked_and_its_memory_counted(tiny_config) -> None:
    plans = [StagePlan("cold_start", 2000, 8, prompts=80, conditioning=333 * 4096 + 2048)]
    config = load_config(tiny_config())
    layout = choose(config, 256_000, plans)
    ways = list_ways(config, 256_000, plans, 11 * GIB)
    assert [way.name for way in ways if way.is_chosen(config, layout)] == ["on_the_fly"]
    assert ways[0].stored == pytest.approx(1.4e12, rel=0.02)  # what the issue began with
    assert ways[1].stored == pytest.approx(0.7e12, rel=0.02)
    assert [way.kept for way in ways[:2]] == [32 * GIB] * 2
    add_text_encoders(config, layout, plans, 11 * GIB)
    assert plans[0].peak == 11 * GIB
    beside = config.model_copy(update={"execution": config.execution.model_copy(update={"text_encoders": "cpu"})})
    plans[0].parts.clear()
    add_text_encoders(beside, layout, plans, 11 * GIB)
    assert plans[0].peak == 0


def test_public_sets_are_counted_without_fetching_them() -> None:
    count = count_prompts(Prompts(sources=["lab:train"], evaluation="set:geneval"))
    assert (count.evaluation, count.exact) == (553, False)
    assert count.train > 1000
