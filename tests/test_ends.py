"""Rod flow and edge flow: closed forms, the parabola, the full covariance equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import centralflow as cf

from .problems import parabola, reference, tiny_loss, tiny_network

FLOWS = [cf.RodFlow(), cf.EdgeFlow()]
# Edge flow is the same code with less of it.
ONE_FAST = [FLOWS[0], pytest.param(FLOWS[1], marks=pytest.mark.slow)]


def _half_squares(w, batch):
    return jnp.mean(batch @ (w * w)) / 2


def _quadratic(curvatures):
    """The curvatures are data, so that one program serves all."""
    return cf.Objective(_half_squares, jnp.asarray([curvatures]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("flow", FLOWS)
def test_rates_on_a_quadratic(flow):
    """A mode s = eta lambda oscillates with an amplitude that changes by the factor
    |1 - s| in a step; the centre of another decays by 1 - s."""
    start = jnp.array([0.1, 1.0, 1.0])
    for s in (1.7, 1.95, 2.05, 2.3):
        flown = cf.predict(
            _quadratic([s, 0.4, 0.1]), start, cf.GradientDescent(1.0), 20, flow=flow,
            weight_times=[5, 10], rtol=1e-6,
        )  # fmt: skip
        # Variances. The other directions have gone by then, as exp(-1.3 * 15).
        rate = np.log(flown.oscillation[20, 0] / flown.oscillation[15, 0]) / 10
        centre = np.log(flown.weights[2, 1] / flown.weights[1, 1]) / 5
        rod = isinstance(flow, cf.RodFlow)
        np.testing.assert_allclose(rate, s**2 / 4 - 1 if rod else s - 2, rtol=1e-4)
        np.testing.assert_allclose(centre, -0.4 - 0.4**2 / 2 * rod, rtol=1e-4)
        # ln|1 - s| = x - x^2/2 + x^3/3 ... in x = s - 2, the rates x + x^2/4 and x
        coefficient = (3 if rod else 2) / 4
        x = s - 2
        assert abs(rate - np.log(abs(1 - s)) - coefficient * x**2) < abs(x) ** 3 / 1.5


@pytest.mark.parametrize("flow", ONE_FAST)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_onset_on_the_parabola(dtype, flow):
    """Gradient descent passes the edge y = 2/eta = 6.67 until its oscillation has grown
    from rounding errors: to 7.58 in double precision, 7.29 in single."""
    with jax.enable_x64(dtype == jnp.float64):
        objective, start = parabola(0.01), jnp.array([0.0, 5.0], dtype)
        problem = (objective, start, cf.GradientDescent(0.3), 1000)
        options = dict(weight_times=np.arange(1001))
        run = cf.train(*problem, **options)
        flown = cf.predict(*problem, flow=flow, **options)
        ys = [np.asarray(x.weights[:, 1]) for x in (run, flown)]
    peaks = [float(np.max(y)) for y in ys]
    np.testing.assert_allclose(
        peaks[0], 7.58 if dtype == jnp.float64 else 7.29, atol=0.01
    )
    # To the peak, x = s - 2 rises at a constant speed, and the log of the amplitude by
    # the integral of its rate, which is x - x^2/2 for gradient descent, x + x^2/4 for
    # rod flow and x for edge flow. That it is the same rise puts x at the peak too low
    # by x^2/4 and x^2/6.
    x = 0.3 * peaks[0] - 2
    early = x**2 / (4 if isinstance(flow, cf.RodFlow) else 6) / 0.3
    # The rounding errors of one run may be larger or smaller than those expected, by a
    # factor that three covers: x dx/dt^-1 dx = ln 3 in x^2/2, with dx/dt = 0.3^2 eps
    chance = 0.09 * 0.01 * np.log(3) / x / 0.3
    assert abs(peaks[0] - peaks[1] - early) < chance + x**3 / 0.3
    # After it, the sharpness falls back and goes around the edge.
    assert np.min(ys[1][ys[1].argmax() :]) < 2 / 0.3


def _network():
    model, data = tiny_network(jnp.float64)
    return cf.Objective(tiny_loss, data), model


@pytest.mark.usefixtures("x64")
def test_one_vector_for_the_covariance():
    """Against the n x n equation of rod flow, with an end for each eigenvector of Sigma
    at both sides, from a point where a network oscillates."""
    objective, model = _network()
    optimizer, steps = cf.GradientDescent(0.5), 40
    before = cf.predict(objective, model, optimizer, 150, flow=cf.RodFlow())
    state = before.solver_state
    after = cf.predict(
        objective, before.model, optimizer, steps, flow=cf.RodFlow(), rtol=1e-5,
        optimizer_state=before.optimizer_state, solver_state=state,
    )  # fmt: skip
    w, flat = objective.flatten(before.model)
    n = w.size
    V = lambda w: -0.5 * flat.grad(w)
    DV = lambda w, u: -0.5 * flat.hvp(w, u)

    @jax.jit
    def rate(y):
        w, Sigma = y[:n], y[n:].reshape(n, n)
        values, vectors = jnp.linalg.eigh(Sigma)
        columns = (vectors * jnp.sqrt(jnp.maximum(values, 0))).T
        over = lambda fn: jax.vmap(fn)(columns)
        V0, up, down = V(w), over(lambda c: V(w + c)), over(lambda c: V(w - c))
        F, Q = V0 + jnp.sum((up + down) / 2 - V0, axis=0), (down - up) / 2
        DVF = over(lambda c: (DV(w + c, F) + DV(w - c, F)) / 2 - DV(w, F))
        DVF = DV(w, F) + jnp.sum(DVF, axis=0)
        return jnp.concatenate([F - DVF / 2, jnp.ravel(Q.T @ Q / 2 - 2 * Sigma)])

    a = jnp.exp(state.y.oscillation.log_size) * state.y.oscillation.direction[:n]
    y = np.concatenate([w, np.ravel(np.outer(a, a))])
    full = solve_ivp(
        lambda t, y: np.asarray(rate(y)), (0, steps), y, rtol=1e-5, atol=1e-9
    )
    assert full.success
    Sigma = full.y[n:, -1].reshape(n, n)
    trace, top = np.trace(Sigma), np.linalg.eigvalsh(Sigma)[-1]
    travelled = np.linalg.norm(full.y[:n, -1] - w)
    distance = np.linalg.norm(full.y[:n, -1] - after.weights[-1]) / travelled
    # Measured: all but 1.9e-6 of Sigma is in one direction, its trace is off by 1.9e-4,
    # and the centre by 6.5e-4 of the way. Where a is at an angle to the eigenvectors of
    # K, the two equations differ by (s_i - s_j)^2 / 4 in Sigma_ij.
    assert trace - top < 1e-5 * trace
    np.testing.assert_allclose(after.trace_covariance[-1], trace, rtol=1e-3)
    assert distance < 2e-3


@pytest.mark.usefixtures("x64")
def test_second_order_for_a_schedule_and_a_second_moment():
    """Below the edge, where nothing oscillates, the flow is that of the optimizer to
    second order in its step, and counts as it does. One parameter has no gradient."""
    objective, model = _network()
    loss = lambda model, batch: tiny_loss(model, batch)
    objective = cf.Objective(loss, objective.data)
    model = dict(model, unused=jnp.ones(2))
    rate = lambda step: 2e-3 / (1 + step / 20)
    optimizer = cf.RMSProp(rate, 0.9, 1e-3, bias_correction=True)
    warm = cf.train(objective, model, optimizer, 30, coordinates=[0, 5])
    problem = (objective, warm.model, optimizer, 30)
    options = dict(optimizer_state=warm.optimizer_state, coordinates=[0, 5])
    run = cf.train(*problem, **options)
    rod = cf.predict(*problem, flow=cf.RodFlow(), rtol=1e-5, **options)
    stable = cf.predict(*problem, flow=cf.StableFlow(), rtol=1e-5, **options)
    distance = [cf.compare(run, x).weight_distance for x in (rod, stable)]
    # Measured: 4.2e-4 and 1.3e-2
    assert distance[0] < 0.1 * distance[1]
    for count in ("updates", "age"):
        np.testing.assert_allclose(getattr(rod.optimizer_state, count), 60, rtol=1e-9)
    a, b = (x.optimizer_state.nu for x in (rod, run))
    used = np.flatnonzero(b)
    assert used.size == b.size - 2
    # The third order of one step of nu, 0.1^3 / 3 of it, adds up over the memory of ten
    # steps, in which the gradients change, too: 2.6e-3 measured.
    np.testing.assert_allclose(a[used], b[used], rtol=1e-2)
    np.testing.assert_allclose(rod.step_sizes, run.step_sizes, rtol=1e-2)


@pytest.mark.usefixtures("x64")
def test_momentum():
    """Heavy ball on a quadratic: rho^2 - (1 + beta - s) rho + beta = 0, with one root
    at -1 where s = 2 (1 + beta)."""
    optimizer, start = cf.HeavyBall(1.0, 0.5), jnp.array([0.1, 1.0])
    for s in (2.96, 3.1):
        flown = cf.predict(
            _quadratic([s, 0.3]), start, optimizer, 60, flow=cf.RodFlow(), rtol=1e-6
        )
        rho = np.min(np.roots([1, s - 1.5, 0.5]))
        rate = np.log(flown.oscillation[60, 0] / flown.oscillation[50, 0]) / 20
        np.testing.assert_allclose(rate, (1 - rho) ** 2 / 4 - 1, rtol=1e-3)


@pytest.mark.parametrize("flow", FLOWS)
def test_work_is_counted_and_a_run_can_be_continued(flow):
    evaluations = []

    def loss(w, batch):
        jax.debug.callback(lambda: evaluations.append(1))
        return jnp.mean(batch @ (w * w)) / 2

    objective = cf.Objective(loss, jnp.asarray([[0.5, 0.2]]))
    problem = (objective, jnp.array([0.1, 1.0]), cf.GradientDescent(1.0))
    # As many times in each, so that one program serves all.
    whole = cf.predict(*problem, 10, flow=flow, times=[4, 7])
    jax.effects_barrier()
    assert (
        whole.stats["rejected_steps"] == 0
    )  # the first, evaluated twice, is counted once
    assert len(evaluations) == whole.stats["gradients"]
    half = cf.predict(*problem, 4, flow=flow, times=[1, 2])
    state = half.solver_state
    rest = cf.predict(*problem, 6, flow=flow, times=[0, 3], solver_state=state)
    np.testing.assert_allclose(half.optimizer_state, 4, rtol=1e-5)
    # Other steps, each with errors of rtol = 1e-3.
    np.testing.assert_allclose(rest.mean_loss, whole.mean_loss, rtol=1e-2)


@pytest.mark.parametrize("flow", ONE_FAST)
def test_divergence(flow):
    objective = cf.Objective(lambda w: -jnp.sum(w + w**3 / 3))
    problem = (objective, jnp.array([0.0]), cf.GradientDescent(1.0), 100)
    flown = cf.predict(*problem, flow=flow, throw=False)
    assert flown.result != cf.RESULTS.successful
    assert 1 <= flown.times.size < 10
    assert np.all(np.isfinite(flown.mean_loss))


def test_errors():
    objective, start = parabola(0.01), jnp.array([0.0, 5.0])
    with pytest.raises(
        ValueError, match=r"`flow` is `EdgeFlow.*`optimizer` is RMSProp"
    ):
        cf.predict(objective, start, cf.RMSProp(0.1, 0.9), 5, flow=cf.EdgeFlow())
    problem = (objective, start, cf.GradientDescent(0.3), 5)
    kinds = (cf.StableFlow(), cf.RodFlow())
    for one, other in (kinds, kinds[::-1]):
        state = cf.predict(*problem, flow=one).solver_state
        with pytest.raises(ValueError, match="`solver_state` is that of another flow"):
            cf.predict(*problem, flow=other, solver_state=state)


@pytest.mark.slow
def test_a_network_through_its_first_onset():
    """Gradient descent on digits: its sharpness rises to 2.96 before an oscillation has
    grown that can be seen. The flows that follow the oscillation stay with it until it
    has; the central flow stops at 2."""
    _, _, objective, model = reference("gd_mlp_digits")
    problem = (objective, model, cf.GradientDescent(0.2), 300)
    run = cf.train(*problem, sharpness_every=10)
    assert np.max(run.sharpness[::10, 0]) > 2.9
    flows = [cf.StableFlow(), cf.CentralFlow(), *FLOWS]
    flown = [cf.predict(*problem, flow=flow) for flow in flows]
    stable, central, rod, edge = reports = [cf.compare(run, x) for x in flown]
    print([(r.loss_error, r.weight_distance) for r in reports])
    for report in (central, rod, edge):
        assert report.weight_distance < 0.5 * stable.weight_distance
    # From the edge, at step 38, to where the run's loss is highest, at step 75
    error = lambda x: np.mean(np.abs(x.mean_loss / run.loss - 1)[38:62])
    stable, central, rod, edge = errors = [error(x) for x in flown]
    print(errors)
    assert rod < 0.1 * central
    assert edge < 0.5 * central
