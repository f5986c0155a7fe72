"""What a key is told of itself, and that it is told of nobody else."""

from __future__ import annotations

from pathlib import Path

import httpx2
import openai
import pytest

from tests.live import OWNER_SECRET, Live, error_of, serving, user

SCRIPT = {"replies": [], "default": {"text": "one two three"}}


def make_key(live: Live, name: str) -> str:
    admin = openai.OpenAI(base_url=f"{live.url}/v1", admin_api_key=OWNER_SECRET, api_key=OWNER_SECRET, max_retries=0)
    made = admin.admin.organization.projects.service_accounts.create("proj_default", name=name)
    admin.close()
    assert made.api_key is not None
    return made.api_key.value


def ask(live: Live, secret: str, words: str, *, model: str = "demo") -> None:
    body = {"model": model, "messages": user(words)}
    reply = live.http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {secret}"})
    assert reply.status_code == 200, reply.text


def own(live: Live, secret: str, query: str = "") -> httpx2.Response:
    return live.http.get(f"/v1/usage{query}", headers={"authorization": f"Bearer {secret}"})


def test_a_key_sees_its_own_use_to_the_token_and_no_other(tmp_path: Path) -> None:
    with serving(tmp_path, {"demo": SCRIPT}) as live:
        first, second = make_key(live, "first"), make_key(live, "second")
        ask(live, first, "four words of question")
        ask(live, first, "two words")
        ask(live, second, "many more words than the other one")
        seen = own(live, first).json()
        assert seen["total"]["asks"] == 2
        assert (seen["total"]["input_tokens"], seen["total"]["output_tokens"]) == (4 + 2, 3 + 3)
        assert [row["model"] for row in seen["rows"]] == ["demo"]
        assert own(live, second).json()["total"]["input_tokens"] == 7
        assert own(live, make_key(live, "third")).json()["total"]["asks"] == 0
        (day,) = own(live, first, "?by=day").json()["rows"]
        assert day["output_tokens"] == 6


def test_a_report_comes_in_pages(tmp_path: Path) -> None:
    with serving(tmp_path, {"demo": SCRIPT, "other": SCRIPT}) as live:
        secret = make_key(live, "one")
        for model in ("demo", "other", "other"):
            ask(live, secret, "two words", model=model)
        for path in ("/v1/usage", "/v1/organization/usage"):
            told: list[tuple[str, int]] = []
            for page, following in (("", "1"), ("&page=1", None)):
                query = f"?by=model&limit=1{page}"
                report = live.http.get(f"{path}{query}").json() if "org" in path else own(live, secret, query).json()
                assert report["total"]["asks"] == 3
                told += [(row["model"], row["asks"]) for row in report["rows"]]
                assert (report["next_page"], report["has_more"]) == (following, following is not None)
            assert told == [("other", 2), ("demo", 1)]
        for query in ("?limit=0", "?limit=10001", "?page=-1", "?page=2147483648", "?page=x"):
            error_of(own(live, secret, query), 400)
            error_of(live.http.get(f"/v1/organization/usage{query}"), 400)


@pytest.mark.parametrize(
    "query",
    ["?by=key", "?key=key_owner", "?since_ms=x", "?until_ms=-1", "?since_ms=99999999999999999", "?by=model&by=day"],
)
def test_what_it_does_not_read_is_refused(tmp_path: Path, query: str) -> None:
    with serving(tmp_path, {"demo": SCRIPT}) as live:
        error_of(own(live, OWNER_SECRET, query), 400)


def test_it_needs_a_key(tmp_path: Path) -> None:
    with serving(tmp_path, {"demo": SCRIPT}) as live:
        error_of(live.http.get("/v1/usage", headers={"authorization": "Bearer nb-nobody"}), 401)
