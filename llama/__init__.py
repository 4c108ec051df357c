"""Llama 2 inference on checkpoints in Meta's released format."""

from llama.chat import Dialog, Message
from llama.generation import LLaMA, Llama
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer

__version__ = "0.2.0"

__all__ = ["Dialog", "LLaMA", "Llama", "Message", "ModelArgs", "Tokenizer", "Transformer"]
