"""Less memory by the ways that are the device's: what a machine cannot do is said before anything is cached."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.backends import cuda

from helpers.config.options import RunOptions
from helpers.errors import ConfigError
from helpers.training.memory import apply_memory_options, check_attention, check_compiling, choose_attention

CPU = torch.device("cpu")


def switches() -> tuple[bool, ...]:
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.math_sdp_enabled()


@pytest.mark.parametrize(
    ("kernel", "said"), [("efficient", "use auto or another kernel"), ("cudnn", "no such kernel for float32 on this cpu")]
)
def test_a_kernel_that_the_device_does_not_have_is_refused(kernel: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"--attention={kernel}: .*{said}"):
        check_attention(kernel, CPU, torch.float32)
    assert switches() == (True, True, True, True)


@pytest.mark.parametrize("kernel", ["auto", "flash", "math"])
def test_a_kernel_that_it_has_is_not(kernel: str) -> None:
    check_attention(kernel, CPU, torch.float32)
    assert switches() == (True, True, True, True)


def test_the_math_kernel_stays_enabled_as_a_fallback() -> None:
    try:
        choose_attention("flash")
        assert switches() == (True, False, False, True)
        choose_attention("math")
        assert switches() == (False, False, False, True)
    finally:
        choose_attention("auto")


def test_slices_of_attention_do_not_change_the_answer_where_a_layer_has_a_single_head() -> None:
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(1, 2),
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 3, 8)
    whole = network(*inputs).sample
    apply_memory_options(network, RunOptions(unet_attention_slice=True), {"unet_attention_slice"})
    assert torch.allclose(network(*inputs).sample, whole, atol=1e-5)


def test_without_a_compiler_compiling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="--validation_torch_compile: torch.compile needs a C\\+\\+ compiler on a CPU"):
        check_compiling("--validation_torch_compile", CPU)


def test_what_the_compiler_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(module: object) -> object:
        raise RuntimeError("Triton is not here\nlong trace")

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    with pytest.raises(ConfigError, match="does not work here \\(Triton is not here\\); remove this option"):
        check_compiling("--validation_torch_compile", CPU)
