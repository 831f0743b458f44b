"""A kernel of attention is taken only if it is there and computes the gradients of attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from dmdr.errors import ConfigError
from dmdr.kernels import attention
from dmdr.kernels.attention import compare_gradients, prepare_attention, use_attention


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", attention.HEADS)
def test_the_gradients_of_flash_attention_are_those_of_the_formula(compute, head):
    assert compare_gradients("flash", "cpu", compute, head) > (0.9999 if compute == torch.bfloat16 else 1 - 1e-9)
    prepare_attention("flash", "cpu", compute)


@pytest.mark.parametrize("kernel", ["cudnn", "fa3"])
def test_a_kernel_of_gpus_is_refused_without_one_in_one_line(kernel):
    with pytest.raises(
        ConfigError, match=rf"^execution.attention {kernel} needs an NVIDIA GPU.*set execution.attention: auto$"
    ):
        prepare_attention(kernel, "cpu", torch.bfloat16)


def test_a_kernel_with_a_wrong_gradient_is_refused(monkeypatch):
    """As cuDNN's was for some shapes: here, one whose query's gradient is 0."""

    def wrong(query, key, value):
        return torch.nn.functional.softmax(query.detach() @ key.mT / 8, -1) @ value + 0 * query

    right, calls = torch.nn.functional.scaled_dot_product_attention, []

    def attend(*inputs):
        calls.append(inputs)
        return wrong(*inputs) if len(calls) % 2 else right(*inputs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", attend)
    with pytest.raises(ConfigError, match=r"gradients .* not those of attention .* set execution.attention: auto"):
        prepare_attention("flash", "cpu", torch.float32)


def test_a_kernel_that_fails_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setitem(attention.ORDER, "flash", [SDPBackend.CUDNN_ATTENTION])
    with pytest.raises(
        ConfigError, match=r"^execution.attention flash fails on this device: .+; set execution.att"
    ) as e:
        prepare_attention("flash", "cpu", torch.float32)
    assert "\n" not in str(e.value)


def test_the_choice_ends_with_its_block():
    before = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    with use_attention("flash"):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    with use_attention("cudnn"):
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()) == before
