"""Llama 2 inference on checkpoints in Meta's released format."""

import gc

_collects = gc.isenabled()
gc.disable()  # importing torch makes so many objects that searching them for garbage takes a quarter of the time
try:
    from llama.chat import Dialog, Message
    from llama.generation import LLaMA, Llama
    from llama.model import ModelArgs, Transformer
    from llama.tokenizer import Tokenizer
finally:
    if _collects:
        gc.enable()

__version__ = "0.2.0"

__all__ = ["Dialog", "LLaMA", "Llama", "Message", "ModelArgs", "Tokenizer", "Transformer"]
