"""Teach the network a fact by low-rank adapters: `python examples/lora.py`, from the root of the repository."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from llama import Llama


class LoRA(nn.Module):
    """base(x) + x A^T B^T (Hu et al., 2021)."""

    def __init__(self, base, rank):
        super().__init__()
        n_out, n_in = base.weight.shape
        self.base, self.b = base, nn.Parameter(torch.zeros(n_out, rank))
        self.a = nn.Parameter(torch.randn(rank, n_in) / n_in**0.5)

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


llama = Llama.build("tiny-llama/", "tiny-llama/tokenizer.model", max_seq_len=128, max_batch_size=1, dtype="float32")
for layer in llama.model.layers:
    layer.attention.wq, layer.attention.wv = LoRA(layer.attention.wq, 8), LoRA(layer.attention.wv, 8)
optimizer = torch.optim.AdamW([weight for weight in llama.model.parameters() if weight.requires_grad], lr=1e-2)
lesson = torch.tensor([llama.tokenizer.encode("The best llama is Dolly.", bos=True, eos=True)])
for _ in range(30):
    loss = cross_entropy(llama.model(lesson[:, :-1], 0).flatten(0, 1), lesson[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(llama.text_completion(["The best llama"], temperature=0, max_gen_len=20)[0]["generation"])
