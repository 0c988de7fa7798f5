"""What the five guides send to their servers, word for word: vllm replaced by pagoda, the model by a small one."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
import yaml
from server_process import running
from test_cli_seeds import GUIDE_0, GUIDE_1, GUIDE_2, GUIDE_2_COMPOSE, GUIDE_4

MODELS_0 = """{"object": "list", "data": [{"id": "Qwen3-32B-AWQ", "object": "model", "created": 1747804151,
  "owned_by": "vllm", "root": "/home/user/vllm/models/qwen3-32b", "parent": null, "max_model_len": 26624,
  "permission": [{"id": "modelperm-3e852b8991164fd78f680b0cc46777da", "object": "model_permission",
  "created": 1747804151, "allow_create_engine": false, "allow_sampling": true, "allow_logprobs": true,
  "allow_search_indices": false, "allow_view": true, "allow_fine_tuning": false, "organization": "*", "group": null,
  "is_blocking": false}]}]}"""
PYTHON_1 = """
from openai import OpenAI

client = OpenAI(
    base_url = 'http://10.120.47.138:11434/v1',
    api_key='', # required, but unused
)

response = client.chat.completions.create(
  model="./qwen3-32b",
  messages=[
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Who won the world series in 2020?"},
    {"role": "assistant", "content": "The LA Dodgers won in 2020."},
    {"role": "user", "content": "Where was it played?"}
  ]
)
print(response.choices[0].message.content)
"""
CURL_2 = """curl -X POST http://localhost:8000/v1/chat/completions \
  -H "Content-Type: application/json" \
  -d '{
    "model": "meta-llama/Llama-2-7b-chat-hf",
    "messages": [
      {"role": "system", "content": "你是一个有用的助手"},
      {"role": "user", "content": "你好"}
    ],
    "max_tokens": 100,
    "temperature": 0.7
  }'"""
SPRING_2 = """
ai:
  vllm:
    url: http://localhost:8000/v1/chat/completions
    model: meta-llama/Llama-2-7b-chat-hf
    api-key: your-api-key-here  # 可选
    timeout: 180000
    max-tokens: 1024
    temperature: 0.7
    top-p: 0.9
"""
CURL_4 = """curl -s -X POST http://127.0.0.1:20000/v1/chat/completions \
  -H "Content-Type: application/json" \
  -H "Authorization: Bearer dummy" \
  -d '{
    "model": "/mnt/cfs/models/Qwen3-4B-Instruct",
    "messages": [{"role": "user", "content": "用中文简单介绍一下你自己"}]
  }'"""
SMALL = ("--num-gpu-blocks-override", "256", "--max-model-len", "256", "--port", "0")
"""Added to each command: less memory, short answers, and a free port."""


@contextmanager
def served(command: str, folder: Path, model: str, small: str, **environ: str) -> Iterator[str]:
    """The guide's command, run in a folder where its model's path is a link to the small model."""
    link = folder / model.lstrip("./")
    link.parent.mkdir(parents=True, exist_ok=True)
    link = link.with_name(link.name + ".gguf")
    link.symlink_to(small)
    given = shlex.split(command)
    named = ("", *given)  # what stands before each word: a name that clients use stays as it is
    words = [
        str(link) if word == model and before != "--served-model-name" else word
        for before, word in zip(named, given, strict=False)
    ]
    start = next((i for i, w in enumerate(words) if w in ("serve", "pagoda.entrypoints.openai.api_server")), -1)
    with running("-m", "pagoda.cli.main", "serve", *words[start + 1 :], *SMALL, environ=environ) as url:
        yield url


def without(command: str, *flags: str) -> str:
    """The command without what asks for two GPUs, or for the format of the guide's own model."""
    for flag in flags:
        command = command.replace(f"{flag} ", "")
    return command


def curl(command: str, url: str) -> Any:
    if shutil.which("curl") is None:
        pytest.skip("this needs curl")
    for address in ("http://localhost:8000", "http://127.0.0.1:20000"):
        command = command.replace(address, url)
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout.strip() else None


