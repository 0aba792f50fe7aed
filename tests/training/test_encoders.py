"""FLUX.1's encoders as users have them, tiny: a diffusers folder, and the files of ComfyUI."""

import functools
import json
from pathlib import Path

import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from helpers.training import config
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from omini2_extension.omini2_core.demo import files as demo_files
from omini2_extension.omini2_core.training.encoders import load_encoders
from omini2_extension.omini2_core.training.loop import train

HOST = Path(folder_paths.base_path) / "comfy"
# What is smaller than FLUX.1's; the vocabularies are its own.
CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
}  # fmt: skip
T5 = {"d_model": 24, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as FLUX.1-dev's, and its text encoders as single files beside it."""
    folder = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    clip_config = json.loads((HOST / "sd1_clip_config.json").read_text()) | CLIP
    clip = CLIPTextModel(CLIPTextConfig(**clip_config))
    t5_config = json.loads((HOST / "text_encoders" / "t5_config_xxl.json").read_text()) | T5
    t5 = T5EncoderModel(T5Config(**t5_config, feed_forward_proj="gated-gelu"))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=T5["d_model"],
        pooled_projection_dim=CLIP["hidden_size"],
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae,
        clip,
        CLIPTokenizer.from_pretrained(HOST / "sd1_tokenizer", model_max_length=77),
        t5,
        T5TokenizerFast.from_pretrained(
            HOST / "text_encoders" / "t5_tokenizer", model_max_length=512
        ),
        transformer,
    ).save_pretrained(folder / "FLUX.1-tiny")
    for name, model, prefix in (("clip_l", clip, "text_model."), ("t5xxl", t5, "")):
        tensors = {
            prefix + key.removeprefix(prefix): value.detach().clone()
            for key, value in model.state_dict().items()
        }
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def test_a_folder_gives_what_comfyui_gives_with_the_same_weights(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = comfy.sd.load_clip  # knows FLUX.1's sizes; the real files are 10 GB
    sizes = {"model_config": dict(CLIP), "t5xxl_model_config": T5}
    monkeypatch.setattr(comfy.sd, "load_clip", functools.partial(load, model_options=sizes))
    files = {"vae": str(demo_files.FOLDER / "vae.safetensors")}
    files |= {name: str(flux / f"{name}.safetensors") for name in ("clip_l", "t5xxl")}
    cpu, full = torch.device("cpu"), torch.float32
    single = load_encoders(config(tmp_path, encoders=files), cpu, full)
    folder = load_encoders(config(tmp_path, base=str(flux / "FLUX.1-tiny")), cpu, full)
    for text in ("", "a red cube left of a blue ball, oil painting", "one more word " * 100):
        for mine, host in zip(folder.encode_text([text]), single.encode_text([text]), strict=True):
            assert mine.std() > 0.1  # of the host's half precision, the differences are far below
            torch.testing.assert_close(mine, host, rtol=0, atol=0.02)
    pixels = torch.rand(1, 32, 32, 3)
    assert single.encode_images(pixels).shape == folder.encode_images(pixels).shape


def test_a_folder_is_all_that_a_run_needs(flux: Path, tmp_path: Path) -> None:
    settings = config(
        tmp_path,
        base=str(flux / "FLUX.1-tiny"),
        steps=1,
        mixed_precision="bf16",
        samples={"every": 1, "count": 1, "steps": 1},
    )
    result = train(settings)
    assert result.loras[0].is_file()
    assert (settings.output / "samples" / "step-00000001.png").is_file()
