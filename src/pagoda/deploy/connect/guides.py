"""What to type into each client, in English and Chinese; `$root`, `$model`, `$context` and `$key` are filled in."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Template
from types import MappingProxyType
from typing import TypeVar

from pagoda.deploy.connect.connect import Served, Text, pick
from pagoda.deploy.findings import columns

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Guide:
    """`where` to go, `fields` of a form, and `code` to paste, each by the task of the model; "" is any task.

    `docker`: the client usually runs in a container. `context`: less than this is too little for its own prompts.
    """

    title: str
    where: Mapping[str, Text]
    fields: Mapping[str, tuple[tuple[Text, str | Text], ...]] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)
    hint: Text = ("", "")
    docker: bool = False
    context: int = 0


def text(guide: Guide, served: Served, root: str, key: str, lang: str) -> str:
    """The guide for this server."""
    values = {
        "root": root,
        "model": served.model,
        "context": str(served.context or 4096),
        "key": key or "EMPTY",
        "shell_key": shlex.quote(key or "EMPTY"),
        "tools": pick(_CAN if served.calls_tools else _CANNOT, lang),
        "vision": pick(_STREAMED if served.sees else _CANNOT, lang),
        "ragflow_type": "image2text" if served.sees else "chat",
        "streamed_tools": pick(_STREAMED if served.calls_tools else _CANNOT, lang),
    }
    fields = _of(guide.fields, served.task, ())
    rows = [(pick(name, lang), value if isinstance(value, str) else pick(value, lang)) for name, value in fields]
    parts = [f"{guide.title}: {pick(_of(guide.where, served.task, ('', '')), lang)}"]
    if rows:
        width = max(columns(name) for name, _ in rows)
        parts.append("\n".join(f"  {name}{' ' * (width - columns(name))}  {value}" for name, value in rows))
    if code := _of(guide.code, served.task, ""):
        parts.append("\n".join(f"  {line}" if line else "" for line in code.strip("\n").split("\n")))
    if hint := pick(guide.hint, lang):
        parts.append(hint)
    if not key:
        parts.append(pick(_NO_KEY, lang))
    return Template("\n\n".join(parts)).substitute(values)


def _of(by_task: Mapping[str, T], task: str, default: T) -> T:
    return by_task.get(task, by_task.get("", default))


_CAN: Text = ("Tool Call", "工具调用")
_STREAMED: Text = ("Support", "支持")
_CANNOT: Text = ("Not Support", "不支持")
_NO_KEY: Text = (
    "The server asks for no key: where a client insists on one, any text does.",
    "服务器没有设置密钥：客户端必须填写时，填任意文字即可。",
)
_NAME: Text = ("Model Name", "模型名称")
_TYPE: Text = ("Model Type", "模型类型")
_DIFY = (
    (_NAME, "$model"),
    (("API Key", "API Key"), "$key"),
    (("API Base URL", "API Base URL"), "$root/v1"),
    (("Model context size", "模型上下文长度"), "$context"),
)
_RAGFLOW = (
    (_NAME, "$model"),
    (("Base url", "基础 Url"), "$root/v1"),
    (("API-Key", "API-Key"), "$key"),
    (("Max Tokens", "最大token数"), "$context"),
)

GUIDES: Mapping[str, Guide] = MappingProxyType(
    {
        "dify": Guide(
            "Dify",
            {
                "": (
                    "Settings > Model Provider > OpenAI-API-compatible (install it there) > Add Model",
                    "设置 > 模型供应商 > OpenAI-API-compatible（先安装）> 添加模型",
                )
            },
            {
                "generate": (
                    (_TYPE, "LLM"),
                    *_DIFY,
                    (("Completion mode", "对话类型"), ("Chat", "对话")),
                    (("Upper bound for max tokens", "最大 token 上限"), "$context"),
                    (("Function Call Type", "函数调用类型"), "$tools"),
                    (("Stream function calling", "流式函数调用"), "$streamed_tools"),
                    (("Vision support", "Vision 支持"), "$vision"),
                ),
                "embed": (
                    (_TYPE, "Text Embedding"),
                    *_DIFY,
                    (("Model max chunks per batch", "模型每批的最大分块数"), "16"),
                ),
                "score": ((_TYPE, "Rerank"), *_DIFY),
            },
            docker=True,
        ),
        "ragflow": Guide(
            "RAGFlow",
            {"": ("your avatar > Model providers > VLLM > Add the model", "头像 > 模型提供商 > VLLM > 添加模型")},
            {
                "generate": ((_TYPE, "$ragflow_type"), *_RAGFLOW),
                "embed": ((_TYPE, "embedding"), *_RAGFLOW),
                "score": ((_TYPE, "rerank"), *_RAGFLOW),
            },
            hint=(
                "Then choose it under System Model Settings. RAGFlow waits 10 s for the first text of a model.",
                "然后在“系统模型设置”中选用它。RAGFlow 最多等待模型的第一段文字 10 秒。",
            ),
            docker=True,
        ),
        "langchain": Guide(
            "LangChain",
            {"": ("pip install langchain-openai, and:", "pip install langchain-openai，然后：")},
            code={
                "generate": """
