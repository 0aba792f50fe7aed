"""The trainer's mathematics against the original's numbers and against the engine in the host."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from comfy.latent_formats import Flux as FluxLatents
from tiny import (
    CONFIG,
    Case,
    LatentVae,
    apply,
    compact,
    make_model,
    pixel_mask,
    prompt,
    random_condition,
    random_lora,
    record,
    reference,
    relative_error,
    save_lora,
)
from torch import Tensor

import omini2_extension.nodes as nodes
from omini2_extension.omini2_core.flux1.numbers import rope_axes
from omini2_extension.omini2_core.lora.file import read_safetensors
from omini2_extension.omini2_core.tokens.condition import (
    Condition,
    Placement,
    pack,
    token_positions,
    unpack,
)

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from omini2_extension.omini2_core.training.base import from_tensors, original_name
from omini2_extension.omini2_core.training.branch import ConditionedFlux, ConditionTokens
from omini2_extension.omini2_core.training.config import parse_config
from omini2_extension.omini2_core.training.lora_file import (
    adapter_name,
    add_loras,
    load_into,
    main_adapter,
)

TOLERANCE = 1e-5
FILES = ("dev_like", "schnell_like")
MOST = 16  # at least the rank of every LoRA in the reference files


@pytest.fixture(autouse=True)
def _grad() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def loras_folder() -> Path:
    import folder_paths

    return Path(folder_paths.get_folder_paths("loras")[0])


def trainer_model(
    weights: dict[str, Tensor], lora_names: list[str], **changes: object
) -> ConditionedFlux:
    """The trainer's model with these base weights and LoRA files, one per condition."""
    config = parse_config(
        {
            "base": "demo",
            "output": "unused",
            "data": {"folder": str(Path(__file__).parent)},
            "conditions": [{"type": "grey", "name": f"c{i}"} for i in range(len(lora_names) or 1)],
            **changes,
        }
    )
    flux = from_tensors(
        {original_name(k): w for k, w in weights.items()}, torch.float32, CONFIG["axes_dim"]
    )
    if lora_names:
        add_loras(flux, config)
        for index, name in enumerate(lora_names):
            load_into(flux, adapter_name(index), loras_folder() / name, config)
    return ConditionedFlux(flux, main_adapter=main_adapter(config)).eval()


def condition_tokens(condition: Condition, hw: tuple[int, int], index: int, **options: bool):
    latent = FluxLatents().process_in(condition.latent)
    ids = torch.nn.functional.pad(condition.positions(hw), (1, 0))[None]
    return ConditionTokens(condition.select(pack(latent)), ids, adapter_name(index), **options)


def picture_ids(hw: tuple[int, int]) -> Tensor:
    return torch.nn.functional.pad(token_positions(hw, Placement(), hw), (1, 0))[None]


def host_weights(model: object) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.model.diffusion_model.state_dict().items()}


def host_case(hw: tuple[int, int], seed: int = 3) -> Case:
    """Noise levels and noisy pictures at which both are evaluated."""
    generator = torch.Generator().manual_seed(seed)
    [[text, options]] = prompt(0)
    shape = (2, 1, 16, 2 * hw[0], 2 * hw[1])
    return Case(
        {"steps": [0.8, 0.3], "guidance": options["guidance"]},
        {
            "latent": torch.randn(shape[1:], generator=generator),
            "noise": torch.randn(shape, generator=generator),
            "txt": text,
            "pooled": options["pooled_output"],
        },
    )


def trainer_velocities(
    model: ConditionedFlux,
    case: Case,
    conditions: list[ConditionTokens],
    rows: Tensor | None = None,
) -> Tensor:
    """Velocities of a case: (steps, batch, 16, 2h, 2w), or the tokens of ``rows``."""
    latent = case.tensors["latent"]
    hw = latent.shape[-2] // 2, latent.shape[-1] // 2
    ids, found = picture_ids(hw), []
    for sigma, noise in zip(case.meta["steps"], case.tensors["noise"], strict=True):
        tokens = pack(latent + noise)
        if rows is not None:
            tokens, its = tokens[:, rows], ids[:, rows]
        else:
            its = ids
        batch = len(tokens)
        velocity = model(
            tokens,
            case.tensors["txt"].expand(batch, -1, -1),
            case.tensors["pooled"].expand(batch, -1),
            torch.full((batch,), sigma),
            its,
            conditions,
            torch.full((batch,), float(case.meta["guidance"])),
        )
        found.append(velocity if rows is not None else unpack(velocity, hw))
    return torch.stack(found)


@pytest.mark.parametrize("guidance", [True, False])
def test_single_files_of_other_sizes_load_like_flux(guidance: bool) -> None:
    from tiny import flux_config

    model = make_model(flux_config(guidance))
    case = host_case((4, 5))
    want = record(model, case)
    got = trainer_velocities(trainer_model(host_weights(model), []), case, [])
    assert relative_error(got, want) < TOLERANCE
    assert rope_axes(128) == [16, 56, 56]


