"""The laws: their sentences, the functions that check them on a user's config, the config fields that matter."""

from collections.abc import Callable
from typing import Any, NamedTuple

from moe_jax.audit import communication, counts, dispatchers, meshes, routing, single_device, slopes


class Law(NamedTuple):
    """A law of the project.

    number: as in `pytest --law N`.
    sentence: completes the title.
    audit: functions that check it on an experiment (`python -m experiments.audit`).
    fields: config fields that matter to it, each with the reason.
    unaudited: the reason why the audit does not check it; "" where it does.
    """

    number: int
    title: str
    sentence: str
    audit: tuple[Callable[..., Any], ...]
    fields: tuple[tuple[str, str], ...]
    unaudited: str = ""

    @property
    def name(self) -> str:
        """The title as it stands in findings."""
        return self.title.lower()


LAWS = (
    Law(
        1,
        "One model, every mesh",
        "outputs, gradients, metrics and dropped tokens do not depend on the devices.",
        (meshes.compare_with_one_device, single_device.microbatches),
        (
            ("mesh", "the axes that batch, experts and parameters are sharded over"),
            ("model.moe.exchange", "how rows meet experts on other devices"),
            ("model.remat", "what the backward pass computes again"),
            ("data.microbatches", "a batch in several microbatches is the same step"),
            ("optim.zero1", "optimizer states sharded over data-parallel devices"),
        ),
    ),
    Law(
        2,
        "One routing, every dispatcher",
        "all dispatchers compute what `Einsum` defines.",
        (dispatchers.dispatchers,),
        (("model.moe.dispatch", "the dispatcher, its capacity and its slot priority"),),
    ),
    Law(
        3,
        "Routers are trainable",
        "the task loss alone gives every router parameter a gradient.",
        (routing.trainable, slopes.gradients_are_slopes),
        (
            ("model.moe.router", "a weight that is constant, as of `TopK(K=1)` with normalization, trains nothing"),
            ("model.moe.gating", "noise, temperature and dropout act on the logits"),
        ),
    ),
    Law(
        4,
        "Causal means causal",
        "in a language model, no output depends on a later token.",
        (routing.causal, single_device.step_is_causal),
        (
            ("model.causal", "False states that later tokens may matter, and permits what would be refused"),
            ("model.moe.router", "routers in which experts choose tokens see the whole group"),
            ("model.moe.dispatch", "with a capacity limit only token-major slots are causal for more than one choice"),
            ("model.attention", "the mask of every attention"),
        ),
    ),
    Law(
        5,
        "Replicas are replicas",
        "what is replicated is bit-identical on all devices, after any number of steps.",
        (meshes.replicas,),
        (
            ("mesh", "an array is replicated over the axes that its sharding does not name"),
            ("optim.zero1", "sharded optimizer states update replicated parameters"),
        ),
    ),
    Law(
        6,
        "Communication is accounted for",
        "the collectives in the compiled program are those that the config predicts.",
        (communication.audit,),
        (
            ("mesh", "every axis has its collectives"),
            ("model.moe.exchange", "all-to-alls, ragged all-to-alls or gathered weights"),
            ("model.remat", "collectives of the forward pass are repeated unless their results are saved"),
            ("optim.zero1", "a reduce-scatter and an all-gather take the place of an all-reduce"),
        ),
    ),
    Law(
        7,
        "Padding is nowhere",
        "a padded token has no slot, no weight, and is in no loss, count or metric.",
        (single_device.padding,),
        (
            ("data.objective", "which positions are padding, and which are targets"),
            ("model.moe.S", "tokens of a routing group, padding included, set its capacity"),
        ),
    ),
    Law(
        8,
        "Nothing is dropped in silence",
        "drop rates are in every log record; evaluation is dropless.",
        (counts.routing_counts, single_device.drops),
        (
            ("model.moe.dispatch", "its `capacity_factor` limits the tokens of an expert; None drops nothing"),
            ("model.moe.exchange", "`RaggedAllToAll(buffer=...)` bounds the rows that a device receives"),
            ("run.log_every", "how often drop rates are logged"),
        ),
    ),
    Law(
        9,
        "Resume is exact",
        "an interrupted run goes on with the same batches and the same losses.",
        (),
        (
            ("run.save_every", "the steps that an interruption can cost"),
            ("seed", "batches and noise are functions of the seed and the step"),
            ("mesh", "bit for bit on the same mesh, to rounding on another"),
        ),
        "It takes two runs, one of them interrupted. `python -m experiments.train` with the `--workdir` of a run "
        "resumes it.",
    ),
    Law(
        10,
        "The numbers are the paper's",
        "a published model's config has its published parameter counts.",
        (),
        (("model", "every size of the model counts"),),
        "A config of your own has no published counts. `python -m experiments.plan --config=configs/papers/...` prints "
        "the counts of a published model beside the published ones.",
    ),
    Law(
        11,
        "Documents are apart",
        "without a capacity limit, tokens of one document change nothing in another.",
        (single_device.documents,),
        (
            ("data.L", "short documents are packed into one sequence"),
            ("model.attention", "the mask of every attention"),
            ("model.moe.router", "routers in which experts choose tokens see the whole group"),
            ("model.moe.dispatch", "with a capacity limit the documents of a routing group share slots"),
        ),
    ),
)


def law(number: int) -> Law:
    """Returns the law with this number, from 1."""
    return LAWS[number - 1]
