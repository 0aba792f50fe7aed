"""What the editor asks ComfyUI's server about this extension."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from ..errors import brief
from ..lora.family import NO_LORA
from ..lora.recognise import answer, misplaced
from ..tokens.condition import MIN_SCALE
from . import queued
from .folders import lora_path, read_header


async def preset(request: web.Request) -> web.Response:
    """GET /omini2/preset?lora=NAME[&base=...][&compression=...]: a condition LoRA's settings.

    With NAME as in the list of Apply Omini2 LoRA; a name that isn't in it is a 404 with
    ``{"error": "..."}``. Else::

        {"known": true, "title": "OminiControl canny: edges", "values": {...},
         "bases": ["dev", "schnell"], "note": "Settings for Yuanshi/OminiControl, experimental..."}

    "(none)" stands for a condition without a LoRA.

    Where ``known`` is false, ``values`` is empty and ``note`` says how the file will be treated.
    Without ``base`` (dev or schnell), or with one that isn't in ``bases``, the values are for the
    first of them, and for a graph whose Compact Tokens nodes compress the condition by
    ``compression``: ``placement``, ``delta_rows``, ``delta_cols``, ``position_scale``, ``resize``,
    ``size`` (Omini2 Condition Encode), ``compression``, ``token_integration`` (Compact Tokens; 1
    and false need no such node), ``attention``, ``family`` (Apply Omini2 LoRA),
    ``image_guidance_scale`` (Omini2 Image Guidance; 1 needs no such node), ``width``, ``height``,
    ``steps``, ``guidance`` (the empty latent, KSampler, FluxGuidance; null where the model takes
    none).
    """
    name = request.query.get("lora", "")
    path = lora_path(name)
    if path is None and name != NO_LORA:
        return web.json_response(
            {"error": f"there is no {brief(name)} in the loras folder"}, status=404
        )
    keys, metadata = ([], {}) if path is None else read_header(path)
    base, compression = request.query.get("base"), _share(request.query.get("compression"))
    return web.json_response(answer(name, keys, metadata, base, compression=compression))


async def load_lora(request: web.Request) -> web.Response:
    """GET /omini2/load_lora?lora=NAME: ``{"note": "..."}`` for a file chosen in stock Load LoRA.

    The note is empty where the file may well belong there.
    """
    name = request.query.get("lora", "")
    path = lora_path(name)
    note = "" if path is None else misplaced(name, *read_header(path))
    return web.json_response({"note": note})


def _share(text: str | None) -> float:
    """A compression; 1 for whatever is none."""
    try:
        share = float(text or 1)
    except ValueError:
        return 1.0
    return share if MIN_SCALE <= share <= 1 else 1.0


def register(words: Mapping[str, Sequence[str]]) -> None:
    """Adds all this to the running server; without one (tests, scripts) there is nothing to do.

    Through ``sys.modules``: importing the host's server for this would be slow and start nothing.

    Args:
        words: node id -> what it is to be found by, for GET /omini2/words.
    """

    async def all_words(request: web.Request) -> web.Response:
        return web.json_response({node: list(each) for node, each in words.items()})

    server: Any = getattr(sys.modules.get("server"), "PromptServer", None)
    instance = getattr(server, "instance", None)
    if instance is not None:
        instance.routes.get("/omini2/preset")(preset)
        instance.routes.get("/omini2/load_lora")(load_lora)
        instance.routes.get("/omini2/words")(all_words)
        instance.add_on_prompt_handler(queued.remember)
