"""Development stand-in for the file that the kernel builder generates: names the namespace of the custom ops."""


def add_op_namespace_prefix(op_name: str) -> str:
    return f"fastmoe::{op_name}"