@pytest.mark.parametrize("attention", ["joint", "independent"])
@pytest.mark.parametrize("guidance", [True, False])
def test_several_conditions_give_the_engines_velocity(attention: str, guidance: bool) -> None:
    from tiny import flux_config

    hw = (6, 5)
    keep = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    made = [
        random_condition(6, 5, seed=1),
        random_condition(3, 5, seed=2, placement="custom", delta=(1, -3), position_scale=2.0),
        random_condition(4, 3, seed=3, placement="fit"),
        random_condition(6, 5, seed=4, keep=keep),
    ]
    names = [random_lora(f"parity{i}.safetensors", seed=i, scale=0.3) for i in range(len(made))]
    model = make_model(flux_config(guidance))
    weights = host_weights(model)
    for condition, name in zip(made, names, strict=True):
        model = apply(model, condition, name, attention=attention)
    case = host_case(hw)
    want = record(model, case)
    trainer = trainer_model(weights, names)
    conditions = [
        condition_tokens(c, hw, i, independent=attention == "independent")
        for i, c in enumerate(made)
    ]
    assert relative_error(trainer_velocities(trainer, case, conditions), want) < TOLERANCE
    # Each condition matters, so none of them agrees by being ignored.
    for i in range(len(made)):
        without = trainer_velocities(trainer, case, conditions[:i] + conditions[i + 1 :])
        assert relative_error(without, want) > 100 * TOLERANCE


@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_a_lora_on_the_picture_too_gives_the_engines_velocity(attention: str) -> None:
    """As the family that the trainer writes into the file has it; other conditions go without."""
    from tiny import flux_config

    hw = (6, 5)
    made = [random_condition(6, 5, seed=1), random_condition(3, 3, seed=2, placement="right")]
    names = [random_lora(f"parity{i}.safetensors", seed=i) for i in range(2)]
    model = make_model(flux_config(True))
    weights = host_weights(model)
    for condition, name, family in zip(made, names, ("IEAP", "OminiControl"), strict=True):
        model = apply(model, condition, name, attention=attention, family=family)
    case = host_case(hw)
    want = record(model, case)
    own = [{"type": "grey", "name": "c0", "main_lora": True}, {"type": "grey", "name": "c1"}]
    tokens = [
        condition_tokens(c, hw, i, independent=attention == "independent")
        for i, c in enumerate(made)
    ]
    trainer = trainer_model(weights, names, conditions=own)
    assert relative_error(trainer_velocities(trainer, case, tokens), want) < TOLERANCE
    without = trainer_velocities(trainer_model(weights, names), case, tokens)
    assert relative_error(without, want) > 100 * TOLERANCE


@pytest.mark.parametrize("name", list(reference("ieap").meta["cases"]))
def test_ieaps_own_numbers(name: str) -> None:
    ref = reference("ieap")
    case = ref.case(name)
    if case.meta["strength"] != 1.0:
        pytest.skip("the trainer has no condition_scale")
    [cond] = case.meta["conds"]
    scale = (cond["scale"],) * 2
    hw, size = tuple(case.meta["hw"]), tuple(cond["hw"])
    places = token_positions(size, Placement("custom", tuple(cond["delta"]), scale), hw)
    ids = torch.nn.functional.pad(places, (1, 0))[None]
    tokens = ConditionTokens(pack(case.tensors["cond0.latent"]), ids, adapter_name(0))
    model = trainer_model(
        host_weights(ref.model()),
        [ref.lora_file(cond["lora"])],
        conditions=[{"type": "grey", "main_lora": case.meta["latent_lora"]}],
    )
    got = trainer_velocities(model, case, [tokens])
    want = case.tensors["pred_every_step"]
    assert relative_error(torch.stack([pack(v) for v in got]), want) < TOLERANCE


def test_compressed_and_pruned_conditions_give_the_engines_velocity() -> None:
    from tiny import flux_config

    image = torch.zeros(1, 96, 96, 3)
    image[:, 20:60, 30:80] = torch.rand(1, 40, 50, 3, generator=torch.Generator().manual_seed(0))
    condition = nodes.ConditionEncode.execute(image, LatentVae(), "aligned", 0, 0, 1.0, None)[0]
    condition = compact(condition, compression=0.5, prune="empty")[0]
    assert condition.keep is not None
    name = random_lora("parity_compact.safetensors")
    model = make_model(flux_config(True))
    weights = host_weights(model)
    case = host_case((6, 6))
    want = record(apply(model, condition, name), case)
    tokens = condition_tokens(condition, (6, 6), 0)
    got = trainer_velocities(trainer_model(weights, [name]), case, [tokens])
    assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_integration_gives_the_engines_velocity(attention: str) -> None:
    from tiny import flux_config

    hw = (6, 6)
    paint = torch.zeros(hw, dtype=torch.bool)
    paint[1:4, 2:5] = True
    condition = random_condition(*hw, seed=7)
    condition = compact(
        condition, token_integration=True, mask=pixel_mask(paint), shift_schedule=False
    )[0]
    name = random_lora("parity_integration.safetensors")
    model = make_model(flux_config(True))
    weights = host_weights(model)
    case = host_case(hw)
    # The engine shows the model the known tokens as they are, whatever the noise says.
    want = record(apply(model, condition, name, attention=attention), case)
    rows = paint.flatten()
    tokens = condition_tokens(condition, hw, 0, independent=attention == "independent")
    got = trainer_velocities(trainer_model(weights, [name]), case, [tokens], rows)
    assert relative_error(got, torch.stack([pack(w)[:, rows] for w in want])) < TOLERANCE


