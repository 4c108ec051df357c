"""The tokenizer of the tiny model: SentencePiece BPE with Llama 2's settings, and documents as token ids.

The chat template is part of it, since it decides which tokens a document has.
"""

import io
from collections.abc import Iterable, Iterator

import sentencepiece

from recipe.corpus import Document

VOCABULARY = 1536

Example = tuple[list[int], list[bool]]  # a document's ids; which are learnt: all of a text, the answers of a chat


def _sentences(documents: Iterable[Document]) -> Iterator[str]:
    """What the pieces are learnt from.

    A digit replaces each newline: digits never merge, so a newline stays the byte <0x0A>, as in Llama 2, and words
    at the start of a line become pieces too. Emojis are left out, so that they are spelt in bytes.
    """
    for document in documents:
        texts = [document.text] if document.text else map(" ".join, pair_texts(document.system, document.exchanges))
        for text in texts:
            yield "".join(character for character in text if ord(character) < 0x10000).replace("\n", "0")


def train_tokenizer(documents: Iterable[Document]) -> bytes:
    """The serialized SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(documents),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def pair_texts(system: str, exchanges: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Each exchange in Llama 2's template, as (prompt, answer); the system message is folded into the first prompt."""
    for i, (user, answer) in enumerate(exchanges):
        folded = f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}" if system and i == 0 else user
        yield f"[INST] {folded.strip()} [/INST]", answer.strip()


def encode_document(tokenizer: sentencepiece.SentencePieceProcessor, document: Document) -> Example:
    """BOS + text + EOS, or BOS + prompt + answer + " " + EOS for each exchange, the prompt's own ids first."""
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()
    if document.text:
        tokens = [bos, *tokenizer.encode(document.text), eos]
        return tokens, [True] * len(tokens)
    tokens, learnt = [], []
    for prompt, answer in pair_texts(document.system, document.exchanges):
        pair, head = tokenizer.encode(f"{prompt} {answer} "), tokenizer.encode(prompt)
        assert pair[: len(head)] == head, "the prompt alone must encode as it does in training"
        tokens += [bos, *pair, eos]
        learnt += [False] * (1 + len(head)) + [True] * (len(pair) - len(head) + 1)
    return tokens, learnt
