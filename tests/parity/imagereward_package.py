"""make parity-imagereward: our ImageReward beside the image-reward package, on shared random weights, real sizes.

The package wants functions and packages that current libraries no longer have; what it takes of them is put in their
place here, and BERT's vocabulary, which its tokenizer would fetch, is made up. It needs 8 GiB of memory and half a
minute.

usage: python tests/parity/imagereward_package.py FOLDER (where `pip install --no-deps --target FOLDER image-reward
timm` went)
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from pathlib import Path

import numpy as np

import dmdr  # noqa: F401  before torchvision is imported

# isort: split
import torch
import transformers
from PIL import Image
from transformers import modeling_utils, pytorch_utils

from dmdr.rewards.imagereward import LONGEST, MEAN, STD, TEXT, build_tokenizer
from dmdr.rewards.load import load_reward
from dmdr.rewards.preprocess import normalize, resize_and_crop
from dmdr.rewards.sources import RewardSources

TOLERANCE = 1e-5  # of scores about 1 wide
PICTURES = {(224, 224): "a red fox in the snow", (448, 448): "two dogs " * 30, (224, 300): "zebra"}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "fox", "in", "the", "snow", "two", "dogs"]
MED = {  # what the package's folder has as med_config.json
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": TEXT.vocab_size,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def package(folder: Path):
    """ImageReward.ImageReward, without what its __init__ imports besides."""
    sys.path.append(str(folder))
    for name in ("apply_chunking_to_forward", "prune_linear_layer"):
        setattr(modeling_utils, name, getattr(pytorch_utils, name))
    modeling_utils.find_pruneable_heads_and_indices = None  # nothing is pruned
    files = types.ModuleType("transformers.file_utils")
    files.ModelOutput = transformers.utils.ModelOutput
    sys.modules["transformers.file_utils"] = files
    for name in (
        "fairscale",
        "fairscale.nn",
        "fairscale.nn.checkpoint",
        "fairscale.nn.checkpoint.checkpoint_activations",
    ):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["fairscale.nn.checkpoint.checkpoint_activations"].checkpoint_wrapper = lambda module: module
    root = types.ModuleType("ImageReward")
    root.__path__ = [str(folder / "ImageReward")]
    models = types.ModuleType("ImageReward.models")
    models.__path__ = [str(folder / "ImageReward" / "models")]
    sys.modules |= {"ImageReward": root, "ImageReward.models": models}
    from ImageReward.models.BLIP import blip_pretrain, med

    med.BertModel.get_head_mask = lambda self, mask, layers: [None] * layers
    med.BertModel.invert_attention_mask = lambda self, mask: (1.0 - mask[:, None, None, :]) * torch.finfo().min
    med.BertModel.all_tied_weights_keys = {}
    blip_pretrain.init_tokenizer = lambda: None
    from ImageReward.ImageReward import ImageReward

    return ImageReward


def main(folder: Path) -> int:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        file, vocabulary, med = (Path(scratch) / name for name in ("ImageReward.pt", "vocab.txt", "med_config.json"))
        med.write_text(json.dumps(MED))
        vocabulary.write_text("\n".join(WORDS) + "\n")
        theirs = package(folder)(str(med), "cpu").eval()
        for name, tensor in theirs.mlp.state_dict().items():  # as they start, every score is the same
            tensor.copy_(torch.randn_like(tensor) / tensor.shape[-1] ** 0.5 if "weight" in name else tensor)
        assert (theirs.mean, theirs.std) == (MEAN, STD)
        torch.save(theirs.state_dict(), file)
        ours = load_reward(
            "imagereward", sources=RewardSources({"imagereward": str(file), "bert-vocabulary": str(vocabulary)})
        )
        words, most, scores = build_tokenizer(vocabulary), 0.0, []
        for size, prompt in PICTURES.items():
            small = Image.fromarray(rng.integers(64, 192, (7, 5, 3), dtype=np.uint8))
            image = torch.from_numpy(np.array(small.resize(size[::-1], Image.Resampling.BICUBIC)))
            image = image.permute(2, 0, 1)[None].float() / 255
            found = words(prompt, padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt")
            with torch.no_grad():
                # the package resizes bytes, which rounds; what is compared here is the model
                pixels = normalize(resize_and_crop(image, 224))
                their = theirs.score_gard(found.input_ids, found.attention_mask, pixels).item()
                own = ours(image, [prompt]).item()
            most, scores = max(most, abs(own - their)), [*scores, their]
            print(f"{size[0]}x{size[1]} {prompt[:30]!r}: ours {own:.7f}, image-reward {their:.7f}")
    print(f"greatest difference {most:.1e}, allowed {TOLERANCE:.0e}; the scores span {max(scores) - min(scores):.2f}")
    return int(not (most <= TOLERANCE and max(scores) - min(scores) > 10 * TOLERANCE))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
