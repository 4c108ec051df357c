"""Commands over checkpoints: `python -m llama.tools.NAME --help`."""
