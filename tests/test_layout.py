"""The layout keeps its promises: one import package, nothing that hides Hugging Face's tokenizers, clean directions."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ["tokenizers", "model", "train", "infer"]


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.mark.parametrize("folder", [*FOLDERS, "launch", "weights"])
def test_folders_stay_namespace_portions(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", FOLDERS)
def test_python_folders_stay_flat(folder: str) -> None:
    # A subfolder would be missing from the wheel.
    assert [p for p in (ROOT / folder).rglob("*.py") if p.parent != ROOT / folder] == []


def test_hugging_face_tokenizers_import_from_the_root() -> None:
    done = run(
        sys.executable, "-c", "import transformers, tokenizers; tokenizers.Tokenizer; print(tokenizers.__file__)"
    )
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_relative_imports_between_files(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        assert "\nfrom ." not in path.read_text(), path


def test_import_directions() -> None:
    done = run(str(Path(sys.executable).parent / "lint-imports"), "--no-cache")
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_native_code_was_built() -> None:
    from plait.model import native

    assert native.library() is not None, "build it: pip install -e ."


def test_only_one_file_imports_deepspeed() -> None:
    importers = [
        p.name for folder in FOLDERS for p in (ROOT / folder).glob("*.py") if "import deepspeed" in p.read_text()
    ]
    assert importers == ["engine.py"]


PROBE = """
import importlib, json, sys, time
blocked = {"deepspeed", "webdataset", "megatron", "av", "gradio", "transformers"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch
start = time.perf_counter()
import pathlib, plait.tokenizers
for folder in plait.tokenizers.__path__:
    for path in sorted(pathlib.Path(folder).glob("*.py")):
        importlib.import_module(f"plait.tokenizers.{path.stem}")
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "loaded": sorted(m for m in sys.modules if m.startswith("plait."))}))
"""


def test_tokenizers_import_alone() -> None:
    done = run(sys.executable, "-c", PROBE, cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert not [m for m in facts["loaded"] if m.startswith(("plait.train", "plait.infer", "plait.model"))]


def test_wheel_installs_plait_alone(tmp_path: Path) -> None:
    import zipfile

    done = run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)
    )
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"plait"}
    for folder in FOLDERS:
        inside = {n.rsplit("/", 1)[1] for n in names if n.startswith(f"plait/{folder}/")}
        assert {p.name for p in (ROOT / folder).glob("*.py")} <= inside
    for needed in ("plait/launch/recipes/tiny/image.yaml", "plait/launch/data/fetch_demo.sh", "plait/py.typed"):
        assert needed in names
