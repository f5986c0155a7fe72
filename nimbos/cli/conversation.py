"""The terminal's side of a chat: sends the messages so far, shows what comes while it comes.

Ctrl-C stops an answer and keeps the chat; at the prompt it ends the chat. Commands: /clear, /system TEXT, /exit.
"""

from __future__ import annotations

import ssl
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx2
import msgspec
from rich.console import Console
from rich.markup import escape

from nimbos import config
from nimbos.errors import InvalidRequest, NimbosError, NotReady, Unauthorized
from nimbos.keys import owner_key_file
from nimbos.presence import find_running, is_loopback

_HELP = "/clear begins anew · /system TEXT tells the model who to be · /exit leaves · Ctrl-C stops an answer"
_CONNECT_S = 5.0


class ServerRefused(NimbosError):
    """The server's own words, or that it has none."""


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Counted(msgspec.Struct, frozen=True):
    completion_tokens: int = 0


class _Problem(msgspec.Struct, frozen=True):
    message: str


class _Event(msgspec.Struct, frozen=True):
    """What is read of a chunk. It may be another server's."""

    choices: tuple[_Choice, ...] = ()
    usage: _Counted | None = None
    error: _Problem | None = None


@dataclass(slots=True)
class Answer:
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    stopped: bool = False


@dataclass(slots=True)
class Conversation:
    client: httpx2.Client
    model: str
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str, console: Console) -> Answer:
        """Shows the answer while it comes. A question whose answer failed or was empty is not kept."""
        asked = [*self.messages, {"role": "user", "content": question}]
        before = [{"role": "system", "content": self.system}] if self.system else []
        answer = Answer()
        started = time.monotonic()
        try:
            _show(self._events([*before, *asked]), answer, console)
        except KeyboardInterrupt:
            answer.stopped = True
        answer.seconds = time.monotonic() - started
        if answer.text:
            self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        return answer

    def _events(self, messages: list[dict[str, str]]) -> Iterator[_Event]:
        body = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _refusal(response)
            for line in response.iter_lines():
                name, _, text = line.partition(":")
                if name == "data" and text.strip() != "[DONE]":
                    yield _event(text)


def talk(*, model: str | None, url: str | None, key: str | None, system: str | None) -> int:
    """The exit code. Raises: NimbosError."""
    console = Console(highlight=False, emoji=False)
    with _connect(url, key) as client:
        try:
            conversation = Conversation(client, model or _first_model(client), system)
            if not sys.stdin.isatty():
                question = sys.stdin.read().strip()
                return _once(conversation, question, console) if question else 0
            return _loop(conversation, console)
        except httpx2.HTTPError as error:
            raise NotReady(f"The server at {client.base_url} does not answer: {error}.") from error


def _once(conversation: Conversation, question: str, console: Console) -> int:
    answer = conversation.ask(question, console)
    console.print()
    return 130 if answer.stopped else 0


