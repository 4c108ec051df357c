"""The HTTP server of `llama.tools.serve`: OpenAI's API on a `Service`, its metrics, and a chat page."""
