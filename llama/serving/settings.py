"""What a server's flags become, for the command and for Ray Serve: settings, keys, the length of the context."""

from __future__ import annotations

import hashlib
import os
import sys
from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from llama import Llama
from llama.checkpoint.loading import choose_quantize
from llama.checkpoint.memory import MemoryPlan, available_memory
from llama.checkpoint.reading import list_shards, model_args
from llama.checkpoint.releases import TRAINED_SEQ_LEN, find_release, trained_seq_len
from llama.distributed import groups
from llama.distributed.device import processes_on, select_device, select_dtype
from llama.errors import quote
from llama.inputs import check_speculative
from llama.text.tokenizer_json import load_tokenizer

_USED_MEMORY = 0.9  # of what is available, where the context is chosen by it


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The flags of a server, whatever listens for it.

    Args:
        max_seq_len: maximum number of tokens of a prompt and its completion; by default what the checkpoint was trained
            for, 4096 for Llama 2 and 16384 for Code Llama, or less where the memory is too small for that.
        max_batch_size: maximum number of completions that are generated at a time.
        model_name: name of the network in requests; by default the name of ckpt_dir.
        api_key: key that clients must send; by default the environment variable LLAMA_API_KEY, which other
            users of this machine cannot see, else none.
        api_key_file: file of further keys, one per line.
        max_waiting: maximum number of completions that wait for a slot; further ones are refused.
        max_body_bytes: maximum size of a request; by default what max_seq_len and max_batch_size need, at least 1 MiB.
        timeout_s: maximum seconds of a request, waiting included.
        grace_s: seconds that running requests have when the server is asked to end.
        allowed_origins: origins of web pages that may use the server, such as http://localhost:3000, with commas
            between them; * for all. By default its own chat page alone.
        unknown_fields: refuse requests with unknown fields, or ignore these fields.
        log_requests: write a line per request to stderr.
        log_format: text, or json for lines of JSON.
        speculative: prompt_lookup, or draft with draft_ckpt_dir, verifies several drafted tokens per pass: the
            same text, often in less time.
    """

    max_seq_len: int | None = None
    max_batch_size: int = 8
    model_name: str | None = None
    api_key: str | None = None
    api_key_file: str | None = None
    max_waiting: int = 256
    max_body_bytes: int | None = None
    timeout_s: float = 600
    grace_s: float = 20
    allowed_origins: str = ""
    unknown_fields: str = "refuse"
    log_requests: bool = False
    log_format: str = "text"
    speculative: str | None = None

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in ("max_waiting", "timeout_s", "grace_s", "max_body_bytes")}
        for name, value in limits.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (is_number and 0 < value < 1e9) and not (name == "max_body_bytes" and value is None):
                raise ValueError(f"--{name} must be a number above 0, got {quote(value)}")
        for name, choices in (("unknown_fields", ("refuse", "ignore")), ("log_format", ("text", "json"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} must be {' or '.join(choices)}, got {quote(getattr(self, name))}")

    @classmethod
    def taken_from(cls, flags: dict[str, Any]) -> ServerSettings:
        """Those among a command's flags, which are removed from them."""
        settings = cls(**{f.name: flags.pop(f.name) for f in fields(cls) if f.name in flags})
        check_speculative(settings.speculative, flags)
        return settings

    def loader(self, ckpt_dir: str, tokenizer_path: str, build: Mapping[str, Any]) -> Callable[[], tuple[Llama, str]]:
        """What loads this rank's shard; it also returns the fingerprint. All ranks call this together.

        Args:
            build: optional arguments of `Llama.build`.
        """
        length = self.max_seq_len
        if length is None:
            length = _choose_context(ckpt_dir, tokenizer_path, self.max_batch_size, build)

        def load() -> tuple[Llama, str]:
            llama = Llama.build(ckpt_dir, tokenizer_path, length, self.max_batch_size, **build)
            return llama, fingerprint(llama, tokenizer_path, build.get("seed", 1), build.get("quantize"))

        return load


