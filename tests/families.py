"""Every model family behind transformers' experts interface, as tiny models with random weights.

Families are discovered from the installed transformers' sources, so a release that adds one adds a
test case. Sizes: 2 sequences of 12 tokens, hidden 32, 6 experts, top-2, two layers, 1 or 2 sparse.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import nn

# Families that are discovered but not tested, each with its reason. A test holds that
# discovered == tested + skipped, and that no name here is stale.
SKIPPED: dict[str, str] = {}

# Applied to every config that has the field. Values are unequal where a mix-up of two of them would
# otherwise go unseen, and small enough that a forward and backward take milliseconds on one core.
SIZES = {
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "moe_hidden_size": 40,
    "moe_latent_size": 16,
    "rms_norm_eps": 1e-2,  # caps how far a norm of near-zero rows amplifies rounding
    # attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "rotary_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    "index_kpool": 4,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "d_rel": 4,
    "rel_extent": 8,
    # linear attention and state-space layers
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_chunk_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "block_size": 16,
    # dense MLPs and shared experts
    "intermediate_size": 48,
    "dense_intermediate_size": 48,
    "shared_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    # experts and router
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "enable_moe_block": True,
    "router_hidden_size": 16,
    # clamps low enough to bite on pre-activations of about unit size
    "swiglu_limit": 0.5,
    "mlp_gate_softcap": 0.5,
    "mlp_up_softcap": 0.5,
    # other
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
    "unpadded_vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "hc_lowrank": 8,
    "gated_norm_rank": 4,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "heads_per_ngram": 2,
}

DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
EQUAL_HEADS = {"num_key_value_heads": 4}
GEMMA_HEADS = {"head_dim": 8, "global_head_dim": 8}  # the second, 512 by default, is an extra key

# What a family wants beyond SIZES, by Family.name.
OVERRIDES = {
    "axk2": EQUAL_HEADS,
    "beam": DENSE_THEN_SPARSE,
    "deepseek_ocr2": DENSE_THEN_SPARSE,
    "deepseek_v32": EQUAL_HEADS,
    "diffusion_gemma": GEMMA_HEADS,
    "dots3_note": EQUAL_HEADS,
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 16],  # text experts, vision experts
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": GEMMA_HEADS,
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "mrope_section": [2, 1, 1],
        },
    },
    "glm5_next": EQUAL_HEADS | DENSE_THEN_SPARSE | {"qk_rope_head_dim": 0},
    "glm_moe_dsa": EQUAL_HEADS | DENSE_THEN_SPARSE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mistral_large4": EQUAL_HEADS,
    # read by the model, no field of its config class: checkpoints carry it as an extra key
    "qwen3_omni_moe/Qwen3OmniMoeTalkerTextExperts": {"shared_expert_intermediate_size": 24},
    "zaya": {"num_experts_per_tok": 1},  # its config refuses any other
}

# Where the choice by suffix (see model_class) does not reach the experts.
MODEL_CLASSES = {"qwen3_omni_moe/Qwen3OmniMoeTalkerTextExperts": "Qwen3OmniMoeTalkerModel"}


@dataclass(frozen=True)
class Family:
    """One experts class behind `use_experts_implementation`."""

    name: str  # unique: the model's folder, "qwen3_moe"; "folder/Class" where a folder has two
    module: str  # "transformers.models.qwen3_moe.modeling_qwen3_moe"
    experts: str  # "Qwen3MoeExperts"
    has_own_gate: bool  # the class defines `_apply_gate`
    is_concatenated: bool = True  # [gate; up] rather than gate0, up0, gate1, up1, ...
    is_transposed: bool = False  # weights are [E, in, out]
    has_bias: bool = False
    has_gate: bool = True  # gate_up_proj rather than up_proj
    has_post_expert_norm: bool = False

    @property
    def experts_class(self) -> type[nn.Module]:
        return getattr(importlib.import_module(self.module), self.experts)

    @property
    def model_type(self) -> str:
        return model_class(self).config_class.model_type


def _decorator_flags(node: ast.ClassDef) -> dict | None:
    """Keyword arguments of `use_experts_implementation` on this class, None where it is absent."""
    for decorator in node.decorator_list:
        call = isinstance(decorator, ast.Call)
        name = decorator.func if call else decorator
        if isinstance(name, ast.Name) and name.id == "use_experts_implementation":
            keywords = decorator.keywords if call else []
            return {k.arg: ast.literal_eval(k.value) for k in keywords}
    return None


@cache
def discover() -> tuple[Family, ...]:
    """Every experts class of the installed transformers that its experts interface reaches."""
    root = Path(transformers.__file__).parent / "models"
    families = []
    for path in sorted(root.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "use_experts_implementation" not in source:
            continue
        classes = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
        found = [(n, flags) for n in classes if (flags := _decorator_flags(n)) is not None]
        for node, flags in found:
            folder = path.parent.name
            families.append(
                Family(
                    name=folder if len(found) == 1 else f"{folder}/{node.name}",
                    module=f"transformers.models.{folder}.{path.stem}",
                    experts=node.name,
                    has_own_gate=any(getattr(m, "name", "") == "_apply_gate" for m in node.body),
                    **flags,
                )
            )
    return tuple(families)


def tested() -> tuple[Family, ...]:
    """The discovered families that are not in SKIPPED."""
    return tuple(f for f in discover() if f.name not in SKIPPED)


def family(name: str) -> Family:
    """The discovered family of that name."""
    return next(f for f in discover() if f.name == name)


def model_class(family: Family) -> type[transformers.PreTrainedModel]:
    """The model to build: the causal LM, else the text tower, else the token classifier."""
    module = importlib.import_module(family.module)
    if family.name in MODEL_CLASSES:
        return getattr(module, MODEL_CLASSES[family.name])
    names = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == family.module]
    for suffix in ("ForCausalLM", "TextModel", "ForTokenClassification"):
        for name in names:
            if name.endswith(suffix):
                return getattr(module, name)
    raise LookupError(f"{family.module} has no causal LM, text model or token classifier")


def tiny_config(family: Family) -> transformers.PreTrainedConfig:
    """A fresh config of `model_class(family)` with SIZES and the family's OVERRIDES."""
    config_class = model_class(family).config_class
    fields = {field.name for field in dataclasses.fields(config_class)}
    sizes = {name: value for name, value in SIZES.items() if name in fields}
    return config_class(**(sizes | OVERRIDES.get(family.name, {})))


