"""The programs in `programs/`, each as a person runs it, against a scripted model: what they do does not hang on how
clever a model is."""

from __future__ import annotations

import base64
import re
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nimbos.adk import read_program
from nimbos.kernel.program import program_of
from tests.live import Live, serving
from tests.processing import Processes

FOLDER = Path(__file__).parent.parent / "programs"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
DRAFT = '{"title": "%s", "text": "%s", "tags": ["library", "sunday"]}'
GOOD = (
    "From May on the library opens its doors on Sunday mornings, from nine to noon. "
    "Everybody is welcome to come and read."
)

SANDELL = "The last keeper, Ingrid Sandell, left in 1984, when the light was made automatic."

SCRIPT: dict[str, Any] = {
    "replies": [
        # trip
        {
            "match": "warmer in Paris",
            "times": 1,
            "text": "",
            "tool_calls": [
                {"name": "temperature", "arguments": {"city": "Paris"}},
                {"name": "temperature", "arguments": {"city": "Oslo"}},
            ],
        },
        {"match": "degrees Celsius", "text": "Paris has 12.8 degrees Celsius, while Oslo has 6.5 degrees Celsius."},
        # researcher
        {"match": "word for word", "text": SANDELL},
        {"match": "from this sentence alone", "text": "Ingrid Sandell, in 1984."},
        # a skill
        {
            "match": "of this skill",
            "times": 1,
            "text": "",
            "tool_calls": [{"name": "read", "arguments": {"handle": "references/how.md"}}],
        },
        {"match": "Write the date first", "text": "I wrote the date first."},
        # analyst
        {"match": "Which number", "text": "total"},
        {"match": "Which column has", "text": '{"column": "revenue", "group_by": "region", "only": {}}'},
        {"match": "Answer in one sentence", "text": "The south leads with 6004.25."},
        # debate: the judge has heard both, the speakers have not
        {"match": "(?s)Speaker for.*Speaker against.*Speaker for.*Speaker against", "text": "for: They said more."},
        {"match": "The claim", "text": "Because I say so."},
        # writer
        {"match": "short announcement", "text": DRAFT % ("Sundays at the library", GOOD)},
        # watch
        {"match": "growing, shrinking or steady", "text": "steady"},
        # form
        {"match": "On which date", "text": "13.6.2027"},
    ],
    "default": {"text": "I do not know what this is about."},
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("home"), {"demo": SCRIPT}) as running:
        yield running


@pytest.fixture
def processes(live: Live) -> Processes:
    return Processes(live.http)


def bring(processes: Processes, name: str) -> str:
    files = {path: {"base64": base64.b64encode(c).decode()} for path, c in read_program(FOLDER / name).items()}
    reply = processes.post("programs", {"files": files})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


def result_of(processes: Processes, name: str, input: Any) -> Any:
    told = processes.over(processes.spawn(bring(processes, name), input))
    assert (told["state"], told["reason"], told["error"]) == ("done", "ok", "")
    return told["result"]


def test_there_are_seven() -> None:
    assert NAMES == ["analyst", "debate", "form", "researcher", "trip", "watch", "writer"]


@pytest.mark.parametrize("name", NAMES)
def test_each_is_described_and_has_a_budget(name: str) -> None:
    program, _ = program_of(read_program(FOLDER / name))
    assert program.name == name
    assert program.description
    assert program.manifest.budget.tokens


def test_the_first_command(processes: Processes) -> None:
    answer = result_of(processes, "trip", "Is it warmer in Paris or in Oslo?")
    assert answer == "Paris has 12.8 degrees Celsius, while Oslo has 6.5 degrees Celsius."


def test_the_researcher_says_what_it_goes_by(processes: Processes) -> None:
    assert result_of(processes, "researcher", "Who was the last keeper, and when did she leave?") == {
        "answer": "Ingrid Sandell, in 1984.",
        "quote": SANDELL,
        "file": "keepers.md",
    }
    assert result_of(processes, "researcher", "Xyzzy?")["answer"] == "The library does not say."


def test_the_analysts_numbers_are_the_tables(processes: Processes) -> None:
    found = result_of(processes, "analyst", "Which region has the largest revenue?")
    lines = [line.split(",") for line in (FOLDER / "analyst" / "data.csv").read_text().splitlines()[1:]]
    south = sum(float(revenue) for _, region, _, _, revenue in lines if region == "south")
    assert found["query"] == {"kind": "total", "column": "revenue", "group_by": "region", "only": {}}
    assert found["rows"][0] == {"group": "south", "value": round(south, 2)}
    assert [row["group"] for row in found["rows"]] == ["south", "west", "north"]


