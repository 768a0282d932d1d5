"""The central flow in adaptive long steps: closed forms, small fixed steps, failure.

A program takes about ten seconds to compile. So the parabola's coefficients are data,
the learning rate is a schedule with arrays, and reported times are always as many: the
same few programs serve all tests."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf

from .problems import tiny_loss, tiny_network
from .test_central import _matrix_problem

pytestmark = pytest.mark.usefixtures("x64")


# The parabola.

ETA = 0.3


def _parabola_loss(w, data):
    """Not a number beyond y = `limit`."""
    (eps, limit), (x, y) = data[0], w
    return (y + x) * x**2 / 2 - eps * (x + y) + 0 * jnp.sqrt(limit - y)


def _square(w):
    return w[0] ** 2


# Of functions of y E[h] = h, for X is along x: one that is positive, and one that
# changes its sign.
METRICS = {
    "x^2": _square,
    "exp(y)": lambda w: jnp.exp(w[1]),
    "y^2": lambda w: w[1] ** 2 - 30,
}


def _parabola(eps, steps, limit=1e9, y0=5.0, **options):
    times = np.linspace(0, steps, 61)
    return cf.predict(
        cf.Objective(_parabola_loss, jnp.array([[eps, limit]])),
        jnp.array([0.0, y0]), cf.GradientDescent(ETA), steps,
        times=times, weight_times=times, metrics=METRICS, rtol=1e-3, **options,
    )  # fmt: skip


@pytest.mark.parametrize("eps", [1e-2, 1e-3, 1e-4])
def test_parabola(eps):
    """As of test_central.py: free rise, then y = 2/eta + 3 eta eps, E[x^2] = 2 eps."""
    free = _parabola(eps, round(5.5 / eps))
    assert 5.5 / eps / free.stats["accepted_steps"] > 20
    y = 5 + ETA * eps * np.asarray(free.weight_times)
    y = y - eps * (1 / 5 - 1 / y) / 2  # dy/dt = eta (eps - x^2/2)
    # what the closed form neglects
    np.testing.assert_allclose(free.weights[:, 1], y, atol=20 * eps**2)
    # Within the tolerance, a tenth of what straight lines between steps would be off
    # by: (dy)^2 / 8, of exp(y), in about 30 steps.
    w = np.asarray(free.weights)
    np.testing.assert_allclose(free.metrics["exp(y)"], np.exp(w[:, 1]), rtol=1e-3)
    np.testing.assert_allclose(free.metrics["y^2"], w[:, 1] ** 2 - 30, atol=1e-3)

    # The edge is reached at 5.556 / eps, in a step that may be long; the flow relaxes
    # to its rest there at the rate eta (2/eta) / 10 = 0.2, by e^-12 in 60.
    edge = _parabola(eps, round(1.05 * 5.556 / eps) + 60)
    y = edge.weights[-1, 1]
    np.testing.assert_allclose(y, 2 / ETA + 3 * ETA * eps, atol=10 * eps**2)
    # X is as good as the tolerance.
    np.testing.assert_allclose(edge.metrics["x^2"][-1] / eps, 2, rtol=2 * eps + 1e-3)
    assert np.all(edge.oscillation >= 0)
    assert np.max(edge.sharpness[:, 0]) < 2 * 1.01


def test_at_rest_the_steps_are_long():
    eps = 1e-2
    onset = round(5.556 / eps)
    early, late = (_parabola(eps, onset + more) for more in (60, 100))
    assert late.stats["accepted_steps"] - early.stats["accepted_steps"] < 20


def test_eigen_residual_of_few_parameters():
    assert np.isfinite(_parabola(1e-2, 300).stats["eigen_residual"])


@pytest.mark.filterwarnings("ignore:An eigensolver or a complementarity problem")
def test_divergence_keeps_what_there_was():
    problem = dict(eps=1e-2, steps=310, limit=5.9)  # which is reached at t = 300
    with pytest.raises(cf.NumericalFailure) as info:
        _parabola(**problem)
    again = _parabola(**problem, throw=False)
    for kept in (info.value.trajectory, again):
        assert kept.result != cf.RESULTS.successful
        assert 0 < kept.times.size < 61
        assert np.all(np.isfinite(kept.loss))
        # It goes up to the last reported time before the limit, or nearly so.
        assert 250 < kept.times[-1] <= 301
        assert kept.stats["accepted_steps"] + kept.stats["rejected_steps"] < 200


# A matrix whose eigenvalues are held one after the other.


def test_two_eigenvalues_become_critical_one_after_the_other():
    """B = diag(b): y_i = min(y_i(0) + eta b_i t, 2/eta), then Sigma_ii = 2 b_i. A
    further coordinate goes on at constant speed, lest the flow come to rest."""
    eta, b, y0 = 0.5, np.array([0.02, 0.01]), np.array([3.6, 3.7])
    problem, coordinates, matrix = _matrix_problem(jnp.diag(b))
    objective = cf.Objective(lambda w: problem.loss_fn(w) - w["z"])
    start = dict(x=jnp.zeros(2), y=coordinates(jnp.diag(y0)), z=jnp.zeros(()))
    times = np.arange(101.0)
    flow = cf.predict(
        objective, start, cf.GradientDescent(eta), 100, weight_times=times, rtol=1e-3
    )
    Y = matrix(flow.weights[:, :5])
    expected = np.minimum(y0 + eta * np.outer(times, b), 2 / eta)
    # C is linear here, so what is posed on the end of a step holds there: exact at the
    # end, and between it but for the steps in which an eigenvalue becomes critical.
    # There the mean rate is right and the corner is cut: from 49 to 64 in the second.
    np.testing.assert_allclose(Y[:, [0, 1], [0, 1]], expected, atol=0.02)
    np.testing.assert_allclose(Y[-1, [0, 1], [0, 1]], expected[-1], atol=1e-6)
    np.testing.assert_allclose(Y[:, 0, 1], 0, atol=1e-6)
    # (What a step leaves of a violation is a share of exp(-4 dt), and one after the
    # first onset is 2 long.)
    once, twice = flow.oscillation[45, :2], flow.oscillation[-1, :2]
    np.testing.assert_allclose(once, [2 * b[0] / eta, 0], rtol=np.exp(-8), atol=1e-6)
    np.testing.assert_allclose(twice, 2 * b / eta, rtol=1e-4)
    # They jump where they should, at 40 and 60, in the middle of long steps. The second
    # onset is found to a hundredth of its step, of which a quarter is left: 4 %.
    variances = np.where(times[:, None] > [40, 60], 2 * b / eta, 0)
    away = np.min(np.abs(times[:, None] - [40, 60]), axis=1) > 1
    np.testing.assert_allclose(
        flow.oscillation[away, :2], variances[away], atol=0.05 * 2 * b[1] / eta
    )


def test_an_oscillation_dies_within_a_step():
    """The sharpness 2/eta + a y is held while E[x^2] = 2 h(z), h = h0 - b z, which is
    zero at z = h0/b. After that, with u = z - h0/b, w = eta a b and t from there on,

        dy/dt = -w u,   du/dt = eta drift - w y,   so   y = drift/(a b) (1 - cosh w t).
    """
    a, b, drift, h0 = 0.3, 1 / 30, 1e-2, 0.05

    def loss(w, data):
        x, y, z = w
        return 1 + x**2 / ETA + a * y * (x**2 / 2 - h0 + b * z) - drift * z

    times, last = np.arange(601.0), h0 / (b * ETA * drift)
    flow = cf.predict(
        cf.Objective(loss, jnp.zeros((1, 1))),
        jnp.zeros(3),
        cf.GradientDescent(ETA),
        600,
        times=times,
    )
    assert flow.stats["accepted_steps"] < 20
    held = 2 * np.maximum(h0 - b * ETA * drift * times, 0)
    # It begins at once, which is another matter.
    variance = ETA * flow.oscillation[:, 0]
    np.testing.assert_allclose(variance[20:], held[20:], atol=5e-3 * held[0])
    y = drift / (a * b) * (1 - np.cosh(ETA * a * b * np.maximum(times - last, 0)))
    np.testing.assert_allclose(flow.sharpness[:, 0], 2 + ETA * a * y, atol=5e-4)


def test_the_multiplier_of_a_changing_drift():
    """The sharpness y + a q is driven by y's drift b = b0 + b1 z, where z = t, and held
    at 2/eta; q is a fast mode, of rate eta h, that the oscillation pushes. Once it has
    relaxed, with Sigma = s0 + s1 t and q = q0 + q1 t,

        dq/dt = -eta (h q + a Sigma / 2),       dy/dt = eta (b - Sigma / 2) = -a dq/dt,

    so q1 = -a s1 / (2 h), h q = -a Sigma / 2 - q1 / eta, Sigma = 2 b + 2 a q1 / eta.
    All is linear in time, as a step takes the forcing to be, so X is exact at the ends
    of steps and between. Were it a mean over steps, it would lag by half of one."""
    eta, b0, b1, h, a = 0.5, 0.02, 2e-4, 3.0, 1.0
    c = 1 / eta - b1 * 2 / eta  # dz/dt = eta (c + b1 y) is nearly one

    def loss(w):
        drift, sharpness = b0 + b1 * w["z"], w["y"] + a * w["q"]
        slow = drift * w["y"] + c * w["z"]
        return 0.5 * sharpness * w["x"] ** 2 - slow + 0.5 * h * w["q"] ** 2

    start = {k: jnp.asarray(v) for k, v in dict(q=0.0, x=0.0, y=3.9, z=0.0).items()}
    flow = cf.predict(
        cf.Objective(loss), start, cf.GradientDescent(eta), 400, weight_times=range(401)
    )
    assert flow.stats["accepted_steps"] < 40
    q, _, y, z = flow.weights[200:].T
    q1 = -a * b1 * eta * (c + b1 * y) / h
    Sigma = 2 * (b0 + b1 * z) + 2 * a * q1 / eta
    np.testing.assert_allclose(flow.sharpness[200:, 0], 2, rtol=1e-12)
    # What began the run out of equilibrium dies down: 6e-4 at 100, 1.3e-6 at 200. (Were
    # the oscillation not a parabola in a step, but a straight line, 1.0e-6.)
    error = np.abs(flow.oscillation[200:, 0] / (Sigma / eta) - 1)
    assert np.all(error < 2e-6)
    assert np.all(error[50:] < 1e-6)
    assert np.all(error[150:] < 5e-8)
    # Weights are cubic in a step, from slopes that are not quite those of equilibrium.
    np.testing.assert_allclose(q, -(a * Sigma / 2 + q1 / eta) / h, rtol=1e-2)


def test_the_multiplier_has_the_mean_that_holds_the_edge():
    """The sharpness y starts at the edge, is driven by b and held by the oscillation,
    dy/dt = eta (b - Sigma / 2): over the run, the mean of Sigma is that of 2 b but for
    what y changes. The steps are so long that b is far from linear in them."""
    eta, c = 0.5, 2.0

    def loss(w):
        b = 0.02 * (1 + 0.5 * jnp.sin(w["z"] / 25))
        return 0.5 * w["y"] * w["x"] ** 2 - b * w["y"] - c * w["z"]

    start = {k: jnp.asarray(v) for k, v in dict(x=0.0, y=4.0, z=0.0).items()}
    flow = cf.predict(
        cf.Objective(loss), start, cf.GradientDescent(eta), 400, weight_times=range(401)
    )
    assert 10 < flow.stats["accepted_steps"] < 80
    _, y, z = flow.weights.T
    b = 0.02 * (1 + 0.5 * np.sin(z / 25))
    Sigma = eta * np.array(flow.oscillation[:, 0])
    Sigma[0] = Sigma[1]  # there is none before the first step
    # The Runge-Kutta steps integrate b to second order: 1e-3 to 3.4e-3, depending on
    # where they end. (With Sigma linear between the ends of steps it is 1e-2.)
    balance = 2 * (np.trapezoid(b) - (y[-1] - y[0]) / eta)
    np.testing.assert_allclose(np.trapezoid(Sigma), balance, rtol=4e-3)
    # And it is 2 b at each time, but for 2.6 % in the mean (4.3 % if each step began
    # where the one before was extrapolated to), without jumps: after the first steps
    # 2 b changes by at most 8e-4 in one, Sigma by 1.3e-3 (1.2e-2 if steps are not
    # joined).
    assert np.mean(np.abs(Sigma - 2 * b)[1:]) < 0.03 * np.mean(2 * b)
    assert np.max(np.abs(np.diff(Sigma[50:]))) < 2e-3


# A small network.

STEPS = 120
EXACT = dict(renew_every=1, eigen_tolerance=1e-6)
FIXED = cf.CentralFlow(substeps=64, **EXACT)


class _Rate(eqx.Module):
    """A learning rate that is `factor` times what it was from `start` to `end`."""

    rate: jax.Array
    start: jax.Array
    end: jax.Array
    factor: jax.Array

    def __init__(self, rate, start=1e6, end=2e6, factor=1.0):
        arguments = (rate, start, end, factor)
        self.rate, self.start, self.end, self.factor = map(jnp.asarray, arguments)

    def __call__(self, step):
        changed = (step >= self.start) & (step < self.end)
        return self.rate * jnp.where(changed, self.factor, 1.0)


def _network(seed=0):
    model, data = tiny_network(jnp.float64, 10, 20, outputs=4, seed=seed)
    return cf.Objective(tiny_loss, data), model


def _predict(rate, rtol=None, model=None, seed=0, flow=None, **options):
    objective, start = _network(seed)
    rate = rate if isinstance(rate, _Rate) else _Rate(rate)
    options = dict(weight_times=np.linspace(0, STEPS, 31)) | options
    return cf.predict(
        objective, start if model is None else model, cf.GradientDescent(rate), STEPS,
        rtol=rtol, flow=flow, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def network():
    """The network at the edge, from about t = 40: in small steps, and in long ones."""
    with jax.enable_x64(True):
        flows = {rtol: _predict(0.5, rtol) for rtol in (1e-2, 1e-3, 1e-4)}
        return _predict(0.5, flow=FIXED), flows


def _error(series, reference):
    return float(np.mean(np.abs(series / reference - 1)))


def test_rtol_is_the_relative_error_of_the_loss(network):
    fixed, flows = network
    assert np.max(np.sum(fixed.oscillation > 0, axis=1)) >= 2
    # Fixed steps are of first order, 1.4e-4 here. Extrapolated from these and twice as
    # long ones the loss is within 1.5e-7 of that from half and a quarter as long ones.
    coarse = _predict(0.5, flow=cf.CentralFlow(substeps=32, **EXACT))
    exact = 2 * fixed.loss - coarse.loss
    errors = []
    for rtol, flow in flows.items():
        errors.append(_error(flow.loss, exact))
        assert errors[-1] < rtol
        # X jumps where an eigenvalue becomes critical, and so does the mean loss.
        assert _error(flow.mean_loss, fixed.mean_loss) < 5 * rtol + 3e-4
    # Measured: 6.6e-4, 9.5e-5, 6.8e-6.
    assert errors[2] < errors[1] < errors[0], errors


def test_third_derivatives_are_carried(network):
    """In as many steps, and as accurate, with fewer of them."""
    fixed, flows = network
    flow = cf.CentralFlow(carry_third_derivatives=False)
    for rtol in (1e-2, 1e-3):
        without = _predict(0.5, rtol, flow=flow)
        tried = [
            f.stats["accepted_steps"] + f.stats["rejected_steps"]
            for f in (flows[rtol], without)
        ]
        assert tried[0] < 1.1 * tried[1]
        # With other rates, too, for single counts scatter by a fifth, with the lengths
        # of steps. Measured: 0.67 and 0.49 (0.57 to 0.92, 0.42 to 0.77 at one rate).
        rates = (0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
        carried, computed = (
            sum(_predict(x, rtol, flow=f).stats["third_derivatives"] for x in rates)
            for f in (None, flow)
        )
        assert carried < 0.75 * computed
        for f in (flows[rtol], without):
            assert _error(f.loss, fixed.loss) < 3 * rtol + 3e-4
            variances = [np.sum(x.oscillation, axis=1) for x in (f, fixed)]
            off = np.sum(np.abs(variances[0] - variances[1])) / np.sum(variances[1])
            assert off < 3 * rtol + 1e-3


def test_the_constraint_along_a_run(network):
    objective, model = _network()
    hessian = jax.jit(jax.hessian(objective.flatten(model)[1].loss))
    for rtol, flow in network[1].items():
        assert np.all(flow.oscillation >= 0)
        true = [0.5 * np.linalg.eigvalsh(hessian(w))[-1] for w in flow.weights]
        rows = np.searchsorted(flow.times, flow.weight_times)
        reported = flow.sharpness[rows, 0]
        critical = flow.oscillation[rows, 0] > 0
        assert np.sum(critical) > 10
        errors = np.abs(reported / np.array(true) - 1)
        assert np.max(errors[critical]) < 0.01, rtol
        # While it rises it is interpolated linearly: 2 % of a fast rise.
        assert np.max(errors) < 0.03, rtol
        # A correction by 2 % of the critical sharpness is an error of 1 %, and what it
        # leaves is less.
        assert np.max(np.array(true)[critical]) < 2 * 1.02, rtol
        assert np.nanmax(flow.sharpness) < 2 * 1.03, rtol


def test_rejected_steps_are_counted():
    """Steps as short as these have two stages, accepted or rejected; the optimizer's
    state takes one more gradient, and the start another. Of errors above the tolerance,
    of all that are rejected and some of the others, the rounding is measured."""
    objective, model = _network()
    optimizer = cf.GradientDescent(_Rate(0.02, start=5, factor=0.1))
    stats = cf.predict(objective, model, optimizer, 8, times=[8]).stats
    accepted, rejected = stats["accepted_steps"], stats["rejected_steps"]
    assert rejected > 0
    measured = stats["gradients"] - 2 * (accepted + rejected) - 2
    assert rejected <= measured < accepted + rejected


def test_one_program_serves_other_numbers(network):
    flow = _predict(0.31, rtol=2e-3, seed=1)
    assert flow.stats["compile_seconds"] == 0
    assert flow.result == cf.RESULTS.successful
    assert not np.allclose(flow.loss, network[1][1e-3].loss)


def test_values_between_the_ends_of_steps(network):
    """Below the edge, where steps are long."""
    rtol = 1e-2
    coarse, fine = _predict(0.02, rtol), _predict(0.02, rtol / 100)
    assert STEPS / coarse.stats["accepted_steps"] > 4  # reported are 120
    np.testing.assert_allclose(coarse.loss, fine.loss, rtol=2 * rtol)
    np.testing.assert_allclose(coarse.grad_norm_sq, fine.grad_norm_sq, rtol=10 * rtol)
    away = np.linalg.norm(coarse.weights - fine.weights, axis=1)
    far = np.linalg.norm(fine.weights[-1] - fine.weights[0])
    # A step's own error is the loss's, which counts twenty times as much.
    assert np.max(away) < 2 * rtol * far


@pytest.mark.parametrize(
    ("start", "end"),
    [(60, 1e6), pytest.param(60, 65, marks=pytest.mark.slow), (60, 61)],
    ids=["drop", "dip", "short dip"],
)
def test_a_change_of_the_learning_rate_is_not_jumped_over(network, start, end):
    schedule = _Rate(0.5, start, end, 0.1)
    flow = _predict(schedule, 1e-3)
    fixed = _predict(
        schedule, flow=cf.CentralFlow(16, renew_every=1, eigen_tolerance=1e-6)
    )
    # The reference, of first order, is four times as wrong as `FIXED`.
    error = _error(flow.loss, fixed.loss)
    assert error < 3e-3
    # Had it been jumped over, this would be the constant learning rate's.
    naive = _error(network[0].loss[61:], fixed.loss[61:])
    assert _error(flow.loss[61:], fixed.loss[61:]) < 0.5 * naive


def test_from_above_the_edge_it_comes_back(network):
    edge = network[0].model
    with pytest.warns(UserWarning, match=r"sharpness at the start.*above the critical"):
        flow = _predict(0.55, model=edge)  # ten percent more
    assert flow.result == cf.RESULTS.successful
    assert flow.sharpness[0, 0] > 2.15
    assert np.all(flow.sharpness[30:, 0] < 2 * 1.02)
    assert flow.oscillation[-1, 0] > 0
    with warnings.catch_warnings():  # what is at the edge is not above it
        warnings.simplefilter("error")
        _predict(0.5, model=edge)


@pytest.mark.slow
def test_vmap_over_learning_rates(network):
    rates = jnp.array([0.05, 0.3, 0.5])
    run = lambda rate: _predict(_Rate(rate), 1e-2)
    batch = jax.vmap(run)(rates)
    assert np.all(batch.stats["accepted_steps"] > 0)
    for i, rate in enumerate(rates):
        alone = run(rate)
        # Products of a batch are rounded otherwise, and the steps amplify that.
        np.testing.assert_allclose(batch.loss[i], alone.loss, rtol=1e-7)


@pytest.mark.slow
def test_block_grows(network):
    """With room for three eigenvectors the run goes on, with six, where it was."""
    flow = _predict(0.5, 1e-3, flow=cf.CentralFlow(block_size=3))
    large = network[1][1e-3]
    assert flow.sharpness.shape[1] == 6
    np.testing.assert_array_equal(flow.times, large.times)
    assert _error(flow.loss, large.loss) < 3e-3
    assert flow.stats["gradients"] > flow.stats["accepted_steps"]


def test_rtol_must_be_small():
    with pytest.raises(ValueError, match=r"`rtol` must be at most 0\.05"):
        _predict(0.5, rtol=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [cf.RMSProp(5e-3, 0.9, 1e-7), cf.ScalarRMSProp(0.1, 0.9, 1e-7)],
    ids=["rmsprop", "scalar"],
)
def test_adaptive_optimizers(optimizer):
    objective, model = _network()
    warm = cf.train(objective, model, optimizer, 20)
    problem = (objective, warm.model, optimizer, STEPS)
    state = dict(optimizer_state=warm.optimizer_state)
    fixed = cf.predict(*problem, **state, flow=FIXED)
    assert np.mean(fixed.oscillation[:, 0] > 0) > 0.3, "the run must be at the edge"
    for rtol in (1e-2, 1e-3):
        flow = cf.predict(*problem, **state, rtol=rtol)
        assert flow.stats["accepted_steps"] < STEPS
        assert _error(flow.loss, fixed.loss) < 3 * rtol + 1e-3
