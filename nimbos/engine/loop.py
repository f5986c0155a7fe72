"""The step loop: admit, plan, decode, sample, post; again and again.

Owns the jobs and runs on one thread. Decisions are `scheduler.py`'s and `context.py`'s, computing is `model.py`'s, what
a token means for its branch is `answer.py`'s; here they meet. Read `worker.py` for the threads and pipes around it.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from nimbos.engine import llama
from nimbos.engine.answer import Answer
from nimbos.engine.calibrate import StepTime
from nimbos.engine.context import ContextTree, Copy, Match, NoRoom, Operation, common_length
from nimbos.engine.counters import Counters
from nimbos.engine.grammar import Matcher
from nimbos.engine.guessing import Offer, with_guesses
from nimbos.engine.intake import take_in
from nimbos.engine.model import Floats, Model, Rows
from nimbos.engine.protocol import Admitted, Failed, FromEngine, Produced, Refusal, Submit
from nimbos.engine.residence import Residence
from nimbos.engine.sampler import pick
from nimbos.engine.scheduler import (
    RANK,
    FairClock,
    Job,
    Plan,
    Rules,
    Slice,
    admission_order,
    may_live,
    plan,
    victim,
)
from nimbos.engine.swapfile import SwapFile
from nimbos.engine.tally import Tally
from nimbos.engine.threads import ThreadChoice
from nimbos.engine.track import Track
from nimbos.errors import AnswerFailed
from nimbos.meterfile import Row
from nimbos.types import AskClass, Chunk, FinishReason

SPARE_SHARE = 8  # an eighth of the cells is left to accounts that hold nothing, so that a flood cannot shut them out
RESERVE_TOKENS = 128  # cells kept free for each live job's answer beyond its prompt
WORTH_WAITING = 16  # tokens of a prefix that must still be coming for a job to wait for it
IDLE_SHARE, IDLE_CELLS_MIN = 0.1, 512  # idle contexts may lengthen a step of one row by this share
RELIEVE_EVERY = 8  # steps
PIECES_AT_ONCE = 8  # of contexts, written out or put back before a step
PIN_S_MAX = 3600.0  # no ask keeps cells for longer
LOOKED_AT = 16  # waiting jobs that are tried each time something changed

Post = Callable[[FromEngine], None]


class Hold(Protocol):
    """The compute lease (`lease.py`), or none."""

    def __call__(self, ask_class: AskClass, /, *, interruptible: bool) -> AbstractContextManager[None]: ...


class Loop:
    """`post` sends to the server; `hold` is the compute lease; `share` False computes every prompt by itself."""

    def __init__(
        self,
        model: Model,
        costs: StepTime,
        rules: Rules,
        *,
        post: Post,
        hold: Hold,
        share: bool,
        context_limit: int,
        swap_bytes: int = 0,
        swap: SwapFile | None = None,
        guess_tokens: int = 0,
    ) -> None:
        """`swap_bytes`: of memory, for contexts that are written out. `swap`: for more of them. `guess_tokens`: that a
        step guesses ahead for a branch, at most."""
        self.model, self.costs, self.rules = model, costs, rules
        sequences = model.options.sequences - share  # where contexts are written out, the last id is for that
        self.tree = ContextTree(cells=model.cells, sequences=sequences)
        self.residence = Residence(
            model, self.tree, scratch=sequences, budget_bytes=swap_bytes, perform=self._perform, swap=swap
        )
        self._relieving = False
        self.clock = FairClock()
        self.counters = Counters()
        self._expected = costs.copy()
        self.threads = ThreadChoice(model.options.threads)
        self.context_limit = context_limit
        self.abortable = False
        self._post, self._hold, self._share = post, hold, share
        self._guess_most = guess_tokens if model.shares_prefixes else 0  # else what was wrong cannot be taken back
        self._waiting: list[Job] = []
        self._live: list[Job] = []
        self._tracks: dict[int, Track] = {}
        self._changed = False
        self._number = 0
        self._chunks: list[tuple[str, Chunk]] = []
        self._counted: dict[int, Tally] = {}  # whose numbers are not written yet

    def warm(self) -> None:
        """Decodes a few tokens: a library that cannot is found out before anybody waits, and the threads learn whether
        they have the cores to themselves. Raises: EngineFailed."""
        tokens = [token for token in range(min(self.model.n_vocab, 64)) if token not in self.model.vocab.control]
        rows = min(8, self.model.options.step_tokens)
        for _ in range(2):
            self.model.arm()
            begun, begun_cpu = time.perf_counter(), time.process_time()
            self.model.decode([Rows(sequence=0, start=0, tokens=tokens[:rows], logits=True)])
            wall, cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
            self.model.drop(0)
        relative = wall * 1e3 / self._expected.predict(rows, 0)
        self.threads.observe(relative=relative, cpu_ms=cpu * 1e3, wall_ms=wall * 1e3, now_ms=_now_ms())

    # --- what the outside asks for

    def submit(self, submit: Submit, prompt: tuple[int, ...], matcher: Matcher | None, row: Row | None = None) -> None:
        """Takes in an ask whose prompt is tokenized and whose grammar is compiled. `row`: of the meter file.

        Raises: AnswerFailed when what was emitted does not fit the ask.
        """
        self.clock.arrive(submit.ask.account, {job.account for job in (*self._live, *self._waiting)})
        tracks = take_in(
            submit,
            prompt,
            matcher,
            vocab=self.model.vocab,
            row=row,
            context_limit=self.context_limit,
            now_ms=_now_ms(),
            number=self._number + 1,
        )
        self._number += len(tracks)
        for track in tracks:
            job = track.job
            self._tracks[id(job)] = track
            if track.answer.finish is not None or job.limit_tokens <= 0:
                self._finish(job, track.answer.finish or FinishReason.LENGTH)
            else:
                self._waiting.append(job)
        self._changed = True
        self.flush()

    def extend(self, ask_id: str, *, allowance_tokens: int | None, last: bool) -> bool:
        """More is paid for. Returns: False when there is no such ask."""
        jobs = [job for job in (*self._live, *self._waiting) if job.ask_id == ask_id]
        for job in jobs:
            answer = self._tracks[id(job)].answer
            answer.allow(allowance_tokens, last=last)
            job.parked = answer.spent
            if answer.finish is not None:
                self._finish(job, answer.finish)
        self._changed = True
        self.flush()
        return bool(jobs)

    def cancel(self, ask_id: str) -> None:
        """Forgets every branch of an ask; its cells are free, or cache, before the next step."""
        for job in [j for j in self._waiting if j.ask_id == ask_id]:
            self._waiting.remove(job)
            del self._tracks[id(job)]
        for job in [j for j in self._live if j.ask_id == ask_id]:
            self._leave(job)
            del self._tracks[id(job)]
        self._changed = True

    @property
    def idle(self) -> bool:
        return not self._live and not self._waiting

    # --- one step

    def step(self, look: Callable[[], None]) -> bool:
        """Schedules, computes and samples one batch. `look` takes in what arrived and is called right before planning.

        Returns: False when there is nothing to compute.
        """
        self.model.arm()
        self.tree.expire(_now_ms())
        look()
        started = time.perf_counter()
        self._go_on_putting_back()
        self._admit()
        chosen = self._with_guesses(self._plan_within_cells())
        if not chosen.slices:
            self.flush()
            return (self._changed and bool(self._waiting)) or any(job.returning for job in self._live)
        rows = [row for part in chosen.slices for row in _rows_of(part)]
        urgent = min((s.job.ask_class for s in chosen.slices), key=list(AskClass).index)
        planned = time.perf_counter()
        self.abortable = self.model.can_truncate and not chosen.has_interactive
        with self._hold(urgent, interruptible=self.abortable):
            begun, begun_cpu = time.perf_counter(), time.process_time()
            self.model.use_threads(self.threads.threads)
            result = self.model.decode(rows)
            self.abortable = False
            ended = time.perf_counter()
        if result == llama.ABORTED:
            self._recover_aborted(chosen)
        else:
            self._account(chosen, (ended - begun) * 1e3, (time.process_time() - begun_cpu) * 1e3)
            self._sample([s for s in chosen.slices if s.samples])
        self.flush()
        self.counters.overhead_seconds_sum += (planned - started) + (time.perf_counter() - ended)
        if self._relieving or self.counters.steps % RELIEVE_EVERY == 0:
            self._relieving = self.tidy()
        return True

    def tidy(self) -> bool:
        """Writes out one piece of an idle context, where idle ones slow every step too much.

        Returns: whether there may be more.
        """
        most = max(IDLE_CELLS_MIN, self.costs.idle_cells(IDLE_SHARE))
        return self.tree.evictable_cells() > most and self.residence.write_out_one()

    def flush(self) -> None:
        """What was counted is written before anything is told."""
        for tally in self._counted.values():
            tally.write()
        self._counted.clear()
        if self._chunks:
            self._post(Produced(chunks=tuple(self._chunks), waiting=len(self._waiting)))
            self._chunks = []

    # --- admitting

    def _admit(self) -> None:
        self._release_followers()
        if not self._changed or not self._waiting:
            return
        self._changed = False
        now = _now_ms()
        candidates = [job for job in self._waiting if job.leader is None and not job.parked]
        short_of_cells = len(RANK)
        for job in admission_order(candidates, self.clock, self.rules, now, self._live)[:LOOKED_AT]:
            if RANK[job.ask_class] >= short_of_cells:
                continue  # nobody of its class or below overtakes one that waits for cells
            if self._share and self._follows(job):
                self._changed = True  # somebody behind it may be looked at
                continue
            leaving = self._in_the_way(job)
            if leaving is None:
                continue  # the limit is on its account's rows; another account may have a place
            if not self._make_live(job, leaving):
                short_of_cells = min(short_of_cells, RANK[job.ask_class])
                continue
            self._changed = True

    def _release_followers(self) -> None:
        for job in self._waiting:
            leader = job.leader
            if leader is not None and (leader.sequence is None or leader.parked or leader.computed >= job.lead_tokens):
                job.leader = None
                self._changed = True

    def _follows(self, job: Job) -> bool:
        """Whether a live job is about to compute a prefix of this one; then it waits for that."""
        best, best_length = None, self._match(job).length + WORTH_WAITING - 1
        for other in self._live:
            if other.account != job.account or other.running or other.parked or other.pending == 0:
                continue
            length = min(_common(other.tokens, job.tokens), len(job.tokens) - 1)
            if length > best_length and length > other.computed:
                best, best_length = other, length
        if best is not None:
            job.leader, job.lead_tokens = best, best_length
        return best is not None

    def _match(self, job: Job) -> Match:
        """A whole hit still computes its last token, for the logits."""
        return self.tree.match(self._root(job), job.tokens[:-1] if self._share else ())

    def _root(self, job: Job) -> str:
        return job.account if self._share else f"{job.account}\0{job.number}"

    def _in_the_way(self, job: Job) -> list[Job] | None:
        """Those that must leave for it to have a place; None when there would be none. Those that are parked take no
        place, except of a sequence."""
        working, parked = [j for j in self._live if not j.parked], [j for j in self._live if j.parked]
        leaving: list[Job] = []
        if not may_live(job, working, self.costs, self.rules):
            loser = victim(working, job) if len(working) >= self.rules.live_jobs else None
            if loser is None:
                return None
            working.remove(loser)
            if not may_live(job, working, self.costs, self.rules):
                return None  # its place would help nobody
            leaving.append(loser)
        too_many = len(working) + len(parked) + 1 - self.rules.live_jobs
        return [*leaving, *parked[: max(0, too_many)]]

    def _make_live(self, job: Job, leaving: list[Job]) -> bool:
        """False when there are not enough cells for it, now. `leaving`: from `_in_the_way`."""
        match = self._match(job)
        kept = [j for j in self._live if not j.parked and RANK[j.ask_class] <= RANK[job.ask_class]]
        if not self._has_room(job, match, kept):
            return False  # though all others gave way to it, and nobody does for nothing
        for other in leaving:
            self._preempt(other)
            match = self._match(job)
        while not self._has_room(job, match, self._live):
            loser = victim(self._live, job)
            if loser is None:
                return False
            self._preempt(loser)
            match = self._match(job)
        need, piece = len(job.tokens) - match.length, self._piece_cells(job, match)
        if not self._write_out(need + piece, keep=match):
            self._changed = True  # it waits for the rest, a few pieces a step: to forget that would cost more
            return False
        try:
            self._make_room(max(need, piece), keep=match, unpin=not self._live)
            sequence, operations = self.tree.open(self._root(job), match, _now_ms())
        except NoRoom:
            return False
        self._perform(operations)
        self._waiting.remove(job)
        self._live.append(job)
        job.sequence, job.computed, job.served_ms = sequence, match.length, _now_ms()
        self._put_back(job)
        return True

    def _go_on_putting_back(self) -> None:
        for job in self._live:
            if job.returning:
                self._put_back(job)

    def _put_back(self, job: Job) -> None:
        """What is kept of its context, as many pieces as one step may wait for; without more of them it is computed."""
        root, tokens, before = self._root(job), job.tokens[:-1], job.computed
        job.computed = self.residence.put_back(_sequence(job), root, tokens, before, pieces=PIECES_AT_ONCE)
        job.returning = job.computed > before and self.residence.piece_cells(root, tokens, job.computed) > 0
        if job.returning:
            return
        track = self._tracks[id(job)]
        cached = track.admitted(job.computed, job.served_ms)
        self._counted[id(track.tally)] = track.tally
        self.counters.admitted(prompt=track.tally.prompt_tokens, cached=job.computed, track=track)
        if cached is not None:
            self._post(Admitted(ask_id=job.ask_id, branch=job.branch, cached=cached))

    def _has_room(self, job: Job, match: Match, beside: list[Job]) -> bool:
        """Whether there are cells for it when of the live jobs only those `beside` it go on. By itself it always has
        room: then pins give way as well."""
        if not beside:
            return True
        promised = sum(j.pending + min(self._remaining(j), RESERVE_TOKENS) for j in beside)
        need = len(job.tokens) - match.length + min(self._remaining(job), RESERVE_TOKENS)
        free = self.tree.free_cells + self.tree.evictable_cells(match, live=[_sequence(j) for j in beside])
        return need + promised + self._spare_beside(beside, job) <= free

    def _spare_beside(self, live: list[Job], job: Job) -> int:
        """Cells that the job's account leaves to others, if it holds some."""
        holds = self.rules.fair and any(other.account == job.account for other in live)
        return self.tree.cells // SPARE_SHARE if holds else 0

    def _remaining(self, job: Job) -> int:
        track = self._tracks[id(job)]
        return max(0, job.limit_tokens - (len(job.tokens) - track.submitted_tokens))

    # --- planning within the pool

    def _with_guesses(self, chosen: Plan) -> Plan:
        """Fills a step with guesses where that pays. Beside prompts there is no room for them."""
        parts = chosen.slices
        if not self._guess_most or not all(part.samples and part.job.running for part in parts):
            return chosen
        offers = [self._guess_for(part.job) for part in parts]
        if not any(offer.tokens for offer in offers):
            return chosen
        most_rows = min(self.rules.max_rows, self.tree.free_cells)
        return with_guesses(chosen, offers, self.costs, self.rules, most_rows=most_rows)

    def _guess_for(self, job: Job) -> Offer:
        track = self._tracks[id(job)]
        room = min(self._guess_most, track.answer.room - 1)  # the last one is sampled, and needs no guess
        return Offer(track.guesser.trust, track.guesser.guess(job.tokens, room))

    def _plan_within_cells(self) -> Plan:
        followers = [job for job in self._waiting if job.leader is not None]
        self.costs.used_cells = self._expected.used_cells = self.tree.used_cells
        while True:
            ready = [job for job in self._live if not job.returning]
            chosen = plan([*ready, *followers], self.costs, self.clock, self.rules, _now_ms())
            if chosen.rows <= self.tree.free_cells:
                return chosen
            self._make_room(chosen.rows, unpin=len(self._live) == 1)
            if chosen.rows <= self.tree.free_cells:
                return chosen
            loser = max(self._live, key=lambda j: (j.parked, RANK[j.ask_class], j.number))
            if len(self._live) == 1 and not loser.parked:
                self._finish(loser, FinishReason.LENGTH)
            else:
                self._preempt(loser)

    def _make_room(self, cells: int, *, keep: Match | None = None, unpin: bool = False) -> None:
        """Idle contexts give way: some are written out, as many as one step may wait for; the others are forgotten."""
        self._write_out(cells, keep=keep)
        operations = self.tree.make_room(cells, keep=keep, unpin=unpin)
        self.counters.evictions += len(operations)
        self._perform(operations)

    def _piece_cells(self, job: Job, match: Match) -> int:
        return self.residence.piece_cells(self._root(job), job.tokens[:-1], match.length)

    def _write_out(self, cells: int, *, keep: Match | None) -> bool:
        """Pieces of idle contexts, until so many cells are free. Returns: False when one step may wait for no more of
        them, and there are more."""
        for _ in range(PIECES_AT_ONCE):
            if self.tree.free_cells >= cells or not self.residence.write_out_one(keep=keep):
                return True
        return self.tree.free_cells >= cells

    def _preempt(self, job: Job) -> None:
        """Back to waiting; what it computed stays as cache as long as cells allow."""
        self._leave(job)
        self._tracks[id(job)].preemptions += 1
        self.counters.preemptions += 1
        job.running = False
        self._waiting.append(job)
        self._changed = True

    def _leave(self, job: Job) -> None:
        self._live.remove(job)
        if job.overhang:  # it leaves in the middle of a step
            self.model.drop(_sequence(job), job.computed)
        branch, job.sequence, job.computed, job.overhang, job.returning = _sequence(job), None, 0, 0, False
        self._perform(self.tree.retire(branch) if self._share else self.tree.drop(branch))
        self._changed = True

    def _perform(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            if isinstance(operation, Copy):
                self.model.copy(operation.source, operation.target, operation.end)
            else:
                self.model.drop(operation.branch, operation.start)

    # --- after the computing

    def _recover_aborted(self, chosen: Plan) -> None:
        """Part of the batch is in memory. Each job keeps what is certain; its last token is computed again."""
        self.counters.preemptions += 1
        for part in chosen.slices:
            job, sequence = part.job, _sequence(part.job)
            keep = min(self.model.position_end(sequence), len(job.tokens) - 1, job.computed + part.count)
            keep = max(keep, job.computed)
            self.model.drop(sequence, keep)
            self.tree.extend(sequence, job.tokens[job.computed : keep])
            track = self._tracks[id(job)]
            track.computed(keep - job.computed, 0.0)
            self._counted[id(track.tally)] = track.tally
            job.computed = keep
            track.preemptions += 1

    def _account(self, chosen: Plan, milliseconds: float, cpu_ms: float) -> None:
        cells = sum(s.rows * (s.job.computed + s.rows // 2) for s in chosen.slices)
        relative = milliseconds / self._expected.predict(chosen.rows, cells)
        self.threads.observe(relative=relative, cpu_ms=cpu_ms, wall_ms=milliseconds, now_ms=_now_ms())
        self.costs.observe(chosen.rows, cells, milliseconds)
        self.counters.stepped(chosen, milliseconds)
        if self.counters.steps % 1024 == 0:
            self.clock.forget_idle({job.account for job in (*self._live, *self._waiting)})
        now = _now_ms()
        for part in chosen.slices:
            job = part.job
            share = milliseconds * part.rows / chosen.rows
            self.clock.charge(job.account, share, weight=job.weight, process=job.process)
            self.clock.served(job.account, job.ask_class, now)
            self.counters.charge(job.account, share)
            self.tree.extend(_sequence(job), job.tokens[job.computed : job.computed + part.count])
            track = self._tracks[id(job)]
            track.computed(part.count, share)
            track.stepped(milliseconds, chosen.rows)
            self._counted[id(track.tally)] = track.tally
            job.computed, job.overhang = job.computed + part.count, len(part.guess)
            self._pin(job, track, now)
            job.served_ms = now
            self._changed |= not job.running  # a prompt moved on: the next may become live

    def _pin(self, job: Job, track: Track, now_ms: float) -> None:
        ask = track.ask
        if track.pinned or not self._share or ask.pin_s <= 0 or ask.pin_tokens <= 0:
            return
        length = min(ask.pin_tokens, track.tally.prompt_tokens)
        if job.computed >= length:
            track.pinned = True
            self.tree.pin(_sequence(job), length, now_ms, min(ask.pin_s, PIN_S_MAX) * 1e3)

    def _sample(self, parts: list[Slice]) -> None:
        if not parts:
            return
        logits = self.model.logits(sum(1 + len(part.guess) for part in parts))
        first = end = 0
        for part in parts:
            first, end = end, end + 1 + len(part.guess)
            job = part.job
            track = self._tracks.get(id(job))
            if track is None:
                continue  # another branch of its ask failed in this very step
            try:
                self._choose(job, track, logits[first:end], part.guess)
            except AnswerFailed as error:
                self._fail(job, str(error))
                continue
            except Exception:  # a loop top: a bug of ours costs one ask, not all of them
                traceback.print_exc()
                self._fail(job, "The next token could not be chosen.")
                continue
            track.answered()
            self._chunks.extend((job.ask_id, chunk) for chunk in track.answer.drain())
            job.parked = track.answer.spent
            self._changed |= job.parked  # its place is another's
            if track.answer.finish is not None:
                self._finish(job, track.answer.finish)

    def _choose(self, job: Job, track: Track, logits: Floats, guess: tuple[int, ...]) -> None:
        """The next tokens of a job: one, and as many more as were guessed. `logits`: a row for the token before them
        and one for each guess."""
        job.running = True
        row = 0
        try:
            while row <= _right(job, guess):
                self._choose_one(job, track, logits[row], computed=row)
                if job.pending == row:
                    break
                row = job.pending
        finally:
            if guess:
                self._keep_guessed(job, track, guess)

    def _keep_guessed(self, job: Job, track: Track, guess: tuple[int, ...]) -> None:
        """Of the guesses that were computed, those that came true stay. The last token is always computed again, or
        there would be no logits after it."""
        at, sequence = job.computed, _sequence(job)
        right = _right(job, guess)
        track.guesser.learn(len(guess), right)
        self.counters.guessed_tokens += len(guess)
        self.counters.guessed_right_tokens += right
        keep = max(at, min(at + right, len(job.tokens) - 1))
        self.tree.extend(sequence, job.tokens[at:keep])
        track.computed(keep - at, 0.0)
        job.computed, job.overhang = keep, 0
        if keep < at + len(guess):
            self.model.drop(sequence, keep)

    def _choose_one(self, job: Job, track: Track, logits: Floats, *, computed: int) -> None:
        """The next token of a job, and those before and after it that need no sampling. `computed`: of its pending
        tokens those that were guessed."""
        answer = track.answer
        self._take_forced(job, answer)
        if answer.finish is not None or answer.spent or job.pending > computed:
            return
        chosen = pick(
            logits,
            track.ask.sampling,
            branch=job.branch,
            position=answer.output_tokens,
            recent=answer.recent,
            mask=answer.constraint(),
            banned=answer.banned(),
            pieces=self.model.vocab.pieces,
        )
        token = answer.instead_of(chosen.id)
        answer.accept(token, chosen.logprob)
        job.tokens.append(token)
        self._take_forced(job, answer)

    def _take_forced(self, job: Job, answer: Answer) -> None:
        """Appends what can only come next; the coming step computes all of it in one pass."""
        while answer.finish is None and (forced := answer.forced()):  # none when the allowance is spent
            for token in forced:
                answer.accept(token, None)
                job.tokens.append(token)
                if answer.finish is not None:
                    break

    def _fail(self, job: Job, reason: str) -> None:
        """Fails the whole ask of this job, and only that."""
        self._chunks = [(ask_id, chunk) for ask_id, chunk in self._chunks if ask_id != job.ask_id]
        self.flush()
        self._post(Failed(ask_id=job.ask_id, refusal=Refusal(message=reason, server_fault=True)))
        self.cancel(job.ask_id)

    def _finish(self, job: Job, reason: FinishReason) -> None:
        track = self._tracks.pop(id(job))
        if job.sequence is not None:
            self._leave(job)
        elif job in self._waiting:
            self._waiting.remove(job)
        self._chunks.extend((job.ask_id, chunk) for chunk in track.answer.drain())
        self._chunks.append((job.ask_id, track.final(reason, _now_ms())))
        self.counters.finished(track)

    def counts(self) -> tuple[dict[AskClass, int], dict[AskClass, int]]:
        """Waiting and live jobs by class."""
        waiting, live = dict.fromkeys(AskClass, 0), dict.fromkeys(AskClass, 0)
        for job in self._waiting:
            waiting[job.ask_class] += 1
        for job in self._live:
            live[job.ask_class] += 1
        return waiting, live

    def check(self) -> None:
        """Asserts what must hold between steps; for tests."""
        self.tree.check()
        assert all(self.tree.length(_sequence(job)) == job.computed for job in self._live)
        assert self._tracks.keys() == {id(job) for job in (*self._live, *self._waiting)}


def _sequence(job: Job) -> int:
    assert job.sequence is not None, "a job without a sequence was planned"
    return job.sequence


def _rows_of(part: Slice) -> Iterator[Rows]:
    job, at = part.job, part.job.computed
    tokens = job.tokens[at : at + part.count]
    yield Rows(sequence=_sequence(job), start=at, tokens=tokens, logits=part.samples)
    for number, token in enumerate(part.guess, start=at + part.count):
        yield Rows(sequence=_sequence(job), start=number, tokens=(token,), logits=True)


def _right(job: Job, guess: tuple[int, ...]) -> int:
    """How many of the guesses came true."""
    return common_length(tuple(job.tokens[job.computed :]), guess, 0)


def _common(tokens: Sequence[int], other: Sequence[int]) -> int:
    return common_length(tokens, other, 0)


def _now_ms() -> float:
    return time.monotonic() * 1e3
