"""DeepSeek-V2 and V3, GLM-4.5 and 4.7: latent attention and grouped experts in each executor, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepseek_cases import CASES, write_case, write_case_gguf
from test_gpt2 import KINDS, LAST, check_chunks, expected, load, logits, relative

Folders = dict[str, tuple[Path, Any]]
KV_ERROR = 5e-3
"""The native executor keeps keys and values in float16."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Each case as safetensors and as tiny.gguf, and the model it came from."""
    made = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case)
        made[case] = (folder, write_case(folder, case))
        write_case_gguf(folder / "tiny.gguf", made[case][1])
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, kind: str, folders: Folders) -> None:
    folder, model = folders[case]
    for path in (folder, folder / "tiny.gguf"):
        executor = load(path, kind)
        assert relative(logits(executor, LAST), expected(model)) < (KV_ERROR if kind == "cpu" else 1e-4)
        executor.close()


@pytest.mark.parametrize("kind", ["cpu", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_a_prompt_in_chunks_and_in_company_has_the_bits_of_the_whole(case: str, kind: str, folders: Folders) -> None:
    executor = load(folders[case][0], kind, quantization="int8")
    check_chunks(executor, 23)
    executor.close()
