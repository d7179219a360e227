"""Benchmarks of the experts. A wheel carries this folder as `hf_moe_ep.benchmarks`, so every import
in it is relative.
"""
