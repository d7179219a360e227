"""The commands of `hf-moe-ep`, one module or package each, with `main(argv) -> exit status`."""
