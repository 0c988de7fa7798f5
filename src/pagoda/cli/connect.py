"""`pagoda connect`: what to type into a client, after its own first calls were tried on the running server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pagoda.cli.findings import show
from pagoda.cli.words import read_words
from pagoda.errors import ConfigError

if TYPE_CHECKING:
    from pagoda.deploy.connect.connect import Served, Target
    from pagoda.deploy.findings import Finding

_OPTIONS = ("url", "model", "api-key", "address", "lang")

HELP = """\
Usage: pagoda connect CLIENT [options]

Tries on the running server what CLIENT sends when it is connected, says of each call whether it works, and prints what
to type into CLIENT: address, model, context, key. CLIENT is one of
  dify, ragflow, openwebui             (in Docker: with an address that containers reach)
  langchain, llamaindex, openai, spring, curl
  claude-code, codex, cline
The exit code is 0, or 1 if the client would not work.

Examples:
  pagoda connect dify
  pagoda connect ragflow --api-key "$KEY" --lang zh
  pagoda connect claude-code --url http://10.0.0.5:8000

Options:
  --url URL         the server (default http://localhost:8000)
  --model NAME      one of the names that it serves (default: the first)
  --api-key KEY     the server's key (or in PAGODA_API_KEY, VLLM_API_KEY, OPENAI_API_KEY)
  --address HOST    the name or address under which the client reaches this machine
  --lang en|zh      the language
  --json            the findings and the text for a program
"""

_KEYS = ("PAGODA_API_KEY", "VLLM_API_KEY", "OPENAI_API_KEY")
_VERDICTS = (
    ("{client} works with this server. Type:", "{count} found that must be cured first; then type:"),
    ("{client} 可以使用这个服务器。请填写：", "有 {count} 个问题需要先解决，然后填写："),
)


def run(argv: list[str]) -> int:
    words = read_words("connect", argv, _OPTIONS, ("help", "json"), {"-h": "help"})
    if "help" in words.switches:
        print(HELP, end="")
        return 0
    from pagoda.deploy.connect.connect import LANGUAGES, Target, from_containers, look
    from pagoda.deploy.connect.guides import GUIDES, text

    lang = words.last("lang") or "en"
    if lang not in LANGUAGES:
        raise ConfigError(f"--lang {lang} is not here", remedy=f"Give one of {', '.join(LANGUAGES)}")
    if len(words.plain) != 1 or words.plain[0] not in GUIDES:
        given = " ".join(words.plain)
        problem = f"There is no guide for {given}" if given else "pagoda connect needs the name of a client"
        raise ConfigError(problem, remedy=f"Give one of {', '.join(GUIDES)}")
    name = words.plain[0]
    guide = GUIDES[name]
    key = words.last("api-key") or next((os.environ[v] for v in _KEYS if os.environ.get(v)), "")
    target = Target(words.last("url") or "http://localhost:8000", key)
    served = look(target, words.last("model"))
    findings = _try(name, target, served, guide.context, lang)
    root, address = target.root, words.last("address")
    if guide.docker or address:
        root, finding = from_containers(target, lang, address)
        findings.append(finding)
    shown = text(guide, served, root, key, lang)
    verdicts = _VERDICTS[LANGUAGES.index(lang)]
    failed = show(
        findings, (verdicts[0].format(client=guide.title), verdicts[1]), as_json="json" in words.switches,
        client=name, url=root, model=served.model, task=served.task, context=served.context, guide=shown,
    )  # fmt: skip
    if "json" not in words.switches:
        print(f"\n{shown}\n")
    return failed


def _try(name: str, target: Target, served: Served, least: int, lang: str) -> list[Finding]:
    from pagoda.deploy.connect.calls import calls, play
    from pagoda.deploy.connect.connect import pick
    from pagoda.deploy.findings import note, ok, problem

    seen = ok(pick(("model", "模型"), lang), f"{served.model}  ({served.task}, {served.context or '?'} tokens)")
    played = calls(name, served)
    if not played:
        text = (f"{name} has no use for a model of the kind {served.task}", f"{name} 用不上 {served.task} 类型的模型")
        cure = ("serve a chat model: pagoda serve MODEL", "请提供一个对话模型：pagoda serve MODEL")
        return [seen, problem(pick(("kind", "类型"), lang), pick(text, lang), pick(cure, lang))]
    findings = [seen, *(play(call, target, served, lang) for call in played)]
    if served.context is not None and served.context < least:
        text = (
            f"{served.context} tokens: the instructions and tools that this client sends may already take them",
            f"{served.context} 个 token：该客户端自带的指令和工具可能就会占满",
        )
        cure = (f"serve with --max-model-len {least} or more", f"用 --max-model-len {least} 或更大的值启动")
        findings.append(note(pick(("context", "上下文"), lang), pick(text, lang), pick(cure, lang)))
    if least and not served.calls_tools:
        text = (
            "this model was not made to call tools, and this client works by them",
            "该模型不是为调用工具而训练的，而该客户端要靠工具工作",
        )
        cure = (
            "serve a model whose chat template has tools, such as Qwen3",
            "请提供对话模板支持工具的模型，例如 Qwen3",
        )
        findings.append(note(pick(("tools", "工具"), lang), pick(text, lang), pick(cure, lang)))
    return findings
