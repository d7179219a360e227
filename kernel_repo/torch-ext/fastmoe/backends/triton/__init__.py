"""Triton kernels and nothing else: each file holds the kernels of the host file of the same name and their launches."""
