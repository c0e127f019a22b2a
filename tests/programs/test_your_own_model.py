"""docs/your_own_model.md is true: its code runs from top to bottom, and does what the page says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.nnx import RouterState

PAGE = (Path(__file__).parents[2] / "docs/your_own_model.md").read_text()


@pytest.fixture(scope="module")
def page():
    """All names that the page defines, once its blocks have run in order."""
    names = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    return names


def slug(title):
    return re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))


def shard_of(x):
    return x.addressable_shards[0].data.shape


def test_every_section_is_in_the_table_of_contents():
    """Beside its title, by a link that leads there; links to other pages lead to titles that there are."""
    titles = re.findall(r"^## (.*)", PAGE, re.MULTILINE)
    table = re.findall(r"^\| .* \| \[(.*?)\]\(#(.*?)\) \|", PAGE, re.MULTILINE)
    assert set(table) == {(title, slug(title)) for title in titles}
    docs = Path(__file__).parents[2] / "docs"
    for file, anchor in re.findall(r"\]\((\w+\.md)#(.*?)\)", PAGE):
        assert anchor in {slug(t) for t in re.findall(r"^#+ (.*)", (docs / file).read_text(), re.MULTILINE)}


def test_experts_are_sharded_and_stay_so(page):
    """Parameters and both moments, after steps; what is foreign, and the router's, is on every device."""
    state = page["state"]
    adam = state.opt_state[0]
    for tree in (state.params, adam.mu, adam.nu):
        assert shard_of(tree["layers"]["moe"]["up_EDF"]) == (2, 2, 16, 32)
        assert shard_of(tree["layers"]["moe"]["down_EFD"]) == (2, 2, 32, 16)
        assert shard_of(tree["layers"]["moe"]["router_gate_DE"]) == (2, 16, 8)
        assert shard_of(tree["Dense_0"]["kernel"]) == (16, 64)
    assert state.router["bias_E"].sharding.is_fully_replicated


def test_losses_fall_and_are_those_without_a_mesh(page):
    """Losses of every step with its noise, and the router's state after them, are those without a mesh."""
    losses = page["losses"]
    assert losses[-1] < 0.8 * losses[0]
    state, step, found = jax.jit(page["create"])(page["key"]), jax.jit(page["step"]), []
    for i in range(len(losses)):
        state, (task, _) = step(state, page["batch"](i))
        found.append(float(task))
    np.testing.assert_allclose(found, losses, rtol=1e-4)
    np.testing.assert_allclose(state.router["bias_E"], page["state"].router["bias_E"], atol=1e-6)
    assert np.abs(state.router["bias_E"]).max(-1).min() > 0


def test_the_key_and_the_auxiliary_loss_matter(page):
    """Another key is another loss; gates of routers get gradients from the auxiliary loss alone."""
    params, router = jax.device_get((page["state"].params, page["state"].router))

    def auxiliary(params, key):
        total, (task, aux) = page["loss"](params, router, page["batch"](0), key)
        return total - task, aux.loss

    f = jax.jit(jax.value_and_grad(auxiliary, has_aux=True))
    ((one, losses_N), grads), ((other, _), _) = f(params, jax.random.key(0)), f(params, jax.random.key(1))
    assert one != other
    assert losses_N.shape == (2,)
    np.testing.assert_allclose(one, np.mean(losses_N), rtol=1e-4)
    assert np.abs(grads["layers"]["moe"]["router_gate_DE"]).max((1, 2)).min() > 0


def test_evaluation_drops_nothing(page):
    """Evaluation drops nothing where training did, and gives the same loss at every call."""
    assert np.all(page["metrics"]["drop_rate"] > 0)
    assert not np.any(page["held_out_metrics"]["drop_rate"])
    assert not np.any(page["net_metrics"]["drop_rate"])
    assert page["net"].moe.cfg == page["CFG"]


def test_bfloat16_is_of_activations_only(page):
    """Parameters, logits, auxiliary loss and gradients are float32."""
    model, state = page["Model"](dtype="bfloat16"), page["state"]

    def loss(params):
        logits, aux = model.apply({"params": params}, jnp.zeros((8, 4), int), state.router)
        return logits.sum() + aux.loss.sum(), (logits, aux.loss)

    jaxpr, shapes = jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True), return_shape=True)(state.params)
    assert {x.dtype for x in jax.tree.leaves((shapes, state.params))} == {jnp.dtype("float32")}
    assert re.search(r"bf16\[\d+,\d+,32\]", str(jaxpr)), "hidden units of experts are not bfloat16"


def test_what_is_restored_is_what_was_saved(page):
    """Bit for bit, on the other mesh; and training goes on with it."""
    saved, restored = page["state"], page["restored"]
    assert jax.tree.structure(saved) == jax.tree.structure(restored)
    jax.tree.map(np.testing.assert_array_equal, saved, restored)
    up_NEDF = restored.params["layers"]["moe"]["up_EDF"]
    assert up_NEDF.sharding.mesh == page["other"]
    assert shard_of(up_NEDF) == shard_of(restored.opt_state[0].mu["layers"]["moe"]["up_EDF"]) == (2, 4, 16, 32)
    shape = jax.eval_shape(page["step"], restored, page["batch"](0))[0]
    assert jax.tree.structure(shape) == jax.tree.structure(page["sharding"])


def test_nnx(page):
    """Sharded parameters and moments, a router state that moves, and losses that fall."""
    net, optimizer, losses = page["net"], page["optimizer"], page["net_losses"]
    assert losses[-1] < 0.95 * losses[0]
    with jax.set_mesh(page["mesh"]):
        new = page["create_net"]()
    for module, adam in ((net, optimizer.opt_state[0]), (new[0], new[1].opt_state[0])):
        for x in (module.moe.up_EDF, adam.mu["moe"]["up_EDF"], adam.nu["moe"]["up_EDF"]):
            assert shard_of(x[...]) == (2, 16, 32)
    (bias_E,) = jax.tree.leaves(nnx.state(net, RouterState))
    assert np.abs(bias_E).max() > 0


def test_the_layers_of_someone_else_keep_their_shardings(page):
    """By the line of the page that joins two trees of shardings."""
    (line,) = re.findall(r"`(jax\.tree\.map\(lambda ours, yours.*?)`", PAGE)
    yours = jax.tree.map(lambda _: page["batch_sharding"](page["mesh"]), page["sharding"])
    joined = eval(line, {**page, "your_shardings": yours})
    assert joined.params["layers"]["moe"]["up_EDF"] == page["sharding"].params["layers"]["moe"]["up_EDF"]
    assert joined.params["Dense_0"]["kernel"] == page["batch_sharding"](page["mesh"])
