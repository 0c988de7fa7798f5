"""LLM.embed, score, classify and encode against sentence-transformers and transformers, from text to numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engine_tiny
import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from pooled_models import minilm_folder, write_model, write_sentence_files
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from pagoda import LLM, PoolingParams
from pagoda.errors import BadRequest, ContextLengthExceeded
from pagoda.integrations.langchain import PagodaEmbeddings

ENGLISH = Path(__file__).parent / "data" / "english.txt"
TEXTS = ["A pagoda is a tower.", "Ünïcödé, 数字 and 🙂", "so long " * 20, "What is it for?"]
QUERY = "What is a pagoda?"


def train(trainer: Any, model: Any, pre: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([*ENGLISH.read_text().splitlines(), *["yes", "no"] * 500], trainer)
    return tokenizer


def xlm_roberta_tokenizer(path: Path) -> int:
    """As bge-m3's: pieces with their probabilities, two ends between the texts of a pair. Returns its size."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>")
    tokenizer = train(trainer, models.Unigram(), pre_tokenizers.Metaspace(), normalizers.NFKC())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    write_config(path, pad_token="<pad>", bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>")
    return tokenizer.get_vocab_size()


def qwen_tokenizer(path: Path) -> int:
    """As Qwen3-Embedding's: bytes, and an end behind each text, which is the one that the vector is taken from."""
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer = train(trainer, models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    write_config(path, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="left")
    return tokenizer.get_vocab_size()


def write_config(path: Path, **tokens: str) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256, **tokens}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def with_tokenizer(path: Path, kind: str, write: Any, auto: Any = transformers.AutoModel, **changes: Any) -> Any:
    """A random model, and a tokenizer of its family in the place of the tiny one."""
    size = write(path)
    model = write_model(path, kind, auto, vocab_size=size, **changes)
    write(path)
    return model


def cosines(found: list[Any], expected: Any) -> Any:
    got = np.array([each.outputs.embedding for each in found])
    return (got * expected).sum(axis=1)


def test_minilm_equals_sentence_transformers() -> None:
    path = minilm_folder()
    expected = sentence_transformers.SentenceTransformer(str(path), device="cpu").encode(TEXTS)
    with LLM(str(path)) as llm:
        found = llm.embed(TEXTS)
        assert cosines(found, expected).min() > 0.99999 and found[0].outputs.hidden_size == 384
        ids = llm.get_tokenizer().encode(TEXTS[0])
        given: list[Any] = [{"prompt": TEXTS[0]}, ids, {"prompt_token_ids": ids}]
        assert all(each.outputs.embedding == found[0].outputs.embedding for each in llm.embed(given))
        assert found[0].prompt_token_ids == ids and found[0].finished
        (arrays,) = llm.encode(TEXTS[0], PoolingParams(use_activation=False))
        assert np.linalg.norm(arrays.outputs.data) > 1.5
        scores = [each.outputs.score for each in llm.score(TEXTS[0], TEXTS)]
        np.testing.assert_allclose(scores, expected @ expected[0], atol=1e-4)
        with pytest.raises(ContextLengthExceeded, match="502 tokens, this model takes 256"):
            llm.embed("word " * 500)
        cut = llm.embed("word " * 500, pooling_params=PoolingParams(truncate_prompt_tokens=-1))
        assert len(cut[0].prompt_token_ids) == 256
        with pytest.raises(BadRequest, match="not trained for vectors of other lengths"):
            llm.embed("a", pooling_params=PoolingParams(dimensions=16))
        for call in (llm.generate, llm.classify):
            with pytest.raises(BadRequest):
                call("a")


@pytest.mark.parametrize("pooling", ["cls_token", "mean_tokens"])
def test_an_embedder_like_bge_m3(pooling: str, tmp_path: Path) -> None:
    with_tokenizer(tmp_path, "xlm-roberta", xlm_roberta_tokenizer)
    write_sentence_files(tmp_path, pooling)
    expected = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    with LLM(str(tmp_path)) as llm:
        assert cosines(llm.embed(TEXTS), expected).min() > 0.9999


def test_a_reranker_like_bge_reranker(tmp_path: Path) -> None:
    """Positions begin behind the padding's, the two texts of a pair have two ends between them and no types."""
    kind = transformers.AutoModelForSequenceClassification
    with_tokenizer(tmp_path, "xlm-roberta", xlm_roberta_tokenizer, kind, num_labels=1)
    encoder = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu", max_length=256)
    expected = encoder.predict([(QUERY, text) for text in TEXTS], activation_fn=torch.nn.Sigmoid())
    with LLM(str(tmp_path)) as llm:
        found = [each.outputs.score for each in llm.score(QUERY, TEXTS)]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        again = [each.outputs.score for each in llm.score([QUERY] * len(TEXTS), TEXTS)]
        assert again == found
        with pytest.raises(BadRequest, match="2 and 3 texts"):
            llm.score(["a", "b"], ["a", "b", "c"])
        with pytest.raises(BadRequest, match=r"embed\(\) is not for this model: it gives scores"):
            llm.embed("a")


def test_an_embedder_like_qwen3_embedding(tmp_path: Path) -> None:
    with_tokenizer(tmp_path, "qwen3", qwen_tokenizer)
    write_sentence_files(tmp_path, "lasttoken")
    prompts = {"query": "Instruct: find what answers\nQuery:", "document": ""}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    peer = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    made = PagodaEmbeddings(model=str(tmp_path), num_gpu_blocks_override=128)
    found = made.llm.embed(TEXTS)
    assert cosines(found, peer.encode(TEXTS)).min() > 0.9999
    assert all(each.prompt_token_ids[-1] == 0 for each in found)
    cut = made.llm.embed(TEXTS, pooling_params=PoolingParams(dimensions=32))
    whole = peer.encode(TEXTS)[:, :32]
    assert cosines(cut, whole / np.linalg.norm(whole, axis=1, keepdims=True)).min() > 0.9999
    query = np.array(made.embed_query(QUERY))
    assert float(query @ peer.encode(QUERY, prompt_name="query")) > 0.9999
    documents = np.array(made.embed_documents(TEXTS))
    np.testing.assert_allclose(documents, peer.encode(TEXTS, prompt_name="document"), atol=1e-3)
    with pytest.raises(BadRequest, match=r"no prompt of this model\. It has: query, document"):
        made.llm.embed("a", prompt_name="other")
    made.close()


def test_a_reranker_like_qwen3_reranker(tmp_path: Path) -> None:
    """The probability of yes where only yes and no are possible, behind the words that it was trained with."""
    path = tmp_path / "tiny-reranker"
    path.mkdir()
    model = with_tokenizer(path, "qwen3", qwen_tokenizer, transformers.AutoModelForCausalLM)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    no, yes = tokenizer.convert_tokens_to_ids(["no", "yes"])
    asked = "Given a web search query, retrieve relevant passages that answer the query"
    expected = []
    for text in TEXTS:
        prompt = (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            f"<Instruct>: {asked}\n<Query>: {QUERY}\n<Document>: {text}"
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        with torch.no_grad():
            pair = model(torch.tensor([ids])).logits[0, -1, [no, yes]]
        expected.append(float(pair.softmax(0)[1]))
    with LLM(str(path), task="score", max_model_len=256, num_gpu_blocks_override=128) as llm:
        found = [each.outputs.score for each in llm.score(QUERY, TEXTS)]
        other = llm.score(QUERY, TEXTS[0], instruction="Something else")[0].outputs.score
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)
    assert other != found[0]


def test_a_classifier(tmp_path: Path) -> None:
    kind = transformers.AutoModelForSequenceClassification
    model = with_tokenizer(tmp_path, "roberta", xlm_roberta_tokenizer, kind, num_labels=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    with LLM(str(tmp_path)) as llm:
        found = llm.classify(TEXTS)
        arrays = llm.encode(TEXTS, PoolingParams(use_activation=False), pooling_task="classify")
        with pytest.raises(BadRequest, match=r"3 classes.*Call classify\(\)"):
            llm.score("a", "b")
    assert found[0].outputs.num_classes == 3
    np.testing.assert_allclose([each.outputs.probs for each in found], [each.softmax(0) for each in logits], atol=1e-4)
    np.testing.assert_allclose([each.outputs.data for each in arrays], np.stack(logits), rtol=1e-3, atol=1e-3)


def test_a_chat_model_says_how_it_can_embed(tmp_path: Path) -> None:
    path = engine_tiny.write(tmp_path)
    with LLM(path, num_gpu_blocks_override=64) as llm, pytest.raises(BadRequest, match="runner='pooling'"):
        llm.embed("a")
    with LLM(path, num_gpu_blocks_override=64, runner="pooling") as llm:
        one, other = llm.embed(["a", "b"], use_tqdm=True)
        assert one.outputs.embedding != other.outputs.embedding
        assert llm.embed([]) == []
