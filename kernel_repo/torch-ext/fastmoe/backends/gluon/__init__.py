"""Warp-specialised Hopper kernels in Gluon, Triton's lower level, for GEMMs over gathered rows."""
