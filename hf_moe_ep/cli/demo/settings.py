"""What the demo trains, by device: frozen `Settings`, one for CPUs and one for CUDA GPUs.
Both are Qwen3-MoE, so the code that runs is the code that trains the large ones."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """How far apart rounding alone may bring two runs that start from the same weights.

    A token on the edge between two experts may go to either: that is rounding too, and one such
    token of 1024 changes the CPU run's gradient by 2e-3 to 3e-2 and its loss by 1e-5 to 3e-3.
    Training carries it on, also where grouped_mm runs twice, from weights that differ by 1e-7.
    """

    gradient: float  # ||difference|| / ||gradient|| over all parameters, at step 1
    loss: float  # |difference| at any step, nats per token


@dataclass(frozen=True)
class Settings:
    """Sizes of the two runs. H hidden, I intermediate of an expert, E experts, K per token."""

    device: str  # "cpu" or "cuda"
    dtype: str  # of the weights: "float32" or "bfloat16"
    layers: int
    hidden: int  # H
    intermediate: int  # I
    experts: int  # E
    top_k: int  # K
    heads: int  # query heads of size H / heads; half as many key-value heads
    sequence: int  # tokens per sequence
    batch: int  # sequences per step
    steps: int  # optimizer steps of each run
    learning_rate: float
    initializer_range: float  # of the weights; what is wider than 0.02 amplifies rounding less
    bounds: Bounds
    vocab: int = 2048
    seed: int = 42

    @property
    def tokens_per_step(self) -> int:
        return self.sequence * self.batch


CPU = Settings(
    device="cpu",
    dtype="float32",
    layers=4,
    hidden=256,
    intermediate=128,
    experts=32,
    top_k=4,
    heads=4,
    sequence=128,
    batch=8,
    steps=100,
    learning_rate=1e-3,
    initializer_range=0.08,
    # Seen: gradient 6e-7, loss 4e-6 to 4e-3, over several seeds (x86-64). A router that gets no
    # gradient is 0.14 off in the gradient, one expert of 32 that gets none 0.07.
    bounds=Bounds(gradient=5e-2, loss=2e-2),
)

CUDA = Settings(
    device="cuda",
    dtype="bfloat16",
    layers=8,
    hidden=1024,
    intermediate=256,
    experts=64,
    top_k=8,
    heads=16,
    sequence=512,
    batch=16,
    steps=100,
    learning_rate=3e-4,
    initializer_range=0.03,
    bounds=Bounds(gradient=1e-1, loss=1e-1),
)
