"""Metrics package: console log lines, progress bar, TensorBoard, metrics.jsonl, timers, throughput.

The training loop passes report dataclasses to a Reporter, which passes them to its sinks. metrics.jsonl holds every
value in full precision; the loss curve is drawn from it.
"""
