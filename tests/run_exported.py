"""The tests of exported folders, in one process, which has no poise_hpc: python run_exported.py FOLDER... -> one line of JSON."""
import contextlib
import io
import json
import os
import sys

sys.modules["poise_hpc"] = None  # an import of it fails
sys.dont_write_bytecode = True

import pytest  # noqa: E402


def run(folder: str) -> dict[str, str | int]:
    """Their modules have the same names: what the last folder's test imported is forgotten."""
    for name in [n for n in sys.modules if n in ("train", "test_equivalence") or n.startswith("poise_") and n != "poise_hpc"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = pytest.main(["-q", "-x", "-W", "ignore", "-p", "no:cacheprovider", f"--rootdir={folder}", f"{folder}/test_equivalence.py"])
    sys.path.remove(folder)
    return {"code": int(code), "text": said.getvalue()}


results = {os.path.basename(folder): run(folder) for folder in sys.argv[1:]}
sys.__stdout__.write("\n" + json.dumps(results) + "\n")
