"""Warp-specialised Hopper kernels in Gluon, Triton's lower level, for the GEMMs whose rows are gathered."""
