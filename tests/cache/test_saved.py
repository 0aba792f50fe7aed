"""A condition's K/V as a file: the same picture, refused where they don't fit, wholly written."""

import json
import struct
from dataclasses import replace

import comfy.sd
import folder_paths
import pytest
import torch
from helpers.refusals import refused, sentence
from helpers.saved import independent, read, write
from safetensors.torch import load_file, safe_open, save_file
from tiny import (
    apply,
    flux_config,
    make_model,
    prompt,
    random_condition,
    random_easycontrol_lora,
    recorded_runs,
    reference,
    relative_error,
    sample,
    with_cache,
)

import omini2_extension.nodes as nodes
from omini2_extension.omini2_core.cache import file as cache_file
from omini2_extension.omini2_core.host import folders


@pytest.mark.parametrize(("storage", "tolerance"), [("model", 1e-6), ("fp8", 2e-2)])
def test_the_same_picture_without_image_and_lora(
    model, lora, cache_folder, storage, tolerance
) -> None:
    conditioned = with_cache(independent(model, lora), storage=storage)
    want = sample(independent(model, lora))
    name = write(conditioned, cache_folder, description="a character")
    out = nodes.LoadCache.execute(model, name, 1.0, 0.0, 1.0)
    assert out[1] == "a character"
    with recorded_runs() as runs:
        got = sample(out[0])
    assert relative_error(got, want) < tolerance
    assert (runs[0].tokens, runs[0].refreshes, runs[0].branches_computed) == ([36], 0, 0)


def test_condition_scale_and_percents(model, lora, cache_folder, caplog) -> None:
    name = write(independent(model, lora), cache_folder)
    want = sample(independent(model, lora, condition_scale=1.4, start_percent=0.3))
    assert relative_error(sample(read(model, name, 1.4, 0.3)), want) < 1e-6
    assert torch.equal(sample(read(model, name, 0.0)), sample(model))
    assert "another prompt" not in caplog.text


@pytest.mark.parametrize(
    "settings", [{"start_percent": 0.2}, {"end_percent": 0.5}, {"condition_scale": 0.0}]
)
def test_what_counts_later_changes_no_file(model, lora, cache_folder, settings) -> None:
    """When and how much a condition counts is a setting of Load Cache."""
    name = write(independent(model, lora, **settings), cache_folder)
    want = sample(independent(model, lora))
    assert relative_error(sample(read(model, name)), want) < 1e-6


def test_where_and_when_the_prompt_counts_changes_no_file(model, lora, cache_folder) -> None:
    want = sample(independent(model, lora))
    for settings in ({"start_percent": 0.5}, {"area": (6, 6, 0, 6)}, {"mask": torch.ones(1, 8, 8)}):
        name = write(independent(model, lora), cache_folder, prompt(**settings))
        assert relative_error(sample(read(model, name)), want) < 1e-6


def test_several_prompts_are_refused(model, lora, cache_folder) -> None:
    with refused("^positive: it holds 2 prompts, and K/V belong to one"):
        write(independent(model, lora), cache_folder, [*prompt(0), *prompt(1)])


def test_beside_conditions_that_are_computed(model, lora, cache_folder) -> None:
    """Two files, a joint and an independent condition, off the device as well."""
    other = random_condition(3, 4, 1, placement="right")
    name = write(independent(model, lora), cache_folder)
    both = apply(read(model, name), other, lora, attention="joint")
    want = sample(apply(independent(model, lora), other, lora, attention="joint"))
    assert relative_error(sample(both), want) < 1e-5
    away = with_cache(both, "every_n_steps", 1, keep_on="cpu")
    assert relative_error(sample(away), want) < 1e-5


def test_another_prompt_is_warned_about(model, lora, cache_folder, caplog) -> None:
    name = write(independent(model, lora), cache_folder, positive=prompt(3))
    got = sample(read(model, name))
    assert caplog.text.count("computed with another prompt") == 1
    assert relative_error(got, sample(independent(model, lora))) > 1e-6


