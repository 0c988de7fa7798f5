"""Every option of the server, declared once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pagoda.options.engine_config import EngineConfig
from pagoda.options.formats import KV_EIGHT_BITS, QUANTIZE_ON_LOAD_GPU
from pagoda.options.http import HttpOptions
from pagoda.options.setting import Setting, option
from pagoda.options.speculation import speculation_from
from pagoda.options.tasks import task_of


@dataclass(frozen=True, kw_only=True)
class Options(HttpOptions):
    """What the user may choose. Names are vLLM's; None means: Pagoda chooses what fits."""

    model: str | None = option(
        None,
        "Folder, .gguf file or hub name of the model; also as the first argument. None: SmolLM2-135M-Instruct",
        "Model",
        env=("VLLM_MODEL_PATH",),
    )
    served_model_name: tuple[str, ...] = option(
        (),
        "Names under which clients ask for the model; the default is the model as it was typed. Where nothing else "
        "names a model, MODEL_NAME is the model itself",
        "Model",
        env=("MODEL_NAME",),
    )
    dtype: str = option(
        "auto",
        "Type of float computation where there is a choice; quantized weights run in their own bits. int8, int4 "
        "and fp8 are the same as --quantization int8, int4 and fp8",
        "Model",
        choices=("auto", "half", "float16", "bfloat16", "float", "float32", *QUANTIZE_ON_LOAD_GPU),
    )
    quantization: str | None = option(
        None,
        "int8, int4 or (on a GPU) fp8: make 8 or 4 bits of float weights while they are loaded. awq, gptq, fp8, "
        "compressed-tensors, mxfp4, gguf (and awq_marlin, gptq_marlin): how the model is quantized; read from the "
        "model, so it need not be given",
        "Model",
        aliases=("-q",),
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a model that is named as on a hub; it is fetched on first use", "Model"
    )
    download_dir: str | None = option(None, "Folder of downloads, laid out like Hugging Face's (the default)", "Model")
    mmproj: str | None = option(None, "Image encoder of a GGUF model (default: mmproj*.gguf in its folder)", "Model")
    load_format: str = option(
        "auto",
        "File format of the weights. pt: PyTorch's .bin; dummy: random weights of the shapes in a folder's "
        "config.json, to measure speed without a download; without a tokenizer.json there each byte of a text is a "
        "token",
        "Model",
        choices=("auto", "safetensors", "gguf", "pt", "dummy"),
    )
    max_model_len: int | None = option(
        None,
        "Longest context in tokens, prompt and answer together (8192, 8k, 8K; auto or -1: what the model and the "
        "memory allow)",
        "Model",
        env=("MAX_MODEL_LEN",),
        low=1,
    )
    runner: str = option(
        "auto",
        "Generate text, or pooling (embeddings, scores); found in the model's files",
        "Model",
        choices=("auto", "generate", "pooling"),
    )
    convert: str = option(
        "auto",
        "What to make of a chat model: embed (by its last hidden state), or classify (score by yes over no)",
        "Model",
        choices=("auto", "none", "embed", "classify"),
    )
    task: str = option(
        "auto",
        "Both in one word, as older vLLM has it; a model with rerank in its name scores",
        "Model",
        choices=("auto", "generate", "embed", "embedding", "score", "classify"),
    )
    chat_template: str | None = option(
        None, "A Jinja file (or the template itself) to use in place of the model's own chat template", "Model"
    )
    default_chat_template_kwargs: Mapping[str, Any] = option(
        {}, 'Template variables for all chats, such as {"enable_thinking": false}', "Model"
    )
    reasoning_parser: str | None = option(
        None,
        "How the model writes its reasoning, under vLLM's names; found in the chat template, so it need not be given. "
        "none: reasoning stays in the answer's text",
        "Model",
    )
    tool_call_parser: str | None = option(
        None,
        "How the model writes tool calls, under vLLM's names; found in the chat template, so it need not be given. "
        "none: calls stay in the answer's text",
        "Model",
    )
    generation_config: str = option(
        "auto",
        "Where default sampling parameters come from: auto (the model's generation_config.json) or vllm (neutral)",
        "Model",
        choices=("auto", "vllm"),
    )
    override_generation_config: Mapping[str, Any] = option(
        {}, 'Default sampling parameters on top, such as {"temperature": 0.6}', "Model"
    )

    device: str = option(
        "auto",
        "Where to compute: cuda (an NVIDIA GPU, with PyTorch), cpu (native kernels) or reference (plain numpy, slow, "
        "to compare with); auto takes a GPU where PyTorch finds one",
        "Machine",
        choices=("auto", "cpu", "cuda", "reference"),
    )
    threads: int | None = option(
        None, "CPU threads of the engine; the default is one per physical core", "Machine", low=1
    )
    gpu_memory_utilization: float | None = option(
        None,
        "Share of the memory that weights, cache and activations may use, 0 to 1: of all that the GPU has; on a CPU, "
        "of the free memory",
        "Machine",
        aliases=("--device-memory-utilization",),
        env=("GPU_MEMORY_UTILIZATION",),
        low=0.01,
        high=1,
        note="on a CPU it is the share of the memory that is free now",
    )
    kv_cache_memory_bytes: int | None = option(None, "Exact size of the KV cache in bytes (512M, 2G)", "Machine", low=1)
    kv_cache_dtype: str = option(
        "auto",
        "How keys and values are kept. auto: on a GPU the type of computation, on a CPU bfloat16 if the processor "
        "multiplies it and weights are not finer, else float16. int8, q8_0, fp8, fp8_e4m3, fp8_e5m2: 8 bits, half "
        "the cache; on a CPU numbers from -127 to 127 with a float16 scale for each 32, nearer to the values than fp8",
        "Machine",
        choices=("auto", "float16", "bfloat16", *KV_EIGHT_BITS),
    )
    enforce_eager: bool = option(
        False,
        "Run decode steps on a GPU without CUDA graphs: slower, and a little more memory is left for the cache",
        "Machine",
        note="on a CPU there are no CUDA graphs to turn off",
    )
    attention_backend: str | None = option(
        None,
        "Attention of prompts on a GPU. FLASHINFER: FlashInfer's; TRITON_ATTN, or any other name that vLLM knows: the "
        "own kernel's; without it FlashInfer's where it is installed, agrees and is faster, tried out at the start",
        "Machine",
        env=("VLLM_ATTENTION_BACKEND",),
        note="there is one attention kernel for a CPU",
    )
    num_gpu_blocks_override: int | None = option(
        None, "Exact number of blocks (16 tokens each) of the KV cache", "Machine", low=1
    )
    tensor_parallel_size: int = option(
        1,
        "Number of GPUs that share one model, the first ones of CUDA_VISIBLE_DEVICES; on a CPU only 1",
        "Machine",
        aliases=("-tp",),
        env=("TENSOR_PARALLEL_SIZE",),
        low=1,
    )
    distributed_executor_backend: str = option(
        "mp",
        "Where these GPUs are. mp: in this machine, a process for each; ray: anywhere in the Ray cluster that this "
        "machine is part of (RAY_ADDRESS, or the one that runs here), with the model at the same path on each machine; "
        "uni: there is only one",
        "Machine",
        choices=("mp", "ray", "uni"),
    )

    replicas: int = option(
        1,
        "Engines with the same model behind this server: each request goes to the one that has its prompt in the "
        "cache, or else to the least busy, and goes on elsewhere when that dies. On a CPU they share the threads and "
        "the memory; on GPUs each takes --tensor-parallel-size of them, the next ones of CUDA_VISIBLE_DEVICES",
        "Machine",
        aliases=("--data-parallel-size", "-dp"),
        low=1,
        high=64,
    )

    max_num_seqs: int | None = option(None, "Most requests that are computed in parallel", "Scheduling", low=1)
    max_num_batched_tokens: int | None = option(None, "Most tokens in one step, of all requests", "Scheduling", low=1)
    max_num_queued_reqs: int | None = option(
        None, "Most requests that wait; beyond it clients get 503 and when to come back", "Scheduling", low=0
    )
    step_time_target: float | None = option(
        None,
        "Longest time in seconds between two tokens of a running answer while prompts are read beside it: prompts are "
        "cut to fit; the default on a CPU is 0.05, and 0 cuts them by --max-num-batched-tokens only",
        "Scheduling",
        low=0,
    )
    speculative_config: Mapping[str, Any] = option(
        {},
        'Guess tokens from the text so far, and keep those that the model would choose: {"method": "ngram", '
        '"num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2} does it always; without it, it '
        'is done where it pays; {"num_speculative_tokens": 0} never does it. {"model": PATH, "num_speculative_tokens": '
        "4} lets a smaller model with the same vocabulary guess. Answers are the same in all cases",
        "Scheduling",
        aliases=("-sc",),
    )
    enable_lora: bool = option(False, "Serve LoRA adapters beside the model", "LoRA")
    lora_modules: tuple[str, ...] = option(
        (),
        'Adapters that are loaded with the model: NAME=PATH ..., or {"name": NAME, "path": PATH, "base_model_name": '
        "MODEL}. Each is a model of its own for clients. A path is PEFT's folder or a LoRA in a .gguf file",
        "LoRA",
    )
    max_loras: int | None = option(
        None,
        "Most adapters in memory at once; requests for others wait until one has no requests (default: as many as "
        "--lora-modules, at least 1)",
        "LoRA",
        low=1,
    )
    max_lora_rank: int = option(16, "Largest rank of an adapter", "LoRA", low=1, high=1024)
    allow_runtime_lora_updating: bool = option(
        False,
        "Let clients load and unload adapters: POST /v1/load_lora_adapter and /v1/unload_lora_adapter; without it "
        "there are no such routes",
        "LoRA",
        env=("VLLM_ALLOW_RUNTIME_LORA_UPDATING",),
    )
    lora_dir: str | None = option(
        None,
        "Folder below which adapters must lie that clients load (default: the folder the server is started in)",
        "LoRA",
    )

    enable_prefix_caching: bool = option(True, "Reuse the cache of prompts that begin alike", "Scheduling")

    limit_mm_per_prompt: Mapping[str, Any] = option(
        {}, 'Most pictures and videos of one request: {"image": 4, "video": 1}; else what the context holds', "Pictures"
    )
    mm_processor_kwargs: Mapping[str, Any] = option(
        {},
        'How large pictures are made: {"min_pixels": 3136, "max_pixels": 1003520}; else as the model says',
        "Pictures",
    )
    allowed_media_domains: tuple[str, ...] = option(
        (), "Hosts, also private ones, to fetch pictures from; else all public ones; none fetches nothing", "Pictures"
    )
    allowed_local_media_path: str | None = option(
        None, "Folder below which requests may name pictures as file:///...; without it none", "Pictures"
    )

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for every network this machine is in", "Server")
    port: int = option(8000, "Port to listen on; 0 picks a free one", "Server", low=0, high=65535)
    uds: str | None = option(None, "Unix socket to listen on, in place of host and port", "Server")
    api_key: tuple[str, ...] = option(
        (), "Keys that clients must send; without one every key works", "Server", env=("VLLM_API_KEY",), secret=True
    )
    max_requests_per_key: int | None = option(
        None,
        "Most requests that one --api-key may have here at once; beyond it that client gets 429 and when to come back",
        "Server",
        low=1,
    )
    root_path: str = option("", "Path prefix that a proxy in front takes away", "Server")
    allowed_origins: tuple[str, ...] = option((), "Web origins that browsers may call from (CORS)", "Server")
    files_dir: str | None = option(
        None,
        "Folder in which /v1/files and /v1/batches keep what they hold, also over a restart; without it these two are "
        "refused",
        "Server",
    )
    shutdown_timeout: float = option(30.0, "Seconds that running requests get to finish after SIGTERM", "Server", low=0)
    log_level: str = option(
        "info",
        "How much is logged",
        "Server",
        aliases=("--uvicorn-log-level",),
        choices=("debug", "info", "warning", "error", "critical"),
    )
    log_file: str | None = option(
        None, "File to which the log is written too; it rotates: --log-file-size, --log-file-count", "Server"
    )
    log_file_size: int = option(
        20_000_000, "Bytes of the log file (20M) after which the next one begins", "Server", low=1
    )
    log_file_count: int = option(5, "Older log files that are kept: FILE.1 is the latest of them", "Server", low=1)
    enable_log_requests: bool = option(False, "One log line per request: sizes and times, never its text", "Server")

    models: tuple[Mapping[str, Any], ...] = option(
        (),
        "Several models behind this port; in a config file a list, each with options of its own, such as "
        "{model: ./a, max-model-len: 8k}. Several --model, or several words, do the same. The first one is loaded at "
        "once, each other one when a request names it",
        "Several models",
    )
    keep_alive: str | None = option(
        None,
        "How long a model that was loaded for a request stays without one, as Ollama writes it: 5m, 1h30m, seconds, "
        "0, or -1 for ever (default 5m; the first model stays). It goes earlier where another one needs its memory",
        "Several models",
        env=("OLLAMA_KEEP_ALIVE",),
    )
    upstream: str | None = option(
        None,
        "Another server, such as http://host:11434 (Ollama) or http://host:8000 (vLLM), that gets the requests for "
        "models that are not here; its key, if it wants one, is the variable PAGODA_UPSTREAM_API_KEY",
        "Several models",
    )
    fallback: bool = option(
        False,
        "Let --upstream also answer for a model of this server that cannot: it loads, its engine is down, its queue "
        "is full. The header x-pagoda-fallback of such an answer says why",
        "Several models",
    )
    fallback_model: str | None = option(
        None, "What the upstream calls the model that answers then; the default is the name asked for", "Several models"
    )

    @property
    def takes_adapters(self) -> bool:
        return self.enable_lora or bool(self.lora_modules)

    def engine_config(self, model_path: str) -> EngineConfig:
        """The engine's part, for a model that is here at `model_path`."""
        return EngineConfig(
            model=model_path,
            device=self.device,
            dtype="auto" if self.dtype in QUANTIZE_ON_LOAD_GPU else _DTYPE.get(self.dtype, self.dtype),
            quantization=self.dtype if self.dtype in QUANTIZE_ON_LOAD_GPU else self.quantization,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            memory_share=self.gpu_memory_utilization,
            kv_cache_bytes=self.kv_cache_memory_bytes,
            kv_cache_dtype=self.kv_cache_dtype,
            enforce_eager=self.enforce_eager,
            attention_backend=self.attention_backend,
            num_blocks=self.num_gpu_blocks_override,
            threads=self.threads,
            tensor_parallel_size=self.tensor_parallel_size,
            distributed_executor_backend=self.distributed_executor_backend,
            prefix_caching=self.enable_prefix_caching,
            step_time_target_s=self.step_time_target,
            speculation=speculation_from(self.speculative_config),
            task=task_of(self.model, self.runner, self.convert, self.task),
            load_format=self.load_format,
            max_loras=(self.max_loras or max(1, len(self.lora_modules)))
            if self.enable_lora or self.lora_modules
            else 0,
            max_lora_rank=self.max_lora_rank,
            mmproj=self.mmproj,
        )


_DTYPE = {"half": "float16", "float": "float32"}


def declared() -> tuple[Setting, ...]:
    """The settings of `Options`, in the order of declaration, those for clients last."""
    out = []
    clients = len(fields(HttpOptions))
    for item in (*fields(Options)[clients:], *fields(HttpOptions)):
        meta = dict(item.metadata)
        kind = meta.pop("kind", str(item.type).removesuffix(" | None"))
        default = {} if kind.startswith("Mapping") else item.default
        out.append(Setting(name=item.name, kind=kind, default=default, **meta))
    return tuple(out)
