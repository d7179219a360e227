"""Ulysses sequence parallelism: gloo ranks that share every sequence against one process.

The ranks of a group are fed the same batch, groups different rows; loss and every gradient are
held against one process with all rows.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_moe_ep  # noqa: F401  (registers "fastmoe")
from hf_moe_ep.sequence_parallel import enable_sequence_parallel, share_batches
from hf_moe_ep.sequence_parallel.saved_output import exchange_output
from tests import families
from tests.distributed.ranks import run_ranks

BOUND = 2e-6


def batch(rows: int, length: int, seed: int = 2) -> dict:
    """Random tokens; the first three of a row are no targets, as a prompt's."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def padded(rows: int, length: int) -> dict:
    """Right padding, of another length in every row."""
    inputs = batch(rows, length)
    mask = torch.ones_like(inputs["input_ids"])
    for row in range(rows):
        mask[row, length - 3 * row - 2 :] = 0
    labels = inputs["labels"].masked_fill(mask == 0, -100)
    return {"input_ids": inputs["input_ids"] * mask, "labels": labels, "attention_mask": mask}


def packed(*lengths: int) -> dict:
    """Sequences of these lengths in one row, told apart by their positions alone."""
    inputs = batch(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    inputs["labels"] = inputs["labels"].masked_fill(positions == 0, -100)
    return inputs | {"position_ids": positions}


@dataclass(frozen=True)
class Case:
    """One model and its batches; every batch is one accumulation step."""

    batches: tuple[dict, ...]
    family: str = "qwen3_moe"
    config: dict = field(default_factory=dict)
    load: dict = field(default_factory=lambda: {"attn_implementation": "sdpa"})
    checkpointing: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def model(self) -> str:
        """Equal for cases that can use the same model."""
        return str((self.family, self.config, self.load, self.checkpointing, self.dtype))


EAGER = {"attn_implementation": "eager"}
SLIDING = {"sliding_window": 5}
CASES = {
    "even": Case((batch(2, 12),)),
    "odd, fastmoe": Case((batch(2, 13),), load={"experts_implementation": "fastmoe"}),
    "padding": Case((padded(2, 15),)),
    "padding, eager": Case((padded(2, 14),), load=EAGER),
    "packed": Case((packed(4, 6, 3),)),
    "packed, eager": Case((packed(5, 5, 1, 2),), load=EAGER),
    "one KV head": Case((batch(2, 13),), config={"num_key_value_heads": 1}),
    "sliding window": Case((batch(2, 15),), family="mixtral", config=SLIDING),
    "sliding and full layers, sinks": Case((padded(2, 13),), family="gpt_oss", load=EAGER),
    "latent attention": Case((batch(2, 13),), family="deepseek_v3"),
    "auxiliary loss": Case((batch(2, 13) | {"output_router_logits": True},)),
    "auxiliary loss, padding": Case((padded(2, 13) | {"output_router_logits": True},)),
    "two steps": Case((batch(2, 13), padded(2, 9))),
    "checkpointing": Case((batch(2, 13),), checkpointing=True),
}


def make_model(case: Case):
    config = families.tiny_config(families.family(case.family))
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = {name: 8 for name in names if hasattr(config, name)}  # for ep4
    for name, value in (experts | case.config).items():
        setattr(config, name, value)
    model_class = families.model_class(families.family(case.family))
    model = model_class._from_config(config, experts_implementation="eager")
    families.randomise(model)
    return model.to(case.dtype)


def results(model, batches) -> dict:
    """{"loss": sum of the steps' losses, name: gradient}."""
    model.zero_grad()
    losses = []
    for inputs in batches:
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return {"loss": torch.stack(losses).sum()} | gradients


def save_references(root, cases: dict[str, Case]) -> list[tuple[Path, list[str]]]:
    """Folders, each with a model and what one process gets from it in the cases named."""
    models: dict[str, list[str]] = {}
    for name, case in cases.items():
        models.setdefault(case.model, []).append(name)
    saved = []
    for names in models.values():
        model, folder = make_model(cases[names[0]]), root / str(len(saved))
        model.save_pretrained(folder)
        # Loaded, as the ranks' is: in eval mode, and zaya's loading loses a value
        # (upstream/zaya_router_bias).
        model = type(model).from_pretrained(folder, experts_implementation="eager")
        torch.save(
            {name: results(model, cases[name].batches) for name in names}, folder / "reference.pt"
        )
        saved.append((folder, names))
    return saved


def share(inputs: dict, group: int, groups: int) -> dict:
    """The rows of one group; the loss of all groups is the mean of theirs."""
    if inputs["input_ids"].shape[0] < groups or "output_router_logits" in inputs:
        return inputs  # one row, or a loss that is no mean over rows: all groups do the same
    targets = (inputs["labels"][:, 1:] != -100).sum()
    rows = {k: v.chunk(groups)[group] if torch.is_tensor(v) else v for k, v in inputs.items()}
    return rows | {"num_items_in_batch": targets / groups} if groups > 1 else rows


def worst_error(got: dict, want: dict) -> tuple[str, float]:
    """The name with the largest error relative to the reference, in the Euclidean norm."""
    return max(errors_of(got, want).items(), key=lambda item: item[1])


def errors_of(got: dict, want: dict) -> dict[str, float]:
    """Name -> error relative to the reference, in the Euclidean norm."""
    errors = {}
    for name, reference in want.items():
        ours = got[name]
        assert (ours is None) == (reference is None), f"{name}: only one has a gradient"
        if ours is not None and reference.any():
            errors[name] = ((ours - reference).norm() / reference.norm()).item()
    return errors


def sharded_results(load, saved, cases: dict[str, Case], shared_by: int) -> dict[str, dict]:
    """Case -> the loss of all ranks, and this rank's view of every whole gradient.

    `load(folder, case)` gives the sharded model; `shared_by` consecutive ranks see the same rows.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    groups, group = world // shared_by, rank // shared_by
    found = {}
    for folder, names in saved:
        model = load(folder, cases[names[0]])
        if cases[names[0]].checkpointing:
            model.train()
            model.activation_checkpointing_enable()
        for name in names:
            got = results(model, [share(inputs, group, groups) for inputs in cases[name].batches])
            dist.all_reduce(got["loss"])
            got["loss"] /= world
            found[name] = {
                k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in got.items()
            }
    return found


def references_of(saved) -> dict[str, dict]:
    """Case -> what one process gets."""
    return {n: r for folder, _ in saved for n, r in torch.load(folder / "reference.pt").items()}


def worst_errors(load, saved, cases: dict[str, Case], shared_by: int) -> dict:
    """Case -> the name with the largest error relative to one process, and that error."""
    want, got = references_of(saved), sharded_results(load, saved, cases, shared_by)
    return {name: worst_error(got[name], want[name]) for name in got}


def load_ulysses(sp_size: int, ep_size: int, folder, case: Case):
    layout = DistributedConfig(fsdp_size=dist.get_world_size(), ep_size=ep_size)
    model_class = families.model_class(families.family(case.family))
    model = model_class.from_pretrained(folder, distributed_config=layout, **case.load)
    return enable_sequence_parallel(model, sp_size)


@pytest.mark.parametrize(
    ("world", "sp_size", "ep_size"),
    [
        (2, 2, 2),
        pytest.param(2, 2, 1, marks=pytest.mark.grid),
        pytest.param(4, 4, 1, marks=pytest.mark.grid),
        pytest.param(4, 4, 2, marks=pytest.mark.grid),
        pytest.param(4, 2, 4, marks=pytest.mark.grid),
        pytest.param(4, 2, 2, marks=pytest.mark.grid),
    ],
)
def test_every_gradient_is_that_of_one_process(tmp_path, world, sp_size, ep_size):
    saved = save_references(tmp_path, CASES)
    load = partial(load_ulysses, sp_size, ep_size)
    worst = run_ranks(world, worst_errors, load, saved, CASES, sp_size, timeout=240)[0]
    assert worst.keys() == CASES.keys()
    assert not {name: error for name, error in worst.items() if not error[1] < BOUND}


def recording_attention(module, query, key, value, attention_mask, **kwargs):
    """A backend like flash attention: no mask, and told about packed sequences by kwargs."""
    names = ("cu_seq_lens_q", "max_length_q", "position_ids", "scaling")
    CALLS.append({name: kwargs[name] for name in names})
    CALLS[-1] |= {
        "backend": module.config._attn_implementation,
        "groups": module.num_key_value_groups,
        "query": query.shape,
        "key": key.shape,
    }
    return query.transpose(1, 2), None


CALLS: list[dict] = []


def what_a_backend_gets(root) -> dict:
    AttentionInterface.register("recording", recording_attention)
    layout = DistributedConfig(fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(
        root, distributed_config=layout, attn_implementation="recording"
    )
    enable_sequence_parallel(model, 2)
    ends = torch.tensor([0, 4, 10, 13], dtype=torch.int32)
    more = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6}
    model(**packed(4, 6, 3), **more)
    return CALLS[0]


def test_a_backend_gets_whole_sequences_and_its_share_of_heads(tmp_path):
    model = make_model(Case((), config={"num_key_value_heads": 1}))
    model.save_pretrained(tmp_path)
    call = run_ranks(2, what_a_backend_gets, tmp_path)[1]
    assert call["backend"] == "recording"
    assert call["query"] == (1, 2, 14, 8) and call["key"] == (1, 1, 14, 8)
    assert call["groups"] == 2
    assert call["cu_seq_lens_q"].tolist() == [0, 4, 10, 14]
    assert call["max_length_q"] == 7
    assert call["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
    assert call["scaling"] == 8**-0.5


def refusals(root) -> None:
    from trl import SFTConfig

    layout = DistributedConfig(fsdp_size=2)
    for family, config, message in (
        ("qwen3_moe", {"num_attention_heads": 3, "num_key_value_heads": 3}, "3 attention heads"),
        ("minimax", {}, "without transformers' attention interface"),
        ("lfm2_moe", {}, "mixes tokens by a convolution"),
    ):
        model = make_model(Case((), family, config))
        with pytest.raises(ValueError, match=message):
            enable_sequence_parallel(model, 2)(**batch(1, 8))
    arguments = {"output_dir": str(root), "use_cpu": True, "bf16": False, "report_to": []}
    for more in ({"label_smoothing_factor": 0.1}, {"loss_type": "dft"}):
        with pytest.raises(ValueError, match="logits of whole"):
            share_batches(SFTConfig(**arguments | more), 2)
    folder = root / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=layout)
    for size, message in ((0, "give 1 or more"), (3, "does not divide the 2 ranks")):
        with pytest.raises(ValueError, match=message):
            enable_sequence_parallel(model, size)
    enable_sequence_parallel(model, 2)
    with pytest.raises(ValueError, match="was called before"):
        enable_sequence_parallel(model, 2)
    with pytest.raises(ValueError, match="fed different batches"):
        model(**batch(1, 8, seed=dist.get_rank()))
    with pytest.raises(ValueError, match="logits_to_keep=1"):
        model(**batch(1, 8), logits_to_keep=1)
    with pytest.raises(ValueError, match="cannot generate"):
        model.generate(**batch(1, 8), max_new_tokens=2)


def test_refusals(tmp_path):
    make_model(Case(())).save_pretrained(tmp_path / "model")
    run_ranks(2, refusals, tmp_path)


def lora_gradients(root, sp_size: int) -> dict:
    """{"loss": loss, adapter: gradient} of adapters with the same random weights everywhere."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(root), config)
    families.randomise(model)
    model = enable_sequence_parallel(model, sp_size)
    found = {name: g for name, g in results(model, [batch(2, 13)]).items() if g is not None}
    for gradient in found.values() if sp_size > 1 else ():
        dist.all_reduce(gradient)
        gradient /= sp_size
    return found


@pytest.mark.grid
def test_lora(tmp_path):
    make_model(Case(())).save_pretrained(tmp_path)
    got, want = run_ranks(2, lora_gradients, tmp_path, 2)[0], lora_gradients(tmp_path, 1)
    assert len(want) == 9 and got.keys() == want.keys()
    assert worst_error(got, want)[1] < BOUND


def kept_outputs(root) -> dict:
    """Bytes of a backend's outputs that still exist before backward, with and without our hooks."""
    from torch.multiprocessing.reductions import StorageWeakRef

    outputs = []

    def watched(*args, **kwargs):
        output, weights = sdpa(*args, **kwargs)
        outputs.append(StorageWeakRef(output.untyped_storage()))
        return output, weights

    sdpa = AttentionInterface()["sdpa"]
    AttentionInterface.register("watched", watched)
    model = AutoModelForCausalLM.from_pretrained(root, attn_implementation="watched")
    enable_sequence_parallel(model, 2)
    found = {}
    for way in ("ours", "offloading"):
        outputs.clear()
        model.zero_grad()
        others = torch.autograd.graph.save_on_cpu() if way == "offloading" else nullcontext()
        with others:
            loss = model(**batch(2, 13), use_cache=False).loss
        alive = sum(not output.expired() for output in outputs)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[way] = {"layers": len(outputs), "alive": alive, "gradient": gradient}
    return found


def test_the_output_is_kept_once(tmp_path):
    make_model(Case(())).save_pretrained(tmp_path)
    for found in run_ranks(2, kept_outputs, tmp_path):
        ours, offloading = found["ours"], found["offloading"]
        assert ours["layers"] == offloading["layers"] > 0
        assert ours["alive"] == 0 and offloading["alive"] == offloading["layers"]
        assert torch.equal(ours["gradient"], offloading["gradient"])


def changed_in_place(root) -> None:
    model = AutoModelForCausalLM.from_pretrained(root, attn_implementation="sdpa")
    enable_sequence_parallel(model, 2)
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeAttention":
            module.o_proj.requires_grad_(False)  # it keeps nothing, so nothing else notices
            module.o_proj.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
    loss = model(**batch(2, 13), use_cache=False).loss
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_an_output_changed_in_place_is_refused(tmp_path):
    make_model(Case(())).save_pretrained(tmp_path)
    run_ranks(2, changed_in_place, tmp_path)


def test_an_input_changed_in_place_is_refused():
    x, bias = torch.randn(1, 4, 2, 3, requires_grad=True), torch.randn(1, 4, 2, 3)

    def run(change):
        out = exchange_output(lambda: x * bias, torch.clone, torch.clone)
        change()
        return torch.autograd.grad(out.sum(), x)[0]

    assert torch.equal(run(lambda: None), bias)
    with pytest.raises(RuntimeError, match="an input or its output, was changed in place"):
        run(lambda: bias.mul_(2))
