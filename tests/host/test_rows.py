"""However a batch's rows are split, ordered, repeated and named, everyone gets their own K/V."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dev.differential import build
from dev.differential.graph import Condition, Graph, Prompt
from dev.differential.run import Bench, difference, is_refusal, is_sentence
from dev.differential.wrappers import FRESH, PLANS, Call, named_wrapper, wrapper

CONDITIONS = st.builds(
    Condition,
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    images=st.integers(1, 3),
    seed=st.integers(0, 3),
    placement=st.sampled_from(["fit", "right"]),
    attention=st.sampled_from(["joint", "independent"]),
)
INTEGRATED = st.builds(
    Condition,
    images=st.integers(1, 3),
    paint=st.just(True),
    attention=st.sampled_from(["joint", "independent"]),
)
PROMPTS = st.integers(1, 3).map(lambda batch: Prompt(batch=batch))


@st.composite
def graphs(draw, integrated=False):
    """A graph of one to three pictures and two or three prompts."""
    first = INTEGRATED if integrated else CONDITIONS
    conditions = draw(st.tuples(first, CONDITIONS) | st.tuples(first))
    return Graph(
        batch=draw(st.integers(1, 3)),
        guider=draw(st.sampled_from(["cfg", "dual"])),
        cfg=3.0,
        positive=(draw(PROMPTS),),
        negative=(replace(draw(PROMPTS), seed=1),),
        conditions=conditions,
        reuse=draw(st.sampled_from(["off", "auto", "every_n_steps"])),
        refresh=1,
    )


@st.composite
def plans(draw):
    """Any rows in any calls, each row at least once, with any names."""
    kind = draw(st.sampled_from(["as it was", "right", "none", "any"]))
    numbers = st.lists(st.integers(0, 8), min_size=1, max_size=8)
    wanted = draw(st.lists(numbers, max_size=4))
    names = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))

    def plan(pictures: int, prompts: int) -> list[Call]:
        rows = pictures * prompts
        calls = [[i % rows for i in call] for call in wanted]
        left = [i for i in range(rows) if not any(i in call for call in calls)]
        found = []
        for call in [*calls, left] if left else calls:
            given = {
                "as it was": (),
                "right": [i // pictures for i in call],
                "none": None,
                "any": [i % prompts for i in names],
            }[kind]
            found.append(Call(call, given))
        return found

    return plan


def wanted(bench: Bench):
    """Prompts one at a time, K/V computed every time."""
    return bench.run(split=True, reuse="off").picture


def check(graph: Graph, made, refusable: bool) -> None:
    bench = Bench(graph)
    model = build.model_of(graph, bench.base)
    model.set_model_unet_function_wrapper(made)
    try:
        got = bench.run(model=model).picture
    except Exception as error:
        assert refusable and is_refusal(error) and is_sentence(str(error)), error
        return
    assert difference(got, wanted(bench)) < 1e-5


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs(), plans(), st.booleans())
def test_any_split_order_repetition_and_naming(graph, plan, fresh) -> None:
    check(graph, wrapper(plan, fresh), refusable=True)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs(integrated=True), plans(), st.booleans())
def test_the_same_with_token_integration(graph, plan, fresh) -> None:
    check(graph, wrapper(plan, fresh), refusable=True)


RIGHT = ["as it is", "prompt by prompt, named", "last prompt first"]
GRAPHS = list(product(["joint", "independent"], ["off", "auto"], [1, 2]))


@pytest.mark.parametrize(
    ("name", "attention", "reuse", "images"),
    # Every graph, and each of its settings with every way to name rows.
    [(RIGHT[number % 3], *graph) for number, graph in enumerate(GRAPHS)],
)
def test_rows_that_are_named_rightly_are_not_refused(name, attention, reuse, images) -> None:
    condition = Condition(attention=attention, images=images)
    graph = Graph(batch=3, cfg=3.0, guider="cfg", conditions=(condition,), reuse=reuse)
    check(graph, named_wrapper(name), refusable=False)


@pytest.mark.parametrize("name", [*PLANS, *FRESH])
def test_wrappers_are_right_without_conditions(name) -> None:
    """The host's own model gives the same picture, so a difference above is ours."""
    bench = Bench(Graph(batch=2, cfg=3.0, guider="dual", conditions=()))
    assert difference(bench.run(wrapper=name).picture, bench.run().picture) < 1e-5


@pytest.mark.parametrize("pictures", [2, 3, 4, 5])
@pytest.mark.parametrize("images", [2, 3])
@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_known_images_that_dont_divide_the_pictures(pictures, images, attention) -> None:
    """Each preview and picture shows its own image's known part, at any guidance."""
    split = (pictures // 2 + images + (attention == "joint")) % 2 == 0  # with each of the others
    condition = Condition(images=images, paint=True, attention=attention)
    graph = Graph(
        batch=pictures, cfg=3.0, guider="cfg", conditions=(condition,), split=split,
        schedule="first half",
    )  # fmt: skip
    ran = Bench(graph).run()
    given_images = build.latent(condition)
    known = ~build.box(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    for i in range(pictures):
        alone = given_images[i % images][..., known]
        for preview in ran.previews:
            assert float((preview[i][..., known] - alone).abs().max()) < 1e-4
