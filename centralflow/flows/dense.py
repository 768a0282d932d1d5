"""A flow between the ends of a long step."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..precision import full_precision
from .base import FlowState
from .expansion import Slope
from .joints import share_of_rise
from .observables import held

_inner = full_precision(jnp.vdot)


class StepInterpolation(diffrax.AbstractLocalInterpolation):
    """What a flow's state is within a step, from y, its rate and the loss's slope at
    both ends, and from y one step `before`, which was `ratio` times as long, or zero if
    there was none.

    Weights are cubic, but for a `turn` at an onset before which nothing oscillates: up
    to then they go the way without it. Loss, squared gradient norm and the metrics
    without what oscillations add to them are cubic too, on a logarithmic scale if they
    are positive: a straight line would be off by a percent where the step's error is
    far smaller. The loss goes with the weights.

    What oscillations add is a parabola, whose mean over the step exceeds that of the
    ends by the `bulge`. All the rest is linear; but up to the `onset`, a share of the
    step, the oscillations are the `earlier` ones, and after it the sharpness that they
    hold is what it is at the end; and they have reached their end at the share `until`,
    up to which the sharpness is as it was. `rise` is by how much what oscillations add
    begins higher than the step before had ended, where it joins that, and `constant`
    whether the step knew no better than that it is constant (after the onset). `held`
    is whether as many eigenvalues are at the edge at both ends, and `smooth` whether
    they were so in all of the step before.
    """

    t0: Any
    t1: Any
    y0: FlowState
    y1: FlowState
    rate0: FlowState
    rate1: FlowState
    slope0: Slope
    slope1: Slope
    turn: FlowState
    before: FlowState
    ratio: Any
    held: Any
    smooth: Any
    earlier: Any
    onset: Any
    until: Any
    bulge: Any
    rise: Any
    constant: Any

    @eqx.filter_jit  # traced once for all that is saved
    def evaluate(self, t0, t1=None, left: bool = True) -> FlowState:
        del left
        if t1 is not None:
            return jax.tree.map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        dt = self.t1 - self.t0
        x = (t0 - self.t0) / jnp.where(dt > 0, dt, 1)
        linear = jax.tree.map(lambda a, b: a + x * (b - a), self.y0, self.y1)
        weights, loss = self._way(x, dt)
        ys, smooth = (self.y0, self.y1), dict(linear.observables["smooth"])
        at = [y.observables["smooth"] for y in (self.before, *ys)]
        known = lambda name: [values[name] for values in at]
        smooth["loss"] = loss
        smooth["grad_norm_sq"] = self._scaled(x, *known("grad_norm_sq"))
        scaled = lambda *values: self._scaled(x, *values)
        smooth["metrics"] = jax.tree.map(scaled, *known("metrics"))
        first, last = (y.observables["smooth"]["sharpness"] for y in ys)
        was_held, is_held = (
            held(y.observables["oscillating"]["oscillation"]) for y in ys
        )
        risen = jnp.minimum(x / jnp.where(self.onset > 0, self.onset, 1), 1)
        rest = jnp.where(self.until < 1, 1 - self.until, 1)
        fallen = jnp.where(self.until < 1, jnp.maximum(x - self.until, 0) / rest, x)
        gone = jnp.where(is_held, risen, jnp.where(was_held, fallen, x))
        smooth["sharpness"] = first + gone * (last - first)
        ended = jnp.minimum(x / self.until, 1)
        share = 6 * x * (1 - x) * self._permitted()
        oscillating = jax.tree.map(
            lambda a, b, bulge, earlier: jnp.where(
                x < self.onset, earlier, a + ended * (b - a) + share * bulge
            ),
            *(y.observables["oscillating"] for y in ys),
            self.bulge,
            self.earlier,
        )
        for name in ("oscillation", "gradient_sq"):
            oscillating[name] = jnp.maximum(oscillating[name], 0)
        observables = {
            **linear.observables,
            "smooth": smooth,
            "oscillating": oscillating,
            "joint": self._joint(x, weights.dtype),
        }
        return FlowState(weights, linear.optimizer_state, observables)

    def _way(self, x, dt) -> tuple[Float[Array, " n"], Float[Array, ""]]:
        """The weights and the loss. At the end, `rate1` has the forcing that is the
        mean over all of the step: so without the `turn` the slope is less by that."""
        turn, g0, g1 = self.turn.weights, self.slope0.gradient, self.slope1.gradient
        since = jnp.maximum(x - self.onset, 0) / (1 - self.onset)
        w = self.before.weights, self.y0.weights, self.y1.weights - turn
        rates = dt * self.rate0.weights, dt * self.rate1.weights - turn
        k0, k1 = self._slopes(*w, *rates, dt)
        weights = _cubic(x, *w[1:], k0, k1) + since * turn
        before, *at = (
            y.observables["smooth"]["loss"] for y in (self.before, self.y0, self.y1)
        )
        of_turn = _inner(g1, turn)
        slopes = _inner(g0, k0), _inner(g1, k1)
        loss = self._scaled(x, before, at[0], at[1] - of_turn, slopes)
        return weights, loss + since * of_turn

    def _joint(self, x: Float[Array, ""], dtype: Any) -> dict[str, Any]:
        since = (x - self.onset) / (1 - self.onset)
        goes_on = (x >= self.onset) & (self.until == 1)
        share = jnp.where(goes_on, share_of_rise(since, self.constant), 0)
        start, end, share = (jnp.asarray(x, dtype) for x in (self.t0, self.t1, share))
        return dict(start=start, end=end, rise=self.rise, share=share)

    def _permitted(self) -> Float[Array, ""]:
        """The share of the bulge with which no variance becomes negative:
        (1 - x) a + x b - x (1 - x) d >= 0 in the step for d <= (sqrt a + sqrt b)^2.
        One for all observables, which then are those of one covariance. A bulge below
        the root of the precision, next to the largest variance, is rounding, and has no
        say in it: a variance that it makes negative is zero."""
        a, b = (y.observables["oscillating"]["oscillation"] for y in (self.y0, self.y1))
        most = (jnp.sqrt(a) + jnp.sqrt(b)) ** 2
        d = -6 * self.bulge["oscillation"]
        rounding = jnp.sqrt(jnp.finfo(d.dtype).eps) * jnp.max(most)
        too_much = (d > most) & (d > rounding)
        return jnp.min(jnp.where(too_much, most / jnp.where(too_much, d, 1), 1))

    def _scaled(self, x, before, y0, y1, slopes=None):
        """A cubic on a logarithmic scale, if that exists."""
        values = jnp.stack([before, y0, y1])
        positive = jnp.all(values > 0)
        safe = jnp.where(positive, values, 1)
        scaled = jnp.where(positive, jnp.log(safe), values)
        if slopes is None:
            k0, k1 = self._parabola(*scaled)
        else:
            k0, k1 = slopes[0] / safe[1], slopes[1] / safe[2]
        d = scaled[2] - scaled[1]
        value = _cubic(x, *scaled[1:], _limited(k0, d), _limited(k1, d))
        return jnp.where(positive, jnp.exp(jnp.where(positive, value, 0)), value)

    def _parabola(self, before, y0, y1):
        """The slopes at both ends of that through three points; if there are but two,
        or it would go around a corner, of the straight line."""
        d = y1 - y0
        ratio = jnp.where(self.ratio > 0, self.ratio, 1)
        curvature = (d - (y0 - before) / ratio) / (1 + ratio)
        known = (self.ratio > 0) & (self.smooth | ~self.held)
        curvature = jnp.where(known, curvature, 0)
        return d - curvature, d + curvature

    def _slopes(self, before, w0, w1, k0, k1, dt):
        """Those of the weights at both ends, from those of the equation, k0 and k1. But
        in long steps fast modes that are not quite in equilibrium have large rates and
        go nowhere. So they are moved towards those of the parabola through the last
        three points, the more the farther they are from them. And where the same
        eigenvalues are held all the time they are these: oscillations at the ends are
        extrapolated, and a rate that is a little wrong leads away from the edge. (In
        steps of a few units there are no such modes, and the rates count.)"""
        d = w1 - w0
        near, tiny = 0.5 * jnp.linalg.norm(d), jnp.finfo(d.dtype).tiny

        def slope(k, parabola):
            away = jnp.linalg.norm(k - parabola)
            doubt = away**2 / jnp.maximum(away**2 + near**2, tiny)
            doubt = jnp.where(self.held, 1, jnp.where(self.ratio > 0, doubt, 0))
            return _limited(k + doubt * dt / (dt + 5) * (parabola - k), d)

        return tuple(map(slope, (k0, k1), self._parabola(before, w0, w1)))


def _cubic(x, y0, y1, k0, k1):
    d = y1 - y0
    return y0 + x * d + x * (1 - x) * ((1 - x) * (k0 - d) - x * (k1 - d))


def _limited(slope: Float[Array, "*n"], mean: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The slope, no farther from the mean one than that is long. A number then stays
    between the ends (a case of Fritsch and Carlson's condition)."""
    away, length = slope - mean, jnp.linalg.norm(mean)
    distance = jnp.linalg.norm(away)
    far = distance > length
    return mean + away * jnp.where(far, length / jnp.where(far, distance, 1), 1)


def crossing(
    before: Float[Array, ""],
    y0: Float[Array, ""],
    y1: Float[Array, ""],
    level: float | Float[Array, ""],
    ratio: Float[Array, ""],
) -> Float[Array, ""]:
    """The share of a step at which a number that goes from y0 up to y1 crosses the
    level, or zero if it does not: by the parabola through these and the value `before`,
    one step earlier, which was 1/ratio times as long, made monotone in the step. By the
    straight line, if the ratio is zero: there was none."""
    left, rise = level - y0, y1 - y0
    crosses = (left > 0) & (rise > left)
    known = ratio > 0
    r = jnp.where(known, ratio, 1)
    # left = x rise - x (1 - x) bend
    bend = jnp.where(known, (rise - (y0 - before) * r) / (1 + 1 / r), 0)
    bend = jnp.clip(bend, -rise, rise)
    slope = rise - bend
    root = jnp.sqrt(jnp.maximum(slope**2 + 4 * bend * left, 0))
    return jnp.where(crosses, 2 * left / jnp.where(crosses, slope + root, 1), 0)
