"""`pagoda check`: each way in which a model folder can be wrong is found, all at once, with its cure."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import engine_tiny
import numpy as np
import pytest
import vl_tiny
from safetensors.numpy import load_file, save_file

from pagoda.cli.main import main
from pagoda.deploy.check.check import check_model
from pagoda.deploy.findings import Finding, problems

QWEN3_32B = {
    "model_type": "qwen3",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 25600,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(engine_tiny.write(tmp_path / "model"))


def check(path: Path, *, deep: bool = False) -> list[Finding]:
    return check_model(str(path), {}, deep=deep)


def wrong(path: Path, *, deep: bool = False) -> list[Finding]:
    return [finding for finding in check(path, deep=deep) if finding.level == "problem"]


def shard(folder: Path) -> dict[str, list[str]]:
    """Split the weights in three shards with an index; the tensors of each."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {name: file for file, members in parts.items() for name in members}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parts


def test_a_sound_folder_has_no_problem(folder: Path) -> None:
    findings = check(folder)
    assert not problems(findings), findings
    assert {"weights", "architecture", "quantization", "tokenizer", "chat template", "disk"} == {
        f.topic for f in findings
    }


def test_sound_shards_have_no_problem(folder: Path) -> None:
    shard(folder)
    assert not wrong(folder)
    assert "all 3 shards" in next(f.text for f in check(folder) if f.topic == "weights")


def missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def missing_index(folder: Path) -> None:
    missing_shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def pointer(folder: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4294967296\n"
    (folder / "model.safetensors").write_text(text)


def web_page(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("<!DOCTYPE html><html>login</html>")


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(100))


def old_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 20)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def foreign_architecture(folder: Path) -> None:
    change(folder, model_type="mamba2")


def foreign_quantization(folder: Path) -> None:
    change(folder, quantization_config={"quant_method": "bitsandbytes"})


def other_shapes(folder: Path) -> None:
    change(folder, intermediate_size=96)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def large_tokenizer(folder: Path) -> None:
    change(folder, vocab_size=100)


def bad_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}")


def leftover(folder: Path) -> None:
    (folder / "model-00002.safetensors.incomplete").write_bytes(b"x")


