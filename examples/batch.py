"""Complete many prompts, four at a time: `python examples/batch.py`, from the root of the repository.

For files of requests that survive an interruption, and for several GPUs, see docs/batch.md.
"""

from threading import Thread

from llama import Llama

llama = Llama.build("tiny-llama/", "tiny-llama/tokenizer.model", max_seq_len=128, max_batch_size=4)

words = ["cheese", "milk", "bread", "apple", "horse", "water", "house", "book"]
prompts = [f"sea otter => loutre de mer\npeppermint => menthe poivrée\n{word} =>" for word in words]
results = llama.text_completion(prompts, temperature=0, max_gen_len=16, stop=["\n"])
for word, result in zip(words, results, strict=True):
    print(f"{word}:{result['generation']} ({result['finish_reason']})")


def answer(question):
    print(llama.chat_completion([[{"role": "user", "content": question}]], temperature=0)[0]["generation"]["content"])


# Calls from several threads share the batch, too.
threads = [Thread(target=answer, args=(q,)) for q in ("How do I make mayonnaise?", "What is the MP value of 13B?")]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
