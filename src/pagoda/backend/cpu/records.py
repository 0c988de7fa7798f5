"""What the native library reads and writes: its numbers and structures, as native/src/pagoda.h has them."""

from __future__ import annotations

import ctypes as c

TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "BF16": 30, "MXFP4": 39,
    "U4G": 100, "U8G": 101,
}  # fmt: skip
"""Storage types that the kernels run, with their ids in native/src/pagoda.h."""

EMBED, NORM, GATHER, MATMUL, ROPE, ATTENTION, SILU, HEAD, HIDDEN, POSITIONS, LAYER_NORM, GELU, ATTEND_ALL = range(13)
ROUTE, EXPERTS_UP, EXPERTS_DOWN, GATED = range(13, 17)
PATCHES, QUICK_GELU, GELU_TANH, DELTA, OUT_GATE, GATED_GELU_TANH = range(17, 23)
ADD_SCALED = 48
LATENT_KEY, ABSORB, EXPAND, ADD_VECTORS, GRID, ADAPT, MEAN, GATED_GELU, RELU2 = *range(23, 29), 40, 41, 42
CONVOLVE, SCAN, NORM_GATED = range(43, 46)
KV_F16, KV_INT8, KV_BF16 = range(3)
ZERO, GELU_TIMES = 50, 51
ADD, LOGIT_ROWS, FRAMES, PIECES, CLAMPED, STILL, LOCAL, WHOLE, LATE, SQUARED = 1, 4, 8, 16, 32, 64, 128, 256, 512, 1024
QUERIES, NORM_VALUES, GELU_UP = 2048, 4096, 8192
TOKENS, LOGITS, PIECE = range(3)


class Part(c.Structure):
    _fields_ = [
        ("data", c.c_void_p), ("rows", c.c_int64), ("k", c.c_int64), ("type", c.c_int32), ("quantize", c.c_int32),
    ]  # fmt: skip


class BufferShape(c.Structure):
    """`rows`: one of TOKENS, LOGITS, PIECE."""

    _fields_ = [("width", c.c_int64), ("rows", c.c_int32)]


class Op(c.Structure):
    """One operation of a program; see native/src/pagoda.h for what each field means to which kind."""

    _fields_ = [
        ("kind", c.c_int32), ("in_", c.c_int32), ("out", c.c_int32), ("weight", c.c_int32), ("vector", c.c_int32),
        ("vector2", c.c_int32), ("layer", c.c_int32), ("flags", c.c_int32), ("f", c.c_float), ("window", c.c_int32),
        ("order", c.c_int32), ("f2", c.c_float),
    ]  # fmt: skip


class Delta(c.Structure):
    _fields_ = [
        (name, c.c_int32)
        for name in ("layers", "key_heads", "value_heads", "key_dim", "value_dim", "kernel", "tiled", "slots", "parts")
    ]


class Latent(c.Structure):
    _fields_ = [(name, c.c_int32) for name in ("rank", "nope", "value_dim")]


class Heads(c.Structure):
    _fields_ = [(name, c.c_int32) for name in ("layers", "kv_heads", "head_dim", "rope_dim")]


class Router(c.Structure):
    _numbers = ("experts", "active", "normalized", "sigmoid", "groups", "active_groups", "group_best")
    _fields_ = [*((name, c.c_int32) for name in _numbers), ("scale", c.c_float)]


class Dims(c.Structure):
    _fields_ = [
        *((name, c.c_int32) for name in (
            "layers", "heads", "kv_heads", "head_dim", "vocab", "max_tokens", "max_rows", "num_blocks", "rope_dim",
            "rope_interleaved",
        )),
        ("rope_factor", c.c_float),
        ("inv_freq", c.c_void_p),
        ("kv", c.c_int32),
        ("router", Router),
        ("piece_rows", c.c_int32),
        ("rope_axes", c.c_void_p),
        ("delta", Delta),
        ("local_inv_freq", c.c_void_p),
        ("local_factor", c.c_float),
        ("query_beta", c.c_float),
        ("query_length", c.c_int32),
        ("latent", Latent),
        ("local", Heads),
    ]  # fmt: skip


class LowRank(c.Structure):
    _fields_ = [
        ("weight", c.c_int32),
        *((name, c.c_int64) for name in ("rank", "column", "outputs")),
        ("down", c.c_void_p),
        ("up", c.c_void_p),
    ]


class Picture(c.Structure):
    _fields_ = [
        ("pixels", c.c_void_p),
        *((name, c.c_int32) for name in ("frames", "height", "width", "patch_size", "together")),
        ("mean", c.c_float * 3),
        ("spread", c.c_float * 3),
    ]


PLAN_ARRAYS = (
    "slots", "starts", "positions", "tokens", "block_tables", "rows", "row_request", "row_target", "row_top",
    "temperature", "top_k", "top_p", "min_p", "presence", "frequency", "repetition", "seed", "history_start",
    "history_ids", "history_counts", "bias_start", "bias_ids", "bias_values", "row_mask", "masks", "second_texts",
    "rope_positions", "adapters", "last_seen", "kept",
)  # fmt: skip
RESULT_ARRAYS = ("tokens", "logprobs", "top_ids", "top_logprobs", "ok")


class Step(c.Structure):
    _fields_ = [
        *((name, c.c_int32) for name in ("requests", "tokens_count", "rows_count", "table_width", "top_width")),
        ("mask_width", c.c_int32),
        *((name, c.c_void_p) for name in (*PLAN_ARRAYS, "vectors", "vector_of", "frames")),
        *((name, c.c_int32) for name in ("frames_count", "vectors_width", "hidden_width")),
        ("picture", c.POINTER(Picture)),
        *(("out_" + name, c.c_void_p) for name in RESULT_ARRAYS),
        ("out_logits", c.c_void_p),
        ("out_hidden", c.c_void_p),
    ]
