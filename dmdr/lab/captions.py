"""Build the tokenizer and train the text encoders of a lab teacher. They learn to parse captions, without images.

Stable Diffusion 3 starts from text encoders that others have trained; for the lab there are none. Linear heads predict
the scene from the states that the transformer will receive: the whole scene from the pooled state, each thing from the
context at its noun. After training the heads are dropped. A world describes its scenes in `Captions`.
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
from dmdr.lab.vocabulary import COLORS, COUNTS, PLURALS, RELATIONS, SHAPES

TOKENS = 16  # length of a prompt with its start and end tokens; the longest prompt of the lab has 13
THING = (
    1 + len(SHAPES),
    1 + len(COLORS),
    1 + max(COUNTS),
)  # number of classes of shape, colour and count; class 0 means "not named"
SCENE = (*THING, *THING, 1 + len(RELATIONS))  # two things in the order of the caption, and their relation


class TextRecipe(TypedDict):
    """The recipe of the text encoders."""

    steps: int
    batch: int
    lr: float


@dataclass(frozen=True)
class Captions:
    """The training prompts of a world, and the classes that the text encoders learn to predict.

    scene: numbers of classes of a scene's attributes. encode_scene: record -> one class for each of them.
    thing: numbers of classes of a thing's attributes. encode_things: record -> for each thing, in the caption's order,
    one class for each of them. nouns: the words that name things, one word for each thing.
    """

    records: tuple[PromptRecord, ...]
    scene: tuple[int, ...]
    encode_scene: Callable[[PromptRecord], list[int]]
    thing: tuple[int, ...]
    encode_things: Callable[[PromptRecord], list[list[int]]]
    nouns: tuple[str, ...]


def build_tokenizer(folder: Path, records: tuple[PromptRecord, ...]) -> CLIPTokenizer:
    """Build a CLIP tokenizer over bytes and save it. Its merges turn each word of the prompts into one token."""
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
        merges=[tuple(pair) for pair in state["merges"]],  # type: ignore[misc]  # its docstring says pairs
        model_max_length=TOKENS,
        pad_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    broken = [word for word in words if len(tokenizer(word).input_ids) != 3]
    assert not broken, f"these words are not one token: {broken}"
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    """An untrained encoder with two causal layers. Pooled states (B, width), context (B, TOKENS, width)."""
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
    """The things of a caption in its order. Metadata lists the object of a relation before its subject."""
    return record["include"][::-1] if record["tag"] == "position" else record["include"]


def encode_thing(need: Need) -> list[int]:
    """The classes of a thing, one for each number of THING."""
    color = 1 + list(COLORS).index(need["color"]) if "color" in need else 0
    return [1 + SHAPES.index(need["class"]), color, need["count"]]


def encode_scene(record: PromptRecord) -> list[int]:
    """The classes of a record, one for each number of SCENE."""
    things = [encode_thing(need) for need in list_things(record)]
    relations = [1 + RELATIONS.index(need["position"][0]) for need in record["include"] if "position" in need]
    return [*things[0], *(things[1] if len(things) > 1 else (0,) * len(THING)), *(relations or [0])]


def build_lab_captions() -> Captions:
    """The captions of the world of shapes."""
    return Captions(
        records=lab_prompts("train"),
        scene=SCENE,
        encode_scene=encode_scene,
        thing=THING,
        encode_things=lambda record: [encode_thing(need) for need in list_things(record)],
        nouns=(*SHAPES, *PLURALS.values()),
    )


def sum_cross_entropies(
    states: torch.Tensor, head: torch.nn.Linear, classes: torch.Tensor, sizes: tuple[int, ...]
) -> torch.Tensor:
    """Cross-entropy of classes (B, len(sizes)), predicted from states (B, D) by a linear head, summed over `sizes`."""
    logits = head(states).split(sizes, dim=1)
    return torch.stack([F.cross_entropy(part, target) for part, target in zip(logits, classes.T, strict=True)]).sum()


def train_text_encoders(
    tokenizer: CLIPTokenizer, captions: Captions, recipe: TextRecipe, width: int, log: Log
) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """Train two encoders whose concatenated states say what a caption asks for."""
    records = captions.records
    ids = tokenizer([r["prompt"] for r in records], padding="max_length", return_tensors="pt").input_ids
    scenes = torch.tensor([captions.encode_scene(record) for record in records])
    things = torch.tensor([classes for record in records for classes in captions.encode_things(record)])
    nouns = tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in captions.nouns])
    is_noun = torch.isin(ids, torch.tensor(nouns))  # row by row, its true values are in the order of `things`
    thing_at = torch.full(ids.shape, -1).masked_scatter(is_noun, torch.arange(len(things)))

    encoders = (build_text_encoder(tokenizer, width), build_text_encoder(tokenizer, width))
    scene_head, thing_head = (torch.nn.Linear(2 * width, sum(sizes)) for sizes in (captions.scene, captions.thing))
    trained = torch.nn.ModuleList([*encoders, scene_head, thing_head])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=recipe["lr"], fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], recipe["steps"], pct_start=0.1)
    for step in range(recipe["steps"]):
        batch = torch.randint(len(records), (recipe["batch"],))
        states = [encoder(ids[batch], output_hidden_states=True) for encoder in encoders]
        pooled = torch.cat([each.text_embeds for each in states], dim=-1)
        context = torch.cat([each.hidden_states[-2] for each in states], dim=-1)  # the layer that SD3 reads
        at_noun = is_noun[batch]
        loss_scene = sum_cross_entropies(pooled, scene_head, scenes[batch], captions.scene)
        things_at_noun = things[thing_at[batch][at_noun]]
        loss_thing = sum_cross_entropies(context[at_noun], thing_head, things_at_noun, captions.thing)
        optimizer.zero_grad()
        (loss_scene + loss_thing).backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            log(f"text {step}/{recipe['steps']} loss scene {loss_scene.item():.4f}, thing {loss_thing.item():.4f}")
    trained.eval()
    return encoders
