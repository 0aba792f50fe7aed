"""Omini2 Demo Image: a photo that comes with the extension."""

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..omini2_core.demo.files import FOLDER, photos
from ..omini2_core.errors import Omini2Error, brief, require_known
from . import common


class DemoImage(io.ComfyNode):
    """A condition image for graphs that have to run right after they are opened."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return common.schema(
            node_id="Omini2DemoImage",
            display_name="Omini2 Demo Image",
            category="Omini2/demo",
            description="A picture of 512x512 that comes with the extension, to try a graph "
            "without a file of your own. Put Load Image in its place for your own picture.",
            search_aliases=["ominicontrol", "try", "example image", "sample image"],
            inputs=[
                io.Combo.Input(
                    "photo",
                    options=list(photos()),
                    default="coffee",
                    tooltip="Which of the pictures; those called scene are for the demo model. "
                    "All are free to use, see demo_model/photos/README.md.",
                )
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The picture, 512x512.")],
        )

    @classmethod
    def execute(cls, photo: str, **foreign: object) -> io.NodeOutput:
        require_known(foreign)
        path = photos().get(photo) if isinstance(photo, str) else None
        if path is None:
            raise Omini2Error(
                f"photo: there is no {brief(photo)} in {FOLDER / 'photos'}; install the extension "
                "again."
            )
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        return io.NodeOutput(torch.from_numpy(pixels)[None])
