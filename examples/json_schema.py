"""An answer that follows a JSON schema: `python examples/json_schema.py`, from the root of the repository.

Needs the extra [structured].
"""

import json

from llama import Llama

llama = Llama.build("tiny-llama/", "tiny-llama/tokenizer.model", max_seq_len=256, max_batch_size=1)
schema = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "London"]}, "sights": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "sights"],
    "additionalProperties": False,
}
dialog = [{"role": "user", "content": "I am going to Paris. What should I see?"}]
(result,) = llama.chat_completion([dialog], temperature=0, structured_outputs={"json": schema})
print(json.loads(result["generation"]["content"]))
