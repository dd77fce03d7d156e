"""The service as a command: slow clients, broken ones, its end, and what it refuses."""

import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from serve_cases import ROOT, command, make_folder, request

from ehi.serve.__main__ import main

SECONDS = 0.6  # to send a head or a body


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("sockets") / "index")


@pytest.fixture(scope="module")
def port(folder):
    with command(folder, f"--timeout={SECONDS}", "--max-connections=20") as (_, port):
        yield port


def works(port):
    status, _, found = request(port, "POST", "/search", {"text": "a b", "k": 2})
    return status == 200 and len(found["results"][0]["hits"]) == 2


def answer_of(sock):
    """Status and JSON of the answer that comes through a socket until it is closed."""
    text = b""
    sock.settimeout(10)
    while b"}" not in text and (part := sock.recv(2**16)):
        text += part
    head, _, body = text.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


HEAD = (
    b"POST /search HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (b"", 408, "the head did not arrive"),
        (b"POST /search HTT", 408, "the head did not arrive"),
        (HEAD % 50 + b'{"text"', 408, "the body did not arrive within 0.6 seconds"),
        (b"nonsense\r\n\r\n", 400, "this is not HTTP/1.1"),
        (HEAD[:-2] % 13 + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
         b'{"text": "a"}', 400, "can't ask for an Upgrade"),
        (b"GET /%\xff\xff HTTP/1.1\r\n\r\n", 400, "this is not HTTP/1.1"),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 2**17, 431, "a head has at most"),
    ],
)  # fmt: skip
def test_slow_and_broken_clients_are_told_so(port, sent, status, words):
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(sent)
        assert works(port)  # meanwhile
        found = answer_of(sock)
        assert found[0] == status and words in found[1]["error"]
    assert works(port)


def test_a_client_that_drips_its_body_is_not_waited_for(port):
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(HEAD % 1000)
        started = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() < started + 1.5 * SECONDS:
                sock.sendall(b" ")
                time.sleep(0.05)
        assert answer_of(sock)[0] == 408


@pytest.mark.parametrize("stated", [True, False])
def test_a_large_body_is_refused_and_the_client_sees_why(port, stated):
    """Although it sends all of it before it reads the answer."""
    size = str(30 * 2**16)

    def body():
        for _ in range(30):
            yield b" " * 2**16
            time.sleep(0.01)

    headers = {"Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        if stated:
            headers["Content-Length"] = size
        connection.request(
            "POST", "/search", body(), headers, encode_chunked=not stated
        )
        answer = connection.getresponse()
        assert answer.status == 413
        assert json.loads(answer.read()) == {
            "error": "a body has at most 1,048,576 bytes"
        }
    assert works(port)


def test_too_many_connections_are_refused_and_leave_room_again(port):
    with contextlib.ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            for _ in range(21)
        ]
        status, found = answer_of(socks[-1])
        assert status == 503 and "too many connections" in found["error"]
        assert answer_of(socks[0])[0] == 408
    for _ in range(100):
        with contextlib.suppress(OSError, http.client.HTTPException):
            if works(port):
                return
        time.sleep(0.05)
    raise AssertionError("connections that were closed are still counted")


def test_clients_that_go_away_do_no_harm(port):
    for sent in (b"", HEAD % 50, HEAD % 13 + b'{"text": "a"}'):
        for _ in range(5):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.sendall(sent)
            sock.close()
    assert works(port)


def test_the_lines_of_the_readme_work(port):
    """Each of them, for an index of width 32 with other ids and fewer leaves."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    text = (ROOT / "ehi/serve/README.md").read_text()
    lines = re.findall(r"^    ((?:curl|python -c) .*?(?:\|\n +curl .*)?)$", text, re.M)
    assert len(lines) > 6
    for line in lines:
        line = line.replace("8000", str(port)).replace("384", "32").replace("/71", "/1")
        line = re.sub("^python", sys.executable, line)
        done = subprocess.run(line, shell=True, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, line
        assert '"error"' not in done.stdout, line


def test_sigterm_answers_what_has_begun_and_exits_with_0(folder):
    with command(folder, "--batch-delay=500") as (process, port):
        found = []

        def ask():
            found.append(request(port, "POST", "/search", {"text": "a"})[0])

        idle = http.client.HTTPConnection("127.0.0.1", port)
        idle.request("GET", "/health")
        idle.getresponse().read()
        asking = [threading.Thread(target=ask) for _ in range(5)]
        for thread in asking:
            thread.start()
        for _ in range(100):  # until all have begun
            text = request(port, "GET", "/metrics")[2].decode()
            if "ehi_waiting_requests 5.0" in text:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        for thread in asking:
            thread.join()
        assert found == [200] * 5
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
        with pytest.raises(OSError):
            request(port, "GET", "/health")


def test_mistakes_on_the_command_line_are_one_sentence(
    folder, tmp_path, port, capsys, monkeypatch
):
    monkeypatch.delenv("EHI_TOKEN", raising=False)
    for options, words in (
        ([f"--index={tmp_path}"], "holds no index"),
        ([f"--index={folder}", "--host=0.0.0.0"], "set EHI_TOKEN to a secret"),
        ([f"--index={folder}", f"--port={port}"], "Address already in use"),
    ):
        assert main(options) == 1
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1 and not said.out


def test_a_missing_package_is_said_with_the_line_that_installs_it():
    script = (
        "import sys; sys.modules['uvicorn.protocols.http.httptools_impl'] = None\n"
        "from ehi.serve.__main__ import main; sys.exit(main(['--index=x']))"
    )
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == (
        "error: the service needs uvicorn: python -m pip install "
        "starlette uvicorn httptools msgspec prometheus-client\n"
    )


def test_a_token_comes_from_the_environment(folder):
    with command(folder, EHI_TOKEN="sesame") as (_, port):
        assert request(port, "POST", "/search", {"text": "a"})[0] == 401
        right = {"Authorization": "Bearer sesame"}
        assert request(port, "POST", "/search", {"text": "a"}, right)[0] == 200
