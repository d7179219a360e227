"""Bugs that expert parallelism has had: each check passes, and notices the bug when put back."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import EPImplementationInterface

from hf_moe_ep import plans
from hf_moe_ep.expert_parallel import FastMoEEP
from tests import families
from tests.distributed.layouts import (
    LAYOUTS,
    Case,
    backend_of,
    batches,
    device_of,
    errors_of,
    write_checkpoint,
    wrong,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.survivors import outcomes
from tests.distributed.test_ep_layer import Block, distributed
from tests.distributed.test_ep_layer import wrong as wrong_layer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def load(folder, cls=AutoModelForCausalLM, layout="ep2", **kwargs):
    config = DistributedConfig(**LAYOUTS[layout]) if layout else None
    return cls.from_pretrained(
        folder, experts_implementation="fastmoe", distributed_config=config, **kwargs
    )


# --- 1. a router whose outputs under EP are not those of one process -----------------------------
# transformers up to 5.1, `ep_router`: the scores of a rank's own experts only, so whoever reads
# them, the auxiliary loss above all, gets another shape.


def router_outputs(model) -> list[tuple[torch.Tensor, ...]]:
    """Logits, scores and ids of every router, in order."""
    routers = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeTopKRouter"]
    outputs = []
    hooks = [m.register_forward_hook(lambda *args: outputs.append(args[2])) for m in routers]
    model(input_ids=batches("plain", 1)[0][0].to(model.device))
    for hook in hooks:
        hook.remove()
    return outputs


def router_problems(model, reference) -> list[str]:
    problems = []
    for layer, pair in enumerate(zip(*map(router_outputs, (model, reference)), strict=True)):
        for what, got, want in zip(("logits", "scores", "ids"), *pair, strict=True):
            if got.shape != want.shape:
                problems.append(
                    f"layer {layer}: {what} {tuple(got.shape)}, not {tuple(want.shape)}"
                )
            elif not families.relative_error(got, want) < 2e-6:
                problems.append(f"layer {layer}: other {what}")
    return problems


def auxiliary_loss(model) -> torch.Tensor:
    ids = batches("plain", 1)[0][0].to(model.device)
    return model(input_ids=ids, output_router_logits=True).aux_loss


def local_scores(router, _, outputs):
    """What `ep_router` did: nothing of the experts on other ranks."""
    logits, scores, indices = outputs
    return logits.chunk(dist.get_world_size(), -1)[dist.get_rank()], scores, indices


def routers(folder, layout):
    model, reference = load(folder, layout=layout), load(folder, layout=None)
    reference.to(model.device)
    good = router_problems(model, reference)
    if not families.relative_error(*map(auxiliary_loss, (model, reference))) < 2e-6:
        good.append("auxiliary loss")
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeTopKRouter":
            module.register_forward_hook(local_scores, prepend=True)
    return good, router_problems(model, reference)


# --- 2. a plan property that drops the expert-parallel rules -------------------------------------
# Every rank then keeps all experts, trains, and runs out of memory only at real sizes.


class DropsDispatch(Qwen3MoeForCausalLM):
    """A model whose ep_plan forgets that experts are dispatched."""

    @property
    def ep_plan(self):
        return {r: s for r, s in self._ep_plan.items() if s != "ep_dispatch_experts"}


class DropsShards(Qwen3MoeForCausalLM):
    """A model whose ep_plan forgets that the weights are sharded."""

    @property
    def ep_plan(self):
        return {r: s for r, s in self._ep_plan.items() if s != "grouped_gemm"}


def whole_experts(model, ep_size: int) -> list[str]:
    """Expert weights of which a rank computes with more than its share. FSDP may shard them too."""
    return [
        f"{name}.{key}"
        for name, experts in plans.experts_modules(model).items()
        for key, p in experts.named_parameters()
        if not isinstance(p, DTensor) or experts.num_experts * ep_size != p.shape[0]
    ]


def experts_by_plan(folder, layout):
    found = {}
    for cls in (Qwen3MoeForCausalLM, DropsDispatch, DropsShards):
        found[cls.__name__] = whole_experts(load(folder, cls, layout), 2)
    return found


# --- 3. sentinels that enter the grouped GEMM, or its gradients ----------------------------------
# A sentinel is the id of an expert on another rank. Its row may hold anything.


class _Poison(torch.autograd.Function):
    """NaN in the rows of `nowhere`, forward and backward."""

    @staticmethod
    def forward(ctx, rows, nowhere):
        ctx.save_for_backward(nowhere)
        return rows.masked_fill(nowhere, float("nan"))

    @staticmethod
    def backward(ctx, grad):
        return grad.masked_fill(ctx.saved_tensors[0], float("nan")), None


class Poisoned(FastMoEEP):
    """Rows without an expert here come as NaN, and their gradients go back as NaN."""

    def __init__(self, experts, *meshes):
        super().__init__(experts, *meshes)
        run = self.experts_forward

        def poisoned(rows, ids, weights, **options):
            nowhere = (ids >= self.num_local_experts).all(1, keepdim=True)
            return run(_Poison.apply(rows, nowhere), ids, weights, **options)

        self.experts_forward = poisoned


class Clamped(Poisoned):
    """The bug: a sentinel is taken for the last expert."""

    def __init__(self, experts, *meshes):
        plain, experts.forward = experts.forward, _clamped(experts.forward, experts.num_experts)
        super().__init__(experts, *meshes)
        experts.forward = plain


class ClampedOnly(FastMoEEP):
    """The bug with clean rows: weight 0 hides it in the output, not in the router's gradient."""

    def __init__(self, experts, *meshes):
        super().__init__(experts, *meshes)
        self.experts_forward = _clamped(self.experts_forward, self.num_local_experts)