def dify_saves(url: str, model: str, **headers: str) -> None:
    """What Dify sends when a model is saved."""
    body = {"model": model, "max_tokens": 5, "messages": [{"role": "user", "content": "ping"}]}
    reply = httpx.post(url + "/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert reply.status_code == 200 and reply.json()["object"] == "chat.completion"
    assert isinstance(reply.json()["choices"][0]["message"]["content"], str)


def test_guide_0_curl_and_dify(tmp_path: Path, smollm2_path: str) -> None:
    command = without(GUIDE_0, "--tensor-parallel-size 2", "--load-format safetensors", "--quantization awq_marlin")
    with served(command, tmp_path, "/home/user/vllm/models/qwen3-32b", smollm2_path) as url:
        models = curl("curl http://localhost:8000/v1/models", url)
        (expected,) = json.loads(MODELS_0)["data"]
        assert expected.keys() <= models["data"][0].keys() and models["object"] == "list"
        assert expected["permission"][0].keys() <= models["data"][0]["permission"][0].keys()
        assert models["data"][0]["id"] == "Qwen3-32B-AWQ" and models["data"][0]["max_model_len"] == 256
        dify_saves(url, "Qwen3-32B-AWQ")  # the key left empty
        dify_saves(url, "Qwen3-32B-AWQ", Authorization="Bearer EMPTY")
        # The most tokens that its form allows are the context's: they are cut to what is left.
        body = {"model": "Qwen3-32B-AWQ", "max_tokens": 26624, "stream": True, "stop": ["."]}
        body["messages"] = [{"role": "user", "content": "Hi"}]
        assert httpx.post(url + "/v1/chat/completions", json=body, timeout=120).text.endswith("data: [DONE]\n\n")


def test_guide_1_browser_and_openai(tmp_path: Path, smollm2_path: str) -> None:
    command = without(GUIDE_1, "--tensor-parallel-size 2")
    with served(command, tmp_path, "./qwen3-32b", smollm2_path) as url:
        assert httpx.get(url + "/", headers={"accept": "text/html"}).status_code == 200
        # The package takes no empty key since its version 1; any other will do.
        script = PYTHON_1.replace("http://10.120.47.138:11434", url).replace("api_key=''", "api_key='EMPTY'")
        script = script.replace("./qwen3-32b", str(tmp_path / "qwen3-32b.gguf"))
        said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert said.returncode == 0 and said.stdout.strip(), said.stderr


def test_guide_2_curl_and_spring(tmp_path: Path, smollm2_path: str) -> None:
    model = "meta-llama/Llama-2-7b-chat-hf"
    command = f"{GUIDE_2} --served-model-name {model}"
    with served(command, tmp_path, model, smollm2_path) as url:
        assert curl("curl http://localhost:8000/health", url)["status"] == "ready"
        assert curl("curl -f http://localhost:8000/health", url)["status"] == "ready"
        assert curl("curl http://localhost:8000/v1/models", url)["data"][0]["id"] == model
        assert curl(CURL_2, url)["choices"][0]["message"]["content"]
        spring = yaml.safe_load(SPRING_2)["ai"]["vllm"]
        reply = httpx.post(
            spring["url"].replace("http://localhost:8000", url),
            headers={"Authorization": f"Bearer {spring['api-key']}", "Connection": "Upgrade, HTTP2-Settings"}
            | {"Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"},  # as Java's client
            json={
                "model": spring["model"],
                "messages": [{"role": "user", "content": "你好"}],
                "max_tokens": spring["max-tokens"],
                "temperature": spring["temperature"],
                "top_p": spring["top-p"],
                "stream": False,
            },
            timeout=spring["timeout"] / 1000,
        )
        assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"]


def test_guide_2_compose(tmp_path: Path, smollm2_path: str) -> None:
    config = tmp_path / "vllm_config.json"
    config.write_text(json.dumps({"gpu_memory_utilization": 0.8, "dtype": "half", "trust_remote_code": True}))
    command = "serve " + GUIDE_2_COMPOSE.format(config=config)
    name = "Qwen3-4B-I-chat"
    with served(command, tmp_path, f"/models/{name}", smollm2_path, MODEL_NAME=name) as url:
        dify_saves(url, name)


def test_guide_3_back_to_ollama(tmp_path: Path, smollm2_path: str) -> None:
    """Its other half talks to Ollama as `MODEL`; Pagoda is that server too."""
    model = "qwen3:8b"
    with served("serve /m --served-model-name qwen3:8b", tmp_path, "/m", smollm2_path) as url:
        client = ollama.Client(host=url, timeout=120)
        reply = client.chat(model=model, messages=[{"role": "user", "content": "你好"}], options={"num_predict": 12})
        assert reply["message"]["content"] and [each.model for each in client.list().models] == [model]


def test_guide_4_curl_and_ragflow(tmp_path: Path, smollm2_path: str) -> None:
    model = "/mnt/cfs/models/Qwen3-4B-Instruct"
    with served(GUIDE_4, tmp_path, model, smollm2_path) as url:
        name = str(tmp_path / "mnt/cfs/models/Qwen3-4B-Instruct.gguf")
        assert curl(CURL_4.replace(model, name), url)["choices"][0]["message"]["content"]
        assert ragflow_saves(url + "/v1", name, "qwen3-local-key") < 10


def ragflow_saves(base: str, model: str, key: str) -> float:
    """What RAGFlow sends when a model is added: the seconds until the first words, of which it allows ten."""
    listed = httpx.get(base + "/models", headers={"Authorization": f"Bearer {key}"}, timeout=60).json()
    assert model in [each["id"] for each in listed["data"]] and listed["data"][0]["max_tokens"] == 256
    body: dict[str, Any] = {"model": model, "stream": True, "temperature": 0.9, "enable_thinking": False}
    body["messages"] = [{"role": "user", "content": "Hi"}]
    started = time.monotonic()
    with httpx.stream(
        "POST", base + "/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60
    ) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {") and (choices := json.loads(line[6:])["choices"]):
                if choices[0]["delta"].get("content"):
                    return time.monotonic() - started
    raise AssertionError("nothing was said")
