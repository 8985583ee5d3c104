"""`llama4 serve` as a user starts it."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import openai
import pytest
from micro_run import ROOT, picture_directory

from llama4_jax import cli
from llama4_jax.serve.http import most_connections


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return picture_directory(tmp_path_factory.mktemp("serve") / "micro-model")


def refused(capsys, *arguments):
    assert cli.main(["serve", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "Traceback" not in said
    return said


def test_mistakes_are_told_before_anything_is_loaded(tmp_path, capsys):
    keys = tmp_path / "keys"
    assert "no such file" in refused(capsys, tmp_path, "--port", 0, "--api-key-file", keys)
    keys.write_text(" \n\n")
    assert "should hold keys" in refused(capsys, tmp_path, "--port", 0, "--api-key-file", keys)
    keys.write_bytes(b"\xff\xfe")
    assert "should hold keys" in refused(capsys, tmp_path, "--port", 0, "--api-key-file", keys)
    assert "no directory" in refused(capsys, tmp_path, "--port", 0, "--allow-images-under", tmp_path / "pictures")
    assert "--port must be from 0" in refused(capsys, tmp_path, "--port", 70000)
    assert "--context must be" in refused(capsys, tmp_path, "--port", 0, "--context", 1)
    assert "--drain-seconds must be" in refused(capsys, tmp_path, "--port", 0, "--drain-seconds", -1)
    assert "no address to listen to" in refused(capsys, tmp_path, "--port", 0, "--host", "not a host")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refused(capsys, tmp_path, "--port", port)
        assert f"cannot listen to 127.0.0.1:{port}: Address already in use" in said and "--port" in said
    assert "no such" in refused(capsys, tmp_path / "nothing", "--port", 0).lower()


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "llguidance", "prometheus_client"])
def test_without_its_packages_it_names_the_extra(package, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("llama4_jax.serve.", f"{package}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(capsys, tmp_path)
    assert package in said and 'pip install -e ".[serve]"' in said


def test_it_answers_drains_at_sigterm_and_exits_with_0(directory, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("a-key\nanother\n")
    command = [sys.executable, "-m", "llama4_jax.cli", "serve", directory, "--port", "0", "--slots", "2",
               "--context", "2048", "--api-key-file", keys]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            ready = process.stdout.readline()
            assert ready.startswith("ready: micro-model at http://127.0.0.1:"), (ready, process.stderr.read())
            url = ready.split(" at ")[1].split()[0]
            client = openai.OpenAI(base_url=f"{url}v1", api_key="another", max_retries=0, timeout=30)
            assert [model.id for model in client.models.list()] == ["micro-model"]
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="no").models.list()
            page = urllib.request.urlopen(url).read()
            assert b"<title>" in page
            bias = {str(token): -100 for token in range(256, 320)}
            stream = iter(client.chat.completions.create(
                model="micro-model", messages=[{"role": "user", "content": "hi"}], stream=True, max_tokens=1500,
                logit_bias=bias, stream_options={"include_usage": True},
            ))  # fmt: skip
            next(stream)
            process.send_signal(signal.SIGTERM)
            chunks = list(stream)
            assert chunks[-1].usage.completion_tokens == 1500  # what ran went on to its end
            assert process.wait(30) == 0
            said = process.stderr.read()
            assert "SIGTERM: no new requests" in said and "Traceback" not in said, said
        finally:
            process.kill()
    assert json.dumps(ready)


def test_as_many_connections_are_taken_as_files_may_be_open(monkeypatch):
    limits = {"now": (256, 1000)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.update(now=pair))
    assert most_connections(2048) == 1000 - 128 and limits["now"] == (1000, 1000)
    limits["now"] = (1024, resource.RLIM_INFINITY)
    assert most_connections(2048) == 2048 and limits["now"] == (2048 + 128, resource.RLIM_INFINITY)
    limits["now"] = (10_000, 20_000)
    assert most_connections(2048) == 2048 and limits["now"] == (10_000, 20_000)
