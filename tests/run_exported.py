"""What is exported, at work in one process, which has no poise_hpc: python run_exported.py FOLDER... -> one line of JSON.
Of each folder its test; of the last also its training script, as `python train.py --steps 2`."""
import contextlib
import io
import json
import os
import runpy
import sys

sys.modules["poise_hpc"] = None  # an import of it fails
sys.dont_write_bytecode = True

import pytest  # noqa: E402


@contextlib.contextmanager
def inside(folder: str):
    """Their modules have the same names: what the last folder's test imported is forgotten."""
    for name in [n for n in sys.modules if n in ("train", "test_equivalence") or n.startswith("poise_") and n != "poise_hpc"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        yield said
    sys.path.remove(folder)


def run(folder: str) -> dict[str, str | int]:
    with inside(folder) as said:
        code = pytest.main(["-q", "-x", "-W", "ignore", "-p", "no:cacheprovider", f"--rootdir={folder}", f"{folder}/test_equivalence.py"])
    return {"code": int(code), "text": said.getvalue()}


def train(folder: str) -> str:
    os.chdir(folder)
    sys.argv = ["train.py", "--steps", "2"]
    with inside(folder) as said:
        runpy.run_path("train.py", run_name="__main__")
    return said.getvalue()


folders = sys.argv[1:]
results = {os.path.basename(folder): run(folder) for folder in folders}
if os.path.exists(f"{folders[-1]}/train.py"):
    results["train.py"] = train(folders[-1])
sys.__stdout__.write("\n" + json.dumps(results) + "\n")
