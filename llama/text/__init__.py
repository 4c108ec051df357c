"""Other chat templates and tokenizers than Llama's: Jinja texts and `tokenizer.json`."""
