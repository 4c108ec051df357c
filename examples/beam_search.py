"""Search for the most probable completion: `python examples/beam_search.py`, from the root of the repository."""

import torch

from llama import Llama

llama = Llama.build("tiny-llama/", "tiny-llama/tokenizer.model", max_seq_len=128, max_batch_size=1, dtype="float32")
model, tokenizer = llama.model, llama.tokenizer


def beam_search(text, width, n_tokens):
    """The log-probability and the text of the best of `width` rows, which are computed without the KV cache."""
    rows, totals = torch.tensor([tokenizer.encode(text, bos=True, eos=False)]), torch.zeros(1)
    for _ in range(n_tokens):
        logprobs = model(rows, 0, use_cache=False)[:, -1].log_softmax(-1)
        ended = rows[:, -1] == tokenizer.eos_id
        logprobs[ended] = -torch.inf
        logprobs[ended, tokenizer.eos_id] = 0.0  # such a row goes on with EOS at no cost
        totals, best = (totals.unsqueeze(1) + logprobs).flatten().topk(width)
        rows = torch.cat((rows[best // model.vocab_size], best.unsqueeze(1) % model.vocab_size), dim=1)
    return totals[0].item(), tokenizer.decode(rows[0].tolist())


for width in (1, 4):  # 1 is greedy
    logprob, text = beam_search("The best llama", width, n_tokens=8)
    print(f"width {width}: {logprob:.2f} {text}")