def test_the_debate_is_five_agents(processes: Processes) -> None:
    pid = processes.spawn(bring(processes, "debate"), "Cities should ban cars.")
    told = processes.over(pid)
    assert told["result"]["winner"] == "for"
    assert len(told["result"]["said"]) == 4
    family = processes.get(f"processes/{pid}/tree").json()["data"]
    assert sorted(one["name"] for one in family[1:]) == [
        "against, round 1",
        "against, round 2",
        "for, round 1",
        "for, round 2",
        "judge",
    ]
    assert {one["parent"] for one in family[1:]} == {pid}


def test_the_writer_keeps_a_draft_that_passes(processes: Processes) -> None:
    found = result_of(processes, "writer", "The library opens on Sunday mornings from May")
    assert (found["drafts"], found["faults"]) == (5, [])
    assert found["best"]["title"] == "Sundays at the library"


def test_the_writer_judges_drafts() -> None:
    writer = runpy.run_path(str(FOLDER / "writer" / "main.py"), run_name="writer")
    good = {"title": "Sundays at the library", "text": GOOD, "tags": []}
    assert writer["faults"](good) == []
    for fault in ({"title": "no"}, {"title": "It ends."}, {"text": "Too short."}, {"text": f"{GOOD} And then"}):
        worse = {**good, **fault}
        assert writer["faults"](worse)
        assert writer["score"](good, "library") > writer["score"](worse, "library")


def test_the_form_is_filled_from_the_message_alone(processes: Processes) -> None:
    message = "Hello, this is Anna Berg, anna.berg@example.org. A table for 4, please, on 12.6.2027 or 13.6.2027."
    assert result_of(processes, "form", message) == {
        "name": "Anna Berg",
        "email": "anna.berg@example.org",
        "date": "13.6.2027",  # the model chose between the two
        "persons": "4",
    }


def test_the_form_asks_for_what_the_message_does_not_say(processes: Processes) -> None:
    pid = processes.spawn(bring(processes, "form"), "This is Anna Berg, anna.berg@example.org. We come on 12.6.2027.")
    questions: list[str] = []
    for answer in ("many", "4"):
        asking = processes.until(pid, "asking", last=str(processes.process(pid)["events"]) if questions else "")
        (question,) = asking["asks"]
        questions.append(question["question"])
        sent = processes.signal(pid, "answer", body=answer, about=question["about"])
        assert sent.status_code == 200, sent.text
    told = processes.over(pid)
    assert told["result"]["persons"] == "4"
    assert re.match("How many persons", questions[0])
    assert "'many' does not look like it" in questions[1]


def test_the_watch_survives_its_server(tmp_path: Path) -> None:
    """Stopped while it sleeps between two looks, and started again: no look is lost, none is written twice."""
    with serving(tmp_path, {"demo": SCRIPT}, database_url="") as live:
        processes = Processes(live.http)
        pid = processes.spawn(bring(processes, "watch"), {"times": 3, "every_s": 1})
        for event in processes.stream(pid):
            if event.kind == "proc.state" and event.data["body"]["to"] == "waiting":
                break
    with serving(tmp_path, {"demo": SCRIPT}, database_url="") as live:
        told = Processes(live.http).over(pid)
    assert told["reason"] == "ok", told
    notebook = told["result"]["notebook"]
    assert [line.split(":")[0] for line in notebook] == ["look 1", "look 2", "look 3"]


def test_a_program_folder_that_is_deleted_while_it_runs_harms_nothing(live: Live, processes: Processes) -> None:
    program = bring(processes, "watch")
    pid = processes.spawn(program, {"times": 2, "every_s": 1})
    processes.until(pid, "waiting")
    unpacked = Path(live.settings.home) / "programs" / program
    assert unpacked.is_dir()
    shutil.rmtree(unpacked)
    assert processes.over(pid)["result"]["looks"] == 2
    assert unpacked.is_dir()


def test_a_plain_skill_runs_as_it_is_and_reads_what_it_refers_to(processes: Processes) -> None:
    how = "Write the date first. " + "And so on. " * 600 + "Then sign it."
    skill = {
        "SKILL.md": "---\nname: notes\ndescription: Takes notes.\n---\n\n# Notes\n\nFollow references/how.md.\n",
        "references/how.md": how,
        "scripts/never.py": "raise SystemExit",
    }
    pid = processes.spawn(processes.put(skill), "Take a note of this skill.")
    seen = list(processes.stream(pid))
    (intent,) = [one.data for one in seen if one.kind == "call.intent"]
    assert intent["body"]["resource"] == "references/how.md"
    (done,) = [one.data for one in seen if one.kind == "call.done"]
    assert any(str(text).startswith("Write the date first.") for text in done["texts"].values())
    assert seen[-1].data["result"] == "I wrote the date first."