def _clamped(run, num_experts: int):
    return lambda rows, ids, weights, **_: run(rows, ids.clamp(max=num_experts - 1), weights)


def sentinels(kind):
    found = {}
    for cls in (Poisoned, Clamped, ClampedOnly):
        EPImplementationInterface.register(cls.__name__, cls)
        block = Block(kind, torch.float32)
        experts = distributed(block, cls.__name__, 1)
        for top_k in (1, 2):
            case = (top_k, "odd and unequal", "uniform", torch.float32)
            found[cls.__name__, top_k] = wrong_layer(block, experts, 1, *case)
    return found


@pytest.mark.parametrize("kind", ["fastmoe", "grouped_mm"])
def test_sentinels_reach_no_gemm(kind, monkeypatch):
    monkeypatch.setenv("HF_MOE_EP_EXCHANGE", "gather")  # rows without an expert here travel too
    ranks = run_ranks(2, sentinels, kind, backend=backend_of(2))
    for found in ranks:
        assert not found["Poisoned", 1] and not found["Poisoned", 2]
    # NaN times weight 0: in the weights' gradients, as nobody reads the output of such a row
    assert all("gate_up_proj" in found["Clamped", 1] for found in ranks)
    # a token with experts on both ranks has routing weights, and their gradients, on both
    assert all("weights" in found["ClampedOnly", 2] for found in ranks)


# --- 4. a loss that is counted once for every rank of an EP group --------------------------------


class OverCounting(Trainer):
    """The bug: a loss summed over the ranks of an EP group."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * self.model.config.distributed_config.ep_size


def train(cls, model, folder) -> list[tuple[float, float]]:
    """(loss, gradient norm) as the trainer logs them, of two steps of two micro-batches of 4."""
    rows = torch.randint(3, 128, (16, 12), generator=torch.Generator().manual_seed(5))
    data = [{"input_ids": row, "labels": row} for row in rows]
    world = 1 if not dist.is_initialized() else dist.get_world_size() // model._tp_size
    args = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=4 // world, logging_steps=1,
        gradient_accumulation_steps=2, report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=device_of(2) == "cpu", train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = cls(model, args, train_dataset=data)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [(log["loss"], log["grad_norm"]) for log in logs]


def losses(folder, layout):
    if device_of(2) == "cpu" and "tp_size" in LAYOUTS[layout]:
        return []  # accelerate 1.15 refuses tp on CPUs
    return [train(cls, load(folder, layout=layout), folder / "run") for cls in TRAINERS]


TRAINERS = (Trainer, OverCounting)


def two_rank_checks(folder) -> dict:
    found = {}
    for layout in ("ep2", "tp2=ep2"):
        found["plans", layout] = experts_by_plan(folder, layout)
        found["losses", layout] = losses(folder, layout)
    found["routers"] = routers(folder, "tp2=ep2")
    return found


@pytest.fixture(scope="module")
def found(root):
    """What each rank found; one launch for all checks."""
    folder = write_checkpoint(root, "qwen3_moe")
    return run_ranks(2, two_rank_checks, folder, timeout=300, backend=backend_of(2))


def test_routers_give_what_one_process_gets(found):
    for rank in found:
        good, with_bug = rank["routers"]
        assert good == []
        assert with_bug == [f"layer {n}: logits (32, 4), not (32, 8)" for n in range(2)]


@pytest.mark.parametrize("layout", ["ep2", "tp2=ep2"])
def test_every_plan_shards_the_experts(found, layout):
    for rank in found:
        by_class = rank["plans", layout]
        assert by_class["Qwen3MoeForCausalLM"] == []
        assert len(by_class["DropsShards"]) == 4, "two weights in two layers"
        assert len(by_class["DropsDispatch"]) == 4


def test_losses_are_counted_once(found, root):
    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(root, "qwen3_moe"))
    want = torch.tensor(train(Trainer, model, root / "run"))
    logged = [rank["losses", layout] for rank in found for layout in ("ep2", "tp2=ep2")]
    logged = [torch.tensor(logs) for logs in logged if logs]
    assert len(logged) >= 2
    for good, with_bug in logged:
        assert torch.allclose(good, want, rtol=1e-5), (good, want)
        assert torch.allclose(with_bug[0], 2 * want[0], rtol=1e-2), (with_bug, want)


# --- 5. all_reduce, eager experts, a rank without tokens -----------------------------------------
# Eager returns zeros that are in no graph, so that rank leaves out a collective of backward.


def test_all_reduce_with_a_rank_without_tokens(root):
    ways = [("all_reduce", "fastmoe"), ("all_reduce", "grouped_mm"), ("auto", "fastmoe")]
    cases = [Case("gpt_oss hot", "tp2=ep2", ep=ep, experts=experts) for ep, experts in ways]
    assert not wrong(errors_of(root, cases))


def eager_step(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        experts_implementation="eager",
        distributed_config=DistributedConfig(**LAYOUTS["tp2=ep2"], ep_implementation="all_reduce"),
    )
    ids = batches("plain", 1)[0][0]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return "fine"


@pytest.mark.grid
def test_eager_is_what_fails(root):
    folder = write_checkpoint(root, "gpt_oss hot")
    assert outcomes(2, eager_step, folder, within=60, timeout=10) != ["fine", "fine"]
