"""Other engines on the same weights, one file each: `prepare` writes their files once, `load` gives an engine.

They run in Python environments of their own, so they import neither `llama` nor each other's packages. Those that
convert from transformers' format find it in `job.hf_folder`.
"""
