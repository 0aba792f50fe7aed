"""What a run is told and fed: configs, sources, condition images, the cache."""

import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import LatentVae

import omini2_extension.nodes as nodes

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from helpers.training import KnownEncoders, config, write_pictures

from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.training.batches import Drawer
from omini2_extension.omini2_core.training.conditions import made_from, prepared, reduced
from omini2_extension.omini2_core.training.config import ConditionConfig, load_config, parse_config
from omini2_extension.omini2_core.training.encode import encode_data
from omini2_extension.omini2_core.training.encoders import import_host, load_encoders


def encoded(settings, encoders=None):
    encoders = encoders or KnownEncoders()
    return encode_data(settings, lambda: encoders, encoders.fingerprint, torch.float32)


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        """
base: nothing.safetensors
output: out
target_size: 100
rnak: 4
data: {folder: missing, split: 3}
conditions:
  - {type: cany}
  - {type: folder}
  - {type: canny, integration: true}
optimizer: {type: sgd}
drop_text_prob: 2
"""
    )
    with pytest.raises(Omini2Error) as error:
        load_config(path)
    lines = str(error.value).splitlines()
    for part in (
        "base: there is no nothing.safetensors",
        "target_size: sides have to be multiples of 16",
        "rnak: there is no such key; did you mean rank?",
        "data.folder: there is no missing",
        "data.split: ",
        "conditions.0.type: ",
        "conditions.1: folder goes with type: folder",
        "conditions.2: integration",
        "optimizer.type: ",
        "drop_text_prob: ",
    ):
        assert sum(part in line for line in lines) == 1, (part, error.value)
    assert "'canny'" in next(line for line in lines if "conditions.0.type" in line)
    assert len(lines) == 11


def test_conditions_that_contradict_each_other(tmp_path: Path) -> None:
    canny = {"type": "canny"}
    with pytest.raises(Omini2Error, match="called canny"):
        config(tmp_path, conditions=[canny, canny])
    paint = {"type": "resize", "integration": True}
    with pytest.raises(Omini2Error, match="only one"):
        config(tmp_path, conditions=[paint, {**paint, "name": "other"}])
    with pytest.raises(Omini2Error, match="condition_size"):
        config(tmp_path, conditions=[{**paint, "condition_size": 32}])
    edit = {"type": "grey", "main_lora": True}
    with pytest.raises(Omini2Error, match="only one condition's LoRA can be the picture's"):
        config(tmp_path, conditions=[edit, {**edit, "name": "other"}])
    with pytest.raises(Omini2Error, match="keys and values"):
        parse_config(["no mapping"])


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ({"type": "resize", "integration": True, "pruning": True}, "without pruning and position_"),
        ({"type": "canny", "fade_steps": 5, "pruning": True}, "fade_steps begins with the picture"),
        ({"type": "canny", "fade_steps": 5, "condition_size": 32}, "fade_steps needs condition_si"),
        ({"type": "mask", "masks": "."}, "masks say what integration paints"),
        ({"type": "canny", "low_threshold": 0.9}, "low_threshold is above high_threshold"),
        ({"type": "blur", "blur_radius": [3, 2]}, "blur_radius takes the smallest and the largest"),
        ({"type": "blur", "blur_radius": [0, 2]}, "blur_radius takes the smallest and the largest"),
        ({"type": "column", "column": "depth"}, "type: column is for datasets and webdataset"),
        ({"type": "canny", "position_scale": "big"}, "conditions.0.position_scale: "),
    ],
)
def test_a_condition_that_contradicts_itself(tmp_path: Path, condition: Any, said: str) -> None:
    with pytest.raises(Omini2Error, match=said):
        config(tmp_path, conditions=[condition])


def test_sources_and_encoders_are_complete(tmp_path: Path) -> None:
    for data in ({}, {"folder": ".", "datasets": "name"}):
        with pytest.raises(Omini2Error, match=rf"data: name exactly one .* not {len(data)} "):
            config(tmp_path, data=data)
    with pytest.raises(Omini2Error, match=r"encoders: give clip_l, .*: t5xxl, vae missing"):
        config(tmp_path, encoders={"clip_l": "."})
    with pytest.raises(Omini2Error, match=r"encoders: give either clip_l, .* not both"):
        config(tmp_path, encoders={"clip_l": ".", "diffusers": "."})


def test_a_config_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for content in (b"base: [1, 2", b"\xff\xfe\x00", None):
        path.write_bytes(content) if content else path.unlink()
        with pytest.raises(Omini2Error, match=r"config.yaml can't be read as a YAML file: "):
            load_config(path)


