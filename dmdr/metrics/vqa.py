"""Answers to questions about images, for DPG-Bench.

1. DPG-Bench's script asks mPLUG-large (damo/mplug_visual-question-answering_coco_large_en) through modelscope. Here a
   BLIP of transformers answers: Salesforce/blip-vqa-base or Salesforce/blip-vqa-capfilt-large. Figures compare only
   within one VQA model, whose weights stand beside them, and not with those that mPLUG gave.
2. Decoding is greedy and the weights are float32: an image has the same answers each time.
3. Only questions of as many tokens are asked at once. BLIP's cross-attention in transformers takes no mask, so that an
   answer to a padded question depends on what else is in the batch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError

from dmdr.errors import DataError, InputMissing

LONGEST = 10  # an answer, in tokens; one that is cut is no yes
AT_ONCE = 64  # questions


class BlipVQA:
    """From a folder that transformers saved.

    Raises:
        InputMissing: it is no such folder.
        DataError: it is damaged, or another model's.
    """

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import BertTokenizer, BlipForQuestionAnswering, BlipImageProcessorPil

        if not (folder / "config.json").is_file():
            raise InputMissing(
                f"weights.vqa {folder} has no config.json; give a folder of Salesforce/blip-vqa-base or "
                "Salesforce/blip-vqa-capfilt-large"
            )
        try:
            self.processor = BlipImageProcessorPil.from_pretrained(folder, local_files_only=True)
            self.tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
            self.model, found = BlipForQuestionAnswering.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            said = " ".join(str(error).split())[:200]
            raise DataError(
                f"weights.vqa {folder} are not a BlipForQuestionAnswering that loads ({said}); fetch them again"
            ) from error
        if found["missing_keys"]:
            raise DataError(f"weights.vqa {folder} lack the tensor {min(found['missing_keys'])}; fetch them again")
        self.model.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, questions: list[str]) -> list[str]:
        assert len(images) in (1, len(questions)), "one image a question, or one for all"
        tokens = self.tokenizer(questions, truncation=True)["input_ids"]
        shared = self._seen(images) if len(images) == 1 else None
        answers: dict[int, str] = {}
        for length in sorted({len(each) for each in tokens}):
            alike = [place for place, each in enumerate(tokens) if len(each) == length]
            for first in range(0, len(alike), AT_ONCE):
                places = alike[first : first + AT_ONCE]
                seen = self._seen(images[places]) if shared is None else shared.expand(len(places), -1, -1)
                asked = torch.tensor([tokens[place] for place in places], device=self.model.device)
                answers.update(zip(places, self._answers(seen, asked), strict=True))
        return [answers[place] for place in range(len(questions))]

    def _seen(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, patches, D)."""
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        pictures = [Image.fromarray(each) for each in pixels]
        values = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        return self.model.vision_model(pixel_values=values.to(self.model.device)).last_hidden_state

    def _answers(self, seen: torch.Tensor, asked: torch.Tensor) -> list[str]:
        """What BlipForQuestionAnswering.generate does once it has seen the images. asked: (B, tokens), none of them
        padding."""
        read = self.model.text_encoder(input_ids=asked, encoder_hidden_states=seen).last_hidden_state
        text = self.model.config.text_config
        begin = torch.full((len(asked), 1), self.model.decoder_start_token_id, device=asked.device)
        tokens = self.model.text_decoder.generate(
            input_ids=begin,
            encoder_hidden_states=read,
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            max_new_tokens=LONGEST,
            do_sample=False,
            num_beams=1,
        )
        return [each.strip() for each in self.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)]
