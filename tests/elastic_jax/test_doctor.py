"""What the doctor finds on machines that are not there."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import CompiledTiny

from elastic_jax import doctor
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.doctor import Finding, examine

VERSIONS = {name: "1.0" for name in doctor._PACKAGES}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
    """`machine(driver, packages)`: the findings there, by name."""

    def findings(driver: tuple[str, str] | None, **packages: str | None) -> dict[str, Finding]:
        known = VERSIONS | {name.replace("_", "-"): version for name, version in packages.items()}
        monkeypatch.setattr(doctor, "_nvidia_driver", lambda: driver)
        monkeypatch.setattr(doctor, "_version", known.get)
        return {finding.name: finding for finding in examine(None)}

    return findings


def test_a_cpu_machine_is_well(machine: Callable[..., dict[str, Finding]]) -> None:
    found = machine(None)
    assert {finding.status for finding in found.values()} <= {"ok", "note"}
    assert {"python", "packages", "driver", "plugin", "device", "cache", "hub", "memory", "kernels"} == set(found)


@pytest.mark.parametrize(("driver", "extra"), [("580.1", "cuda13"), ("550.54.15", "cuda12")])
def test_a_gpu_without_plugin_is_mended_by_the_extra_of_its_driver(
    machine: Callable[..., dict[str, Finding]], driver: str, extra: str
) -> None:
    found = machine(("NVIDIA H200", driver))["plugin"]
    assert found.status == "wrong"
    assert found.mend == f"pip install 'elastic-jax[{extra}]'"


def test_a_plugin_of_another_version_is_wrong(machine: Callable[..., dict[str, Finding]]) -> None:
    found = machine(("NVIDIA H200", "580.1"), jax_cuda13_plugin="0.9")["plugin"]
    assert found.status == "wrong"
    assert found.mend == "pip install 'jax[cuda13]==1.0'"


def test_an_old_driver_is_wrong(machine: Callable[..., dict[str, Finding]]) -> None:
    found = machine(("NVIDIA H200", "550.1"), jax_cuda13_plugin="1.0")["plugin"]
    assert found.status == "wrong"
    assert "580" in (found.mend or "")


def test_a_gpu_that_jax_does_not_use_is_wrong(machine: Callable[..., dict[str, Finding]]) -> None:
    found = machine(("NVIDIA H200", "580.1"), jax_cuda13_plugin="1.0")
    assert found["plugin"].status == "ok"
    assert found["device"].status == "wrong"


def test_missing_and_unequal_packages_are_named(machine: Callable[..., dict[str, Finding]]) -> None:
    assert "flax" in machine(None, flax=None)["packages"].found
    assert machine(None, jaxlib="0.9")["packages"].mend == "pip install jax==1.0"


def test_a_jax_that_cannot_be_imported_is_a_finding(
    machine: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: str) -> None:
        raise ImportError("no jaxlib")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = machine(None)
    assert found["device"].status == "wrong"
    assert "no jaxlib" in found["device"].found
    assert "memory" not in found


def test_a_cache_that_is_a_file_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ELASTIC_JAX_CACHE", str(tmp_path / "file"))
    found = {finding.name: finding for finding in examine(None)}["cache"]
    assert found.status == "wrong"
    assert "ELASTIC_JAX_CACHE" in (found.mend or "")


def test_the_modes_of_a_checkpoint_are_looked_at(
    compiled_tiny: Callable[..., CompiledTiny], checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    compiled = compiled_tiny("S", "bfloat16")
    found = {finding.name: finding for finding in examine(compiled.checkpoint.path)}
    assert found["mode S"].status == "ok"
    found = {finding.name: finding for finding in examine(checkpoint_of("tiny_llama").path)}
    assert found["mode XL"].status == "note"
    assert "elastic-jax compile" in (found["mode XL"].mend or "")
    found = {finding.name: finding for finding in examine(tmp_path)}
    assert found["checkpoint"].status == "wrong"
