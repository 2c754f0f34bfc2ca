from importlib.metadata import requires

from packaging.requirements import Requirement


def _asked_for(extra: str, python: str) -> dict[str, str]:
    environment = {"extra": extra, "python_version": python, "python_full_version": f"{python}.0"}
    return {
        requirement.name: str(requirement.specifier)
        for requirement in map(Requirement, requires("bsjax") or ())
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }


def test_only_the_python_of_ci_installs_torch_with_the_tests():
    parity = _asked_for("parity", "3.13")["torch"]
    assert _asked_for("test", "3.11")["torch"] == parity
    assert "torch" not in _asked_for("test", "3.12")
    assert "torch" not in _asked_for("test", "3.13")
    assert "torch" not in _asked_for("", "3.11")
