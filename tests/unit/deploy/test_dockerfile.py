"""deploy/Dockerfile and the locks it installs, as far as they can be judged without an engine."""

import json
import re
import runpy
import socket
import subprocess
import sys
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.deploy.compose import ROOT, services
from worker.settings import HttpSettings

DOCKERFILE = ROOT / "deploy/Dockerfile"
CONTEXT = [
    line.removeprefix("!")
    for line in (ROOT / ".dockerignore").read_text().splitlines()
    if line.startswith("!")
]
CUDA_ONLY = re.compile(r"torch|torchaudio|triton|nvidia-.*|cuda-.*")
PINNED = re.compile(r"^(?P<name>[a-z0-9-]+)==(?P<version>\S+)(?P<marker>[^\\]*)", re.M)


def instructions() -> list[tuple[str, str]]:
    """Every instruction and its arguments, comments and line breaks taken out."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.M)
    joined = text.replace("\\\n", " ")
    return [
        (line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()
    ]


def arguments(instruction: str) -> list[str]:
    return [text for name, text in instructions() if name == instruction]


def requirements(path: str) -> list[str]:
    """Every requirement of a lock with its hashes."""
    return re.split(r"\n(?=\S)", (ROOT / path).read_text().strip())


def locked(path: str) -> dict[tuple[str, str], str]:
    """Versions by name and marker."""
    text = (ROOT / path).read_text()
    return {
        (found["name"], found["marker"].strip()): found["version"]
        for found in PINNED.finditer(text)
    }


SHARED = locked("deploy/requirements.lock")
CUDA = locked("deploy/requirements-cuda.lock")
INSTALLED = {name for name, _ in SHARED | CUDA}


def sources() -> list[str]:
    """What is copied from the build context."""
    return [
        source
        for words in arguments("COPY")
        if not words.startswith("--from=")
        for source in words.split()[:-1]
    ]


def test_everything_copied_exists_and_is_let_through() -> None:
    assert sources()
    for source in sources():
        assert (ROOT / source).exists(), source
        assert source.removeprefix("./") in CONTEXT, source


def test_nothing_is_let_through_that_is_not_copied() -> None:
    assert sorted(CONTEXT) == sorted(sources())


def test_stages_refer_to_stages_that_exist() -> None:
    stages = {words.split(" AS ")[1] for words in arguments("FROM")}
    bases = {words.split(" AS ")[0] for words in arguments("FROM")}
    variants = {f"build-{variant}" for variant in ("cpu", "cuda")}
    assert variants <= stages
    assert bases <= stages | {"python:${PYTHON}", "build-${VARIANT}"}
    referred = re.findall(r"(?:--from=|from=)(\w+)", "\n".join(text for _, text in instructions()))
    assert set(referred) <= stages


def test_the_base_image_is_pinned() -> None:
    (base,) = (words for words in arguments("ARG") if words.startswith("PYTHON="))
    assert re.fullmatch(r"PYTHON=3\.11\.\d+-slim-\w+", base)


def test_the_image_runs_the_worker_without_root_and_checks_itself() -> None:
    assert arguments("USER")[-1] == "10001:10001"
    assert arguments("ENTRYPOINT") == ['["timbre"]']
    assert arguments("CMD")[-1] == '["worker"]'
    port = HttpSettings().port
    assert f"//localhost:{port}/health/ready" in arguments("HEALTHCHECK")[0]
    assert arguments("EXPOSE") == [str(port)]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_container_is_checked_at_either_loopback_address(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TIMBRE_HTTP__HOST=:: listens on no address of IPv4."""
    resolve = socket.getaddrinfo

    def as_engines_tell_hosts(host: str, *rest: Any) -> list[Any]:
        addresses = ("::1", "127.0.0.1") if host == "localhost" else (host,)
        return [place for address in addresses for place in resolve(address, *rest)]

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        server = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip("this machine has no IPv6")
    check = runpy.run_path(str(ROOT / "deploy/healthcheck.py"))["main"]
    *_, compose = services()["worker"]["healthcheck"]["test"]
    *_, image = json.loads(arguments("HEALTHCHECK")[0].partition("CMD")[2])
    assert compose == image
    with server, ThreadPoolExecutor() as pool:
        server.settimeout(10)
        monkeypatch.setattr(socket, "getaddrinfo", as_engines_tell_hosts)
        status = pool.submit(check, image.replace("8080", str(server.getsockname()[1])))
        connection, _ = server.accept()
        with connection:
            connection.recv(1024)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
        assert status.result() == 0


@pytest.mark.parametrize("path", ["deploy/requirements.lock", "deploy/requirements-cuda.lock"])
def test_every_requirement_has_hashes_and_no_address(path: str) -> None:
    text = (ROOT / path).read_text()
    assert "://" not in text
    assert "--index" not in text
    for requirement in requirements(path):
        assert "--hash=sha256:" in requirement, requirement.splitlines()[0]


def test_the_image_gets_the_files_that_were_tested() -> None:
    tested = set(requirements("requirements.lock"))
    assert set(requirements("deploy/requirements.lock")) <= tested
    assert set(requirements("deploy/requirements-cuda.lock")) <= tested


def test_every_python_gets_the_versions_that_were_tested() -> None:
    names = [name for name, _ in locked("requirements.lock")]
    assert len(names) == len(set(names))


def test_the_image_gets_what_the_worker_needs_and_no_more() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=\[;]", requirement)[0] for requirement in requirements}

    needed = names(project["dependencies"])
    extras = {name for extra in project["optional-dependencies"].values() for name in names(extra)}
    assert needed <= INSTALLED
    assert not INSTALLED & (extras - needed)


def test_the_image_gets_all_that_its_packages_need() -> None:
    """Or `pip check` ends its build."""
    for name in INSTALLED:
        try:
            needs = [Requirement(need) for need in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue  # of another platform
        needed = {need.name for need in needs if not need.marker or need.marker.evaluate()}
        assert {canonicalize_name(need) for need in needed} <= INSTALLED, name


def test_the_cpu_variant_carries_no_cuda() -> None:
    assert not [name for name, _ in SHARED if CUDA_ONLY.fullmatch(name)]
    assert [name for name, _ in CUDA if CUDA_ONLY.fullmatch(name)] == [name for name, _ in CUDA]


def test_the_cpu_variant_asks_for_the_cpu_build_of_the_same_torch() -> None:
    (command,) = (text for text in arguments("RUN") if "TORCH_INDEX" in text)
    (choice,) = re.findall(r"\$\((.*)\)", command)
    chosen = subprocess.run(
        ["sh", "-c", choice], cwd=ROOT / "deploy", capture_output=True, text=True, check=True
    ).stdout.split()
    assert chosen == [f"{name}=={CUDA[name, '']}+cpu" for name in ("torch", "torchaudio")]


def test_the_wheel_carries_the_models_and_schemas(tmp_path: Path) -> None:
    """Built as the Dockerfile builds it, from a copy of what it copies."""
    packages = ["schemas", "model", "worker"]
    for name in ["pyproject.toml", "README.md", *packages]:
        subprocess.run(["cp", "-r", ROOT / name, tmp_path / name], check=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."),
        ],
        cwd=tmp_path,
        check=True,
    )
    (wheel,) = (tmp_path / "dist").glob("timbre-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())
    expected = {
        str(path.relative_to(ROOT))
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= carried
