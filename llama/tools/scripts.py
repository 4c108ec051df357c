"""The console scripts of pyproject.toml: `llama-NAME` does what `python -m llama.tools.NAME` does.

Each imports its own tool alone, since another one may need an extra that is not installed.
"""

from __future__ import annotations

from llama.tools.commandline import run


def chat() -> None:
    from llama.tools.chat import main

    run(main)


def serve() -> None:
    from llama.tools.serve import main

    run(main)


def batch() -> None:
    from llama.tools.batch import main

    run(main)


def evaluate() -> None:
    from llama.tools.evaluate import main

    run(main)


def perplexity() -> None:
    from llama.tools.perplexity import main

    run(main)


def memory() -> None:
    from llama.tools.memory import memory_table

    run(memory_table)


def reshard() -> None:
    from llama.tools.reshard import reshard as main

    run(main, n_threads=1)


def quantize() -> None:
    from llama.tools.quantize import quantize as main

    run(main)


def convert() -> None:
    from llama.tools.convert import from_hf, to_hf

    run({"from_hf": from_hf, "to_hf": to_hf}, n_threads=1)


def verify() -> None:
    from llama.tools.verify import main

    run(main, n_threads=1)
