"""Device backends (CPU, CUDA, fake), process groups and collectives, launcher environment, rendezvous and watchdog.

`torch.cuda`, `torch.distributed` and environment variables are named here and (almost) nowhere else.
"""
