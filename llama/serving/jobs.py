"""From a checked body to the arguments of the service: ids that fit in the context, and sampling parameters."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar, cast

from llama import inputs
from llama.chat import Message, built_in_format
from llama.engine.calls import Request
from llama.engine.constraints import check_form
from llama.engine.output import Piece
from llama.errors import NonFiniteLogitsError, PromptError, quote
from llama.generation import Llama
from llama.serving.errors import ApiError

if TYPE_CHECKING:
    from llama.serving.protocol import ChatBody, CompletionBody

Key = TypeVar("Key")
DEFAULT_MAX_TOKENS = 16  # of a completion; a chat's answer may fill the context


@dataclass(frozen=True)
class Job:
    """What one request computes. The arguments are those of `engine.calls.Request`."""

    prompts: list[list[int]]
    params: inputs.SamplingParams
    n: int = 1
    top_logprobs: int = 0
    continues: bool = False

    @property
    def n_choices(self) -> int:
        return len(self.prompts) * self.n

    def start(self, llama: Llama) -> Request:
        """Adds the job to the network's engine; its pieces and its end are the request's."""
        request = Request(llama.engine, llama.tokenizer, **vars(self))
        llama.engine.add(request.call)
        return request


class Planner:
    """Makes jobs for one network. Safe for use from several threads.

    Its methods raise `PromptError` for what is wrong, which begins with the field's name, and `ApiError`.

    Args:
        max_choices: maximum number of completions of a request, over all of its prompts.
        model_name, fingerprint: of the network, in requests and answers.
        speculative: as in `SamplingParams`, of all jobs.
    """

    def __init__(
        self,
        llama: Llama,
        max_choices: int,
        model_name: str,
        fingerprint: str | None = None,
        *,
        speculative: str | None = None,
    ) -> None:
        self.model_name = model_name
        self.fingerprint = fingerprint
        self.tokenizer = llama.tokenizer
        self.chat_format = llama.chat_format or built_in_format(llama.tokenizer)
        self._speculative = speculative
        self._vocab_size = inputs.n_usable_ids(llama.model, llama.tokenizer)
        self.max_seq_len: int = llama.model.params.max_seq_len
        self._max_choices = max_choices
        longest_piece = getattr(llama.tokenizer, "longest_piece", sys.maxsize)  # a tokenizer of another class
        self._max_chars = self.max_seq_len * longest_piece

    def check_size(self, values: Any) -> None:
        """Raises ApiError for a body with too many prompts, ids or messages, by their number alone.

        A check of each one would take seconds in which other requests stand still.
        """
        for name in ("prompt", "messages", "tokens", "input"):
            items = values.get(name) if isinstance(values, dict) else None
            if not isinstance(items, list) or not items:
                continue
            if name == "prompt" and not isinstance(items[0], int):
                self._check_count(len(items), name)
            elif len(items) > self.max_seq_len:
                raise self._too_long(name, len(items))

    def completion(self, body: CompletionBody) -> Job:
        """The job of a completion."""
        given, scores_prompt = body.prompts, body.prompt_logprobs is not None
        self._check_count(len(given) * body.n, "prompt" if len(given) > 1 else "n")
        names = ["prompt"] if len(given) == 1 else [f"prompt[{i}]" for i in range(len(given))]
        prompts = [self._prompt(prompt, name, body.suffix) for prompt, name in zip(given, names, strict=True)]
        max_gen_len = min(
            self._fitting(body.max_tokens, len(prompt), name, DEFAULT_MAX_TOKENS)
            for prompt, name in zip(prompts, names, strict=True)
        )
        logprobs = body.logprobs is not None or scores_prompt
        params = self._params(body, max_gen_len, logprobs=logprobs, echo=body.echo or scores_prompt)
        if body.suffix:
            params = replace(params, **inputs.infilling_ends(self.tokenizer))
        top_logprobs = max(body.logprobs or 0, body.prompt_logprobs or 0)
        return Job(prompts, params, body.n, top_logprobs, continues=not body.suffix)

    def chat(self, body: ChatBody) -> Job:
        """The job of a chat."""
        self._check_count(body.n, "n")
        continues = body.continue_final_message
        prompt = self.dialog(cast(list[Message], body.messages), continues=continues)
        max_tokens = body.max_completion_tokens or body.max_tokens
        max_gen_len = self._fitting(max_tokens, len(prompt), "messages", minimum=1)
        params = self._params(body, max_gen_len, logprobs=body.logprobs, echo=False)
        params = replace(params, stop_ids=self.chat_format.stop_ids(self.tokenizer))
        return Job([prompt], params, body.n, body.top_logprobs, continues)

    def _params(
        self, body: ChatBody | CompletionBody, max_gen_len: int, *, logprobs: bool, echo: bool
    ) -> inputs.SamplingParams:
        params = inputs.SamplingParams(
            body.temperature,
            body.top_p,
            max_gen_len,
            logprobs=logprobs,
            echo=echo,
            stop=[body.stop] if isinstance(body.stop, str) else body.stop,
            seed=body.seed,
            speculative=self._speculative,
            **body.model_dump(include=set(inputs.SamplingOptions.__annotations__)),
        )
        params.check_ids(self._vocab_size)
        try:
            check_form(self.tokenizer, self._vocab_size, params)
        except PromptError as error:
            field = "structured_outputs" if body.response_format is None else "response_format"
            raise PromptError(f"{field}: {error}") from error
        return params

    def _check_count(self, n_choices: int, param: str) -> None:
        if n_choices > self._max_choices:
            message = f"prompts times n must be at most {self._max_choices}, got {n_choices}; split the request"
            raise ApiError(message, param=param)

    def _prompt(self, prompt: str | list[int], name: str, suffix: str | None) -> list[int]:
        """The ids of a prompt; with a suffix, those to which Code Llama answers with the text between the two."""
        if not isinstance(prompt, str):
            return self.checked(prompt, name)
        if not suffix:
            return self.text(prompt, name)
        self._check_chars(len(prompt) + len(suffix), name)
        try:
            return inputs.encode_infilling(
                prompt, suffix, (name, "suffix"), self.tokenizer, sys.maxsize, suffix_first=False
            )
        except PromptError as error:
            raise PromptError(f"suffix: {error}") if str(error).startswith("tokenizer") else error from error

    def checked(self, ids: list[int], name: str) -> list[int]:
        """The ids, which must be in the vocabulary. `name` is their name in the error."""
        if wrong := [token for token in ids if not 0 <= token < self._vocab_size]:
            raise PromptError(f"{name} must have ids from 0 to {self._vocab_size - 1}, got {quote(wrong[0])}")
        return ids

    def text(self, text: str, name: str) -> list[int]:
        """The ids of a text with BOS in front. `name` is its name in errors."""
        self._check_chars(len(text), name)
        return inputs.encode_text(text, name, self.tokenizer, sys.maxsize)

    def dialog(self, messages: Sequence[Message], *, continues: bool = False) -> list[int]:
        """The ids of a dialog.

        Args:
            continues: whether the last message is the beginning of the assistant's answer.
        """
        for i, message in enumerate(messages):
            if self.chat_format.tag_in(message["content"]):
                tags = ", ".join(self.chat_format.tags)
                raise PromptError(
                    f"messages[{i}].content must not contain the chat template's tags ({tags}); leave them out"
                )
        self._check_chars(sum(len(message["content"]) for message in messages), "messages")
        merged, numbers = _merge(messages)
        answer = ""
        if continues:
            if merged[-1]["role"] != "assistant":
                raise PromptError(
                    f"messages[{numbers[-1]}], the last message, must have role 'assistant' with "
                    f"continue_final_message, got {merged[-1]['role']!r}"
                )
            answer = merged.pop()["content"].lstrip()
        try:
            ids = inputs.encode_dialog(merged, "messages", self.tokenizer, sys.maxsize, self.chat_format)
            assert ids is not None  # it has none of the template's tags
            return ids + (self.chat_format.encode_beginning(answer, self.tokenizer) if answer else [])
        except ValueError as error:
            raise _numbered(error, numbers) from error

    def _fitting(
        self, max_tokens: int | None, n_prompt: int, name: str, default: int = sys.maxsize, *, minimum: int = 0
    ) -> int:
        """The number of tokens to generate: `default`, or what is left of the context, if the body has none."""
        asked = minimum if max_tokens is None else max_tokens
        if n_prompt + asked > self.max_seq_len:
            raise self._too_long(name, n_prompt, asked)
        return min(default, self.max_seq_len - n_prompt) if max_tokens is None else max_tokens

    def _check_chars(self, n_chars: int, name: str) -> None:
        """Refuses a text that is too long whatever its tokens are."""
        if n_chars > self._max_chars:
            raise self._too_long(name, n_chars, of="characters")

    def _too_long(self, name: str, n_prompt: int, n_new: int = 0, *, of: str = "tokens") -> ApiError:
        """An error in OpenAI's words, by which clients know what it means."""
        got = f"your {name} has {n_prompt} {of}"
        if of == "tokens":
            asked = quote(n_prompt + n_new)
            got = f"you requested {asked} tokens ({n_prompt} in the {name}, {quote(n_new)} in the completion)"
        return ApiError(
            f"This model's maximum context length is {self.max_seq_len} tokens. However, {got}. Please reduce the "
            f"length of the {name}" + (" or the completion." if n_new else "."),
            param=name,
            code="context_length_exceeded",
        )


