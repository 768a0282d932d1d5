"""Heavy ball, Nesterov, Adam and NAdam: updates, critical sharpness, flow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import solve_ivp

import centralflow as cf
from centralflow.flows.base import FlowState
from centralflow.flows.expansion import Forcing
from centralflow.flows.leapfrog import RingingResponse
from centralflow.krylov import krylov

RATES = [0.02, optax.cosine_decay_schedule(0.02, 10)]
BETAS = [0.1, 0.5, 0.9, 0.99]


def _averaged(learning_rate, beta):
    return optax.chain(
        optax.ema(beta, debias=False), optax.scale_by_learning_rate(learning_rate)
    )


METHODS = {
    "heavy ball": (
        lambda rate: cf.HeavyBall(rate, 0.9),
        lambda rate: optax.sgd(rate, 0.9),
    ),
    "heavy ball, averaged": (
        lambda rate: cf.HeavyBall(rate, 0.9, averaged=True),
        lambda rate: _averaged(rate, 0.9),
    ),
    "Nesterov": (
        lambda rate: cf.Nesterov(rate, 0.9),
        lambda rate: optax.sgd(rate, 0.9, nesterov=True),
    ),
    "Adam": (
        lambda rate: cf.Adam(rate, 0.8, 0.95, 1e-3),
        lambda rate: optax.adam(rate, 0.8, 0.95, 1e-3),
    ),
    "NAdam": (
        lambda rate: cf.NAdam(rate, 0.8, 0.95, 1e-3),
        lambda rate: optax.nadam(rate, 0.8, 0.95, 1e-3),
    ),
}


@pytest.mark.parametrize("learning_rate", RATES)
@pytest.mark.parametrize("method", METHODS)
def test_the_update_is_that_of_optax(method, learning_rate):
    objective = cf.Objective(lambda w: jnp.sum(jnp.cosh(w)) + w[0] * w[1])
    start = jnp.array([1.0, -2.0, 0.5])
    _, flat = objective.flatten(start)
    ours, theirs = (make(learning_rate) for make in METHODS[method])
    w = v = start
    state, their_state = ours.init(w), theirs.init(v)
    for _ in range(12):
        w, state = ours.update(w, state, flat.grad(w))
        updates, their_state = theirs.update(flat.grad(v), their_state, v)
        v = optax.apply_updates(v, updates)
    assert ours.updates(state) == 12
    # some ten roundings of float32 a step
    np.testing.assert_allclose(w, v, rtol=12 * 10 * 6e-8)


def test_without_bias_correction():
    g, w = jnp.array([0.5, -2.0]), jnp.zeros(2)
    for kind, mean in ((cf.Adam, 0.2 * g), (cf.NAdam, (0.8 * 0.2 + 0.2) * g)):
        optimizer = kind(0.1, 0.8, 0.95, 1e-3, bias_correction=False)
        new, _ = optimizer.update(w, optimizer.init(w), g)
        expected = -0.1 * mean / (jnp.sqrt(0.05 * g**2) + 1e-3)
        np.testing.assert_allclose(new, expected, rtol=1e-5)


def test_nesterov_averaged_is_nesterov_with_a_smaller_rate():
    objective = cf.Objective(lambda w: jnp.sum(jnp.cosh(w)))
    start = jnp.array([1.0, -2.0])
    one = cf.train(objective, start, cf.Nesterov(0.2, 0.9, averaged=True), 10)
    other = cf.train(objective, start, cf.Nesterov(0.02, 0.9), 10)
    np.testing.assert_allclose(one.model, other.model, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "make",
    [
        lambda beta: cf.HeavyBall(0.3, beta),
        lambda beta: cf.HeavyBall(0.3, beta, averaged=True),
        lambda beta: cf.Nesterov(0.3, beta),
        lambda beta: cf.Nesterov(0.3, beta, averaged=True),
        lambda beta: cf.Adam(0.3, beta, 0.999, bias_correction=False),
        lambda beta: cf.NAdam(0.3, beta, 0.999, bias_correction=False),
    ],
)
def test_the_critical_sharpness_is_where_the_update_map_leaves_the_unit_circle(
    make, beta
):
    """The linear map (w, m) -> (w', m') of one step on a quadratic whose curvature
    makes P^-1 H a little less, or more, than critical: the eigenvalues of the map
    itself, of its Jacobian, at a frozen P."""
    optimizer = make(beta)
    state = optimizer.update_state(optimizer.init(jnp.ones(1)), jnp.ones(1))
    if isinstance(optimizer, cf.Adam | cf.NAdam):
        # a second moment so large that a gradient changes nothing
        huge = jnp.full(1, 1e30)
        state = type(state)(state.m, type(state.second)(*_with_nu(state.second, huge)))
    P = jnp.sum(optimizer.preconditioner(state))

    def radius(sharpness):
        def step(z):
            w, s = z[:1], _with_m(state, z[1:])
            w, s = optimizer.update(w, s, sharpness * P * w)
            return jnp.concatenate([w, s.m])

        # m is of the size of the gradient, P w: scaled to that of w
        scale = jnp.array([1.0, P])
        J = jax.jacobian(lambda z: step(z * scale) / scale)(jnp.zeros(2))
        roots = np.linalg.eigvals(np.asarray(J))
        return roots[np.argmax(np.abs(roots))]

    critical = float(optimizer.critical_sharpness)
    for share in np.linspace(0.02, 0.999, 50):
        assert abs(radius(share * critical)) < 1
    assert abs(radius(1.001 * critical)) > 1
    # nu after one more update is beta2 times what it was
    at = 1 if not hasattr(state, "second") else np.sqrt(0.999)
    assert radius(at * critical) == pytest.approx(-1, abs=1e-9)


def _with_m(state, m):
    return dataclasses.replace(state, m=m)


def _with_nu(second, nu):
    return second.updates, nu, second.age


# The flow.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99])
def test_the_flow_of_a_mode_decays_as_the_method_does(beta):
    """Modes with complex roots, (1 - sqrt(beta))^2 < (1 - beta) s < (1 + sqrt(beta))^2,
    decay with sqrt(beta) per step, in the flow exp(-c/2)."""
    optimizer = cf.HeavyBall(1.0, beta, averaged=True)
    for share in (0.1, 0.5, 0.9):
        s = share * (1 + np.sqrt(beta)) ** 2 / (1 - beta)
        state = optimizer.init(jnp.ones(1))

        def rate(z, state=state, s=s):
            w, at = z[:1], dataclasses.replace(state, m=z[1:])
            dm = optimizer.state_rate(at, s * w, (s * w) ** 2).m
            return jnp.concatenate([optimizer.velocity(w, at, s * w), dm])

        roots = np.linalg.eigvals(np.asarray(jax.jacobian(rate)(jnp.zeros(2))))
        np.testing.assert_allclose(np.exp(roots.real), np.sqrt(beta), rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", [cf.HeavyBall, cf.Nesterov])
def test_a_step_of_length_one_is_that_of_the_method(kind):
    """And two of length 1/2 make the same of m."""
    optimizer, g = kind(0.3, 0.9), jnp.array([1.0, -2.0])
    state = optimizer.update_state(optimizer.init(g), jnp.array([0.5, 0.25]))
    after = optimizer.update_state(state, g)
    velocity, rate = optimizer.step_rates(g, state, g, g * g, jnp.asarray(1.0))
    np.testing.assert_allclose(state.m + rate.m, after.m)
    np.testing.assert_allclose(velocity, optimizer.velocity(g, after, g))
    half = jnp.asarray(0.5)
    for _ in range(2):
        _, rate = optimizer.step_rates(g, state, g, g * g, half)
        state = dataclasses.replace(state, m=state.m + half * rate.m)
    np.testing.assert_allclose(state.m, after.m)


def _valley(w):
    """With the minimum at infinity: y rises until it is the sharpness along x."""
    x, y = w
    return (y + x) * x**2 / 2 - 0.01 * (x + y)


FIXED = cf.CentralFlow(substeps=2, block_size=2, eigen_tolerance=1e-6)
ADAPTIVE = cf.CentralFlow(block_size=2, eigen_tolerance=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("optimizer", "flow", "tolerance"),
    [
        (cf.HeavyBall(0.3, 0.9), FIXED, 1e-6),
        pytest.param(
            cf.HeavyBall(3.0, 0.9, averaged=True), FIXED, 1e-6, marks=pytest.mark.slow
        ),
        pytest.param(cf.Nesterov(0.12, 0.9), FIXED, 1e-6, marks=pytest.mark.slow),
        # At rest the errors of steps of some 40, below the tolerance of 1e-2, are what
        # is left of the rings: (0.9^(40 / 2))^2, a part in a hundred, of an approach
        # by a fraction of a percent.
        (cf.HeavyBall(0.3, 0.9), ADAPTIVE, 1e-4),
    ],
    ids=["heavy ball", "averaged", "Nesterov", "adaptive"],
)
def test_at_rest_at_the_edge(optimizer, flow, tolerance):
    """Where the flow comes to rest at the edge, with H = [[y + 3 x, x], [x, 0]],

        E[g] = 0:       x y + 3 x^2 / 2 - eps + (3 S_xx + 2 S_xy) / 2 = 0,
                        x^2 / 2 - eps + S_xx / 2 = 0,
        Sigma = a v v', H v = (kappa / eta) v, P = 1 / eta:

    three equations for x, y and a, solved by Newton's method."""
    eps, eta = 0.01, float(optimizer.learning_rate)
    edge = float(optimizer.critical_sharpness) / eta

    def residual(z):
        _, _, a = z
        mean = lambda w: jax.grad(_valley)(w)
        H = jax.hessian(_valley)(z[:2])
        values, vectors = jnp.linalg.eigh(H)
        v = vectors[:, -1]
        curve = lambda w: v @ jax.hessian(_valley)(w) @ v
        force = mean(z[:2]) + 0.5 * a * jax.grad(curve)(z[:2])
        return jnp.concatenate([force, values[-1:] - edge])

    z = jnp.array([eps / edge, edge, 2 * eps])
    for _ in range(20):
        # v is a function of z too; its derivative multiplies a small a
        z = z - jnp.linalg.solve(jax.jacobian(residual)(z), residual(z))
    assert jnp.max(jnp.abs(residual(z))) < 1e-12

    objective = cf.Objective(_valley)
    start = jnp.array([0.01, 0.97 * edge])
    end = cf.predict(
        objective, start, optimizer, 2000, flow=flow, times=[0, 1800, 1900, 2000]
    )
    np.testing.assert_allclose(end.sharpness[1:, 0], edge * eta, rtol=tolerance)
    np.testing.assert_allclose(end.oscillation[-1, 0], z[2] / eta, rtol=tolerance)
    np.testing.assert_allclose(end.model, z[:2], rtol=tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", [cf.Adam, cf.NAdam])
def test_the_oscillation_that_holds_nu_up(kind):
    """L = h w^2 / 2: nu falls until P^-1 h = kappa, P = sqrt(nu) / eta. There it is
    held by nu = E[g^2] = h^2 sigma^2: sigma = eta / kappa, whatever h; X = P sigma^2.
    """
    eta, h = 0.1, 3.0
    optimizer = kind(eta, 0.9, 0.95, eps=0.0, bias_correction=False)
    objective = cf.Objective(lambda w: h * jnp.sum(w**2) / 2)
    end = cf.predict(
        objective, jnp.array([1.0]), optimizer, 500, times=[0, 400, 500],
        flow=cf.CentralFlow(substeps=4, block_size=1), coordinates=[0],
    )  # fmt: skip
    kappa = float(optimizer.critical_sharpness)
    # w itself is gone: it decays with sqrt(0.9) per step, and nu with 0.95.
    np.testing.assert_allclose(end.sharpness[1:, 0], kappa, rtol=1e-6)
    np.testing.assert_allclose(end.trace_covariance[1:], (eta / kappa) ** 2, rtol=1e-6)
    np.testing.assert_allclose(
        end.gradient_sq[1:, 0], (h * eta / kappa) ** 2, rtol=1e-6
    )
    np.testing.assert_allclose(
        end.oscillation[1:, 0], h / kappa * (eta / kappa) ** 2, rtol=1e-6
    )


def test_momentum_needs_two_fixed_steps():
    objective, optimizer = cf.Objective(_valley), cf.HeavyBall(0.3, 0.9)
    start = jnp.array([0.01, 1.0])
    with pytest.raises(ValueError, match=r"`substeps` is 1.*fewer than 2 per"):
        cf.predict(objective, start, optimizer, 5, flow=cf.CentralFlow(substeps=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cf.HeavyBall(0.1, 1.0), "`beta` must be a number between 0 and 1"),
        (lambda: cf.HeavyBall(-0.1, 0.9), "`learning_rate` must be positive"),
        (lambda: cf.HeavyBall(0.1, 0.9, averaged=1), "`averaged` must be True or"),
        (lambda: cf.Nesterov(0.1, 0.0), "`beta` must be a number between 0 and 1"),
        (lambda: cf.Adam(0.1, beta1=0.0), "`beta1` must be a number between 0 and 1"),
        (lambda: cf.Adam(0.1, beta2=1.0), "`beta2` must be a number between 0 and 1"),
        (lambda: cf.NAdam(0.1, eps=-1.0), "`eps` must be a number that is not"),
        (lambda: cf.NAdam(0.1, bias_correction=None), "`bias_correction` must be"),
    ],
)
def test_arguments_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Long steps.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "optimizer",
    [cf.HeavyBall(0.3, 0.9), cf.Nesterov(0.3, 0.9), cf.HeavyBall(0.3, 0.5)],
    ids=["heavy ball", "Nesterov", "heavy ball, 0.5"],
)
@pytest.mark.parametrize("dt", [2.0, 9.0])
def test_the_response_of_ringing_modes(optimizer, dt):
    """On a quadratic, the change of the end of a step by a change of the forcing, one
    that is constant and one that is linear: against SciPy's integration of the flow."""
    n, k = 5, 2
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    spectrum = float(optimizer.critical_sharpness) * np.array(
        [1.0, 0.6, 0.2, 0.01, 0.0]
    )
    eta, beta = 0.3, float(optimizer.beta)
    A = Q * spectrum @ Q.T  # eta H
    y = FlowState(jnp.zeros(n), optimizer.init(jnp.zeros(n)), {})
    V, force = jnp.asarray(Q[:, :k].T), jnp.asarray(rng.normal(size=n))
    across = lambda x: x - V.T @ (V @ x)
    space = krylov(lambda x: across(A @ across(x)), across(force), jnp.int32(3), 3)
    respond = RingingResponse(
        optimizer, y, jnp.asarray(dt), V, jnp.asarray(spectrum[:k]), space
    )
    c, gain = -np.log(beta), 1 / (1 - beta)
    own = 1.0 if isinstance(optimizer, cf.Nesterov) else 0.0

    def exact(shape):
        def rate(t, z):
            w, m = z[:n], z[n:]
            g = A @ w / eta + shape(t / dt) * np.asarray(force)
            step = m if not own else beta * m + g
            return np.concatenate([-eta * step, c * (gain * g - m)])

        end = solve_ivp(rate, (0, dt), np.zeros(2 * n), rtol=1e-10, atol=1e-12)
        return end.y[:n, -1], end.y[n:, -1]

    zero = Forcing(jnp.zeros(n), jnp.zeros(n))
    forcing = Forcing(force, jnp.zeros(n))
    for shape, change in (
        (lambda t: 1.0, respond(forcing, zero)),
        (lambda t: t - 0.5, respond(zero, forcing)),
    ):
        w, m = exact(shape)
        # Second order, with steps of 1/2 and rings of sqrt(c s) h < 1: the phase is
        # off by up to (c s)^(3/2) h^2 dt / 24, of modes that decay with beta^(t/2).
        # Nesterov's own gradient lags by h / 2, as in the method it does by 1 / 2.
        scale = np.max(np.abs(exact(lambda t: 1.0)[0]))
        lag = 0.25 * own * eta * np.max(np.abs(force))
        np.testing.assert_allclose(change.weights, w, atol=0.1 * scale + lag)
        np.testing.assert_allclose(
            change.optimizer_state.m, m, atol=0.1 * np.max(np.abs(m)) + 0.1
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "warm", "steps"),
    [(cf.Adam(5e-3, 0.9, 0.99), 100, 300), (cf.NAdam(3e-3, 0.9, 0.99), 60, 200)],
    ids=["Adam", "NAdam"],
)
def test_adam_at_the_edge(optimizer, warm, steps):
    """A network on digits that comes to the edge and stays: the loss is at least three
    times as near to that of the run as the stable flow's, the weights five times, and
    the sharpness is within 3 % while it is held."""
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(200))
    model = cf.models.MLP(64, 10, 16, key=jax.random.key(0))
    warm = cf.train(objective, model, optimizer, warm)
    start = dict(steps=steps, optimizer_state=warm.optimizer_state)
    run = cf.train(objective, warm.model, optimizer, **start)
    central = cf.predict(objective, warm.model, optimizer, **start)
    stable = cf.predict(objective, warm.model, optimizer, **start, flow=cf.StableFlow())
    central_error, stable_error = (cf.compare(run, p) for p in (central, stable))
    assert central_error.loss_error < stable_error.loss_error / 3
    assert central_error.weight_distance < stable_error.weight_distance / 5
    held = np.asarray(central.oscillation[:, 0]) > 0
    sharpness = np.asarray(central.sharpness[:, 0]) / float(
        optimizer.critical_sharpness
    )
    assert np.mean(held) > 0.3
    # It comes to the edge within the memory of ten steps, some of them a percent below.
    assert np.max(np.abs(sharpness[held] - 1)) < 0.03, sharpness[held]
    # Two gradients a step are the prediction's; eigenvectors and the rest come on top.
    assert central.gradient_equivalents < 10 * steps
