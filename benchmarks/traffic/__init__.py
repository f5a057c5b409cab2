"""Bytes that kernels and model steps move, counted, without a GPU."""
