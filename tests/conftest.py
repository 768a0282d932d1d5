"""Shared set-up: shapes and types are checked at run time in every test."""

import os

import equinox as eqx
import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# The problems are small: most of the time is compilation, and half of that is
# optimization for CPUs, which `make test-all` leaves as users have it.
UNOPTIMIZED = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)
if jax.__version_info__ >= (0, 11):
    # They do not know the last of these, and the others alone take longer than none.
    UNOPTIMIZED = ""
os.environ.setdefault("XLA_FLAGS", UNOPTIMIZED)

# On GPUs the order of a sum may change from one run to the next, and the tests compare
# some bit for bit; and the first of the processes that run them would take most of the
# memory.
os.environ["XLA_FLAGS"] += " --xla_gpu_deterministic_ops=true"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

install_import_hook("centralflow", "beartype.beartype").__enter__()


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def full_precision():
    """The matrix products of the losses of a module, on GPUs too, where the default has
    three digits: too few to compare two programs, or a run that amplifies errors."""
    with jax.default_matmul_precision("highest"):
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
