"""Byte-level BPE from a tokenizer.json, against transformers' reading of the same file."""

from __future__ import annotations

import copy
import json
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama, Tokenizer
from llama.checkpoint.reading import find_tokenizer
from llama.text.chat_format import TemplateChatFormat, read_chat_format
from llama.text.tokenizer_json import JsonTokenizer, load_tokenizer
from llama.tokenizer import StreamDecoder
from llama.tools.convert import from_hf
from tests.support.templates import CHATML, IM
from tests.support.tokenizers import TEXT
from tests.test_tokenizer import ALPHABET, TEXTS
from tests.text.test_chat_template import random_dialog

tokenizers = pytest.importorskip("tokenizers")
QUESTION: Any = [{"role": "user", "content": "The fox?"}]


def train(folder: Path, *, adds_bos: bool = False, **settings: Any) -> Path:
    """A tokenizer as SmolLM's: digits one by one, bytes as visible characters, ChatML's tokens in front."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", *IM]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    tokenizer.add_tokens(["<plain>"])
    if adds_bos:
        ids = [(IM[0], tokenizer.token_to_id(IM[0]))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{IM[0]} $A", special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": IM[0], "eos_token": IM[1], "pad_token": {"content": "<|endoftext|>"}}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML, **names, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("json"), pad_token=IM[1])


@pytest.fixture(scope="module")
def bpe(path: Path) -> JsonTokenizer:
    return JsonTokenizer(path)


def test_ids_and_texts_match_the_package(path: Path, bpe: JsonTokenizer) -> None:
    theirs, rng = tokenizers.Tokenizer.from_file(str(path)), random.Random(0)
    for text in [*TEXTS, *TEXT, *("".join(rng.choices(ALPHABET, k=rng.randint(0, 20))) for _ in range(500))]:
        ids = bpe.encode(text, bos=False, eos=False)
        assert ids == theirs.encode(text).ids
        assert bpe.decode(ids) == theirs.decode(ids) == text
        assert "".join(bpe.pieces(ids)) == bpe.decode_infilling(ids) == text
    assert bpe.n_words == theirs.get_vocab_size() and bpe.decode([]) == ""


def test_special_tokens_are_named_by_the_files_next_to_it(bpe: JsonTokenizer) -> None:
    assert (bpe.bos_id, bpe.eos_id, bpe.pad_id) == (1, 2, 2)
    names = {"<|endoftext|>": 0, IM[0]: 1, IM[1]: 2, "<plain>": bpe.n_words - 1}
    assert bpe.special_tokens == names
    a, b, plain = bpe.encode_part("a"), bpe.encode_part("b"), bpe.n_words - 1
    assert bpe.encode("a<|im_end|>b<plain>", bos=False, eos=True) == [*a, 2, *b, plain, 2]
    assert bpe.decode([1, *a, 2, plain]) == "a<plain>"
    assert not set(bpe.encode_part("a<|im_end|>b")) & {0, 1, 2}
    assert bpe.token_piece(2) == IM[1] and bpe.token_bytes(2) is None and bpe.eot_id is bpe.step_id is None


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_goes_in_front_where_the_file_says_so(tmp_path: Path, adds_bos: bool) -> None:
    """An empty text gets it all the same, as a prompt has at least one token."""
    model = JsonTokenizer(train(tmp_path, adds_bos=adds_bos))
    plain = model.encode_part("The fox")
    assert model.encode("The fox", bos=True, eos=False) == [1] * adds_bos + plain
    assert model.encode("", bos=True, eos=False) == [1] and model.pad_id == 0


def test_a_character_of_several_tokens_comes_out_once_it_is_whole(bpe: JsonTokenizer) -> None:
    decoder, text = StreamDecoder(bpe), "a🙂é\x00日"
    pieces = [decoder.push(token) for token in bpe.encode(text, bos=False, eos=False)]
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) + decoder.flush() == text
    assert bpe.decode(bpe.encode("🙂", False, False)[:2]).strip("\ufffd") == ""


def test_chats_have_the_ids_of_transformers(path: Path, bpe: JsonTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path.parent), read_chat_format(path.parent)
    assert isinstance(ours, TemplateChatFormat) and ours.stop_ids(bpe) == {2}
    rng = random.Random(1)
    for _ in range(300):
        dialog = random_dialog(rng)
        expected = theirs.apply_chat_template(dialog, add_generation_prompt=True)["input_ids"]
        assert ours.encode(dialog, bpe) == expected, dialog


def test_a_checkpoint_with_it_runs(
    path: Path,
    bpe: JsonTokenizer,
    params: dict[str, Any],
    state: dict[str, torch.Tensor],
    write_checkpoint: Callable[..., Path],
) -> None:
    sizes = params | {"vocab_size": bpe.n_words}
    cut = {name: w[: bpe.n_words] if w.size(0) == params["vocab_size"] else w for name, w in state.items()}
    folder = write_checkpoint(sizes, cut)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((path.parent / name).read_bytes())
    assert find_tokenizer(folder) == folder / "tokenizer.json"
    llama = Llama.build(folder, find_tokenizer(folder), 128, 2, device="cpu", dtype="float32")
    prompt = llama.chat_format.encode(QUESTION, llama.tokenizer)  # type: ignore[union-attr]
    (row,), _ = llama.generate([prompt], 30, temperature=0)
    text = bpe.decode(row)
    (answer,) = llama.chat_completion([QUESTION], temperature=0, max_gen_len=30, logprobs=True)
    assert answer["generation"]["content"] == "".join(answer["tokens"]) == text
    assert "".join(llama.stream_chat_completion(QUESTION, 0, max_gen_len=30)) == text
    (completed,) = llama.text_completion(["The fox"], temperature=0, max_gen_len=8, echo=True)
    assert completed["generation"].startswith("The fox")


def test_a_converted_folder_answers_as_transformers_does(path: Path, bpe: JsonTokenizer, tmp_path: Path) -> None:
    """With the template, and an end of turn that generation_config.json names alone."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=bpe.n_words, **sizes)).eval()
    with torch.no_grad():
        model.lm_head.weight *= 30
    model.save_pretrained(tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).write_bytes((path.parent / name).read_bytes())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = theirs.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    free = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)[0].tolist()
    end = free[prompt.size(1) + 9]
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    answer = free[prompt.size(1) :][: free[prompt.size(1) :].index(end)]

    from_hf(tmp_path / "hf", tmp_path / "out", quiet=True)
    llama = Llama.build(tmp_path / "out", find_tokenizer(tmp_path / "out"), 128, 1, device="cpu", dtype="float32")
    (result,) = llama.chat_completion([QUESTION], temperature=0, max_gen_len=20)
    assert result["generation"]["content"] == theirs.decode(answer, skip_special_tokens=True)
    assert result["finish_reason"] == "stop"


def test_the_file_is_told_by_its_content(path: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    assert type(load_tokenizer(path, tmp_path)) is JsonTokenizer
    assert type(load_tokenizer(tokenizer_path, tmp_path)) is Tokenizer


def test_it_is_copied_and_pickled(bpe: JsonTokenizer) -> None:
    for other in (copy.deepcopy(bpe), pickle.loads(pickle.dumps(bpe))):
        assert other.encode(TEXT[0], True, True) == bpe.encode(TEXT[0], True, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON, got an error"),
        ("[]", "must hold a JSON object, got list"),
        ('{"model": {"type": "Unigram"}}', "must be a byte-level BPE tokenizer, got 'Unigram' of another form"),
        ('{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Metaspace"}}', "got 'BPE' of another form"),
        ('{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}', "must be a tokenizer of the package tokeniz"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        JsonTokenizer(tmp_path / "tokenizer.json")
    assert str(tmp_path / "tokenizer.json") in str(refused.value)


def test_an_eos_that_no_file_names_is_asked_for(path: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="must have an EOS token that a file beside it names"):
        JsonTokenizer(tmp_path / "tokenizer.json")


def test_a_missing_package_names_the_extra(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"the extra \[chat\] must be installed"):
        JsonTokenizer(path)
