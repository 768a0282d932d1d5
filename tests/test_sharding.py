"""Data and parameters sharded over devices and processes: JAX divides the work, and
what comes out is the same."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import centralflow as cf

from .conftest import UNOPTIMIZED


def _run(folder, names, devices, *others):
    """`tests.sharded_runs` with so many CPU devices, in one process for each of
    `others`, or in one."""
    environment = dict(
        os.environ,
        XLA_FLAGS=f"{UNOPTIMIZED} --xla_force_host_platform_device_count={devices}",
        JAX_PLATFORMS="cpu",
        JAX_ENABLE_X64="1",
    )
    command = [sys.executable, "-m", "tests.sharded_runs", str(folder), names]
    processes = [
        subprocess.Popen(
            [*command, *arguments],
            env=environment,
            cwd=Path(__file__).parents[1],
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in others or [()]
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=550)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()


def _assert_same(folder, *names):
    """Sums over examples and weights are made in another order, so all is the same to
    rounding, 1e-16 in float64. Below the edge and held at it nothing amplifies that as
    the optimizer's own oscillations would, for which the run is too short; but the
    eigensolver and the Krylov space divide by differences down to about 1e-3 of what
    they are taken from, some times in a row, and X is a change of the sharpness over
    a time step. 1e-9 is far below every tolerance of the integration (1e-2), so that it
    does take the same steps, to the same numbers."""
    for name in names:
        one, many = (
            cf.Trajectory.load(folder / f"{name}-{which}.npz")
            for which in ("one", "many")
        )
        for key in ("gradients", "hvps", "third_derivatives", "accepted_steps"):
            assert many.stats[key] == one.stats[key], (name, key)
        for key in (
            "loss",
            "mean_loss",
            "grad_norm_sq",
            "sharpness",
            "oscillation",
            "weights",
        ):
            expected = np.asarray(getattr(one, key))
            scale = np.nanmax(np.abs(expected), initial=0)
            np.testing.assert_allclose(
                getattr(many, key), expected, rtol=1e-9, atol=1e-9 * scale, err_msg=key
            )
    if "flow" in names:
        assert one.stats["third_derivatives"] > 0  # there was an edge


def test_a_run_on_eight_devices(tmp_path):
    _run(tmp_path, "run", 8)
    _assert_same(tmp_path, "run")


@pytest.mark.slow
def test_a_flow_on_eight_devices(tmp_path):
    _run(tmp_path, "run,flow", 8)
    _assert_same(tmp_path, "run", "flow")


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    _run(tmp_path, "run,flow", 2, (address, "0"), (address, "1"))
    _assert_same(tmp_path, "run", "flow")
