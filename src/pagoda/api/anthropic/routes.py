"""The routes of Anthropic's messages."""

from __future__ import annotations

from pagoda.api.anthropic import messages
from pagoda.api.anthropic.protocol import ANTHROPIC, CountBody, CountReply, MessagesBody, MessagesEvent, MessagesReply
from pagoda.api.serving.endpoint import Endpoint
from pagoda.api.serving.tasks import GENERATE


def endpoints() -> tuple[Endpoint, ...]:
    return (
        Endpoint(
            "/messages", ("POST",), messages.messages, "Anthropic: answer messages, whole or streamed",
            MessagesBody, MessagesReply, MessagesEvent, openai=True, dialect=ANTHROPIC, tasks=GENERATE,
        ),
        Endpoint(
            "/messages/count_tokens", ("POST",), messages.count_tokens, "Anthropic: count a prompt's tokens",
            CountBody, CountReply, openai=True, dialect=ANTHROPIC, tasks=GENERATE,
        ),
    )  # fmt: skip
