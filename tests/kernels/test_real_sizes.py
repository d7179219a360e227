"""The operator at the sizes of real models, in every dtype, against a wide reference. GPU only.

The gate of the benchmarks (benchmarks/gate.py) judges: at most twice grouped_mm's error in the same
dtype, no NaN in memory that starts as NaN. Also the random problems that only a GPU is fast enough
for.
"""

import pytest
import torch

import fastmoe
from benchmarks import gate, peers
from benchmarks.problems import TRAINING, Problem, make_inputs
from tests.kernels.common import DEVICE, DTYPES, assert_as_good_as_torch, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE != "cuda", reason="real sizes need a GPU"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", TRAINING, ids=lambda p: f"{p.name}-{p.T}")
def test_real_size(p, dtype):
    inputs = make_inputs(p, dtype, DEVICE)
    want = gate.reference(inputs, problem=p)
    found = {}
    for name in (peers.OURS, peers.BASELINE):
        found[name] = gate.errors(gate.run(getattr(peers, name)(p), inputs), want)
        torch.cuda.empty_cache()
    assert not gate.objections(found[peers.OURS], found[peers.BASELINE], dtype)


@pytest.mark.parametrize("seed", range(20))
def test_random_problems_at_tile_sizes(seed):
    """Sizes that the Hopper kernels serve, with skew, sentinels, few rows and part of a tile."""
    gen = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=gen))]

    p = Problem(
        "random", pick(200, 777, 2048, 3001), pick(256, 512), pick(128, 192, 256, 320),
        pick(2, 8, 16), pick(1, 2), skew=pick(0.0, 1.0), sentinels=pick(0.0, 0.3),
        transposed=pick(False, True), interleaved=pick(False, True), bias=pick(False, True),
        gate=pick("silu", "gelu_tanh", "clamped"),
    )  # fmt: skip
    inputs = make_inputs(p, pick(torch.bfloat16, torch.float16), DEVICE, seed)
    assert_as_good_as_torch(run(fastmoe.fused_experts, p, inputs), p, inputs)
