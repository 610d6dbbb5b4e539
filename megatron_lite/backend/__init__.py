"""Device backends package: CPU, CUDA and fake devices, process groups, rendezvous, watchdog.

`torch.cuda`, `torch.distributed` and environment variables are named here and (almost) nowhere else.
"""
