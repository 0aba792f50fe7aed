"""Wrong input is refused before sampling, in one sentence that names the input and the way out."""

import dataclasses
import re
from pathlib import Path

import comfy.supported_models
import folder_paths
import pytest
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.model_patcher import ModelPatcher
from helpers.refusals import refused, sentence
from tiny import (
    LatentVae,
    apply,
    compact,
    encode,
    flux_config,
    make_model,
    random_condition,
    random_lora,
    sample,
    save_lora,
    with_cache,
)

from omini2_extension.nodes import ApplyLora, ConditionCache, ConditionEncode, ImageGuidance
from omini2_extension.omini2_core.host.model import EDITING


def patcher(kind: str, **config) -> ModelPatcher:
    """A model of the host's, without weights."""
    model_config = getattr(comfy.supported_models, kind)(config)
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model({}, "", device=torch.device("meta"))
    return ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "num_res_blocks": [1, 1], "channel_mult": [1, 1], "transformer_depth": [0, 0],
    "transformer_depth_middle": 0, "transformer_depth_output": [0, 0, 0, 0],
    "context_dim": 24, "num_heads": 2, "use_spatial_transformer": True,
    "legacy": False, "use_linear_in_transformer": False,
}  # fmt: skip


def sd3_like() -> ModelPatcher:
    text = {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 64}}
    return patcher(
        "SD3", in_channels=16, patch_size=2, depth=1, input_size=None, adm_in_channels=16,
        context_embedder_config=text, pos_embed_max_size=None,
    )  # fmt: skip


def flux2_like() -> ModelPatcher:
    config = flux_config(True, image_model="flux2", vec_in_dim=None, global_modulation=True)
    return patcher("Flux2", **config)


def chroma_like() -> ModelPatcher:
    fields = {each.name for each in dataclasses.fields(ChromaParams)}
    config = flux_config(False, in_channels=64, out_channels=64, vec_in_dim=None)
    config = {key: value for key, value in config.items() if key in fields}
    return patcher(
        "Chroma", image_model="chroma", in_dim=64, out_dim=32, hidden_dim=64, n_layers=1, **config
    )


def nunchaku_like() -> ModelPatcher:
    """Its kernels need a GPU; in the host's model they are behind a class of this name."""

    class ComfyFluxWrapper(torch.nn.Module):
        pass

    model = make_model(flux_config(True))
    model.model.diffusion_model = ComfyFluxWrapper()
    return model


def fluxtapoz_like() -> ModelPatcher:
    """Its nodes change the class of the model that is loaded."""
    model = make_model(flux_config(True))
    base = type(model.model.diffusion_model)
    module = "/somewhere/custom_nodes/ComfyUI-Fluxtapoz.flux.model"
    model.model.diffusion_model.__class__ = type("Flux", (base,), {"__module__": module})
    return model


def refused_model(name: str, make, pattern: str):
    mark = pytest.mark.compatibility("Models", name, "refused", "")
    return pytest.param(make, pattern, id=name, marks=mark)


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        refused_model(
            "SD 1.5", lambda: patcher("SD15", **UNET, adm_in_channels=None), "BaseModel.*not FLUX.1"
        ),
        refused_model(
            "SDXL",
            lambda: patcher("SDXL", **UNET, adm_in_channels=2816, num_classes="sequential"),
            "SDXL.*not FLUX.1",
        ),
        refused_model("SD 3", sd3_like, "SD3.*not FLUX.1"),
        refused_model(
            "Wan 2.1",
            lambda: patcher(
                "WAN21_T2V", image_model="wan2.1", model_type="t2v", dim=32, ffn_dim=64,
                num_heads=2, num_layers=1,
            ),
            "WAN21.*not FLUX.1",
        ),
        refused_model(
            "Qwen-Image",
            lambda: patcher(
                "QwenImage", image_model="qwen_image", num_layers=1, in_channels=64,
                num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6),
            ),
            "QwenImage.*not FLUX.1",
        ),
        refused_model(
            "Lumina 2",
            lambda: patcher(
                "Lumina2", image_model="lumina2", patch_size=2, in_channels=16, dim=96,
                cap_feat_dim=32, n_layers=1, qk_norm=True, n_heads=2, n_kv_heads=1,
                axes_dims=[16, 16, 16], axes_lens=[10, 10, 10],
            ),
            "Lumina2.*not FLUX.1",
        ),
        refused_model("FLUX.2", flux2_like, "Flux2.*not FLUX.1"),
        refused_model("Chroma", chroma_like, "Chroma.*not FLUX.1"),
        refused_model("FLUX.1 in Nunchaku", nunchaku_like, r"Flux \(ComfyFlux.*\).*not FLUX.1"),
        refused_model(
            "FLUX.1 as another extension has changed it (Fluxtapoz)",
            fluxtapoz_like,
            r"Flux \(Flux as ComfyUI-Fluxtapoz.flux.model has it\).*not FLUX.1",
        ),
        refused_model(
            "FLUX.1 Fill",
            lambda: patcher("FluxInpaint", **flux_config(True, in_channels=96)),
            "extra picture channels.*Fill",
        ),
        refused_model(
            "FLUX.1 Canny and Depth",
            lambda: patcher("Flux", **flux_config(True, in_channels=32)),
            "extra picture channels.*Canny",
        ),
    ],
)  # fmt: skip
def test_other_models(make, pattern) -> None:
    other = make()
    lora = random_lora("refusal.safetensors")
    nodes = [
        lambda: apply(other, random_condition(), lora),
        lambda: ImageGuidance.execute(other, 1.5),
    ]
    if type(other.model).__name__ not in EDITING:
        nodes.append(lambda: ConditionCache.execute(other, "auto", 5, "model", "auto"))
    for refuse in nodes:
        with refused(f"model: .*{pattern}.* load ") as error:
            refuse()
        sentence(error)


