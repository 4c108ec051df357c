"""Checkpoint files: Meta's format and Hugging Face's, reading, loading and writing."""
