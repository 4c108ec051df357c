"""The engines that are measured, on the same weights and prompts: this library and others.

Engines may have separate Python environments, so each adapter imports its packages where it uses them. Those that
convert from transformers' format find it in `job.hf_folder`.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.worker import Adapter, Job

if TYPE_CHECKING:
    import gguf
    import openvino as ov

    from llama import Llama
    from llama.engine.engine import TokenResult


class Ours(Adapter):
    """`Llama.build`, then the loop of steps that `generate` drains. The variant lists options."""

    def __init__(self, job: Job, variant: str) -> None:
        from llama import Llama

        options = set(variant.split())
        if "no_look_ahead" in options:
            from llama.engine.cuda_graphs import StaticStepper

            StaticStepper.looks_ahead = False
        self.batches = (1,) if "max_batch_1" in options else job.decode_batches
        self.llama = Llama.build(
            job.ckpt_dir,
            job.tokenizer_path,
            max_seq_len=job.max_seq_len,
            max_batch_size=max(self.batches),
            device=job.device,
            dtype=job.dtype,
            compile="compiled" in options,
            cuda_graphs="eager" not in options,
            quantize="int8" if "int8" in options else None,
        )

    def settle(self) -> None:
        for thread in threading.enumerate():
            if thread.name == "huge pages":
                thread.join()

    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        for done, _ in enumerate(greedy_steps(self.llama, prompts, [n_tokens] * len(prompts)), 1):
            if done % len(prompts) == 0:
                tick()


def greedy_steps(llama: Llama, prompts: Iterable[Iterable[int]], n_tokens: Iterable[int]) -> Iterator[TokenResult]:
    """Completes each prompt greedily by its number of tokens, past any EOS, in one call."""
    import torch

    from llama.engine.engine import Call, Sequence
    from llama.engine.sampling import Sampler

    sampler = Sampler(0.0, 1.0, 1, torch.Generator(llama.model.norm.weight.device))
    pairs = zip(prompts, n_tokens, strict=True)
    return llama.engine.run(Call(Sequence(list(prompt), sampler, 0, n, frozenset()) for prompt, n in pairs))


class HuggingFace(Adapter):
    """transformers: sdpa attention, a static cache, a greedy loop by hand, logits of the last position.

    Its dynamic cache, which grows by copying, takes a fifth longer for a step at batch 8, and as long at batch 1.
    """

    def __init__(self, job: Job, variant: str) -> None:
        import torch
        from transformers import LlamaForCausalLM

        options = {"dtype": getattr(torch, job.dtype), "attn_implementation": "sdpa"}
        self.model = LlamaForCausalLM.from_pretrained(job.hf_folder, **options).to(job.device).eval()

    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        import torch
        from transformers import StaticCache

        tokens = torch.tensor(prompts, device=self.model.device)
        cache = StaticCache(config=self.model.config, max_cache_len=tokens.size(1) + n_tokens)
        with torch.inference_mode():
            for _ in range(n_tokens):
                logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                tokens = logits[:, -1:].argmax(-1)
                tokens.tolist()
                tick()


class GptFast(Adapter):
    """gpt-fast's network under `torch.compile`, with CUDA graphs on a card; prefills are not compiled."""

    step: Any
    network: Any

    def __init__(self, job: Job, variant: str) -> None:
        self.job, self.batches = job, job.decode_batches
        self._set_up(1)

    def _set_up(self, bsz: int) -> None:
        import torch
        import torch._inductor.config as inductor

        from benchmarks.gpt_fast import Network

        inductor.coordinate_descent_tuning = True  # as gpt-fast does
        self.step = self.network = None  # the last ones are freed first
        torch.compiler.reset()
        gc.collect()
        self.bsz, self.network = bsz, Network(self.job, bsz)
        self.step = torch.compile(self.network, mode="reduce-overhead", fullgraph=True, dynamic=False)
        tokens, position = (torch.zeros(size, dtype=torch.int64, device=self.job.device) for size in ((bsz, 1), 1))
        with torch.inference_mode():
            for _ in range(3):  # it is compiled, and recorded at a later call
                self.step(tokens, position)

    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        import torch

        if len(prompts) != self.bsz:
            self._set_up(len(prompts))
        with torch.inference_mode():
            tokens = torch.tensor(prompts, device=self.job.device)
            positions = torch.arange(tokens.size(1), device=self.job.device)
            for _ in range(n_tokens):
                tokens = (self.network if tokens.size(1) > 1 else self.step)(tokens, positions).clone()
                positions = positions[-1:] + 1
                tokens.tolist()
                tick()


