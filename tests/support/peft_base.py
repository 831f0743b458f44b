"""The oracle of `dmdr.kernels.adapters`: the same shared base with PEFT's layers, of which each remembers the adapter
that it runs. A backward pass that computes activations again therefore needs the adapter of its forward once more."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from dmdr.shared_base import SharedBase


class PeftBase(SharedBase):
    """A shared base as DMDR had it before its own LoRA. One scale a call, not one a sample."""

    def _add_lora(self, name, rank, targets, init="kaiming"):
        config = LoraConfig(
            r=rank,
            lora_alpha=rank * self._alphas[name],
            target_modules=targets,
            init_lora_weights="gaussian" if init == "gaussian" else True,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            self.backbone.network.add_adapter(config, adapter_name=name)
        self._now = None

    def keep_reference(self):
        super().keep_reference()
        self._switch(("fake_score", self.fake_scale))

    @contextmanager
    def use_adapter(self, name, scale=1.0) -> Iterator[torch.nn.Module]:
        before = self._now or ("fake_score", self.fake_scale)
        self._switch((name, scale))
        try:
            yield self.backbone.network
        finally:
            self._switch(before)

    def _switch(self, adapter):
        name, scale = adapter
        for layer in self.backbone.network.modules():
            if isinstance(layer, LoraLayer):
                layer.enable_adapters(scale != 0)
                if scale:
                    layer.set_adapter(name)
                    layer.set_scale(name, scale)
        for parameter_name, parameter in self.backbone.network.named_parameters():
            if ".lora_" in parameter_name and ".reference." not in parameter_name:
                parameter.requires_grad_(True)
        self._now = adapter
