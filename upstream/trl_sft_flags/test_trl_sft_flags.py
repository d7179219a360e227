"""TRL's SFT script: a flag for the experts implementation; no YAML key is dropped unseen."""

from upstream.helpers import run


def flag_reaches_the_arguments():
    from trl.scripts.sft import make_parser

    *_, model, _ = make_parser().parse_args_and_config(
        ["--use_cpu", "--bf16", "false", "--experts_implementation", "grouped_mm"]
    )
    assert model.experts_implementation == "grouped_mm"


def unknown_key_is_named(folder: str):
    import logging

    from trl.scripts.sft import make_parser

    path, messages = f"{folder}/recipe.yaml", []
    with open(path, "w") as file:
        file.write("use_cpu: true\nbf16: false\nlearning_rat: 1.0e-5\n")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("trl").addHandler(handler)
    try:  # as the script itself calls it
        make_parser().parse_args_and_config(["--config", path], fail_with_unknown_args=False)
    except ValueError as error:
        messages.append(str(error))
    assert any("learning_rat" in m for m in messages), "learning_rat in the YAML file: not a word"


def test_experts_implementation_flag():
    run(1, flag_reaches_the_arguments)


def test_unknown_yaml_key(tmp_path):
    run(1, unknown_key_is_named, str(tmp_path))
