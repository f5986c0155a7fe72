"""Pulling from hubs and addresses that fail in every way the real ones do."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from nimbos.config import Settings
from nimbos.errors import ConfigError, DownloadFailed, InvalidRequest, ModelUnusable, NotFound
from nimbos.hub import Hub, download
from nimbos.hub.download import Patience
from nimbos.hub.remote import Remote, RemoteFile, Token, _next, origin
from nimbos.hub.source import safe_file_name
from tests.hub import fake_hub
from tests.hub.conftest import Waits, Watcher, make_hub
from tests.hub.fake_hub import FakeHub, chunked, cut, running, serve, stall, status
from tests.hub.gguf_bytes import Made, default_pairs, pair, sized, tensor

MIB = 1 << 20
NAME = "owner/repo/model.gguf"
TINY = Made().bytes()
BIG = sized(5 * MIB)


def stored(hub: Hub) -> list[str]:
    """Names of everything in the store that could look like a model."""
    return [model.id for model in hub.models()]


def leftovers(settings: Settings) -> list[str]:
    return sorted(path.name for path in settings.models_dir.rglob("*.part*"))


async def test_a_pulled_model_is_whole_hashed_and_listed(hub: Hub, site: FakeHub, settings: Settings) -> None:
    source = site.add(NAME, BIG)
    watcher = Watcher()
    model = await hub.pull(source, progress=watcher)
    assert model.path.read_bytes() == BIG
    assert model.sha256 == hashlib.sha256(BIG).hexdigest()
    assert model.id == model.source == source
    assert stored(hub) == [source]
    assert hub.find(source) == model
    assert leftovers(settings) == []
    assert watcher.starts == [("model.gguf", len(BIG), 0)]
    assert watcher.bytes == len(BIG)
    assert watcher.ended == 1


async def test_a_second_pull_asks_the_network_nothing(hub: Hub, site: FakeHub) -> None:
    source = site.add(NAME, TINY)
    await hub.pull(source)
    before = len(site.requests)
    await hub.pull(source)
    assert len(site.requests) == before


async def test_a_cut_download_goes_on_where_it_stopped(hub: Hub, site: FakeHub, waits: Waits) -> None:
    source = site.add(NAME, BIG)
    site.fail(NAME, cut(2 * MIB), cut(MIB))
    model = await hub.pull(source)
    assert model.path.read_bytes() == BIG
    ranges = [headers.get("range") for headers in site.bodies("/content/")]
    assert ranges == [None, f"bytes={2 * MIB}-", f"bytes={3 * MIB}-"]
    assert waits.seconds == [0.5, 0.5]  # progress was made, so patience is as new


@pytest.mark.parametrize("failing", range(1, 7))
async def test_a_cut_at_any_request_is_survived(failing: int, hub: Hub, site: FakeHub) -> None:
    source = site.add(NAME, BIG)
    site.fault_probes.add(NAME)
    site.fail(NAME, *[cut(failing * 100_000) for _ in range(failing - 1)])
    model = await hub.pull(source)
    assert model.path.read_bytes() == BIG


async def test_a_part_of_an_earlier_pull_is_used(hub: Hub, site: FakeHub, settings: Settings, waits: Waits) -> None:
    source = site.add(NAME, BIG)
    site.fail(NAME, *[cut(0)] * 6)
    site.faults[NAME][0] = cut(2 * MIB)
    with pytest.raises(DownloadFailed, match="Gave up after"):
        await hub.pull(source)
    assert stored(hub) == []
    assert leftovers(settings) == ["model.gguf.part", "model.gguf.part.json"]
    assert hub.partial_bytes(source) == 2 * MIB
    site.faults.clear()
    watcher = Watcher()
    model = await make_hub(settings, site, waits).pull(source, progress=watcher)
    assert model.path.read_bytes() == BIG
    assert site.bodies("/content/")[-1]["range"] == f"bytes={2 * MIB}-"
    assert watcher.starts == [("model.gguf", len(BIG), 2 * MIB)]


async def test_wrong_bytes_are_refused_with_both_hashes(hub: Hub, site: FakeHub, settings: Settings) -> None:
    source = site.add(NAME, BIG)
    wrong = BIG[:-1] + b"!"
    site.fail(NAME, serve(wrong))
    with pytest.raises(DownloadFailed) as caught:
        await hub.pull(source)
    assert hashlib.sha256(wrong).hexdigest() in caught.value.message
    assert hashlib.sha256(BIG).hexdigest() in caught.value.message
    assert stored(hub) == []
    assert leftovers(settings) == []


async def test_a_part_with_wrong_bytes_begins_anew(hub: Hub, site: FakeHub, settings: Settings) -> None:
    source = site.add(NAME, BIG)
    site.fail(NAME, *[cut(2 * MIB), *[cut(0)] * 6])
    with pytest.raises(DownloadFailed):
        await hub.pull(source)
    (part,) = settings.models_dir.rglob("*.part")
    part.write_bytes(b"\0" * part.stat().st_size)
    site.faults.clear()
    watcher = Watcher()
    model = await hub.pull(source, progress=watcher)
    assert model.path.read_bytes() == BIG
    assert any("beginning anew" in note for note in watcher.notes)


async def test_a_file_that_changed_between_tries_begins_anew(hub: Hub, site: FakeHub) -> None:
    old, new = BIG, sized(4 * MIB)
    source = site.add(NAME, old)

    def cut_then_change(handler: fake_hub.Handler, content: bytes) -> None:
        site.files[NAME] = new
        cut(2 * MIB)(handler, content)

    site.fail(NAME, cut_then_change)
    watcher = Watcher()
    model = await hub.pull(source, progress=watcher)
    assert model.path.read_bytes() == new
    assert any("changed" in note for note in watcher.notes)


async def test_a_changed_etag_of_a_plain_server_begins_anew(hub: Hub, site: FakeHub) -> None:
    old, new = BIG, BIG[:-8] + b"new tail"  # of one length: only the ETag tells
    site.files["m.gguf"] = old

    def cut_then_change(handler: fake_hub.Handler, content: bytes) -> None:
        site.files["m.gguf"] = new
        cut(2 * MIB)(handler, content)

    site.fail("m.gguf", cut_then_change)
    model = await hub.pull(f"{site.url}/plain/m.gguf?signature=secret")
    assert model.path.read_bytes() == new
    assert model.id == "m"
    assert "secret" not in model.source


async def test_a_changed_file_does_not_go_on_with_an_old_part(hub: Hub, site: FakeHub, settings: Settings) -> None:
    source = site.add(NAME, BIG)
    site.fail(NAME, cut(2 * MIB), *[cut(0)] * 6)
    with pytest.raises(DownloadFailed):
        await hub.pull(source)
    site.faults.clear()
    site.files[NAME] = new = sized(3 * MIB)
    model = await hub.pull(source)
    assert model.path.read_bytes() == new
    assert "range" not in site.bodies("/content/")[-1]


async def test_a_server_without_ranges_is_read_from_the_start(hub: Hub, site: FakeHub) -> None:
    source = site.add(NAME, BIG)
    site.ranges = False
    site.fail(NAME, cut(2 * MIB), cut(3 * MIB))
    watcher = Watcher()
    model = await hub.pull(source, progress=watcher)
    assert model.path.read_bytes() == BIG
    assert watcher.bytes == len(BIG)


async def test_bytes_that_nothing_vouches_for_are_not_gone_on_with(hub: Hub, site: FakeHub) -> None:
    site.etags = False
    site.files["m.gguf"] = BIG

    def cut_without_etag(handler: fake_hub.Handler, content: bytes) -> None:
        handler.answer(200, content[: 2 * MIB], {"Content-Length": str(len(content))})
        handler.close_connection = True

    site.fail("m.gguf", cut_without_etag)
    model = await hub.pull(f"{site.url}/plain/m.gguf")
    assert model.path.read_bytes() == BIG
    assert [headers.get("range") for headers in site.bodies("/plain/")] == [None, None]


async def test_without_any_length_it_still_arrives_whole(hub: Hub, site: FakeHub) -> None:
    site.files["m.gguf"] = BIG
    site.fault_probes.add("m.gguf")
    site.fail("m.gguf", chunked(BIG), chunked(BIG))
    model = await hub.pull(f"{site.url}/plain/m.gguf")
    assert model.path.read_bytes() == BIG


async def test_more_bytes_than_announced_are_refused(hub: Hub, site: FakeHub, settings: Settings) -> None:
    source = site.add(NAME, BIG)
    site.fail(NAME, chunked(BIG + BIG))
    with pytest.raises(DownloadFailed, match="more than"):
        await hub.pull(source)
    assert leftovers(settings) == []


@pytest.mark.parametrize("length", [len(TINY) - 10, len(TINY) + 10])
async def test_a_wrong_content_length_never_makes_a_model(length: int, hub: Hub, site: FakeHub) -> None:
    source = site.add(NAME, TINY)
    site.fail(NAME, *[fake_hub.announce(length)] * 6)
    with pytest.raises(DownloadFailed, match=f"should have {len(TINY)} bytes"):
        await hub.pull(source)
    assert stored(hub) == []


async def test_a_silent_server_is_given_up_and_tried_again(settings: Settings, site: FakeHub, waits: Waits) -> None:
    hub = make_hub(settings, site, waits, silence_s=1)
    source = site.add(NAME, BIG)
    site.fail(NAME, stall(2 * MIB))
    model = await hub.pull(source)
    assert model.path.read_bytes() == BIG
    assert site.bodies("/content/")[-1]["range"] == f"bytes={2 * MIB}-"


async def test_too_many_requests_waits_as_long_as_it_is_asked_to(hub: Hub, site: FakeHub, waits: Waits) -> None:
    source = site.add(NAME, TINY)
    site.fail(NAME, status(429, {"Retry-After": "7"}), status(503, {"Retry-After": "3"}))
    await hub.pull(source)
    assert waits.seconds == [7.0, 3.0]


async def test_an_absurd_wait_is_an_error(hub: Hub, site: FakeHub, waits: Waits) -> None:
    source = site.add(NAME, TINY)
    site.fail(NAME, status(429, {"Retry-After": "86400"}))
    with pytest.raises(DownloadFailed, match="86400 s"):
        await hub.pull(source)
    assert waits.seconds == []


async def test_server_errors_are_tried_again_with_growing_waits_and_an_end(
    hub: Hub, site: FakeHub, waits: Waits
) -> None:
    source = site.add(NAME, TINY)
    site.fail(NAME, *[status(500)] * 6)
    with pytest.raises(DownloadFailed, match=r"500.*Gave up after 6 tries"):
        await hub.pull(source)
    assert waits.seconds == [0.5, 1.0, 2.0, 4.0, 8.0]
    site.fail(NAME, status(502), status(504))
    await hub.pull(source)


@pytest.mark.parametrize("code", [401, 403])
async def test_refused_access_speaks_of_the_token(code: int, hub: Hub, site: FakeHub) -> None:
    source = site.add(NAME, TINY)
    site.fail(NAME, status(code))
    with pytest.raises(DownloadFailed, match=r"set HF_TOKEN"):
        await hub.pull(source)


async def test_a_token_that_is_not_enough_is_said_and_not_shown(
    settings: Settings, site: FakeHub, waits: Waits
) -> None:
    hub = make_hub(settings, site, waits, token="hf_sesame")
    source = site.add(NAME, TINY)
    site.fail(NAME, status(403))
    with pytest.raises(DownloadFailed, match="HF_TOKEN may not read it") as caught:
        await hub.pull(source)
    assert "sesame" not in caught.value.message


async def test_a_missing_file_names_where_it_was_looked_for_and_its_neighbours(hub: Hub, site: FakeHub) -> None:
    site.add("owner/repo/model-Q4_K_M.gguf", TINY)
    site.add("owner/repo/README.md", b"hello")
    with pytest.raises(DownloadFailed) as caught:
        await hub.pull("hf:owner/repo/model-Q4_K.gguf")
    assert "/owner/repo/resolve/main/model-Q4_K.gguf" in caught.value.message
    assert "model-Q4_K_M.gguf" in caught.value.message
    assert "README" not in caught.value.message


async def test_a_repository_alone_is_answered_with_its_models(hub: Hub, site: FakeHub) -> None:
    for name in ("a-Q4_0.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf", "README.md"):
        site.add(f"owner/repo/{name}", TINY)
    with pytest.raises(InvalidRequest) as caught:
        await hub.pull("hf:owner/repo")
    assert "hf:owner/repo/a-Q4_0.gguf" in caught.value.message
    assert "hf:owner/repo/b-00001-of-00002.gguf" in caught.value.message
    assert "b-00002" not in caught.value.message


async def test_the_token_goes_to_the_hub_and_nowhere_else(settings: Settings, site: FakeHub, waits: Waits) -> None:
    with running() as elsewhere:
        hub = make_hub(settings, site, waits, token="hf_sesame")
        source = site.add(NAME, TINY)
        elsewhere.files = site.files
        site.content_host = elsewhere.url
        model = await hub.pull(source)
        assert model.path.read_bytes() == TINY
        assert all(headers["authorization"] == "Bearer hf_sesame" for headers in site.asked("/resolve/"))
        assert elsewhere.requests
        assert not any("authorization" in headers for _, headers in elsewhere.requests)


async def test_another_port_of_the_same_host_is_another_origin(site: FakeHub) -> None:
    site.files["m.gguf"] = TINY
    token = Token(origin=origin("http://127.0.0.1:1"), secret="s", variable="HF_TOKEN")
    async with Remote(tokens=(token,)) as remote:
        await remote.probe(f"{site.url}/plain/m.gguf")
    assert not any("authorization" in headers for _, headers in site.requests)


async def test_redirects_end(hub: Hub, site: FakeHub) -> None:
    site.files["m.gguf"] = TINY
    site.fault_probes.add("m.gguf")
    site.fail("m.gguf", *[fake_hub.redirect("/plain/m.gguf")] * 20)
    with pytest.raises(DownloadFailed, match="redirects more than 8 times"):
        await hub.pull(f"{site.url}/plain/m.gguf")


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://x/y", "http://user:word@127.0.0.1/x", "javascript:1"])
async def test_redirects_to_strange_places_are_refused(target: str, hub: Hub, site: FakeHub) -> None:
    site.files["m.gguf"] = TINY
    site.fault_probes.add("m.gguf")
    site.fail("m.gguf", *[fake_hub.redirect(target)] * 6)
    with pytest.raises(DownloadFailed, match="redirects to something"):
        await hub.pull(f"{site.url}/plain/m.gguf")


def test_https_does_not_become_http() -> None:
    answer = httpx2.Response(302, headers={"location": "http://example.org/x"})
    with pytest.raises(DownloadFailed, match="from https to http"):
        _next("https://example.org/y", answer)
    assert _next("http://example.org/y", answer) == "http://example.org/x"


async def test_an_encoded_body_is_refused(hub: Hub, site: FakeHub) -> None:
    source = site.add(NAME, TINY)
    site.fail(NAME, lambda handler, content: handler.answer(200, content, {"Content-Encoding": "gzip"}))
    with pytest.raises(DownloadFailed, match="gzip"):
        await hub.pull(source)


async def test_a_size_of_thousands_of_digits_is_no_size(hub: Hub, site: FakeHub) -> None:
    site.files["m.gguf"] = TINY
    site.fault_probes.add("m.gguf")
    extent = {"Content-Range": f"bytes 0-0/{'9' * 5000}"}
    site.fail("m.gguf", lambda handler, content: handler.answer(206, content[:1], extent))
    with pytest.raises(DownloadFailed, match="without saying which bytes"):
        await hub.pull(f"{site.url}/plain/m.gguf")


@pytest.mark.parametrize("said", [b"<html>", b'{"x": ' + b"[" * 100_000, b'{"Data": {"Files": [{"Path": "\xff"}]}}'])
async def test_a_listing_that_is_none_is_said_so(said: bytes, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    async def json(self: Remote, url: str) -> bytes:
        return said

    monkeypatch.setattr(Remote, "json", json)
    with pytest.raises(DownloadFailed, match="no listing"):
        await hub.pull(f"ms:{NAME}")


async def test_a_full_disk_is_noticed_before_the_download(
    hub: Hub, site: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = site.add(NAME, BIG)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=len(BIG)))
    with pytest.raises(DownloadFailed) as caught:
        await hub.pull(source)
    assert f"{len(BIG) / 1e6:,.0f} MB free" in caught.value.message
    assert site.bodies("/content/") == []


async def test_the_disk_must_take_all_parts_of_a_split_model(
    hub: Hub, site: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        site.add(f"owner/repo/m-{number:05d}-of-00002.gguf", BIG)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=len(BIG) + (64 << 20)))
    with pytest.raises(DownloadFailed, match=f"{2 * len(BIG) / 1e6:,.0f} MB"):
        await hub.pull("hf:owner/repo/m-00001-of-00002.gguf")


async def test_what_is_no_model_is_thrown_away(hub: Hub, site: FakeHub, settings: Settings) -> None:
    source = site.add(NAME, b"<html>you need to log in</html>")
    with pytest.raises(ModelUnusable, match="not a GGUF file"):
        await hub.pull(source)
    assert stored(hub) == []
    assert list(settings.models_dir.rglob("*.gguf")) == []


def split_model() -> dict[str, bytes]:
    def part(number: int) -> bytes:
        extra = [pair("split.no", 4, number.to_bytes(4, "little")), pair("split.count", 4, b"\2\0\0\0")]
        return Made(pairs=[*default_pairs(), *extra], tensors=[tensor(f"w{number}", [8, 4])]).bytes()

    return {f"m-{number + 1:05d}-of-00002.gguf": part(number) for number in range(2)}


async def test_all_parts_of_a_split_model_come_whichever_is_named(hub: Hub, site: FakeHub) -> None:
    for name, content in split_model().items():
        site.add(f"owner/repo/Q4/{name}", content)
    model = await hub.pull("hf:owner/repo/Q4/m-00002-of-00002.gguf")
    assert model.id == "hf:owner/repo/Q4/m-00001-of-00002.gguf"
    assert model.facts.parameters == 64
    assert model.path.name == "m-00001-of-00002.gguf"
    assert model.size_bytes == sum(len(content) for content in split_model().values())


async def test_a_finished_part_of_a_split_model_is_not_fetched_again(hub: Hub, site: FakeHub) -> None:
    for name, content in split_model().items():
        site.add(f"owner/repo/{name}", content)
    site.fail("owner/repo/m-00002-of-00002.gguf", *[status(500)] * 6)
    with pytest.raises(DownloadFailed):
        await hub.pull("hf:owner/repo/m-00001-of-00002.gguf")
    await hub.pull("hf:owner/repo/m-00001-of-00002.gguf")
    assert len(site.bodies("/content/owner/repo/m-00001")) == 1


async def test_modelscope_files_are_checked_against_its_listing(hub: Hub, site: FakeHub) -> None:
    site.add(NAME, TINY)
    model = await hub.pull(f"ms:{NAME}")
    assert model.path.read_bytes() == TINY
    site.add("owner/repo/other.gguf", TINY)
    site.fail("owner/repo/other.gguf", serve(TINY[:-1] + b"!", etag='"same"'))
    site.fault_probes.add("owner/repo/other.gguf")
    site.faults["owner/repo/other.gguf"].appendleft(serve(TINY, etag='"same"'))
    with pytest.raises(DownloadFailed, match="wrong bytes"):
        await hub.pull("ms:owner/repo/other.gguf")


async def test_a_missing_file_on_modelscope_names_its_neighbours(hub: Hub, site: FakeHub) -> None:
    site.add(NAME, TINY)
    with pytest.raises(DownloadFailed, match=r"model\.gguf"):
        await hub.pull("ms:owner/repo/modell.gguf")


async def test_a_catalog_model_comes_from_modelscope_when_the_first_hub_has_none(
    settings: Settings, site: FakeHub, waits: Waits
) -> None:
    file = "Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf"
    site.add(file, TINY)
    environment = {"HF_ENDPOINT": "http://127.0.0.1:1", "MODELSCOPE_ENDPOINT": site.url}
    hub = Hub(settings, environment=environment, patience=Patience(sleep=waits))
    watcher = Watcher()
    model = await hub.pull("qwen3", progress=watcher)
    assert (model.id, model.source) == ("qwen3:0.6b", f"ms:{file}")
    assert any(f"Trying ms:{file}" in note for note in watcher.notes)
    assert hub.find("qwen3:0.6b-q8_0").id == "qwen3:0.6b"


async def test_an_unknown_name_offers_near_ones(hub: Hub) -> None:
    with pytest.raises(NotFound, match=r"qwen3:4b"):
        await hub.pull("qwen3:40b")


async def test_two_pulls_of_one_model_download_it_once(settings: Settings, site: FakeHub, waits: Waits) -> None:
    source = site.add(NAME, BIG)
    site.fail(NAME, stall(2 * MIB))
    first = asyncio.create_task(make_hub(settings, site, waits).pull(source))
    await asyncio.to_thread(site.stalled.wait, 30)
    watcher = Watcher()
    watcher.on_note = lambda text: site.released.set() if "waiting" in text else None
    second = asyncio.create_task(make_hub(settings, site, waits).pull(source, progress=watcher))
    models = await asyncio.gather(first, second)
    assert models[0] == models[1]
    assert models[0].path.read_bytes() == BIG
    assert len(site.bodies("/content/")) == 2  # the stalled one and the one that went on
    assert any("waiting" in note for note in watcher.notes)


async def test_cancelling_keeps_what_came(hub: Hub, site: FakeHub, settings: Settings, waits: Waits) -> None:
    source = site.add(NAME, BIG)
    site.fail(NAME, stall(3 * MIB + 5))
    reached = asyncio.Event()
    watcher = Watcher()
    watcher_advance = watcher.advance

    def advance(count: int) -> None:
        watcher_advance(count)
        if watcher.bytes >= 3 * MIB + 5:
            reached.set()

    watcher.advance = advance  # type: ignore[method-assign]
    pulling = asyncio.create_task(hub.pull(source, progress=watcher))
    await asyncio.wait_for(reached.wait(), 60)
    pulling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    assert hub.partial_bytes(source) == 3 * MIB + 5
    model = await hub.pull(source)
    assert model.path.read_bytes() == BIG
    assert site.bodies("/content/")[-1]["range"] == f"bytes={3 * MIB + 5}-"


PULL = """
import asyncio, sys
from nimbos.config import Settings
from nimbos.hub import Hub, download
model = asyncio.run(Hub(Settings(home=sys.argv[1])).pull(sys.argv[2]))
print(model.sha256)
"""


def start_pull(settings: Settings, site: FakeHub, source: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_ENDPOINT": site.url, "HF_TOKEN": ""}
    command = [sys.executable, "-c", PULL, settings.home, source]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


async def test_two_processes_pull_one_model_once(settings: Settings, site: FakeHub) -> None:
    source = site.add(NAME, BIG)
    site.fail(NAME, stall(2 * MIB))
    first = start_pull(settings, site, source)
    await asyncio.to_thread(site.stalled.wait, 60)
    second = start_pull(settings, site, source)
    asking = len(site.requests)
    site.released.set()
    outputs = [await asyncio.to_thread(process.communicate) for process in (first, second)]
    assert [out.strip() for out, _ in outputs] == [hashlib.sha256(BIG).hexdigest()] * 2
    assert len(site.bodies("/content/")) == 2
    assert len(site.requests) <= asking + 3


async def test_a_killed_pull_goes_on(hub: Hub, settings: Settings, site: FakeHub) -> None:
    source = site.add(NAME, BIG)
    site.fail(NAME, stall(3 * MIB))
    process = start_pull(settings, site, source)
    await asyncio.to_thread(site.stalled.wait, 60)
    await until(lambda: hub.partial_bytes(source) >= MIB)
    process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(process.communicate)
    assert stored(hub) == []
    kept = hub.partial_bytes(source)
    assert kept >= MIB
    model = await hub.pull(source)
    assert model.path.read_bytes() == BIG
    assert site.bodies("/content/")[-1]["range"] == f"bytes={kept}-"


COMMAND = """
import typer
from nimbos.cli import models
app = typer.Typer()
models.register(app)
app()
"""


async def test_ctrl_c_keeps_the_part_and_says_so(hub: Hub, settings: Settings, site: FakeHub) -> None:
    source = site.add(NAME, BIG)
    site.fail(NAME, stall(3 * MIB))
    environment = {**os.environ, "HF_ENDPOINT": site.url, "NIMBOS_HOME": settings.home}
    command = [sys.executable, "-c", COMMAND, "pull", source]
    process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=subprocess.PIPE)
    await asyncio.to_thread(site.stalled.wait, 60)
    await until(lambda: hub.partial_bytes(source) >= 2 * MIB)
    process.send_signal(signal.SIGINT)
    said = (await process.communicate())[1].decode()
    assert process.returncode == 130
    assert f"{hub.partial_bytes(source) / 1e6:,.1f} MB are kept" in said
    assert "Traceback" not in said
    assert (await hub.pull(source)).path.read_bytes() == BIG


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "MODELSCOPE_ENDPOINT"])
def test_an_endpoint_that_is_no_address_is_named(variable: str, settings: Settings) -> None:
    with pytest.raises(ConfigError, match=variable):
        Hub(settings, environment={variable: "hub.example"})


async def test_signatures_do_not_reach_logs(hub: Hub, site: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source = site.add(NAME, TINY)
    await hub.pull(source)
    assert site.asked("signature=secret")
    assert "secret" not in caplog.text


async def until(condition: Callable[[], bool]) -> None:
    """Another process cannot set our events: looks again each time the loop comes round."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.to_thread(os.sched_yield)


