"""The prompt of two texts for a scoring model: a pair, or for those made of a chat model a question of yes or no."""

from __future__ import annotations

from pagoda.text.tokenizer import Cut, Tokenizer

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""For requests that give none; it is the one that Qwen3-Reranker was trained with most."""

_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_BEHIND = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_WRITTEN = ("<|im_start|>", "<Instruct>")


def judged(query: str, document: str, instruction: str | None) -> tuple[str, str, str]:
    """What goes before, the part that ends with the document and may be cut, and what goes behind.

    A query that is written in this form already is left as it is.
    """
    if query.startswith(_WRITTEN):
        return "", query + document, ""
    return _BEFORE, f"<Instruct>: {instruction or INSTRUCTION}\n<Query>: {query}\n<Document>: {document}", _BEHIND


def pair_tokens(
    tokenizer: Tokenizer,
    architecture: str,
    query: str,
    document: str,
    cut: Cut | None = None,
    instruction: str | None = None,
) -> tuple[list[int], int | None]:
    """Token ids, and the place of the second text where the model needs it. `cut` is for the document."""
    if architecture != "qwen3":
        return tokenizer.encode_pair(query, document, cut)
    before, text, behind = judged(query, document, instruction)
    head, tail = (tokenizer.encode(part, add_special_tokens=False) for part in (before, behind))
    encoding = tokenizer.encode_spans(text)
    ids = encoding.ids
    if cut is not None:
        start = len(text) - len(document)
        asked = sum(end <= start for _, end in encoding.offsets)
        ids = cut.kept(ids, around=len(head) + len(tail), fixed=asked)
    return [*head, *ids, *tail], None