def tiny_model(
    family: Family,
    experts_implementation: str = "eager",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> transformers.PreTrainedModel:
    """A tiny model on CPU in eval mode; a seed gives the same weights for every implementation.

    Every parameter is drawn anew: zeros, ones and tiny values, where models start, hide errors.
    `dtype` casts all of them, also those that a family keeps in fp32 (inkling2 then cannot run).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(family)._from_config(
            tiny_config(family), experts_implementation=experts_implementation
        )
    randomise(model, seed)
    return model.to(dtype).eval()


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Matrices: normal, variance 1 / last dimension. Vectors: 0.1 normal about their start values.

    Also the buffers that choose experts: biases, and DeepSeek-V4's table from token ids.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith(("bias", "biases")):
                buffer.normal_(0, 0.1, generator=generator)
            elif name.endswith("tid2eid"):
                scores = torch.rand(buffer.shape[0], SIZES["num_experts"], generator=generator)
                buffer.copy_(scores.topk(buffer.shape[1]).indices)


def tiny_inputs(model: transformers.PreTrainedModel, seed: int = 0) -> dict:
    """Keyword arguments of `model(...)`: 2 x 12 tokens, no cache. The output is `[0]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (2, 12), generator=generator)
    inputs = {"input_ids": ids, "use_cache": False}
    kind = type(model).__name__
    if kind == "Qwen3OmniMoeTalkerModel":  # takes embeddings of the thinker's states, never ids
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    if kind == "Ernie4_5_VLMoeTextModel":  # text and vision tokens go to experts of their own
        inputs["moe_mm_token_type_ids"] = (torch.arange(24).view(2, 12) % 3 == 0).int()
    return inputs


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> experts module, for every module of the model behind the experts interface."""
    classes = tuple(f.experts_class for f in discover() if f.module == type(model).__module__)
    return {name: m for name, m in model.named_modules() if isinstance(m, classes)}


def forward_backward(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor | None]:
    """The output (as "output") and, by name, every parameter's gradient of a random linear loss."""
    output = model(**tiny_inputs(model))[0]
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    (output * probe).sum().backward()
    return {"output": output.detach()} | {n: p.grad for n, p in model.named_parameters()}


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the reference's largest absolute value, computed in fp64."""
    value, reference = value.double(), reference.double()
    return ((value - reference).abs().max() / reference.abs().max()).item()


def relative_errors(actual: dict, expected: dict) -> dict[str, float]:
    """Name -> relative error, for two results of `forward_backward` of one family.

    Raises AssertionError where only one of the two has a gradient. 0 / 0 is NaN: compare with `<`.
    """
    gradients = [g for name, g in expected.items() if g is not None and name != "output"]
    largest = max(g.abs().max() for g in gradients)
    errors = {}
    for name, want in expected.items():
        got = actual[name]
        assert (got is None) == (want is None), f"{name}: only one of the two has a gradient"
        if want is None:
            continue
        scale = want.abs().max()
        if ".experts." not in name and name != "output":
            # What a model's own cancellation leaves near zero is held to the model's scale.
            scale = max(scale, 1e-2 * largest)
        errors[name] = ((got - want).abs().max() / scale).item()
    return errors
