"""ImageReward beside BLIP as it was published, written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dmdr.errors import DataError
from dmdr.rewards.load import load_reward
from dmdr.rewards.preprocess import normalize
from dmdr.rewards.sources import RewardSources
from tests.support.tiny_rewards import WIDTH, WORDS, photo, predictor, tensor


def blip_by_hand(w: dict[str, torch.Tensor], pixels: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """One image (1, 3, 32, 32) and one prompt through BLIP as it was published (Li et al. 2022), no library's model."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (each.unflatten(-1, (2, -1)).transpose(0, 1) for each in (q, k, v))  # two heads
        mix = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        return (mix @ v).transpose(0, 1).flatten(1)

    at = "blip.visual_encoder"
    patches = pixels[0].unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(16, -1)
    x = patches @ w[f"{at}.patch_embed.proj.weight"].flatten(1).T + w[f"{at}.patch_embed.proj.bias"]
    x = torch.cat([w[f"{at}.cls_token"][0], x]) + w[f"{at}.pos_embed"][0]
    for n in range(2):
        q, k, v = linear(f"{at}.blocks.{n}.attn.qkv", norm(f"{at}.blocks.{n}.norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + linear(f"{at}.blocks.{n}.attn.proj", attention(q, k, v))
        inner = F.gelu(linear(f"{at}.blocks.{n}.mlp.fc1", norm(f"{at}.blocks.{n}.norm2", x, 1e-6)))
        x = x + linear(f"{at}.blocks.{n}.mlp.fc2", inner)
    x = norm(f"{at}.norm", x, 1e-6)

    at = "blip.text_encoder.embeddings"
    h = w[f"{at}.word_embeddings.weight"][ids] + w[f"{at}.position_embeddings.weight"][: len(ids)]
    h = norm(f"{at}.LayerNorm", h, 1e-12)
    for n in range(2):
        at = f"blip.text_encoder.encoder.layer.{n}"
        for kind in ("attention", "crossattention"):
            source = h if kind == "attention" else x
            q, k, v = (
                linear(f"{at}.{kind}.self.{role}", each)
                for role, each in zip(("query", "key", "value"), (h, source, source), strict=True)
            )
            out = linear(f"{at}.{kind}.output.dense", attention(q, k, v))
            h = norm(f"{at}.{kind}.output.LayerNorm", h + out, 1e-12)
        inner = F.gelu(linear(f"{at}.intermediate.dense", h))
        h = norm(f"{at}.output.LayerNorm", h + linear(f"{at}.output.dense", inner), 1e-12)
    return h[0]


def test_imagereward_is_its_blip_and_its_mlp(tiny_imagereward):
    addresses, found = tiny_imagereward
    reward = load_reward("imagereward", sources=RewardSources(addresses))
    prompts = ["a red cat", "two dogs under a table", "a zebra"]  # the last has a word that is not in the list
    ids = [[2, *(WORDS.index(word) if word in WORDS else 1 for word in each.split()), 3] for each in prompts]
    images = torch.cat([tensor(photo(32, 32, seed)) for seed in range(3)]).requires_grad_()
    with torch.no_grad():
        features = [blip_by_hand(found, normalize(images[i : i + 1]), ids[i]) for i in range(3)]
        mlp = predictor(WIDTH)
        mlp.load_state_dict({key[11:]: value for key, value in found.items() if key.startswith("mlp.layers.")})
        raw = mlp(torch.stack(features)).squeeze(-1)
        expected = (raw - 0.16717362830052426) / 1.0333394966054072
    ours = reward(images, prompts)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert ours.dtype == torch.float32 and reward.differentiable and expected.std() > 0.05
    ours.sum().backward()
    assert images.grad.isfinite().all() and (images.grad.flatten(1).abs().amax(1) > 0).all()
    with torch.no_grad():  # cut where it ends, and a prompt's own score whatever stands beside it
        alone, beside = reward(images[:1], prompts[:1]), reward(images[:2], [prompts[0], "cat " * 500])
        assert torch.allclose(alone[0], beside[0], atol=1e-5)
        assert torch.equal(reward(images[:1], ["cat " * 500]), reward(images[:1], ["cat " * 500 + "dogs"]))


def test_broken_weights_of_imagereward_are_refused(tiny_imagereward, tmp_path):
    addresses, found = tiny_imagereward
    other = tmp_path / "other"
    for name, content, said in (
        ("imagereward", {k: v for k, v in found.items() if "crossattention" not in k}, "lack text.encoder.*crossatt"),
        ("imagereward", {k: v for k, v in found.items() if "mlp.layers.4" not in k}, "lack the MLP's layers"),
        ("bert-vocabulary", "cat\ndog\n", "not a vocabulary of BERT"),
        ("bert-vocabulary", "\n".join([*WORDS, "b", "c", "d"]), "have 16 words, but ImageReward knows 15"),
    ):
        other.write_text(content) if isinstance(content, str) else torch.save(content, other)
        with pytest.raises(DataError, match=said):
            load_reward("imagereward", sources=RewardSources({**addresses, name: str(other)}))
