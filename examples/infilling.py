"""Fill the gap between two texts: `python examples/infilling.py`, from the root of the repository.

With a folder of Code Llama 7B or 13B as its argument, the model writes what goes there. The toy checkpoint was not
trained for that: it chooses the text with which the whole is most probable.
"""

import sys

from llama import Llama

folder = sys.argv[1] if len(sys.argv) > 1 else "tiny-llama"
llama = Llama.build(folder, f"{folder}/tokenizer.model", max_seq_len=256, max_batch_size=4)
if llama.tokenizer.middle_id is not None:
    prefix, suffix = "def mean(numbers):\n    return ", " / len(numbers)\n"
    (result,) = llama.text_infilling([prefix], [suffix], temperature=0)
    print(result["full_text"])
else:
    prefix, suffix = "The capital of ", " is Paris."
    choices = ["France", "Italy", "mayonnaise"]
    scores = llama.score([choice + suffix for choice in choices], contexts=[prefix] * len(choices))
    best = max(range(len(choices)), key=lambda i: scores[i]["logprob"])
    print(prefix + choices[best] + suffix)
