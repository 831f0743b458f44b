"""A T5 that says nothing: what stands in an exported SD3 folder for the T5 that its teacher lacks.

`DiffusionPipeline.from_pretrained(folder)` refuses an SD3 folder without T5 unless it is told
`text_encoder_3=None, tokenizer_3=None`. Given None, it feeds zeros in place of T5's states; this encoder's states are
zeros, exactly, for any text, so that the folder loads as it is and draws the same images.
"""

from __future__ import annotations

import torch
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]  # every word is unknown


def silent_t5(width: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """An encoder of one layer whose last hidden states (B, L, width) are all 0, and its tokenizer."""
    config = T5Config(
        vocab_size=len(PIECES),
        d_model=width,
        d_kv=1,
        d_ff=1,
        num_layers=1,
        num_heads=1,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    encoder = T5EncoderModel(config).requires_grad_(False).eval()
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, T5TokenizerFast(vocab=PIECES, extra_ids=0, model_max_length=512)
