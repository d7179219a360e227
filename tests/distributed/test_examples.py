"""The example loop, as two ranks and as one process: the same losses and the same weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples import train_loop
from hf_moe_ep.cli.demo.data import documents, train_tokenizer
from tests import families
from tests.distributed.ranks import run_ranks

VOCABULARY = 320
OPTIONS = "--dtype float32 --steps 3 --global_batch 8 --length 32 --lr 1e-3 --log_every 2".split()


@pytest.fixture
def model_dir(tmp_path):
    family = families.family("qwen3_moe")
    config = families.tiny_config(family)
    config.vocab_size, config.output_router_logits, config.router_aux_loss_coef = (
        VOCABULARY,
        True,
        0.1,
    )
    model = families.model_class(family)._from_config(config)
    families.randomise(model)
    model.save_pretrained(tmp_path / "model")
    text = "\n".join(documents())[:20_000]
    train_tokenizer([text], VOCABULARY).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text)
    return tmp_path


def options(folder, output, *more):
    paths = [
        "--model",
        folder / "model",
        "--text",
        folder / "text.txt",
        "--output",
        folder / output,
    ]
    return [*map(str, paths), *OPTIONS, *more]


def test_two_ranks_train_as_one_process(model_dir, capsys):
    sharded = "--fsdp_size 2 --ep_size 2 --micro_batch 2".split()
    ranks = run_ranks(2, train_loop.main, options(model_dir, "sharded", *sharded))
    losses = train_loop.main(options(model_dir, "whole", "--micro_batch", "2"))
    assert "step 2: loss" in capsys.readouterr().out
    assert ranks == [pytest.approx(losses, rel=1e-5)] * 2
    before, whole, sharded = (
        AutoModelForCausalLM.from_pretrained(model_dir / name).state_dict()
        for name in ("model", "whole", "sharded")
    )
    assert not any(torch.equal(before[n], w) for n, w in whole.items())
    errors = {n: families.relative_error(sharded[n], w) for n, w in whole.items()}
    assert max(errors.values()) < 1e-2, errors  # Adam magnifies rounding of near-zero gradients
    assert torch.tensor(list(errors.values())).median() < 1e-5


def test_a_batch_that_does_not_divide(model_dir):
    with pytest.raises(ValueError, match="--global_batch 8 is no multiple of --micro_batch 3"):
        train_loop.main(options(model_dir, "none", "--micro_batch", "3"))
