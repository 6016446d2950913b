"""The modules compute what a loop over experts computes, with gradients, wherever they are called."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from reference import oracle

from moejax import modules
from moejax.checks import ConfigError
from moejax.config import AttentionConfig, DispatchConfig, ModelConfig, OptimizerConfig, RouterConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig, build_mesh, count_hosts
from moejax.modules import MoELayer, MoEStats, Transformer
from moejax.program import Program
from moejax.train.step import make_train_step

B, S, D = 16, 4, 16
MOE = ModelConfig(
    d_model=D, d_ff=8, num_experts=16, experts_per_token=2, router=RouterConfig(scaling=1.5), shared_d_ff=16,
    shared_gate=True, dtype="float32",
)  # fmt: skip
UNSHARED = ModelConfig(d_model=D, d_ff=8, num_experts=16, experts_per_token=2, dtype="float32")
ROOM = 8.0  # with 2 of 16 experts a token, room for every token on every expert
FOLDED = DispatchConfig(capacity_factor=ROOM)
SPLIT = DispatchConfig(capacity_factor=ROOM, expert_axes=("expert",))
MESHES = {
    "4x2x2": MeshConfig(expert=4, pipeline=2, tensor=2),
    "16x1x1": MeshConfig(expert=16),
    "1x1x1": MeshConfig(),
    "replicas": MeshConfig(replica=2, expert=4, tensor=2),
}


@functools.cache
def mesh_of(name):
    config = MESHES[name]
    return build_mesh(config, jax.devices()[: config.num_devices])


def make_layer(mesh="4x2x2", dispatch=FOLDED, config=MOE):
    return MoELayer(config, mesh_of(mesh), dispatch, rngs=nnx.Rngs(0))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X, WANTED = normal(1, B, S, D), normal(2, B, S, D)


def objective(y, stats, wanted, mean=jnp.mean):
    return mean(jnp.square(y - wanted)) + 0.1 * stats.aux_loss + 0.01 * stats.z_loss


@functools.cache
def dense_results(shared):
    """Gradients of parameters and input, then results and statistics, as the oracle has them."""
    model = MOE if shared else UNSHARED

    def loss(params_and_x):
        y, figures = oracle.mixture(*params_and_x, model)
        stats = MoEStats(figures.aux_loss, figures.z_loss, figures.load_E, jnp.zeros(()), jnp.ones(()))
        return objective(y, stats, WANTED), (y, stats)

    params = plain(make_layer("1x1x1", config=model))
    return oracle.in_float64(jax.jit(jax.grad(loss, has_aux=True)))((params, X))


def plain(module):
    return nnx.to_pure_dict(nnx.state(module))


def assert_close(got, wanted, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), got, wanted)


def case(mesh, dispatch, config=MOE, marks=()):
    name = f"{mesh}-{'+'.join(dispatch.expert_axes)}{'-shared' if config.shared_d_ff else ''}"
    return pytest.param(mesh, dispatch, config, id=name, marks=marks)


on_every_layout = pytest.mark.parametrize(
    ("mesh", "dispatch", "config"),
    [
        case("4x2x2", FOLDED),
        *(case(mesh, FOLDED, marks=pytest.mark.full) for mesh in ("16x1x1", "1x1x1")),
        case("4x2x2", SPLIT, marks=pytest.mark.full),
        case("replicas", FOLDED, UNSHARED, marks=pytest.mark.full),
        *(case(mesh, SPLIT, marks=pytest.mark.slow) for mesh in MESHES if mesh != "4x2x2"),
    ],
)


@on_every_layout
def test_on_global_arrays_equals_a_loop_over_experts(mesh, dispatch, config):
    layer = make_layer(mesh, dispatch, config)

    @nnx.jit
    def grad(layer, x):
        def loss(layer, x):
            y, stats = layer(x)
            return objective(y, stats, WANTED), (y, stats)

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    (grad_layer, grad_x), results = grad(layer, X)
    assert_close(((nnx.to_pure_dict(grad_layer), grad_x), results), dense_results(bool(config.shared_d_ff)))


@on_every_layout
def test_inside_a_shard_map_equals_a_loop_over_experts(mesh, dispatch, config):
    layer = make_layer(mesh, dispatch, config)
    graphdef, state = nnx.split(layer)
    token_axes = tuple(axis for axis in ("replica", "expert", "tensor") if axis in layer.mesh.axis_names)

    def device(state, x, wanted):
        def loss(state, x):
            y, stats = nnx.merge(graphdef, state)(x)
            return objective(y, stats, wanted, lambda v: lax.pmean(v.mean(), token_axes)), (y, stats)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)

    specs, x_spec = layer.specs(), layer.x_spec
    grad = jax.shard_map(
        device, mesh=layer.mesh, in_specs=(specs, x_spec, x_spec), out_specs=((specs, x_spec), (x_spec, P()))
    )
    (grad_state, grad_x), results = jax.jit(grad)(state, X, WANTED)
    assert_close(((nnx.to_pure_dict(grad_state), grad_x), results), dense_results(bool(config.shared_d_ff)))


def test_eager_and_jitted_calls_agree_and_change_nothing():
    layer = make_layer()
    before = jax.device_get(plain(layer))
    eager, jitted = layer(X), jax.jit(lambda state, x: nnx.merge(nnx.graphdef(layer), state)(x))(nnx.state(layer), X)
    assert_close(eager, jitted, 1e-6)
    assert_close(jax.device_get(plain(layer)), before, 0)


def test_parameters_are_made_where_they_are_stored_and_equal_on_every_mesh():
    layer = make_layer()
    stored = jax.tree.map(lambda w, spec: w.sharding.spec == spec, plain(layer), nnx.to_pure_dict(layer.specs()))
    assert all(jax.tree.leaves(stored))
    assert layer.experts.w_in_EDGF.get_value().addressable_shards[0].data.shape == (2, D, 2, 8)
    assert layer.w_router_DE.get_value().dtype == jnp.float32
    assert_close(jax.device_get(plain(layer)), jax.device_get(plain(make_layer("1x1x1"))), 0)


def test_what_exceeds_capacity_is_counted_over_all_devices():
    layer = make_layer(dispatch=DispatchConfig("capacity", capacity_factor=4.0), config=UNSHARED)
    layer.w_router_DE.set_value(jnp.zeros_like(layer.w_router_DE.get_value()))  # ties: all choose experts 0 and 1
    _, stats = layer(X)
    np.testing.assert_allclose(stats.load_E, [B * S] * 2 + [0] * 14)
    np.testing.assert_allclose(
        stats.dropped_fraction, 0.5
    )  # 8 devices of 8 tokens give an expert 8 * 4 * 8 * 2 / 16 = 32 rows
    np.testing.assert_allclose(stats.rounds, 2)  # of 4 rows: all of its tokens are kept on the first four devices
    np.testing.assert_allclose(stats.aux_loss, 1, rtol=1e-6)


def test_without_drops_what_exceeds_the_buffers_goes_in_further_rounds():
    layer = make_layer(dispatch=DispatchConfig(capacity_factor=1.5), config=UNSHARED)
    layer.w_router_DE.set_value(jnp.zeros_like(layer.w_router_DE.get_value()))
    _, stats = layer(X)
    assert (stats.dropped_fraction, stats.rounds) == (0, 4)  # 8 tokens in buffers of ceil(1.5 * 8 * 2 / 16) = 2 rows


def test_tokens_may_differ_over_the_pipeline_axis_too():
    layer = make_layer()
    graphdef, state = nnx.split(layer)

    def device(state, x):
        y, stats = nnx.merge(graphdef, state)(x)
        return y, stats.load_E[None]

    x_spec = P(("expert", "pipeline"), "tensor")
    f = jax.shard_map(device, mesh=layer.mesh, in_specs=(layer.specs(), x_spec), out_specs=(x_spec, P("pipeline")))
    y, load_PE = jax.jit(f)(state, X)
    _, (wanted, stats) = dense_results(True)
    assert_close(y, wanted)
    assert_close(load_PE.sum(0), stats.load_E)
    np.testing.assert_allclose(load_PE.sum(1), B * S)  # half of the tokens each, two experts a token


def test_computes_in_the_configured_dtype_and_returns_the_inputs():
    layer = make_layer(config=dataclasses.replace(MOE, dtype="bfloat16"))
    text = jax.jit(lambda x: layer(x)).lower(X).as_text()
    assert "bf16" in text
    y, stats = layer(X)
    assert (y.dtype, stats.load_E.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(y, make_layer()(X)[0], atol=0.03)
    assert layer(X.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((6, S, D), "B=6, which must be a multiple of expert = 4; try 4"),
        ((B, 3, D), "S=3, which must be a multiple of tensor = 2; try 2"),
        ((B, D), r"must be \[B, S, d_model=16\]"),
        ((B, S, 8), r"must be \[B, S, d_model=16\]"),
    ],
)
def test_wrong_shapes_are_told(shape, message):
    with pytest.raises(ConfigError, match=message):
        make_layer()(jnp.zeros(shape))


def test_layers_that_do_not_fit_are_told():
    with pytest.raises(ConfigError, match="num_experts=12 must be a multiple of expert × tensor = 8"):
        make_layer(config=ModelConfig(num_experts=12))
    with pytest.raises(ConfigError, match="lack expert and tensor"):
        MoELayer(MOE, jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("mesh", "hosts"),
    [
        (MeshConfig(expert=8, hardware="h100"), 1),
        (MeshConfig(expert=8, hardware="h100", hosts=4), 4),
        (MeshConfig(expert=8, pipeline=2, hardware="h100", hosts=2, host_axis="pipeline"), 1),
        (MeshConfig(expert=8, replica=2, hardware="h100", hosts=2, host_axis="replica"), 1),
        (MeshConfig(expert=8, replica=2, tensor=2, hardware="h100", hosts=4), 2),
    ],
)
def test_hosts_are_counted_from_the_processes_of_devices(mesh, hosts, fake_devices):
    placed = build_mesh(mesh, fake_devices(mesh.hosts, mesh.num_devices // mesh.hosts))
    assert count_hosts(placed, "expert") == mesh.hosts_along("expert") == hosts


def test_two_hops_need_hosts_to_go_between(monkeypatch):
    """Virtual devices are all of one process, whatever the mesh says of its hosts."""
    two_hops = DispatchConfig(capacity_factor=ROOM, hierarchical=True)
    message = (
        r"^dispatch.hierarchical=True has no hosts to go between: the expert axis of "
        r"mesh={'expert': 4, 'pipeline': 2, 'tensor': 2} is inside one host; use dispatch.hierarchical=False$"
    )
    with pytest.raises(ConfigError, match=message):
        make_layer(dispatch=two_hops)
    monkeypatch.setattr(modules, "count_hosts", lambda mesh, axis: 3)
    with pytest.raises(ConfigError, match="expert=4 must be a multiple of its hosts = 3; try expert=6, or its hosts"):
        make_layer(dispatch=two_hops)


def test_between_hosts_the_exchange_takes_two_hops_and_computes_the_same(monkeypatch):
    monkeypatch.setattr(modules, "count_hosts", lambda mesh, axis: {"expert": 2}[axis])
    layer = make_layer(dispatch=DispatchConfig(capacity_factor=ROOM, hierarchical=True))
    assert_close(layer(X), dense_results(True)[1])
    hops = [str(jax.make_jaxpr(layer)(X)).count("all_to_all[") for layer in (layer, make_layer())]
    assert hops[0] == 2 * hops[1] > 0


def test_wrong_shard_maps_are_told():
    layer = make_layer()
    graphdef, state = nnx.split(layer)

    def run(in_specs, mesh=layer.mesh, x_spec=layer.x_spec, **options):
        device = lambda state, x: nnx.merge(graphdef, state)(x)[0]  # noqa: E731
        f = jax.shard_map(device, mesh=mesh, in_specs=(in_specs, x_spec), out_specs=x_spec, **options)
        return jax.eval_shape(f, state, X)

    with pytest.raises(ConfigError, match=r"which lacks \('tensor',\)"):
        run(P(), x_spec=P("expert"), axis_names={"expert"})
    with pytest.raises(ConfigError, match=r"in_specs=layer.specs\(\)"):
        run(P())
    with pytest.raises(ConfigError, match="check_vma=True"):
        run(layer.specs(), check_vma=False)
    with pytest.raises(ConfigError, match="the layer's mesh has"):
        run(P(), mesh=build_mesh(MeshConfig(expert=8, tensor=2)))


class UserModel(nnx.Module):
    """What someone else would write around the layer."""

    def __init__(self, mesh, rngs):
        self.dense = nnx.Linear(D, D, rngs=rngs)
        self.moe = MoELayer(MOE, mesh, FOLDED, rngs=rngs)

    def __call__(self, x):
        h = x + self.dense(x)
        y, stats = self.moe(h)
        return h + y, stats


@pytest.fixture
def user_model():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Flax and optax need it
        yield UserModel(mesh_of("4x2x2"), nnx.Rngs(0))


def user_loss(model):
    y, stats = model(X)
    return objective(y, stats, WANTED)


@pytest.mark.full
def test_an_optimizer_lowers_the_loss_of_a_users_model(user_model):
    optimizer = nnx.Optimizer(user_model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(user_loss)(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(user_model, optimizer) for _ in range(4)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses
    moment = optimizer.opt_state[0].mu["moe"]["experts"]["w_in_EDGF"].get_value()
    assert moment.sharding.is_equivalent_to(user_model.moe.experts.w_in_EDGF.get_value().sharding, moment.ndim)


@pytest.mark.full
def test_a_selection_bias_is_moved_by_the_loads_and_by_nothing_else():
    layer = make_layer(config=dataclasses.replace(MOE, router=RouterConfig(bias=True)))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        optimizer = nnx.Optimizer(layer, optax.adamw(0.1, weight_decay=0.5), wrt=nnx.Param)

        @nnx.jit
        def step(layer, optimizer):
            def loss(layer):
                y, stats = layer(X)
                return objective(y, stats, WANTED), stats.load_E

            grads, load_E = nnx.grad(loss, has_aux=True)(layer)
            optimizer.update(layer, grads)
            layer.update_bias(load_E, rate=0.02)
            return load_E

        wanted_E = np.zeros(MOE.num_experts)
        for _ in range(3):
            load_E = np.asarray(step(layer, optimizer), np.float64)
            wanted_E += 0.02 * np.sign(load_E.mean() - load_E)
            wanted_E -= wanted_E.mean()
    np.testing.assert_allclose(layer.router_bias_E.get_value(), wanted_E, atol=1e-6)
    assert np.abs(wanted_E).max() > 0.02
    assert not nnx.to_pure_dict(nnx.state(layer, nnx.Param)).keys() & {"router_bias_E"}
    with pytest.raises(ConfigError, match=r"router\.bias=False leaves update_bias nothing to move"):
        make_layer().update_bias(load_E)


def test_moving_the_bias_evens_the_loads():
    layer = make_layer(config=dataclasses.replace(MOE, router=RouterConfig(bias=True), shared_gate=False))
    skewed_DE = layer.w_router_DE.get_value() * jnp.where(jnp.arange(MOE.num_experts) < 3, 4.0, 1.0)[None]
    layer.w_router_DE.set_value(skewed_DE)
    loads = []
    for _ in range(30):
        _, stats = layer(X)
        layer.update_bias(stats.load_E)
        loads.append(float(stats.load_E.std()))
    assert loads[-1] < loads[0] / 2, loads


def test_a_users_shard_map_gives_the_same_loss_and_gradient(user_model):
    graphdef, state = nnx.split(user_model)
    specs = jax.tree.map(lambda _: P(), state)
    specs["moe"] = user_model.moe.specs()
    x_spec = user_model.moe.x_spec

    def device(state, x, wanted):
        def loss(state):
            y, stats = nnx.merge(graphdef, state)(x)
            return objective(y, stats, wanted, lambda v: lax.pmean(v.mean(), ("expert", "tensor")))

        return jax.value_and_grad(loss)(state)

    f = jax.shard_map(device, mesh=mesh_of("4x2x2"), in_specs=(specs, x_spec, x_spec), out_specs=(P(), specs))
    loss, grads = jax.jit(f)(state, X, WANTED)
    wanted_loss, wanted_grads = nnx.jit(nnx.value_and_grad(user_loss))(user_model)
    assert_close((loss, nnx.to_pure_dict(grads)), (wanted_loss, nnx.to_pure_dict(wanted_grads)))


MODEL = ModelConfig(
    num_layers=2, d_model=16, attention=AttentionConfig(2, 2, 4), d_ff=8,
    num_experts=8, vocab_size=16, dtype="float32",
)  # fmt: skip


@functools.cache
def make_program(mesh):
    layout = Layout(MESHES[mesh], seq_len=8, batch_size=16, num_microbatches=2).replace(capacity_factor=4.0)
    return Program(MODEL, layout, mesh_of(mesh))


@pytest.fixture(scope="module")
def batch():
    tokens, targets = jax.random.randint(jax.random.key(3), (2, 16, 8), 0, MODEL.vocab_size)
    segment_ids = jnp.broadcast_to(jnp.arange(8) // 5 + 1, tokens.shape)
    return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids}


@pytest.fixture(scope="module")
def model():
    return Transformer(make_program("4x2x2"), rngs=nnx.Rngs(7))


def test_a_transformer_holds_what_its_program_makes(model):
    program = model.program
    wanted = program.init(nnx.Rngs(7).params())
    assert jax.tree.structure(model.params) == jax.tree.structure(wanted)
    assert_close(model.params, wanted, 0)
    assert model.layers.moe.w_router_DE.get_value().sharding.spec == program.param_specs["layers"]["moe"]["w_router_DE"]


def test_logits_are_float32_sharded_and_equal_to_one_devices(model, batch):
    logits_BSV = model(batch["tokens"], batch["segment_ids"])
    assert (logits_BSV.shape, logits_BSV.dtype) == ((16, 8, 16), jnp.float32)
    assert logits_BSV.sharding.spec == P("expert", None, ("pipeline", "tensor"))

    program = make_program("1x1x1")
    params = jax.tree.map(lambda w, p: w.reshape(p.shape), jax.device_get(model.params), program.table)
    single = Transformer.from_params(program, params)
    assert_close(single(batch["tokens"], batch["segment_ids"]), jax.device_get(logits_BSV))
    one_segment = jnp.ones_like(batch["tokens"])
    assert_close(single(batch["tokens"]), single(batch["tokens"], one_segment), 0)


@pytest.mark.full
def test_the_loss_is_that_of_the_logits_and_its_gradient_the_programs(model, batch):
    grads, metrics = nnx.jit(nnx.grad(lambda model, batch: model.loss(batch), has_aux=True))(model, batch)
    log_probs = jax.nn.log_softmax(jax.device_get(model(batch["tokens"], batch["segment_ids"])))
    picked = jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)
    assert_close(metrics["cross_entropy"], -picked.mean())
    assert metrics["load_LE"].shape == (MODEL.num_moe_layers, MODEL.num_experts)

    program = model.program
    in_specs = (program.param_specs, program.batch_spec)
    inside = program.sharded(lambda p, b: jax.grad(program.loss, has_aux=True)(p, b)[0], in_specs, program.param_specs)
    assert_close(nnx.to_pure_dict(grads), jax.jit(inside)(model.params, batch))


@pytest.mark.full
def test_trained_parameters_come_back(model, batch):
    train_step = make_train_step(model.program, OptimizerConfig(warmup_steps=1), steps=10)
    batch, state = train_step.put_batch(batch), train_step.init(jax.random.key(0))
    trained = Transformer.from_params(model.program, state.params)
    loss, metrics = trained.loss(batch)
    assert loss == metrics["loss"]
    assert_close(metrics, train_step.evaluate(state.params, batch), 1e-6)

    other = Transformer(model.program, rngs=nnx.Rngs(1))
    variable = other.embed.table_VD
    other.update(state.params)
    assert variable is other.embed.table_VD
    assert_close(other.params, state.params, 0)


def test_a_transformers_bias_is_among_its_parameters_and_not_the_optimizers():
    program = make_program("4x2x2")
    program = dataclasses.replace(program, model=dataclasses.replace(MODEL, router=RouterConfig(bias=True)))
    params = program.init(jax.random.key(0))
    params["layers"]["moe"]["router_bias_E"] += 1
    model = Transformer.from_params(program, params)
    assert_close(model.params, params, 0)
    assert not [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)) if path[-1] == "router_bias_E"]


def test_parameters_of_another_program_are_told(model):
    params = model.params
    with pytest.raises(ConfigError, match=r"head\.w_DV has shape none; this program's has \(16, 16\)"):
        model.update(params | {"head": {"norm_D": params["head"]["norm_D"]}})
    with pytest.raises(ConfigError, match=r"head\.norm_D has shape \(3,\); this program's has \(16,\)"):
        Transformer.from_params(model.program, params | {"head": params["head"] | {"norm_D": jnp.zeros(3)}})
    with pytest.raises(ConfigError, match=r"more has shape \(\); this program's has none"):
        model.update(params | {"more": jnp.zeros(())})


def test_wrong_calls_of_a_transformer_are_told(model):
    with pytest.raises(ConfigError, match="batch_size=12 must be a multiple of 8"):
        model(jnp.zeros((12, 8), jnp.int32))
    with pytest.raises(ConfigError, match=r"must be \[B, S\]"):
        model(jnp.zeros((8,), jnp.int32))
    f = jax.shard_map(model, mesh=model.program.mesh, in_specs=P("expert"), out_specs=P("expert"))
    with pytest.raises(ConfigError, match=r"use Program\.logits or Program\.loss"):
        jax.eval_shape(f, jnp.zeros((16, 8), jnp.int32))
