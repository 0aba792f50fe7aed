"""One of several training processes; needs no host, as the trainer itself."""

import json
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from known import KnownEncoders  # noqa: E402

from omini2_core.training.config import parse_config  # noqa: E402
from omini2_core.training.loop import train  # noqa: E402

if __name__ == "__main__":
    result = train(parse_config(json.loads(sys.argv[1])), KnownEncoders())
    assert "comfy" not in sys.modules
    if torch.distributed.get_rank() == 0:
        print(json.dumps(result.losses))
