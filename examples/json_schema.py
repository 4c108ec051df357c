"""An answer that follows a JSON schema: `python examples/json_schema.py`, from the root of the repository.

Needs the extra [structured].
"""

import json

from llama import Llama

llama = Llama.build("tiny-llama/", "tiny-llama/tokenizer.model", max_seq_len=256, max_batch_size=1)
schema = {
    "type": "object",
    "properties": {"model": {"enum": ["7B", "13B", "70B"]}, "mp": {"enum": [1, 2, 8]}},
    "required": ["model", "mp"],
    "additionalProperties": False,
}
dialog = [{"role": "user", "content": "What is the MP value of 13B?"}]
(result,) = llama.chat_completion([dialog], temperature=0, structured_outputs={"json": schema})
print(json.loads(result["generation"]["content"]))
