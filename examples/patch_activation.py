"""Which activation holds the answer? `python examples/patch_activation.py`, from the root of the repository.

Runs one question with a single activation of another, and prints where the answer follows (Meng et al., 2022).
"""

import torch

from llama import Llama

llama = Llama.build("tiny-llama/", "tiny-llama/tokenizer.model", max_seq_len=128, max_batch_size=1, dtype="float32")
model, tokenizer = llama.model, llama.tokenizer
text = "[INST] What is the MP value of {0}? [/INST] The MP value of Llama 2 {0} is "
clean, other = (torch.tensor([tokenizer.encode(text.format(size), bos=True, eos=False)]) for size in ("13B", "70B"))


def run(tokens, block, hook):
    """The logits after the last token, with a hook on a block."""
    handle = block.register_forward_hook(hook)
    logits = model(tokens, 0)[0, -1]
    handle.remove()
    return logits


states = {}
for position in range(clean.size(1)):
    for i, block in enumerate(model.layers):

        def patch(module, args, output, position=position):
            output[:, position] = states[module][:, position]

        run(other, block, lambda module, args, output: states.update({module: output.clone()}))
        answer = tokenizer.token_piece(int(run(clean, block, patch).argmax()))
        if answer == "8":
            print(f"block {i}, token {position} ({tokenizer.token_piece(int(clean[0, position]))}): the answer is 8")
