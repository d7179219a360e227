"""Warp-specialised Hopper kernels in Gluon, Triton's lower level, for most of the grouped GEMMs."""