from langchain_openai import ChatOpenAI

llm = ChatOpenAI(model="$model", base_url="$root/v1", api_key="$key")
print(llm.invoke("Hello!").content)
""",
                "embed": """
from langchain_openai import OpenAIEmbeddings

embeddings = OpenAIEmbeddings(
    model="$model", base_url="$root/v1", api_key="$key", check_embedding_ctx_length=False
)
print(len(embeddings.embed_query("Hello!")))
""",
            },
        ),
        "llamaindex": Guide(
            "LlamaIndex",
            {
                "generate": (
                    "pip install llama-index-llms-openai-like, and:",
                    "pip install llama-index-llms-openai-like，然后：",
                ),
                "embed": (
                    "pip install llama-index-embeddings-openai-like, and:",
                    "pip install llama-index-embeddings-openai-like，然后：",
                ),
            },
            code={
                "generate": """
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model="$model", api_base="$root/v1", api_key="$key", is_chat_model=True, context_window=$context
)
print(llm.complete("Hello!"))
""",
                "embed": """
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

embeddings = OpenAILikeEmbedding(model_name="$model", api_base="$root/v1", api_key="$key")
print(len(embeddings.get_text_embedding("Hello!")))
""",
            },
        ),
        "openai": Guide(
            "openai (Python)",
            {"": ("pip install openai, and:", "pip install openai，然后：")},
            code={
                "generate": """
from openai import OpenAI

client = OpenAI(base_url="$root/v1", api_key="$key")
answer = client.chat.completions.create(model="$model", messages=[{"role": "user", "content": "Hello!"}])
print(answer.choices[0].message.content)
""",
                "embed": """
from openai import OpenAI

client = OpenAI(base_url="$root/v1", api_key="$key")
print(len(client.embeddings.create(model="$model", input="Hello!").data[0].embedding))
""",
            },
            hint=(
                "Programs that read the environment: OPENAI_BASE_URL=$root/v1 OPENAI_API_KEY=$shell_key",
                "读取环境变量的程序：OPENAI_BASE_URL=$root/v1 OPENAI_API_KEY=$shell_key",
            ),
        ),
        "openwebui": Guide(
            "Open WebUI",
            {
                "generate": (
                    "Admin Panel > Settings > Connections > OpenAI API > +",
                    "管理员面板 > 设置 > 外部连接 > OpenAI 接口 > +",
                ),
                "": ("Admin Panel > Settings > Documents", "管理员面板 > 设置 > 文档"),
            },
            {
                "generate": ((("URL", "URL"), "$root/v1"), (("API Key", "API 密钥"), "$key")),
                "embed": (
                    (("Embedding Model Engine", "语义向量模型引擎"), "OpenAI"),
                    (("API Base URL, API Key", "接口地址、密钥"), "$root/v1  $key"),
                    (("Embedding Model", "语义向量模型"), "$model"),
                ),
                "score": (
                    (("Reranking Engine", "重排引擎"), "External"),
                    (("API Base URL, API Key", "接口地址、密钥"), "$root/v1/rerank  $key"),
                    (("Reranking Model", "重排模型"), "$model"),
                ),
            },
            {
                "generate": """
