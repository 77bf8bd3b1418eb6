"""Help answers at once, and nothing heavy is imported for it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

COMMANDS = [
    "",
    "demo",
    "generate",
    "train",
    "eval",
    "import",
    "export",
    "tokenizer",
    "tokenizer train",
    "tokenizer info",
    "tokenizer encode",
    "tokenizer decode",
    "tokenizer eval",
    "tokenizer export",
    "data",
    "data pack",
    "data tokenize",
    "data inspect",
]
PROBE = """
import contextlib, io, json, sys, time
from plait.__main__ import main
found = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["plait", *command.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as stop:
            found[command] = [stop.code, out.getvalue()]
heavy = {"torch", "numpy", "PIL", "deepspeed", "megatron", "transformers", "sentencepiece", "av"}
print(json.dumps({"found": found, "heavy": sorted(heavy & set(sys.modules))}))
"""


def test_every_help_imports_nothing_heavy() -> None:
    command = [sys.executable, "-c", PROBE, json.dumps(COMMANDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["heavy"] == []
    for name in COMMANDS:
        code, text = facts["found"][name]
        assert code == 0
        assert f"plait {name}".rstrip() in text
        assert "--help" in text


def test_help_is_fast(plait: Callable[..., Any]) -> None:
    start = time.perf_counter()
    done = plait("--help")
    assert done.returncode == 0
    assert "generate" in done.stdout
    assert time.perf_counter() - start < 5  # torch alone takes about that on a busy machine


def test_importing_plait_is_light() -> None:
    probe = "import sys, plait; dir(plait); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"


def test_commands_are_all_in_the_list() -> None:
    from plait.__main__ import app, data, tokenizer

    def names(group: Any, prefix: str = "") -> set[str]:
        return {prefix + (c.name or c.callback.__name__) for c in group.registered_commands}

    groups = {"", "tokenizer", "data"}
    assert set(COMMANDS) == groups | names(app) | names(data, "data ") | names(tokenizer, "tokenizer ")


def test_no_arguments_shows_the_help(main: Callable[..., Any]) -> None:
    for group in ([], ["data"], ["tokenizer"]):
        ran = main(*group)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("Usage: ")
        assert "train" in ran.err or "pack" in ran.err


def test_an_interruption_is_exit_code_130(main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("plait.infer.demo.run_demo", interrupted)
    ran = main("demo")
    assert ran.code == 130
    assert "Traceback" not in ran.err


def test_other_failures_keep_their_traceback(main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("plait.infer.demo.run_demo", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main("demo")


@pytest.mark.parametrize("module", ["webdataset", "deepspeed.comm", "megatron.energon", "yaml"])
def test_a_missing_training_library_is_one_line(
    main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    def needing(*_: object) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("plait.infer.demo.run_demo", needing)
    name = module.partition(".")[0]
    assert main("demo") == (2, "", f"plait: this needs '{name}'; run: pip install 'plait[train]'\n")


def test_a_missing_module_of_our_own_keeps_its_traceback(
    main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plait.infer.demo", None)
    with pytest.raises(ModuleNotFoundError):
        main("demo")


def test_public_names_resolve() -> None:
    import plait

    assert set(plait.__all__) <= set(dir(plait))
    for name in plait.__all__:
        assert getattr(plait, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = plait.no_such_name
