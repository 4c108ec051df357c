"""Guide a completion away from another prompt's: `python examples/guidance.py`, from the root of the repository.

Classifier-free guidance (Sanchez et al., 2023), by a logits processor that runs the network and leaves the cache alone.
"""

import torch

from llama import Llama

llama = Llama.build("tiny-llama/", "tiny-llama/tokenizer.model", max_seq_len=128, max_batch_size=1, dtype="float32")


def guidance(prompt, negative, scale):
    """A processor for completions of `prompt`; with a scale of 1 it changes nothing."""
    n_prompt = len(llama.tokenizer.encode(prompt, bos=True, eos=False))
    other = torch.tensor([llama.tokenizer.encode(negative, bos=True, eos=False)])

    def guide(input_ids, scores):
        rows = torch.cat((other, input_ids[:, n_prompt:]), dim=1)
        away = llama.model(rows, 0, use_cache=False)[:, -1].log_softmax(-1)
        return away + scale * (scores.log_softmax(-1) - away)

    return guide


for scale in (0, 1.5):
    guide = guidance("The capital of France is", "The capital of", scale)
    (result,) = llama.text_completion(["The capital of France is"], 0, max_gen_len=9, logits_processors=[guide])
    print(f"scale {scale}: {result['generation']}")