def as_completed(
    llama: Llama, jobs: Iterable[tuple[Key, Job]]
) -> Iterator[tuple[Key, list[Piece] | NonFiniteLogitsError]]:
    """Completes jobs, as many at a time as the KV cache has rows; yields each as it ends, with a piece per choice.

    A job whose logits are not finite is yielded with that error.

    All ranks of a model-parallel group iterate over the same jobs.

    Args:
        jobs: each with a key of the caller's; asked for the next one when a row is free.

    Raises:
        Exception: the error of a pass of the network.
    """
    engine, waiting, has_more = llama.engine, iter(jobs), True
    running: dict[Request, tuple[Key, list[Piece]]] = {}
    try:
        while has_more or running:
            while has_more and engine.n_running + engine.n_waiting < llama.model.params.max_batch_size:
                if has_more := (found := next(waiting, None)) is not None:
                    running[found[1].start(llama)] = found[0], []
            if running:
                engine.advance()
            for request, (key, pieces) in list(running.items()):
                pieces += request.new_pieces()
                if request.call.is_finished:
                    del running[request]
                    error = request.call.error
                    if error is not None and not isinstance(error, NonFiniteLogitsError):
                        raise error
                    yield key, error or join_choices(pieces)
    finally:
        for request in running:
            engine.abort(request.call)


