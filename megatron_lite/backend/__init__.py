"""The machine: devices, process groups and the launcher's environment behind one seam.

`torch.cuda`, `torch.distributed` and environment variables are named here and (almost) nowhere else.
"""
