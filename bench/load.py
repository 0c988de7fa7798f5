#!/usr/bin/env python3
"""HTTP load for any OpenAI-compatible /v1/completions server; prints one JSON document.

Workloads (--workloads, comma separated, in this order):
  decode      one stream: prompt 128, 128 output tokens; decode rate = (n-1)/(t_last - t_first)
  prefill     one request at a time, 1 output token; prompt sizes --prefill-sizes; rate = prompt/TTFT
  throughput  closed loop at each --concurrency: distinct ~128-token prompts, 128 output tokens
  prefix      16 requests sharing a 512-token prefix, 32 output tokens:
                distinct (no sharing: the yardstick), cold (nobody saw the prefix before),
                warm (one request with it was answered before)
  pause       --pause-streams streams run, then a prompt of --pause-prompt tokens arrives: the longest gap between
                two chunks of the running streams, with and without it, and the time to the long prompt's first token

Every request: temperature 0, stream, ignore_eos, max_tokens = wanted output.  Prompts are token-like text (common
English words, one token each in the usual BPE vocabularies), seeded, and differ in their first words, so that a prefix
cache finds nothing except where the workload shares a prefix on purpose.  Sizes are what the SERVER counted
(usage.prompt_tokens / usage.completion_tokens, asked for with stream_options.include_usage); without usage, chunks
are counted and "counted_by" says so.  Chunks are stored with their arrival time and parsed after the run, so that
the client costs little.  TTFT = request sent -> first chunk with a choice; ITL = gaps between such chunks.

Needs: Python >= 3.9 and aiohttp.  Only ever point it at a server of your own.
"""

import argparse
import asyncio
import json
import random
import resource
import statistics
import sys
import time

import aiohttp

WORDS = """time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point home water
room mother area money story fact month lot right study book eye job word business issue side kind head house
service friend father power hour game line end member law car city community name president team minute idea kid
body information back parent face others level office door health person art war history party result change
morning reason research girl guy moment air teacher force education foot boy age policy music market sense nation
plan college interest death course someone experience behind reach local six large million second street paper
space ground form support event official matter center couple site project base hit star table need court oil
situation cost industry figure road land simply field step effort model price report season west board voice rate
unit rule view window door chair river stone light green black white small great young long little old high low
early late hard easy open close strong weak full empty clear dark warm cold fast slow rich poor deep wide near far
""".split()


