"""POST /tokenize, POST /detokenize, GET /tokenizer_info: the tokenizer over HTTP."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.errors import JSON, to_json
from pagoda.api.openai.replies import DetokenizeReply, TokenizeReply, TokenizerInfo
from pagoda.api.serving.server import Server
from pagoda.api.turn.bodies import DetokenizeBody, TokenizeBody
from pagoda.api.turn.prompt import chat_prompt
from pagoda.api.turn.tools import read_tools
from pagoda.errors import BadRequest

MAX_CHARS_PER_TOKEN = 64


async def tokenize(server: Server, request: Request) -> Response:
    body, ignored = parse(await read_body(request), TokenizeBody)
    server.served.resolve(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("give either prompt or messages", param="prompt")
    if body.prompt is None:
        body.tools = read_tools(body.tools or ()).functions or None
        tokens = (await chat_prompt(server, body)).ids
    else:
        if len(body.prompt) > server.max_model_len * MAX_CHARS_PER_TOKEN:
            raise BadRequest("prompt is far longer than the context of this model", param="prompt")
        special = body.add_special_tokens is not False
        tokens = await server.encode_whole(body.prompt, add_special_tokens=special)
    texts = [server.tokenizer.token_piece(token) for token in tokens] if body.return_token_strs else None
    reply = TokenizeReply(count=len(tokens), max_model_len=server.max_model_len, tokens=tokens, token_strs=texts)
    response = Response(to_json(reply), media_type=JSON)
    server.dress(response, ignored)
    return response


async def detokenize(server: Server, request: Request) -> Response:
    body, ignored = parse(await read_body(request), DetokenizeBody)
    server.served.resolve(body.model)
    if any(not 0 <= token < server.tokenizer.vocab_size for token in body.tokens):
        raise BadRequest(f"tokens holds an id outside 0..{server.tokenizer.vocab_size - 1}", param="tokens")
    text = server.tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
    response = Response(to_json(DetokenizeReply(prompt=text)), media_type=JSON)
    server.dress(response, ignored)
    return response


async def tokenizer_info(server: Server, request: Request) -> Response:
    tokenizer = server.tokenizer
    bos = tokenizer.bos_token_id
    eos = next(iter(tokenizer.eos_token_ids), None)
    template = server.chat_template
    reply = TokenizerInfo(
        bos_token=None if bos is None else tokenizer.token_text(bos),
        eos_token=None if eos is None else tokenizer.token_text(eos),
        pad_token=None if eos is None else tokenizer.token_text(eos),
        chat_template=None if template is None else template.source,
        vocab_size=tokenizer.vocab_size,
    )
    return Response(to_json(reply), media_type=JSON)
