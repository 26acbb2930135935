"""The commands as they are called: what they print where, and what status they end with."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hub_server import TOKEN, HubServer, serve_hub, use_hub
from tiny import FIXTURES, CompiledTiny, tiny_step_config

from elastic_jax import ElasticMistral, cli, executables
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.engine import Engine
from elastic_jax.executables import ModeStore
from elastic_jax.step import StepConfig

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}


class Called(NamedTuple):
    status: int
    out: str
    err: str


type Call = Callable[..., Called]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the program in this process."""

    def called(*arguments: Any, stdin: bytes = b"", program: Callable[[], None] = cli.main) -> Called:
        monkeypatch.setattr(sys, "argv", ["elastic-jax", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            program()
        out, err = capsys.readouterr()
        status = ended.value.code
        assert isinstance(status, int)
        return Called(status, out, err)

    return called


@pytest.fixture(scope="module")
def compiled(compiled_tiny: Callable[..., CompiledTiny]) -> CompiledTiny:
    return compiled_tiny("XL", "float32")


@pytest.fixture
def folder(compiled: CompiledTiny, tmp_path: Path) -> Path:
    """A copy of the checkpoint with one store, to be spoilt."""
    copy = tmp_path / "tiny.elastic"
    hidden = shutil.ignore_patterns(".*.partial", ".*.old", "S", "M", "L")
    shutil.copytree(compiled.checkpoint.path, copy, ignore=hidden)
    return copy


def generate(call: Call, path: Path, *arguments: Any, stdin: bytes = b"") -> Called:
    return call("generate", path, "--mode", "XL", "--dtype", "float32", *arguments, stdin=stdin)


def assert_refused(called: Called, *words: str) -> None:
    """One message, status 1, nothing printed as a result."""
    assert called.status == 1
    assert called.out == ""
    assert called.err.startswith("error: ")
    assert "Traceback" not in called.err
    for word in words:
        assert word in called.err


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from elastic_jax import cli\n"
        "sys.argv = ['elastic-jax', '--help']\n"
        "try:\n"
        "    cli.main()\n"
        "finally:\n"
        "    heavy = {'jax', 'numpy', 'orbax', 'tokenizers', 'transformers'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    seconds = time.perf_counter() - start
    assert done.stderr.strip() == "[]"
    for command in ("convert", "compile", "verify", "info", "generate", "demo"):
        assert f" {command} " in done.stdout
    assert seconds < 5  # 0.4 s where nothing else runs


@pytest.mark.parametrize("command", ["convert", "compile", "verify", "info", "generate", "demo"])
def test_every_command_explains_itself_and_has_json(call: Call, command: str) -> None:
    called = call(command, "--help")
    assert called.status == 0
    assert "--json" in called.out


def test_convert_weights_is_a_program_of_its_own(call: Call) -> None:
    called = call("--help", program=cli.convert_weights)
    assert called.status == 0
    assert "SOURCE" in called.out.upper()
    assert "--overwrite" in called.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("bogus",),
        ("info",),
        ("generate", "x", "--temperature", "hot"),
        ("generate", "x", "--dtype", "int4"),
        ("generate", "x", "--max-new-tokens", "0"),
        ("generate", "x", "--on-missing", "guess"),
        ("compile", "x", "--kv-slots", "0"),
        ("convert", "x"),
        ("convert", "x", "y", "--only", "int4"),
        ("info", "x", "--nonsense"),
    ],
)
def test_a_wrong_usage_is_status_2(call: Call, arguments: tuple[str, ...]) -> None:
    called = call(*arguments)
    assert called.status == 2
    assert called.out == ""
    assert "Usage" in called.err


