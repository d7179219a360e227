"""Expert parallelism in every layout: logits, loss and every gradient against one process in eager.

fp32, relative error at most 2e-6 of each tensor's largest value (`layouts.Error`). Two ranks here;
four and eight behind the marker `grid`. `-s` shows the worst of every case.
"""

from dataclasses import replace

import pytest

from tests.distributed.layouts import FAMILIES, Case, errors_of, lines, wrong

EXPERTS = ("fastmoe", "grouped_mm")
BATCHES = ("plain", "odd", "unequal", "checkpointing", "accumulation")
ROUTINGS = ("gpt_oss hot", "qwen3_moe top1", "qwen3_moe top8")
FOUR = ("ep4", "tp4=ep4", "tp2 fsdp2 ep4", "tp2 fsdp2 ep2", "fsdp4 ep2", "hsdp ep2")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def ways(layout: str) -> list[Case]:
    """Every ep_implementation with every experts implementation, and each exchange of ours."""
    cases = [
        Case(layout=layout, ep=ep, experts=experts)
        for ep in ("auto", "fastmoe", "all_to_all", "all_reduce")
        for experts in EXPERTS
    ]
    shared = cases[0].config.ep_size == cases[0].config.tp_size
    if not shared:  # the only implementation that needs a shared batch
        cases = [case for case in cases if case.ep != "all_reduce"]
        cases += [replace(cases[0], exchange=e) for e in ("gather", "rows")]
    return cases


def spread(cases: list[Case], batches=BATCHES) -> list[Case]:
    return [replace(case, batch=batch) for case in cases for batch in batches]


def in_turn(cases: list[Case], batches=BATCHES) -> list[Case]:
    """One batch for each case."""
    return [replace(case, batch=batches[n % len(batches)]) for n, case in enumerate(cases)]


def check(root, cases, **kwargs):
    errors = errors_of(root, cases, **kwargs)
    print("", *lines(errors), sep="\n")
    found = wrong(errors)
    assert not found, "\n".join(f"{what}: {e} {case}" for (case, what), e in found.items())


@pytest.mark.parametrize("layout", ["ep2", "tp2=ep2"])
def test_two_ranks(root, layout):
    first, *others = ways(layout)
    kinds = [Case(name, layout) for name in ROUTINGS]
    check(root, spread([first]) + in_turn(others) + in_turn(kinds, ("unequal", "accumulation")))


@pytest.mark.parametrize("layout", ["ep2", "tp2=ep2"])
def test_families(root, layout):
    cases = [Case(name, layout) for name in FAMILIES[1:]]
    check(root, in_turn(cases, ("unequal", "checkpointing")))


@pytest.mark.grid
@pytest.mark.parametrize("layout", ["ep2", "tp2=ep2", *FOUR])
def test_every_way(root, layout):
    check(root, spread(ways(layout)))


@pytest.mark.grid
@pytest.mark.parametrize("layout", ["ep2", "tp2=ep2", *FOUR])
@pytest.mark.parametrize("checkpoint", ROUTINGS)
def test_every_routing(root, layout, checkpoint):
    cases = [replace(case, checkpoint=checkpoint) for case in ways(layout)]
    check(root, spread(cases, ("unequal", "accumulation")))


@pytest.mark.grid
@pytest.mark.parametrize("layout", ["ep2", "tp2=ep2", *FOUR])
def test_every_family(root, layout):
    exchanges = ("auto",) if "=" in layout else ("gather", "rows")
    cases = [Case(name, layout, exchange=e) for name in FAMILIES[1:] for e in exchanges]
    check(root, in_turn(cases))


@pytest.mark.grid
@pytest.mark.parametrize("layout", ["ep4", "tp2 fsdp2 ep4"])
def test_two_nodes_of_two(root, layout):
    cases = spread([Case(name, layout) for name in ("qwen3_moe", *ROUTINGS)])
    cases += in_turn([Case(name, layout) for name in FAMILIES[1:]])
    check(root, cases, ranks_per_node=2)


@pytest.mark.grid
@pytest.mark.parametrize("layout", ["ep8", "tp2 fsdp4 ep8"])
@pytest.mark.parametrize("ranks_per_node", [2, 4])
def test_eight_ranks_on_nodes(root, layout, ranks_per_node):
    cases = spread([Case(name, layout) for name in ("qwen3_moe", *ROUTINGS)], BATCHES[2:])
    check(root, cases, ranks_per_node=ranks_per_node)
