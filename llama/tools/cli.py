"""The console script: `llama NAME` does what `python -m llama.tools.NAME` does."""

from __future__ import annotations

import runpy
import sys

import llama
from llama.tools.commandline import did_you_mean, stop

COMMANDS = {
    "chat": "chat with a model in the terminal",
    "serve": "serve a model over HTTP, with OpenAI's API and a chat page",
    "batch": "complete a file of requests in OpenAI's batch format",
    "evaluate": "score a model on tasks of the lm-evaluation-harness",
    "perplexity": "measure a model's perplexity on a text file",
    "reshard": "rewrite a checkpoint for another number of GPUs or processes",
    "convert": "convert a checkpoint from or to Hugging Face's format",
    "quantize": "write a checkpoint with int8 weights",
    "verify": "check a checkpoint's files for damage",
    "memory": "show the memory that a model needs",
}


def main() -> None:
    """Run the command that the first argument names. Only its module is imported: others may need other extras."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"llama {llama.__version__}")
    elif name in COMMANDS:
        sys.argv[1:] = arguments
        runpy.run_module(f"llama.tools.{name}", run_name="__main__", alter_sys=True)
    else:
        guess = did_you_mean(name, COMMANDS) or "; llama --help lists the commands"
        stop(ValueError(f"there is no command {name!r}{guess}"), status=2)


def _help() -> str:
    lines = [f"  {name:<12}{what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: llama COMMAND [FLAGS]", "", *lines, "", "llama COMMAND --help lists a command's flags."])
