"""Compute identical padding tokens once: an exact shortcut for SD3 without its T5 encoder.

Without T5, diffusers feeds 256 context tokens that are all zero. Context tokens have no position, so that the 256 stay
identical through every joint block. A query sees them as one key with 256 times the weight: n equal logits z add
exp(z + log n) to the softmax. One token with log n added to its logit gives the same images as the 256, at a quarter of
the work for a tiny model. `tests/unit/dmdr/backbones/test_families_against_diffusers.py` compares it with plain
diffusers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention


class NullTokenAttention:
    """SD3 joint attention (diffusers' JointAttnProcessor2_0) whose last context token counts `null_tokens` times.

    The transformer calls it with hidden_states (B, S, D) and encoder_hidden_states (B, L, D), or None in the second
    attention of dual blocks. `null_tokens` comes from joint_attention_kwargs; 1 is plain joint attention.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,  # diffusers always passes it; SD3 never sets it
        null_tokens: int = 1,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        def split_heads(x: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        # in bfloat16, norms return float32: one copy for all of these layers, as autocast would make for each of them
        hidden_states = hidden_states.to(attn.to_q.weight.dtype)
        query = split_heads(attn.to_q(hidden_states), attn.norm_q)
        key = split_heads(attn.to_k(hidden_states), attn.norm_k)
        value = split_heads(attn.to_v(hidden_states), None)
        bias = None
        if encoder_hidden_states is not None:
            encoder_hidden_states = encoder_hidden_states.to(attn.add_q_proj.weight.dtype)
            query = torch.cat([query, split_heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], dim=2)
            key = torch.cat([key, split_heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], dim=2)
            value = torch.cat([value, split_heads(attn.add_v_proj(encoder_hidden_states), None)], dim=2)
            if null_tokens > 1:
                bias = query.new_zeros(1, 1, 1, key.shape[2])
                bias[..., -1] = math.log(null_tokens)

        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](out))
        image, context = out[:, : hidden_states.shape[1]], out[:, hidden_states.shape[1] :]
        if not attn.context_pre_only:
            context = attn.to_add_out(context)
        return attn.to_out[1](attn.to_out[0](image)), context
