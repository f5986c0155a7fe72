"""A durable function's steps, as the gate and the thinker know them: what is asked for, its key, and what its record
means to the function. A step arrives from a worker, which is not trusted.

The key is the step's name, the hash of verb and arguments, and how many of the same came before it in this run: never
its position, so steps may be added and removed around it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec

from nimbos.errors import InvalidRequest
from nimbos.kernel.answers import Misfit, value_of
from nimbos.kernel.events import CallDenied, CallDone, CallResolved, ModelDone, ModelFailed
from nimbos.kernel.manifest import AnswerTokens, Level, Seed, Temperature, ThinkingTokens
from nimbos.kernel.program import Program
from nimbos.kernel.releasing import MARK
from nimbos.kernel.requests import dial_of, sampling_of
from nimbos.kernel.segments import Segments, canonical, text_of
from nimbos.kernel.syscall import Syscall, Wait
from nimbos.kernel.think import ThinkRequest
from nimbos.kernel.tools import NotJson, read_value
from nimbos.kernel.view import Recorded, View
from nimbos.kernel.words import Reason, State, Verb
from nimbos.toolwire import MESSAGE_CHARACTERS, Step
from nimbos.types import Grammar

NAME_CHARACTERS = 100
THINK: Final = "think"
_VERBS: Final = {
    "call": Verb.TOOL,
    "spawn": Verb.SPAWN,
    "wait": Verb.WAIT,
    "ask": Verb.ASK,
    "sleep": Verb.SLEEP,
    "send": Verb.SEND,
    "receive": Verb.RECEIVE,
}
_HASH_CHARACTERS = 16
_CALL_CHARACTERS = 32


class BadStep(Exception):
    """What a worker asked for is no step. The message goes to the function."""


class ThinkArguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is None is as the manifest has it. `schema` or `regex`: what the answer must be."""

    messages: list[dict[str, Any]]
    system: str = ""
    model: str = ""
    schema: dict[str, Any] | bool | None = None
    regex: str = ""
    max_tokens: AnswerTokens | None = None
    temperature: Temperature | None = None
    seed: Seed | None = None
    thinking: bool | ThinkingTokens | Level | None = None

    @property
    def grammar(self) -> Grammar | None:
        if self.schema is not None:
            return Grammar(kind="json_schema", source=canonical(self.schema).decode())
        return Grammar(kind="regex", source=self.regex) if self.regex else None


class CallArguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tool: str
    arguments: dict[str, Any]
    deadline_s: Annotated[float, msgspec.Meta(gt=0)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A step with its key. `think` is None for one that the gate does."""

    key: str
    verb: str
    arguments: Any
    think: ThinkArguments | None = None

    @property
    def call_id(self) -> str:
        return f"step.{hashlib.sha256(self.key.encode()).hexdigest()[:_CALL_CHARACTERS]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a function is told of a step: `value` as JSON, or the code and the words of an error."""

    value: bytes = b"null"
    error: str = ""
    message: str = ""


class Occurrences:
    """Of one run, from its top. Counts what is asked for."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def read(self, step: Step) -> Asked:
        """Raises: BadStep."""
        try:
            arguments = read_value(step.arguments)
            same = _same(step, arguments)
            think = msgspec.convert(arguments, ThinkArguments) if step.verb == THINK else None
            if step.verb == "call":
                msgspec.convert(arguments, CallArguments)
        except (NotJson, InvalidRequest, msgspec.ValidationError) as error:
            raise BadStep(f"The step {step.name!r} cannot be taken: {error}") from error
        if think is None and step.verb not in _VERBS:
            raise BadStep(f"There is no step {step.verb[:NAME_CHARACTERS]!r}.")
        if think is not None and think.schema is not None and think.regex:
            raise BadStep("An answer is held to a schema or to a regular expression, not to both.")
        self._seen[same] += 1
        return Asked(key=f"{same}#{self._seen[same]}", verb=step.verb, arguments=arguments, think=think)


def _same(step: Step, arguments: Any) -> str:
    """What steps with the same name and arguments have in common."""
    digest = hashlib.sha256(canonical([step.verb, arguments])).hexdigest()[:_HASH_CHARACTERS]
    return f"{step.name[:NAME_CHARACTERS]}#{digest}"


def syscall_of(asked: Asked) -> Syscall:
    """Its arguments are checked by the gate, except that `call` names a tool."""
    verb = _VERBS[asked.verb]
    if verb is not Verb.TOOL:
        return Syscall(call_id=asked.call_id, verb=verb, arguments=asked.arguments, deadline_s=0.0, step=asked.key)
    called = msgspec.convert(asked.arguments, CallArguments)
    return Syscall(
        call_id=asked.call_id,
        verb=verb,
        resource=called.tool,
        arguments=called.arguments,
        deadline_s=called.deadline_s or 0.0,
        step=asked.key,
    )


def request_of(think: ThinkArguments, program: Program) -> ThinkRequest:
    needs = program.manifest.model
    given = {
        name: value
        for name in ("max_tokens", "temperature", "seed", "thinking")
        if (value := getattr(think, name)) is not None
    }
    needs = msgspec.structs.replace(needs, **given)
    messages = list(think.messages)
    system = think.system or program.instructions.strip()
    if system and not any(message.get("role") == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    grammar = think.grammar
    schema = grammar is not None and grammar.kind == "json_schema"
    return ThinkRequest(
        messages=tuple(messages),
        model=think.model,
        response_format=grammar.source if grammar is not None and schema else None,
        grammar=None if schema else grammar,
        thinking=dial_of(needs),
        sampling=sampling_of(needs),
        max_tokens=needs.max_tokens,
        context_tokens=needs.context_tokens,
    )


def record_of(view: View, asked: Asked) -> Recorded | Wait | None:
    """How it ended; None: it has not. A fork waits at a step that is withheld until it is adopted, and what came of it
    then is the step's record: a function is never told of an effect that was not."""
    recorded = view.steps.get(asked.key)
    if recorded is None or not (isinstance(recorded.outcome, CallDone) and recorded.outcome.withheld):
        return recorded
    made = view.steps.get(f"{asked.key}{MARK}")
    return made or Wait(state=State.WAITING, reason=Reason.SIGNAL, about=(asked.call_id,))


async def said_of(recorded: Recorded, asked: Asked, segments: Segments, account: str) -> Said:
    """The same whenever it is asked, as it is made from the record alone. Raises: NotFound, StorageUnavailable."""
    outcome = recorded.outcome
    if isinstance(outcome, ModelFailed):
        return Said(error=outcome.code, message=outcome.message)
    if isinstance(outcome, CallDenied):
        return Said(error="denied", message=outcome.why)
    if isinstance(outcome, ModelDone):
        message = await segments.get(account, outcome.message)
        return _thought(str(message.get("content") or ""), asked.think)
    value = b"null" if recorded.result is None else await segments.get_bytes(account, recorded.result)
    if recorded.error:
        why = text_of(msgspec.json.decode(value))
        if isinstance(outcome, CallResolved):
            why = f"Nobody knew what came of it, and a person said: {outcome.verdict.value}."
        return Said(error=recorded.error, message=why[:MESSAGE_CHARACTERS])
    return Said(value=value)


def _thought(text: str, think: ThinkArguments | None) -> Said:
    try:
        return Said(value=canonical(value_of(text, think.grammar if think is not None else None)))
    except Misfit as misfit:
        return Said(error="misfit", message=str(misfit))
