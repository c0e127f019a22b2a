"""Command lines that nobody means: line i of a list without end, the same on every machine."""

import random
from collections.abc import Callable

from moe_jax.config import COMPONENTS, SECTIONS
from moe_jax.overrides import known_fields
from tests import cases, cases_attention

CONFIGS = ("glam_nano", "configs/glam_nano.py", "configs/dense_nano.py", "configs/mixtral_nano.py")
PROGRAMS = ("train",) * 8 + ("plan", "inspect", "certify", "headline")
FLAGS = ("workdir", "data_dir", "compare", "init_from", "devices", "overwrite", "config", "wordir", "lr")
WHERE = ("model.moe.router", "model.moe.losses", "model.attention", "model.moe.dispatch", "optim.optimizer")
SECTION_PATHS = {path: f"config.{path}".rstrip(".") for path in (*SECTIONS, "mesh")}
PATHS = (
    *(f"{path}.{name}".lstrip(".") for path, section in SECTION_PATHS.items() for name in known_fields(section)),
    *("model.moe.router.K", "model.moe.losses.0.weight", "model.moe.losses.LoadBalance.weight", "model.attention.H"),
    *("model.attention.position.base", "optim.schedule.peak", "optim.optimizer.b2", "model.moe.dispatch.priority"),
)
COMPONENT_CASES = (
    *(*cases.ROUTERS, *cases.GATING, *cases.EXPERTS, *cases.DISPATCHERS, *cases.EXCHANGES, *cases.LOSSES),
    *cases_attention.ATTENTIONS,
)
PARTS = (
    *map(repr, COMPONENT_CASES),
    *("AdamW(b1=0.9)", "Adafactor()", "Cosine(0.001, 100, 0.1)", "WSD(0.01)", "SentencePiece(V=600)", "Corpus()"),
)
NUMBERS = (
    *(
        "0",
        "-1",
        "1",
        "2",
        "3",
        "7",
        "64",
        "1_000",
        "1e3",
        "0.5",
        "-0.0",
        "nan",
        "inf",
        "1__0",
        "0b102",
        "1j",
        "٣",
        "½",
    ),
    *("1e-300", "1e300", "1e999", "-1e999", "1e" + "9" * 300, "0." + "1" * 5000, "1.0e-99999"),
    *("9" * 18, "9" * 309, "9" * 4300, "9" * 5000, "0x" + "f" * 9000),
    *("2147483647", "2147483648", "-2147483649", "4294967296", "18446744073709551616"),
)
BRACKETS = (
    *(("[", "", "]"), ("(", "1", ")"), ("{1:", "2", "}"), ("Adaptive(", "RouterZ()", ")"), ("f(", "", "")),
    *(("Rotary(scaling=", "1", ")"), ("-", "1", ""), ("~", "1", ""), ("not ", "1", ""), ("1+", "1", "")),
    *(("1**", "1", ""), ("a.", "b", "")),
)
NESTED = tuple(first * n + inner + last * n for n in (2, 60, 99, 250, 3000) for first, inner, last in BRACKETS)
TEXTS = (
    *("", " ", "None", "True", "no", "abc", "'", '"', "''", "'a", '"""', "\\", "a=b", "=", "==", ",", "()", "[]", "{}"),
    *("...", "a\nb", "a\tb", "\x00", "\x1b[31m", "é" * 200, "\U0001f600", "\u202e", "\udcff", "%s%n", "{0.__class__}"),
    *("$x^{$", "x" * 101, "x" * 5000, "word " * 2000, "'" * 3000, "\\'" * 2000, "a" * 50 + "\n" + "b" * 5000),
    *("../" * 1000, "/dev/null", "__import__('os').getpid()", "TopK.__class__()", "TopK(*[1])", "TopK(**{'K': 2})"),
    *("lambda: 1", "(x := 1)", "f'{1}'", "b'x'", "{1, 2}", "1 if 1 else 2", "[x for x in (1,)]", "TopK(K=2) # note"),
    *("TopK(K=2); TopK()", "TopK", "topk()"),
)
RIGHT = (
    *("run.steps=3", "model.D=64", "optim.schedule.peak=1e-3", "optim.schedule=WSD(0.01, 5)", "seed=7", "model.N=4"),
    *(
        "model.moe.router=TopK(K=4)",
        "model.moe.dispatch.capacity_factor=2",
        "data.L=128",
        "mesh.expert=2",
        "run.pue=1.5",
    ),
    *("optim.optimizer=Adafactor()", "model.moe.losses=()", "model.moe.gating=Jitter()", "model.tied=false"),
)
WORDS = ("--", "-", "--=", "--config", "--config.", "--config.=1", "---config.run.steps=1", "=3")


