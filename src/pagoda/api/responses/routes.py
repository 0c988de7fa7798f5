"""The routes of OpenAI's responses."""

from __future__ import annotations

from pagoda.api.http.query import schemas
from pagoda.api.responses import create, stored
from pagoda.api.responses.protocol import InputItems, ResponseDeleted, ResponseEvent, ResponseReply, ResponsesBody
from pagoda.api.serving.endpoint import Endpoint
from pagoda.api.serving.tasks import GENERATE


def endpoints() -> tuple[Endpoint, ...]:
    one = "/responses/{response_id}"
    return (
        Endpoint(
            "/responses", ("POST",), create.responses, "Answer items with items",
            ResponsesBody, ResponseReply, ResponseEvent, openai=True, tasks=GENERATE,
        ),
        Endpoint(one, ("GET",), stored.get_response, "A stored response", reply=ResponseReply, openai=True),
        Endpoint(one, ("DELETE",), stored.delete_response, "Forget a response", reply=ResponseDeleted, openai=True),
        Endpoint(
            one + "/cancel", ("POST",), stored.cancel_response, "Stop a response in the background",
            reply=ResponseReply, openai=True,
        ),
        Endpoint(
            one + "/input_items", ("GET",), stored.input_items, "What a response was made from",
            reply=InputItems, query=schemas("limit", "order", "after"), openai=True,
        ),
    )  # fmt: skip
