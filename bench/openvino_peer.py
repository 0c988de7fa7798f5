#!/usr/bin/env python3
"""OpenVINO GenAI on the CPU, in process: the workloads of cpu.py with its continuous batching; prints JSON.

    PYTHON_WITH_OPENVINO_GENAI bench/openvino_peer.py MODEL_DIR --threads 2

MODEL_DIR is an exported text-generation model (`optimum-cli export openvino --weight-format int8`). There is no HTTP in
between, which is to its advantage. Prompts are random token ids, 128 in and 128 out; the shared prefix has 512 tokens,
16 own ones and 32 out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai


class Peer:
    def __init__(self, model: str, threads: int, precision: str = "") -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 2
        scheduler.max_num_seqs = 32
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        options: dict[str, int | str] = {"INFERENCE_NUM_THREADS": threads}
        if precision:
            options["INFERENCE_PRECISION_HINT"] = precision
        self._pipe = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", options)

    def wall_s(self, prompts: list[list[int]], output: int) -> float:
        """Seconds until all prompts, sent together, have all their tokens."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output
        config.ignore_eos, config.do_sample = True, False
        tensors = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        started = time.perf_counter()
        results = self._pipe.generate(tensors, [config] * len(prompts))
        wall_s = time.perf_counter() - started
        if any(len(each.m_generation_ids[0]) != output for each in results):
            sys.exit("an answer was cut short")
        return wall_s


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="", help="f32 where ONEDNN_MAX_CPU_ISA=AVX2 keeps it from bf16")
    a = parser.parse_args()
    peer, rng = Peer(a.model, a.threads, a.precision), random.Random(1)

    def ids(count: int) -> list[int]:
        return [rng.randrange(100, 40000) for _ in range(count)]

    peer.wall_s([ids(4)], 1)
    out: dict[str, Any] = {
        "openvino": openvino.get_version(),
        "first_token_in_process_s": time.perf_counter() - started,
    }
    peer.wall_s([ids(64)], 8)
    out["prefill_512"] = 512 / min(peer.wall_s([ids(512)], 1) for _ in range(3))
    first_s = min(peer.wall_s([ids(128)], 1) for _ in range(3))
    out["decode"] = 127 / (min(peer.wall_s([ids(128)], 128) for _ in range(2)) - first_s)
    for streams in (1, 16, 32):
        out[f"throughput_c{streams}"] = streams * 128 / peer.wall_s([ids(128) for _ in range(streams)], 128)
    prefix = ids(512)
    out["prefix_cold_s"] = peer.wall_s([prefix + ids(16) for _ in range(16)], 32)
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
