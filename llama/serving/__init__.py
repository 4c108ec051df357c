"""The HTTP server of `llama serve`: OpenAI's API on a `Service`, its metrics, and a chat page."""
