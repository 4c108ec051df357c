"""The recipe of `tiny-llama/`: a text generator, a tokenizer and a training run. Nothing in `llama/` knows of it."""
