"""Measurements of this library, of the ways it replaces, and of other engines beside it; `bench.py` is the command."""
