"""Stable Diffusion XL: UNet2DConditionModel, which predicts the noise or v, two CLIP encoders.

1. The student's times are those that the exported LCMScheduler itself computes for `num_inference_steps=N` if its
   original schedule had N steps: 999, 749, 499, 249 of 1000 for N = 4, as in DMD2. Its boundary scaling is 1 to within
   1e-6 there. A step is therefore: predict x0, renoise with fresh noise. DDIMScheduler has the same times.
2. The unconditional embedding follows the pipeline's `force_zeros_for_empty_prompt`: zeros in SDXL-Base. With
   `teacher.unconditional: encoded` it is the empty text encoded, as the authors' code for text to image has it.
3. With zero terminal SNR, the student's scheduler gets the betas of the teacher's EulerDiscreteScheduler as they are:
   it keeps a last signal of 2^-12, where LCMScheduler's own rescaling has 0.
4. The size conditioning is diffusers' default: the image's own size, no crop.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from dmdr.backbones.latent import LatentBackbone, silence_diffusers
from dmdr.backbones.protocol import Conditioning, Item, StudentScheduler, TimesArguments, Unconditional
from dmdr.config.few_steps import FewSteps
from dmdr.errors import ConfigError, DataError
from dmdr.path import VPPath
from dmdr.transfer import send_to

TOKENS = 77  # of every prompt: the tokenizers pad or cut it
# "authors' code, t2i", of the fake score's LoRA; DMD2's list
WIDE = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
# Of a UNet that takes a prompt, its pooled state and sizes, and nothing else. Distilled ones take a guidance scale.
PLAIN = {
    "addition_embed_type": "text_time",
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
}


class Schedule(TypedDict):
    """A noise schedule, and what the network predicts."""

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: list[float] | None
    prediction_type: str


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

    @property
    def wide_targets(self) -> tuple[str, ...]:
        return WIDE

    def _euler(self) -> EulerDiscreteScheduler:
        return EulerDiscreteScheduler.from_config(self.pipe.scheduler.config)

    def encode(self, prompts: list[str]) -> tuple[list[Item], int]:
        """{"context": (77, D), "pooled": (1, P)} for each prompt."""
        return self._encode(prompts, empty_is_zeros=self.pipe.config["force_zeros_for_empty_prompt"])

    def encode_unconditional(self, kind: Unconditional) -> Item:
        if kind == "encoded":
            return self._encode([""], empty_is_zeros=False)[0][0]
        return super().encode_unconditional(kind)

    @torch.no_grad()
    def _encode(self, prompts: list[str], *, empty_is_zeros: bool) -> tuple[list[Item], int]:
        pipe = self.pipe
        with silence_diffusers():
            context, _, pooled, _ = pipe.encode_prompt(
                prompts,  # type: ignore[arg-type]  # it also takes a list
                device=pipe.text_encoder_2.device,
                do_classifier_free_guidance=False,
            )
        if empty_is_zeros:
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
        return {"context": send_to(context, device, dtype), "pooled": send_to(pooled, device, dtype)}

    def blank(self) -> Item:
        config = self.network.config
        pooled: int = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return {"context": torch.zeros(TOKENS, config["cross_attention_dim"]), "pooled": torch.zeros(1, pooled)}

    def _predict(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        side = self.resolution
        size = x_t.new_full(
            (len(x_t), 6), side
        )  # original, crop, target: filled there, nothing is copied to the device
        size[:, 2:4] = 0
        return network(
            x_t,
            self.path.timestep(t),
            c["context"],
            added_cond_kwargs={"text_embeds": c["pooled"], "time_ids": size},
        ).sample

    def teacher_times(self, steps: int) -> torch.Tensor:
        return self._times(self._euler(), steps)

    def check_student(self, few: FewSteps) -> None:
        if few.shift is not None:
            raise ConfigError("student.shift is for flow models and this teacher is an SDXL; set student.timesteps")
        last = self.path.timesteps - 1
        for timestep in few.timesteps or ():
            if timestep != int(timestep) or not 1 <= timestep <= last:
                raise ConfigError(
                    f"student.timesteps has {timestep:g}, and this SDXL is told whole numbers from 1 to {last}"
                )

    def student_times(self, few: FewSteps) -> torch.Tensor:
        if few.timesteps is not None:
            return self._to_times(torch.tensor(few.timesteps))
        return self._times(self.student_scheduler(few), few.steps)

    def _times(self, scheduler: StudentScheduler, steps: int) -> torch.Tensor:
        scheduler.set_timesteps(steps)
        return self._to_times(torch.as_tensor(scheduler.timesteps))

    def _to_times(self, timesteps: torch.Tensor) -> torch.Tensor:
        return torch.cat([(timesteps.float() + 1) / self.path.timesteps, torch.zeros(1)])

    def student_timesteps(self, few: FewSteps) -> torch.Tensor:
        return self.path.timestep(self.student_times(few)[:-1])

    def student_scheduler(self, few: FewSteps) -> StudentScheduler:
        """The scheduler whose steps are the student's.

        With eta 1, or one step, LCMScheduler; otherwise DDIMScheduler. A one-step student that predicts from timestep k
        gets the first k + 1 betas, so that its scheduler begins there. Where the call names timesteps and eta is below
        1, it is EulerDiscreteScheduler, because DDIMScheduler takes none; "leading" lets it begin at noise of variance
        1, as the student does.
        """
        schedule = self._schedule(few)
        if few.is_stochastic or few.steps == 1:
            return LCMScheduler(**schedule, original_inference_steps=few.steps)
        if few.timesteps is None:
            return DDIMScheduler(**schedule, timestep_spacing="trailing", clip_sample=False)
        return EulerDiscreteScheduler(**schedule, timestep_spacing="leading")

    def _schedule(self, few: FewSteps) -> Schedule:
        """The noise schedule of the teacher, or its beginning, as schedulers take it."""
        euler = self._euler()
        config, betas = euler.config, euler.config["trained_betas"]
        timesteps: int = config["num_train_timesteps"]
        if few.steps == 1 and few.timesteps is not None:
            timesteps = int(few.timesteps[0]) + 1
            betas = euler.betas[:timesteps].tolist()
        if config["rescale_betas_zero_snr"]:
            signal = euler.alphas_cumprod[:timesteps].double()
            betas = (1 - signal / torch.cat([signal.new_ones(1), signal[:-1]])).tolist()
        return Schedule(
            num_train_timesteps=timesteps,
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            beta_schedule=config["beta_schedule"],
            trained_betas=betas,
            prediction_type=config["prediction_type"],
        )

    def student_arguments(self, few: FewSteps) -> TimesArguments:
        if few.timesteps is None or few.steps == 1:
            return TimesArguments()
        return TimesArguments(timesteps=[int(timestep) for timestep in few.timesteps])

    def build_student_pipeline(self, network: torch.nn.Module, few: FewSteps) -> StableDiffusionXLPipeline:
        parts = {**self.pipe.components, "unet": network, "scheduler": self.student_scheduler(few)}
        force_zeros: bool = self.pipe.config["force_zeros_for_empty_prompt"]
        return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=force_zeros)
