"""Finds the first gradient, parameter or optimizer state that is not finite, and names it.

What is checked is this rank's part of every tensor: one launch for all gradients and one for states
and parameters, each value read once. The result stays on the device: the host waits for it once in
`every` steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import nn
from torch.autograd import Variable
from transformers import TrainerCallback

from ..kernel import get_kernel
from .gradients import local

KINDS = 64  # more than the tensors that an optimizer keeps for a parameter


class FiniteCheck:
    """For a training loop of your own; `FiniteCheckCallback` for Trainer and TRL.

        check = FiniteCheck(model, optimizer, every=20)
        loss.backward()
        check.gradients()  # before clipping, which spreads a NaN over all gradients
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        check.values()     # parameters and optimizer state

    Raises FloatingPointError in every `every`-th `values()`, and in `raise_if_found()`, on all
    ranks alike: they exchange two numbers there, so all ranks have to call them together. The
    message has, per rank, the step and the tensor of the first finding. Tensors that are not on the
    device of the parameters are left out, and states without a dimension, which count steps.

    Raises ValueError where `every` is not positive or the model has no trainable parameter.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, every: int = 10
    ):
        if every < 1:
            raise ValueError(
                f"every={every}: give the number of steps between two waits, 1 or more"
            )
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
        self.optimizer, self.every = optimizer, every
        self.step = 0  # optimizer steps so far; set it where training resumes
        self._kinds = ["gradient", "value"]  # then those of the optimizer's state: "exp_avg"
        self._orders: dict[tuple[int, ...], torch.Tensor] = {}
        device = local(next(iter(self.parameters.values())).detach()).device
        self._first = torch.full(
            (2,), -1, dtype=torch.int64, device=device
        )  # step, number: see _number

    def gradients(self) -> None:
        """Checks the gradients; call it between the last backward of a step and clipping."""
        gradients = (p.grad for p in self.parameters.values())
        self._check(
            (self._number(n, "gradient"), g) for n, g in enumerate(gradients) if g is not None
        )

    def values(self) -> None:
        """Checks the optimizer's state and the parameters; call it after `optimizer.step()`."""
        self._check(self._states_and_values())
        self.step += 1
        if self.step % self.every == 0:
            self.raise_if_found()

    def raise_if_found(self) -> None:
        """Waits for the device; FloatingPointError if any rank has found something."""
        found = [self._first]
        if dist.is_initialized():
            found = [torch.empty_like(self._first) for _ in range(dist.get_world_size())]
            dist.all_gather(found, self._first)
        lines = [
            f"rank {rank}: step {step}, {self._name(number)}"
            for rank, (step, number) in enumerate(torch.stack(found).tolist())
            if step >= 0
        ]
        if lines:
            raise FloatingPointError(f"first value that is not finite: {'; '.join(lines)}")

    def _states_and_values(self) -> Iterable[tuple[int, torch.Tensor]]:
        for n, parameter in enumerate(self.parameters.values()):
            state = self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
            for kind, value in state.items():
                if torch.is_tensor(value) and value.dim():  # not a count of steps
                    yield self._number(n, kind), value
            yield self._number(n, "value"), parameter

    def _number(self, n: int, kind: str) -> int:
        """Of a tensor of the n-th parameter; the same on every rank, in the model's order."""
        if kind not in self._kinds:
            self._kinds.append(kind)
        return n * KINDS + self._kinds.index(kind)

    def _name(self, number: int) -> str:
        n, kind = divmod(number, KINDS)
        return f"{self._kinds[kind]} of {list(self.parameters)[n]}"

    @torch.no_grad()
    def _check(self, numbered: Iterable[tuple[int, torch.Tensor]]) -> None:
        here = []
        for number, tensor in numbered:
            tensor = local(tensor)
            same_device = tensor.device == self._first.device  # AdamW counts its steps on the CPU
            if tensor.is_floating_point() and tensor.numel() and same_device:
                here.append((number, tensor))
        if not here:
            return
        here.sort(key=lambda pair: pair[0])
        numbers, tensors = zip(*here, strict=True)
        first = get_kernel().first_not_finite(list(tensors))
        number = self._order((*numbers, -1)).index_select(0, first.view(1))
        finding = torch.cat([torch.full_like(number, self.step + 1), number])
        self._first = torch.where((self._first[0] < 0) & (number >= 0), finding, self._first)

    def _order(self, numbers: tuple[int, ...]) -> torch.Tensor:
        """`numbers` on the device; the same few lists come in every step."""
        if numbers not in self._orders:
            self._orders[numbers] = torch.tensor(numbers, device=self._first.device)
        return self._orders[numbers]


class FiniteCheckCallback(TrainerCallback):
    """`Trainer(..., callbacks=[FiniteCheckCallback(every=20)])`; TRL's trainers too.

    Gradients are checked when the last backward of a step ends, before Trainer clips them, by a
    callback of the autograd engine; parameters and state after the optimizer's step. Raises
    FloatingPointError out of `train()`, as `FiniteCheck` does.
    """

    def __init__(self, every: int = 10):
        if every < 1:
            raise ValueError(
                f"every={every}: give the number of steps between two waits, 1 or more"
            )
        self.every = every
        self._check: FiniteCheck | None = None
        self._handle = None
        self._queued = False

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._remove_hook()
        self._check = FiniteCheck(model, optimizer, self.every)
        self._check.step = state.global_step
        self._handle = model.register_forward_hook(self._after_forward)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._check.values()

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hook()
        self._check.raise_if_found()

    def _after_forward(self, module: nn.Module, args: tuple, output) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        self._queued = False
        for value in output.values() if isinstance(output, Mapping) else output:
            if torch.is_tensor(value) and value.requires_grad:
                value.register_hook(self._backward_began)

    def _backward_began(self, gradient: torch.Tensor) -> None:
        # Queued twice over: FSDP2 and DDP finish the gradients in such a callback of their own.
        if not self._queued and GradientState().sync_gradients:
            self._queued = True
            queue = Variable._execution_engine.queue_callback
            queue(lambda: queue(self._check.gradients))

    def _remove_hook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