def lora_of(*keys: str, shape: tuple[int, int] = (4, 32)) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(shape) for key in keys}


@pytest.mark.parametrize(
    ("name", "tensors", "pattern"),
    [
        (
            "unknown",
            lora_of("transformer.blocks.7.to_q.lora_A.weight", "lora_unet_x.lora_down.weight"),
            "nothing in the model belongs to lora_unet_x.*blocks.7.to_q",
        ),
        (
            "deeper",
            lora_of(*(f"transformer.transformer_blocks.{i}.attn.to_q.lora_A.weight"
                      for i in range(9, 19))),
            "attn.to_q.lora_A.weight and 6 more",
        ),
        (
            "ordinary",
            lora_of("transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight"),
            "is an ordinary LoRA, not a condition LoRA.*add_q_proj.*load it with Load LoRA",
        ),
        (
            "half",
            lora_of("transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
            "only half of the LoRA for transformer_blocks.0.attn.to_q.*download it again",
        ),
        (
            "shape",
            {
                "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 3072),
                "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(3072, 4),
            },
            r"another size: transformer_blocks.0.attn.to_q.*needs \(32, rank\)",
        ),
        (
            "rank",
            {
                "transformer.x_embedder.lora_A.weight": torch.zeros(4, 64),
                "transformer.x_embedder.lora_B.weight": torch.zeros(32, 8),
            },
            "x_embedder",
        ),
    ],
)  # fmt: skip
def test_lora_files_that_do_not_fit(model, name, tensors, pattern) -> None:
    file = save_lora(f"{name}.safetensors", tensors)
    with refused(f"lora_name: {file} .*{pattern}") as error:
        apply(model, random_condition(), file)
    sentence(error)


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("empty.safetensors", b"", "can't be read.*download it again"),
        ("noise.safetensors", b"\x80\x02}q\x00." * 40, "can't be read.*download it again"),
        ("pickle.pt", b"\x80\x02}q\x00.", "not a .safetensors file.*convert"),
        ("nothing.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "holds no tensors"),
    ],
)
def test_files_that_are_no_lora(model, name, content, pattern) -> None:
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    folder_paths.filename_list_cache.clear()
    with refused(f"lora_name: {name} .*{pattern}") as error:
        apply(model, random_condition(), name)
    sentence(error)


def test_a_truncated_file(model) -> None:
    name = random_lora("truncated.safetensors")
    path = Path(folder_paths.get_full_path("loras", name))
    path.write_bytes(path.read_bytes()[:-100])
    with refused("truncated.safetensors can't be read.*incomplete.*download it again") as error:
        apply(model, random_condition(), name)
    sentence(error)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "absent.safetensors"])
def test_lora_name_outside_the_folder(model, name) -> None:
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    Path(folder_paths.get_full_path("loras", random_lora("inside.safetensors"))).rename(
        folder.parent / "outside.safetensors"
    )
    folder_paths.filename_list_cache.clear()
    with refused("lora_name: there is no .* in ComfyUI's loras folder") as error:
        apply(model, random_condition(), name)
    sentence(error)


def encode_image(image, mask=None, vae=None):
    return ConditionEncode.execute(image, vae or LatentVae(), "aligned", 0, 0, 1.0, mask)[0]


@pytest.mark.parametrize(("height", "width"), [(15, 64), (64, 15), (1, 1)])
def test_an_image_smaller_than_a_token(height, width) -> None:
    with refused(f"image: {width}x{height} pixels is smaller than one token") as error:
        encode_image(torch.rand(1, height, width, 3))
    sentence(error)


