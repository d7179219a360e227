"""One optimizer step on two equal rows: as one batch of two, or as two accumulated batches of one.

The Trainer's model divides the cross-entropy by `num_items_in_batch`, the tokens of all accumulated
batches on all ranks, but adds the router's auxiliary loss whole each time: it counts twice here.
"""

from upstream.helpers import run, tiny_model, tokens


def moe_model():
    return tiny_model(output_router_logits=True, router_aux_loss_coef=1.0)


def router_update(folder: str, accumulation: int):
    from transformers import Trainer, TrainingArguments

    model = moe_model()
    before = model.model.layers[0].mlp.gate.weight.detach().clone()
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=1,
        per_device_train_batch_size=2 // accumulation,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    row = tokens(1)[0]
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row}] * 2).train()
    return model.model.layers[0].mlp.gate.weight.detach() - before


def update_is_the_loss_gradient(folder: str):
    model, ids = moe_model(), tokens(1)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = -model.model.layers[0].mlp.gate.weight.grad
    for steps in (1, 2):
        update = router_update(folder, steps)
        times = ((update * expected).sum() / (expected * expected).sum()).item()
        error = ((update - expected).norm() / expected.norm()).item()
        assert error < 1e-4, f"router's update with {steps} accumulated batches: {times:.2f} times"


def test_auxiliary_loss_scale(tmp_path):
    run(1, update_is_the_loss_gradient, str(tmp_path))
