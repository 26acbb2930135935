"""From a Hugging Face folder to answers: converted and compiled once into the cache, and the model card's example."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import serve_hub, use_hub
from tiny import tiny_step_config

from elastic_jax import loading
from elastic_jax.errors import CheckpointError, ExecutableError
from elastic_jax.step import Bucket
from elastic_jax.transformers import AutoModelForCausalLM, AutoTokenizer, sources

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
FOLDER = FIXTURES / "tiny_mistral"

CARD = """
from transformers import AutoModelForCausalLM, AutoTokenizer
checkpoint = "HuggingFaceTB/SmolLM2-135M-Instruct"

device = "cpu" # for GPU usage or "cpu" for CPU usage
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
# for multiple GPUs install accelerate and do `model = AutoModelForCausalLM.from_pretrained(..., device_map="auto")`
model = AutoModelForCausalLM.from_pretrained(checkpoint).to(device)

messages = [{"role": "user", "content": "What is the capital of France."}]
input_text=tokenizer.apply_chat_template(messages, tokenize=False)
print(input_text)
inputs = tokenizer.encode(input_text, return_tensors="pt").to(device)
outputs = model.generate(inputs, max_new_tokens=50, temperature=0.2, top_p=0.9, do_sample=True)
print(tokenizer.decode(outputs[0]))
"""
"""The example of SmolLM2-135M-Instruct's model card, as it stands there but for the device."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for the tests of this file, and few steps, which compile in seconds: their sizes change nothing here."""

    def small(_: Any, __: str, dtype: Any, **___: Any) -> Any:
        return tiny_step_config(dtype=dtype, buckets=(Bucket(4, 0), Bucket(0, 64)))

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELASTIC_JAX_CACHE", str(folder))
        patch.setattr(loading, "default_step_config", small)
        yield folder


def test_a_folder_is_converted_and_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ELASTIC_JAX_CACHE", str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match=r'compile is "never".*elastic-jax convert'):
        AutoModelForCausalLM.from_pretrained(FOLDER, compile="never")
    assert not (tmp_path / "empty").exists()
    monkeypatch.setenv("ELASTIC_JAX_CACHE", str(cache))
    said: list[str] = []
    model = AutoModelForCausalLM.from_pretrained(str(FOLDER), mode="S", say=said.append)
    assert any("is converted once" in line and "GB" in line for line in said)
    assert "converting: 100 %" in said
    assert any("compiling mode S" in line for line in said)
    tokenizer = AutoTokenizer.from_pretrained(str(FOLDER))
    inputs = tokenizer("Hello you", return_tensors="np")
    expected = model.generate(**inputs, max_new_tokens=5).tolist()
    again: list[str] = []
    model = AutoModelForCausalLM.from_pretrained(FOLDER, mode="S", compile="never", say=again.append)
    assert again == []
    assert model.generate(**inputs, max_new_tokens=5).tolist() == expected
    with pytest.raises(ExecutableError, match="no compiled executables"):
        AutoModelForCausalLM.from_pretrained(FOLDER, mode="M", compile="never")


def test_a_hub_id_is_downloaded_and_converted_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options: Any = {"revision": None, "token": None, "workers": 1, "say": lambda _: None}
    with serve_hub() as hub:
        hub.add("owner/tiny", FOLDER)
        use_hub(monkeypatch, hub, tmp_path / "hub")
        monkeypatch.chdir(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained("owner/tiny")
        assert "model.safetensors" not in hub.downloaded
        local = AutoTokenizer.from_pretrained(FOLDER)
        assert tokenizer.encode("Hello you") == local.encode("Hello you")
        with pytest.raises(CheckpointError, match='compile is "never"'):
            sources.find_checkpoint("owner/tiny", compile="never", **options)
        found = sources.find_checkpoint("owner/tiny", compile="once", **options)
        assert Path(found.path).parent == cache / "converted"
        hub.forget()
        assert sources.find_checkpoint("owner/tiny", compile="never", **options) == found
        assert hub.downloaded == []
        hub.add("owner/elastic", Path(found.path))
        assert sources.find_checkpoint("owner/elastic", compile="never", **options).path == "owner/elastic"
        elastic = AutoTokenizer.from_pretrained("owner/elastic")
        assert elastic.encode("Hello you") == local.encode("Hello you")
        assert not any(name.startswith("weights/") for name in hub.downloaded)


def test_another_source_is_another_model(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny_mistral"
    other.mkdir()
    for file in FOLDER.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    found = len(list((cache / "converted").glob("*.elastic")))
    options: Any = {"revision": None, "token": None, "compile": "once", "workers": 1, "say": lambda _: None}
    first = sources.find_checkpoint(FOLDER, **options)
    assert sources.find_checkpoint(other, **options) == first  # the same files elsewhere
    config = other / "tokenizer_config.json"
    config.write_text(config.read_text().replace("512", "500"))
    assert sources.find_checkpoint(other, **options) != first
    assert len(list((cache / "converted").glob("*.elastic"))) <= found + 2


def test_the_model_cards_example_runs_with_only_the_import_changed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the tiny model under the name of the card's, so that it is quick; a slow test runs it on the card's own."""
    source = CARD.replace("from transformers import", "from elastic_jax.transformers import")
    source = source.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(FOLDER))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch is not installed
        exec(source, {})
    printed = capsys.readouterr().out
    assert "What is the capital of France." in printed


@pytest.mark.slow
def test_the_model_cards_example_answers_with_the_cards_model(tmp_path: Path, smollm2_gguf: Path) -> None:
    """The whole way in a fresh process, with the sizes that are compiled by default."""
    source = CARD.replace("from transformers import", "from elastic_jax.transformers import")
    source = source.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(smollm2_gguf))
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={"PATH": "", "HOME": str(tmp_path), "ELASTIC_JAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_a_cache_that_cannot_be_written_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("a file, and no folder")
    monkeypatch.setenv("ELASTIC_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        CheckpointError, match=r"cannot write to the cache .*file: .*; set ELASTIC_JAX_CACHE to another"
    ):
        AutoModelForCausalLM.from_pretrained(FOLDER, mode="M")
