"""megatron_lite: a 3D-parallel GPT trainer you can read, rehearse on a laptop and trust on 256 GPUs."""

__version__ = "0.1.0"
