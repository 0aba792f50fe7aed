"""Extensions that run the model's blocks, or their attention, in their own way.

The stand-ins hook in as the public ones do: TeaCache, WaveSpeed's first-block cache and PuLID
replace `forward_orig` on the model, call the replaced blocks, and give attention no options.
"""

import copy
from types import MethodType

import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import pytest
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, timestep_embedding
from comfy.ldm.modules.attention import attention_pytorch
from helpers.patterns import box, integrated
from tiny import (
    apply,
    random_condition,
    relative_error,
    sample,
    with_cache,
)

import omini2_extension.nodes as nodes
from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.host import kernels

TEACACHE = "TeaCache (commit 91dff8e) run beside the host by hand too."
PULID = (
    "PuLID_Flux_ll (commit ba90657) run by hand too on 0.3.75, with its wrapper mended, which "
    "doesn't take ComfyUI's latent_shapes; on 0.33.0 it fails by itself."
)
WAVESPEED = "WaveSpeed (commit 8253745) run beside the host by hand too."


class Forward:
    """A forward as extensions write it.

    Args:
        compute: says of each evaluation, counted from 0, whether it goes beyond its first block.
        first: runs the first block in any case, as a first-block cache does.
        replaced: whether blocks that others have replaced count.
    """

    def __init__(self, compute=lambda n: True, first=False, replaced=True) -> None:
        self.compute, self.first, self.replaced = compute, first, replaced
        self.evaluations = 0
        self.residual = None

    def on(self, model):
        """A clone of the model that runs it."""
        clone = model.clone()

        def wrapper(apply_model, kwargs):
            flux = clone.model.diffusion_model
            flux.forward_orig = MethodType(self, flux)
            try:
                return apply_model(kwargs["input"], kwargs["timestep"], **kwargs["c"])
            finally:
                del flux.forward_orig

        clone.set_model_unet_function_wrapper(wrapper)
        self.evaluations = 0
        return clone

    def __call__(
        self, flux, img, img_ids, txt, txt_ids, timesteps, y, guidance=None,
        control=None, transformer_options=None, attn_mask=None, **newer,
    ):  # fmt: skip
        img, txt = flux.img_in(img), flux.txt_in(txt)
        vec = flux.time_in(timestep_embedding(timesteps, 256))
        vec = vec + flux.guidance_in(timestep_embedding(guidance, 256)) + flux.vector_in(y)
        pe = flux.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))
        replaced = transformer_options.get("patches_replace", {}).get("dit", {})

        def run(kind, index, **streams):
            block = getattr(flux, f"{kind}_blocks")[index]

            def original(args):
                if kind == "double":
                    img, txt = block(args["img"], args["txt"], vec=args["vec"], pe=args["pe"])
                    return {"img": img, "txt": txt}
                return {"img": block(args["img"], vec=args["vec"], pe=args["pe"])}

            args = {**streams, "vec": vec, "pe": pe}
            extra = {"original_block": original, "transformer_options": transformer_options}
            patch = replaced.get((f"{kind}_block", index)) if self.replaced else None
            return original(args) if patch is None else patch(args, extra)

        compute = self.compute(self.evaluations)
        self.evaluations += 1
        start = 0
        before = img.clone()
        if compute or self.first:
            out = run("double", 0, img=img, txt=txt)
            img, txt, start = out["img"], out["txt"], 1
        if compute:
            for index in range(start, len(flux.double_blocks)):
                out = run("double", index, img=img, txt=txt)
                img, txt = out["img"], out["txt"]
            both = torch.cat((txt, img), dim=1)
            for index in range(len(flux.single_blocks)):
                both = run("single", index, img=both)["img"]
            img = both[:, txt.shape[1] :]
            self.residual = img - before
        else:
            img = before + self.residual
        return flux.final_layer(img, vec)


CACHES = [
    pytest.param(
        {"compute": lambda n: n % 2 == 0},
        marks=pytest.mark.compatibility("Neighbours", "TeaCache-like skippers", "works", TEACACHE),
        id="teacache",
    ),
    pytest.param(
        {"compute": lambda n: n % 2 == 0, "first": True},
        marks=pytest.mark.compatibility(
            "Neighbours", "first-block caches (WaveSpeed)", "works", WAVESPEED
        ),
        id="first block",
    ),
]


@pytest.mark.parametrize("attention", ["joint", "independent"])
@pytest.mark.parametrize("options", CACHES)
def test_conditions_take_part_in_a_replaced_forward(model, lora, options, attention) -> None:
    conditioned = apply(model, random_condition(), lora, attention=attention)
    always = Forward(first=options.get("first", False))
    assert torch.equal(sample(always.on(conditioned)), sample(conditioned))

    skipping = Forward(**options)
    got = sample(skipping.on(conditioned), steps=6)
    before = apply(skipping.on(model), random_condition(), lora, attention=attention)
    assert torch.equal(sample(before, steps=6), got)
    assert relative_error(got, sample(conditioned, steps=6)) > 1e-3  # it does skip
    assert relative_error(got, sample(skipping.on(model), steps=6)) > 1e-3
    if attention == "independent":
        assert torch.equal(sample(skipping.on(with_cache(conditioned, "once")), steps=6), got)


