"""Write an optimizer of your own, as one class, and get its flow.

python examples/own_optimizer.py

RMSProp with another power of the second moment than 1/2: nu <- beta2 nu + (1 - beta2)
g * g, then w <- w - eta g / (nu^p + eps).
"""

import jax
import jax.numpy as jnp

import centralflow as cf


class PowerRMSProp(cf.AbstractOptimizer):
    """The state is nu. All that a flow needs to know of the optimizer is here: nothing
    else looks at which one it is."""

    learning_rate: float
    beta2: float
    power: float
    eps: float = 1e-8

    def init(self, weights):
        """Before the first gradient."""
        return jnp.zeros_like(weights)

    def update_state(self, state, gradient):
        """The discrete update."""
        return self.beta2 * state + (1 - self.beta2) * gradient**2

    def state_rate(self, state, gradient, gradient_sq):
        """The same in continuous time, with the mean of the squared gradient."""
        return (1 - self.beta2) / self.beta2 * (gradient_sq - state)

    def preconditioner(self, state):
        """The step is -g / P. The gradient is multiplied by nothing else, so the mode
        with eigenvalue s of P^-1 H obeys w <- (1 - s) w, stable up to the default
        `critical_sharpness` of 2."""
        return (state**self.power + self.eps) / self.learning_rate


def main(
    width=32,
    size=500,
    learning_rate=0.005,
    power=0.25,
    warm_start=160,
    steps=400,
    output="own_optimizer.png",
):
    """Train, predict, compare; returns the comparison."""
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(size))
    model = cf.models.MLP(64, 10, width, key=jax.random.key(0))
    optimizer = PowerRMSProp(learning_rate, beta2=0.99, power=power)

    warm = cf.train(objective, model, optimizer, warm_start)
    start = dict(
        steps=steps,
        optimizer_state=warm.optimizer_state,
        weight_times=range(0, steps + 1, 4),
    )
    run = cf.train(
        objective, warm.model, optimizer, **start, sharpness_every=10, sharpness_count=6
    )
    flow = cf.CentralFlow(substeps=2)
    prediction = cf.predict(objective, warm.model, optimizer, **start, flow=flow)
    stable = cf.predict(objective, warm.model, optimizer, **start, flow=cf.StableFlow())
    figure = cf.plot.comparison(run, prediction, stable=stable)
    figure.savefig(output, dpi=150)
    return cf.compare(run, prediction)


if __name__ == "__main__":
    print(main())
