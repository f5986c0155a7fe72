"""Load and cancellation from a client that is not ours: `aiperf` (PyPI), in an environment of its own.

It streams chats at a scripted model, and leaves some of them in the middle. What it counts (answered, left) is compared
with what Nimbos's ledger has, ask by ask: nothing may be missing. Its tokenizer is a small one made here, because the
ones it knows come from a network.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from bench import ours
from bench.abba import Measures
from bench.gateway import setup_for
from bench.report import Finding, publish
from bench.setup import Setup, where

AIPERF = "aiperf==0.13.0"
WORDS = 24
TOKENS_PER_SECOND = 40.0

MAKE_TOKENIZER = """
import sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
made = Tokenizer(models.BPE())
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
made.train_from_iterator(["some words to begin with"], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
PreTrainedTokenizerFast(tokenizer_object=made, bos_token="a", eos_token="b").save_pretrained(sys.argv[1])
"""


def install(folder: Path) -> Path:
    """The environment's `bin`; made if it is not there."""
    programs = folder / "bin"
    if not (programs / "aiperf").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([str(programs / "pip"), "install", "--quiet", AIPERF], check=True)
    return programs


async def run(setup: Setup, programs: Path, *, requests: int, concurrency: int, leave_percent: float) -> Measures:
    home = ours.make_home(setup, "third-party")
    script = setup.work / "fast.json"
    reply = {"text": " ".join(["word"] * WORDS), "tokens_per_second": TOKENS_PER_SECOND}
    script.write_text(json.dumps({"replies": [], "default": reply}))
    tokenizer = setup.work / "tokenizer"
    make = [str(programs / "python"), "-c", MAKE_TOKENIZER, str(tokenizer)]
    await asyncio.to_thread(subprocess.run, make, check=True, capture_output=True)
    async with ours.serving(setup, home=home, model=f"scripted:{script}") as server:
        command = [str(programs / "aiperf"), "profile", "-m", "fast", "--url", server.url, "--endpoint-type", "chat"]
        command += ["--streaming", "--concurrency", str(concurrency), "--request-count", str(requests)]
        command += ["--tokenizer", str(tokenizer), "--api-key", ours.KEY, "--isl", "64", "--osl", str(WORDS)]
        command += ["--request-cancellation-rate", str(leave_percent), "--request-cancellation-delay", "0.2"]
        command += ["--ui", "none", "--output-artifact-dir", str(setup.work / "artifacts")]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.STDOUT, cwd=setup.work
        )
        if await asyncio.wait_for(process.wait(), setup.limit_s) != 0:
            raise RuntimeError(f"aiperf ended with {process.returncode}")
        counters = await server.counters()
        usage = await asyncio.create_subprocess_exec(
            *ours.nimbos("usage"), "--json", env=dict(ours.environment(home)), stdout=asyncio.subprocess.PIPE
        )
        told, _ = await usage.communicate()
    report = json.loads(next((setup.work / "artifacts").rglob("profile_export_aiperf.json")).read_text())
    ledger = json.loads(told)["total"]
    ended = {
        outcome: sum(v for name, v in counters.items() if name.startswith("nimbos_asks_total") and outcome in name)
        for outcome in ('outcome="done"', 'outcome="cancelled"')
    }
    return {
        "asked": requests,
        "answered (aiperf)": report["request_count"]["avg"],
        "answered (ledger)": ended['outcome="done"'],
        "left early (ledger)": ended['outcome="cancelled"'],
        "asks in the ledger": ledger["asks"],
        "output tokens in the ledger": ledger["output_tokens"],
        "p99 first token ms (aiperf)": report["time_to_first_token"]["p99"],
        "p99 gap ms (aiperf)": report["inter_token_latency"]["p99"],
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--environment", type=Path, help="where aiperf is, or is installed; default: a new folder")
    arguments.add_argument("--requests", type=int, default=2_000)
    arguments.add_argument("--concurrency", type=int, default=64)
    arguments.add_argument("--leave-percent", type=float, default=30.0)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    setup = setup_for(out=given.out)
    place = where(setup)
    programs = install((given.environment or Path(tempfile.mkdtemp(prefix="aiperf-"))).absolute())
    measures = asyncio.run(
        run(
            setup,
            programs,
            requests=given.requests,
            concurrency=given.concurrency,
            leave_percent=given.leave_percent,
        )
    )
    missing = measures["asked"] - measures["asks in the ledger"]
    findings = [
        Finding(name="asks missing from the ledger", value=missing, at_most=0),
        Finding(
            name="answered (ledger) ÷ answered (aiperf)",
            value=measures["answered (ledger)"] / measures["answered (aiperf)"],
            at_least=1,
        ),
        Finding(
            name="left while they were being let in",
            value=measures["asked"] - measures["answered (ledger)"] - measures["left early (ledger)"],
        ),
    ]
    publish(setup, title="A third party's client", runs={AIPERF: [measures]}, findings=findings, place=place)


if __name__ == "__main__":
    sys.exit(main())
