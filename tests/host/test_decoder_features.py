"""The first stages of VAEs' decoders, against what the decoders themselves compute there."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngineLegacy
from comfy.ldm.wan.vae import WanVAE
from helpers.spot import spot_file
from torch import Tensor, nn

from omini2_extension.omini2_core.engine.spot_scores import PerceptualScores
from omini2_extension.omini2_core.host.decoder_features import DecoderFeatures, require_decoder


def filled(module: nn.Module) -> Any:
    """With random weights; the host leaves them as they are in memory."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            wide = tensor.ndim > 1 and tensor[0].numel()
            values = torch.randn(tensor.shape, generator=generator)
            tensor.data = values * wide**-0.5 if wide else values.abs() + 0.5
    return module


def flux2_vae() -> Any:
    shape = {
        "double_z": True, "z_channels": 32, "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": 32, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 2, "attn_resolutions": [],
        "dropout": 0.0, "batch_norm_latent": True,
    }  # fmt: skip
    regular = {"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"}
    return filled(
        AutoencodingEngineLegacy(embed_dim=32, ddconfig=shape, regularizer_config=regular)
    )


def qwen_vae() -> Any:
    vae = WanVAE(
        dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True], dropout=0.0,
    )  # fmt: skip
    return filled(vae).eval()


def named(vae: Any) -> list[nn.Module]:
    """The layers behind which the three maps are, in the decoder itself."""
    decoder = vae.decoder
    if hasattr(decoder, "conv1"):
        upsampling = next(layer for layer in decoder.upsamples if hasattr(layer, "resample"))
        return [decoder.conv1, decoder.middle[-1], upsampling]
    return [decoder.conv_in, decoder.mid.block_2, decoder.up[-1].upsample]


VAES = {
    "FLUX.1": (lambda: spot_file().vae().first_stage_model, (16, 8, 12)),
    "FLUX.2": (flux2_vae, (128, 4, 6)),
    "Qwen": (qwen_vae, (16, 1, 8, 12)),
}


@pytest.mark.parametrize("name", VAES)
def test_maps_are_those_of_the_decoder(name: str) -> None:
    make, shape = VAES[name]
    inner = make()
    latent = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    got = DecoderFeatures(SimpleNamespace(first_stage_model=inner), lambda z: z, latent.device)(
        latent
    )
    want: list[Tensor] = []
    for layer in named(inner):
        layer.register_forward_hook(lambda module, args, out: want.append(out))
    z = latent
    if name == "FLUX.2":  # as the VAE undoes its statistics; the convolution behind is no stage
        inner.post_quant_conv = nn.Identity()
        inner.decode(z)
    else:
        inner.decoder(z)
    assert [tuple(t.shape) for t in got] == [tuple(t.flatten(1, -3).shape) for t in want]
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other.flatten(1, -3), atol=1e-5)
        assert one.std() > 1e-3
    require_decoder(SimpleNamespace(first_stage_model=inner), shape[0])


@pytest.mark.parametrize("name", VAES)
def test_a_token_that_differs_stands_out(name: str) -> None:
    make, shape = VAES[name]
    known = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    side = 1 if name == "FLUX.2" else 2
    features = DecoderFeatures(SimpleNamespace(first_stage_model=make()), lambda z: z, known.device)
    scores = PerceptualScores(features, known, side)
    assert torch.allclose(scores(known), torch.zeros(4, 6), atol=1e-5)
    changed = known.clone()
    changed[..., 2 * side : 3 * side, 3 * side : 4 * side] *= -1
    found = scores(changed)
    assert found.shape == (4, 6) and divmod(int(found.argmax()), 6) == (2, 3)
    both = PerceptualScores(features, known.expand(2, *shape), side)
    assert torch.allclose(both(torch.cat((known, changed))), found, atol=1e-5)


def test_the_references_maps_are_made_once() -> None:
    calls: list[Tensor] = []

    def features(latent: Tensor) -> list[Tensor]:
        calls.append(latent)
        return [latent]

    known = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(1))
    scores = PerceptualScores(features, known, 2)
    assert not calls  # before the first choice the model may not be on its device yet
    for _ in range(3):
        scores(known + 1)
    assert sum(each is known for each in calls) == 1 and len(calls) == 4
