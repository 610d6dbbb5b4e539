"""Run metrics: console log lines and progress bar, TensorBoard, metrics.jsonl, timers, throughput.

The loop hands plain values to a Reporter as report dataclasses; the Reporter passes them to its sinks. metrics.jsonl
is the source of truth, from which the loss curve is drawn. Nothing here decides anything about the training.
"""