@pytest.mark.parametrize("attention", ["joint", "independent"])
@pytest.mark.parametrize("options", CACHES)
def test_k_v_of_a_skipped_evaluation_are_computed_at_the_next(
    model, lora, options, attention
) -> None:
    """With a refresh at each step, reuse changes nothing, whatever was skipped."""
    conditioned = apply(model, random_condition(), lora, attention=attention)
    want = sample(Forward(**options).on(conditioned), steps=6)
    cached = with_cache(conditioned, "every_n_steps", 1)
    assert torch.equal(sample(Forward(**options).on(cached), steps=6), want)


@pytest.mark.compatibility("Neighbours", "image guidance with such skippers", "refused")
@pytest.mark.parametrize("first", [True, False])
def test_skipping_in_image_guidance_is_refused(model, lora, first) -> None:
    conditioned = apply(model, random_condition(), lora)
    guided = nodes.ImageGuidance.execute(conditioned, 1.5)[0]
    always = Forward(first=first)
    assert torch.equal(sample(always.on(guided)), sample(guided))
    skipping = Forward(lambda n: n % 2 == 0, first)
    with pytest.raises(
        Omini2Error, match=r"^image_guidance_scale: another extension \(.*test_forwards: Forward\)"
    ):
        sample(skipping.on(guided))


@pytest.mark.compatibility("Neighbours", "forwards that pass by ComfyUI's block hooks", "refused")
@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_a_forward_without_the_hooks_is_refused(model, lora, attention) -> None:
    conditioned = apply(model, random_condition(), lora, attention=attention)
    deaf = Forward(replaced=False)
    sample(deaf.on(model))
    with pytest.raises(Omini2Error, match=r"^model: another extension .* past ComfyUI's hooks"):
        sample(deaf.on(conditioned))


@pytest.mark.compatibility("Neighbours", "token integration in a replaced forward", "refused")
def test_token_integration_in_a_replaced_forward_is_refused(model, lora) -> None:
    conditioned = apply(model, integrated(random_condition(), box()), lora)
    with pytest.raises(
        Omini2Error, match=r"^token_integration: another extension \(.*test_forwards: Forward\)"
    ):
        sample(Forward().on(conditioned))


@pytest.mark.compatibility("Neighbours", "PuLID-like block patches", "works", PULID)
@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_block_patches_of_a_replaced_forward(model, lora, attention) -> None:
    """PuLID adds to each block's output, and reads the options from its own forward."""
    face = 0.3 * torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(7))

    def pulid(args, extra):
        assert "sigmas" in extra["transformer_options"]
        out = extra["original_block"](args)
        return {**out, "img": out["img"] + face}

    patched = model.clone()
    for index in range(2):
        patched.set_model_patch_replace(pulid, "dit", "double_block", index)
    conditioned = apply(patched, random_condition(), lora, attention=attention)
    got = sample(Forward().on(conditioned))
    assert relative_error(got, sample(Forward().on(patched))) > 1e-3
    alone = apply(model, random_condition(), lora, attention=attention)
    assert relative_error(got, sample(alone)) > 1e-3
    if attention == "independent":
        assert torch.equal(sample(Forward().on(with_cache(conditioned, "once"))), got)


@pytest.mark.compatibility("Neighbours", "attention replaced inside ComfyUI's modules", "refused")
@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_attention_replaced_in_the_hosts_modules_is_refused(
    model, lora, attention, monkeypatch
) -> None:
    def own(q, k, v, heads, mask=None, **options):
        return attention_pytorch(q, k, v, heads, mask=mask, skip_reshape=True)

    conditioned = apply(model, random_condition(), lora, attention=attention)
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", own)
    sample(model)
    with pytest.raises(Omini2Error, match=r"replaced (its attention|the attention of the model's)"):
        sample(conditioned)


@pytest.mark.compatibility(
    "Neighbours",
    "sage and flash attention, by a node or for all of ComfyUI",
    "works with a limit",
    "Where it takes no masks, a condition_scale other than 1 takes PyTorch's attention; a warning "
    "says so. The sage and flash attention nodes of KJNodes (commit 3f20054) run by hand too.",
)
@pytest.mark.parametrize("attention", ["joint", "independent"])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("refuses", [True, False])
def test_attention_that_takes_no_masks(
    model, lora, attention, everywhere, refuses, monkeypatch, caplog
) -> None:
    """Sage attention ignores them, flash attention in KJNodes raises an error."""
    calls = []

    def sage(q, k, v, heads, mask=None, **options):
        if refuses and mask is not None:
            raise RuntimeError("Flash attention does not support attention masks")
        calls.append(1)
        options = {k: v for k, v in options.items() if k != "transformer_options"}
        return attention_pytorch(q, k, v, heads, mask=None, **options)

    def sampled(scale, base=model):
        return sample(
            apply(base, random_condition(), lora, attention=attention, condition_scale=scale)
        )

    want = {scale: sampled(scale) for scale in (0.4, 1.0)}
    patched = model.clone()
    if everywhere:
        selected = comfy.ldm.modules.attention.wrap_attn(sage)
        monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", selected)
        monkeypatch.setattr(kernels, "optimized_attention", selected)
    else:
        options = patched.model_options["transformer_options"]
        options["optimized_attention_override"] = lambda func, *a, **k: sage(*a, **k)
    assert relative_error(sampled(1.0, patched), want[1.0]) < 1e-5
    assert calls and "takes no masks" not in caplog.text
    assert relative_error(want[0.4], want[1.0]) > 1e-3
    assert relative_error(sampled(0.4, patched), want[0.4]) < 1e-5
    assert "condition_scale: the attention that is switched on takes no masks" in caplog.text