class LlamaCpp(Adapter):
    """llama.cpp through the C functions that llama-cpp-python exposes, on a GGUF file.

    Weights in the job's dtype, or in the variants "q8_0" and "q4_0" in blocks of 32. Its default flash attention and
    float16 cache; a sequence per prompt, as its batched benchmark has.
    """

    def __init__(self, job: Job, variant: str) -> None:
        import llama_cpp

        self.api, self.vocab_size = llama_cpp, job.vocab_size
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(gguf_file(job, variant)).encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = max(self.batches)
        params.n_ctx = params.n_seq_max * -(-job.max_seq_len // 256) * 256
        params.n_batch = params.n_seq_max * job.max_seq_len
        params.n_threads = params.n_threads_batch = job.threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        position, tokens = 0, prompts
        for _ in range(n_tokens):
            chosen = self._step(tokens, position)
            tick()
            position += len(tokens[0])
            tokens = [[token] for token in chosen]

    def _step(self, tokens: list[list[int]], position: int) -> list[int]:
        """Feeds each sequence its tokens, as many for each, and returns the greedy next ones."""
        import ctypes

        import numpy as np

        batch, length = self.batch, len(tokens[0])
        batch.n_tokens = len(tokens) * length
        for place in range(batch.n_tokens):
            sequence, offset = divmod(place, length)
            batch.token[place] = tokens[sequence][offset]
            batch.pos[place] = position + offset
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = offset == length - 1
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        chosen = []
        for place in range(length - 1, batch.n_tokens, length):
            logits = ctypes.cast(self.api.llama_get_logits_ith(self.context, place), ctypes.POINTER(ctypes.c_float))
            chosen.append(int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax()))
        return chosen

    @staticmethod
    def prepare(job: Job, variant: str) -> None:
        """Writes the GGUF; the norms in float32, as llama.cpp wants them."""
        import gguf
        import torch

        short = variant or {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[job.dtype]
        kind = gguf.GGMLQuantizationType[short.upper()]
        writer = gguf.GGUFWriter(gguf_file(job, variant), "llama")
        writer.add_file_type(gguf.LlamaFileType[("ALL_" if short == "f32" else "MOSTLY_") + short.upper()])
        _add_gguf_sizes(writer, job)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, job.n_layers)
        shard = next(Path(job.ckpt_dir).glob("*.pth"))
        for name, tensor in torch.load(shard, map_location="cpu", weights_only=True, mmap=True).items():
            if tensor.dim() == 1:
                numbers, form = tensor.float().numpy(), None
            elif variant:
                numbers, form = gguf.quants.quantize(tensor.float().numpy(), kind), kind
            else:
                whole = tensor.to(getattr(torch, job.dtype))
                numbers, form = (whole.view(torch.int16) if short == "bf16" else whole).numpy(), kind  # no bfloat16
            writer.add_tensor(names.get_name(name, try_suffixes=[".weight"]), numbers, raw_dtype=form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def gguf_file(job: Job, variant: str = "") -> Path:
    return Path(job.folder) / f"model-{variant or job.dtype}.gguf"


def _add_gguf_sizes(writer: gguf.GGUFWriter, job: Job) -> None:
    """The sizes, and a vocabulary of SentencePiece's pieces and scores: the unknown and the control pieces first."""
    from gguf import TokenType

    writer.add_context_length(4096)
    writer.add_embedding_length(job.dim)
    writer.add_block_count(job.n_layers)
    writer.add_feed_forward_length(job.hidden_dim)
    writer.add_head_count(job.n_heads)
    writer.add_head_count_kv(job.n_kv_heads)
    writer.add_layer_norm_rms_eps(job.norm_eps)
    writer.add_rope_dimension_count(job.dim // job.n_heads)
    writer.add_rope_freq_base(job.rope_theta)
    writer.add_vocab_size(job.vocab_size)
    text = Path(job.tokenizer_path).with_suffix(".vocab").read_text(encoding="utf-8")
    pieces = [line.split("\t") for line in text.splitlines()]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_scores([float(score) for _, score in pieces])
    writer.add_token_types([TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.NORMAL] * (len(pieces) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)


class OpenVino(Adapter):
    """OpenVINO: a stateful model that optimum-intel exports from transformers, driven through its own infer request.

    Weights and arithmetic in the job's dtype, the cache too; in the variants "int8" and "int4" NNCF compresses the
    weights. The vocabulary projection is applied to the last position alone, as OpenVINO's own text generation does.
    """

    def __init__(self, job: Job, variant: str) -> None:
        import openvino as ov

        core = ov.Core()
        model = core.read_model(self._file(job, variant))
        _keep_last_position(model)
        precision = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[job.dtype]
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": job.threads}
        settings |= {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
        compiled = core.compile_model(model, "CPU", settings)
        self.request = compiled.create_infer_request()
        self.inputs = {name for port in compiled.inputs for name in port.names}

    @staticmethod
    def _file(job: Job, variant: str) -> Path:
        return Path(job.folder) / f"openvino{variant}" / "openvino_model.xml"

    @staticmethod
    def prepare(job: Job, variant: str) -> None:
        """Exports the model once; a variant compresses its weights."""
        import openvino as ov

        plain, own = OpenVino._file(job, ""), OpenVino._file(job, variant)
        if not plain.exists():
            from optimum.exporters.openvino import main_export
            from optimum.intel import OVConfig

            main_export(
                str(job.hf_folder),
                output=plain.parent,
                task="text-generation-with-past",
                library_name="transformers",
                local_files_only=True,
                ov_config=OVConfig(),  # without one, weights of a larger network become int8
            )
        if variant:
            import nncf

            mode = {"int8": nncf.CompressWeightsMode.INT8_ASYM, "int4": nncf.CompressWeightsMode.INT4_SYM}[variant]
            options = {"group_size": 64, "all_layers": True} if variant == "int4" else {}
            own.parent.mkdir(exist_ok=True)
            model = nncf.compress_weights(ov.Core().read_model(plain), mode=mode, **options)
            ov.save_model(model, own, compress_to_fp16=False)

    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        import numpy as np

        self.request.reset_state()
        tokens, end = np.array(prompts, dtype=np.int64), 0
        for _ in range(n_tokens):
            begin, end = end, end + tokens.shape[1]
            values = {
                "input_ids": tokens,
                "attention_mask": np.ones((len(tokens), end), dtype=np.int64),
                "position_ids": np.arange(begin, end, dtype=np.int64)[None].repeat(len(tokens), 0),
                "beam_idx": np.arange(len(tokens), dtype=np.int32),
            }
            answer = self.request.infer({name: values[name] for name in values if name in self.inputs})
            tokens = answer["logits"][:, -1:].argmax(-1)
            tick()


def _keep_last_position(model: ov.Model) -> None:
    """Puts a slice of the last position in front of the vocabulary projection."""
    import numpy as np
    from openvino import opset13 as ops

    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    bounds = (np.array([bound]) for bound in (-1, np.iinfo(np.int64).max, 1, 1))  # start, stop, step, axis
    last = ops.slice(node.input(0).get_source_output(), *bounds)
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


class CTranslate2(Adapter):
    """CTranslate2's own generator, with int8 weights, as it is mostly used on CPUs."""

    def __init__(self, job: Job, variant: str) -> None:
        import ctranslate2

        folder = str(Path(job.folder) / "ctranslate2")
        self.generator = ctranslate2.Generator(folder, "cpu", compute_type=variant, intra_threads=job.threads)

    @staticmethod
    def prepare(job: Job, variant: str) -> None:
        """Converts in memory from transformers' model; ids stand for text, since a generator takes pieces."""
        import torch
        from ctranslate2.converters.transformers import LlamaLoader
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(job.hf_folder, dtype=getattr(torch, job.dtype))
        spec = LlamaLoader().get_model_spec(model)
        spec.register_vocabulary([f"<{token}>" for token in range(job.vocab_size)])
        spec.config.layer_norm_epsilon = job.norm_eps
        spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = "<0>", "<1>", "<2>"
        spec.validate()
        spec.optimize(quantization=variant)
        folder = Path(job.folder) / "ctranslate2"
        folder.mkdir(exist_ok=True)
        spec.save(str(folder))

    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        def on_token(result: Any) -> bool:
            if result.batch_id == len(prompts) - 1:
                tick()
            return False

        self.generator.generate_batch(
            [[f"<{token}>" for token in prompt] for prompt in prompts],
            max_length=n_tokens,
            min_length=n_tokens,  # past any EOS
            include_prompt_in_result=False,
            sampling_topk=1,
            callback=on_token,
        )


class Engine(NamedTuple):
    """An adapter, and what it needs."""

    adapter: type[Adapter]
    variant: str = ""
    form: str = ""  # of the weights, "int8" or "int4"; "" for the job's dtype
    imports: str = "torch llama"  # modules that are imported before it loads
    install: str = "torch fairscale"  # what to give to pip for them; the first names the engine's version
    cpu_only: bool = False


_HF = ("torch transformers.models.llama.modeling_llama", "transformers torch safetensors")
_LLAMA_CPP = ("llama_cpp", "llama-cpp-python torch gguf", True)
_OPENVINO = ("openvino", "openvino torch nncf optimum-intel", True)
ENGINES = {
    "ours": Engine(Ours),
    "ours_max_batch_1": Engine(Ours, "max_batch_1"),
    "ours_eager": Engine(Ours, "eager"),  # without CUDA graphs
    "ours_compiled": Engine(Ours, "compiled"),
    "ours_int8": Engine(Ours, "int8", "int8"),
    "ours_int8_compiled": Engine(Ours, "int8 compiled", "int8"),
    "ours_no_look_ahead": Engine(Ours, "no_look_ahead"),  # on CUDA, a step starts when the last one's tokens are there
    "gpt_fast": Engine(GptFast, install="torch"),
    "hf": Engine(HuggingFace, "", "", *_HF),
    "llama_cpp": Engine(LlamaCpp, "", "", *_LLAMA_CPP),
    "llama_cpp_q8_0": Engine(LlamaCpp, "q8_0", "int8", *_LLAMA_CPP),
    "llama_cpp_q4_0": Engine(LlamaCpp, "q4_0", "int4", *_LLAMA_CPP),
    "openvino": Engine(OpenVino, "", "", *_OPENVINO),
    "openvino_int8": Engine(OpenVino, "int8", "int8", *_OPENVINO),
    "openvino_int4": Engine(OpenVino, "int4", "int4", *_OPENVINO),
    "ctranslate2": Engine(CTranslate2, "int8", "int8", "ctranslate2", "ctranslate2 torch", True),
}
