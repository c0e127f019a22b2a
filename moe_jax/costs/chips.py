"""Published figures of accelerators, each with its source; found by name or by JAX's device kind."""

from typing import NamedTuple

from moe_jax.config import suggestion


class Chip(NamedTuple):
    """One chip, as sold; JAX may see it as several devices, which share its resources.

    flops: dense bfloat16 multiply-adds a second, times two. hbm: bytes; usable: bytes of one device that a program may
    use. hbm_rate: bytes a second. dims: dimensions of its torus, 0 where a switch connects chips. link: bytes a second
    over one link, one way; two links a dimension. dcn: bytes a second to other slices. largest: chips of a slice.
    watts: the mean of a chip with its part of the host, None where it is not published.
    """

    name: str  # as in the name of a topology
    kind: str  # jax.Device.device_kind
    devices: int
    flops: float
    hbm: float
    usable: float
    hbm_rate: float
    dims: int
    link: float
    dcn: float
    largest: int
    watts: float | None
    source: str
    watts_source: str


GiB = 2**30
DOCS = "cloud.google.com/tpu/docs"
UNKNOWN = "not published; give --power"

# A link, one way, is the published all-reduce bandwidth of a pod over its chips and their links: v3 340 TB/s of 1,024
# chips, v4 1.1 PB/s of 4,096, v5e 51.2 TB/s of 256; from v5p on it is the published bandwidth of a chip, both ways,
# over its links and two. "How to Scale Your Model" (jax-ml.github.io/scaling-book) has the same 45, 50 and 100 GB/s,
# and 100 for v3; arXiv:2304.01433, table 4, has 70 for v3 and 50 for v4.
#
# Between slices: 6.4 Tb/s of a v5e pod over its chips; 50 and 100 Gb/s a chip from v5p on; for v3 and v4 25 GB/s of a
# host over its 4 chips (the same book), not confirmed by the vendor.
#
# Usable memory is what the compiler of libtpu 0.0.52 allows; v3's is unknown; all of it is assumed.
#
# Power: v3 is the mean of the four runs on it in arXiv:2104.10350, table 4 (245 to 310 W with host and network; the
# chip alone 123/220/262 W, min/mean/max); v4 is GLaM's (arXiv:2112.06905, sec. 7; the chip alone 90/170/192 W).
CHIPS = (
    Chip(
        *("v3", "TPU v3", 2, 123e12, 32 * GiB, 16 * GiB, 900e9, 2, 83e9, 6.25e9, 1024, 283.0),
        f"{DOCS}/v3; links from its all-reduce bandwidth",
        "mean of four runs, arXiv:2104.10350, table 4",
    ),
    Chip(
        *("v4", "TPU v4", 1, 275e12, 32 * GiB, 30.75 * GiB, 1200e9, 3, 45e9, 6.25e9, 4096, 326.0),
        f"{DOCS}/v4; links from its all-reduce bandwidth",
        "measured for GLaM, arXiv:2112.06905",
    ),
    Chip(
        *("v5e", "TPU v5 lite", 1, 197e12, 16 * GiB, 15.75 * GiB, 819e9, 2, 50e9, 3.125e9, 256, None),
        f"{DOCS}/v5e",
        UNKNOWN,
    ),
    Chip(
        *("v5p", "TPU v5", 1, 459e12, 95 * GiB, 95.7 * GiB, 2765e9, 3, 100e9, 6.25e9, 6144, None),
        f"{DOCS}/v5p",
        UNKNOWN,
    ),
    Chip(
        *("v6e", "TPU v6 lite", 1, 918e12, 32 * GiB, 31.2 * GiB, 1638e9, 2, 100e9, 12.5e9, 256, None),
        f"{DOCS}/v6e, {DOCS}/tpu7x",
        UNKNOWN,
    ),
    Chip(
        *("tpu7x", "TPU7x", 2, 2307e12, 192 * GiB, 94.7 * GiB, 7380e9, 3, 100e9, 12.5e9, 9216, None),
        f"{DOCS}/tpu7x",
        UNKNOWN,
    ),
    # For a run's utilisation; planning is for TPUs. Power is the largest that the board may draw.
    Chip(
        *("a100", "NVIDIA A100-SXM4-80GB", 1, 312e12, 80e9, 80e9, 2039e9, 0, 300e9, 25e9, 8, 400.0),
        "NVIDIA A100 datasheet",
        "board's limit, NVIDIA A100 datasheet",
    ),
    Chip(
        *("h100", "NVIDIA H100 80GB HBM3", 1, 989.4e12, 80e9, 80e9, 3350e9, 0, 450e9, 50e9, 8, 700.0),
        "NVIDIA H100 datasheet",
        "board's limit, NVIDIA H100 datasheet",
    ),
)
# Other device kinds: their chips differ in memory only.
DEVICE_KINDS = {
    **{c.kind: c for c in CHIPS},
    "TPU v5e": CHIPS[2],
    "TPU v5p": CHIPS[3],
    "TPU v6e": CHIPS[4],
    "TPU v7x": CHIPS[5],
    "NVIDIA A100-SXM4-40GB": CHIPS[6]._replace(kind="NVIDIA A100-SXM4-40GB", hbm=40e9, usable=40e9, hbm_rate=1555e9),
    "NVIDIA H200": CHIPS[7]._replace(name="h200", kind="NVIDIA H200", hbm=141e9, usable=141e9, hbm_rate=4800e9),
}


def chip(name: str) -> Chip:
    """Returns a chip by the name that topologies use; ValueError suggests the nearest name."""
    names = {c.name: c for c in CHIPS}
    if name not in names:
        raise ValueError(f"No chip is called {name!r}{suggestion(name, list(names))}")
    return names[name]


def by_device_kind(kind: str) -> Chip | None:
    """Returns a chip by `jax.Device.device_kind`; None where it is in no table, a CPU for instance."""
    return DEVICE_KINDS.get(kind)


def peak(kind: str) -> float | None:
    """Dense bfloat16 FLOPs a second of one device of this kind, for a run's MFU; None where it is unknown."""
    found = by_device_kind(kind)
    return found and found.flops / found.devices
