"""Answers to questions about images, for DPG-Bench.

1. The official script asks mPLUG-large of modelscope, whose library does not live with current ones. Here it is a BLIP
   of transformers (Salesforce/blip-vqa-capfilt-large). Figures compare only where the same model answered.
2. Decoding is greedy, so that the same image has the same answer.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dmdr.errors import DataError, InputMissing

WORDS = 10  # the longest answer, in tokens


class VQA:
    """From a folder that transformers saved.

    Raises:
        InputMissing: there is no such folder.
        DataError: it does not load.
    """

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import BlipForQuestionAnswering, BlipProcessor

        if not (folder / "config.json").is_file():
            raise InputMissing(f"weights.vqa {folder} has no config.json; give a folder that transformers saved")
        try:
            self.processor = BlipProcessor.from_pretrained(folder, local_files_only=True)
            self.network = BlipForQuestionAnswering.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())[:200]
            raise DataError(f"weights.vqa {folder} does not load: {said}") from error
        self.network.to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, questions: list[str]) -> list[str]:
        """image (3, H, W) in [0, 1] -> an answer to each question, in lower case."""
        pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        seen = self.processor.image_processor(images=[pixels], return_tensors="pt")["pixel_values"]
        asked = self.processor.tokenizer(questions, padding=True, truncation=True, return_tensors="pt")
        answers = self.network.generate(
            input_ids=asked["input_ids"].to(self.network.device),
            attention_mask=asked["attention_mask"].to(self.network.device),
            pixel_values=seen.expand(len(questions), -1, -1, -1).to(self.network.device),
            max_new_tokens=WORDS, do_sample=False, num_beams=1,
        )  # fmt: skip
        texts = self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip().lower() for text in texts]