docker run -d -p 3000:8080 -v open-webui:/app/backend/data \\
  -e OPENAI_API_BASE_URL=$root/v1 -e OPENAI_API_KEY=$shell_key ghcr.io/open-webui/open-webui:main
"""
            },
            hint=(
                "Open WebUI asks the server for its models: $model is in its list then.",
                "Open WebUI 会读取模型列表，之后即可选择 $model。",
            ),
            docker=True,
        ),
        "spring": Guide(
            "Spring AI",
            {
                "": (
                    "add org.springframework.ai:spring-ai-starter-model-openai, and to application.yaml:",
                    "添加依赖 org.springframework.ai:spring-ai-starter-model-openai，在 application.yaml 中：",
                )
            },
            code={
                "generate": """
spring:
  ai:
    openai:
      base-url: $root
      api-key: $key
      chat:
        options:
          model: $model
""",
                "embed": """
spring:
  ai:
    openai:
      base-url: $root
      api-key: $key
      embedding:
        options:
          model: $model
""",
            },
            hint=(
                "base-url is without /v1: Spring AI 1.x adds it itself.",
                "base-url 不带 /v1：Spring AI 1.x 会自动加上。",
            ),
        ),
        "claude-code": Guide(
            "Claude Code",
            {"": ("in the shell:", "在终端中：")},
            code={
                "generate": """
export ANTHROPIC_BASE_URL=$root
export ANTHROPIC_AUTH_TOKEN=$shell_key
export ANTHROPIC_API_KEY=
export ANTHROPIC_MODEL=$model
export ANTHROPIC_DEFAULT_OPUS_MODEL=$model ANTHROPIC_DEFAULT_SONNET_MODEL=$model
export ANTHROPIC_DEFAULT_HAIKU_MODEL=$model
claude
"""
            },
            context=32_000,
        ),
        "codex": Guide(
            "Codex CLI",
            {
                "": (
                    "in ~/.codex/config.toml, then: PAGODA_KEY=$shell_key codex",
                    "写入 ~/.codex/config.toml，然后：PAGODA_KEY=$shell_key codex",
                )
            },
            code={
                "generate": """
model = "$model"
model_provider = "pagoda"
model_context_window = $context

[model_providers.pagoda]
name = "Pagoda"
base_url = "$root/v1"
env_key = "PAGODA_KEY"
wire_api = "responses"
"""
            },
            context=32_000,
        ),
        "cline": Guide(
            "Cline",
            {"": ("Cline's settings in VS Code > API Configuration", "VS Code 中 Cline 的设置 > API Configuration")},
            {
                "generate": (
                    (("API Provider",) * 2, "OpenAI Compatible"),
                    (("Base URL",) * 2, "$root/v1"),
                    (("API Key",) * 2, "$key"),
                    (("Model ID",) * 2, "$model"),
                    (("Context Window Size",) * 2, "$context"),
                )
            },
            context=32_000,
        ),
        "curl": Guide(
            "curl",
            {"": ("in the shell:", "在终端中：")},
            code={
                "generate": """
curl $root/v1/chat/completions -H "Content-Type: application/json" -H "Authorization: Bearer $key" \\
  -d '{"model": "$model", "messages": [{"role": "user", "content": "Hello!"}]}'
""",
                "embed": """
curl $root/v1/embeddings -H "Content-Type: application/json" -H "Authorization: Bearer $key" \\
  -d '{"model": "$model", "input": "Hello!"}'
""",
                "score": """
curl $root/v1/rerank -H "Content-Type: application/json" -H "Authorization: Bearer $key" \\
  -d '{"model": "$model", "query": "Hello!", "documents": ["Good day to you.", "A pagoda is a tower."]}'
""",
            },
        ),
    }
)