# -- convert -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [cli.main, cli.convert_weights])
def test_convert_makes_a_checkpoint_and_keeps_it(call: Call, tmp_path: Path, program: Callable[[], None]) -> None:
    command = ("convert",) if program is cli.main else ()
    arguments = (*command, FIXTURES / "tiny_mistral", tmp_path / "new")
    called = call(*arguments, program=program)
    assert called.status == 0
    assert called.out.startswith(f"{tmp_path / 'new'}: ")
    assert all(f"{mode} (" in called.out for mode in ("XL", "L", "M", "S"))
    assert "converted" in called.err
    assert call(*arguments, program=program).err == ""  # nothing was converted: no progress is shown
    again = call(*arguments, "--json", program=program)
    assert (again.status, again.err) == (0, "")
    values = json.loads(again.out)
    assert values["path"] == str(tmp_path / "new")
    assert sorted(values["modes"]) == ["L", "M", "S", "XL"]
    assert values["modes"]["XL"] > values["modes"]["S"]


def test_convert_of_one_precision_names_its_modes_alone(call: Call, tmp_path: Path) -> None:
    called = call("convert", FIXTURES / "tiny_mistral", tmp_path / "new", "--only", "bf16", "--json")
    assert list(json.loads(called.out)["modes"]) == ["XL"]
    for command in (("generate", "-p", "a"), ("compile",)):
        called = call(command[0], tmp_path / "new", "--mode", "S", *command[1:])
        assert_refused(called, "mode 'S' reads 13 groups in int8", "without --only", "['XL']")


def test_convert_refuses_what_it_cannot_read_or_write(call: Call, tmp_path: Path) -> None:
    assert_refused(call("convert", "/nowhere", tmp_path / "new", "--json"), "/nowhere")
    message = call("convert", "/nowhere", tmp_path / "new").err
    assert message.startswith("error: there is no file or folder /nowhere")  # and no progress before it
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("dear diary")
    assert_refused(call("convert", FIXTURES / "tiny_mistral", tmp_path / "taken", "--json"), "taken")
    (tmp_path / "file").write_text("a file")
    assert_refused(call("convert", FIXTURES / "tiny_mistral", tmp_path / "file" / "new", "--json"))


# -- compile -----------------------------------------------------------------------------------------------------------


def test_compile_keeps_what_is_there(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executables, "default_step_config", lambda *_, **__: tiny_step_config())
    called = call("compile", folder, "--mode", "XL", "--dtype", "float32", "--json")
    assert (called.status, called.err) == (0, "")
    (result,) = json.loads(called.out)
    assert result["mode"] == "XL"
    assert Path(result["folder"]).parts[-2:] == ("XL.float32", "kv1024")
    assert result["units"] == len(list(Path(result["folder"]).glob("*.xla")))
    assert result["bytes"] > 0
    called = call("compile", folder, "--mode", "XL", "--dtype", "float32")
    assert f"XL: {result['units']} executables" in called.out


