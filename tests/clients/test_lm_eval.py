"""lm-evaluation-harness's `local-completions` gives the numbers of `llama evaluate`, in each of its tokenizer modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.tools.convert import to_hf
from tests.support.serving import ServerProcesses

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from llama.tools.harness import LlamaLM
from tests.clients.conftest import MODEL
from tests.test_examples import TINY_LLAMA
from tests.tools.test_evaluate import close, tasks  # noqa: F401 (a fixture)

pytestmark = pytest.mark.clients
MAX_SEQ_LEN = 256  # no text has to be truncated, which each class does in its own way
SCORED = ["letters", "endings", "rolling", "generation"]


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(TINY_LLAMA, TINY_LLAMA / "tokenizer.model", MAX_SEQ_LEN, 4, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    to_hf(TINY_LLAMA, TINY_LLAMA / "tokenizer.model", folder, quiet=True)
    return folder


def metrics(lm: Any, folder: Path, names: list[str]) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=False)
    return {name: {k: v for k, v in of.items() if "," in k} for name, of in results["results"].items()}


@pytest.mark.parametrize("mode", ["huggingface", "remote", "none"])
def test_the_numbers_match_llama_evaluate(
    server: ServerProcesses,
    llama: Llama,
    hf_folder: Path,
    tasks: Path,  # noqa: F811
    mode: str,
) -> None:
    for package in ("aiohttp", "tenacity", "requests", "transformers"):
        pytest.importorskip(package)
    settings: dict[str, Any] = {
        "base_url": f"{server.url}/v1/completions",
        "model": MODEL,
        "tokenizer_backend": mode,
        "max_length": MAX_SEQ_LEN + 1,  # of which the class keeps one for the generated token
        "num_concurrent": 4,
        "max_retries": 1,
    }
    names = SCORED
    if mode == "huggingface":
        settings |= {"tokenizer": str(hf_folder), "add_bos_token": True}
    if mode == "none":
        names, settings["eos_string"] = ["generation"], "</s>"
    found = metrics(get_model("local-completions")(**settings), tasks, names)
    expected = metrics(LlamaLM(llama=llama, add_bos_token=mode != "remote"), tasks, names)
    assert found == close(expected)
