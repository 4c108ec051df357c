"""Tokenizer and StreamDecoder, against SentencePiece's own decoding of the whole."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceTrainer

from llama import Tokenizer
from llama.errors import PromptError
from llama.tokenizer import StreamDecoder, pieces
from tests.support.tokenizers import INFILLING_PIECES, Foreign

TEXTS = [
    "",
    " ",
    "   ",
    "The quick brown fox",
    "  two spaces in front",
    "trailing spaces   ",
    "in   the      middle",
    "\n",
    "\n\n line\r\n\ttab \n",
    "naïve café 12345 ½",
    "日本語の文章。中文",
    "🙂 👩‍👩‍👧 🇫🇷 👍🏽",
    "e\u0301 \u200b \ufeff \u00a0 \ufffd",
    "\0 \x01 \x7f \x1b[0m",
    "\U0010ffff\ue000\ud7ff",
    "<s></s><unk><0x0A>",
    "[INST] <<SYS>>\n",
]
ALPHABET = "abc The  \n\t\0éß€ ▂日本🙂👍🏽\u0301\ufffd\U0010ffff0123[]<>"


@pytest.fixture(scope="module", params=["small", "released"])
def model(request: pytest.FixtureRequest) -> Tokenizer:
    """The tests' own tokenizer, and Llama 2's where there is one."""
    if request.param == "small":
        return request.getfixturevalue("tokenizer")
    path = os.environ.get("LLAMA2_TOKENIZER")
    if not path:
        pytest.skip("set LLAMA2_TOKENIZER to the path of the released tokenizer.model to run this on it too")
    return Tokenizer(path)


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """The byte pieces of `data`, one a byte."""
    return [tokenizer.sp_model.piece_to_id(f"<0x{byte:02X}>") for byte in data]


def random_ids(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Up to a dozen ids: pieces, spaces, control and unknown ones, bytes of whole, cut and impossible characters."""
    ids: list[int] = []
    for _ in range(rng.randint(0, 8)):
        kind = rng.randrange(6)
        if kind == 0:
            ids += byte_ids(tokenizer, bytes([rng.randrange(256)]))
        elif kind == 1:
            code = rng.choice([rng.randint(0x80, 0x7FF), rng.randint(0x800, 0xD7FF), rng.randint(0x10000, 0x10FFFF)])
            ids += byte_ids(tokenizer, chr(code).encode()[: rng.randint(1, 4)])
        elif kind == 2:
            ids.append(rng.choice([0, tokenizer.bos_id, tokenizer.eos_id]))
        elif kind == 3:
            ids += tokenizer.encode(rng.choice([" ", "  ", "a", " b", "é"]), bos=False, eos=False)
        else:
            ids.append(rng.randrange(tokenizer.n_words))
    return ids


