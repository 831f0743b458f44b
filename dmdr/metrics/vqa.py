"""Answer questions about images, for DPG-Bench.

1. DPG-Bench's script asks mPLUG-large (damo/mplug_visual-question-answering_coco_large_en) through modelscope. Here a
   BLIP of transformers answers: Salesforce/blip-vqa-base or Salesforce/blip-vqa-capfilt-large. Compare figures only if
   they come from the same VQA model, whose weights the scorecard names, and never with figures from mPLUG.
2. Decoding is greedy and the weights are float32, so an image gets the same answers each time.
3. Only questions with the same number of tokens are asked together. BLIP's cross-attention in transformers takes no
   mask, so the answer to a padded question depends on what else is in the batch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from dmdr.errors import InputMissing
from dmdr.rewards.checkpoint import load_pretrained, refuse_unreadable

LONGEST = 10  # tokens of an answer; a longer one is cut and does not count as yes
AT_ONCE = 64  # questions


class BlipVQA:
    """BLIP, from a folder that transformers saved.

    Raises:
        InputMissing: there is no such folder.
        DataError: the folder is damaged, or holds another model.
    """

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import BertTokenizer, BlipForQuestionAnswering, BlipImageProcessorPil, BlipTextConfig

        if not (folder / "config.json").is_file():
            raise InputMissing(
                f"weights.vqa {folder} has no config.json; give a folder of Salesforce/blip-vqa-base or "
                "Salesforce/blip-vqa-capfilt-large"
            )
        with refuse_unreadable(BlipForQuestionAnswering, folder, "weights.vqa"):
            self.processor = BlipImageProcessorPil.from_pretrained(folder, local_files_only=True)
            self.tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = load_pretrained(BlipForQuestionAnswering, folder, device, "weights.vqa")
        assert isinstance(self.model.config.text_config, BlipTextConfig)
        self.text_config = self.model.config.text_config

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, questions: list[str]) -> list[str]:
        """The answer to each question about its image (B, 3, H, W) in [0, 1], or about the one image (1, 3, H, W)."""
        assert len(images) in (1, len(questions)), "one image a question, or one for all"
        tokens = self.tokenizer(questions, truncation=True)["input_ids"]
        shared = self._encode_images(images) if len(images) == 1 else None
        answers: dict[int, str] = {}
        for length in sorted({len(each) for each in tokens}):
            same_length = [place for place, each in enumerate(tokens) if len(each) == length]
            for first in range(0, len(same_length), AT_ONCE):
                places = same_length[first : first + AT_ONCE]
                if shared is None:
                    image_states = self._encode_images(images[places])
                else:
                    image_states = shared.expand(len(places), -1, -1)
                batch = torch.tensor([tokens[place] for place in places], device=self.model.device)
                answers.update(zip(places, self._generate(image_states, batch), strict=True))
        return [answers[place] for place in range(len(questions))]

    def _encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, patches, D)."""
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        pictures = [Image.fromarray(each) for each in pixels]
        values = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        return self.model.vision_model(pixel_values=values.to(self.model.device)).last_hidden_state

    def _generate(self, image_states: torch.Tensor, questions: torch.Tensor) -> list[str]:
        """Do what BlipForQuestionAnswering.generate does after the image encoder. questions: (B, tokens), unpadded."""
        states = self.model.text_encoder(input_ids=questions, encoder_hidden_states=image_states).last_hidden_state
        begin = torch.full((len(questions), 1), self.model.decoder_start_token_id, device=questions.device)
        tokens = self.model.text_decoder.generate(  # type: ignore[misc]  # its `self` is annotated with a wrong protocol
            input_ids=begin,
            encoder_hidden_states=states,
            eos_token_id=self.text_config.sep_token_id,
            pad_token_id=self.text_config.pad_token_id,
            max_new_tokens=LONGEST,
            do_sample=False,
            num_beams=1,
        )
        return [each.strip() for each in self.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)]