def join_choices(pieces: Iterable[Piece]) -> list[Piece]:
    """Each choice's pieces as one."""
    of_choice: dict[int, list[Piece]] = {}
    for piece in pieces:
        of_choice.setdefault(piece.choice, []).append(piece)
    return [
        replace(
            mine[-1],
            text="".join(piece.text for piece in mine),
            tokens=tuple(token for piece in mine for token in piece.tokens),
            n_generated=sum(piece.n_generated for piece in mine),
        )
        for _, mine in sorted(of_choice.items())
    ]


def _merge(messages: Sequence[Message]) -> tuple[list[Message], list[int]]:
    """Joins neighbouring messages of one role, with a blank line between them; also returns each one's first number."""
    turns = [list(turn) for _, turn in groupby(enumerate(messages), lambda numbered: numbered[1]["role"])]
    texts = ["\n\n".join(message["content"] for _, message in turn) for turn in turns]
    merged = [Message(role=turn[0][1]["role"], content=text) for turn, text in zip(turns, texts, strict=True)]
    return merged, [turn[0][0] for turn in turns]


def _numbered(error: ValueError, numbers: Sequence[int]) -> PromptError:
    """The error of a dialog with the number that its message had before messages were joined."""
    if not str(error).startswith("messages"):  # of the beginning of an answer
        return PromptError(f"messages[{numbers[-1]}].content: {error}")
    text = re.sub(r"^messages\[(\d+)\]", lambda match: f"messages[{numbers[int(match[1])]}]", str(error))
    return PromptError(text)
