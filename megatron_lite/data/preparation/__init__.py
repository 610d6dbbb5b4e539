"""Offline dataset preparation package: tokenizing text into .bin/.idx files, merging, packing, statistics."""
