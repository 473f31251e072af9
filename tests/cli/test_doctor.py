"""What the doctor finds, on this machine and on worse ones."""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import h5py
import pytest
from calling import call

from embedcache import doctor


def findings(*arguments: object) -> dict[str, dict[str, str]]:
    called = call("doctor", "--json", *arguments)
    return {found["name"]: found for found in json.loads(called.output)}


@pytest.fixture
def require(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Names the few libraries that the package is to ask for."""

    def these(*required: str) -> None:
        monkeypatch.setattr(importlib.metadata, "requires", lambda _: list(required))

    return these


@pytest.fixture
def shadow(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts modules before those of the same names, in other processes."""

    def these(**modules: str) -> None:
        folder = tmp_path_factory.mktemp("modules")
        for name, code in modules.items():
            (folder / f"{name}.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return these


def test_this_machine_has_what_is_needed(tmp_path: Path) -> None:
    called = call("doctor", "--cache", tmp_path / "cache", "--no-network")
    assert called.exit_code == 0, called.output
    lines = called.output.splitlines()
    assert all(line.startswith(("ok ", "missing ")) for line in lines)
    for name in ("Python", "torch", "h5py", "DICOM", "CPU", "memory", "disk", "hard links", "record locks", "[dask]"):
        assert sum(name in line[9:31] for line in lines) >= 1, name
    assert f"h5py                   {h5py.__version__}, HDF5 {h5py.version.hdf5_version}" in called.output
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


def test_every_library_is_tried_by_the_name_that_it_is_imported_by(tmp_path: Path, monkeypatch) -> None:
    tried: list[str] = []

    def note(names: Sequence[str]) -> Iterator[tuple[str, doctor._Told]]:
        tried.extend(names)
        return ((name, doctor._Told()) for name in names)

    monkeypatch.setattr(doctor, "_try", note)
    findings("--no-network", "--cache", tmp_path)
    required = [text for text in importlib.metadata.requires("embedcache") or () if "extra ==" not in text]
    assert len(set(tried)) == len(tried) >= len(required) > 25
    for name in ("torch", "matplotlib", "annotated_types", "google_crc32c", "jinja2", "open_clip", "PIL", "yaml",
                 "sklearn", "gdcm", "jpeg_ls", "openjpeg"):  # fmt: skip
        assert name in tried
    assert not {"functorch", "pylab", "_yaml", "_CharLS"} & set(tried)


def test_what_ends_the_process_that_loads_it_hides_nothing_that_comes_after_it(tmp_path, require, shadow) -> None:
    require("joblib>=1.4", "PyYAML>=6.0", "safetensors>=0.5", "scikit-learn>=1.5", "packaging>=24")
    shadow(
        joblib="raise RuntimeError('no semaphores')",
        yaml="import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        sklearn="raise SystemExit(3)",
        safetensors="print('embedcache is not doctor: {}', end='')",
    )
    found = findings("--no-network", "--cache", tmp_path)
    assert "does not work: RuntimeError: no semaphores" in found["joblib"]["said"]
    assert found["PyYAML"]["said"].endswith("does not work: it ends Python (Segmentation fault)")
    assert found["PyYAML"]["fix"] == "run pip install 'PyYAML>=6.0' --force-reinstall"
    assert found["scikit-learn"]["said"].endswith("does not work: exit code 3")
    assert [found[name]["state"] for name in ("joblib", "PyYAML", "scikit-learn")] == ["problem"] * 3
    assert [found[name]["state"] for name in ("safetensors", "packaging", "DICOM")] == ["ok"] * 3


def test_what_torch_says_of_the_gpus(tmp_path: Path, require, shadow) -> None:
    require("torch>=2.10")
    shadow(
        torch="""
from types import SimpleNamespace as of
version = of(cuda="13.0")
cuda = of(is_available=lambda: True, device_count=lambda: 1,
          get_device_properties=lambda k: of(name="NVIDIA H100", total_memory=85e9))
"""
    )
    found = findings("--no-network", "--cache", tmp_path)
    assert found["torch"]["said"].endswith(", CUDA 13.0")
    assert found["GPU 0"]["said"] == "NVIDIA H100, 85 GB, torch with CUDA 13.0"


def test_what_does_not_come_to_an_end(tmp_path: Path, require, shadow, monkeypatch: pytest.MonkeyPatch) -> None:
    require("torch>=2.10", "packaging>=24")
    shadow(torch="import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_LOADING_S", 2)
    found = findings("--no-network", "--cache", tmp_path)
    assert found["torch"]["state"] == "problem"
    assert found["torch"]["said"].endswith("does not work: not loaded within 2 s")
    assert found["torch"]["fix"] == "run pip install 'torch>=2.10' --force-reinstall"
    assert found["packaging"]["state"] == "ok"
    assert "GPU" not in found


@pytest.mark.parametrize(
    ("opened", "said"),
    [
        ("raise OSError('no core driver')", "OSError: no core driver"),
        ("return contextlib.nullcontext(Zeros())", "OSError: HDF5 in memory: wrote [1, 2, 3], read [0, 0, 0]"),
    ],
)
def test_an_hdf5_that_loads_and_does_not_work(opened: str, said: str, tmp_path: Path, require, shadow) -> None:
    require("h5py>=3.16")
    shadow(
        h5py=f"""
import collections, contextlib, numpy
class Zeros(collections.UserDict):
    def __setitem__(self, name, values): self.data[name] = numpy.zeros(len(values), int)
def File(*_, driver, backing_store):
    {opened}
"""
    )
    found = findings("--no-network", "--cache", tmp_path)["h5py"]
    assert found["state"] == "problem"
    assert found["said"].endswith(f"does not work: {said}")


def test_every_transfer_syntax_is_asked_of_the_library_that_decodes_it(tmp_path: Path, require, shadow) -> None:
    require("pydicom>=3.0", "pyjpegls>=1.5", "pylibjpeg>=2.0", "pylibjpeg-openjpeg>=2.4", "python-gdcm>=3.0.24")
    shadow(jpeg_ls="raise ImportError('none')")  # gdcm could, and is not asked to
    found = findings("--no-network", "--cache", tmp_path)["DICOM"]
    assert found["state"] == "problem"
    assert found["said"] == (
        "cannot decode JPEG-LS Lossless Image Compression, JPEG-LS Lossy (Near-Lossless) Image Compression "
        "without pyjpegls"
    )
    assert found["fix"] == "run pip install 'pyjpegls>=1.5' --force-reinstall"
    shadow(gdcm="raise ImportError('none')", pylibjpeg="raise ImportError('none')")
    found = findings("--no-network", "--cache", tmp_path)["DICOM"]
    for syntax in ("JPEG Extended (Process 2 and 4)", "JPEG Lossless, Non-Hierarchical (Process 14)",
                   "JPEG 2000 Image Compression,", "High-Throughput JPEG 2000 with RPCL Options"):  # fmt: skip
        assert syntax in found["said"]
    assert "JPEG-LS" not in found["said"]
    assert "JPEG Baseline" not in found["said"]
    assert found["said"].endswith(" without gdcm, pylibjpeg")
    assert found["fix"] == (
        "run pip install 'pylibjpeg>=2.0' 'pylibjpeg-openjpeg>=2.4' 'python-gdcm>=3.0.24' --force-reinstall"
    )


def test_a_broken_pydicom_and_a_broken_huggingface_hub_are_told(tmp_path: Path, shadow, hub: str, monkeypatch) -> None:
    shadow(pydicom="raise RuntimeError('too new')", huggingface_hub="raise RuntimeError('too old')")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", hub)
    code = """
import importlib.metadata
importlib.metadata.requires = lambda _: ["huggingface_hub>=1.0", "pydicom>=3.0"]
from embedcache.cli import main
main()
"""
    command = [sys.executable, "-c", code, "doctor", "--json", "--cache", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert found["huggingface_hub"]["said"].endswith("does not work: RuntimeError: too old")
    assert found["pydicom"]["said"].endswith("does not work: RuntimeError: too new")
    assert found["DICOM"]["said"] == "cannot be read: RuntimeError: too new"
    assert [found[name]["state"] for name in ("huggingface_hub", "pydicom", "DICOM")] == ["problem"] * 3
    assert found["hub"]["state"] == "ok"


def test_an_old_and_an_absent_library(tmp_path: Path, require, monkeypatch: pytest.MonkeyPatch) -> None:
    true = importlib.metadata.version

    def version(name: str) -> str:
        if name == "pydicom":
            raise importlib.metadata.PackageNotFoundError(name)
        old = {"pandas": "1.0", "onnxruntime": "1.2", "distributed": ""}
        return old[name] if name in old else true(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    extras = [text for text in importlib.metadata.requires("embedcache") or () if "extra ==" in text]
    require("pandas>=2.2", "pydicom>=3.0", *extras)
    found = findings("--no-network", "--cache", tmp_path)
    assert found["pandas"]["state"] == found["pydicom"]["state"] == "problem"
    assert found["pandas"]["said"] == "1.0, expected >=2.2"
    assert found["pydicom"]["fix"].startswith("run pip install 'pydicom>=")
    assert found["[dask]"]["state"] == found["[onnx]"]["state"] == "missing"
    assert found["[dask]"]["said"] == "distributed not installed"
    assert found["[dask]"]["fix"] == "run pip install 'embedcache[dask]'"
    assert found["[onnx]"]["said"] == "onnxruntime 1.2, expected >=1.20"
    assert found["[onnx]"]["fix"] == "run pip install 'embedcache[onnx]'"


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


def test_a_hub_that_answers_one_that_does_not_and_none(tmp_path: Path, hub: str, require, monkeypatch) -> None:
    require("huggingface_hub>=1.0")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", hub)
    called = call("doctor", "--cache", tmp_path)
    assert f"{hub} answers; a token is set" in called.output
    assert "hf_secret" not in called.output
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path))  # it cannot be read as a file
    found = findings("--cache", tmp_path)
    assert f"{hub} answers; no token" in found["hub"]["said"]
    assert found["huggingface_hub"]["state"] == "ok"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    gone = findings("--cache", tmp_path)["hub"]
    assert gone["state"] == "missing"
    assert "http://127.0.0.1:9 cannot be reached" in gone["said"]
    assert "hf:path/to/checkpoint" in gone["fix"]
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:9")
    assert findings("--cache", tmp_path)["hub"]["said"].startswith("http://127.0.0.1:9 cannot be reached")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert findings("--cache", tmp_path)["hub"]["said"] == "HF_HUB_OFFLINE is set"


def test_a_file_system_without_hard_links_and_a_folder_that_cannot_be_written(tmp_path, require, monkeypatch) -> None:
    require()

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