def test_compile_makes_a_store_for_each_pool(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []

    def compile_nothing(store: ModeStore, step: StepConfig, **_: Any) -> Any:
        asked.append((store.plan.name, step.kv_slots, step.max_context))
        return SimpleNamespace(units={})

    monkeypatch.setattr(ModeStore, "compile", compile_nothing)
    pools = ("--kv-slots", 256, "--kv-slots", 100)
    called = call("compile", folder, "--mode", "S", "--mode", "M", *pools, "--json")
    assert asked == [("S", 256, 256), ("S", 128, 128), ("M", 256, 256), ("M", 128, 128)]
    assert [(result["mode"], result["kv_slots"]) for result in json.loads(called.out)] == [
        (mode, slots) for mode, slots, _ in asked
    ]
    assert Path(json.loads(called.out)[1]["folder"]).parts[-2:] == ("S", "kv128")
    asked.clear()
    call("compile", folder, "--mode", "S")
    assert asked == [("S", 16384, 512)]


def test_compile_refuses_modes_and_sizes_that_do_not_exist(call: Call, folder: Path) -> None:
    assert_refused(call("compile", folder, "--mode", "XXL"), "has no mode 'XXL'")
    assert_refused(call("compile", folder, "--max-context", "513"), "more than the 512 positions")
    assert_refused(call("compile", folder / "nowhere"), "no Elastic checkpoint")


def test_only_modes_that_are_stored_are_compiled(tmp_path: Path, call: Call) -> None:
    call("convert", FIXTURES / "tiny_mistral", tmp_path / "new", "--only", "int8", "--json")
    plans = Checkpoint.open(tmp_path / "new").stored_plans()
    assert [plan.name for plan in plans] == ["L", "M", "S"]


# -- verify ------------------------------------------------------------------------------------------------------------


def test_verify_finds_nothing_wrong_with_a_whole_checkpoint(call: Call, folder: Path) -> None:
    called = call("verify", folder)
    assert called.status == 0
    assert "1 executable stores are whole" in called.out
    values = json.loads(call("verify", folder, "--json").out)
    assert (values["problems"], values["stores"]) == ([], 1)


def test_verify_names_every_damaged_file(call: Call, folder: Path) -> None:
    weights = max((folder / "weights").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    (blob,) = folder.glob("executables/*/*/*/admit.xla")
    for file in (weights, blob):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    called = call("verify", folder)
    assert called.status == 1
    assert str(weights.relative_to(folder)) in called.out
    assert str(blob) in called.out
    assert "Traceback" not in called.err
    called = call("verify", folder, "--json")
    assert called.status == 1
    assert len(json.loads(called.out)["problems"]) == 2


def test_verify_names_every_missing_file(call: Call, folder: Path) -> None:
    missing = list((folder / "weights").rglob("*.zarray"))
    for file in missing:
        file.unlink()
    called = call("verify", folder, "--json")
    assert called.status == 1
    problems = [f"{file.relative_to(folder)}: missing" for file in missing]
    assert sorted(json.loads(called.out)["problems"]) == sorted(problems)


def test_verify_notices_a_store_without_a_manifest(call: Call, folder: Path) -> None:
    (manifest,) = folder.glob("executables/*/*/*/manifest.json")
    manifest.unlink()
    called = call("verify", folder)
    assert called.status == 1
    assert "manifest.json" in called.out


def test_verify_refuses_what_is_no_checkpoint(call: Call, folder: Path) -> None:
    assert_refused(call("verify", folder / "weights"), "is not an Elastic checkpoint")
    (folder / "elastic.json").write_text("{}")
    assert_refused(call("verify", folder), "elastic.json is not the manifest of an Elastic checkpoint", "--overwrite")


# -- info --------------------------------------------------------------------------------------------------------------


def test_info_for_people_and_as_json(call: Call, folder: Path) -> None:
    called = call("info", folder)
    assert called.status == 0
    assert "3 layers, hidden 64, 4 heads (2 KV), vocabulary 320" in called.out
    assert "provisional" in called.out
    assert json.loads(call("info", folder, "--json").out)["path"] == str(folder)


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_prints_what_the_model_says(call: Call, compiled: CompiledTiny) -> None:
    path = compiled.checkpoint.path
    expected = ElasticMistral.load(path, "XL", dtype="float32").generate("Hello", max_new_tokens=6)
    called = generate(call, path, "--prompt", "Hello", "--max-new-tokens", 6)
    assert called.status == 0
    assert called.out == expected.text + "\n"
    assert "mode XL (provisional plan): 6 tokens" in called.err
    assert "compile events: 0" in called.err
    called = generate(call, path, "--prompt", "Hello", "--max-new-tokens", 6, "--json")
    assert (called.status, called.err) == (0, "")
    values = json.loads(called.out)
    assert values["text"] == expected.text
    assert values["token_ids"] == list(expected.token_ids)
    assert values["compile_events"] == 0
    assert values["provisional"] is True
    assert values["kv_slots"] == 1024
    assert values["loading"]["weights"]["bytes"] > 0
    assert list(values["loading"])[-1] == "total"
    assert values["load_seconds"] == values["loading"]["total"]["seconds"]
    assert (values["new_tokens"], values["prompt_tokens"]) == (6, expected.prompt_tokens)


def test_generate_reads_standard_input_without_its_last_newline(call: Call, compiled: CompiledTiny) -> None:
    path, options = compiled.checkpoint.path, ("--max-new-tokens", 6, "--json")
    by_option = json.loads(generate(call, path, "-p", "Hello ☂", *options).out)
    for stdin in ("Hello ☂", "Hello ☂\n"):
        by_input = json.loads(generate(call, path, *options, stdin=stdin.encode()).out)
        assert by_input["token_ids"] == by_option["token_ids"]
    longer = json.loads(generate(call, path, *options, stdin="Hello ☂\n\n".encode()).out)
    assert longer["prompt_tokens"] == by_option["prompt_tokens"] + 1


def test_generate_samples_chats_and_stops(call: Call, compiled: CompiledTiny) -> None:
    path = compiled.checkpoint.path
    model = ElasticMistral.load(path, "XL", dtype="float32")
    sampled = ("--temperature", 0.9, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.01, "--repetition-penalty", 1.2)
    called = generate(call, path, "-p", "Hi", "--chat", "--seed", 5, *sampled, "--max-new-tokens", 8, "--json")
    expected = model.generate(
        [{"role": "user", "content": "Hi"}],
        max_new_tokens=8,
        temperature=0.9,
        top_k=50,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.2,
        seed=5,
    )
    assert json.loads(called.out)["token_ids"] == list(expected.token_ids)
    stop = expected.text[2:4]
    called = generate(call, path, "-p", "Hi", "--chat", "--seed", 5, *sampled, "--stop", stop, "--stop", "qqq")
    assert called.out == expected.text[: expected.text.index(stop)] + "\n"


@pytest.mark.parametrize("json_option", [(), ("--json",)])
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--temperature", "-1"), "temperature must be 0"),
        (("--top-p", "0"), "top_p must be in (0, 1]"),
        (("--seed", "-1"), "seed must be"),
        (("--stop", ""), "a stop string is empty"),
        (("--max-new-tokens", "5000"), "the longest here is 256"),
        (("--max-context", "300"), "compiled for up to 256"),
        (("--max-context", "1000"), "more than the 512 positions"),
        (("--mode", "XXL"), "has no mode 'XXL'"),
        (("--mode", "L"), "elastic-jax compile"),
    ],
)
def test_generate_says_what_is_wrong(
    call: Call, compiled: CompiledTiny, arguments: tuple[str, ...], word: str, json_option: tuple[str, ...]
) -> None:
    assert_refused(generate(call, compiled.checkpoint.path, "-p", "Hello", *arguments, *json_option), word)


