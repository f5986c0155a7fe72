"""Taking in an ask: its branches, each with its job for the scheduler, its answer, and the tally they share.

An ask comes new, or with tokens that were emitted before: by an earlier ask (the answer goes on, and those were paid
for then), or by an engine that died (they are this ask's). Read `loop.py` for what becomes of the tracks.
"""

from __future__ import annotations

from nimbos.engine.answer import Answer
from nimbos.engine.grammar import Matcher
from nimbos.engine.protocol import Submit
from nimbos.engine.scheduler import Job
from nimbos.engine.tally import Tally
from nimbos.engine.track import Track
from nimbos.engine.vocab import Vocab
from nimbos.meterfile import Row
from nimbos.types import Ask

LEAST_WEIGHT, MOST_WEIGHT = 0.01, 100.0


def weight_of(ask: Ask) -> float:
    """Bounded: a weight is configured, and must not switch the fairness off."""
    return min(MOST_WEIGHT, max(LEAST_WEIGHT, ask.weight))


def take_in(
    submit: Submit,
    prompt: tuple[int, ...],
    matcher: Matcher | None,
    *,
    vocab: Vocab,
    row: Row | None,
    context_limit: int,
    now_ms: float,
    number: int,
) -> list[Track]:
    """Branches that are not finished yet, numbered from `number` on. One that needs nothing has an answer with a
    reason to end; one that may not go on yet is parked.

    Raises: AnswerFailed when what was emitted does not fit the ask.
    """
    ask = submit.ask
    room = context_limit - len(prompt)
    limit = room if ask.limit_tokens is None else min(ask.limit_tokens, room)
    open_branches = [branch for branch in range(ask.n) if branch not in ask.finished]
    tally = Tally(
        len(prompt),
        row,
        open_branches=len(open_branches),
        paid_prompt=ask.paid_prompt_tokens,
        paid_output=ask.paid_output_tokens,
    )
    tracks: list[Track] = []
    output = thinking = ended_output = ended_thinking = 0
    for branch in range(ask.n):
        is_open = branch in open_branches
        emitted = ask.emitted.get(branch, ())
        if not is_open and (row is None or not emitted):
            continue
        begun = submit.begun.get(branch, 0)
        tail = prompt[-ask.sampling.penalty_window :]
        answer = Answer(vocab, ask, branch, matcher.copy() if matcher else None, tail, max_tokens=limit)
        answer.replay(emitted[:begun])
        begun_thinking = answer.thinking_tokens
        answer.replay(emitted[begun:])
        job = Job(
            ask_id=ask.id,
            branch=branch,
            account=ask.account,
            ask_class=ask.ask_class,
            arrived_ms=now_ms,
            tokens=[*prompt, *emitted],
            limit_tokens=max(0, limit - len(emitted)),
            number=number + len(tracks),
            weight=weight_of(ask),
            process=ask.process,
        )
        known = len(prompt) + max(0, len(emitted) - 1)
        track = Track(job, ask, answer, tally, submit, known, begun=(begun, begun_thinking))
        track.resumed()
        output, thinking = output + track.output_tokens, thinking + track.thinking_tokens
        if is_open:
            answer.allow(ask.allowance_tokens, last=ask.allowance_last)
            job.parked = answer.spent
            tracks.append(track)
        else:
            ended_output, ended_thinking = ended_output + track.output_tokens, ended_thinking + track.thinking_tokens
    tally.resume(
        output=output,
        thinking=thinking,
        cached=max(submit.cached.values(), default=None),
        ended_output=ended_output,
        ended_thinking=ended_thinking,
    )
    return tracks
