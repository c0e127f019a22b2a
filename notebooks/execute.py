"""Executes the notebooks and writes their outputs into the files: all, or those that are named.

    make notebooks                                       # trains the two runs that 04 and 05 show, if they are missing
    python notebooks/execute.py 02_dispatch 03_expert_parallelism

Each runs in a kernel of its own. What differs from run to run without a reason is removed: metadata of the execution,
and the text form of what is displayed. A notebook that writes to stderr or shows an absolute path is refused.
"""

import base64
import hashlib
import io
import re
import sys
from pathlib import Path
from typing import NoReturn

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

RICH = ("image/png", "text/markdown")  # shown instead of the text form
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the package is found where nothing is installed, here and in the kernels
from moe_jax.files import write_file  # noqa: E402

ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|opt|work|Users|private|var)/")


def main() -> None:
    known = {path.stem: path for path in sorted(HERE.glob("*.ipynb"))}
    unknown = [name for name in sys.argv[1:] if name not in known]
    if unknown:
        refuse(f"There is no notebook {', '.join(unknown)}; name some of {', '.join(known)}.")
    for name in sys.argv[1:] or known:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            notebook = executed(known[name])
        except CellExecutionError as error:
            refuse(f"{name} failed: {error.evalue or error}")
        if found := problems(notebook):
            refuse(f"{name} is left as it was: {'; '.join(found)}.")
        write_file(known[name], nbformat.writes(notebook) + "\n")


def refuse(why: str) -> NoReturn:
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


def executed(path: Path, timeout: int = 600) -> nbformat.NotebookNode:
    """Returns the notebook with the outputs of a fresh kernel; CellExecutionError if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=timeout, record_timing=False, resources=resources).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "moe_jax": {"executed_code": digest(notebook)},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            output.pop("transient", None)
            if "metadata" in output:
                output.metadata = {}
            if "image/png" in output.get("data", ()):
                output.data["image/png"] = small(output.data["image/png"])
            for kind in RICH:
                if kind in output.get("data", ()):
                    output.data = {kind: output.data[kind]}
    return notebook


def small(png: str) -> str:
    """The same picture with a palette of 256 colours, in a third of the bytes; base64."""
    written = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(written, "png", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def digest(notebook: nbformat.NotebookNode) -> str:
    """A sha256 of all code cells: it tells whether they are those that were executed."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """Kinds of the outputs of each code cell: "stdout", or the media types of what it displays."""
    return [
        [
            output.get("name") or "+".join(sorted(output.get("data", ())) or [output.output_type])
            for output in cell.outputs
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """Lists what an executed notebook must not have, in words; [] if it may be committed."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"its execution counts are {counts}, not 1 to {len(code)}: it was not run once from top to bottom")
    if notebook.metadata.get("moe_jax", {}).get("executed_code") != digest(notebook):
        found.append("its code is not the code that was executed")
    for number, cell in enumerate(code, 1):
        for output in cell.outputs:
            data = output.get("data", {})
            text = "".join([output.get("text", ""), *(data.get(kind, "") for kind in ("text/plain", "text/markdown"))])
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"code cell {number} has an error or writes to stderr: {text.strip()[:200]}")
            if match := ABSOLUTE.search(text):
                found.append(f"code cell {number} shows an absolute path: {text[match.start() :][:80]}")
            if re.search(r" at 0x[0-9a-f]+", text):
                found.append(f"code cell {number} shows an address in memory: {text.strip()[:80]}")
    return found


if __name__ == "__main__":
    main()
