"""Triton kernels and their launches: a file here serves the host file of the same name."""
