"""transformers' own expert parallelism over fastmoe: two gloo processes against one in eager.

With tp_size 1 the ranks hold different sequences and exchange tokens, with 2 they hold the same.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import hf_moe_ep  # noqa: F401  (registers "fastmoe")
from tests import families
from tests.distributed.ranks import run_ranks

WORLD = 2
# (family, tp_size, ep_implementation, every token on the experts of rank 0)
SCENARIOS = [
    ("qwen3_moe", 1, "auto", False),
    ("qwen3_moe", 1, "all_to_all", False),
    ("qwen3_moe", 2, "auto", False),
    ("qwen3_moe", 2, "all_to_all", False),
    ("qwen3_moe", 2, "all_reduce", False),
    ("gpt_oss", 1, "all_to_all", False),
    ("gpt_oss", 1, "all_to_all", True),
    ("gpt_oss", 2, "all_reduce", True),
]


def batch():
    return torch.randint(3, 128, (WORLD, 12), generator=torch.Generator().manual_seed(2))


def loss_and_gradients(model, ids):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}


def save_model_and_reference(root, name, one_sided):
    """The checkpoint that the ranks load, and what one process gets from it with the eager loop."""
    model = families.tiny_model(families.family(name))
    for module in model.modules():
        if one_sided and type(module).__name__ == "GptOssTopKRouter":
            module.bias.data[module.num_experts // WORLD :] = -100.0
    model_dir = root / f"{name}-{one_sided}"
    model.save_pretrained(model_dir)
    reference = loss_and_gradients(model, batch())
    if one_sided:
        gradients = [g for n, g in reference.items() if ".experts." in n]
        assert gradients and not any(g[g.shape[0] // WORLD :].any() for g in gradients)
    torch.save(reference, model_dir / "reference.pt")


def errors_against_one_process(model_dir, tp_size, ep_implementation):
    """Name -> relative error, of the loss and of every gradient gathered from the ranks."""
    config = DistributedConfig(
        tp_size=tp_size,
        fsdp_size=WORLD // tp_size,
        ep_size=WORLD,
        ep_implementation=ep_implementation,
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, experts_implementation="fastmoe", distributed_config=config
    )
    rank = dist.get_rank()
    ids = batch() if tp_size == WORLD else batch()[rank : rank + 1]
    results = loss_and_gradients(model, ids)
    dist.all_reduce(results["loss"])
    results["loss"] /= WORLD
    errors = {}
    for name, want in torch.load(model_dir / "reference.pt").items():
        got = results[name]
        got = got.full_tensor() if isinstance(got, DTensor) else got
        errors[name] = families.relative_error(got, want)
    return errors


def check_all(root):
    registered, called = ALL_EXPERTS_FUNCTIONS["fastmoe"], []
    ALL_EXPERTS_FUNCTIONS["fastmoe"] = lambda *args: called.append(args[0]) or registered(*args)
    for scenario in SCENARIOS:
        name, tp_size, ep_implementation, one_sided = scenario
        called.clear()
        errors = errors_against_one_process(
            root / f"{name}-{one_sided}", tp_size, ep_implementation
        )
        wrong = {name: error for name, error in errors.items() if not error < 1e-5}  # NaN is wrong
        assert not wrong, f"{scenario}: {wrong}"
        assert len(called) == 2, f"{scenario}: fastmoe ran {len(called)} times in two layers"


def test_two_ranks_match_one_process(tmp_path):
    for name, one_sided in {(s[0], s[3]) for s in SCENARIOS}:
        save_model_and_reference(tmp_path, name, one_sided)
    run_ranks(WORLD, check_all, tmp_path)
