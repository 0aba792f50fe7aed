"""Photos and the condition LoRA that come with the extension, for a first try without downloads.

Apart from :mod:`.demo`, which needs much more of the host: the list of nodes and the loras folder
have to be right even where the demo model can't be built.
"""

from pathlib import Path

import folder_paths

FOLDER = Path(__file__).resolve().parents[2] / "demo_model"
LORAS = FOLDER / "loras"


def photos() -> dict[str, Path]:
    """The pictures by the names that the node offers."""
    files = (FOLDER / "photos").iterdir()
    return {path.stem: path for path in sorted(files) if path.suffix in (".jpg", ".png")}


def register_loras() -> None:
    """Adds the demo LoRA's folder to the host's loras, after the user's own."""
    folder_paths.add_model_folder_path("loras", str(LORAS))