def of_rank(tensors: dict[str, Tensor], rank: int, name: str) -> str:
    """The same LoRA with zeros up to a rank and on all modules, as all of a run have them."""
    full = read_safetensors(loras_folder() / random_lora(f"{name}.safetensors", rank=rank))[0]
    padded = {key: torch.zeros_like(value) for key, value in full.items()}
    for key, value in tensors.items():
        short = rank - value.shape[0 if "lora_A" in key else 1]
        space = (0, 0, 0, short) if "lora_A" in key else (0, short)
        padded[key] = torch.nn.functional.pad(value, space)
    return save_lora(f"{name}.safetensors", padded)


@pytest.mark.parametrize("file", FILES)
def test_the_originals_numbers(file: str) -> None:
    ref = reference(file)
    weights = host_weights(ref.model())
    checked = 0
    for name, meta in ref.meta["cases"].items():
        if meta.get("integrate") or meta.get("strength", 1.0) != 1.0 or "main" in meta:
            continue
        case = ref.case(name)
        latent = case.tensors["latent"]
        hw = latent.shape[-2] // 2, latent.shape[-1] // 2
        conditions, names = [], []
        for k, cond in enumerate(meta["conds"]):
            tokens = case.tensors[f"cond{k}.latent"]
            size = tokens.shape[-2] // 2, tokens.shape[-1] // 2
            delta = tuple(float(d) for d in cond.get("delta", (0, 0)))
            scale = float(cond.get("scale", 1.0))
            places = token_positions(size, Placement("custom", delta, (scale, scale)), hw)
            rows = case.tensors.get(f"cond{k}.keep", torch.ones(size)).flatten().bool()
            ids = torch.nn.functional.pad(places[rows], (1, 0))[None]
            conditions.append(
                ConditionTokens(
                    pack(tokens)[:, rows], ids, adapter_name(k), bool(meta.get("independent"))
                )
            )
            names.append(of_rank(ref.under(f"lora.{cond['lora']}."), MOST, f"parity{k}"))
        batch = len(latent)
        conditions = [
            ConditionTokens(c.tokens.expand(batch, -1, -1), c.ids, c.adapter, c.independent)
            for c in conditions
        ]
        model = trainer_model(weights, names, rank=MOST)
        got = trainer_velocities(model, case, conditions)
        want = case.tensors["pred_every_step"]
        assert relative_error(torch.stack([pack(v) for v in got]), want) < TOLERANCE, name
        checked += 1
    assert checked >= 4


def test_padding_changes_nothing() -> None:
    """Samples of different lengths in one batch come out as each does alone."""
    from tiny import flux_config

    hw = (5, 4)
    name = random_lora("parity_padding.safetensors")
    trainer = trainer_model(host_weights(make_model(flux_config(True))), [name])
    generator = torch.Generator().manual_seed(5)
    lengths, texts, pictures = (9, 20, 0), (4, 7, 6), (20, 12, 17)
    full = {
        "c": torch.randn(3, 20, 64, generator=generator),
        "t": torch.randn(3, 7, 24, generator=generator),
        "x": torch.randn(3, 20, 64, generator=generator),
        "p": torch.randn(3, 16, generator=generator),
    }
    ids, time = picture_ids(hw), torch.tensor([0.9, 0.5, 0.1])

    def mask(counts: tuple[int, ...], size: int) -> Tensor:
        return torch.arange(size) < torch.tensor(counts)[:, None]

    for independent in (False, True):
        together = trainer(
            full["x"], full["t"], full["p"], time, ids,
            [ConditionTokens(full["c"], ids, adapter_name(0), independent, mask(lengths, 20))],
            None, mask(pictures, 20), mask(texts, 7),
        )  # fmt: skip
        assert torch.isfinite(together).all()
        for i, (c, t, x) in enumerate(zip(lengths, texts, pictures, strict=True)):
            one = slice(i, i + 1)
            own = [ConditionTokens(full["c"][one, :c], ids[:, :c], adapter_name(0), independent)]
            alone = trainer(
                full["x"][one, :x], full["t"][one, :t], full["p"][one], time[one], ids[:, :x],
                own if c else [],
            )  # fmt: skip
            assert relative_error(together[one, :x], alone) < TOLERANCE
