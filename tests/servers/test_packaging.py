"""The archive that the registry hands out, in a clean host's custom_nodes."""

import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_config.config_parser import extract_node_configuration
from PIL import Image

from dev import pack
from dev.docs import locales
from dev.host.server import Server
from dev.host.start import loaded
from dev.paths import ROOT
from omini2_extension.nodes import NODES

pytestmark = pytest.mark.xdist_group("packaging")

NODE_IDS = sorted(node.define_schema().node_id for node in NODES)
# Of the trainer or of this project's own tools, none of the host's.
STANDARD = set(sys.stdlib_module_names) | {"comfy_config"}
HEAVY = {"accelerate", "datasets", "diffusers", "matplotlib", "peft", "transformers"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack.pack(folder / "omini2.zip")
    with zipfile.ZipFile(folder / "omini2.zip") as archive:
        archive.extractall(folder / "ComfyUI-Omini2")
    return folder / "ComfyUI-Omini2"


@pytest.fixture(scope="module")
def server(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A host that has nothing but the archive."""
    folder = tmp_path_factory.mktemp("clean")
    with Server(folder / "base", folder / "server.log", extension=unpacked) as running:
        yield running


def get(server: Server, path: str) -> bytes:
    with urllib.request.urlopen(f"{server.address}{path}", timeout=30) as answer:
        return answer.read()


def get_json(server: Server, path: str) -> Any:
    return json.loads(get(server, path))


# --- what is in it -----------------------------------------------------------------------------


def test_the_archive_has_what_users_need_and_nothing_else(unpacked: Path) -> None:
    tops = {path.name for path in unpacked.iterdir()}
    assert tops == {
        "CHANGELOG.md", "LICENSE", "README.md", "SECURITY.md", "__init__.py", "demo_model", "docs",
        "example_configs", "example_workflows", "locales", "nodes", "omini2_core",
        "pyproject.toml", "subgraphs", "web", "web_refused",
    }  # fmt: skip
    size = sum(path.stat().st_size for path in unpacked.rglob("*") if path.is_file())
    assert size < 40e6
    assert not list(unpacked.rglob("requirements*.txt")) and not list(unpacked.rglob("install.py"))


def test_the_registry_can_read_what_it_is() -> None:
    config = extract_node_configuration(str(ROOT))
    project, comfy = config.project, config.tool_comfy
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]*(?:[-_.][A-Za-z0-9]+)*", project.name)
    assert re.fullmatch(r"\d+\.\d+\.\d+", project.version)
    assert project.description and project.dependencies == []
    assert project.license.file == "LICENSE" and (ROOT / "LICENSE").is_file()
    assert project.urls.repository.startswith("https://")
    assert comfy.publisher_id and comfy.display_name
    assert comfy.web is None  # WEB_DIRECTORY says it
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^requires-comfyui = ">=\d+\.\d+\.\d+"$', text, re.M)
    for key in ("Icon", "Banner"):
        [url] = re.findall(rf'^{key} = "(https://.+)"$', text, re.M)
        file = ROOT / urllib.parse.urlparse(url).path.split("/main/")[1]
        with Image.open(file) as image:
            width, height = image.size
        if key == "Icon":
            assert width == height <= 800
        else:
            assert width / height == pytest.approx(21 / 9, abs=0.01)


# --- in a clean host ---------------------------------------------------------------------------


def test_loading_it_brings_no_package_that_the_host_has_not_loaded(unpacked: Path) -> None:
    """So there is nothing to install, and the host's start stays short."""
    [run] = loaded(unpacked)
    assert run["succeeded"] and run["nodes"] == NODE_IDS
    own = str(unpacked).replace(".", "_x_")
    others = {m.partition(".")[0] for m in run["modules"] if not m.startswith(own)}
    assert not others & HEAVY
    assert others <= STANDARD, "imported by no host before"


@pytest.mark.compatibility("Hosts", "Starts with all nodes", "works", "")
def test_all_nodes_are_there(server: Server) -> None:
    info = get_json(server, "/object_info")
    assert sorted(name for name in info if name.startswith("Omini2")) == NODE_IDS
    assert all(info[n]["python_module"] == "custom_nodes.ComfyUI-Omini2" for n in NODE_IDS)
    assert "IMPORT FAILED" not in server.log.read_text(errors="replace")


def test_templates_and_translations_are_served(server: Server, unpacked: Path) -> None:
    names = {path.stem for path in (unpacked / "example_workflows").glob("*.json")}
    assert names and set(get_json(server, "/workflow_templates")["ComfyUI-Omini2"]) == names
    translations = get_json(server, "/i18n")
    for language in locales.LANGUAGES:
        assert translations[language]["nodeDefs"] == locales.read(language)
        assert "Omini2" in translations[language]["nodeCategories"]


def test_blueprints_are_listed_and_served(server: Server, unpacked: Path) -> None:
    listed = get_json(server, "/global_subgraphs")
    pack = "custom_nodes.ComfyUI-Omini2"
    ours = {key: each for key, each in listed.items() if each["info"]["node_pack"] == pack}
    files = {path.stem: path for path in (unpacked / "subgraphs").glob("*.json")}
    assert files and {each["name"] for each in ours.values()} == set(files)
    for key, each in ours.items():
        served = get_json(server, f"/global_subgraphs/{key}")["data"]
        assert served == files[each["name"]].read_text(encoding="utf-8")


def test_thumbnails_are_served_where_the_editor_asks_for_them(server: Server) -> None:
    file = ROOT / "example_workflows" / "edges.jpg"
    served = get(server, "/api/workflow_templates/ComfyUI-Omini2/edges.jpg")
    assert served == file.read_bytes()


@pytest.mark.parametrize(
    "page",
    ["Omini2ApplyLoRA.md", "Omini2ApplyLoRA/zh.md", "images/Omini2ApplyLoRA.webp"],
)
def test_help_is_served_where_the_editor_asks_for_it(server: Server, page: str) -> None:
    expected = (ROOT / "web" / "docs" / page).read_bytes()
    assert get(server, f"/extensions/ComfyUI-Omini2/docs/{page}") == expected


def test_the_preset_of_a_lora_is_served(server: Server) -> None:
    info = get_json(server, "/object_info/Omini2ApplyLoRA")["Omini2ApplyLoRA"]
    kind, *options = info["input"]["required"]["lora_name"]
    names = kind if isinstance(kind, list) else options[0]["options"]
    assert names
    for prefix in ("", "/api"):
        answer = get_json(server, f"{prefix}/omini2/preset?lora={urllib.parse.quote(names[0])}")
        assert set(answer) == {"known", "title", "values", "bases", "note"}
    for name in ("../../secret.safetensors", "/etc/passwd", "..%2F..%2Fx"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(server, f"/omini2/preset?lora={name}")
