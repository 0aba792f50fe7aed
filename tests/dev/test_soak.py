"""The soak's own arithmetic; tests/servers/test_faults_server.py draws some of its graphs."""

import numpy as np
import pytest

from benchmarks import soak

INFO = {
    "Omini2DemoImage": {"input": {"required": {"photo": [["cat", "room-depth"]]}}},
    "Omini2ApplyLoRA": {"input": {"required": {"lora_name": [["a.safetensors"]]}}},
}


def test_the_same_seed_draws_the_same_soak() -> None:
    drawn = soak.draw_graphs(30, 7, INFO)
    assert drawn == soak.draw_graphs(30, 7, INFO) != soak.draw_graphs(30, 8, INFO)
    kinds = [[node["class_type"] for node in graph.values()] for graph in drawn]
    assert {each.count("Omini2ApplyLoRA") for each in kinds} == {1, 2}
    whole = {"Canny", "Omini2CompactTokens", "MaskComposite", "Omini2ConditionCache"}
    assert whole <= {kind for each in kinds for kind in each}
    assert {each.count("MaskComposite") for each in kinds} == {0, 1}


def test_every_pass_holds_every_graph() -> None:
    jobs = soak.draw_jobs(10, 45, 3)
    assert len(jobs) == 45 and jobs == soak.draw_jobs(10, 45, 3)
    passes = [[job.graph for job in jobs[i : i + 10]] for i in range(0, 40, 10)]
    assert all(sorted(each) == list(range(10)) for each in passes)
    assert passes[0] != passes[1]
    assert {job.seed for job in jobs} == set(range(soak.SEEDS))


def memory(growth: float, passes: int = 12, per_pass: int = 50, seed: int = 0) -> list[int]:
    """1 GB with graphs of different size, growing by so many MB in 100 runs, and noise of 2 MB."""
    draw = np.random.default_rng(seed)
    graphs = draw.uniform(0, 50, per_pass)
    runs = [draw.permutation(graphs) for _ in range(passes)]
    steady = np.concatenate(runs) + 1000 + draw.normal(0, 2, passes * per_pass)
    warming = np.maximum(0, soak.WARM_UP * per_pass - np.arange(passes * per_pass)) * -0.5
    grown = growth / 100 * np.arange(passes * per_pass)
    return [int(1e6 * value) for value in steady + warming + grown]


def test_slope_sees_a_leak_and_none_where_there_is_none() -> None:
    none, leak = soak.slope(memory(0), 50), soak.slope(memory(5), 50)
    assert none.low < 0 < none.high and none.flat and none.points == 9
    assert leak.low < 5 < leak.high and not leak.flat
    assert soak.Slope(0.5, 0.2, 0.8 * soak.BOUND, 9).flat
    assert not soak.Slope(0.9, 0.2, 1.1 * soak.BOUND, 9).flat


def test_a_slope_takes_enough_passes() -> None:
    with pytest.raises(ValueError, match="takes 6"):
        soak.slope(memory(0, 5), 50)
