"""A name on the Hub, where a directory is asked for, says how to get it, and is downloaded where that is possible."""

import sys

import huggingface_hub
import pytest

from llama4_jax.hub import model_directory

NAME = "meta-llama/Llama-4-Scout-17B-16E-Instruct"
COMMAND = f"hf download {NAME} --local-dir Llama-4-Scout-17B-16E-Instruct"


def test_what_is_a_directory_or_cannot_be_a_name_stays_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/tiny", "./org/name", "/org/name", "a/b/c", "name", "gs://bucket/name", tmp_path):
        assert str(model_directory(path)) in (str(path), str(path).removeprefix("./"))


def test_without_the_hubs_package_the_command_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=COMMAND) as error:
        model_directory(NAME)
    assert "llama4-jax[hub]" in str(error.value) and len(str(error.value)) < 500


def test_with_it_the_model_is_downloaded_and_that_is_said(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    assert model_directory(NAME) == tmp_path and asked == [NAME]
    assert "taking it from there" in capsys.readouterr().err


def test_offline_and_failures_are_said_with_the_command(monkeypatch):
    def fail(name, **_):
        raise OSError("401 Client Error: gated\nlong " + "x" * 1000)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for offline, reason in ((True, "HF_HUB_OFFLINE is set"), (False, "401 Client Error: gated")):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(FileNotFoundError, match=COMMAND) as error:
            model_directory(NAME)
        assert reason in str(error.value) and len(str(error.value)) < 500
