"""What each block adds to the residual stream: `python examples/hook.py`, from the root of the repository."""

from llama import Llama

llama = Llama.build("tiny-llama/", "tiny-llama/tokenizer.model", max_seq_len=128, max_batch_size=1, dtype="float32")


def report(name):
    def hook(module, args, output):
        added = (output - args[0])[0, -1]  # of the last token; (bsz, seqlen, dim) -> (dim,)
        print(f"{name}: {output.size(1)} tokens in this pass, the last one moved by {added.norm():.1f}")

    return hook


handles = [layer.register_forward_hook(report(f"block {i}")) for i, layer in enumerate(llama.model.layers)]
(result,) = llama.text_completion(["The capital of France is"], temperature=0, max_gen_len=2)
print(result["generation"])
for handle in handles:
    handle.remove()
