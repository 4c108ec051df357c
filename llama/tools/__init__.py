"""Commands over checkpoints: `llama NAME --help` or `python -m llama.tools.NAME --help`."""
