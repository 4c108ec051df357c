"""llama.cpp through the C functions that llama-cpp-python exposes, on a GGUF file.

Weights in the job's dtype, or in the variants "q8_0" and "q4_0" in blocks of 32. Its default flash attention and
float16 cache; a sequence of its own for each prompt, as its batched benchmark has.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from torch import Tensor

from benchmarks.job import Job

_TYPES = {  # by the variant, or else the job's dtype
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
_NAMES = {"tok_embeddings.weight": "token_embd", "norm.weight": "output_norm", "output.weight": "output"}
_NAMES_IN_LAYER = {
    "attention.wq.weight": "attn_q",
    "attention.wk.weight": "attn_k",
    "attention.wv.weight": "attn_v",
    "attention.wo.weight": "attn_output",
    "feed_forward.w1.weight": "ffn_gate",
    "feed_forward.w2.weight": "ffn_down",
    "feed_forward.w3.weight": "ffn_up",
    "attention_norm.weight": "attn_norm",
    "ffn_norm.weight": "ffn_norm",
}


class LlamaCpp:
    batches = (1, 8)
    ragged = False

    def __init__(self, job: Job, variant: str) -> None:
        self.job, self.variant = job, variant
        self.vocab_size = job.vocab_size
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(gguf_file(job, variant)).encode(), model_params)
        n_seq = max(self.batches)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_seq * -(-job.max_seq_len // 256) * 256
        params.n_batch = n_seq * job.max_seq_len
        params.n_seq_max = n_seq
        params.n_threads = params.n_threads_batch = job.threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        position, tokens = 0, prompts
        for _ in range(n_tokens):
            chosen = self.step(tokens, position)
            tick()
            position += len(tokens[0])
            tokens = [[token] for token in chosen]

    def step(self, tokens: list[list[int]], position: int) -> list[int]:
        """Feeds each sequence its tokens, as many for each, and returns the likeliest next ones."""
        last_places = []
        place = 0
        for sequence, row in enumerate(tokens):
            for offset, token in enumerate(row):
                self.batch.token[place] = token
                self.batch.pos[place] = position + offset
                self.batch.n_seq_id[place] = 1
                self.batch.seq_id[place][0] = sequence
                self.batch.logits[place] = offset == len(row) - 1
                place += 1
            last_places.append(place - 1)
        self.batch.n_tokens = place
        if llama_cpp.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")
        return [self.likeliest(i) for i in last_places]

    def likeliest(self, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, place)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, shape=(self.vocab_size,)).argmax())

    def decode_script(self, prompt: list[int], output: list[int], prompt_lookup: bool) -> dict[str, float]:
        """Seconds and passes from the first token to the last, by `Llama.generate`, made to choose `output`."""
        script = prompt + output
        passes = 0

        def force(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
            if len(ids) < len(script):  # drafts may reach past the end
                scores[script[len(ids)]] = 1e4
            return scores

        class Counting(LlamaPromptLookupDecoding):
            def __call__(self, ids: np.ndarray, /, **options: Any) -> np.ndarray:
                nonlocal passes
                passes += 1
                return super().__call__(ids, **options)

        lookup = Counting(num_pred_tokens=10) if prompt_lookup else None
        llama = llama_cpp.Llama(
            str(gguf_file(self.job, self.variant)),
            n_ctx=self.job.max_seq_len,
            n_threads=self.job.threads,
            n_threads_batch=self.job.threads,
            draft_model=lookup,
            verbose=False,
        )
        tokens = llama.generate(prompt, temp=0.0, logits_processor=llama_cpp.LogitsProcessorList([force]))
        next(tokens)
        passes, started = 0, self.job.clock()
        for _ in range(len(output) - 1):
            next(tokens)
        return {"seconds": self.job.clock() - started, "passes": passes if prompt_lookup else len(output) - 1}


def version(job: Job, variant: str) -> str:
    return f"llama-cpp-python {package_version('llama-cpp-python')}" + (f", {variant}" if variant else "")


def prepare(job: Job, variant: str) -> None:
    """Writes the GGUF; the norms in float32, as llama.cpp wants them."""
    kind, file_type = _TYPES[variant or job.dtype]
    writer = gguf.GGUFWriter(gguf_file(job, variant), "llama")
    writer.add_file_type(file_type)
    _add_sizes(writer, job)
    _add_vocabulary(writer, Path(job.tokenizer_path).with_suffix(".vocab"))
    for name, tensor in _read_state(job).items():
        if tensor.dim() == 1:
            writer.add_tensor(_gguf_name(name), tensor.float().numpy())
        elif variant:
            values = gguf.quants.quantize(tensor.float().numpy(), kind)
            writer.add_tensor(_gguf_name(name), values, raw_dtype=kind)
        else:
            writer.add_tensor(_gguf_name(name), _as_numpy(tensor), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, job: Job) -> None:
    writer.add_context_length(4096)
    writer.add_embedding_length(job.dim)
    writer.add_block_count(job.n_layers)
    writer.add_feed_forward_length(job.hidden_dim)
    writer.add_head_count(job.n_heads)
    writer.add_head_count_kv(job.n_kv_heads)
    writer.add_layer_norm_rms_eps(job.norm_eps)
    writer.add_rope_dimension_count(job.head_dim)
    writer.add_rope_freq_base(job.rope_theta)
    writer.add_vocab_size(job.vocab_size)


def _add_vocabulary(writer: gguf.GGUFWriter, path: Path) -> None:
    """That of SentencePiece's list of pieces and scores: the unknown and the control pieces first."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(lines) - 3)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _ in lines])
    writer.add_token_scores([float(score) for _, score in lines])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)


def gguf_file(job: Job, variant: str) -> Path:
    return Path(job.folder) / f"model-{variant or job.dtype}.gguf"


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return f"{_NAMES[name]}.weight"
    _, layer, in_layer = name.split(".", 2)
    return f"blk.{layer}.{_NAMES_IN_LAYER[in_layer]}.weight"


def _read_state(job: Job) -> dict[str, Tensor]:
    """Released names -> tensors, memory-mapped, in the job's dtype."""
    shard = next(Path(job.ckpt_dir).glob("*.pth"))
    state = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
    state.pop("rope.freqs", None)
    return {name: tensor.to(getattr(torch, job.dtype)) for name, tensor in state.items()}


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """The same bytes; numpy has no bfloat16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def load(job: Job, variant: str) -> LlamaCpp:
    return LlamaCpp(job, variant)
