"""How the lab teacher's tokenizer and text encoders were built: they learn to parse captions before any image is seen.

Stable Diffusion 3 begins with text encoders that others have taught; the lab has nobody to do so. Linear heads read
the scene back out of what the transformer will be given: the whole scene from the pooled state, each thing from the
context at its noun. The heads are thrown away. What there is to read, a world says in its `Captions`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from dmdr.config.prompt_record import Need, PromptRecord
from dmdr.lab.fitting import Log
from dmdr.lab.prompts import lab_prompts
from dmdr.lab.world import COLORS, COUNTS, PLURALS, RELATIONS, SHAPES

TOKENS = 16  # prompt length, start and end included; the longest lab prompt has 13
THING = (1 + len(SHAPES), 1 + len(COLORS), 1 + max(COUNTS))  # shape, colour, count; class 0 says "not named"
SCENE = (*THING, *THING, 1 + len(RELATIONS))  # two things in the order of the caption, and how they stand


class TextRecipe(TypedDict):
    """How the text encoders are trained."""

    steps: int
    batch: int
    lr: float


@dataclass(frozen=True)
class Captions:
    """A world's training prompts and how to read them.

    scene_of: a record as classes, one below each of the sizes `scene`. things_of: the things that its caption names, in
    the caption's order, each as classes below the sizes `thing`. nouns: the words at which things stand, one a thing.
    """

    records: tuple[PromptRecord, ...]
    scene: tuple[int, ...]
    scene_of: Callable[[PromptRecord], list[int]]
    thing: tuple[int, ...]
    things_of: Callable[[PromptRecord], list[list[int]]]
    nouns: tuple[str, ...]


def build_tokenizer(folder: Path, records: tuple[PromptRecord, ...]) -> CLIPTokenizer:
    """A CLIP tokenizer over bytes whose merges make each word of the records' prompts one token."""
    words = sorted({word for record in records for word in record["prompt"].split()})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(words * 2, trainer)
    state = json.loads(bpe.to_str())["model"]
    vocab = state["vocab"]
    for letter in pre_tokenizers.ByteLevel.alphabet():
        vocab.setdefault(letter + "</w>", len(vocab))
    tokenizer = CLIPTokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in state["merges"]],  # type: ignore[misc]  # pairs, as its own docstring says
        model_max_length=TOKENS,
        pad_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    broken = [word for word in words if len(tokenizer(word).input_ids) != 3]
    assert not broken, f"words of the world that are not one token: {broken}"
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    """Two causal layers; pooled states (B, width), context (B, TOKENS, width)."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def list_things(record: PromptRecord) -> list[Need]:
    """What a caption names, in its order: metadata lists the object of a relation before its subject."""
    return record["include"][::-1] if record["tag"] == "position" else record["include"]


def thing_classes(need: Need) -> list[int]:
    """A thing as classes of THING."""
    color = 1 + list(COLORS).index(need["color"]) if "color" in need else 0
    return [1 + SHAPES.index(need["class"]), color, need["count"]]


def scene_classes(record: PromptRecord) -> list[int]:
    """A record as classes of SCENE."""
    named = [thing_classes(need) for need in list_things(record)]
    relations = [1 + RELATIONS.index(need["position"][0]) for need in record["include"] if "position" in need]
    return [*named[0], *(named[1] if len(named) > 1 else (0,) * len(THING)), *(relations or [0])]


def lab_captions() -> Captions:
    """The captions of the world of shapes."""
    return Captions(
        lab_prompts("train"),
        SCENE,
        scene_classes,
        THING,
        lambda record: list(map(thing_classes, list_things(record))),
        nouns=(*SHAPES, *PLURALS.values()),
    )


def parse_states(
    states: torch.Tensor, head: torch.nn.Linear, classes: torch.Tensor, sizes: tuple[int, ...]
) -> torch.Tensor:
    """Cross-entropy of the classes (B, len(sizes)) read from states (B, D) by one linear head, summed over `sizes`."""
    logits = head(states).split(sizes, dim=1)
    return torch.stack([F.cross_entropy(each, right) for each, right in zip(logits, classes.T, strict=True)]).sum()


def train_text_encoders(
    tokenizer: CLIPTokenizer, captions: Captions, recipe: TextRecipe, width: int, log: Log
) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """Two encoders whose states side by side name what the training captions ask for."""
    records = captions.records
    ids = tokenizer([r["prompt"] for r in records], padding="max_length", return_tensors="pt").input_ids
    scenes = torch.tensor([captions.scene_of(record) for record in records])
    named = torch.tensor([classes for record in records for classes in captions.things_of(record)])
    nouns = tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in captions.nouns])
    where = torch.isin(ids, torch.tensor(nouns))  # in the order of `named`, row by row
    thing_of = torch.full(ids.shape, -1).masked_scatter(where, torch.arange(len(named)))

    encoders = (build_text_encoder(tokenizer, width), build_text_encoder(tokenizer, width))
    scene_head, thing_head = (torch.nn.Linear(2 * width, sum(sizes)) for sizes in (captions.scene, captions.thing))
    trained = torch.nn.ModuleList([*encoders, scene_head, thing_head])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=recipe["lr"], fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], recipe["steps"], pct_start=0.1)
    for step in range(recipe["steps"]):
        chosen = torch.randint(len(records), (recipe["batch"],))
        states = [encoder(ids[chosen], output_hidden_states=True) for encoder in encoders]
        pooled = torch.cat([each.text_embeds for each in states], dim=-1)
        context = torch.cat([each.hidden_states[-2] for each in states], dim=-1)  # the layer that SD3 reads
        at_noun = where[chosen]
        loss_scene = parse_states(pooled, scene_head, scenes[chosen], captions.scene)
        loss_thing = parse_states(context[at_noun], thing_head, named[thing_of[chosen][at_noun]], captions.thing)
        optimizer.zero_grad()
        (loss_scene + loss_thing).backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            log(f"text {step}/{recipe['steps']} loss scene {loss_scene.item():.4f}, thing {loss_thing.item():.4f}")
    trained.eval()
    return encoders