def fingerprint(llama: Llama, tokenizer_path: str | Path, seed: int, quantize: str | None) -> str:
    """Identifies what results depend on besides the request: checkpoint, tokenizer, dtype, int8, length, seed.

    It does not depend on the model-parallel size.
    """
    norm = llama.model.norm.weight.detach()  # whole on every rank
    params = llama.model.params
    sizes = params.dim, params.n_layers, params.n_heads, params.vocab_size, params.max_seq_len
    digest = hashlib.sha256(repr((*sizes, str(norm.dtype), quantize, seed)).encode())
    digest.update(norm.float().cpu().numpy().tobytes())
    digest.update(Path(tokenizer_path).read_bytes())
    return f"fp_{digest.hexdigest()[:16]}"


def _choose_context(ckpt_dir: str, tokenizer_path: str, max_batch_size: int, build: Mapping[str, Any]) -> int:
    """The positions that the checkpoint was trained for, or as many as the memory has room for. Equal on all ranks.

    No file of a checkpoint says how many these are. Those of published networks are known, by their sizes; others are
    taken for fine-tunes of Llama 2, or of Code Llama by their `rope_theta`.
    """
    size = build.get("model_parallel_size") or len(list_shards(ckpt_dir))
    device = select_device(build.get("device"))
    dtype = select_dtype(build.get("dtype"), device)
    n_words = load_tokenizer(tokenizer_path, ckpt_dir).n_words
    folders = [folder for folder in (ckpt_dir, build.get("draft_ckpt_dir")) if folder]
    networks = [model_args(folder, n_words, max_batch_size=max_batch_size, max_seq_len=1) for folder in folders]
    forms = [choose_quantize(build.get("quantize"), folder, device) for folder in folders]
    trained = min(map(trained_seq_len, networks))
    memory = int(_USED_MEMORY * available_memory(device) / processes_on(device))

    def total(n: int) -> int:
        sizes = (replace(args, max_seq_len=n) for args in networks)
        return sum(MemoryPlan(args, size, dtype, form).total for args, form in zip(sizes, forms, strict=True))

    chosen = bisect(range(1, trained + 1), memory, key=total) or trained  # if nothing fits, `build` says so
    if groups.world_size() > 1:
        chosen = groups.broadcast_object(chosen)
    if groups.is_first_rank():
        why = ", for which the checkpoint was trained"
        if chosen < trained:
            why = f" of {trained}: the memory has no room"
        elif find_release(networks[0]) is None:
            family = "Llama 2" if trained == TRAINED_SEQ_LEN else "Code Llama"
            why = f", as for {family}: this checkpoint's trained length is unknown; set --max_seq_len if it was shorter"
        print(f"--max_seq_len {chosen}{why}", file=sys.stderr, flush=True)
    return chosen


def api_keys(api_key: str | None, api_key_file: str | None) -> list[str]:
    """The keys that clients may have.

    Raises:
        ValueError: one has characters that no header can carry, such as a newline at its end.
    """
    keys = [("LLAMA_API_KEY", os.environ.get("LLAMA_API_KEY", "")) if api_key is None else ("--api_key", api_key)]
    if api_key_file is not None:
        try:
            lines = Path(api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--api_key_file must name a text file with a key per line, got: {error}") from error
        keys += [(f"--api_key_file, line {number},", line.strip()) for number, line in enumerate(lines, start=1)]
        if not any(key for _, key in keys[1:]):
            raise ValueError(f"--api_key_file must have a key per line, got {api_key_file}, which has none")
    for where, key in keys:
        if key != key.strip() or not key.isprintable():
            raise ValueError(
                f"{where} must have no spaces, newlines or control characters at its ends or in it, got a key of "
                f"{len(key)} characters that has some"
            )
    return [key for _, key in keys if key]


def names_in(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]
