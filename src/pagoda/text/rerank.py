"""The prompt of rerankers that were made of a chat model: is the document an answer to the query, yes or no?"""

from __future__ import annotations

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""For requests that give none; it is the one that Qwen3-Reranker was trained with most."""

_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_BEHIND = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_WRITTEN = ("<|im_start|>", "<Instruct>")


def judged(query: str, document: str, instruction: str | None) -> tuple[str, str, str]:
    """What goes before, the part that may be cut at its end, and what goes behind.

    A query that is written in this form already is left as it is.
    """
    if query.startswith(_WRITTEN):
        return "", query + document, ""
    return _BEFORE, f"<Instruct>: {instruction or INSTRUCTION}\n<Query>: {query}\n<Document>: {document}", _BEHIND
