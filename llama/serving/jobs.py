"""From a checked body to the arguments of the service: ids that fit in the context, and sampling parameters."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from llama.chat import Message, built_in_format
from llama.engine.calls import Request, check_form
from llama.engine.output import Piece
from llama.errors import NonFiniteLogitsError, PromptError, quote
from llama.generation import Llama
from llama.inputs import (
    SamplingParams,
    encode_checked_dialog,
    encode_infilling,
    encode_text,
    infilling_stop_ids,
    n_usable_ids,
)
from llama.serving.errors import ApiError

if TYPE_CHECKING:
    from llama.serving.protocol import ChatBody, CompletionBody

Key = TypeVar("Key")
DEFAULT_MAX_TOKENS = 16  # of a completion; a chat's answer may fill the context


@dataclass(frozen=True)
class Job:
    """The arguments of `Service.submit`."""

    prompts: list[list[int]]
    params: SamplingParams
    n: int
    top_logprobs: int
    continues: bool

    @property
    def n_choices(self) -> int:
        return len(self.prompts) * self.n


class Planner:
    """Makes jobs for one network. Safe for use from several threads.

    Args:
        max_choices: maximum number of completions of a request, over all of its prompts.
        speculative: as in `SamplingParams`, of all jobs.
    """

    def __init__(self, llama: Llama, max_choices: int, *, speculative: str | None = None) -> None:
        self.tokenizer = llama.tokenizer
        self.chat_format = llama.chat_format or built_in_format(llama.tokenizer)
        self._speculative = speculative
        self._vocab_size = n_usable_ids(llama.model.params.vocab_size, llama.tokenizer)
        self.max_seq_len: int = llama.model.params.max_seq_len
        self._max_choices = max_choices
        longest_piece = getattr(llama.tokenizer, "longest_piece", sys.maxsize)  # a tokenizer of another class
        self._max_chars = self.max_seq_len * longest_piece

    def check_size(self, values: Any) -> None:
        """Raises ApiError for a body with too many prompts, ids or messages, by their number alone.

        A check of each one would take seconds in which other requests stand still.
        """
        if not isinstance(values, dict):
            return
        for name in ("prompt", "messages", "tokens"):
            items = values.get(name)
            if not isinstance(items, list) or not items:
                continue
            if name == "prompt" and not isinstance(items[0], int):
                self._check_count(len(items), name)
            elif len(items) > self.max_seq_len:
                raise self._too_long(name, len(items))

    def completion(self, body: CompletionBody) -> Job:
        """The job of a completion; raises ApiError if a prompt is wrong or too long."""
        self._check_count(len(body.prompt) * body.n, "prompt" if len(body.prompt) > 1 else "n")
        one = len(body.prompt) == 1
        names = ["prompt" if one else f"prompt[{i}]" for i in range(len(body.prompt))]
        if body.suffix:
            return self._infilling(body, names)
        prompts = [self._prompt(prompt, name) for prompt, name in zip(body.prompt, names, strict=True)]
        max_gen_len = self._fitting(body.max_tokens, max(map(len, prompts)), "prompt", DEFAULT_MAX_TOKENS)
        scores_prompt = body.prompt_logprobs is not None
        params = self._params(
            body,
            max_gen_len,
            logprobs=body.logprobs is not None or scores_prompt,
            echo=body.echo or scores_prompt,
        )
        return Job(prompts, params, body.n, max(body.logprobs or 0, body.prompt_logprobs or 0), continues=True)

    def _infilling(self, body: CompletionBody, names: Sequence[str]) -> Job:
        """The job of a completion with a suffix: the text between each prompt and it, as Code Llama infills."""
        suffix, prompts = body.suffix or "", []
        for prompt, name in zip(body.prompt, names, strict=True):
            assert isinstance(prompt, str)  # the protocol's part
            self._check_chars(len(prompt) + len(suffix), name)
            pair = (name, "suffix")
            try:
                ids = encode_infilling(prompt, suffix, pair, self.tokenizer, sys.maxsize, suffix_first=False)
            except PromptError as error:
                text = str(error)
                raise ApiError.of(PromptError(f"suffix: {text}") if text.startswith("tokenizer") else error) from error
            prompts.append(ids)
        max_gen_len = self._fitting(body.max_tokens, max(map(len, prompts)), "prompt", DEFAULT_MAX_TOKENS)
        params = self._params(body, max_gen_len, logprobs=body.logprobs is not None, echo=False)
        params = replace(params, stop_ids=infilling_stop_ids(self.tokenizer), keep_space=True)
        return Job(prompts, params, body.n, body.logprobs or 0, continues=False)

    def chat(self, body: ChatBody) -> Job:
        """The job of a chat; raises ApiError if the messages are not a dialog of the template's, or too long."""
        self._check_count(body.n, "n")
        continues = body.continue_final_message
        prompt = self.dialog(cast(list[Message], body.messages), continues=continues)
        max_tokens = body.max_completion_tokens or body.max_tokens
        max_gen_len = self._fitting(max_tokens, len(prompt), "messages", minimum=1)
        params = self._params(body, max_gen_len, logprobs=body.logprobs, echo=False)
        params = replace(params, stop_ids=self.chat_format.stop_ids(self.tokenizer))
        return Job([prompt], params, body.n, body.top_logprobs, continues=continues)

    def _params(
        self, body: ChatBody | CompletionBody, max_gen_len: int, *, logprobs: bool, echo: bool
    ) -> SamplingParams:
        try:
            params = SamplingParams(
                body.temperature,
                body.top_p,
                max_gen_len,
                logprobs=logprobs,
                echo=echo,
                stop=body.stop,
                seed=body.seed,
                speculative=self._speculative,
                **body.options(),
            )
            params.check_ids(self._vocab_size)
        except PromptError as error:
            raise ApiError.of(error) from error
        try:
            check_form(self.tokenizer, self._vocab_size, params)
        except PromptError as error:
            param = "structured_outputs" if body.response_format is None else "response_format"
            raise ApiError(f"{param}: {error}", param=param) from error
        except ImportError as error:
            raise ApiError(str(error), status=501, code="unsupported_parameter") from error
        return params

    def _check_count(self, n_choices: int, param: str) -> None:
        if n_choices > self._max_choices:
            raise ApiError(
                f"prompts times n must be at most {self._max_choices}, got {n_choices}; split the request",
                param=param,
            )

    def _prompt(self, prompt: str | Sequence[int], name: str) -> list[int]:
        if isinstance(prompt, str):
            return self.text(prompt, name)
        if len(prompt) > self.max_seq_len:
            raise self._too_long(name, len(prompt))
        self.check_ids(prompt, name)
        return list(prompt)

    def check_ids(self, ids: Sequence[int], name: str) -> None:
        """Raises ApiError for ids outside the vocabulary. `name` is their name in the error."""
        if wrong := [token for token in ids if not 0 <= token < self._vocab_size]:
            raise ApiError(f"{name} must have ids from 0 to {self._vocab_size - 1}, got {quote(wrong[0])}", param=name)

    def text(self, text: str, name: str) -> list[int]:
        """The ids of a text with BOS in front; raises ApiError if it is too long. `name` is its name in errors."""
        self._check_chars(len(text), name)
        try:
            ids = encode_text(text, name, self.tokenizer, sys.maxsize)
        except PromptError as error:
            raise ApiError.of(error) from error
        if len(ids) > self.max_seq_len:
            raise self._too_long(name, len(ids))
        return ids

    def dialog(self, messages: Sequence[Message], *, continues: bool = False) -> list[int]:
        """The ids of a dialog.

        Args:
            continues: whether the last message is the beginning of the assistant's answer.

        Raises:
            ApiError: the messages are not a dialog of the template's.
        """
        for i, message in enumerate(messages):
            if self.chat_format.tag_in(message["content"]):
                name = f"messages[{i}].content"
                tags = ", ".join(self.chat_format.tags)
                raise ApiError(f"{name} must not contain the chat template's tags ({tags}); leave them out", param=name)
        self._check_chars(sum(len(message["content"]) for message in messages), "messages")
        merged, numbers = _merge(messages)
        answer = ""
        if continues:
            if merged[-1]["role"] != "assistant":
                raise ApiError(
                    f"messages[{numbers[-1]}], the last message, must have role 'assistant' with "
                    f"continue_final_message, got {merged[-1]['role']!r}",
                    param=f"messages[{numbers[-1]}]",
                )
            answer = merged.pop()["content"].lstrip()
        try:
            ids = encode_checked_dialog(merged, "messages", self.tokenizer, sys.maxsize, self.chat_format)
            assert ids is not None  # it has none of the template's tags
            return ids + (self.chat_format.encode_beginning(answer, self.tokenizer) if answer else [])
        except ImportError as error:  # jinja2, for a template of the checkpoint's own
            raise ApiError(str(error), status=501, param="messages") from error
        except ValueError as error:
            raise ApiError.of(_numbered(error, numbers)) from error

    def _fitting(
        self, max_tokens: int | None, n_prompt: int, name: str, default: int = sys.maxsize, *, minimum: int = 0
    ) -> int:
        """The number of tokens to generate: `default`, or what is left of the context, if the body has none."""
        asked = minimum if max_tokens is None else max_tokens
        if n_prompt + asked > self.max_seq_len:
            raise self._too_long(name, n_prompt, asked)
        return min(default, self.max_seq_len - n_prompt) if max_tokens is None else max_tokens

    def _check_chars(self, n_chars: int, name: str) -> None:
        """Raises ApiError for a text that is too long whatever its tokens are."""
        if n_chars > self._max_chars:
            raise self._too_long(name, n_chars, of="characters")

    def _too_long(self, name: str, n_prompt: int, n_new: int = 0, *, of: str = "tokens") -> ApiError:
        """An error in OpenAI's words, by which clients know what it means."""
        got = (
            f"you requested {quote(n_prompt + n_new)} {of} ({n_prompt} in the {name}, {quote(n_new)} in the completion)"
        )
        if of != "tokens":
            got = f"your {name} has {n_prompt} {of}"
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
    engine, rest = llama.engine, iter(jobs)
    running: list[tuple[Key, Request, list[list[Piece]]]] = []
    may_come = True
    try:
        while may_come or running:
            while may_come and engine.n_running + engine.n_waiting < llama.model.params.max_batch_size:
                if (found := next(rest, None)) is None:
                    may_come = False
                    break
                key, job = found
                request = Request(
                    engine,
                    llama.tokenizer,
                    job.prompts,
                    job.params,
                    n=job.n,
                    top_logprobs=job.top_logprobs,
                    continues=job.continues,
                )
                running.append((key, request, [[] for _ in range(job.n_choices)]))
                for piece in request.first_pieces:
                    running[-1][2][piece.choice].append(piece)
            if running:
                engine.advance()
            for key, request, pieces in running:
                for piece in request.new_pieces():
                    pieces[piece.choice].append(piece)
                error = request.call.error
                if isinstance(error, NonFiniteLogitsError):
                    yield key, error
                elif error is not None:
                    raise error
                elif request.call.is_finished:
                    yield key, [_joined(mine) for mine in pieces]
            running = [entry for entry in running if not entry[1].call.is_finished]
    finally:
        for _, request, _ in running:
            engine.abort(request.call)


def _joined(pieces: list[Piece]) -> Piece:
    """All that a choice got, as one piece."""
    return Piece(
        pieces[0].choice,
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        sum(piece.n_generated for piece in pieces),
        pieces[-1].finish_reason,
        pieces[-1].n_reused,
    )


def _merge(messages: Sequence[Message]) -> tuple[list[Message], list[int]]:
    """Joins neighbouring messages of one role, with a blank line between them; also returns each one's first number."""
    merged: list[Message] = []
    numbers: list[int] = []
    for i, message in enumerate(messages):
        if merged and merged[-1]["role"] == message["role"]:
            text = f"{merged[-1]['content']}\n\n{message['content']}"
            merged[-1] = Message(role=message["role"], content=text)
        else:
            merged.append(message)
            numbers.append(i)
    return merged, numbers


def _numbered(error: ValueError, numbers: Sequence[int]) -> PromptError:
    """The error of a dialog with the number that its message had before messages were joined."""
    if not str(error).startswith("messages"):  # of the beginning of an answer
        return PromptError(f"messages[{numbers[-1]}].content: {error}")
    text = re.sub(r"^messages\[(\d+)\]", lambda match: f"messages[{numbers[int(match[1])]}]", str(error))
    return PromptError(text)
