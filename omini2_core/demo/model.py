"""The demo model: a FLUX.1 small enough to ship, so that a graph runs on any CPU in seconds.

The host's own classes throughout, so everything that works on FLUX.1 works on it: the host's
FLUX, a CLIP text model, TAESD with 16 channels. What it draws depends on demo_model/ alone.
"""

import json
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.model_detection
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import safetensors
import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..errors import Omini2Error, Remedy, warn
from ..flux1.numbers import rope_axes

FOLDER = Path(__file__).resolve().parents[2] / "demo_model"
SIDE = 256  # pixels of the only pictures that it was trained on
LATENT_PIXELS = 8  # along a side of the picture, for one of the latent
START_TOKEN, END_TOKEN, MAX_TOKENS = 512, 513, 32
TEXT_CONFIG = {
    "num_hidden_layers": 3,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": MAX_TOKENS,
    "eos_token_id": END_TOKEN,
}


def vocabulary_size() -> int:
    """The number of tokens that the demo tokenizer knows."""
    return len(json.loads(_present("tokenizer/vocab.json").read_text(encoding="utf-8")))


class DemoTextModel(comfy.clip_model.CLIPTextModel):  # type: ignore[misc] # the host has no types
    """The host's CLIP text model with the demo tokenizer's few tokens instead of CLIP's 49408."""

    def __init__(
        self, config_dict: dict[str, Any], dtype: Any, device: Any, operations: Any
    ) -> None:
        super().__init__(config_dict, dtype, device, operations)
        width = config_dict["hidden_size"]
        self.set_input_embeddings(
            operations.Embedding(vocabulary_size(), width, dtype=dtype, device=device)
        )


class DemoTokenizer:
    """Tokens under the names that FLUX.1's two encoders have, for CLIPTextEncodeFlux too."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        self.bytes = comfy.sd1_clip.SDTokenizer(
            str(FOLDER / "tokenizer"),
            max_length=MAX_TOKENS,
            embedding_directory=embedding_directory,
            embedding_size=TEXT_CONFIG["hidden_size"],
            embedding_key="omini2_demo",
            tokenizer_data=tokenizer_data or {},
        )

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        tokens = self.bytes.tokenize_with_weights(text, return_word_ids, **kwargs)
        return {"l": tokens, "t5xxl": tokens}

    def untokenize(self, token_weight_pair: Any) -> Any:
        return self.bytes.untokenize(token_weight_pair)

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class DemoTextEncoder(comfy.sd1_clip.SD1ClipModel):  # type: ignore[misc] # the host has no types
    """One small encoder in the place of both: its last states for T5, its pooled text for CLIP."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options or {},
            name="omini2_demo",
            clip_model=comfy.sd1_clip.SDClipModel,
            max_length=MAX_TOKENS,
            textmodel_json_config=dict(TEXT_CONFIG),
            special_tokens={"start": START_TOKEN, "end": END_TOKEN, "pad": END_TOKEN},
            model_class=DemoTextModel,
            return_projected_pooled=False,
        )

    def encode_token_weights(self, token_weight_pairs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        encode = self.omini2_demo.encode_token_weights
        return encode(token_weight_pairs["t5xxl"])[0], encode(token_weight_pairs["l"])[1]


def load() -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """The demo model's parts as stock loaders would give them."""
    return _load_transformer(), _load_text_encoder(), _load_vae()


def _load_transformer() -> ModelPatcher:
    weights = _read("transformer.safetensors", "double_blocks.0.img_attn.norm.key_norm.scale")
    head_dim = weights["double_blocks.0.img_attn.norm.key_norm.scale"].numel()
    found = comfy.model_detection.detect_unet_config(weights, "")
    # comfy.sd.load_diffusion_model_state_dict would do, but detection assumes FLUX.1's heads.
    found["num_heads"] = found["hidden_size"] // head_dim
    found["axes_dim"] = rope_axes(head_dim)
    config = comfy.model_detection.model_config_from_unet_config(found, weights)
    device = model_management.get_torch_device()
    offload_device = model_management.unet_offload_device()
    dtype = model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=list(config.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    config.set_inference_dtype(
        dtype,
        model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes),
    )
    model = config.get_model(weights, "").to(offload_device)
    model.load_model_weights(weights, "")
    patcher = ModelPatcher(model, load_device=device, offload_device=offload_device)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "omini2_demo", _sample)
    return patcher


def _sample(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The host's sampling, with a word on sizes that give no picture."""
    height, width = (LATENT_PIXELS * side for side in noise.shape[-2:])
    if (height, width) != (SIDE, SIDE):
        warn(
            f"The demo model knows pictures of {SIDE}x{SIDE} only, so one of {width}x{height} will "
            f"be stripes or patches; set width and height to {SIDE}.",
            Remedy({"width": SIDE, "height": SIDE}, ("latent_image",)),
        )
    return executor(noise, *args, **kwargs)


def _load_text_encoder() -> comfy.sd.CLIP:
    weights = _read("text_encoder.safetensors", "text_model.final_layer_norm.weight")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        _present(f"tokenizer/{name}")
    target = comfy.supported_models_base.ClipTarget(DemoTokenizer, DemoTextEncoder)
    # Starting on the CPU keeps the host from moving it to a GPU before it has its weights.
    clip = comfy.sd.CLIP(target, model_options={"initial_device": torch.device("cpu")})
    clip.load_sd(weights)
    return clip


def _load_vae() -> comfy.sd.VAE:
    return comfy.sd.VAE(sd=_read("vae.safetensors", "taesd_decoder.1.weight"))


def _present(name: str) -> Path:
    path = FOLDER / name
    if not path.is_file():
        raise Omini2Error(
            f"The demo model's file {name} is missing from {FOLDER}: install the extension again."
        )
    return path


def _read(name: str, expected: str) -> dict[str, Tensor]:
    """The weights in a file of the demo model, which must hold the key `expected`."""
    path = _present(name)
    try:
        weights: dict[str, Tensor] = comfy.utils.load_torch_file(str(path), safe_load=True)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise Omini2Error(
            f"The demo model's file {path} can't be read ({error}): install the extension again."
        ) from error
    if expected not in weights:
        raise Omini2Error(
            f"The demo model's file {path} holds other weights (no {expected}): "
            "install the extension again."
        )
    return weights
