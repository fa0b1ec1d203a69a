"""Real sockets: clients that leave, servers that stop."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from starlette.testclient import TestClient

from llmlab.commands.serve import main as cli_main
from llmlab.infer.server import extra
from llmlab.infer.server.config import ServerConfig
from llmlab.infer.server.serving import Server, listen, url_of
from tests.drawing import built
from tests.infer.server.fake import FakeEngine, letters
from tests.infer.server.serving import running, service_of, until
from tests.infer.server.test_completions import ids_of

SLOW = 0.02  # seconds an event: a text of 100 tokens takes a second


def opened(url: str, body: dict[str, Any], path: str = "/v1/completions") -> http.client.HTTPConnection:
    """A connection on which a request was sent, and nothing read."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_what_its_request_held(stream: bool) -> None:
    engine = FakeEngine(seconds=SLOW)
    service = service_of(engine)
    with running(service) as (url, _, _):
        connection = opened(url, {"prompt": "a", "max_tokens": 120, "n": 2, "stream": stream})
        until(lambda: bool(engine.handles))
        if stream:
            connection.getresponse().fp.readline()
        connection.close()
        until(lambda: engine.unfinished == 0 and service.gate.inside == 0)
        assert engine.cancelled == engine.handles
        line = b'llmlab_requests_total{endpoint="/v1/completions",status="499"} 1.0'
        until(lambda: line in service.metrics.text())


def test_a_client_that_leaves_does_not_disturb_another() -> None:
    engine = FakeEngine(seconds=SLOW)
    with running(service_of(engine)) as (url, _, _):
        stays = opened(url, {"prompt": "stays", "max_tokens": 20})
        leaves = opened(url, {"prompt": "leaves", "max_tokens": 120, "stream": True})
        until(lambda: len(engine.handles) == 2)
        leaves.close()
        with closing(stays):
            answer = json.load(stays.getresponse())
        assert answer["choices"][0]["text"] == letters(ids_of("stays"), 0, 20)