@pytest.mark.parametrize("json_option", [(), ("--json",)])
def test_an_interrupted_answer_ends_where_it_is(
    call: Call, compiled: CompiledTiny, monkeypatch: pytest.MonkeyPatch, json_option: tuple[str, ...]
) -> None:
    step, steps = Engine.step, 0

    def interrupt(engine: Engine) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupt)
    called = generate(call, compiled.checkpoint.path, "-p", "Hello", "--max-new-tokens", 100, *json_option)
    assert called.status == 130
    assert steps < 6
    assert called.err == ("" if json_option else "interrupted\n")
    assert bool(called.out) != bool(json_option)  # JSON is whole or not there


def test_generate_refuses_input_that_is_no_text(call: Call, compiled: CompiledTiny) -> None:
    assert_refused(generate(call, compiled.checkpoint.path, stdin=b"\xff\xfe"), "standard input is not UTF-8")


def test_generate_without_a_checkpoint(call: Call, tmp_path: Path) -> None:
    assert_refused(generate(call, tmp_path / "nowhere", "-p", "a"), "no Elastic checkpoint", "convert-weights")
    assert_refused(generate(call, tmp_path, "-p", "a"), "is not an Elastic checkpoint")
    assert_refused(generate(call, FIXTURES / "tiny_mistral", "-p", "a"), "is a Hugging Face folder", "convert")


def test_generate_with_executables_of_somebody_else(call: Call, folder: Path) -> None:
    (manifest,) = folder.glob("executables/*/*/*/manifest.json")
    manifest.parent.chmod(0o777)
    assert_refused(generate(call, folder, "-p", "a"), "may have been written by somebody else")
    assert generate(call, folder, "-p", "a", "--trust", "--max-new-tokens", 2).status == 0