def test_an_image_with_nan() -> None:
    with refused("image: it holds NaN") as error:
        encode_image(torch.full((1, 32, 32, 3), float("nan")))
    sentence(error)


def test_all_tokens_masked_away() -> None:
    with refused("mask: it keeps no token") as error:
        encode_image(torch.rand(1, 32, 48, 3), torch.zeros(1, 32, 48))
    sentence(error)


def test_a_vae_of_another_model() -> None:
    class SdVae:
        def encode(self, pixels):
            return torch.zeros(1, 4, pixels.shape[1] // 8, pixels.shape[2] // 8)

    with refused("vae: it gives latents of shape .*FLUX.1's VAE") as error:
        encode_image(torch.rand(1, 32, 48, 3), vae=SdVae())
    sentence(error)


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.8, 0.2), (1.0, 1.0)])
def test_start_not_before_end(model, start, end) -> None:
    lora = random_lora("startend.safetensors")
    with refused("start_percent: .* is not below end_percent") as error:
        ApplyLora.execute(model, random_condition(), lora, 1.0, 1.0, "auto", start, end)
    sentence(error)


def test_a_mask_of_another_size_is_resized_with_a_warning(caplog) -> None:
    mask = torch.zeros(1, 4, 4)
    mask[:, :2] = 1
    condition = encode_image(torch.rand(1, 64, 64, 3), mask)
    assert "mask: 4x4 was resized to the image's 64x64" in caplog.text
    assert condition.keep[:2].all() and not condition.keep[-1].any()


def test_an_image_that_is_no_multiple_of_16_is_cropped_with_a_warning(caplog) -> None:
    image = torch.rand(1, 70, 57, 3)
    condition = encode_image(image)
    assert "image: 57x70 was cropped around its centre to 48x64" in caplog.text
    assert torch.equal(condition.pixels, image[:, 3:67, 4:52])


def test_more_images_than_pictures_is_said(model, caplog) -> None:
    conditioned = apply(model, encode(torch.randn(3, 16, 8, 8)), random_lora("images.safetensors"))
    sample(conditioned, steps=1)
    assert "image: it holds 3 images for 1 pictures" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, True),
        ({"position_scale": 2.0}, False),
        ({"placement": "fit"}, False),
        ({"placement": "right"}, False),
    ],
)
def test_an_aligned_condition_of_another_size_is_said(model, caplog, options, said) -> None:
    conditioned = apply(model, random_condition(3, 3, **options), random_lora("size.safetensors"))
    sample(conditioned, 6, 6, steps=1)
    text = "aligned, the condition covers 48x48 pixels from the upper left of a picture of 96x96"
    assert (text in caplog.text) == said


def test_a_cache_without_a_condition_is_said(model, caplog) -> None:
    cached = ConditionCache.execute(model, "auto", 5, "model", "auto")[0]
    assert torch.equal(sample(cached), sample(model))
    assert "no condition is applied" in caplog.text


@pytest.mark.parametrize(
    ("refuse", "pattern"),
    [
        (
            lambda m, lora: random_condition(placement="nowhere"),
            "placement: nowhere is not on offer",
        ),
        (
            lambda m, lora: random_condition(position_scale=0.0),
            "position_scale: 0 is out of bounds",
        ),
        (
            lambda m, lora: random_condition(position_scale=float("nan")),
            "position_scale: nan is out of bounds",
        ),
        (
            lambda m, lora: apply(m, random_condition(), lora, attention="x"),
            "attention: x is not on",
        ),
        (
            lambda m, lora: apply(m, random_condition(), lora, condition_scale=-1.0),
            "condition_scale: -1 is out of bounds; use a value from 0 to 1000",
        ),
        (
            lambda m, lora: apply(m, random_condition(), lora, strength=float("inf")),
            "strength: inf is out of bounds",
        ),
        (lambda m, lora: with_cache(m, "never"), "reuse: never is not on offer; choose auto or"),
        (lambda m, lora: with_cache(m, "auto", 0), "refresh_every: 0 is out of bounds"),
        (lambda m, lora: ImageGuidance.execute(m, -2.0), "image_guidance_scale: -2 is out of"),
        (lambda m, lora: compact(random_condition(), compression=1.5), "compression: 1.5 is out"),
        (lambda m, lora: compact(random_condition(), prune="all"), "prune: all is not on offer"),
        (lambda m, lora: compact(random_condition(), prune="empty", grow=-1), "grow: -1 is out of"),
    ],
)
def test_values_that_no_widget_gives(model, refuse, pattern) -> None:
    """A workflow file can hold anything, and not every host checks lists and bounds."""
    lora = random_lora("bounds.safetensors")
    with refused(re.escape(pattern)) as error:
        refuse(model, lora)
    sentence(error)
