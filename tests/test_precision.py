"""Matrix products in full precision, also where the default is less."""

import jax
import jax.numpy as jnp

from centralflow.precision import full_precision


def test_the_program_asks_for_it():
    product = lambda a, b: jnp.sum(a @ b)
    program = lambda fn: str(jax.make_jaxpr(fn)(jnp.ones((2, 2)), jnp.ones((2, 2))))
    assert "HIGHEST" not in program(product)
    assert "HIGHEST" in program(full_precision(product))
