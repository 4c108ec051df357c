"""Choose the most probable of several continuations: `python examples/score.py`, from the root of the repository."""

from llama import Llama

llama = Llama.build("tiny-llama/", "tiny-llama/tokenizer.model", max_seq_len=128, max_batch_size=4)

context = "The capital of France is"
choices = [" Paris.", " mayonnaise.", " Llama."]
scores = llama.score(choices, contexts=[context] * len(choices))
for choice, score in sorted(zip(choices, scores, strict=True), key=lambda pair: -pair[1]["logprob"]):
    print(f"{score['logprob']:7.2f} {context}{choice}  ", *map("{:.1f}".format, score["logprobs"]))