def words(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def pct(xs, p):
    if not xs:
        return None
    xs = sorted(xs)
    k = (len(xs) - 1) * p / 100.0
    i = int(k)
    j = min(i + 1, len(xs) - 1)
    return xs[i] + (xs[j] - xs[i]) * (k - i)


def ms(x):
    return None if x is None else round(1000 * x, 2)


class Req:
    __slots__ = ("cached", "chunks", "counted_by", "err", "out_tokens", "prompt_tokens", "t0", "t1", "times")


async def one(session, a, prompt, n_out):
    body = {
        "model": a.model,
        "prompt": prompt,
        "max_tokens": n_out,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    body.update(a.extra_body)
    r = Req()
    r.chunks, r.err = [], None
    r.t0 = time.perf_counter()
    try:
        async with session.post(a.base_url + "/completions", json=body) as resp:
            if resp.status != 200:
                r.err = f"HTTP {resp.status}: {(await resp.text())[:300]}"
            else:
                async for line in resp.content:
                    if line.startswith(b"data:"):
                        r.chunks.append((time.perf_counter(), line))
    except Exception as e:  # one failed request must not hide the others
        r.err = f"{type(e).__name__}: {e}"
    r.t1 = time.perf_counter()
    return r


def digest(r):
    """Parse the stored chunks: usage and the arrival times of chunks that carried a token."""
    r.times, r.prompt_tokens, r.out_tokens, r.cached = [], None, None, None
    for t, line in r.chunks:
        data = line[5:].strip()
        if not data or data == b"[DONE]":
            continue
        d = json.loads(data)
        if d.get("error"):
            r.err = json.dumps(d["error"])[:300]
        u = d.get("usage")
        if u:
            r.prompt_tokens, r.out_tokens = u.get("prompt_tokens"), u.get("completion_tokens")
            r.cached = (u.get("prompt_tokens_details") or {}).get("cached_tokens")
        ch = d.get("choices") or []
        if ch and (ch[0].get("text") or not ch[0].get("finish_reason") or not r.times):
            r.times.append(t)
    r.counted_by = "usage" if r.out_tokens is not None else "chunks"
    if r.out_tokens is None:
        r.out_tokens = len(r.times)
    r.chunks = None
    return r


async def closed_loop(session, a, prompts, conc, n_out):
    """Keep `conc` requests in flight until all prompts are answered."""
    it = iter(prompts)
    done = []

    async def worker():
        for p in it:
            done.append(await one(session, a, p, n_out))

    cpu0, t0 = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    await asyncio.gather(*[worker() for _ in range(conc)])
    wall = time.perf_counter() - t0
    cpu1 = resource.getrusage(resource.RUSAGE_SELF)
    cpu = (cpu1.ru_utime + cpu1.ru_stime) - (cpu0.ru_utime + cpu0.ru_stime)
    return [digest(r) for r in done], wall, cpu


def summary(rs, wall, cpu, n_out):
    ok = [r for r in rs if not r.err and r.times]
    ttft = [r.times[0] - r.t0 for r in ok]
    itl = [b - x for r in ok for x, b in zip(r.times, r.times[1:], strict=False)]
    out = sum(r.out_tokens for r in ok)
    inp = [r.prompt_tokens for r in ok if r.prompt_tokens is not None]
    d = {
        "requests": len(rs),
        "failed": len(rs) - len(ok),
        "wall_s": round(wall, 3),
        "out_tokens": out,
        "out_tok_s": round(out / wall, 2),
        "total_tok_s": round((out + sum(inp)) / wall, 2),
        "prompt_tokens_median": statistics.median(inp) if inp else None,
        "cached_tokens": sum(r.cached or 0 for r in ok),
        "ttft_ms_p50": ms(pct(ttft, 50)),
        "ttft_ms_p99": ms(pct(ttft, 99)),
        "itl_ms_p50": ms(pct(itl, 50)),
        "itl_ms_p99": ms(pct(itl, 99)),
        "client_cpu_s": round(cpu, 3),
        "counted_by": ok[0].counted_by if ok else None,
    }
    short = [r.out_tokens for r in ok if r.out_tokens != n_out]
    if short:
        d["wrong_length"] = len(short)
        d["wrong_length_seen"] = sorted(set(short))[:5]
    if len(ok) < len(rs):
        d["first_error"] = next((r.err for r in rs if r.err), "no token chunk")
    return d


async def pause(session, a, prompt):
    """Running streams while a long prompt comes in: the longest gap between their chunks then, and before."""
    running = [asyncio.create_task(one(session, a, prompt(a.prompt), a.pause_output)) for _ in range(a.pause_streams)]
    await asyncio.sleep(a.pause_after)
    late = digest(await one(session, a, prompt(a.pause_prompt), 1))
    done = [digest(r) for r in await asyncio.gather(*running)]
    errors = [r.err for r in [late, *done] if r.err]
    if errors or not late.times:
        return {"failed": len(errors), "first_error": errors[0] if errors else "no token chunk"}
    end = late.times[0]
    gaps = [(x, b - x) for r in done for x, b in zip(r.times, r.times[1:], strict=False)]
    during = [gap for x, gap in gaps if late.t0 <= x + gap and x <= end]
    before = [gap for x, gap in gaps if x + gap < late.t0]
    return {
        "failed": 0,
        "pause_ms": ms(max(during, default=None)),
        "pause_ms_p50": ms(pct(during, 50)),
        "itl_ms_p50": ms(pct(before, 50)),
        "itl_ms_max": ms(max(before, default=None)),
        "long_ttft_ms": ms(end - late.t0),
        "long_prompt_tokens": late.prompt_tokens,
        "out_tok_s": round(sum(r.out_tokens for r in done) / (max(r.t1 for r in done) - min(r.t0 for r in done)), 2),
    }


def med(runs, key):
    v = [r[key] for r in runs if r.get(key) is not None]
    return round(statistics.median(v), 2) if v else None


def rounds(runs):
    keys = (
        "out_tok_s",
        "total_tok_s",
        "ttft_ms_p50",
        "ttft_ms_p99",
        "itl_ms_p50",
        "itl_ms_p99",
        "wall_s",
        "decode_tok_s",
        "prompt_tok_s",
        "failed",
        "prompt_tokens_median",
        "cached_tokens",
        "client_cpu_s",
        "pause_ms",
        "pause_ms_p50",
        "itl_ms_max",
        "long_ttft_ms",
        "long_prompt_tokens",
    )
    return {"median": {k: med(runs, k) for k in keys if any(k in r for r in runs)}, "runs": runs}


async def main_async(a):
    out = {"label": a.label, "model": a.model, "seed": a.seed, "repeats": a.repeats, "results": {}}
    rng = random.Random(a.seed)
    to = aiohttp.ClientTimeout(total=None, sock_read=a.timeout)
    conn = aiohttp.TCPConnector(limit=0, force_close=True)  # servers drop idle connections at their own times
    async with aiohttp.ClientSession(timeout=to, connector=conn) as s:
        # how many words make N tokens here: a probe, answered by the server's own count
        p = digest(await one(s, a, words(rng, 200), 1))
        if p.err:
            sys.exit("probe failed: " + p.err)
        ratio = (p.prompt_tokens / 200.0) if p.prompt_tokens else 1.0
        out["tokens_per_word"] = round(ratio, 3)

        def prompt(n_tok):
            return words(rng, max(1, round(n_tok / ratio)))

        R = out["results"]
        for _ in range(a.warmup):
            await closed_loop(s, a, [prompt(a.prompt) for _ in range(2)], 2, 16)
        for w in a.workloads:
            if w == "decode":
                runs = []
                for _ in range(a.repeats):
                    rs, wall, cpu = await closed_loop(s, a, [prompt(a.prompt)], 1, a.output)
                    d = summary(rs, wall, cpu, a.output)
                    r = rs[0]
                    if not r.err and len(r.times) > 1:
                        d["decode_tok_s"] = round((r.out_tokens - 1) / (r.times[-1] - r.times[0]), 2)
                    runs.append(d)
                R["decode"] = rounds(runs)
            elif w == "prefill":
                for n in a.prefill_sizes:
                    runs = []
                    for _ in range(a.repeats):
                        rs, wall, cpu = await closed_loop(s, a, [prompt(n)], 1, 1)
                        d = summary(rs, wall, cpu, 1)
                        r = rs[0]
                        if not r.err and r.times and r.prompt_tokens:
                            d["prompt_tok_s"] = round(r.prompt_tokens / (r.times[0] - r.t0), 2)
                        runs.append(d)
                    R[f"prefill_{n}"] = rounds(runs)
            elif w == "throughput":
                for c in a.concurrency:
                    runs = []
                    for _ in range(a.repeats):
                        n = max(c, c * a.per_stream)
                        rs, wall, cpu = await closed_loop(s, a, [prompt(a.prompt) for _ in range(n)], c, a.output)
                        runs.append(summary(rs, wall, cpu, a.output))
                    R[f"throughput_c{c}"] = rounds(runs)
            elif w == "prefix":
                n, kinds = a.prefix_requests, {"distinct": [], "cold": [], "warm": []}
                for _ in range(a.repeats):
                    for kind in kinds:
                        head = prompt(a.prefix)
                        heads = [head if kind != "distinct" else prompt(a.prefix) for _ in range(n)]
                        if kind == "warm":
                            await one(s, a, head + " " + prompt(16), 1)
                        rs, wall, cpu = await closed_loop(
                            s, a, [h + " " + prompt(16) for h in heads], n, a.prefix_output
                        )
                        kinds[kind].append(summary(rs, wall, cpu, a.prefix_output))
                for kind, runs in kinds.items():
                    R["prefix_" + kind] = rounds(runs)
            elif w == "pause":
                R["pause"] = rounds([await pause(s, a, prompt) for _ in range(a.repeats)])
            else:
                sys.exit("unknown workload " + w)
            print(f"# {w} done", file=sys.stderr, flush=True)
    if not a.full:
        for k in out["results"]:
            runs = out["results"][k].pop("runs")
            errs = [r["first_error"] for r in runs if "first_error" in r]
            rates = [r["out_tok_s"] for r in runs if "out_tok_s" in r]
            if rates:
                out["results"][k]["out_tok_s_min_max"] = [min(rates), max(rates)]
            if errs:
                out["results"][k]["first_error"] = errs[0]
            wl = sum(r.get("wrong_length", 0) for r in runs)
            if wl:
                out["results"][k]["wrong_length"] = wl
    return out


def main():
    def ints(s):
        return [int(x) for x in s.split(",")]

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base-url", required=True, help="such as http://127.0.0.1:8000/v1")
    p.add_argument("--model", default="default")
    p.add_argument("--label", default="")
    p.add_argument("--workloads", type=lambda s: s.split(","), default="decode,prefill,throughput,prefix".split(","))
    p.add_argument("--concurrency", type=ints, default=[1, 4, 16, 32])
    p.add_argument("--per-stream", type=int, default=1, help="requests per concurrent stream in one round")
    p.add_argument("--prompt", type=int, default=128)
    p.add_argument("--output", type=int, default=128)
    p.add_argument("--prefill-sizes", type=ints, default=[512, 1024])
    p.add_argument("--prefix", type=int, default=512)
    p.add_argument("--prefix-requests", type=int, default=16)
    p.add_argument("--prefix-output", type=int, default=32)
    p.add_argument("--pause-streams", type=int, default=1)
    p.add_argument("--pause-prompt", type=int, default=2000)
    p.add_argument("--pause-output", type=int, default=400)
    p.add_argument("--pause-after", type=float, default=0.6, help="seconds before the long prompt is sent")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--warmup", type=int, default=1)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--timeout", type=float, default=300)
    p.add_argument("--extra-body", type=json.loads, default={}, help="JSON merged into every request")
    p.add_argument("--full", action="store_true", help="print every round, not only the medians")
    a = p.parse_args()
    a.base_url = a.base_url.rstrip("/")
    json.dump(asyncio.run(main_async(a)), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
