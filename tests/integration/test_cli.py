"""The command line itself: which commands there are, and what is said to one that cannot run."""

import subprocess
import sys

import pytest

from hf_moe_ep import versions
from hf_moe_ep.cli import __main__ as cli
from hf_moe_ep.cli import extras

COMMANDS = ("demo", "sft", "export", "doctor", "plan", "bench")


def status(capsys, *argv):
    """(exit status, stdout, stderr) of `hf-moe-ep argv`."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_lists_every_command(capsys):
    code, out, _ = status(capsys, "--help")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")][
        : len(COMMANDS)
    ] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(capsys, command):
    code, out, _ = status(capsys, command, "--help")
    assert code == 0
    assert f"usage: hf-moe-ep {command}" in out


def test_version(capsys):
    assert status(capsys, "--version")[:2] == (0, f"hf-moe-ep {versions.__version__}\n")


@pytest.mark.parametrize(("argv", "name"), [(["tarin"], "tarin"), ([], "COMMAND")])
def test_a_command_that_is_not_there_is_named(capsys, argv, name):
    code, _, err = status(capsys, *argv)
    assert code == 2
    assert name in err


@pytest.mark.parametrize("module", ["hf_moe_ep", "hf_moe_ep.cli"])
def test_runs_as_a_module_and_imports_no_extra(module):
    code = (
        f"import runpy, sys; sys.argv = ['x', '--version']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'trl', 'datasets', 'matplotlib'} & set(sys.modules), 'an extra was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"hf-moe-ep {versions.__version__}\n"


@pytest.mark.parametrize(("command", "extra"), [("sft", "trl"), ("demo", "trl,bench")])
def test_a_missing_extra_names_its_install_command(capsys, monkeypatch, command, extra):
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda p: None if p == "trl" else real(p))
    code, _, err = status(capsys, command)
    assert code == 2
    assert "trl is not installed" in err
    assert f"pip install 'hf-moe-ep[{extra}]'" in err


def test_require_looks_at_packages_without_a_range_too():
    extras.require("bench", "matplotlib")
    with pytest.raises(ImportError, match="no-such-package is not installed"):
        extras.require("bench", "matplotlib", "no-such-package")


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--steps", "0"], "--steps 0: give 1 or more"),
        (["--batch", "-1"], "--batch -1: give 1 or more"),
        (["--stepps", "3"], "--stepps"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_demo_refuses_by_name(capsys, argv, reason):
    code, _, err = status(capsys, "demo", *argv)
    assert code == 2
    assert reason in err
