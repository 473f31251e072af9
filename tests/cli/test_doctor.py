"""What the doctor finds, on this machine and on worse ones."""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from calling import call

from embedcache import doctor


def findings(*arguments: object) -> dict[str, dict[str, str]]:
    called = call("doctor", "--json", *arguments)
    return {found["name"]: found for found in json.loads(called.output)}


def test_this_machine_has_what_is_needed(tmp_path: Path) -> None:
    called = call("doctor", "--cache", tmp_path / "cache", "--no-network")
    assert called.exit_code == 0, called.output
    lines = called.output.splitlines()
    assert all(line.startswith(("ok ", "missing ")) for line in lines)
    for name in ("Python", "torch", "h5py", "DICOM", "CPU", "memory", "disk", "hard links", "record locks", "[dask]"):
        assert sum(name in line[9:31] for line in lines) >= 1, name
    assert list(tmp_path.iterdir()) == []  # it leaves nothing


def test_as_a_module_and_as_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "embedcache", "doctor", "--json", "--no-network", "--cache", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {"name", "state", "said", "fix"} == set(json.loads(done.stdout)[0])


def test_a_library_that_cannot_be_loaded_is_told_and_ends_in_1(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "embedcache", "doctor", "--no-network", "--cache", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("problem") and " torch " in line]
    assert "libcudart.so.12: cannot open" in line
    assert "run pip install 'torch>=2.10' --force-reinstall" in line


def test_an_old_and_an_absent_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = importlib.metadata.version

    def version(name: str) -> str:
        if name == "pydicom":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "pandas" else "" if name == "distributed" else true(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "_LOADED", ())
    found = findings("--no-network", "--cache", tmp_path)
    assert found["pandas"]["state"] == found["pydicom"]["state"] == "problem"
    assert found["pandas"]["said"] == "1.0, expected >=2.2"
    assert found["pydicom"]["fix"].startswith("run pip install 'pydicom>=")
    assert found["[dask]"]["state"] == "missing"
    assert found["[dask]"]["fix"] == "run pip install 'embedcache[dask]'"


@pytest.fixture
def hub() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers_one_that_does_not_and_none(tmp_path: Path, hub: str, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_LOADED", ())
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", hub)
    called = call("doctor", "--cache", tmp_path)
    assert f"{hub} answers; a token is set" in called.output
    assert "hf_secret" not in called.output
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    gone = findings("--cache", tmp_path)["hub"]
    assert gone["state"] == "missing"
    assert "http://127.0.0.1:9 cannot be reached" in gone["said"]
    assert "hf:path/to/checkpoint" in gone["fix"]
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:9")
    assert findings("--cache", tmp_path)["hub"]["said"].startswith("http://127.0.0.1:9 cannot be reached")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert findings("--cache", tmp_path)["hub"]["said"] == "HF_HUB_OFFLINE is set"


def test_a_file_system_without_hard_links_and_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_LOADED", ())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", refuse)
        called = call("doctor", "--no-network", "--cache", tmp_path)
        assert called.exit_code == 1
        assert "has none (Operation not permitted), and stores publish their shards by them" in called.output
    monkeypatch.setattr(doctor.tempfile, "TemporaryDirectory", refuse)
    found = findings("--no-network", "--cache", tmp_path)["cache"]
    assert found["state"] == "problem"
    assert "cannot be written (Operation not permitted)" in found["said"]