def settled_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """What every continuation of `ids` agrees on: the longest text that all their decodings begin with."""
    ends = (b"", b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xbf", b"\xbf\xbf", b"\xbf\xbf\xbf")
    texts = [tokenizer.decode([*ids, *byte_ids(tokenizer, end)]) for end in ends]
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    return "".join(column[0] for column in columns)


def test_special_ids_match_llama_2(model: Tokenizer) -> None:
    assert (model.sp_model.unk_id(), model.bos_id, model.eos_id, model.pad_id) == (0, 1, 2, -1)
    assert model.n_words == model.sp_model.get_piece_size()
    if model.n_words > 1000:
        assert model.n_words == 32000
        assert model.encode("Hello world", bos=True, eos=True) == [1, 15043, 3186, 2]


def test_text_comes_back(model: Tokenizer) -> None:
    rng = random.Random(0)
    for text in [*TEXTS, *("".join(rng.choices(ALPHABET, k=rng.randint(0, 20))) for _ in range(1000))]:
        bos, eos = rng.random() < 0.5, rng.random() < 0.5
        ids = model.encode(text, bos=bos, eos=eos)
        plain = ids[bos : len(ids) - eos]
        assert ids == [1] * bos + plain + [2] * eos and not {0, 1, 2} & set(plain)
        assert model.decode(ids) == model.decode(plain) == "".join(model.pieces(ids)) == text


@pytest.mark.parametrize("text", [b"bytes", None, 5, ["a"]], ids=repr)
def test_what_is_no_text_is_refused(tokenizer: Tokenizer, text: object) -> None:
    with pytest.raises(PromptError, match=f"^text must be a str, got {type(text).__name__}$"):
        tokenizer.encode(text, bos=True, eos=False)  # type: ignore[arg-type]


def test_half_of_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    """Such text comes of files read with `errors="surrogateescape"` and of JSON."""
    with pytest.raises(PromptError, match=r"unpaired surrogates, got '\\ud83d' at position 2$"):
        tokenizer.encode("a \ud83d", bos=True, eos=False)


def test_decode_takes_any_sequence_one_id_and_several_sequences(tokenizer: Tokenizer) -> None:
    """As SentencePiece does, and tensors and arrays too."""
    ids = tokenizer.encode("a fox", bos=False, eos=False)
    for form in (tuple(ids), torch.tensor(ids), np.array(ids)):
        assert tokenizer.decode(form) == "a fox"
    for token in (ids[-1], np.int64(ids[-1]), torch.tensor(ids[-1])):
        assert tokenizer.decode(token) == tokenizer.decode(ids[-1:]) != ""
    assert tokenizer.decode([ids, ids[:1]]) == tokenizer.decode([ids, ids[:1]]) == ["a fox", "a"]
    assert tokenizer.decode(torch.tensor([ids, ids])) == ["a fox", "a fox"]
    assert tokenizer.decode([1, 2]) == tokenizer.decode([]) == ""


def test_pieces_joined_are_the_decoded_text(model: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(4000):
        ids = random_ids(model, rng)
        pieces = model.pieces(ids)
        assert "".join(pieces) == model.decode(ids), ids
        assert len(pieces) == len(ids)


def test_bytes_at_the_edges_of_utf8_decode_as_sentencepiece_does(model: Tokenizer) -> None:
    edges = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xED, 0xEF, 0xF0]
    edges += [0xF4, 0xF5, 0xFF]
    sequences = [bytes([a, b, c]) for a in edges for b in edges for c in (0x41, 0x80, 0xBF, 0xE2)]
    sequences += [bytes([a, b, 0x80, c]) for a in (0xF0, 0xF1, 0xF4, 0xF5) for b in edges for c in (0x41, 0x80, 0xBF)]
    for data in sequences:
        ids = byte_ids(model, data)
        assert "".join(model.pieces(ids)) == model.decode(ids), data


def test_streamed_text_is_all_that_is_settled_and_no_more(model: Tokenizer) -> None:
    """After each id, what came out is what all continuations have in common: no half character, and none held back."""
    rng = random.Random(2)
    for _ in range(600):
        ids = random_ids(model, rng)
        decoder = StreamDecoder(model)
        text = ""
        for n, token in enumerate(ids, start=1):
            text += decoder.push(token)
            assert text == settled_text(model, ids[:n]), ids[:n]
        assert text + decoder.flush() == model.decode(ids)


def test_decoders_do_not_share_state(tokenizer: Tokenizer) -> None:
    first, second = StreamDecoder(tokenizer), StreamDecoder(tokenizer)
    (a,) = byte_ids(tokenizer, b"\xe2")
    assert first.push(a) == ""
    assert second.flush() == ""
    assert first.flush() == "\ufffd"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "tokenizer.model", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"got {path}, which is not a file") as error:
            Tokenizer(path)
        assert isinstance(error.value, AssertionError)  # which Meta's package raises


