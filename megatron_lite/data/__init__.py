"""From .bin/.idx files to the tokens of one micro-batch: formats, sample order, blending, reading, preprocessing.

Everything is numpy on memory-mapped files, and which tokens come next is a pure function of the configuration and the
samples consumed so far, in the order that Megatron gives them.
"""
