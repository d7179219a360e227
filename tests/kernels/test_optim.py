"""What an optimizer's step does to many tensors: sums of squares, scaling, AdamW; of every dtype,
size and alignment."""

import math

import pytest
import torch
from torch.optim.adamw import adamw

from fastmoe.device import INTERPRETING
from fastmoe.optim import PART, adamw_, scale_, square_sum
from tests.kernels.common import DEVICE

MIXED = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float16] * 2
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, MIXED]
if INTERPRETING:  # it cuts bits off instead of rounding to bf16
    DTYPES = [torch.float32, torch.float64]
HOW = dict(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)


def tensors(dtypes, scale=1.0):
    """Sizes of several programs and of one, shapes that share no launch, a view, two dims."""
    made = [torch.randn(n) for n in (2 * PART + 72, 8, 7, 1, 4096)]
    made += [torch.randn(33, 16).t(), torch.randn(40)[1:33], torch.randn(8, 24)]
    dtypes = dtypes if isinstance(dtypes, list) else [dtypes] * len(made)
    return [(scale * t).to(DEVICE, d) for t, d in zip(made, dtypes, strict=True)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_sum_of_squares(dtypes):
    torch.manual_seed(0)
    made = tensors(dtypes)
    want = sum(t.double().square().sum() for t in made)
    got = square_sum(made)
    assert got.dtype == torch.float32 and got.shape == ()
    assert abs(got.double() / want - 1) < 1e-5  # torch's own for bf16 on a CPU: 7e-6
    assert torch.equal(square_sum(made), got)
    for n in range(len(made)):  # each counts, to its last value
        made[n][-1].fill_(100.0)
        assert square_sum(made) > got + 5e3
        got = square_sum(made)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.37, 1.0, 0.0, math.nan])
def test_scaling(dtypes, factor):
    torch.manual_seed(0)
    made = tensors(dtypes)
    scalar = torch.tensor(factor, device=DEVICE)
    want = [(t.to(torch.promote_types(t.dtype, torch.float32)) * scalar).to(t.dtype) for t in made]
    scale_(made, scalar)
    for got, expected in zip(made, want, strict=True):
        assert torch.equal(got.nan_to_num(9e3), expected.nan_to_num(9e3))


def state(dtypes):
    """Parameters, gradients, both moments of seven steps before, and the count of those."""
    torch.manual_seed(0)
    params, grads, means = (tensors(dtypes, s) for s in (1.0, 0.1, 0.05))
    squares = [t.square() + 1e-4 for t in tensors(dtypes, 0.1)]
    steps = [torch.tensor(7.0, device=DEVICE) for _ in params]
    return params, grads, means, squares, steps


def reference(params, grads, means, squares, steps):
    """The formula of torch.optim.AdamW's documentation, in fp64."""
    beta1, beta2 = HOW["betas"]
    found = []
    for p, g, m, v, step in zip(params, grads, means, squares, steps, strict=True):
        p, g, m, v = (t.double() for t in (p, g, m, v))
        t = int(step) + 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p = p * (1 - HOW["lr"] * HOW["weight_decay"])
        root = (v / (1 - beta2**t)).sqrt()
        found.append((p - HOW["lr"] * m / (1 - beta1**t) / (root + HOW["eps"]), m, v))
    return found


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("before", [0, 7])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_adamw_is_as_near_to_the_formula_as_torch(dtypes, before, beta1, monkeypatch):
    monkeypatch.setitem(HOW, "betas", (beta1, 0.999))
    ours, theirs = state(dtypes), state(dtypes)
    if before == 0:
        for _, _, means, squares, steps in (ours, theirs):
            for t in (*means, *squares, *steps):
                t.zero_()
    want = reference(*ours)
    adamw_(*ours, **HOW)
    adamw(
        *theirs[:4], [], theirs[4], fused=True, amsgrad=False, maximize=False,
        beta1=HOW["betas"][0], beta2=HOW["betas"][1],
        **{k: v for k, v in HOW.items() if k != "betas"},
    )  # fmt: skip
    assert all(step == before + 1 for step in ours[4])
    for n, expected in enumerate(want):
        for what, e in zip((0, 2, 3), expected, strict=True):
            ulp = torch.finfo(ours[what][n].dtype).eps * e.abs().max()
            bound = 2 * (theirs[what][n].double() - e).abs().max() + 4 * min(ulp, 1e-7)
            assert (ours[what][n].double() - e).abs().max() <= bound, (what, n)


@pytest.mark.skipif(DEVICE == "cpu", reason="torch's fused AdamW takes one dtype")
def test_adamw_leaves_gradients_alone_and_takes_moments_of_another_dtype():
    params, grads, means, squares, steps = state(torch.bfloat16)
    means, squares = ([t.float() for t in part] for part in (means, squares))
    want = reference(params, grads, means, squares, steps)
    kept = [g.clone() for g in grads]
    served = [n for n, t in enumerate(params) if t.numel() % 8 == 0 and t.is_contiguous()]
    served = [n for n in served if not params[n].data_ptr() % 16]
    pick = lambda part: [part[n] for n in served]  # noqa: E731
    adamw_(*map(pick, (params, grads, means, squares, steps)), **HOW)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
    for n in served:
        for got, expected in zip((params[n], means[n], squares[n]), want[n], strict=True):
            eps = torch.finfo(got.dtype).eps
            assert (got.double() - expected).abs().max() <= eps * expected.abs().max()
