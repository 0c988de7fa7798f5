"""The tokenizers of encoders in GGUF files, WordPiece and Unigram: against transformers on the same vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from encoder_gguf import vocabulary
from pooled_models import minilm_folder
from text_models import CORPUS, TEXTS
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, trainers

from pagoda.errors import ModelError
from pagoda.text.tokenizer import Tokenizer, load_tokenizer

LANGUAGES = (
    "Привет, мир! Как дела сегодня?",
    "こんにちは世界、東京タワーは高い。",
    "مرحبا بالعالم، كيف حالك؟",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "สวัสดีชาวโลก",
    "안녕하세요 세계, 오늘은 어때요?",
    "İstanbul'da ĞÜŞ ve ılık çay",
    "Tiếng Việt có dấu",
    "ΑΒΓ ς σ Ελληνικά",
    "שלום עולם",
    "ﬁne ｆｕｌｌ　ｗｉｄｔｈ ① ㌔",
    "1,234.56€ №5 don't-stop_it's e.g. a/b\\c",
    "a" * 150 + " b",
    "zero\u200bwidth\u200djoined\u00adsoft",
    "[unused5] ##ing ▁mark",
)


def same(mine: Tokenizer, theirs: Any) -> None:
    for text in (*TEXTS, *LANGUAGES, f"{theirs.cls_token} literal {theirs.sep_token}"):
        assert mine.encode(text) == theirs(text)["input_ids"], text
    pair = theirs("what is a pagoda", LANGUAGES[0])
    types = pair.get("token_type_ids", [0])
    ids, second = mine.encode_pair("what is a pagoda", LANGUAGES[0])
    assert ids == pair["input_ids"]
    assert second == (types.index(1) if 1 in types else None)


def test_word_pieces_of_minilm() -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    mine = load_tokenizer("m.gguf", vocabulary(minilm_folder()))
    same(mine, theirs)
    ids = mine.encode("A pagoda is a tower, not a tree.")
    assert mine.decode(ids) == "a pagoda is a tower , not a tree ."
    assert mine.vocab_size == 30522


def test_word_pieces_that_keep_capitals(tmp_path: Path) -> None:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(CORPUS * 3, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
    theirs = transformers.BertTokenizer(vocab=backend.get_vocab(), do_lower_case=False)
    theirs.save_pretrained(tmp_path)
    table = vocabulary(tmp_path)
    same(load_tokenizer("m.gguf", table), theirs)
    lowered = load_tokenizer("m.gguf", {**table, "tokenizer.ggml.normalizer.lowercase": True})
    assert lowered.encode("The Quick") == lowered.encode("the quick") == theirs("the quick")["input_ids"]


def test_unigram_of_xlm_roberta(tmp_path: Path) -> None:
    """With a table of replacements as SentencePiece makes them, but of few rules."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator([*CORPUS * 3, *LANGUAGES * 3], trainers.UnigramTrainer(vocab_size=600))
    trained = [(token, score) for token, score in json.loads(backend.to_str())["model"]["vocab"] if score]
    vocab = [*((token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")), *trained, ("<mask>", 0.0)]
    rules = (Path(__file__).parent / "data" / "tiny_charsmap.bin").read_bytes()
    theirs = transformers.XLMRobertaTokenizer(vocab=vocab, _spm_precompiled_charsmap=rules)
    theirs.save_pretrained(tmp_path)
    table = vocabulary(tmp_path)
    mine = load_tokenizer("m.gguf", {**table, "tokenizer.ggml.precompiled_charsmap": np.frombuffer(rules, np.int8)})
    same(mine, theirs)
    text = "The quick brown ﬁne"
    assert mine.decode(mine.encode(text)) == "The quick brown fine"
    assert load_tokenizer("m.gguf", table).encode(text) != mine.encode(text)
    with pytest.raises(ModelError, match=r"lacks tokenizer\.ggml\.scores"):
        load_tokenizer("m.gguf", {k: v for k, v in table.items() if not k.endswith("scores")})
    with pytest.raises(ModelError, match="vocabulary is broken"):
        load_tokenizer("m.gguf", {**table, "tokenizer.ggml.precompiled_charsmap": [1, 2, 3]})


def test_a_table_that_says_little_has_the_usual_special_tokens() -> None:
    table = {k: v for k, v in vocabulary(minilm_folder()).items() if not k.endswith("_token_id")}
    assert load_tokenizer("m.gguf", table).encode("a tower") == [101, 1037, 3578, 102]
    table["tokenizer.ggml.tokens"] = [t for t in table["tokenizer.ggml.tokens"] if t != "[SEP]"]
    table["tokenizer.ggml.token_type"] = table["tokenizer.ggml.token_type"][1:]
    with pytest.raises(ModelError, match=r"lacks tokenizer.ggml.eos_token_id"):
        load_tokenizer("m.gguf", table)