def command_line(i: int) -> tuple[str, list[str]]:
    """Program and words of line i: one to three things that are wrong, or unusual, among those that are right."""
    rng = random.Random(i)
    words = [f"--config={rng.choice(CONFIGS)}"] if rng.random() < 0.95 else []
    words += [word for _ in range(rng.choice((1, 1, 1, 2, 3))) for word in rng.choice(KINDS)(rng)]
    program = rng.choice(PROGRAMS)
    words += ["--workdir=run"] if program == "train" and rng.random() < 0.9 else []
    if rng.random() < 0.1:
        rng.shuffle(words)
    return program, words


def value(rng: random.Random) -> str:
    """A text for a field."""
    return rng.choice((*(rng.choice(kind) for kind in (NUMBERS, NUMBERS, NESTED, TEXTS, PARTS)), damaged(rng)))


def damaged(rng: random.Random) -> str:
    """The text of a component with a few characters lost, doubled, swapped or put in."""
    text = list(rng.choice(PARTS))
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(text) + 1)
        new = rng.choice("()[]{}'\",.=-+*0129eEKabz_ \\\n\x00é")
        text[at : at + rng.choice((0, 1, 1, 3))] = [new] * rng.choice((0, 1, 1, 2))
    return "".join(text)


def number_in_component(rng: random.Random) -> str:
    """A component with any text for one of its fields."""
    cls = rng.choice(list(COMPONENTS.values()))
    names = [*cls.__dataclass_fields__, "K", "zz"]
    return f"{cls.__name__}({rng.choice(names)}={rng.choice((*NUMBERS, rng.choice(NESTED), rng.choice(TEXTS)))})"


def path(rng: random.Random) -> str:
    """A path to a field, or nearly one."""
    found = rng.choice(PATHS)
    names = found.split(".")
    return rng.choice(
        (
            *([found] * 6),
            *(found + ".K", found.upper(), found[:-1], found + ".", "." + found, found.replace(".", "..")),
            *(".".join(names[::-1]), ".".join(names * 50), names[-1], "model.moe.losses." + rng.choice(NUMBERS)),
            *("x" * 4000, ".".join("x" * 2000), "__class__", f"{found}.__dict__", f"{found}.{rng.choice(TEXTS)}"),
        )
    )


def _field(rng: random.Random) -> list[str]:
    return [f"--config.{path(rng)}={value(rng)}"]


def _right(rng: random.Random) -> list[str]:
    return [f"--config.{rng.choice(RIGHT)}"]


def _own_field(rng: random.Random) -> list[str]:
    return [f"--config.{rng.choice(PATHS)}={rng.choice((*NUMBERS, value(rng)))}"]


def _component(rng: random.Random) -> list[str]:
    return [f"--config.{rng.choice(WHERE)}={rng.choice((number_in_component(rng), damaged(rng)))}"]


def _apart(rng: random.Random) -> list[str]:
    return [f"--config.{path(rng)}", *([value(rng)] if rng.random() < 0.7 else [])]


def _flag(rng: random.Random) -> list[str]:
    dashes, ending = rng.choice(("--", "-", "--no", "---", "")), rng.choice(("", "=", *[f"={value(rng)}"] * 2))
    return [dashes + rng.choice(FLAGS) + ending]


def _word(rng: random.Random) -> list[str]:
    return [rng.choice((value(rng), *WORDS))]


KINDS: tuple[Callable[[random.Random], list[str]], ...] = (
    *(_right, _right, _field, _own_field, _own_field, _component, _apart, _flag, _word),
)