def _loop(conversation: Conversation, console: Console) -> int:
    console.print(f"[bold]{escape(conversation.model)}[/bold]  [dim]{_HELP}[/dim]")
    while True:
        try:
            line = console.input("\n[bold cyan]›[/bold cyan] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return 0
        if line in ("/exit", "/quit"):
            return 0
        if line.startswith("/"):
            _command(conversation, line, console)
        elif line:
            _turn(conversation, line, console)


def _turn(conversation: Conversation, line: str, console: Console) -> None:
    try:
        answer = conversation.ask(line, console)
    except (NimbosError, httpx2.HTTPError) as error:
        console.print(f"\n{error}", style="red", markup=False)
        return
    speed = f"{answer.tokens} tokens · {answer.tokens / answer.seconds:.1f} tokens/s" if answer.tokens else ""
    ending = "stopped" if answer.stopped else ""
    console.print("\n" + " · ".join(filter(None, (speed, ending))), style="dim", markup=False)


def _command(conversation: Conversation, line: str, console: Console) -> None:
    name, _, rest = line.partition(" ")
    if name == "/clear":
        conversation.messages.clear()
        console.print("A new conversation.", style="dim")
    elif name == "/system":
        conversation.system = rest.strip() or None
        console.print("The model will be told so." if rest.strip() else "The model is told nothing.", style="dim")
    else:
        console.print(_HELP, style="dim")


def _event(text: str) -> _Event:
    """Raises: ServerRefused, also for what is no event of a chat."""
    try:
        event = msgspec.json.decode(text.encode(), type=_Event)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ServerRefused(f"What the server sends is no answer: {error}.") from error
    if event.error is not None:
        raise ServerRefused(event.error.message)
    return event


def _show(events: Iterator[_Event], answer: Answer, console: Console) -> None:
    thinking = False
    for event in events:
        if event.usage is not None:
            answer.tokens = event.usage.completion_tokens
        for choice in event.choices:
            thought, text = choice.delta.reasoning_content, choice.delta.content
            if thought and console.is_terminal:  # a pipe gets the answer alone
                console.print(_safe(thought), style="dim italic", end="", markup=False, soft_wrap=True)
                thinking = True
            if text:
                if thinking:
                    console.print("\n")
                    thinking = False
                answer.text += text
                console.file.write(_safe(text))  # as it is: rich would make spaces of tabs
                console.file.flush()


def _safe(text: str) -> str:
    """Without control characters: a model's words must not steer the terminal."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())


def _connect(url: str | None, key: str | None) -> httpx2.Client:
    """The owner's key goes to this machine's own server and nowhere else; nothing for loopback goes to a proxy."""
    settings = config.load()
    running = find_running(settings)
    if url is None and running is None:
        raise NotReady("No server runs on this machine. Start one with `nimbos up`, or give --url.")
    address = _address(url or (running.url if running is not None else ""))
    own = running is not None and _origin(address) == _origin(httpx2.URL(running.url))
    if key is None:
        if not own:
            raise Unauthorized(
                f"{address} is not the server that runs on this machine, so the owner's key is not sent to it. "
                "Give --key, or set NIMBOS_API_KEY."
            )
        key = _owner_secret(settings)
    trust = running.certificate if own and running is not None else ""
    return httpx2.Client(
        base_url=address,
        headers={"authorization": f"Bearer {key}"},
        timeout=httpx2.Timeout(None, connect=_CONNECT_S),
        verify=ssl.create_default_context(cafile=trust) if trust else True,
        trust_env=not is_loopback(address.host),
    )


def _address(url: str) -> httpx2.URL:
    """Raises: InvalidRequest."""
    try:
        address = httpx2.URL(url.rstrip("/").removesuffix("/v1"))
    except httpx2.InvalidURL as error:
        raise InvalidRequest(f"{url!r} cannot be an address: {error}.") from error
    if address.scheme not in ("http", "https") or not address.host or "%" in address.host:
        raise InvalidRequest(f"{url!r} is no address such as http://127.0.0.1:8000.")
    return address


def _origin(address: httpx2.URL) -> tuple[str, str, int | None]:
    return address.scheme, address.host, address.port


def _owner_secret(settings: config.Settings) -> str:
    """Raises: Unauthorized."""
    try:
        return owner_key_file(settings).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Unauthorized("There is no key on this machine. Give --key, or set NIMBOS_API_KEY.") from error


def _first_model(client: httpx2.Client) -> str:
    response = client.get("/v1/models")
    if response.status_code != 200:
        raise _refusal(response)
    try:
        models = [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ServerRefused("What the server sends is no list of models. Name one with --model.") from error
    if not models:
        raise NotReady("The server has no model. `nimbos pull` brings one.")
    return models[0]


def _refusal(response: httpx2.Response) -> ServerRefused:
    try:
        return ServerRefused(str(response.json()["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return ServerRefused(f"The server answered {response.status_code}.")