def test_a_file_that_cannot_be_read_is_one_message(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/secret")

    monkeypatch.setattr(Checkpoint, "open", denied)
    assert_refused(call("info", folder), "Permission denied", "/secret")


def test_generate_in_a_process_that_may_not_compile(compiled: CompiledTiny) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "elastic_jax", "generate", str(compiled.checkpoint.path), "--mode", "XL"),
            *("--dtype", "float32", "--prompt", "Hello", "--max-new-tokens", "4", "--no-compile", "--json"),
        ],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    assert json.loads(done.stdout)["compile_events"] == 0
    assert done.stderr == ""


def test_a_reader_that_goes_away_leaves_no_traceback(folder: Path) -> None:
    command = [sys.executable, "-m", "elastic_jax", "info", str(folder)]
    pipe, pipe_end = os.pipe()
    os.close(pipe)
    done = subprocess.run(command, stdout=pipe_end, stderr=subprocess.PIPE, check=False, env=ENVIRONMENT)
    os.close(pipe_end)
    assert (done.returncode, done.stderr) == (1, b"")


def wait_until_it_reads(process: int) -> None:
    """Until a process waits for its standard input, which is a pipe; the kernel tells where it sleeps."""
    end = time.monotonic() + 120
    while "pipe_read" not in Path(f"/proc/{process}/wchan").read_text():
        assert time.monotonic() < end, "it never read its standard input"
        time.sleep(0.05)


def test_an_interruption_leaves_no_traceback(folder: Path) -> None:
    command = [sys.executable, "-m", "elastic_jax", "generate", str(folder)]
    pipe, pipe_end = os.pipe()
    # Where the tests run in a shell's background, interruptions are ignored, and a process inherits that.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        started = subprocess.Popen(command, stdin=pipe, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    finally:
        signal.signal(signal.SIGINT, previous)
    with started as process:
        try:
            wait_until_it_reads(process.pid)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    os.close(pipe)
    os.close(pipe_end)
    assert process.returncode == 130
    assert "Traceback" not in err


# -- the Hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with serve_hub() as hub:
        use_hub(monkeypatch, hub, tmp_path / "hub")
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_pushed_checkpoint_is_shown_and_generates_by_its_id(
    call: Call, hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    pushed = call("push", folder, "owner/tiny", "--mode", "XL", "--private", "--token", TOKEN, "--json")
    assert (pushed.status, pushed.err) == (0, "")
    told = json.loads(pushed.out)
    assert (told["repository"], told["modes"], told["stores"]) == ("owner/tiny", ["XL"], 1)
    assert told["commit"] == hub.repositories["owner/tiny"].branches["main"]

    shown = call("info", "owner/tiny", "--token", TOKEN, "--json")
    assert shown.err == ""
    assert [mode["mode"] for mode in json.loads(shown.out)["modes"]] == ["XL"]
    assert [store["problem"] for store in json.loads(shown.out)["executables"]] == [None]
    assert not any(name.startswith("weights/") for name in hub.downloaded)

    command = ["generate", "owner/tiny", "--mode", "XL", "--dtype", "float32", "--prompt", "Hello", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "elastic_jax", *command, "--max-new-tokens", "4", "--trust", "--no-compile"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=ENVIRONMENT
        | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        | {"HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN},
    )
    there = json.loads(done.stdout)
    assert there["compile_events"] == 0
    assert done.stderr == ""
    here = json.loads(generate(call, folder, "--prompt", "Hello", "--max-new-tokens", 4, "--json").out)
    assert there["token_ids"] == here["token_ids"]


def test_push_and_ids_that_cannot_be(call: Call, hub: HubServer, folder: Path) -> None:
    assert_refused(call("push", folder, "tiny"), "no Hub id")
    assert_refused(call("info", "owner/none"), "the Hub shows no repository owner/none")
    assert_refused(call("info", folder, "--revision", "v1"), "is no Hub id: leave it out")
    assert hub.repositories == {}
    # What goes on is told on standard error, before the refusal.
    refused = call("push", folder, "owner/tiny", "--token", "other")
    assert (refused.status, refused.out) == (1, "")
    assert "does not let you write to owner/tiny" in refused.err
