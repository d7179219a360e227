"""Implementations of the host wrappers: one folder per kernel language, one file of plain PyTorch."""
