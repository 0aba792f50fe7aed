"""A ControlNet small enough for tests."""

import comfy.controlnet
import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.flux.controlnet import ControlNetFlux
from tiny import flux_config, prompt


def controlnet():
    """A tiny ControlNet of XLabs' kind, in the host's own classes."""
    config = flux_config(True, depth=2, depth_single_blocks=0)
    config.pop("image_model")
    net = ControlNetFlux(operations=comfy.ops.disable_weight_init, dtype=torch.float32, **config)
    generator = torch.Generator().manual_seed(3)
    net.load_state_dict(
        {k: 0.2 * torch.randn(v.shape, generator=generator) for k, v in net.state_dict().items()}
    )
    device = comfy.model_management.get_torch_device()
    return comfy.controlnet.ControlNet(net, load_device=device, extra_conds=["y", "guidance"])


def with_controlnet(strength: float = 1.0):
    hint = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(5))
    control = controlnet().copy().set_cond_hint(hint, strength, (0.0, 1.0))
    return prompt(0, control=control, control_apply_to_uncond=True)
