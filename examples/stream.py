"""Print an answer as it is generated: `python examples/stream.py`, from the root of the repository."""

from llama import Llama

llama = Llama.build("tiny-llama/", "tiny-llama/tokenizer.model", max_seq_len=512, max_batch_size=2)

dialog = [{"role": "user", "content": "How do I make mayonnaise?"}]
for piece in llama.stream_chat_completion(dialog, temperature=0):
    print(piece, end="", flush=True)
print()

# Two streams share a batch: each pass computes the next token of both.
streams = [llama.stream_text_completion(text, max_gen_len=12, seed=1) for text in ("Once upon a time", "In Paris")]
for pieces in zip(*streams, strict=False):
    print(pieces)
