"""Parallelism package: device mesh, tensor-parallel layers, gradient buffers, recomputation, dropout streams."""
