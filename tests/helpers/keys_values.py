"""What a condition's K/V are in a run."""

import pytest
import torch
from tiny import sample, with_cache

from omini2_extension.omini2_core.cache.run_cache import RunCache
from omini2_extension.omini2_core.host import identity


def kv_of(model, **options):
    """All K/V that the first condition had in a run."""
    kept = []
    keep = RunCache.store

    def spy(cache, entry, number, k, v):
        kept.extend((k.clone(), v.clone()))
        keep(cache, entry, number, k, v)

    identity.between_runs(model).clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCache, "store", spy)
        sample(with_cache(model, "once"), steps=1, **options)
    return torch.cat([t.flatten() for t in kept])
