"""The VQA model of DPG-Bench, on a tiny random BLIP in a real folder, against transformers' own way of asking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessorPil, BlipProcessor

from dmdr.errors import DataError, InputMissing
from dmdr.metrics import vqa

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "there", "a", "red", "cat", "the", "two", "dogs", "?"]
ANSWERS = ["yes", "no", "blue", "three", "left", "[DEC]"]
VOCABULARY = [*WORDS, *ANSWERS]
QUESTIONS = [
    "is there a cat?",
    "cat?",
    "is the cat red?",
    "is there a red cat, the two dogs, a red cat, the two red dogs?",
    "two?",
    "is there a dog?",
]


@pytest.fixture
def tiny_blip(tmp_path):
    """A folder as transformers saves one, and the model in it; its weights are large, so that answers differ."""

    def make(seed: int = 0):
        torch.manual_seed(seed)
        text = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "encoder_hidden_size": 32,
            "vocab_size": len(VOCABULARY),
            "max_position_embeddings": 64,
            "bos_token_id": VOCABULARY.index("[DEC]"),
            "sep_token_id": VOCABULARY.index("[SEP]"),
            "pad_token_id": 0,
            "initializer_range": 0.5,
        }
        vision = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "initializer_range": 0.5,
        }
        model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
        with torch.no_grad():  # what it reads and sees decides its answers
            for name, parameter in model.named_parameters():
                if "crossattention" in name:
                    parameter.mul_(3)
        folder = tmp_path / f"blip-{seed}"
        model.save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
        tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"), bos_token="[DEC]", model_max_length=64)
        BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
        return folder, model

    return make


def pictures(count: int, seed: int) -> list[Image.Image]:
    """Of several proportions, as PNG files hold them."""
    rng = np.random.default_rng(seed)
    sizes = [(40, 56), (32, 32), (64, 48)]
    small = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(count)]
    return [each.resize(sizes[place % 3], Image.Resampling.BICUBIC) for place, each in enumerate(small)]


def tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


@pytest.fixture
def theirs(tiny_blip):
    """Asks as transformers' own example does, one question at a time; `more` goes to the processor."""

    def load(seed: int):
        folder, model = tiny_blip(seed)
        processor = BlipProcessor(BlipImageProcessorPil.from_pretrained(folder), BertTokenizer.from_pretrained(folder))

        @torch.no_grad()
        def ask(picture: Image.Image, question: str, **more) -> str:
            inputs = processor(images=picture, text=question, return_tensors="pt", **more)
            found = model.generate(**inputs, max_new_tokens=vqa.LONGEST, do_sample=False, num_beams=1)
            return processor.decode(found[0], skip_special_tokens=True)

        return folder, ask

    return load


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_transformers_own(theirs, seed):
    folder, ask = theirs(seed)
    asked = vqa.BlipVQA(folder, "cpu")
    found = []
    for picture in pictures(3, seed):
        mine = asked(tensor(picture), QUESTIONS)
        assert mine == [ask(picture, question).strip() for question in QUESTIONS]
        found += mine
    assert len(set(found)) > 2, "answers that are all alike show nothing"


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_does_not_depend_on_what_else_is_asked(tiny_blip, seed, monkeypatch):
    asked = vqa.BlipVQA(tiny_blip(seed)[0], "cpu")
    images = torch.cat([tensor(pictures(1, number)[0]) for number in range(len(QUESTIONS))])
    singly = [asked(image[None], [question])[0] for image, question in zip(images, QUESTIONS, strict=True)]
    assert asked(images, QUESTIONS) == singly
    assert asked(images[:1], QUESTIONS) == [asked(images[:1], [question])[0] for question in QUESTIONS]
    for at_once in (1, 2, 5):
        monkeypatch.setattr(vqa, "AT_ONCE", at_once)
        assert asked(images, QUESTIONS) == singly
        assert asked(images[:1], QUESTIONS) == [asked(images[:1], [question])[0] for question in QUESTIONS]


def test_transformers_own_answers_depend_on_padding(theirs):
    """Why questions of several lengths are not asked at once. When this fails, transformers has mended it."""
    changed = 0
    for seed in range(4):
        _, ask = theirs(seed)
        for picture in pictures(2, seed):
            padded = {"padding": "max_length", "max_length": 24}
            changed += sum(ask(picture, each) != ask(picture, each, **padded) for each in QUESTIONS)
    assert changed > 0


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(InputMissing, match=r"weights\.vqa .* has no config\.json"):
        vqa.BlipVQA(tmp_path / "nowhere", "cpu")


def test_a_damaged_folder_is_refused(tiny_blip):
    folder, model = tiny_blip()
    kept = {name: tensor for name, tensor in model.state_dict().items() if "vision_model.encoder.layers.1" not in name}
    model.save_pretrained(folder, state_dict=kept)
    with pytest.raises(DataError, match="lack the tensor vision_model.encoder.layers.1"):
        vqa.BlipVQA(folder, "cpu")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match="cannot be loaded as a BlipForQuestionAnswering"):
        vqa.BlipVQA(folder, "cpu")
