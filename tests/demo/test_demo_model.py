"""The demo model beside the host's own nodes, as a newcomer's first graph uses it."""

from pathlib import Path

import comfy.model_base
import nodes
import pytest
import torch
from comfy_extras.nodes_flux import CLIPTextEncodeFlux, FluxGuidance
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dev.demo_model import make_model as make_demo_model
from omini2_extension.nodes.demo_model import DemoModel
from omini2_extension.omini2_core.demo import model as demo_model
from omini2_extension.omini2_core.errors import Omini2Error


@pytest.fixture(scope="module")
def parts() -> tuple:
    """MODEL, CLIP and VAE, as the node gives them."""
    return DemoModel.execute().args


def prompt(clip, text: str) -> list:
    return nodes.CLIPTextEncode().encode(clip, text)[0]


def sample(parts: tuple, positive: list, steps: int = 2, side: int = 64) -> torch.Tensor:
    """What VAE Decode shows of a sampled latent: (1, side, side, 3)."""
    model, clip, vae = parts
    latent = {"samples": torch.zeros(1, 16, side // 8, side // 8)}
    (sampled,) = nodes.KSampler().sample(
        model, 5, steps, 1.0, "euler", "simple", positive, prompt(clip, ""), latent
    )
    return nodes.VAEDecode().decode(vae, sampled)[0]


def test_node_has_the_three_outputs_of_a_checkpoint() -> None:
    schema = DemoModel.define_schema()
    assert schema.node_id == "Omini2DemoModel"
    assert [output.io_type for output in schema.outputs] == ["MODEL", "CLIP", "VAE"]
    assert all(output.tooltip for output in schema.outputs) and not schema.inputs


def test_is_the_hosts_flux_with_guidance(parts) -> None:
    model = parts[0].model
    assert type(model) is comfy.model_base.Flux
    assert model.diffusion_model.params.guidance_embed
    assert model.latent_format.latent_channels == 16


def test_graph_draws_a_picture(parts) -> None:
    image = sample(parts, prompt(parts[1], "a red disc on blue"))
    assert image.shape == (1, 64, 64, 3)
    assert torch.isfinite(image).all() and image.min() >= 0 and image.max() <= 1


def test_picture_depends_on_prompt_and_guidance(parts) -> None:
    one, other = (prompt(parts[1], text) for text in ("a red disc", "two green boxes"))
    images = [sample(parts, one), sample(parts, other)]
    for guidance in (1.0, 6.0):
        images.append(sample(parts, FluxGuidance.execute(one, guidance).args[0]))
    first = images[0]
    assert torch.equal(first, sample(parts, one))
    assert all(not torch.equal(first, image) for image in images[1:])


def test_prompts_give_different_conditioning(parts) -> None:
    (one, one_pooled), (other, other_pooled) = (
        (cond, rest["pooled_output"])
        for text in ("a red disc", "a red disk")
        for cond, rest in prompt(parts[1], text)
    )
    assert (
        one.shape
        == other.shape
        == (1, demo_model.MAX_TOKENS, demo_model.TEXT_CONFIG["hidden_size"])
    )
    assert one_pooled.shape == (1, demo_model.TEXT_CONFIG["hidden_size"])
    assert not torch.equal(one, other) and not torch.equal(one_pooled, other_pooled)


BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


@pytest.mark.parametrize("text", ["", "Ein Bär, (größer:1.3)", "赤い円 🙂", "word " * 60])
def test_any_text_in_any_language_is_read(parts, text: str) -> None:
    clip = parts[1]
    chunks = clip.tokenize(text)["l"]
    tokens = [token for chunk in chunks for token, _ in chunk]
    assert all(len(chunk) == demo_model.MAX_TOKENS for chunk in chunks)
    assert len(chunks) > 1 if len(text) > 100 else len(chunks) == 1
    assert chunks[0][0][0] == demo_model.START_TOKEN
    assert tokens.count(demo_model.START_TOKEN) == len(chunks)
    assert max(tokens) < demo_model.vocabulary_size()
    words = [t for t in tokens if t not in (demo_model.START_TOKEN, demo_model.END_TOKEN)]
    said = clip.tokenizer.untokenize([(t, 1.0) for t in words])
    if not text.startswith("Ein"):  # what stands in brackets is a weight
        letters = "".join(word for _, word in said).replace("</w>", "")
        assert bytes(BYTES[letter] for letter in letters) == "".join(text.split()).encode()
    cond, rest = prompt(clip, text)[0]
    assert torch.isfinite(cond).all() and torch.isfinite(rest["pooled_output"]).all()


def test_flux_text_encode_uses_both_texts(parts) -> None:
    def encode(clip_l: str, t5xxl: str) -> tuple:
        cond, rest = CLIPTextEncodeFlux.execute(parts[1], clip_l, t5xxl, 3.5).args[0][0]
        return cond, rest["pooled_output"]

    cond, pooled = encode("one", "two")
    assert torch.equal(cond, encode("two", "two")[0])
    assert torch.equal(pooled, encode("one", "one")[1])


def test_vae_encodes_at_an_eighth(parts) -> None:
    pixels = torch.rand(1, 48, 80, 3)
    latent = nodes.VAEEncode().encode(parts[2], pixels)[0]["samples"]
    assert latent.shape == (1, 16, 6, 10)
    assert nodes.VAEDecode().decode(parts[2], {"samples": latent})[0].shape == pixels.shape


def test_vae_gives_back_what_it_was_given(parts) -> None:
    pixels = make_demo_model.draw(4, 128, torch.Generator().manual_seed(1)).movedim(1, -1)
    latent = nodes.VAEEncode().encode(parts[2], pixels)[0]["samples"]
    again = nodes.VAEDecode().decode(parts[2], {"samples": latent})[0]
    assert (again - pixels).square().mean() < 0.2 * pixels.var()
    in_model = parts[0].model.process_latent_in(latent)
    assert 0.5 < in_model.std() < 2 and in_model.mean().abs() < 0.5


def test_files_are_small() -> None:
    sizes = [file.stat().st_size for file in demo_model.FOLDER.rglob("*") if file.is_file()]
    assert sum(sizes) < 28e6


def test_making_it_again_gives_the_same_files(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        make_demo_model.make_tokenizer(folder)
        make_demo_model.make_text_encoder(folder / "text_encoder.safetensors", seed=1)
        make_demo_model.make_transformer(folder / "transformer.safetensors", seed=1)
        with torch.inference_mode(False):  # a step of training
            make_demo_model.make_vae(folder / "vae.safetensors", seed=1, steps=1, batch=1, side=16)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert len(files) == 7
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_shipped_tokenizer_is_the_scripts(tmp_path: Path) -> None:
    make_demo_model.make_tokenizer(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (demo_model.FOLDER / "tokenizer" / file.name).read_bytes()


def test_missing_or_broken_file_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "FOLDER", tmp_path)
    with pytest.raises(Omini2Error, match=r"transformer\.safetensors is missing.*install"):
        demo_model.load()
    (tmp_path / "transformer.safetensors").write_bytes(b"version https://git-lfs" * 9)
    with pytest.raises(Omini2Error, match=r"can't be read.*install"):
        demo_model.load()
    make_demo_model.make_vae(tmp_path / "transformer.safetensors", seed=0, steps=0)
    with pytest.raises(Omini2Error, match=r"other weights.*install"):
        demo_model.load()
