"""The routes of OpenAI's chats, completions and models, and of vLLM's tokenizer."""

from __future__ import annotations

from pagoda.api.openai import chat, chat_batch, completions, models, tokens
from pagoda.api.openai.chat_batch import ChatBatchBody
from pagoda.api.openai.replies import (
    ChatChunk,
    ChatReply,
    CompletionReply,
    DetokenizeReply,
    ModelCard,
    ModelList,
    TokenizeReply,
    TokenizerInfo,
)
from pagoda.api.serving.endpoint import Endpoint
from pagoda.api.serving.tasks import GENERATE
from pagoda.api.turn.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody


def endpoints() -> tuple[Endpoint, ...]:
    return (
        Endpoint(
            "/chat/completions", ("POST",), chat.chat_completions, "Answer messages, whole or streamed",
            ChatBody, ChatReply, ChatChunk, openai=True, tasks=GENERATE,
        ),
        Endpoint(
            "/chat/completions/batch", ("POST",), chat_batch.chat_batch, "Answer several conversations at once",
            ChatBatchBody, ChatReply, openai=True, tasks=GENERATE,
        ),
        Endpoint(
            "/completions", ("POST",), completions.completions, "Go on with a text or with token ids",
            CompletionBody, CompletionReply, CompletionReply, openai=True, tasks=GENERATE,
        ),
        Endpoint("/models", ("GET",), models.list_models, "List what is served", reply=ModelList, openai=True),
        Endpoint(
            "/models/{model:path}", ("GET",), models.get_model, "Describe one served model",
            reply=ModelCard, openai=True,
        ),
        Endpoint("/tokenize", ("POST",), tokens.tokenize, "Text or messages to token ids", TokenizeBody, TokenizeReply),
        Endpoint("/detokenize", ("POST",), tokens.detokenize, "Token ids to text", DetokenizeBody, DetokenizeReply),
        Endpoint("/tokenizer_info", ("GET",), tokens.tokenizer_info, "Special tokens", reply=TokenizerInfo),
    )  # fmt: skip
