"""A T5 encoder whose states are all zero. An exported SD3 folder holds it if the teacher has no T5.

`DiffusionPipeline.from_pretrained(folder)` refuses an SD3 folder without T5 unless the caller passes
`text_encoder_3=None, tokenizer_3=None`; then it uses zeros as T5's states. The states of this encoder are exactly zero
for any text. A folder with it loads without those arguments and draws the same images.
"""

from __future__ import annotations

import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]  # every word is unknown


def build_zero_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
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
    )
    config.decoder_start_token_id = 0
    encoder = T5EncoderModel(config).requires_grad_(False).eval()
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, T5Tokenizer(vocab=PIECES, extra_ids=0, model_max_length=512)
