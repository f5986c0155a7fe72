"""Ctrl-C in a command: the work is cancelled between two callbacks of the loop, and may put its things in order."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
import uvloop

from nimbos.cli.interruptible import run_interruptible


def test_what_the_work_returns_is_returned() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 3

    assert run_interruptible(work()) == 3


def test_an_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        run_interruptible(work())


def test_a_cancel_that_no_signal_asked_for_stays_one() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run_interruptible(work())


def test_control_c_waits_for_the_end_of_a_callback_and_the_work_puts_its_things_in_order() -> None:
    seen: list[str] = []

    async def work() -> None:
        waited: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def answer() -> None:
            """The signal comes between the look and the result: a handler that cancels at once breaks this."""
            if not waited.cancelled():
                os.kill(os.getpid(), signal.SIGINT)
                seen.append("cancelled" if waited.cancelled() else "still waiting")
                waited.set_result(None)

        asyncio.get_running_loop().call_soon(answer)
        try:
            await waited
            await asyncio.Event().wait()
        finally:
            seen.append("in order")

    with pytest.raises(KeyboardInterrupt):
        run_interruptible(work())
    assert seen == ["still waiting", "in order"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_control_c_does_not_wait() -> None:
    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        run_interruptible(work())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_a_loop_of_the_callers_too_and_each_signal_has_its_exit_code(number: signal.Signals) -> None:
    async def work() -> None:
        os.kill(os.getpid(), number)
        await asyncio.Event().wait()

    async def three() -> int:
        return 3

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        with pytest.raises(KeyboardInterrupt if number is signal.SIGINT else SystemExit) as caught:
            run_interruptible(work(), runner)
        assert run_interruptible(three(), runner) == 3  # the loop lives on
    assert number is signal.SIGINT or caught.value.args == (143,)


def test_in_that_loop_a_second_one_does_not_wait_either() -> None:
    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()

    with pytest.raises(SystemExit), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        run_interruptible(work(), runner)


def test_work_that_takes_the_signals_over_is_not_cancelled_by_them() -> None:
    async def work() -> str:
        heard = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, heard.set)
        os.kill(os.getpid(), signal.SIGINT)
        await heard.wait()
        return "heard"

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert run_interruptible(work(), runner) == "heard"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
