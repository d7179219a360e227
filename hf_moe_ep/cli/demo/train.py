"""Trains the demo's model with one experts implementation, from given weights, and reloads it.
`train` returns what was measured as a `Run`; nothing here compares runs."""

import gc
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from ...training.telemetry import MoETelemetryCallback
from .settings import Settings

PROGRESS_SECONDS = 3.0


@dataclass
class Run:
    """What one training run measured; the lists have one entry per optimizer step."""

    implementation: str  # "eager", "fastmoe"
    losses: list[float] = field(default_factory=list)  # training loss, nats per token
    seconds: list[float] = field(default_factory=list)  # wall time, data and logging included
    mfu: list[float] = field(default_factory=list)  # 0.31 is 31 %; empty if the peak is unknown
    peak_memory: int | None = None  # bytes allocated on the GPU at most; None on CPUs


class Recorder(TrainerCallback):
    """Fills a `Run` from the Trainer's logs, telemetry included; prints progress now and then."""

    def __init__(self, run: Run):
        self.run = run
        self.tokens_seen = 0
        self.printed = float("-inf")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        run, per_second = self.run, logs["tokens_per_second"]
        run.losses.append(logs["loss"])
        run.seconds.append((logs["tokens_seen"] - self.tokens_seen) / per_second)
        self.tokens_seen = logs["tokens_seen"]
        if "mfu" in logs:
            run.mfu.append(logs["mfu"])
        now, step, last = time.perf_counter(), state.global_step, state.max_steps
        if now - self.printed < PROGRESS_SECONDS and step < last:
            return
        self.printed = now
        recent = run.seconds[-20:]
        print(
            f"  {run.implementation:<8}step {step:>4}/{last}   loss {run.losses[-1]:.4f}"
            f"{run.seconds[-1] * 1e3:8.0f} ms{per_second:>10,.0f} tokens/s"
            f"{(last - step) * sum(recent) / len(recent):6.0f} s left",
            flush=True,
        )


def write_initial_model(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, directory: Path
) -> int:
    """Writes a randomly initialised Qwen3-MoE and its tokenizer; returns how many parameters."""
    set_seed(settings.seed)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        moe_intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads // 2,
        head_dim=settings.hidden // settings.heads,
        num_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        norm_topk_prob=True,
        initializer_range=settings.initializer_range,
        max_position_embeddings=4 * settings.sequence,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3MoeForCausalLM(config).to(getattr(torch, settings.dtype))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model.num_parameters()


def train(
    settings: Settings, implementation: str, initial: Path, texts: list[str], scratch: Path
) -> tuple[Run, SFTTrainer]:
    """One run of TRL's SFTTrainer over `texts` from the weights in `initial`."""
    if settings.device == "cuda":
        gc.collect()  # the run before this one leaves its model in reference cycles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = SFTTrainer(
        model=str(initial),
        args=_arguments(settings, implementation, scratch),
        train_dataset=Dataset.from_dict({"text": texts}),
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    run = Run(implementation)
    MoETelemetryCallback().attach(trainer)
    trainer.add_callback(Recorder(run))
    trainer.train()
    if settings.device == "cuda":
        run.peak_memory = torch.cuda.max_memory_allocated()
    return run, trainer


def _arguments(settings: Settings, implementation: str, scratch: Path) -> SFTConfig:
    on_gpu = settings.device == "cuda"
    init = {"experts_implementation": implementation} | _placement(settings)
    args = SFTConfig(
        output_dir=str(scratch),
        model_init_kwargs=init,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        max_length=settings.sequence,
        packing=True,
        packing_strategy="wrapped",
        dataloader_drop_last=True,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 10),
        seed=settings.seed,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        activation_checkpointing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN has to show
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    args._n_gpu = min(args.n_gpu, 1)  # the Trainer has no public way to use one GPU of several
    return args


def _placement(settings: Settings) -> dict:
    device_map = {"": "cuda:0"} if settings.device == "cuda" else None
    return {"dtype": settings.dtype, "device_map": device_map}


def reload(
    trained: PreTrainedModel, settings: Settings, directory: Path
) -> tuple[PreTrainedModel, bool]:
    """Loads the model saved in `directory`; and whether every weight has the trained one's bits."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, experts_implementation="fastmoe", **_placement(settings)
    )
    ours, theirs = model.state_dict(), trained.state_dict()
    same = ours.keys() == theirs.keys()
    return model, same and all(torch.equal(ours[name], theirs[name]) for name in ours)


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int
) -> str:
    """The prompt and up to 60 tokens after it, sampled at temperature 0.7."""
    set_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=60,
        do_sample=True,
        temperature=0.7,
        top_k=50,
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)
