"""Change the logits of each step: `python examples/logits_processor.py`, from the root of the repository."""

from llama import Llama

llama = Llama.build("tiny-llama/", "tiny-llama/tokenizer.model", max_seq_len=128, max_batch_size=1)
with_e = [i for i in range(llama.tokenizer.n_words) if "e" in llama.tokenizer.token_piece(i)]


def without_e(input_ids, scores):
    """Takes the tokens so far, (1, n), and the logits of the next one, (1, vocab_size), as in transformers."""
    scores[:, with_e] = -float("inf")
    return scores


for processors in ([], [without_e]):
    (result,) = llama.text_completion(["Once upon a time"], temperature=0, max_gen_len=24, logits_processors=processors)
    print(repr(result["generation"]))
