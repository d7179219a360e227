"""What the demo trains, by device: frozen `Settings`, one for CPUs and one for CUDA GPUs.
Both are Qwen3-MoE, so the code that runs is the code that trains the large ones."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """How far apart rounding alone may push two losses that start from the same weights, nats.

    At step 1 only the forward's rounding shows. Training amplifies it: AdamW divides small
    gradients by themselves, and a token on the edge between two experts goes to the other one,
    which no later step undoes. So there is a bound for the first steps, tight enough for an error
    of 1e-3 in the gradients to show, and a wider one for the whole run.
    """

    first_step: float
    first_steps: float  # steps 1 to EARLY
    all_steps: float


EARLY = 10


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
    bounds: Bounds
    initializer_range: float = 0.06  # about 1/sqrt(H), which suits small H better than 0.02
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
    steps=120,
    learning_rate=1e-3,
    bounds=Bounds(first_step=1e-5, first_steps=1e-4, all_steps=1e-2),
)

CUDA = Settings(
    device="cuda",
    dtype="bfloat16",
    layers=8,
    hidden=1024,
    intermediate=512,
    experts=64,
    top_k=8,
    heads=8,
    sequence=512,
    batch=16,
    steps=200,
    learning_rate=3e-4,
    initializer_range=0.03,
    bounds=Bounds(first_step=1e-2, first_steps=2e-2, all_steps=1e-1),
)
