"""Runs of one problem on one device and sharded over all, for `test_sharding.py`.

python -m tests.sharded_runs FOLDER                     the devices of one process
python -m tests.sharded_runs FOLDER ADDRESS PROCESS     of two
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import centralflow as cf

from .problems import tiny_loss, tiny_network

RATE = 0.45


def trajectories(objective, model):
    optimizer = cf.GradientDescent(RATE)
    yield "run", cf.train(objective, model, optimizer, 60, sharpness_every=20)
    yield "flow", cf.predict(objective, model, optimizer, 60)


def sharded(model, data):
    """The examples and the units of the network, spread over all devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    first, count = jax.process_index(), jax.process_count()

    def examples(x):
        here = np.array_split(np.asarray(x), count)[first]
        return jax.make_array_from_process_local_data(sharding("data"), here)

    axes = dict(A=("data", None), b=("data",), C=(None, "data"))
    model = {k: jax.device_put(v, sharding(*axes[k])) for k, v in model.items()}
    return model, jax.tree.map(examples, data)


def main(folder, address=None, process=None):
    if address is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, 2, int(process))
    model, data = tiny_network("float64", width=16, examples=64, inputs=6)
    objective = cf.Objective(tiny_loss, data)
    for name, one in trajectories(objective, model):
        one.save(Path(folder) / f"{name}-one.npz")
    model, data = sharded(model, data)
    objective = cf.Objective(tiny_loss, data, microbatch_size=16)
    for name, many in trajectories(objective, model):
        long = (many.weights, many.model["A"])
        assert not any(x.sharding.is_fully_replicated for x in long), name
        assert cf.compare(many, many).weight_distance == 0
        many.save(Path(folder) / f"{name}-many.npz")


if __name__ == "__main__":
    main(*sys.argv[1:])
