"""FLOPs of one token through a model, counted from its modules rather than from config field names.

Only matrix multiplications count, at 2 FLOPs per multiply-add; norms, activations, softmax, rotary
embeddings, gathers and the embedding lookup do not, and neither does recomputation under gradient
checkpointing (model FLOPs, as in PaLM, arXiv:2204.02311, appendix B). L sequence length, E experts,
K top_k.

What is counted, per token:

- every `nn.Linear` and `nn.Conv1d` of the decoder, adapters included, and the head;
- experts behind transformers' experts interface: K / E of their weights (shapes are global ones, so
  a shard of an expert-parallel model counts the whole layer);
- weights that are bare parameters: routers, hyper-connections, stacks of shared experts;
- attention: q @ k^T and p @ v, for the keys a query may see (`AttentionTerm`); the scores of a
  learned indexer (DeepSeek sparse attention and its kin) likewise;
- linear attention and state-space layers: updating and reading the recurrent state, whatever the
  chunked kernel really multiplies (it does several times as much).

Not counted: vision and audio towers and projectors (`FlopCount.excluded` names them), relative
position logits (Inkling), pooling inside compressors. An expert id that stands for "skip" (Zaya)
counts as an expert, so its count is an upper bound.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

# Bare 2-D parameters that their module multiplies by: routers; hyper-connections (DeepSeek-V4,
# GLM-5-Next, HY-V4); the key pooling gate of GLM-5-Next's indexer.
BARE_MATRICES = ("weight", "fn", "hc_fn", "index_kpool_compress_gate")

# Experts that only image tokens reach (ERNIE-4.5-VL); the counts here are for text.
NOT_FOR_TEXT = "vision_moe"

TOP_K_FIELDS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token")


@dataclass(frozen=True)
class Matmul:
    """One weight, or stack of weights, that each token is multiplied by."""

    name: str  # "model.layers.0.mlp.experts"
    kind: str  # "linear", "experts", "router", "head" or "recurrence" (which has no weight)
    flops: float  # forward, per token: 2 * in * out for a linear layer
    trainable: bool  # False where no weight gradient is computed


@dataclass(frozen=True)
class AttentionTerm:
    """Attention layers that see the same keys. n: tokens up to and including the query."""

    flops_per_key: float  # forward, per query and key, over all layers: 2 * heads * (qk + v dims)
    limit: int | None  # most keys a query sees: a sliding window or a top-k budget; None: no limit
    stride: int  # 1; more where a key stands for that many tokens (compressed attention)
    causal: bool  # False: a query sees later keys too

    def keys_full(self, seq_len: int) -> float:
        """Keys per query without the causal mask: min(L / stride, limit)."""
        keys = seq_len // self.stride
        return keys if self.limit is None else min(keys, self.limit)

    def keys_causal(self, seq_len: int) -> float:
        """Mean over queries of min(n / stride, limit); `keys_full` for a bidirectional layer."""
        if not self.causal:
            return self.keys_full(seq_len)
        return sum(self.keys_full(n) for n in range(1, seq_len + 1)) / seq_len


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one token through one forward; a batch costs its tokens, never its padding."""

    linear: float  # dense layers: projections, dense MLPs, shared experts, convolutions, adapters
    experts: float  # routed experts, K of them: K * 6 * H * I for a gated expert
    router: float  # router logits: 2 * H * E per MoE layer
    head: float  # output embeddings (or classifier): 2 * H * vocabulary
    recurrence: float  # linear attention and state-space layers: state update and read
    attention: tuple[AttentionTerm, ...]  # what depends on the sequence length
    frozen: float  # the part of the above whose weights take no gradient
    excluded: tuple[str, ...]  # modules outside the text path, not counted: ("model.visual",)

    @property
    def weights(self) -> float:
        """Everything that does not depend on the sequence length."""
        return self.linear + self.experts + self.router + self.head + self.recurrence

    def attention_full(self, seq_len: int) -> float:
        """Scores and values against all L keys; sliding windows still limit them."""
        return sum(t.flops_per_key * t.keys_full(seq_len) for t in self.attention)

    def attention_causal(self, seq_len: int) -> float:
        """Scores and values against the keys that the causal mask lets a query see, on average."""
        return sum(t.flops_per_key * t.keys_causal(seq_len) for t in self.attention)

    def forward_full(self, seq_len: int) -> float:
        """Forward, non-causal convention (PaLM's)."""
        return self.weights + self.attention_full(seq_len)

    def forward_causal(self, seq_len: int) -> float:
        """Forward, causal-adjusted convention."""
        return self.weights + self.attention_causal(seq_len)

    def training_full(self, seq_len: int) -> float:
        """Forward and backward: 3 forwards, less the weight gradients of frozen weights."""
        return 3 * self.forward_full(seq_len) - self.frozen

    def training_causal(self, seq_len: int) -> float:
        """Forward and backward, causal-adjusted."""
        return 3 * self.forward_causal(seq_len) - self.frozen


