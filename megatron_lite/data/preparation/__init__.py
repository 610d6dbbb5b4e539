"""Offline dataset preparation: tokenizing text into .bin/.idx files, merging, packing, statistics."""