def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    with running(service_of(FakeEngine(), body_seconds=0.1)) as (url, _, _):
        host, _, port = urlsplit(url).netloc.partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: 50\r\n\r\n{{".encode())
            assert b" 408 " in connection.recv(1000)


def test_a_server_that_stops_finishes_what_is_under_way_and_takes_nothing_new() -> None:
    engine = FakeEngine(seconds=SLOW)
    service = service_of(engine, grace_seconds=20)
    with running(service) as (url, server, thread):
        whole = opened(url, {"prompt": "whole", "max_tokens": 40})
        streamed = opened(url, {"prompt": "streamed", "max_tokens": 40, "stream": True})
        until(lambda: len(engine.handles) == 2)
        server.handle_exit(signal.SIGTERM, None)
        assert service.gate.draining
        with closing(whole), closing(streamed):
            answer = json.load(whole.getresponse())
            events = streamed.getresponse().read().decode()
        assert answer["choices"][0]["text"] == letters(ids_of("whole"), 0, 40)
        assert events.endswith("data: [DONE]\n\n")
        thread.join(10)
        assert not thread.is_alive()
        with pytest.raises(ConnectionRefusedError):
            opened(url, {"prompt": "late"})
    assert engine.cancelled == []


def test_what_is_not_done_when_grace_is_over_is_told_and_cancelled() -> None:
    engine = FakeEngine(seconds=0.2)  # a text of 120 tokens takes 12 s
    with running(service_of(engine, grace_seconds=0.1)) as (url, server, thread):
        whole = opened(url, {"prompt": "a", "max_tokens": 120})
        streamed = opened(url, {"prompt": "b", "max_tokens": 120, "stream": True})
        until(lambda: len(engine.handles) == 2)
        start = time.monotonic()
        server.handle_exit(signal.SIGTERM, None)
        with closing(whole), closing(streamed):
            response = whole.getresponse()
            assert response.status == 503
            assert json.load(response)["error"]["code"] == "shutting_down"
            events = streamed.getresponse().read().decode().split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
        thread.join(10)
        assert time.monotonic() - start < 6
    until(lambda: engine.unfinished == 0)


def test_many_clients_at_once_get_their_own_texts() -> None:
    engine = FakeEngine(seconds=0.001)
    texts: dict[int, str] = {}

    def ask(number: int, url: str) -> None:
        with closing(opened(url, {"prompt": f"client {number}", "max_tokens": 30, "stream": True})) as connection:
            events = connection.getresponse().read().decode().split("\n\n")[:-2]
            pieces = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
            texts[number] = "".join(pieces)

    with running(service_of(engine)) as (url, _, _):
        threads = [threading.Thread(target=ask, args=(number, url)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == {number: letters(ids_of(f"client {number}"), 0, 30) for number in range(40)}


def test_a_port_that_is_taken_is_told_with_a_way_out() -> None:
    with listen(ServerConfig(name="x", port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match=r"choose another --port"):
            listen(ServerConfig(name="x", port=port))
        assert url_of(first) == f"http://127.0.0.1:{port}"
    with pytest.raises(ValueError, match="no address of this machine"):
        listen(ServerConfig(name="x", host="no.such.host.invalid", port=0))


def test_packages_that_are_missing_are_named_with_the_way_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name in ("uvicorn", "jinja2") else object())
    with pytest.raises(ValueError, match=r"needs uvicorn, jinja2: pip install 'llmlab\[serve\]'"):
        cli_main(["anything"])


def test_a_server_that_all_can_reach_without_a_key_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_directory: Path
) -> None:
    monkeypatch.delenv("LLMLAB_API_KEY", raising=False)
    monkeypatch.setattr(Server, "serve_on", lambda self, listening: None)
    arguments = ["--max-rows", "2", "--max-length", "64", "--num-blocks", "16", "--prefill-chunk", "16", "--port", "0"]
    for more, warned in ((["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--api-key", "k"], False)):
        assert cli_main([str(run_directory), *arguments, *more]) == 0
        assert ("WARNING: whoever reaches 0.0.0.0" in capsys.readouterr().err) == warned


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face directory with a tokenizer."""

    import llmlab
    from llmlab.models.llama import llama
    from llmlab.tokenizers import Bytes

    directory = tmp_path_factory.mktemp("model") / "tiny-llama"
    config = llama(embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=24, vocab_size=259)
    llmlab.save_hf(built(config, 1), directory)
    Bytes().build().save(directory)
    return directory


@pytest.mark.scale
def test_layers_in_the_hosts_memory_answer_the_same_and_are_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_directory: Path
) -> None:
    answers: list[Any] = []

    def ask(server: Server, listening: socket.socket) -> None:
        app: Any = server.config.app
        client = TestClient(app, base_url="http://127.0.0.1:8000")
        body = {"prompt": "a", "max_tokens": 6, "temperature": 0, "logprobs": 2}
        answers.append(client.post("/v1/completions", json=body).json()["choices"])
        answers.append(client.post("/v1/embeddings", json={"input": "some text"}).json()["data"])

    monkeypatch.setattr(Server, "serve_on", ask)
    command = [str(run_directory), "--max-rows", "1", "--max-length", "32", "--num-blocks", "16", "--port", "0"]
    command += ["--prefill-chunk", "16"]
    assert cli_main(command) == 0
    assert "host's memory" not in capsys.readouterr().out
    assert cli_main([*command, "--offload-layers", "2"]) == 0
    assert "host        0.0 MiB of the weights, 2 layers, wait in the host's memory" in capsys.readouterr().out
    written, [embedded], offloaded, [offloaded_embedded] = answers
    assert offloaded == written
    # of unit length; the model embeds with its matrices as they are, offloaded layers as they are laid out for decoding
    np.testing.assert_allclose(offloaded_embedded.pop("embedding"), embedded.pop("embedding"), rtol=0, atol=1e-6)
    assert offloaded_embedded == embedded


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-1"], "--offload-layers=-1 is not between 0 and the 2 layers of the model"),
        (["3"], "--offload-layers=3 is not between 0 and the 2 layers of the model"),
        (["1", "--mesh.tensor", "2"], "--offload-layers 1 with --mesh.tensor 2: .* give one of the two"),
    ],
)
def test_layers_that_cannot_be_in_the_hosts_memory_are_refused(
    options: list[str], words: str, run_directory: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        cli_main([str(run_directory), "--port", "0", "--offload-layers", *options])


@pytest.mark.scale
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command_serves_and_ends_by_a_signal(run_directory: Path, number: signal.Signals, code: int) -> None:
    command = [
        *(
            sys.executable,
            "-m",
            "llmlab",
            "serve",
            str(run_directory),
            "--port",
            "0",
            "--max-rows",
            "2",
        ),
        *("--max-length", "64", "--num-blocks", "16", "--prefill-chunk", "16"),
    ]
    environment = {**os.environ, "LLMLAB_API_KEY": "secret"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(6)]
        assert lines[0].startswith("serving tiny-llama, ready after")
        url = lines[1].split()[-1].rstrip("/")
        assert "with the API key" in "".join([*lines, process.stdout.readline()])
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        headers = {"content-type": "application/json", "authorization": "Bearer secret"}
        with closing(connection):
            connection.request("POST", "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 4}), headers)
            answer = json.load(connection.getresponse())
        assert answer["model"] == "tiny-llama"
        assert answer["usage"]["completion_tokens"] <= 4
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()