def test_bad_images_are_named_and_left_out(tmp_path: Path, caplog) -> None:
    settings = config(tmp_path)
    pictures = settings.data.folder
    whole = (pictures / "scene0.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "text.png").write_text("no image")
    with caplog.at_level(logging.WARNING):
        data = encoded(settings)
    assert len(data) == 4
    for name in ("cut.png", "empty.png", "text.png", "3 images were left out"):
        assert name in caplog.text
    for path in pictures.glob("scene*.png"):
        path.write_bytes(b"")
    with pytest.raises(Omini2Error, match="none can be used"):
        encoded(settings)
    for path in pictures.iterdir():
        path.unlink()
    with pytest.raises(Omini2Error, match="no image was found"):
        encoded(settings)


def test_the_cache_is_used_and_mended(tmp_path: Path) -> None:
    settings = config(tmp_path)
    first, again = KnownEncoders(), KnownEncoders()
    before = encoded(settings, first)
    assert first.images and first.texts
    encoded(settings, again)
    assert (again.images, again.texts) == (0, 0)
    files = sorted(p for p in settings.cache_folder.rglob("*.safetensors"))
    cut, flipped = files[0], files[1]
    cut.write_bytes(cut.read_bytes()[:-5])
    changed = bytearray(flipped.read_bytes())
    changed[-1] ^= 1
    flipped.write_bytes(changed)
    mended = KnownEncoders()
    after = encoded(settings, mended)
    assert mended.images + mended.texts >= 2
    assert before.items == after.items
    for key in before.items[0].keys:
        assert all(torch.equal(v, after.load(key)[k]) for k, v in before.load(key).items())
    # A run with another condition shares what is the same: the pictures and the captions.
    sharing = KnownEncoders()
    encoded(config(tmp_path, conditions=[{"type": "grey"}]), sharing)
    assert (sharing.images, sharing.texts) == (4, 0)
    # Another setting isn't served what belongs to this one.
    changed_settings = KnownEncoders()
    encoded(config(tmp_path, target_size=32), changed_settings)
    assert changed_settings.images


def captions(settings) -> list[tuple[str, torch.Size]]:
    data = encoded(settings)
    return sorted({item.text for item in data.items}), len(data)


def test_every_source_gives_the_same_samples(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("webdataset")
    folder = config(tmp_path).data.folder
    want = captions(config(tmp_path))
    assert want[1] == 4 and len(want[0]) == 4
    names = [f"scene{i}" for i in range(4)]

    listed = write_pictures(tmp_path / "listed")
    for path in listed.glob("*.txt"):
        path.unlink()
    rows = [{"file_name": f"{n}.png", "text": n.replace("scene", "scene ")} for n in names]
    (listed / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert captions(config(tmp_path, data={"folder": str(listed)})) == want
    assert captions(config(tmp_path, data={"datasets": str(listed)})) == want

    table = datasets.Dataset.from_dict(
        {
            "picture": [{"bytes": (folder / f"{n}.png").read_bytes(), "path": None} for n in names],
            "edges": [{"bytes": (folder / f"{n}.png").read_bytes(), "path": None} for n in names],
            "words": [[(folder / f"{n}.txt").read_text(), "another"] for n in names],
        }
    )
    table.to_parquet(str(tmp_path / "table.parquet"))
    data = {
        "datasets": str(tmp_path / "table.parquet"),
        "image_column": "picture",
        "caption_column": "words",
    }
    from_column = [{"type": "column", "column": "edges"}]
    assert captions(config(tmp_path, data=data, conditions=from_column)) == want
    with pytest.raises(Omini2Error, match="no column image"):
        captions(config(tmp_path, data={"datasets": data["datasets"]}))

    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for name in names[2 * shard : 2 * shard + 2]:
                for ending in ("png", "txt"):
                    content = (folder / f"{name}.{ending}").read_bytes()
                    info = tarfile.TarInfo(f"{name}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    shards = {"webdataset": str(tmp_path / "shard-{0..1}.tar")}
    assert captions(config(tmp_path, data=shards)) == want
    assert captions(config(tmp_path, data={**shards, "limit": 3}))[1] == 3


def test_a_second_folder_goes_by_name(tmp_path: Path, caplog) -> None:
    settings = config(tmp_path)
    second = write_pictures(tmp_path / "depth")
    (second / "scene3.png").unlink()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(second / "scene1.png")
    condition = {"type": "folder", "folder": str(second), "condition_size": [32, 64]}
    settings = config(tmp_path, conditions=[condition])
    assert settings.conditions[0].label == "depth"
    with caplog.at_level(logging.WARNING):
        data = encoded(settings)
    assert len(data) == 3 and "no image called scene3" in caplog.text
    item = data.items[1]
    latent = data.load(item.conditions[0][0, 0])["latent"]
    assert latent.shape == (16, 8, 4)
    own = data.load(item.target)["latent"]
    assert not torch.allclose(latent.mean((1, 2)), own.mean((1, 2)))


@pytest.mark.parametrize("kind", ["canny", "grey", "blur", "mask", "resize"])
def test_condition_images(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.zeros(48, 64, 3)
    pixels[8:40, 16:48] = torch.tensor([1.0, 0.5, 0.1])
    condition = ConditionConfig(type=kind)
    made = made_from(pixels, condition, generator)
    assert made.shape == pixels.shape and made.min() >= 0 and made.max() <= 1
    if kind == "canny":
        from comfy_extras.nodes_canny import Canny

        assert torch.equal(made, Canny.execute(pixels[None], 0.4, 0.8)[0][0])
        assert made.any()
    elif kind == "grey":
        assert torch.equal(made[..., 0], made[..., 2])
        assert made[20, 20, 0] == pytest.approx(0.299 + 0.587 * 0.5 + 0.114 * 0.1)
    elif kind == "blur":
        assert made.mean() == pytest.approx(float(pixels.mean()), rel=0.05)
        assert (made[:, 1:] - made[:, :-1]).abs().max() < 0.5
    elif kind == "mask":
        made = made_from(torch.ones(48, 64, 3), condition, generator)
        assert ((made == 1) | (made == 0)).all() and 0 < made.mean() < 1
    else:
        assert torch.equal(made, pixels)


def test_compact_conditions_are_made_as_the_nodes_make_them(tmp_path: Path) -> None:
    """Canny, Compact Tokens at 0.5 and prune empty: the same tokens at the same positions."""
    from comfy_extras.nodes_canny import Canny

    size = 96
    pixels = torch.zeros(size, size, 3)
    pixels[10:50, 20:44] = 1
    folder = tmp_path / "one"
    folder.mkdir()
    Image.fromarray((pixels * 255).byte().numpy()).save(folder / "a.png")
    settings = config(
        tmp_path,
        target_size=size,
        data={"folder": str(folder), "caption": "a"},
        conditions=[{"type": "canny", "condition_size": size // 2, "pruning": True}],
        drop_image_prob=0,
    )

    class Vae(KnownEncoders):
        def encode_images(self, images):
            return LatentVae().encode(images)

    example = Drawer(settings, encoded(settings, Vae())).example(0)
    edges = Canny.execute(pixels[None], 0.4, 0.8)[0]
    condition = nodes.ConditionEncode.execute(edges, LatentVae(), "aligned", 0, 0, 1.0, None)[0]
    condition = nodes.CompactTokens.execute(condition, 0.5, True, "empty", 0.1, 0, False)[0]
    assert condition.keep is not None
    from omini2_extension.omini2_core.tokens.condition import pack

    torch.testing.assert_close(example.conditions[0], condition.select(pack(condition.latent))[0])
    torch.testing.assert_close(
        example.condition_ids[0][:, 1:], condition.positions((size // 16, size // 16))
    )


def test_integration_parts_picture_and_condition(tmp_path: Path) -> None:
    settings = config(tmp_path, conditions=[{"type": "resize", "integration": True}])
    drawer = Drawer(settings, encoded(settings))
    counts = set()
    for number in range(20):
        example = drawer.example(number)
        known, painted = example.condition_ids[0], example.ids
        together = torch.cat((known, painted))[:, 1:]
        assert len(together) == 16 == len(torch.unique(together, dim=0))
        assert 0 < len(painted) < 16 and len(painted) == len(example.clean) == len(example.noise)
        counts.add(len(painted))
    assert len(counts) > 3

    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(4):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, 16, 32))
        mask.save(masks / f"scene{i}.png")
    condition = {"type": "resize", "integration": True, "masks": str(masks)}
    settings = config(tmp_path, conditions=[condition])
    example = Drawer(settings, encoded(settings)).example(0)
    assert example.ids[:, 1:].tolist() == [[0, 0], [1, 0]]


def test_time_shift(tmp_path: Path) -> None:
    plain = config(tmp_path)
    shifted = plain.model_copy(update={"time_shift": 12.0})
    data = encoded(plain)
    for number in range(10):
        t = Drawer(plain, data).example(number).time
        want = 12 * t / (1 + 11 * t)
        torch.testing.assert_close(Drawer(shifted, data).example(number).time, want)


def test_a_condition_fades_in_from_the_picture(tmp_path: Path) -> None:
    settings = config(tmp_path, conditions=[{"type": "grey", "fade_steps": 30}])
    data = encoded(settings)
    drawer = Drawer(settings, data)

    def condition(step: int | None) -> torch.Tensor:
        return drawer.batch([0, 1], torch.device("cpu"), step).conditions[0].tokens

    clean, grey = drawer.batch([0, 1], torch.device("cpu")).clean, condition(None)
    assert not torch.equal(clean, grey)
    torch.testing.assert_close(condition(0), clean)
    torch.testing.assert_close(condition(10), clean)
    torch.testing.assert_close(condition(20), (clean + grey) / 2)
    assert torch.equal(condition(30), grey)


def test_a_dropped_condition_does_not_fade(tmp_path: Path) -> None:
    conditions = [{"type": "grey", "fade_steps": 30}]
    settings = config(tmp_path, conditions=conditions, drop_image_prob=1.0)
    drawer = Drawer(settings, encoded(settings))
    at_start = drawer.example(0, step=0)
    assert torch.equal(at_start.conditions[0], drawer.example(0).conditions[0])
    assert not torch.equal(at_start.conditions[0], at_start.clean)


def test_what_is_dropped(tmp_path: Path) -> None:
    settings = config(tmp_path, drop_text_prob=0.5, drop_image_prob=0.5)
    data = encoded(settings)
    drawer = Drawer(settings, data)
    empty = data.load(data.empty_text)["features"]
    texts = images = 0
    for number in range(40):
        example = drawer.example(number)
        texts += example.text is empty
        images += torch.equal(
            example.conditions[0].flatten().unique(), data.load(data.black[0][0])["latent"].unique()
        )
    assert 8 <= texts <= 32 and 8 <= images <= 32


def test_sizes(tmp_path: Path) -> None:
    wide = Image.new("RGB", (200, 50), (255, 0, 0))
    assert prepared(wide, (64, 48)).shape == (48, 64, 3)
    assert reduced(torch.rand(48, 64, 3), (32, 16)).shape == (16, 32, 3)
    settings = config(
        tmp_path, target_size=[96, 64], conditions=[{"type": "grey", "condition_size": 32}]
    )
    placement = settings.placement(0, (32, 32))
    assert placement.scale == (2.0, 3.0)  # rows, columns
    fixed = config(
        tmp_path,
        conditions=[{"type": "grey", "position_scale": 1.5, "position_delta": [0, -4]}],
    ).placement(0, (64, 64))
    assert fixed.scale == (1.5, 1.5) and fixed.delta == (0.0, -4.0)


def test_a_condition_of_several_sizes_has_one_in_each_batch(tmp_path: Path) -> None:
    condition = {"type": "grey", "condition_size": [[64, 64], [32, 32], [16, 16]]}
    settings = config(tmp_path, conditions=[condition], drop_image_prob=0.5)
    drawer = Drawer(settings, encoded(settings))
    counts = []
    for first in range(0, 60, 3):
        [batched] = drawer.batch(range(first, first + 3), torch.device("cpu")).conditions
        assert batched.kept is None
        counts.append(batched.tokens.shape[1])
        side = int(counts[-1] ** 0.5)
        assert batched.ids[0, 0, 1:].tolist() == [(4 / side - 1) / 2] * 2
    assert set(counts) == {16, 4, 1}
    again = [drawer.batch([n], torch.device("cpu")).conditions[0].tokens for n in (0, 0)]
    assert torch.equal(*again)


def test_text_is_what_clip_text_encode_gives(tmp_path: Path) -> None:
    import nodes as host_nodes

    from omini2_extension.omini2_core.demo import model as demo_model

    import_host()
    encoders = load_encoders(config(tmp_path, base="demo"), torch.device("cpu"), torch.float32)
    features, pooled = encoders.encode_text(["a red (circle:1.3) left"])
    [[want, more]] = host_nodes.CLIPTextEncode().encode(
        demo_model.load()[1], "a red (circle:1.3) left"
    )[0]
    assert torch.equal(features, want) and torch.equal(pooled, more["pooled_output"])
    pixels = torch.rand(1, 32, 32, 3)
    from comfy.latent_formats import Flux

    latent = Flux().process_in(demo_model.load()[2].encode(pixels))
    torch.testing.assert_close(encoders.encode_images(pixels), latent)