def test_guidance_counts_where_the_branch_follows_it(model, cache_folder, caplog) -> None:
    conditioned = apply(model, random_condition(), random_easycontrol_lora("saved_e.safetensors"))
    name = write(conditioned, cache_folder)
    sample(read(model, name))
    assert "another prompt" not in caplog.text
    sample(read(model, name), positive=prompt(guidance=1.5))
    assert "another prompt or guidance" in caplog.text


def test_ordinary_loras_count_where_the_branch_keeps_them(model, cache_folder) -> None:
    """EasyControl's conditions are computed with them on, so a file fits no model without."""
    style = reference("dev_like").under("lora.style.")
    styled, _ = comfy.sd.load_lora_for_models(model, None, style, 1.0, 0)
    weaker, _ = comfy.sd.load_lora_for_models(model, None, style, 0.5, 0)
    easy = random_easycontrol_lora("saved_e.safetensors")
    for own, others in ((styled, (model, weaker)), (model, (styled, weaker))):
        conditioned = apply(own, random_condition(), easy)
        name = write(conditioned, cache_folder)
        assert relative_error(sample(read(own, name)), sample(conditioned)) < 1e-6
        for other in others:
            with refused("cache_name: .*made with other weights.*the same LoRAs of Load LoRA"):
                read(other, name)


def test_image_guidance_needs_a_black_image(model, lora, cache_folder) -> None:
    guided = nodes.ImageGuidance.execute(independent(model, lora), 1.5)[0]
    want = sample(guided)
    loaded = nodes.ImageGuidance.execute(read(model, write(guided, cache_folder)), 1.5)[0]
    assert relative_error(sample(loaded), want) < 1e-6
    without = read(model, write(independent(model, lora), cache_folder))
    with refused("cache_name: the file holds no K/V of a black image") as error:
        sample(nodes.ImageGuidance.execute(without, 1.5)[0])
    sentence(error)


def test_fit_belongs_to_one_size_of_picture(model, lora, cache_folder) -> None:
    name = write(independent(model, lora, random_condition(placement="fit")), cache_folder)
    sample(read(model, name), steps=1)
    with refused("cache_name: the condition was fitted to a picture of 96x96") as error:
        sample(read(model, name), 6, 8)
    sentence(error)
    sample(read(model, write(independent(model, lora), cache_folder)), 6, 8, steps=1)


def test_saving_leaves_the_model_as_it_was(model, lora, cache_folder) -> None:
    conditioned = with_cache(independent(model, lora))
    want, options = sample(conditioned), repr(conditioned.model_options)
    write(conditioned, cache_folder)
    assert repr(conditioned.model_options) == options
    assert torch.equal(sample(conditioned), want)


def test_ordinary_loras_do_not_matter(lora, cache_folder) -> None:
    ref = reference("dev_like")
    base = ref.model()
    styled = comfy.sd.load_lora_for_models(base, None, ref.under("lora.style."), 0.7, 0)[0]
    name = write(independent(styled, lora), cache_folder)
    sample(styled, steps=1)  # its weights are patched in place now
    want = sample(independent(base, lora))
    assert relative_error(sample(read(base, name)), want) < 1e-5


# --- refusals ------------------------------------------------------------------------------------


def other_weights():
    weights = {k: v.clone() for k, v in make_model(flux_config(True)).model.diffusion_model
               .state_dict().items()}  # fmt: skip
    weights["double_blocks.1.img_mlp.2.weight"] += 1e-3
    return make_model(flux_config(True), weights)


def merged():
    model = make_model(flux_config(True))
    clone = model.clone()
    clone.add_patches(other_weights().get_key_patches("diffusion_model."), 0.5, 0.5)
    return clone