async def test_the_name_on_disk_is_ours(hub: Hub, site: FakeHub, settings: Settings) -> None:
    site.files["..%2f..%2fevil.gguf"] = TINY
    model = await hub.pull(f"{site.url}/plain/..%2f..%2fevil.gguf")
    assert model.path.resolve().is_relative_to(settings.models_dir.resolve())
    assert model.path.name == "evil.gguf"


async def test_the_nth_write_fails_and_the_part_stays_good(
    hub: Hub, site: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For n = 1, 2, 3 … until a pull has fewer writes; each is taken up again with a good disk."""
    source = site.add(NAME, BIG)
    real = download._Download._write_now
    failing = 0
    while True:
        failing += 1
        count = 0

        def write(self: Any, out: Any, block: bytearray, failing: int = failing) -> None:
            nonlocal count
            count += 1
            if count == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(self, out, block)

        monkeypatch.setattr(download._Download, "_write_now", write)
        try:
            await hub.pull(source)
        except DownloadFailed as error:
            assert "is full" in error.message
        else:
            break
        assert stored(hub) == []
        monkeypatch.setattr(download._Download, "_write_now", real)
        assert (await hub.pull(source)).path.read_bytes() == BIG
        hub.remove(source)
    assert failing > 5


def test_a_remote_file_shows_no_signature() -> None:
    file = RemoteFile(url="https://x/y.gguf?token=secret#z", size_bytes=1, validator="", sha256=None)
    assert file.label == "https://x/y.gguf"


@pytest.mark.parametrize(
    "text",
    [
        "hf:owner",
        "hf:owner/",
        "hf:../repo/x.gguf",
        "hf:owner/repo/../x.gguf",
        "hf:owner/repo//x.gguf",
        "hf:owner/repo/a\\b.gguf",
        "hf:owner/repo/x-00009-of-00002.gguf",
        "hf:ow ner/repo/x.gguf",
        "ms:owner/repo/./x.gguf",
        "pypi:/x.gguf",
        "pypi:--index-url=x/y.gguf",
        "pypi:a==1;b/x.gguf",
        "pypi:a/../x.gguf",
        "https://user:word@host/x.gguf",
        "https://host/",
        "https:///x.gguf",
    ],
)
async def test_sources_that_cannot_be_are_refused(text: str, hub: Hub, site: FakeHub) -> None:
    with pytest.raises(InvalidRequest):
        await hub.pull(text)
    assert site.requests == []


def test_paths_are_not_shared(tmp_path: Path) -> None:
    for name in ("../../x", "/etc/passwd", "..", ".hidden", "a\\..\\b", "\0", "CON\n", "", "x" * 999):
        safe = safe_file_name(name)
        assert Path(safe).name == safe
        assert (tmp_path / safe).parent == tmp_path
        assert not safe.startswith(".")
        assert len(safe) <= 200
