"""Runs of one problem on one device and sharded over all, for `test_sharding.py`.

python -m tests.sharded_runs FOLDER run,flow                  in one process
python -m tests.sharded_runs FOLDER run,flow ADDRESS PROCESS  in each of two
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import centralflow as cf
from centralflow.checkpoint import Checkpoint
from centralflow.sharding import on_host, spread_like

from .problems import tiny_loss, tiny_network

RATE = 0.584


class Stopped(Exception):
    """Stands for the end of all processes."""


def stop_after(checkpoints):
    """Stop after so many files were written; all processes do at once."""
    write, written = Checkpoint.write, 0

    def counted(self, *arguments):
        nonlocal written
        write(self, *arguments)
        written += 1
        if written == checkpoints:
            Checkpoint.write = write
            raise Stopped

    Checkpoint.write = counted


def trajectories(names, *problem, folder=None):
    """Without a folder, each in one piece; else from a checkpoint in it."""
    make = dict(
        run=lambda **file: cf.train(*problem, 60, sharpness_every=20, **file),
        flow=lambda **file: cf.predict(*problem, 60, **file),
    )
    made = {}
    for name in names.split(","):
        file = {}
        if folder is not None:
            file = dict(checkpoint=folder / f"{name}.ckpt", checkpoint_every=7)
            stop_after(3)
            try:
                make[name](**file)
                raise AssertionError("it was not stopped")
            except Stopped:
                pass
        made[name] = make[name](**file)
    return made


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


def check_gaps(vector):
    """What is read from a file and spread may hold NaN: rows that were not reached."""
    numbers = np.arange(vector.size, dtype=vector.dtype)
    rows = np.stack([numbers, np.nan * numbers])
    spread = spread_like(vector, rows)
    assert not spread.is_fully_replicated
    np.testing.assert_array_equal(on_host(spread), rows)


def main(folder, names, address=None, process=None):
    folder = Path(folder)
    if address is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, 2, int(process))
    model, data = tiny_network("float64", width=16, examples=64, inputs=6)
    objective = cf.Objective(tiny_loss, data)
    optimizer = cf.GradientDescent(RATE)
    for name, one in trajectories(names, objective, model, optimizer).items():
        one.save(folder / f"{name}-one.npz")
    if process == "1":  # alone: with arrays of its own it waits for nobody
        alone = folder / "alone"
        alone.mkdir()
        (run,) = trajectories("run", objective, model, optimizer, folder=alone).values()
        assert run.times[-1] == 60
    model, data = sharded(model, data)
    check_gaps(model["b"])
    objective = cf.Objective(tiny_loss, data, microbatch_size=16)
    spread = trajectories(names, objective, model, optimizer, folder=folder)
    for name, many in spread.items():
        assert not many.weights.sharding.is_fully_replicated
        for key, value in many.model.items():
            assert value.sharding.spec == model[key].sharding.spec, key
        many.save(folder / f"{name}-many.npz")
    if "flow" in spread:
        assert cf.compare(spread["run"], spread["flow"]).weight_distance < 1


if __name__ == "__main__":
    main(*sys.argv[1:])
