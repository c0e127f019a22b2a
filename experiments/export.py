"""Exports a trained model: its program as StableHLO, its weights as safetensors, and a manifest of checksums.

    python -m experiments.export --workdir=runs/glam_nano --out=exports/glam_nano
    python -m experiments.export --workdir=runs/glam_nano --out=exports/glam_nano --platforms=cpu,cuda,tpu --rows=1

What is exported needs jax, flatbuffers and safetensors to run, not this package (docs/experiments.md has the lines). It
computes what evaluation computes: no assignment is dropped.
"""

from absl import flags

from experiments import cli
from moe_jax.export import MANIFEST, PLATFORMS, PROGRAM, STABLEHLO, WEIGHTS, export_model, write_export
from moe_jax.inspect.run import open_run

WORKDIR = cli.workdir()
OUT = cli.out("The folder to write; a new one, or one with an earlier export.")
STEP = cli.step()
ROWS = flags.DEFINE_integer("rows", None, "Rows of a batch (default: as in training).", lower_bound=1)
ON = flags.DEFINE_list("platforms", ["cpu"], f"Platforms that the program runs on, of {', '.join(PLATFORMS)}.")


def main() -> None:
    if not WORKDIR.value or not OUT.value:
        raise ValueError("Say --workdir=RUN, the run to export, and --out=FOLDER, where to.")
    folder = cli.folder("out", OUT.value)
    own = {MANIFEST, PROGRAM, STABLEHLO, WEIGHTS}
    if folder.is_dir() and (other := sorted({path.name for path in folder.iterdir()} - own)):
        raise ValueError(f"--out={folder} holds other files ({other[0][:60]}); give a new folder.")
    run = open_run(cli.folder("workdir", WORKDIR.value), STEP.value)
    manifest = write_export(run, export_model(run, ROWS.value, ON.value), folder)
    for name, about in manifest["files"].items():
        print(f"written: {folder / name} ({about['bytes']:,} bytes)")
    inputs = ", ".join(f"{name} {a['dtype']}{a['shape']}" for name, a in manifest["inputs"].items())
    print(f"step {run.step} on {', '.join(manifest['platforms'])}; inputs: {inputs}")


if __name__ == "__main__":
    cli.run(main)
