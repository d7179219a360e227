"""Implementations of the host wrappers: a folder per kernel language, one file of plain PyTorch."""

CHUNK = 512  # slots that one program of the Triton routing sorts; more take a second launch
