"""Ask a server with OpenAI's client: `python examples/client.py`, from the root of the repository.

Starts a server of the toy checkpoint, unless its argument is the address of one. Needs the extra [serve] and openai.
"""

import re
import subprocess
import sys

from openai import OpenAI

server = None
if len(sys.argv) > 1:
    url = sys.argv[1]
else:
    command = [sys.executable, "-m", "llama.tools.serve", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    url = re.findall(r"http://[\w.:]+", server.stdout.readline())[0]
try:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=10)  # it answers 503 while the network is loaded
    model = client.models.list().data[0].id
    question = {"role": "user", "content": "How do I make mayonnaise?"}
    for chunk in client.chat.completions.create(model=model, messages=[question], temperature=0, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
finally:
    if server:
        server.terminate()
        server.wait()