def dead_link(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("../blobs/gone")


def empty_file(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_bytes(b"")


def preallocated(folder: Path) -> None:
    """As a downloader that reserved the length and wrote the beginning only."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 4 << 20]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (4 << 20))


def change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("damage", "topic", "says", "cure"),
    [
        (missing_shard, "weights", "1 of the 3 shards are missing: model-00002-of-00003", "Download them into"),
        (missing_index, "weights", "1 of the 3 shards are missing: model-00002-of-00003", "Download them into"),
        (truncated, "weights", "truncated", "Download it again"),
        (pointer, "files", "git-lfs pointer for 4.00 GiB", "lfs pull"),
        (web_page, "files", "web server's answer", "proxy"),
        (pickles_only, "weights", "no directory at its end", "Download it again"),
        (old_pickle, "weights", "before 1.6", "weights_only=True"),
        (garbage, "files", "is damaged", "Download it again"),
        (no_weights, "weights", "holds no weights", "safetensors"),
        (no_config, "config", "config.json is missing", "config.json"),
        (broken_config, "config", "not JSON", "Download"),
        (foreign_architecture, "architecture", "'mamba2' is not supported", "another model"),
        (foreign_quantization, "weights", "bitsandbytes", "awq or gptq"),
        (other_shapes, "weights", "has shape", ""),
        (no_tokenizer, "tokenizer", "no tokenizer.json", "tokenizer.json"),
        (large_tokenizer, "tokenizer", "the model only 100", "another model's"),
        (bad_template, "chat template", "template", ""),
        (leftover, "files", "not finished", "download again"),
        (dead_link, "files", "is a link to ../blobs/gone", "Download"),
        (empty_file, "files", "is empty", "Download"),
        (preallocated, "weights", "never written", "download again"),
    ],
)
def test_damage_is_found(folder: Path, damage: Callable[[Path], None], topic: str, says: str, cure: str) -> None:
    damage(folder)
    found = wrong(folder)
    hits = [f for f in found if f.topic == topic and says in f.text]
    assert hits, found
    assert cure in hits[0].cure


def test_all_findings_come_at_once(folder: Path) -> None:
    missing_shard(folder)
    os.truncate(folder / "model-00001-of-00003.safetensors", 2000)
    no_tokenizer(folder)
    foreign_architecture(folder)
    assert [f.topic for f in wrong(folder)] == ["weights", "weights", "tokenizer", "architecture"]


def test_pickles_beside_safetensors_are_a_note(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    findings = check(folder)
    assert not problems(findings)
    assert "not used" in next(f.text for f in findings if "pytorch_model.bin" in f.text)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permissions(folder: Path) -> None:
    (folder / "config.json").chmod(0)
    assert "chmod -R a+rX" in wrong(folder)[0].cure


def test_permissions_as_root_sees_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "config.json")
    finding = next(f for f in wrong(folder) if f.topic == "permissions")
    assert "config.json is not readable" in finding.text and f"chmod -R a+rX {folder}" in finding.cure


@pytest.mark.alone
def test_a_32b_folder_takes_less_than_a_second(folder: Path) -> None:
    """Real sizes in sparse files: that they are sparse is the one thing that is wrong."""
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(QWEN3_32B))
    write_sparse(folder, 17)
    started = time.perf_counter()
    found = wrong(folder)
    assert time.perf_counter() - started < 1
    assert len(found) == 17 and all("never written" in f.text for f in found)
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) > 65_000_000_000


def write_sparse(folder: Path, count: int) -> None:
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [151936, 5120], "model.norm.weight": [5120]}
    shapes["lm_head.weight"] = [151936, 5120]
    for i in range(64):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": [5120], p + "post_attention_layernorm.weight": [5120]}
        shapes |= {f"{p}self_attn.{n}_norm.weight": [128] for n in "qk"}
        for name, shape in {"q": [8192, 5120], "k": [1024, 5120], "v": [1024, 5120], "o": [5120, 8192]}.items():
            shapes[f"{p}self_attn.{name}_proj.weight"] = shape
        for name, shape in {"gate": [25600, 5120], "up": [25600, 5120], "down": [5120, 25600]}.items():
            shapes[f"{p}mlp.{name}_proj.weight"] = shape
    names, weight_map = list(shapes), {}
    for part in range(count):
        header, end = {}, 0
        file = f"model-{part + 1:05}-of-{count:05}.safetensors"
        for name in names[part::count]:
            size = 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + size]}
            end, weight_map[name] = end + size, file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_deep_counts_nan_and_infinity(folder: Path) -> None:
    assert not wrong(folder, deep=True)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    bad = tensors[name].copy()
    bad[0, :2], bad[1, 0] = np.nan, np.inf
    save_file({**tensors, name: bad}, folder / "model.safetensors")
    assert f"{name} holds 3 NaN or infinite values" in wrong(folder, deep=True)[0].text


@pytest.mark.parametrize("right", [True, False])
def test_deep_compares_hashes_where_the_download_left_them(folder: Path, right: bool) -> None:
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    notes = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    notes.parent.mkdir(parents=True)
    notes.write_text(f"{'a' * 40}\n{digest if right else 'b' * 64}\n1.0\n")
    assert [f.topic for f in wrong(folder, deep=True)] == ([] if right else ["hash"])


def test_gguf(smollm2_path: str, tmp_path: Path) -> None:
    assert not wrong(Path(smollm2_path))
    cut = tmp_path / "model.gguf"
    with open(smollm2_path, "rb") as file:
        cut.write_bytes(file.read(8 << 20))
    assert "truncated" in wrong(cut)[0].text
    assert "truncated" in wrong(tmp_path)[0].text


def test_a_path_that_is_not_there_is_a_finding(tmp_path: Path) -> None:
    assert wrong(tmp_path / "nothing")[0].topic == "path"


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder)]) == 0
    assert f"pagoda serve {folder}" in capsys.readouterr().out
    no_tokenizer(folder)
    assert main(["check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "FAIL  tokenizer" in out and "  -> " in out
    assert main(["check", "--json", str(folder)]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False and told["model"] == str(folder)
    assert {"level", "topic", "text", "cure"} == set(told["findings"][0])


@pytest.mark.parametrize("words", [["check"], ["check", "--what", "x"], ["check", "a", "b"]])
def test_wrong_usage(words: list[str]) -> None:
    assert main(words) == 78


def test_a_model_that_sees(tmp_path: Path) -> None:
    """How large its images may be stands in a file of its own; without it, the model's family says it."""
    folder = Path(vl_tiny.write(tmp_path))
    assert not wrong(folder)
    said = {finding.topic: finding for finding in check(folder)}
    assert said["architecture"].text == "qwen2_5_vl, 2 layers, context 512"
    assert said["images"].level == "ok" and "pictures and videos" in said["images"].text
    (folder / "preprocessor_config.json").unlink()
    missing = next(finding for finding in check(folder) if finding.topic == "images")
    assert missing.level == "note" and "preprocessor_config.json is missing" in missing.text
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5], "image_std": 1}')
    assert "image_mean is [0.5, 0.5]" in next(f.text for f in check(folder) if f.level == "problem")
