# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""
Runs examples/quickstart.ipynb and keeps what it shows: pictures (as JPEG, which is small) and values, but no progress
bars and no warnings, which speak of one machine. Needs `pip install nbclient ipykernel` beside the extra `eval`.

python docs/notebook.py
"""

import json
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def kept(output: dict) -> bool:
    """Whether an output is one to look at; a table of `transformers`' progress is HTML, and no picture."""
    return output["output_type"] != "stream" and "text/html" not in output["data"]


def main():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": folder}}).execute()
    written = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell, run in zip(written["cells"], notebook["cells"], strict=True):
        if cell["cell_type"] == "code":
            cell["execution_count"] = run["execution_count"]
            cell["outputs"] = [json.loads(json.dumps(output)) for output in run["outputs"] if kept(output)]
            for output in cell["outputs"]:
                output["metadata"] = {}
                if "image/jpeg" in output["data"]:
                    output["data"].pop("image/png", None)
    NOTEBOOK.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