def count_flops(model: nn.Module) -> FlopCount:
    """Count a transformers model (or a PEFT model around one), on any device, `meta` included.

    Sharded parameters (DTensor, DeepSpeed ZeRO-3) count with their global shapes; FSDP1 flattens
    them, so count before it wraps the model. Raises ValueError for a model that is no transformers
    decoder, and for experts whose top_k or shapes cannot be found.
    """
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    decoder, excluded = text_path(model)
    total = defaultdict(float)
    for matmul in (*decoder_matmuls(decoder), *head_matmuls(model, decoder)):
        total[matmul.kind] += matmul.flops
        if not matmul.trainable:
            total["frozen"] += matmul.flops
    kinds = ("linear", "experts", "router", "head", "recurrence", "frozen")
    terms = tuple(attention_terms(decoder))
    return FlopCount(**{k: total[k] for k in kinds}, attention=terms, excluded=excluded)


def text_path(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The decoder that every token goes through, and the names of what stands beside it."""
    if not hasattr(model, "get_decoder") or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is not a decoder of transformers: not counted")
    decoder = model.get_decoder()
    inside = set(decoder.modules())
    heads = {id(m) for m in _heads(model, inside)}
    excluded: list[str] = []
    for name, module in model.named_modules():
        holds_decoder = decoder in module.modules()
        seen = any(name.startswith(f"{other}.") for other in excluded)
        if module in inside or holds_decoder or id(module) in heads or seen:
            continue
        if any(True for _ in module.parameters()):
            excluded.append(name)
    return decoder, tuple(excluded)


def _heads(model: nn.Module, inside: set[nn.Module]) -> Iterator[nn.Module]:
    """Output embeddings and classifiers: linear layers that stand directly on the model."""
    output = model.get_output_embeddings()
    for module in {id(m): m for m in (output, *model.children())}.values():
        if hasattr(module, "in_features") and module not in inside:
            yield module


def head_matmuls(model: nn.Module, decoder: nn.Module) -> Iterator[Matmul]:
    """The model's head, as `Matmul`s of kind "head"."""
    names = {id(m): name for name, m in model.named_modules()}
    for head in _heads(model, set(decoder.modules())):
        flops = 2.0 * head.in_features * head.out_features
        yield Matmul(names[id(head)], "head", flops, _trains(head))


def decoder_matmuls(decoder: nn.Module) -> Iterator[Matmul]:
    """What each token is multiplied by in the decoder, layer by layer."""
    adapted: dict[str, float] = {}  # "...mlp.experts." -> K / E, where PEFT wraps an experts module
    modules = dict(decoder.named_modules())
    for name, module in modules.items():
        if NOT_FOR_TEXT in name.split(".") or "original_module" in name.split("."):
            continue
        share = next((s for prefix, s in adapted.items() if name.startswith(prefix)), None)
        if is_experts(module):
            yield _experts(name, module, modules)
        elif hasattr(module, "get_base_layer") and is_experts(module.get_base_layer()):
            adapted[f"{name}."] = _active_share(name, module.get_base_layer(), modules)
        elif isinstance(module, nn.Linear):
            kind = "linear" if share is None else "experts"
            kind = "router" if _is_router(name, module, modules) else kind
            flops = 2.0 * module.in_features * module.out_features * (share or 1.0)
            yield Matmul(name, kind, flops, _trains(module))
        elif isinstance(module, nn.Conv1d):
            yield Matmul(name, "linear", 2.0 * _numel(module.weight), _trains(module))
        else:
            yield from _bare_weights(name, module)
            if state := recurrence(module):
                yield Matmul(name, "recurrence", state, True)


def is_experts(module: nn.Module) -> bool:
    """Whether this module stands behind transformers' `use_experts_implementation`."""
    if not hasattr(module, "has_gate") or not hasattr(module, "is_transposed"):
        return False
    return hasattr(module, "gate_up_proj" if module.has_gate else "up_proj")


def num_experts(module: nn.Module) -> int:
    """Global number of experts; `module.num_experts` is the local one under expert parallelism."""
    return _shape(module.down_proj)[0]


def _experts(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> Matmul:
    up = module.gate_up_proj if module.has_gate else module.up_proj
    for weight in (up, module.down_proj):
        if len(_shape(weight)) != 3:
            raise ValueError(
                f"{name}: expert weights of shape {tuple(_shape(weight))}, expected 3 dimensions; "
                "count before FSDP1 or a quantiser flattens them"
            )
    numel = _numel(up) + _numel(module.down_proj)
    flops = 2.0 * numel * _active_share(name, module, modules)
    return Matmul(name, "experts", flops, up.requires_grad or module.down_proj.requires_grad)


def _active_share(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> float:
    """K / E: the part of the experts' weights that one token meets."""
    return _top_k(name, module, modules) / num_experts(module)


def _top_k(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> int:
    """top_k of the router beside the experts, else of the experts' config."""
    block = modules[name.rpartition(".")[0]]
    for sibling in block.modules():
        if isinstance(top_k := getattr(sibling, "top_k", None), int):
            return top_k
    for field in TOP_K_FIELDS:
        if isinstance(top_k := getattr(module.config, field, None), int):
            return top_k
    raise ValueError(
        f"{name}: no `top_k` on a module beside the experts and none of {TOP_K_FIELDS} in "
        f"{type(module.config).__name__}"
    )


def _is_router(name: str, module: nn.Linear, modules: dict[str, nn.Module]) -> bool:
    """A linear layer below a "router" or "gate" with one output per expert of the block above."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part in ("router", "gate"):
            experts = modules.get(".".join([*parts[:i], "experts"]))
            if experts is not None and is_experts(experts):
                return module.out_features == num_experts(experts)
    return False


def _bare_weights(name: str, module: nn.Module) -> Iterator[Matmul]:
    """Parameters used as matrices without an `nn.Linear` around them."""
    if isinstance(module, nn.Embedding):
        return
    for key, parameter in module.named_parameters(recurse=False):
        matrix = len(_shape(parameter)) == 2 and key in BARE_MATRICES
        stack = len(_shape(parameter)) == 3  # shared experts as one tensor: a token meets all of it
        if matrix or stack:
            kind = "router" if matrix and key == "weight" else "linear"
            flops = 2.0 * _numel(parameter)
            yield Matmul(f"{name}.{key}", kind, flops, parameter.requires_grad)


def recurrence(module: nn.Module) -> float:
    """FLOPs per token of a recurrent mixer's state, 0 for other modules. d_k x d_v state per head.

    Delta rules (Gated DeltaNet, arXiv:2412.06464; Kimi Delta Attention, arXiv:2510.26692): read
    with k, write, read with q: 6 * heads * d_k * d_v. Mamba (arXiv:2312.00752, 2405.21060) and
    lightning attention (arXiv:2401.04658): write and read: 4 * heads * d_k * d_v.
    """
    if hasattr(module, "head_k_dim") and hasattr(module, "head_v_dim"):
        return 6.0 * module.num_v_heads * module.head_k_dim * module.head_v_dim
    if hasattr(module, "qkv_dim") and hasattr(module, "conv_dim"):  # a forget gate has the first
        return 6.0 * module.num_heads * module.head_dim**2
    if hasattr(module, "ssm_state_size"):
        return 4.0 * module.intermediate_size * module.ssm_state_size
    if hasattr(module, "slope_rate"):
        return 4.0 * module.num_attention_heads * module.head_dim**2
    return 0.0


def attention_terms(decoder: nn.Module) -> list[AttentionTerm]:
    """The decoder's attention, layers that see the same keys merged into one term."""
    merged: dict[tuple, float] = defaultdict(float)
    for module in decoder.modules():
        for term in attention_of(module):
            merged[term.limit, term.stride, term.causal] += term.flops_per_key
    return [AttentionTerm(flops, *key) for key, flops in merged.items()]


def attention_of(module: nn.Module) -> Iterator[AttentionTerm]:
    """Terms of one softmax attention module; nothing for any other module."""
    v_dim = getattr(module, "v_head_dim", getattr(module, "head_dim", None))
    if v_dim is None or not hasattr(module, "is_causal"):
        return
    qk_dim = getattr(module, "qk_head_dim", getattr(module, "head_dim", None))
    output = getattr(module, "o_proj", getattr(module, "out_proj", None))
    heads = module.num_heads if output is None else output.in_features // v_dim
    per_key = 2.0 * heads * (qk_dim + v_dim)
    limit, causal = _window(module), bool(module.is_causal)
    if limit is not None and not causal:
        limit = 2 * limit - 1  # the window reaches both ways
    compressor = getattr(module, "compressor", None)
    if compressor is not None:  # DeepSeek-V4: a window of tokens, and compressed keys of all before
        indexer = getattr(compressor, "indexer", None)
        budget = None if indexer is None else indexer.index_topk
        yield AttentionTerm(per_key, budget, compressor.compress_rate, causal)
    else:
        indexer = getattr(module, "indexer", None)
        limit = _budget(module, indexer) or limit
    yield AttentionTerm(per_key, limit, 1, causal)
    if indexer is not None:
        yield _index_scores(indexer)


def _window(module: nn.Module) -> int | None:
    """Sliding window of this layer: the module's own, else the config's where it applies."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window or None
    layer_types = getattr(module.config, "layer_types", None)
    if layer_types is not None and layer_types[module.layer_idx] != "sliding_attention":
        return None
    return getattr(module.config, "sliding_window", None) or None


def _budget(module: nn.Module, indexer: nn.Module | None) -> int | None:
    """Keys that an indexer leaves per query, also in layers that reuse another layer's choice."""
    if indexer is None:
        return module.config.index_topk if getattr(module, "skip_topk", False) else None
    if hasattr(indexer, "topk_blocks"):
        return indexer.topk_blocks * indexer.block_size
    return _first(indexer, "index_topk", "token_budget")


def _index_scores(indexer: nn.Module) -> AttentionTerm:
    """Scoring the keys before a choice is made: every key, or every pooled group of keys."""
    heads = _first(indexer, "index_n_heads", "n_heads", "num_heads")
    per_key = 2.0 * heads * _first(indexer, "index_head_dim", "head_dim")
    if hasattr(indexer, "weights_proj"):
        per_key += 2.0 * heads  # the heads' weighted sum is a matrix multiplication too
    stride = _first(indexer, "compress_rate", "compress_ratio", "index_kpool", default=1)
    return AttentionTerm(per_key, None, stride, True)


def _first(module: nn.Module, *names: str, default: int | None = None) -> int:
    """The first of these attributes that the module has."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    if default is None:
        raise ValueError(f"{type(module).__name__} has none of {names}: FLOPs cannot be counted")
    return default


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Global shape: a DTensor's own, or the one DeepSpeed keeps beside an emptied parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _numel(parameter: nn.Parameter) -> int:
    numel = 1
    for size in _shape(parameter):
        numel *= size
    return numel


def _trains(module: nn.Module) -> bool:
    return module.weight.requires_grad
