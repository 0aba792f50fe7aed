"""One of several training processes; needs no host, as the trainer itself."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

torch.set_num_threads(1)
sys.path.append(str(Path(__file__).parents[2]))

from known import KnownEncoders  # noqa: E402

from omini2_core.training.config import parse_config  # noqa: E402
from omini2_core.training.loop import train  # noqa: E402
from omini2_core.training.processes import end_processes  # noqa: E402

if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # Accelerate shares a model out over GPUs only and quietly does without on CPUs, where
        # PyTorch's FSDP runs as well: let it take them for GPUs.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    result = train(parse_config(json.loads(sys.argv[1])), KnownEncoders())
    assert "comfy" not in sys.modules
    if torch.distributed.get_rank() == 0:
        print(PartialState().distributed_type)
        print(json.dumps(result.losses))
    end_processes()
