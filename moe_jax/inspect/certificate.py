"""A certificate of a trained model: statistics against limits, checksums of all weights and the config, signed.

With a key it is authenticated (HMAC-SHA256, RFC 2104): only holders of the key can make one that verifies. Without a
key it has a plain SHA-256 digest, which detects accidents but not forgery.
"""

import hashlib
import hmac
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.files import parse_json, write_file

FORMAT = 1
SIGNED, PLAIN = "HMAC-SHA256", "SHA-256"
SEAL = "seal"
SHORTEST = 16  # bytes of a key

# Default limits of the statistics.
LIMITS = {
    "load_max_over_mean": 4.0,  # busiest expert of any layer over the mean of its layer
    "dead_experts": 0.0,  # of all layers
    "drop_rate": 0.1,  # of all choices
    "worst_knock_out": 0.5,  # largest rise of the loss without one expert, nats per target
    "drop_rate_gap": 0.05,  # the largest difference between two groups
    "active_compute_gap": 0.2,  # choices per token and layer
    "entropy_gap": 0.5,  # nats
    "loss_gap": 2.0,  # nats per target
}


class Check(NamedTuple):
    """A statistic, and the most that it may be. Without a value, or with NaN, it does not pass."""

    name: str
    value: float | None
    limit: float

    @property
    def passes(self) -> bool:
        return self.value is not None and math.isfinite(self.value) and self.value <= self.limit


def certify(
    checks: Sequence[Check], params: Any, config: str, key: bytes | None = None, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The certificate of these weights (any pytree of arrays) and this config (JSON), as plain values.

    about: further contents, JSON. ValueError for a key that is too short, or what JSON cannot hold.
    """
    if not checks:
        raise ValueError("A certificate without statistics says nothing; give at least one Check.")
    body = {
        "format": FORMAT,
        "about": dict(about or {}),
        "checks": [
            {"name": c.name, "value": _number(c.value), "limit": float(c.limit), "pass": c.passes} for c in checks
        ],
        "passes": all(c.passes for c in checks),
        "config": config_digest(config),
        "weights": fingerprints(params),
    }
    body = json.loads(_canonical(body))
    return body | {SEAL: seal(body, key)}


def verify(certificate: Any, params: Any, config: str, key: bytes | None = None) -> list[str]:
    """Lists the problems of a certificate, a line each; [] if it verifies.

    Checks the seal of the contents, the checksums of weights and config, and the result of every statistic. A signed
    certificate does not verify without the key, nor an unsigned one with a key.
    """
    if not isinstance(certificate, dict) or certificate.get("format") != FORMAT:
        return [f"this is no certificate of format {FORMAT}"]
    body = {name: value for name, value in certificate.items() if name != SEAL}
    try:
        wrong = [*_seal_problems(certificate.get(SEAL), body, key), *_check_problems(body)]
        if body["config"] != config_digest(config):
            wrong.append("the config is another one")
        return wrong + _weight_problems(body["weights"], fingerprints(params))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return [f"the certificate is damaged ({type(error).__name__}: {error})"]


def seal(body: Any, key: bytes | None) -> dict[str, str]:
    """The signature of a body, or its digest where there is no key."""
    data = _canonical(body).encode()
    if key is None:
        return {"algorithm": PLAIN, "value": hashlib.sha256(data).hexdigest()}
    if len(key) < SHORTEST:
        raise ValueError(f"The key has {len(key)} bytes; give at least {SHORTEST}, of `head -c 32 /dev/urandom` say.")
    return {"algorithm": SIGNED, "value": hmac.new(key, data, hashlib.sha256).hexdigest()}


def fingerprints(params: Any) -> dict[str, dict[str, Any]]:
    """Shape, type and checksum of every array of a tree, by name."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): array_fingerprint(leaf) for path, leaf in leaves}


def array_fingerprint(array: Any) -> dict[str, Any]:
    """Fingerprint of one array; the checksum is of its bytes in C order, little-endian."""
    a = np.asarray(jax.device_get(array))
    little = a.astype(a.dtype.newbyteorder("<"), copy=False) if a.dtype.byteorder == ">" else a
    sum_ = hashlib.sha256(np.ascontiguousarray(little).tobytes()).hexdigest()
    return {"shape": list(a.shape), "dtype": str(a.dtype.name), "sha256": sum_}


def config_digest(config: str) -> str:
    """Digest of a config's values, whatever the format of its JSON."""
    return hashlib.sha256(_canonical(parse_json(config)).encode()).hexdigest()


def read_key(path: pathlib.Path) -> bytes:
    """The bytes of a key file; ValueError where there is none, or too few of them."""
    if not path.is_file():
        raise ValueError(f"There is no key file {path}; make one with `head -c 32 /dev/urandom > {path}`.")
    if len(key := path.read_bytes()) < SHORTEST:
        raise ValueError(f"The key in {path} has {len(key)} bytes; it needs at least {SHORTEST}: make another one.")
    return key


def read_certificate(path: pathlib.Path) -> dict[str, Any]:
    """A certificate from its file."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as a certificate ({type(error).__name__}); give another file."
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no certificate; give the file that --out wrote.")
    return found


def write_certificate(path: pathlib.Path, certificate: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(certificate, indent=1, sort_keys=True, allow_nan=False) + "\n")


def _canonical(value: Any) -> str:
    """Canonical JSON of a value; ValueError for what JSON cannot hold."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"A certificate holds JSON ({error}); give plain finite numbers, strings and lists.") from None


def _number(value: float | int | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _seal_problems(found: Any, body: Any, key: bytes | None) -> list[str]:
    algorithm, value = (found or {}).get("algorithm"), str((found or {}).get("value"))
    if key is None and algorithm == SIGNED:
        return ["the certificate is signed, and cannot be verified without its key"]
    if key is not None and algorithm != SIGNED:
        return ["the certificate is not signed with a key"]
    expected = seal(body, key)
    if hmac.compare_digest(value.encode(), expected["value"].encode()) and algorithm == expected["algorithm"]:
        return []
    what = "signature" if key is not None else "digest"
    return [
        f"the {what} does not match: what the certificate says was changed{' or the key is another one' * bool(key)}"
    ]


def _check_problems(body: Any) -> list[str]:
    checks = [(c, Check(c["name"], c["value"], c["limit"])) for c in body["checks"]]
    wrong = [
        f"{c.name}={c.value} of at most {c.limit} is said to {'pass' if stated['pass'] else 'fail'}, and does not"
        for stated, c in checks
        if stated["pass"] != c.passes
    ]
    if body["passes"] != all(c.passes for _, c in checks):
        wrong.append(f"the certificate is said to {'pass' if body['passes'] else 'fail'} as a whole, and does not")
    return wrong


def _weight_problems(stated: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    wrong = []
    for name in [*stated, *(n for n in found if n not in stated)]:
        if name not in found:
            wrong.append(f"weight {name} is missing")
        elif name not in stated:
            wrong.append(f"weight {name} is not in the certificate")
        elif differing := [k for k in ("shape", "dtype", "sha256") if stated[name].get(k) != found[name][k]]:
            what = {"shape": "shape", "dtype": "type", "sha256": "values"}[differing[0]]
            wrong.append(f"weight {name} has other {what}" if what == "values" else f"weight {name} has another {what}")
    return wrong