MISFITS = {
    "other weights": (other_weights, "was made with other weights; load the model"),
    "dtype": (
        lambda: make_model(flux_config(True), None, torch.bfloat16),
        r"was computed in torch.float32 and this model computes in torch.bfloat16",
    ),
    "depth": (lambda: make_model(flux_config(True, depth=3)), "for a model of another size"),
    "merged": (merged, "model: its weights are merged or patched"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_refused(model, lora, cache_folder, misfit) -> None:
    make, pattern = MISFITS[misfit]
    name = write(independent(model, lora), cache_folder)
    with refused(pattern) as error:
        read(make(), name)
    sentence(error)


def changed_header(path, change) -> None:
    """Rewrites a file's own description, its hash included."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[cache_file.HEADER])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, {cache_file.HEADER: json.dumps(header)})


LIES = {
    "tokens": lambda h, t: h.update(tokens=35),
    "many tokens": lambda h, t: h.update(tokens=1 << 40),
    "storage": lambda h, t: h.update(storage="fp8"),
    "images": lambda h, t: h.update(images=["image", "empty"]),
    "size": lambda h, t: h.update(picture_hw=["a", 2]),
    "hash": lambda h, t: h.update(hash="0" * 32),
    "version": lambda h, t: h.update(version="1"),
    "no fit": lambda h, t: h.pop("fit"),
    "values": lambda h, t: t["image.0.k"].add_(1e-3),
    "missing": lambda h, t: t.pop("image.3.v"),
    "more": lambda h, t: t.update(other=torch.zeros(1)),
    "format": lambda h, t: t.update({"image.0.k": t["image.0.k"].half()}),
    "pooled": lambda h, t: t.update(pooled=torch.zeros(2, 3)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(model, lora, cache_folder, lie, monkeypatch) -> None:
    name = write(independent(model, lora), cache_folder)
    changed_header(cache_folder / name, LIES[lie])
    if lie not in ("hash", "values"):  # these two can only be told from what was read
        monkeypatch.setattr(
            cache_file, "_entry", lambda *a: pytest.fail("read before it was checked")
        )
        monkeypatch.setattr(
            cache_file, "_hash", lambda *a: pytest.fail("read before it was checked")
        )
    with refused(f"cache_name: {name} can't be used") as error:
        read(model, name)
    sentence(error)


@pytest.mark.parametrize("keep", [0, 6, 5000], ids=["empty", "cut header", "cut tensors"])
def test_a_broken_file_is_refused(model, lora, cache_folder, keep) -> None:
    name = write(independent(model, lora), cache_folder)
    (cache_folder / name).write_bytes((cache_folder / name).read_bytes()[:keep])
    with refused(f"cache_name: {name} can't be used"):
        read(model, name)
    (cache_folder / name).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with refused(f"cache_name: {name} can't be used"):
        read(model, name)


def test_other_files_are_refused(model, cache_folder) -> None:
    cache_folder.mkdir(exist_ok=True)
    save_file({"x": torch.zeros(1)}, cache_folder / "lora.safetensors")
    folder_paths.filename_list_cache.pop(folders.FOLDER, None)
    with refused("lora.safetensors holds no condition's K/V"):
        read(model, "lora.safetensors")
    for name in ("../lora.safetensors", "missing.safetensors", "/etc/passwd"):
        with refused("cache_name: there is no"):
            read(model, name)


def two_images():
    return replace(random_condition(), latent=torch.zeros(2, 16, 12, 12))


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda m, a: m, "model: it has 0 conditions and a file holds one"),
        (lambda m, a: independent(independent(m, a), a), "model: it has 2 conditions"),
        (lambda m, a: apply(m, random_condition(), a), "model: a joint condition looks at"),
        (
            lambda m, a: independent(m, a, two_images()),
            "model: the condition holds several images",
        ),
    ],
)  # fmt: skip
def test_what_can_not_be_saved_is_refused(model, lora, cache_folder, make, pattern) -> None:
    with refused(pattern) as error:
        write(make(model, lora), cache_folder)
    sentence(error)
    assert not cache_folder.exists() or not list(cache_folder.iterdir())


def test_never_over_an_older_one(model, lora, cache_folder) -> None:
    first = write(independent(model, lora), cache_folder)
    assert write(independent(model, lora), cache_folder) != first


def test_a_new_file_under_an_old_name_is_loaded_anew(model, lora, cache_folder) -> None:
    name = write(independent(model, lora), cache_folder)
    before = nodes.LoadCache.fingerprint_inputs(cache_name=name, condition_scale=1.0)
    path = cache_folder / name
    import os

    os.utime(path, (1, 1))
    assert nodes.LoadCache.fingerprint_inputs(cache_name=name, condition_scale=1.0) != before
