"""The auxiliary router loss (load balancing) at the weight that the config asks for.

Models add `router_aux_loss_coef * aux_loss` to the cross-entropy. Trainer (5.23) then scales the
sum for a cross-entropy that is divided by the tokens of all micro-batches on all ranks; the
auxiliary loss is not, so it counts (accumulation steps) x (data-parallel ranks) times. TRL's
SFTTrainer adds it itself and is right; the callbacks here leave its weight alone.

T tokens of a micro-batch on one rank, E experts, K top_k.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, TrainerCallback


class RouterLossCallback(TrainerCallback):
    """Makes the auxiliary loss independent of accumulation and of the number of ranks.

    `Trainer(..., callbacks=[RouterLossCallback()])`. Each micro-batch's auxiliary loss is weighted
    as its cross-entropy is: by its share of the target tokens of the whole optimizer step. In
    evaluation too. A model without an auxiliary loss trains as before. In a loop of your own call
    `RouterLossCallback().install(model)` once, and the model with labels and num_items_in_batch.

    Raises ValueError in a forward that returns a tuple with a router loss, not a ModelOutput.
    """

    def __init__(self):
        self._weight: torch.Tensor | float = 1.0  # (), of the forward that is running

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self.install(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.install(model)

    def install(self, model: nn.Module) -> None:
        """Hooks the model; hooks that any of these callbacks left there before are replaced."""
        if (head := _causal_model(model)) is not None:
            for earlier in getattr(head, "_router_loss_hooks", ()):
                earlier.remove()
            head._router_loss_hooks = self._hook(model, head)

    def _hook(self, model: nn.Module, head: nn.Module) -> list:
        # First, so that it sees the labels that Trainer counted, before anything shards them.
        before = model.register_forward_pre_hook(self._weigh, prepend=True, with_kwargs=True)
        return [before, head.register_forward_hook(self._after_forward, with_kwargs=True)]

    def _weigh(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        items, targets = kwargs.get("num_items_in_batch"), _targets(kwargs)
        self._weight = 1.0 if items is None or targets is None else targets / items

    def _after_forward(self, head: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if isinstance(output, tuple):
            if head.config.get_text_config().output_router_logits:
                raise ValueError("the model returned a tuple; set config.return_dict=True")
            return
        old = getattr(output, "aux_loss", None)
        if not torch.is_tensor(old):
            return
        new = self._router_loss(head, kwargs, old)
        if (loss := output.get("loss")) is not None:
            change = router_loss_coefficient(head) * (self._weight * new - old)
            output.loss = loss + change.to(loss.device)
        output.aux_loss = new

    def _router_loss(self, head: nn.Module, kwargs: dict, old: torch.Tensor) -> torch.Tensor:
        return old


class GlobalRouterLossCallback(RouterLossCallback):
    """The same, balancing the experts over the global batch instead of each micro-batch.

    Global-batch load balancing of arXiv 2501.11873: the share of the tokens that an expert gets is
    counted over all ranks and over the micro-batches of the optimizer step so far, so experts may
    specialise within a micro-batch. Costs an all-reduce of E + 1 numbers per micro-batch. Without
    accumulation, and with as many tokens on every rank, it is the loss of one process that holds
    the whole batch. Works in Trainer and in SFTTrainer; every rank has to run the same number of
    forwards.

    Raises ValueError at the start where the model has no auxiliary loss, or its config leaves it
    off.
    """

    def __init__(self):
        super().__init__()
        self._router_logits: tuple[torch.Tensor, ...] = ()  # of the forward that is running
        self._sums: torch.Tensor | None = None  # (E + 1,) fp32: tokens of each expert, and T

    def install(self, model: nn.Module) -> None:
        if _causal_model(model) is None:
            raise ValueError(f"{type(model).__name__} has no auxiliary router loss to balance")
        super().install(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        config = _causal_model(model).config.get_text_config()
        if not getattr(config, "output_router_logits", False):
            raise ValueError(
                "output_router_logits=False in the model's config: set it to True, or there is no "
                "auxiliary loss"
            )

    def on_step_begin(self, args, state, control, **kwargs):
        self._sums = None

    def _hook(self, model: nn.Module, head: nn.Module) -> list:
        # TRL's heads do not pass the router logits on, the model below the head returns them.
        below = head.base_model.register_forward_hook(self._keep_logits)
        return [below, *super()._hook(model, head)]

    def _keep_logits(self, module: nn.Module, args: tuple, output) -> None:
        self._router_logits = getattr(output, "router_logits", None) or ()

    def _router_loss(self, head: nn.Module, kwargs: dict, old: torch.Tensor) -> torch.Tensor:
        top_k = _setting(head, "num_experts_per_tok")
        logits, self._router_logits = self._router_logits, ()
        counts, probabilities, tokens = routing_sums(logits, top_k, kwargs.get("attention_mask"))
        sums = torch.cat([counts, tokens.view(1)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        if head.training:
            sums = self._sums = sums if self._sums is None else self._sums + sums
        return balance(sums[:-1] / sums[-1], probabilities / tokens)


def routing_sums(
    router_logits: tuple[torch.Tensor, ...], top_k: int, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the load-balancing loss is made of, summed over the tokens of all layers.

    router_logits: one (T, E) per sparse layer; attention_mask: (B, L) with B * L = T, 0 on padding.
    Returns counts (E,), how often an expert is among a token's top_k; probabilities (E,), with a
    gradient; and tokens (), all fp32.
    """
    counts = probabilities = tokens = 0.0
    for logits in router_logits:
        routing = logits.softmax(-1)
        chosen = routing.topk(top_k, dim=-1).indices
        if attention_mask is None:
            mask = routing.new_ones(routing.shape[0], dtype=torch.float32)
        else:
            mask = attention_mask.reshape(-1).to(routing.device, torch.float32)
        weights = mask.repeat_interleave(top_k)
        zeros = mask.new_zeros(routing.shape[-1])
        counts = counts + zeros.scatter_add(0, chosen.reshape(-1), weights)
        probabilities = probabilities + (routing.float() * mask.unsqueeze(-1)).sum(0)
        tokens = tokens + mask.sum()
    return counts, probabilities, tokens


def balance(shares: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """E * sum over experts of share (E,) * probability (E,): arXiv 2101.03961."""
    return (shares * probabilities).sum() * shares.shape[0]


def router_loss_coefficient(model: nn.Module) -> float:
    """What the model multiplies its auxiliary loss with before it adds it to its loss."""
    return _setting(model, "router_aux_loss_coef")


def _setting(head: nn.Module, name: str):
    """As the models read it: from themselves, or where they have it not, from the text config."""
    value = getattr(head, name, None)
    return getattr(head.config.get_text_config(), name) if value is None else value


def _causal_model(model: nn.Module) -> PreTrainedModel | None:
    """The (sub)module that adds the auxiliary loss, inside PEFT's or DDP's wrapper too."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            sources = (sys.modules[c.__module__] for c in type(module).__mro__)  # FSDP2 subclasses
            has_loss = any(hasattr(source, "load_balancing_loss_func") for source in sources)
            return module if has_loss else None
    return None


def _targets(inputs: dict) -> torch.Tensor | None:
    """The tokens with a target in this micro-batch, counted as Trainer counts them: ().

    None where the trainer keeps the labels to itself, for a loss of its own (label smoothing).
    """
    if (shifted := inputs.get("shift_labels")) is not None:
        return (shifted != -100).sum()
    labels = inputs.get("labels")
    return None if labels is None else (labels[..., 1:] != -100).sum()
