"""Measurements of this library and of other engines; `bench.py` is the first command."""
