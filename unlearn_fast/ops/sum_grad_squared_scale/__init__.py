"""Minimal: the operator is declared in _library, and Triton serves it on CUDA."""
