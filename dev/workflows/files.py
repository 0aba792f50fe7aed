"""The files that example workflows load, and where they can be fetched.

Base models are those of ComfyUI's own templates; condition LoRAs are looked up in the table that
the nodes read too, `omini2_core/lora/presets.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from dev.paths import ROOT

HUGGING_FACE = "https://huggingface.co"
PRESETS = ROOT / "omini2_core" / "lora" / "presets.json"


@dataclass(frozen=True)
class ModelFile:
    """A file that a loader names, and where the editor offers to fetch it.

    Attributes:
        folder: the one in ComfyUI's models that it belongs in.
        repository: at Hugging Face.
        place: its folder in there, with a slash at the end; empty for none.
        there: its name in there, if it is another one; None where only the page is known.
    """

    name: str
    folder: str
    repository: str
    place: str = ""
    there: str | None = ""

    @property
    def url(self) -> str | None:
        if self.there is None:
            return None
        return f"{self.page}/resolve/main/{self.place}{self.there or self.name}"

    @property
    def page(self) -> str:
        return f"{HUGGING_FACE}/{self.repository}"

    @property
    def line(self) -> str:
        """Where to find it and where it goes, for a note."""
        if self.url is None:
            return f"models/{self.folder}: **{self.name}**, from [{self.repository}]({self.page})"
        line = f"models/{self.folder}: [{self.name}]({self.url})"
        if self.there:
            line += f", which is called *{self.there}* there: save it as **{self.name}**"
        return line


def _split(name: str, folder: str, repository: str) -> ModelFile:
    """A file where Comfy-Org's repositories keep most of theirs."""
    return ModelFile(name, folder, f"Comfy-Org/{repository}", f"split_files/{folder}/")


UNET, TEXT, CHECKPOINTS, LORAS = "diffusion_models", "text_encoders", "checkpoints", "loras"

# Model, text encoders and VAE in one file, 8 bits a weight.
FLUX_DEV = ModelFile("flux1-dev-fp8.safetensors", CHECKPOINTS, "Comfy-Org/flux1-dev")
FLUX_SCHNELL = ModelFile("flux1-schnell-fp8.safetensors", CHECKPOINTS, "Comfy-Org/flux1-schnell")

KONTEXT = _split("flux1-dev-kontext_fp8_scaled.safetensors", UNET, "flux1-kontext-dev_ComfyUI")
CLIP_L = ModelFile("clip_l.safetensors", TEXT, "comfyanonymous/flux_text_encoders")
T5 = ModelFile("t5xxl_fp8_e4m3fn_scaled.safetensors", TEXT, "comfyanonymous/flux_text_encoders")
FLUX_VAE = _split("ae.safetensors", "vae", "Lumina_Image_2.0_Repackaged")

KLEIN_4B = ModelFile(
    "flux-2-klein-4b-fp8.safetensors", UNET, "black-forest-labs/FLUX.2-klein-4b-fp8"
)
KLEIN_9B_KV = ModelFile(
    "flux-2-klein-9b-kv-fp8.safetensors", UNET, "black-forest-labs/FLUX.2-klein-9b-kv-fp8"
)
QWEN3_4B = _split("qwen_3_4b.safetensors", TEXT, "z_image_turbo")
QWEN3_8B = _split("qwen_3_8b_fp8mixed.safetensors", TEXT, "flux2-klein-9B")
FLUX2_VAE = _split("flux2-vae.safetensors", "vae", "flux2-dev")

QWEN_EDIT = _split("qwen_image_edit_fp8_e4m3fn.safetensors", UNET, "Qwen-Image-Edit_ComfyUI")
QWEN_EDIT_2511 = _split(
    "qwen_image_edit_2511_fp8mixed.safetensors", UNET, "Qwen-Image-Edit_ComfyUI"
)
QWEN_VL = _split("qwen_2.5_vl_7b_fp8_scaled.safetensors", TEXT, "HunyuanVideo_1.5_repackaged")
QWEN_VAE = _split("qwen_image_vae.safetensors", "vae", "Qwen-Image_ComfyUI")

KREA2 = ModelFile("krea2_turbo_fp8_scaled.safetensors", UNET, "Comfy-Org/Krea-2", f"{UNET}/")
QWEN3_VL = ModelFile("qwen3vl_4b_fp8_scaled.safetensors", TEXT, "Comfy-Org/Krea-2", f"{TEXT}/")
KREA2_LORA = ModelFile("krea2_style_reference.safetensors", LORAS, "Comfy-Org/Krea-2", f"{LORAS}/")

CHIBI = ModelFile("3D_Chibi_rank128_bf16.safetensors", LORAS, "showlab/OmniConsistency", "LoRAs/")
UNION = ModelFile("subject_depth_union.safetensors", LORAS, "Xuan-World/UniCombine", there=None)

# Families some of whose files are called as OminiControl's: those get the family's name in front.
RENAMED = "EasyControl", "UniCombine"


def condition_loras() -> Iterator[ModelFile]:
    """The published condition LoRAs, under the names that the workflows use."""
    for group in json.loads(PRESETS.read_text(encoding="utf-8")):
        place = f"{group['folder']}/" if group["folder"] else ""
        for stem in sorted(set(group["files"]) - {"(none)"}):
            there = f"{stem}.safetensors"
            name = f"{group['family']}_{there}".lower() if group["family"] in RENAMED else there
            renamed = there if name != there else ""
            yield ModelFile(name, LORAS, group["source"], place, renamed)


def by_name() -> dict[str, ModelFile]:
    """All that can be fetched, by the name that a loader has."""
    own = [file for file in globals().values() if isinstance(file, ModelFile)]
    return {file.name: file for file in (*own, *condition_loras())}


BY_NAME = by_name()
