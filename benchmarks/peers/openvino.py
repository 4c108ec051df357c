"""OpenVINO: a stateful model that optimum-intel exports from transformers, driven through its own infer request.

Weights and arithmetic in the job's dtype, the cache too; the variants "int8" and "int4" have weights that NNCF
compressed. The vocabulary projection is applied to the last position alone, as OpenVINO's own text generation does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from benchmarks.job import Job

_PRECISIONS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


class OpenVino:
    batches = (1, 8)
    ragged = False

    def __init__(self, model: ov.CompiledModel) -> None:
        self.request = model.create_infer_request()
        self.inputs = {name for port in model.inputs for name in port.names}

    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        self.request.reset_state()
        tokens = np.array(prompts, dtype=np.int64)
        end = 0
        for _ in range(n_tokens):
            begin, end = end, end + tokens.shape[1]
            logits = self.step(tokens, begin, end)
            tokens = logits[:, -1:].argmax(-1)
            tick()

    def step(self, tokens: np.ndarray, begin: int, end: int) -> np.ndarray:
        bsz = len(tokens)
        values = {
            "input_ids": tokens,
            "attention_mask": np.ones((bsz, end), dtype=np.int64),
            "position_ids": np.arange(begin, end, dtype=np.int64)[None].repeat(bsz, 0),
            "beam_idx": np.arange(bsz, dtype=np.int32),
        }
        outputs = self.request.infer({name: values[name] for name in values if name in self.inputs})
        return outputs["logits"]


def version(job: Job, variant: str) -> str:
    return f"openvino {ov.__version__.split('-')[0]}" + (f", {variant}" if variant else "")


def prepare(job: Job, variant: str) -> None:
    """Exports the model once; a variant compresses its weights."""
    plain = _file(job, "")
    if not plain.exists():
        from optimum.exporters.openvino import main_export  # here: it is no part of what is measured
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
        model = nncf.compress_weights(ov.Core().read_model(plain), mode=mode, **options)
        _file(job, variant).parent.mkdir(exist_ok=True)
        ov.save_model(model, _file(job, variant), compress_to_fp16=False)


def load(job: Job, variant: str) -> OpenVino:
    core = ov.Core()
    model = core.read_model(_file(job, variant))
    _keep_last_position(model)
    precision = _PRECISIONS[job.dtype]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": job.threads,
    }
    return OpenVino(core.compile_model(model, "CPU", settings))


def _file(job: Job, variant: str) -> Path:
    return Path(job.folder) / f"openvino{variant}" / "openvino_model.xml"


def _keep_last_position(model: ov.Model) -> None:
    """Puts a slice of the last position in front of the vocabulary projection."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    hidden = node.input(0).get_source_output()
    last = ops.slice(hidden, np.array([-1]), np.array([np.iinfo(np.int64).max]), np.array([1]), np.array([1]))
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
