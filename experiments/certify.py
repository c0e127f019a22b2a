"""Certifies a trained model: measurements against limits, checksums of its weights and config, a signature.

    python -m experiments.certify --workdir=runs/glam_nano --out=runs/glam_nano.json
    python -m experiments.certify --workdir=runs/glam_nano --out=runs/signed.json --key=secret.key --limit=loss_gap=1.5
    python -m experiments.certify --workdir=runs/glam_nano --verify=runs/signed.json --key=secret.key

Measured on held-out text: load, dead experts and drop rate with the model's limit of slots; the loss without each
expert (a pass over the text for each); the largest differences between domains. The exit code is 1 where a statistic is
above its limit, and the certificate says so. --verify says what does not hold of a certificate, with exit code 2: any
change of a weight, of the config or of what the certificate says. Without a key it has a plain digest, which anybody
can make.
"""

import pathlib
import sys
from collections.abc import Mapping

import numpy as np
from absl import flags

from experiments import cli
from moe_jax.config import suggestion
from moe_jax.inspect import certificate
from moe_jax.inspect.certificate import LIMITS, Check
from moe_jax.inspect.fairness import LEAST, Fairness, between_domains, columns_of_trace
from moe_jax.inspect.knockout import Effects, knock_out
from moe_jax.inspect.look import LayerTrace, trace_layers
from moe_jax.inspect.run import TrainedRun, examples, open_run

WORKDIR = cli.workdir()
DATA_DIR = cli.data_dir()
OUT = cli.out("The certificate to write.")
JSON = cli.as_json()
VERIFY = flags.DEFINE_string("verify", None, "A certificate to verify, of the run in --workdir.")
KEY = flags.DEFINE_string("key", None, "A file whose bytes are the key to sign or verify with.")
LIMIT = flags.DEFINE_multi_string("limit", [], f"NAME=VALUE, the most a statistic may be: {', '.join(LIMITS)}.")
WINDOWS = cli.windows()
STEP = cli.step()


def main() -> None:
    if not WORKDIR.value:
        raise ValueError("No run was given; say --workdir=runs/glam_nano, for instance.")
    if bool(OUT.value) == bool(VERIFY.value):
        raise ValueError("Say --out=FILE to certify the run, or --verify=FILE to verify its certificate.")
    if WINDOWS.value < 1:
        raise ValueError(f"--windows={WINDOWS.value} must be at least 1.")
    key, table = certificate.read_key(pathlib.Path(KEY.value)) if KEY.value else None, cli.file("json", JSON.value)
    workdir = cli.folder("workdir", WORKDIR.value)
    if VERIFY.value:
        verified(workdir, pathlib.Path(VERIFY.value), key, table)
        return
    out, limits = cli.file("out", OUT.value), limits_of(LIMIT.value)
    sys.exit(certified(open_run(workdir, STEP.value), out, key, limits, table))


def limits_of(given: list[str]) -> dict[str, float]:
    """The limits, those on the command line in place of the usual ones."""
    limits = dict(LIMITS)
    for word in given:
        name, _, value = word.partition("=")
        if name not in limits:
            raise ValueError(f"--limit={word}: there is no statistic {name!r}{suggestion(name, list(limits))}")
        try:
            limits[name] = float(value)
        except ValueError:
            raise ValueError(f"--limit={word}: {value!r} is no number; write --limit={name}=0.5, say.") from None
        if not np.isfinite(limits[name]):
            raise ValueError(f"--limit={word}: a limit is a finite number; write --limit={name}=0.5, say.")
    return limits


def certified(
    run: TrainedRun,
    out: pathlib.Path,
    key: bytes | None,
    limits: Mapping[str, float],
    table: pathlib.Path | None = None,
) -> int:
    """Measures a run and writes its certificate; 1 where a statistic is above its limit."""
    exp, (held_out, batches) = run.exp, examples(run, DATA_DIR.value, WINDOWS.value)
    seen = trace_layers(exp.model, run.params, batches, run.router)
    effects = knock_out(exp.model, run.params, batches, run.router, domains=len(held_out.domains))
    found = statistics(seen, effects, between_domains(columns_of_trace(seen), seen.domain_T, seen.sequence_T))
    checks = [Check(name, found[name], limit) for name, limit in limits.items() if name in found]
    about = {"step": run.step, "tokens": len(seen.token_T), "data": held_out.fingerprint, "measured": "held-out text"}
    about |= {"not measured": sorted(set(limits) - set(found)), "knocked out": list(effects.worst[0])}
    written = certificate.certify(checks, run.weights, exp.to_json(), key, about)
    certificate.write_certificate(out, written)
    for check in checks:
        words = f"{check.name:<20} {check.value:>10.4f}  at most {check.limit:<8g}"
        print(f"{words} {'yes' if check.passes else 'NO'}")
    if missing := about["not measured"]:
        print(f"not measured: {', '.join(missing)} (fewer than two domains of {LEAST} windows, or no assignment)")
    print(f"{len(written['weights'])} weights of step {run.step}; {written[certificate.SEAL]['algorithm']}: {out}")
    cli.write_json(table, {name: written[name] for name in ("passes", "checks", "about")})
    return int(not written["passes"])


def statistics(seen: LayerTrace, effects: Effects, differences: Fairness | None) -> dict[str, float]:
    """Statistics that are compared with `LIMITS`, by name."""
    N, E = len(seen.expert_NTK), seen.probs_NTE.shape[-1]
    choices_NE = np.array([np.bincount(seen.expert_NTK[n].ravel(), minlength=E + 1)[:E] for n in range(N)])
    taken = seen.expert_NTK < E
    found = {
        "load_max_over_mean": float((choices_NE.max(1) / np.maximum(choices_NE.mean(1), 1e-9)).max()),
        "dead_experts": float((choices_NE == 0).sum()),
        "worst_knock_out": effects.worst[1],
    }
    if taken.any():
        found["drop_rate"] = float(1 - (taken & seen.kept_NTK).sum() / taken.sum())
    if differences is not None:
        found |= {f"{name}_gap": abs(differences.largest(name).difference) for name in differences.value}
    return found


def verified(workdir: pathlib.Path, path: pathlib.Path, key: bytes | None, table: pathlib.Path | None = None) -> None:
    """Says that a certificate holds of a run; ValueError with all that does not."""
    said = certificate.read_certificate(path)
    about = said.get("about")
    step = about.get("step") if isinstance(about, dict) else None
    run = open_run(workdir, STEP.value if STEP.value is not None else step if isinstance(step, int) else None)
    wrong = certificate.verify(said, run.weights, run.exp.to_json(), key)
    cli.write_json(table, {"holds": not wrong, "wrong": wrong})
    if wrong:
        for line in wrong:
            print(line)
        raise ValueError(f"{path} does not hold of {workdir}: {wrong[0]}{more(len(wrong) - 1)}.")
    kind = "its signature" if key else "its digest (nobody has signed it)"
    print(f"{path} holds: {kind}, the config and {len(said['weights'])} weights of step {run.step}.")
    if not said["passes"]:
        print(f"above their limits: {', '.join(c['name'] for c in said['checks'] if not c['pass'])}")


def more(n: int) -> str:
    return f", and {n} more" if n else ""


if __name__ == "__main__":
    cli.run(main)
