"""Parallelism: device mesh, tensor-parallel layers, gradient buffers, recomputation and dropout random streams."""
