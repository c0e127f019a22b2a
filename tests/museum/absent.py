"""Public bugs that cannot be planted here, and why."""

from typing import NamedTuple


class Absent(NamedTuple):
    """Public bugs without a mutant. threads: as of an `Entry`."""

    threads: tuple[str, ...]
    essence: str
    reason: str


ABSENT = (
    Absent(
        ("Megatron-LM #1330", "torchtitan #1593"),
        "Recomputation in the backward pass counts loads and losses twice.",
        "A forward pass returns its statistics and has no counter to write to: recomputing it adds nothing.",
    ),
    Absent(
        ("torchtitan #4148",),
        "Tokens of an evaluation move the balancing biases.",
        "An evaluation returns sums and no state; only a training step returns a router's state.",
    ),
    Absent(
        ("torchtitan #2061", "torchtitan #1689"),
        "Auxiliary losses and biases are wrong under pipeline schedules, or in stages without experts.",
        "There is no pipeline parallelism.",
    ),
    Absent(
        ("AReaL #1403", "verl #6947", "ModelOpt #2174"),
        "Heads that predict several tokens (MTP) are dropped, not updated, or not exported.",
        "There are no such heads.",
    ),
    Absent(
        ("Megatron-LM #5844", "Megatron-Bridge #4706", "Megatron-Bridge #1871", "maxtext #3231", "maxtext #3868"),
        "A conversion leaves experts random, or takes a sparse model for a dense one.",
        "Weights of other codebases are not converted. Parameters of another run that are not taken are named by "
        "`--init_from`, as `test_what_does_not_fit_is_said` holds.",
    ),
    Absent(
        ("KempnerForge #202", "transformers #48569"),
        "A checkpoint has one rank's experts, or another rank's state.",
        "Arrays are global: Orbax writes every shard's part, and there is no rank's own file to mix up. What is saved "
        "on one mesh and restored on another is compared bit for bit by `test_checkpoint.py`.",
    ),
    Absent(
        ("ModelOpt #1173", "ModelOpt #1340", "ModelOpt #1421", "Olive #2599", "llm-compressor #2434"),
        "Experts are skipped by quantisation, or calibrated on nothing.",
        "There is no quantisation.",
    ),
    Absent(
        ("unsloth-zoo #779", "vllm #52194", "vllm #47088"),
        "Low-rank updates of experts are dropped when merged, or transposed when served.",
        "There are no low-rank updates.",
    ),
    Absent(
        ("vllm-ascend #5633", "vllm #40926"),
        "Replicated hot experts lose precision, a server hangs.",
        "There is no serving, and no expert is replicated for load.",
    ),
    Absent(
        ("transformers #28255",),
        "One balancing loss of the loads of all layers together, so that layers may cancel.",
        "A layer computes its own loss from its own tokens; other layers' loads do not reach it.",
    ),
    Absent(
        ("maxtext #1828", "maxtext #1256", "unsloth #2582", "unsloth #3422"),
        "Gradients kept for all experts fill the memory; experts run one after another.",
        "No number is wrong. Memory is predicted by `experiments.plan`, time measured by `experiments.bench`.",
    ),
)
