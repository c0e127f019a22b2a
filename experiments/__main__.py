"""Lists the programs, or runs one of them.

    moe-jax                                                         lists them
    moe-jax train --config=glam_nano --workdir=runs/glam_nano       runs one
    moe-jax train --help                                            says what it takes

`python -m experiments` is the same where nothing is installed, and `python -m experiments.train` runs one too.
"""

import ast
import difflib
import pathlib
import runpy
import sys

HERE = pathlib.Path(__file__).parent
RUN = "__name__ == '__main__'"
EXAMPLE = "moe-jax train --config=glam_nano --workdir=runs/glam_nano"


def main() -> None:
    """Runs the program that the command line names, with the rest of it; lists all where it names none."""
    known, name = programs(), sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "-h", "--help"):
        print(listing(known))
    elif name not in known:
        close = difflib.get_close_matches(name, known, 1)
        what = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}."
        print(f"error: There is no program {name!r}; {what}", file=sys.stderr)
        sys.exit(2)
    else:
        if "" not in sys.path:
            sys.path.insert(0, "")  # configs in the working directory may import each other, as with python -m
        del sys.argv[1]
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)


def programs() -> dict[str, str]:
    """The first line of the docstring of every program, by the name of its module; none of them is imported."""
    found = {}
    for path in sorted(HERE.rglob("*.py")):
        parts = path.relative_to(HERE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__main__" else parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if name and any(isinstance(node, ast.If) and ast.unparse(node.test) == RUN for node in tree.body):
            found[name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return dict(sorted(found.items()))


def listing(known: dict[str, str]) -> str:
    """A line for each program, and how one is run."""
    width = max(map(len, known)) + 2
    lines = [f"  {name:<{width}}{line}" for name, line in known.items()]
    return "\n".join(["Programs:", *lines, "", f"For example: {EXAMPLE}", "moe-jax PROGRAM --help says what it takes."])


if __name__ == "__main__":
    main()