def test_a_damaged_file_is_named(tmp_path: Path, tokenizer_path: Path) -> None:
    whole = tokenizer_path.read_bytes()
    path = tmp_path / "tokenizer.model"
    for data in (b"", b"<html>not found</html>", whole[:10], whole[: len(whole) // 2], whole[:-3]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"^{path} must be a SentencePiece model, got "):
            Tokenizer(path)


def test_a_damaged_file_is_named_or_reads_as_a_whole_tokenizer(tmp_path: Path, tokenizer_path: Path) -> None:
    """Whichever bits are flipped, those inside of a piece's text included: nothing fails later."""
    whole, path, rng = tokenizer_path.read_bytes(), tmp_path / "tokenizer.model", random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            tokenizer = Tokenizer(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} must be") and type(error) is ValueError  # noqa: PT017
            refused += 1
        else:
            ids = range(tokenizer.n_words)
            assert "".join(tokenizer.pieces(ids)) == tokenizer.decode(list(ids))
    assert 30 < refused < 270


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="needs /proc/self/mem, a file that nobody can read")
def test_an_unreadable_file_is_an_error_of_the_system() -> None:
    with pytest.raises(OSError, match="Input/output error"):
        Tokenizer("/proc/self/mem")


def test_a_checkpoint_in_place_of_a_tokenizer_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "consolidated.00.pth"
    with path.open("wb") as file:
        file.truncate(2**40)  # without a block on the disk
    with pytest.raises(ValueError, match=f"^{path} must be a SentencePiece model, got a file of {2**40} bytes"):
        Tokenizer(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match=r"must be a tokenizer\.model file"):
        Tokenizer(tmp_path / "pipe")


@pytest.mark.parametrize("lacking", ["bos_id", "eos_id"])
def test_a_tokenizer_without_bos_or_eos_is_refused(tmp_path: Path, lacking: str) -> None:
    options: dict[str, int] = {"bos_id": 1, "eos_id": 2, "vocab_size": 30} | {lacking: -1}
    if lacking == "bos_id":
        options["eos_id"] = 1
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"] * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    with pytest.raises(ValueError, match=f"must have a BOS and an EOS piece, .*{lacking}=-1"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_added_tokens_encode_as_one_token_and_decode_as_their_text(tokenizer_path: Path, tokenizer: Tokenizer) -> None:
    n = tokenizer.n_words
    model = Tokenizer(tokenizer_path, added_tokens={"<|im_end|>": n + 1, "<|im_start|>": n, "<s>": 1, "[PAD]": n + 3})
    assert model.n_words == n + 4  # row n + 2 has no token
    fox, quick = tokenizer.encode("fox", bos=False, eos=False), tokenizer.encode_infilling("quick")
    text = "<|im_start|>quick<|im_end|><s>"
    ids = [n, *quick, n + 1, *tokenizer.encode_infilling("<s>")]
    assert model.encode("fox" + text, bos=True, eos=True) == [1, *fox, *ids, 2]
    assert model.decode([1, *fox, *ids, 2]) == "fox" + text
    assert model.decode([[*fox], [n]]) == ["fox", "<|im_start|>"] and model.decode(n) == "<|im_start|>"
    assert model.pieces([n, *quick])[0] == model.token_piece(n) == "<|im_start|>"
    assert model.encode_part("<|im_start|>") == tokenizer.encode_infilling("<|im_start|>")
    names = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": n, "<|im_end|>": n + 1, "[PAD]": n + 3}
    assert model.special_tokens == names and model.encode("a b", True, True) == tokenizer.encode("a b", True, True)


def test_code_llama_s_ids_match_its_pieces(code_tokenizer: Tokenizer, tokenizer: Tokenizer) -> None:
    names = ["prefix_id", "middle_id", "suffix_id", "eot_id", "step_id"]
    pieces = [code_tokenizer.token_piece(getattr(code_tokenizer, name)) for name in names]
    assert pieces == [*INFILLING_PIECES, "<step>"]
    assert [getattr(tokenizer, name) for name in names] == [None] * 5


def test_infilling_text_has_no_added_leading_space(code_tokenizer: Tokenizer) -> None:
    """Encoded behind a piece that is dropped again, as Meta's package does, and the same in the other direction."""
    sp, rng = code_tokenizer.sp_model, random.Random(5)
    (smile,) = (i for i in range(code_tokenizer.n_words) if sp.id_to_piece(i) == "\u263a")
    for text in [*TEXTS, *("".join(rng.choices(ALPHABET, k=rng.randint(0, 20))) for _ in range(300))]:
        ids = code_tokenizer.encode_infilling(text)
        assert ids == sp.encode("\u263a" + text)[2:]
        assert code_tokenizer.decode_infilling(ids) == sp.decode([smile, *ids])[1:] == text
    assert code_tokenizer.decode_infilling(code_tokenizer.encode("fox", bos=False, eos=False)) == " fox"


def test_infilling_text_needs_no_piece_of_the_tokenizers(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.decode_infilling(tokenizer.encode_infilling(text)) == text


def test_a_tokenizer_of_another_class_has_its_text_split(tokenizer: Tokenizer) -> None:
    rng = random.Random(6)
    for _ in range(100):
        ids = random_ids(tokenizer, rng)
        texts = pieces(Foreign(tokenizer), ids)
        assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)
    assert pieces(Foreign(tokenizer), byte_ids(tokenizer, "a€".encode())) == ["a", "", "", "€"]


N_PIECES = 512
SPECIAL = {"content": "<|im_end|>", "special": True}


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": {"<|im_start|>": N_PIECES, "<|im_end|>": N_PIECES + 1, "<s>": 1}},
        {
            "tokenizer_config.json": {
                "added_tokens_decoder": {
                    "2": {"content": "</s>"},
                    str(N_PIECES + 1): SPECIAL,
                    str(N_PIECES): {"content": "<|im_start|>"},
                },
                "eos_token": SPECIAL,
            }
        },
        {"special_tokens_map.json": {"bos_token": "<s>", "additional_special_tokens": ["<|im_start|>", SPECIAL]}},
        {
            "added_tokens.json": {"<|im_start|>": N_PIECES},
            "tokenizer_config.json": {"pad_token": None, "add_bos_token": True},
            "special_tokens_map.json": {"eos_token": "<|im_end|>"},
        },
    ],
)
def test_files_next_to_the_model_name_added_tokens(
    tokenizer_path: Path, tokenizer: Tokenizer, tmp_path: Path, files: dict[str, Any]
) -> None:
    shutil.copyfile(tokenizer_path, tmp_path / "tokenizer.model")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    added = Tokenizer(tmp_path / "tokenizer.model")
    assert added.added_tokens == {"<|im_start|>": N_PIECES, "<|im_end|>": N_PIECES + 1}
    assert added.n_words == N_PIECES + 2
    first, *rest = added.encode("<|im_start|>the fox<|im_end|>", bos=False, eos=False)
    assert (first, rest[-1]) == (N_PIECES, N_PIECES + 1)
    assert rest[:-1] == tokenizer.encode_part("the fox")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"<pad>": N_PIECES + 1}, f"must have the ids .* from {N_PIECES} on, each once, got .{N_PIECES + 1}"),
        ({"<a>": N_PIECES, "<b>": N_PIECES}, "each once"),
        ({"<pad>": "7"}, "must have a name and an id, got '<pad>'"),
        ({"": N_PIECES}, "must have a name and an id, got ''"),
        ([], "must hold a JSON object"),
    ],
)
def test_added_tokens_that_do_not_follow_the_pieces_are_refused(
    tokenizer_path: Path, tmp_path: Path, content: Any, message: str
) -> None:
    shutil.copyfile(tokenizer_path, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Tokenizer(tmp_path / "tokenizer.model")
