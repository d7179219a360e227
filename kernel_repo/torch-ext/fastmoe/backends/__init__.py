"""Implementations of the host wrappers: a folder per kernel language, one file of plain PyTorch."""
