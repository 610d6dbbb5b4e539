"""How tensors split: mesh, collectives as autograd pairs, parallel layers, dropout streams, recomputation, buffers."""