class OwnBlock(torch.nn.Module):
    """A block that gives attention no options, as IPAdapter-Flux' do."""

    def __init__(self, block) -> None:
        super().__init__()
        self.block = block

    def forward(self, img, txt, vec, pe, attn_mask=None, **_):
        return self.block(img, txt, vec, pe, attn_mask)


class DeafBlock(DoubleStreamBlock):
    """The same, of a class of ComfyUI's."""

    def forward(self, img, txt, vec, pe, attn_mask=None, **_):
        return super().forward(img, txt, vec, pe, attn_mask)


def own_block(block):
    return OwnBlock(block)


def deaf_block(block):
    block = copy.copy(block)
    block.__class__ = DeafBlock
    return block


@pytest.mark.compatibility(
    "Neighbours",
    "blocks of another extension (IPAdapter-Flux)",
    "refused",
    "IPAdapter-Flux (commit eef22b6) run by hand too on 0.3.75; on 0.33.0 it fails by itself.",
)
@pytest.mark.parametrize("attention", ["joint", "independent"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("put", "said"),
    [
        (own_block, r"^model: another extension \(OwnBlock\) has replaced its blocks"),
        (deaf_block, "another extension .*replaced (its|the) attention"),
    ],
)
def test_blocks_of_another_extension_are_refused(model, lora, attention, first, put, said) -> None:
    def patched(model):
        clone = model.clone()
        name = "diffusion_model.double_blocks.0"
        clone.add_object_patch(name, put(model.get_model_object(name)))
        return clone

    def conditioned(model):
        return apply(model, random_condition(), lora, attention=attention)

    sample(patched(model))
    with pytest.raises(Omini2Error, match=said):
        sample(conditioned(patched(model)) if first else patched(conditioned(model)))
    sample(conditioned(model))  # though the other's blocks are still in the weights' place


@pytest.mark.compatibility(
    "Neighbours",
    "tiles of a picture within one run (Tiled Diffusion)",
    "refused",
    "Tiled Diffusion (commit a155b1b) run beside the host by hand too.",
)
@pytest.mark.parametrize("first", [True, False])
def test_tiles_within_one_run_are_refused(model, lora, first) -> None:
    def tiled(model):
        def halves(apply_model, kwargs):
            x, c = kwargs["input"], kwargs["c"]
            half = x.shape[-1] // 2
            parts = [apply_model(part, kwargs["timestep"], **c) for part in x.split(half, -1)]
            return torch.cat(parts, dim=-1)

        clone = model.clone()
        clone.set_model_unet_function_wrapper(halves)
        return clone

    sample(tiled(model))
    both = (
        apply(tiled(model), random_condition(), lora)
        if first
        else tiled(apply(model, random_condition(), lora))
    )
    with pytest.raises(
        Omini2Error, match=r"^model: it is run on 48x96 pixels .* on tiles of the picture"
    ):
        sample(both)


class OwnPositions(torch.nn.Module):
    """Positions whose distances depend on how far all of them reach, as DyPE's do."""

    def __init__(self, embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, ids):
        return self.embedding(ids * (8 / ids.amax().clamp(min=1)))


@pytest.mark.compatibility(
    "Neighbours",
    "positions that another extension computes (DyPE)",
    "refused",
    "DyPE (commit 3fd9149) run beside the host by hand too.",
)
@pytest.mark.parametrize("first", [True, False])
def test_positions_of_another_extension_are_refused(model, lora, first) -> None:
    def moved(model):
        clone = model.clone()
        own = OwnPositions(model.get_model_object("diffusion_model.pe_embedder"))
        clone.add_object_patch("diffusion_model.pe_embedder", own)
        return clone

    assert relative_error(sample(moved(model)), sample(model)) > 1e-3
    with pytest.raises(Omini2Error, match=r"^model: another extension \(OwnPositions\) computes"):
        if first:
            apply(moved(model), random_condition(), lora)
        else:
            sample(moved(apply(model, random_condition(), lora)))


@pytest.mark.compatibility(
    "Neighbours",
    "MultiGPU CFG Split",
    "refused",
    "Only where it has more than one device; the host has it since 0.33.",
)
def test_multigpu_is_refused(model, lora) -> None:
    conditioned = apply(model, random_condition(), lora)
    conditioned.set_additional_models("multigpu", [model.clone()])
    with pytest.raises(Omini2Error, match=r"^model: MultiGPU CFG Split .* take that node out"):
        sample(conditioned)
