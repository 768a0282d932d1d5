"""Shared set-up: shapes and types are checked at run time in every test, and a program
is compiled once for all tests, workers and processes that need it."""

import os
import shutil
import tempfile

# Before the packages that read them are imported. (JAX keeps no program that calls back
# to Python, as Equinox's checks of what Diffrax is given do unless they say NaN.)
os.environ.setdefault("EQX_ON_ERROR", "nan")
_programs = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="centralflow-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs

import equinox as eqx
import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

install_import_hook("centralflow", "beartype.beartype").__enter__()


def pytest_unconfigure():
    if _programs is not None:  # the workers' are those of the process that made them
        shutil.rmtree(_programs, ignore_errors=True)


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def untyped():
    """One test as users run it, without checks of types: for arguments that are wrong
    on purpose, whose errors the package itself must raise."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def _release_programs():
    """Compiled programs hold memory maps, of which Linux grants a process 65,530: those
    of all modules together are too many."""
    yield
    eqx.clear_caches()
    jax.clear_caches()
