"""`pagoda serve`: takes the port, finds the model, starts the engine, and serves as soon as that has loaded."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pagoda import __version__
from pagoda.cli.address import address, is_loopback, print_notes
from pagoda.cli.help import serve_help
from pagoda.cli.inputs import load, show, split
from pagoda.cli.screen import ProgressLine, size, table
from pagoda.options.check import check
from pagoda.options.config import Options
from pagoda.options.resolve import Settings, each_model

if TYPE_CHECKING:
    from pagoda.api.serving.adapters import LoraSide
    from pagoda.api.serving.engine import Engine
    from pagoda.api.serving.server import Server
    from pagoda.arch.spec import ModelSpec
    from pagoda.engine.client import EngineClient
    from pagoda.engine.messages import ModelInfo
    from pagoda.engine.spawn import EngineProcess
    from pagoda.gateway.replicas import Replicas


def run(argv: list[str]) -> int:
    """The command; the result is the exit code."""
    inputs = split(argv)
    if inputs.help is not None:
        print(serve_help(inputs.help), end="")
        return 0
    settings = load(inputs, os.environ)
    if inputs.show_config:
        print(show(settings))
        return 0
    check(settings)
    models = each_model(settings)
    for options in models:
        check(replace(settings, options=options))
    if len(models) > 1 or settings.options.upstream is not None:
        from pagoda.cli.gateway import serve_models

        return serve_models(settings, models)
    return _serve(replace(settings, options=models[0]))


def _serve(settings: Settings) -> int:
    from pagoda.api.http.listen import allow_many_files, bind_socket
    from pagoda.engine.spawn import EngineProcess
    from pagoda.observe import setup_logging

    options = settings.options
    setup_logging(options.log_level, options.log_file, options.log_file_size, options.log_file_count)
    allow_many_files()
    gc.disable()  # all that is made from here to the first request stays
    with (
        bind_socket(options.host, options.port, options.uds) as listener,
        # It imports, and then loads, in its own time; what this process needs is imported and read meanwhile.
        EngineProcess(options.device) if options.replicas == 1 else nullcontext() as process,
    ):
        from pagoda.api.notify import Notifier
        from pagoda.cli.model import local_model
        from pagoda.engine.client import HANG_LIMIT_S

        print_notes(settings)
        path = local_model(options)
        notifier = Notifier(os.environ)
        # Half of what the service manager allows: the engine is started again before the whole server would be.
        hang_limit_s = HANG_LIMIT_S if notifier.limit_s is None else min(HANG_LIMIT_S, notifier.limit_s / 2)
        engine = make_engine(options, path, process, hang_limit_s)
        engine.spawn()
        from pagoda.api.run import run_server, settle_memory

        server = make_server(options, path, engine)
        progress = ProgressLine()

        def ready() -> None:
            settle_memory()
            progress.clear()
            url = address(options, listener)
            print(welcome(server.names[0], engine.info, url, needs_key=bool(options.api_key)), flush=True)

        try:
            return run_server(
                server,
                engine,
                listener,
                drain_s=options.shutdown_timeout,
                on_progress=progress,
                on_ready=ready,
                notifier=notifier,
            )
        finally:
            progress.clear()


def make_engine(
    options: Options, path: str, process: EngineProcess | None, hang_limit_s: float
) -> EngineClient | Replicas:
    """The engine, or several; `process` is the first life of the only one."""
    from pagoda.engine.adapters import with_adapters
    from pagoda.engine.client import EngineClient

    config = with_adapters(options.engine_config(path), options)
    if options.replicas == 1:
        return EngineClient(config, process=process, hang_limit_s=hang_limit_s)
    from pagoda.gateway.replicas import make_replicas

    return make_replicas(
        config,
        options.replicas,
        lambda part, own: EngineClient(part, environ=own, hang_limit_s=hang_limit_s),
    )


def make_server(options: Options, path: str, engine: Engine) -> Server:
    """The text side of the model, and its names."""
    from pagoda.api.batch.file_store import FileStore
    from pagoda.api.batch.store import BatchStore
    from pagoda.api.serving.blobs import BlobStore
    from pagoda.api.serving.pictures import Pictures
    from pagoda.api.serving.server import Server
    from pagoda.arch.dummy import open_model
    from pagoda.arch.registry import load_spec
    from pagoda.cli.hub import Models
    from pagoda.cli.model import sampling_defaults
    from pagoda.deploy.download.created import BLOBS
    from pagoda.deploy.download.default_model import NAME, cache_path
    from pagoda.engine.seeing import find_seeing
    from pagoda.text.chat import load_chat_template
    from pagoda.text.generation import load_generation_defaults
    from pagoda.text.sentence import sentence_files
    from pagoda.text.tokenizer import load_tokenizer

    source = open_model(path, options.load_format)
    spec = load_spec(source, options.engine_config(path).task)
    seeing = find_seeing(options, path, spec.vision)
    defaults = load_generation_defaults(path, source.metadata)
    server = Server(
        engine=engine,
        tokenizer=load_tokenizer(path, source.metadata, bytes_else=options.load_format == "dummy"),
        names=options.served_model_name or (options.model or NAME,),
        root=path,
        chat_template=load_chat_template(path, source.metadata, options.chat_template),
        default_params=sampling_defaults(options, defaults.params),
        default_template_kwargs=options.default_chat_template_kwargs,
        reasoning_parser=options.reasoning_parser,
        tool_call_parser=options.tool_call_parser,
        sentence=sentence_files(path),
        eos_token_ids=defaults.eos_token_ids,
        api_keys=options.api_key,
        allowed_origins=options.allowed_origins,
        local=options.uds is None and is_loopback(options.host),
        root_path=options.root_path,
        max_queued=options.max_num_queued_reqs,
        max_requests_per_key=options.max_requests_per_key,
        log_requests=options.enable_log_requests,
        batches=None if options.files_dir is None else BatchStore(FileStore(options.files_dir)),
        hub=Models(path),
        derived_dir=cache_path() / "derived",
        blobs=BlobStore(cache_path() / BLOBS),
        lora=lora_side(options, spec, gguf=bool(source.metadata)) if options.takes_adapters else None,
        pictures=None if seeing is None else Pictures(seeing),
        options=options,
        version=__version__,
    )
    source.close()
    return server


def lora_side(options: Options, spec: ModelSpec, *, gguf: bool) -> LoraSide:
    """What the server knows of LoRA adapters."""
    from pagoda.api.serving.adapters import LoraSide
    from pagoda.arch.lora import read_adapter
    from pagoda.engine.adapters import named_adapters

    adapters, parents = named_adapters(options.lora_modules)
    return LoraSide(
        adapters=tuple(adapters),
        parents=parents,
        check=partial(read_adapter, spec=spec, gguf=gguf, max_rank=options.max_lora_rank),
        root=Path(options.lora_dir or ".").resolve() if options.allow_runtime_lora_updating else None,
    )


_QUESTION = "What is photosynthesis? One sentence."
_FIRST: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "generate": (
            "chat/completions",
            {"messages": [{"role": "user", "content": _QUESTION}]},
        ),
        "embed": ("embeddings", {"input": "Hello!"}),
        "score": ("rerank", {"query": "Hello!", "documents": ["Good day to you.", "A pagoda is a tower."]}),
    }
)
"""A first request for each kind of model: its path and body."""


def welcome(name: str, info: ModelInfo, url: str, *, needs_key: bool) -> str:
    """What is printed when the server is ready: a short table, the address, a first request to copy."""
    context = f"{info.max_model_len} tokens"
    if info.max_model_len < info.model_max_len:
        context += f" (the model could do {info.model_max_len})"
    memory = f"{size(info.weight_bytes)} weights + {size(info.kv_bytes)} cache + {size(info.activation_bytes)} work"
    rows = [
        ("model", f"{name} ({info.architecture}, {info.weight_types})"),
        ("context", context),
        ("in parallel", f"{info.max_num_seqs} requests"),
        ("memory", memory),
        ("device", info.device),
        ("loaded in", f"{info.load_s:.2f} s"),
    ]
    path, fields = _FIRST[info.task]
    body = json.dumps({"model": name, **fields}, ensure_ascii=False)
    quoted = body.replace("'", "'\\''")
    target = f"--unix-socket {url[5:]} http://localhost" if url.startswith("unix:") else url
    headers = " -H 'Content-Type: application/json'" + (" -H 'Authorization: Bearer KEY'" if needs_key else "")
    curl = f"curl {target}/v1/{path}{headers} \\\n    -d '{quoted}'"
    return f"\n{table(rows)}\n\n  {url}/v1 answers now, Ctrl-C stops it. Try:\n\n  {curl}\n"
