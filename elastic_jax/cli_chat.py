"""The `chat` command: a conversation in the terminal, or one that is read from standard input."""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elastic_jax.cli_load import (
    KvSlotsOption,
    MaxContextOption,
    MinPOption,
    OnMissingOption,
    RepetitionPenaltyOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    TrustOption,
    load_model,
)
from elastic_jax.cli_options import (
    CheckpointOrIdArgument,
    DtypeOption,
    JsonOption,
    KvOption,
    ModeOption,
    RevisionOption,
    TokenOption,
    note,
)
from elastic_jax.errors import ElasticError, RequestError
from elastic_jax.interrupts import interruptible
from elastic_jax.system_errors import describe

if TYPE_CHECKING:
    from elastic_jax.chat import Conversation, Turn
    from elastic_jax.elastic import ElasticMistral

HELP = """\
/mode NAME     answer in another mode
/system TEXT   set the system prompt; without TEXT remove it
/save FILE     write the conversation as JSON
/clear         forget the conversation
/help          this list
/quit          end; so does Ctrl-D. Ctrl-C stops an answer
A line that begins with // is said with one slash."""


def chat(
    checkpoint: CheckpointOrIdArgument,
    mode: ModeOption = "M",
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer; 256.")] = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    seed: SeedOption = None,
    on_missing: OnMissingOption = "error",
    trust: TrustOption = False,
    dtype: DtypeOption = "bfloat16",
    kv: KvOption = "full",
    kv_slots: KvSlotsOption = None,
    max_context: MaxContextOption = None,
    revision: RevisionOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk with a model; /help lists what can be typed. Lines of a pipe are said one by one."""
    from elastic_jax.chat import Conversation

    def load(name: str) -> "ElasticMistral":
        return load_model(
            checkpoint,
            name,
            on_missing=on_missing,
            dtype=dtype,
            kv=kv,
            kv_slots=kv_slots,
            max_context=max_context,
            trust=trust,
            revision=revision,
            token=token,
            preload=True,
            as_json=as_json,
        )

    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    from elastic_jax.requests import SamplingParams

    SamplingParams(**sampling)  # what is out of range is refused before anything is loaded
    session = _Session(load, mode, Conversation(sampling, max_new_tokens, system), as_json)
    session.run()


class _Session:
    """Reads lines and answers them until they end.

    Args:
        load: loads a mode.
        mode: the first one.
        conversation: empty.
        as_json: print one JSON value an answer.
    """

    def __init__(
        self, load: "Callable[[str], ElasticMistral]", mode: str, conversation: "Conversation", as_json: bool
    ) -> None:
        self._load = load
        self._model: ElasticMistral | None = load(mode)
        self._conversation = conversation
        self._as_json = as_json
        # A model without a template cannot chat: better said now than after the first question.
        self._model.tokenizer.apply_chat_template([{"role": "user", "content": "?"}], add_generation_prompt=True)

    def run(self) -> None:
        """Answers every line. Errors are told; where nobody types, the first ends the program.

        Raises:
            ElasticError: of a line of a pipe.
        """
        typed = sys.stdin.isatty()
        note(f"mode {self._mode}; /help lists commands", self._as_json or not typed)
        while (line := self._read(typed)) is not None:
            try:
                if not self._handle(line):
                    return
            except (ElasticError, OSError) as error:
                if not typed:
                    raise
                note(f"error: {describe(error) if isinstance(error, OSError) else error}", quiet=False)

    @property
    def _mode(self) -> str:
        return self._loaded.plan.name

    @property
    def _loaded(self) -> "ElasticMistral":
        if self._model is None:
            raise RequestError("no mode is loaded: choose one with /mode")
        return self._model

    def _read(self, typed: bool) -> str | None:
        """The next line; None at the end. Ctrl-C drops what was typed."""
        while True:
            try:
                if typed:
                    return input("> ")
                line = sys.stdin.buffer.readline().decode()
                return line.rstrip("\r\n") if line else None
            except EOFError:
                return None
            except KeyboardInterrupt:
                note("", quiet=False)
                if not typed:
                    raise
            except UnicodeDecodeError as error:
                raise RequestError(f"standard input is not UTF-8 text: {error}") from None

    def _handle(self, line: str) -> bool:
        """Answers one line; whether to go on."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line.partition(" ")
            return self._command(name, rest.strip())
        text = line[1:] if line.startswith("//") else line
        if text.strip():
            self._answer(text)
        return True

    def _command(self, name: str, rest: str) -> bool:
        match name:
            case "/quit" | "/exit":
                return False
            case "/help":
                note(HELP, self._as_json)
            case "/clear":
                self._conversation.messages.clear()
                note("the conversation is forgotten", self._as_json)
            case "/system":
                self._conversation.system = rest or None
                note("the system prompt is set" if rest else "there is no system prompt now", self._as_json)
            case "/save" if rest:
                self._conversation.save(Path(rest).expanduser())
                note(f"saved to {rest}", self._as_json)
            case "/mode" if rest:
                self._change_mode(rest)
            case "/mode":
                note(f"mode {self._mode}; there are {', '.join(self._loaded.checkpoint.plans())}", self._as_json)
            case "/save":
                raise RequestError("/save needs the name of a file")
            case _:
                raise RequestError(f"there is no command {name}; /help lists them, and // says a slash")
        return True

    def _change_mode(self, name: str) -> None:
        """Loads another mode in place of this one, since both may not fit; this one again if that fails."""
        old = None
        if self._model is not None:
            self._model.checkpoint.plan(name)  # a wrong name costs nothing
            old = self._mode
        if name == old:
            return
        self._model = None
        gc.collect()  # gives the device's memory back
        try:
            self._model = self._load(name)
        except ElasticError as error:
            if old is None:
                raise
            failed = type(error)(f"{error}\nmode {old} goes on")
        else:
            note(f"mode {name}", self._as_json)
            return
        # Not while the error is handled: it may hold what had been loaded before it.
        self._model = self._load(old)
        raise failed

    def _answer(self, text: str) -> None:
        turn: Turn | None = None
        with interruptible() as stopped:
            for piece in self._conversation.ask(self._loaded, text, stopped):
                if not isinstance(piece, str):
                    turn = piece
                elif not self._as_json:
                    typer.echo(piece, nl=False)
                    sys.stdout.flush()
        if turn is None:
            return
        if self._as_json:
            typer.echo(json.dumps(turn.to_json()))
            return
        typer.echo()
        note(str(turn), quiet=False)
