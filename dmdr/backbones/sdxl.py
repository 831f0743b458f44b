"""Stable Diffusion XL: UNet2DConditionModel, which predicts the noise or v, two CLIP encoders.

1. The student's times are those that the exported LCMScheduler itself computes for `num_inference_steps=N` if its
   original schedule had N steps: 999, 749, 499, 249 of 1000 for N = 4, as in DMD2. Its boundary scaling is 1 to within
   1e-6 there. A step is therefore: predict x0, renoise with fresh noise.
2. The unconditional embedding follows the pipeline's `force_zeros_for_empty_prompt`: zeros in SDXL-Base.
3. With zero terminal SNR, the student's scheduler gets the betas of the teacher's EulerDiscreteScheduler as they are:
   it keeps a last signal of 2^-12, where LCMScheduler's own rescaling has 0.
4. The size conditioning is diffusers' default: the image's own size, no crop.
"""

from __future__ import annotations

import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from dmdr.backbones.latent import LatentBackbone, silence_diffusers
from dmdr.backbones.protocol import Conditioning, Item
from dmdr.errors import DataError
from dmdr.path import VPPath

TOKENS = 77  # of every prompt: the tokenizers pad or cut it
# Of a UNet that takes a prompt, its pooled state and sizes, and nothing else. Distilled ones take a guidance scale.
PLAIN = {
    "addition_embed_type": "text_time",
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
}


class SDXL(LatentBackbone[StableDiffusionXLPipeline, UNet2DConditionModel]):
    """A StableDiffusionXLPipeline as the method sees it.

    Raises:
        DataError: the UNet takes something else than a prompt, its pooled state and sizes.
    """

    family = "sdxl"
    path: VPPath
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipe: StableDiffusionXLPipeline, resolution: int | None = None) -> None:
        unet: UNet2DConditionModel = pipe.unet
        for key, value in PLAIN.items():
            if unet.config[key] != value:
                raise DataError(
                    f"teacher's UNet has {key}: {unet.config[key]!r}, and DMDR distils those with {value!r}, as "
                    "SDXL-Base has it: give another teacher"
                )
        super().__init__(
            pipe,
            unet,
            channels=unet.config["in_channels"],
            side=unet.config["sample_size"],
            multiple=2 ** (len(unet.config["block_out_channels"]) - 1),
            resolution=resolution,
        )
        euler = self._euler()
        self.path = VPPath(euler.alphas_cumprod, euler.config["prediction_type"])

    def _euler(self) -> EulerDiscreteScheduler:
        return EulerDiscreteScheduler.from_config(self.pipe.scheduler.config)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[list[Item], int]:
        """{"context": (77, D), "pooled": (1, P)} for each prompt."""
        pipe = self.pipe
        with silence_diffusers():
            context, _, pooled, _ = pipe.encode_prompt(
                prompts,  # type: ignore[arg-type]  # it also takes a list
                device=pipe.text_encoder_2.device,
                do_classifier_free_guidance=False,
            )
        if pipe.config["force_zeros_for_empty_prompt"]:
            mask = torch.tensor([prompt != "" for prompt in prompts], device=context.device)
            context, pooled = context * mask[:, None, None], pooled * mask[:, None]
        items = [{"context": c.cpu(), "pooled": p[None].cpu()} for c, p in zip(context, pooled, strict=True)]
        return items, self.count_truncated(prompts)

    def count_truncated(self, prompts: list[str]) -> int:
        tokenizer = self.pipe.tokenizer
        return sum(len(ids) > tokenizer.model_max_length for ids in tokenizer(prompts, verbose=False).input_ids)

    def collate(self, items: list[Item]) -> Conditioning:
        """context (B, 77, D), pooled (B, P)."""
        device, dtype = self.network.device, self.network.dtype
        context = torch.stack([item["context"] for item in items])
        pooled = torch.cat([item["pooled"] for item in items])
        return {"context": context.to(device, dtype), "pooled": pooled.to(device, dtype)}

    def blank(self) -> Item:
        config = self.network.config
        pooled: int = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return {"context": torch.zeros(TOKENS, config["cross_attention_dim"]), "pooled": torch.zeros(1, pooled)}

    def _predict(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        side = self.resolution
        size = x_t.new_tensor([side, side, 0, 0, side, side]).expand(len(x_t), -1)  # original, crop, target
        return network(
            x_t,
            self.path.timestep(t),
            c["context"],
            added_cond_kwargs={"text_embeds": c["pooled"], "time_ids": size},
        ).sample

    def teacher_times(self, steps: int) -> torch.Tensor:
        return self._times(self._euler(), steps)

    def student_times(self, steps: int) -> torch.Tensor:
        return self._times(self.student_scheduler(steps), steps)

    def _times(self, scheduler: EulerDiscreteScheduler | LCMScheduler, steps: int) -> torch.Tensor:
        scheduler.set_timesteps(steps)
        times = (scheduler.timesteps.float() + 1) / self.path.timesteps
        return torch.cat([times, torch.zeros(1)])

    def student_timesteps(self, steps: int) -> torch.Tensor:
        return self.path.timestep(self.student_times(steps)[:-1])

    def student_scheduler(self, steps: int) -> LCMScheduler:
        euler = self._euler()
        config, betas = euler.config, euler.config["trained_betas"]
        if config["rescale_betas_zero_snr"]:
            signal = euler.alphas_cumprod.double()
            betas = (1 - signal / torch.cat([signal.new_ones(1), signal[:-1]])).tolist()
        return LCMScheduler(
            num_train_timesteps=config["num_train_timesteps"],
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            beta_schedule=config["beta_schedule"],
            trained_betas=betas,
            prediction_type=config["prediction_type"],
            original_inference_steps=steps,
        )

    def build_student_pipeline(self, network: torch.nn.Module, steps: int) -> StableDiffusionXLPipeline:
        parts = {**self.pipe.components, "unet": network, "scheduler": self.student_scheduler(steps)}
        force_zeros: bool = self.pipe.config["force_zeros_for_empty_prompt"]
        return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=force_zeros)
