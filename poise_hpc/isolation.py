"""What a job may touch. Three independent walls, each the strongest this kernel allows, named in the record:

- *environment*: an allow-list; no keys, no proxies, home and caches inside the attempt;
- *network*: an own user + network namespace (`unshare`), for jobs of one rank; several ranks need their network;
- *files*: Landlock, write access to the attempt folder, /dev and /proc/self only, read access everywhere; a landlocked
  process cannot look into processes outside either (their environment, their memory).

Not covered: reading other users' readable files, CPU side channels, a hostile kernel exploit.
"""
from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

KEEP = ("PATH", "LANG", "TZ", "USER", "LOGNAME", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "PYTHONHASHSEED", "VIRTUAL_ENV", "CONDA_PREFIX")
KEEP_PREFIX = ("LC_", "OMP_", "MKL_", "OPENBLAS_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "TP_", "VLLM_",
               "TRITON_", "ROCR_", "HIP_", "HSA_", "UCX_", "FI_", "HDF5_USE_FILE_LOCKING", "SLURM_", "SUBMITIT_", "HF_HUB_OFFLINE",
               "TRANSFORMERS_OFFLINE", "POISE_JOB_")
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


# Tools compile and cache into the home directory, which on clusters is shared, small and slow; two jobs that compile
# into one cache corrupt it. Variable -> folder below the job's own cache.
CACHES = {"HF_HOME": "huggingface", "TORCH_EXTENSIONS_DIR": "extensions", "TORCHINDUCTOR_CACHE_DIR": "inductor",
          "TRITON_CACHE_DIR": "triton", "VLLM_CACHE_ROOT": "vllm", "XDG_CACHE_HOME": "xdg"}


def environment(source: Mapping[str, str], attempt: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The worker's environment: allow-listed names of `source` and those that the site file sets, never one that sounds like a
    secret, then `extra`."""
    keep = {*KEEP, *source.get("POISE_JOB_VARIABLES", "").split()}
    env = {k: v for k, v in source.items()
           if (k in keep or k.startswith(KEEP_PREFIX)) and not any(word in k.upper() for word in SECRET)}
    scratch = attempt / "tmp"
    cache = Path(source.get("POISE_JOB_CACHE", scratch / "cache"))  # job-local disk where the site has one
    env |= {name: str(cache / folder) for name, folder in CACHES.items()}
    env |= {"HOME": str(scratch), "TMPDIR": str(scratch),
            "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    return env | dict(extra)


def network_prefix(ranks: int) -> list[str]:
    """Command prefix that cuts the network off; [] where the kernel or the number of ranks does not allow it."""
    unshare = shutil.which("unshare")
    if ranks > 1 or unshare is None:
        return []
    prefix = [unshare, "--user", "--map-root-user", "--net"]
    works = subprocess.run([*prefix, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=20).returncode == 0
    return prefix if works else []


# --- Landlock: https://docs.kernel.org/userspace-api/landlock.html (ABI 1 is enough; x86-64 and arm64 share the numbers)
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_WRITE = 0x1FF2  # write_file, remove_*, make_*: every ABI 1 right but execute (bit 0), read_file (2), read_dir (3)
_TRUNCATE = 0x4000  # ABI 3; before it, truncate(2) of a file outside could not be forbidden
_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS, _PR_SET_PDEATHSIG = 38, 1


class _Ruleset(ctypes.Structure):
    _fields_ = [("handled_access_fs", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def landlock_abi() -> int:
    """0 or less: this kernel has no Landlock."""
    return int(ctypes.CDLL(None, use_errno=True).syscall(_CREATE, None, 0, 1))


def restrict_writes(folders: list[Path]) -> None:
    """From now on this process and its children write below `folders` and to /dev and /proc/self only. OSError if refused."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: object) -> int:
        result = libc.syscall(number, *arguments)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result

    rights = _WRITE | (_TRUNCATE if landlock_abi() >= 3 else 0)
    ruleset = call(_CREATE, ctypes.byref(_Ruleset(rights)), ctypes.sizeof(_Ruleset), 0)
    try:
        for folder in [*folders, Path("/dev"), Path("/proc/self")]:
            parent = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            try:
                call(_ADD, ruleset, _PATH_BENEATH, ctypes.byref(_PathBeneath(rights, parent)), 0)
            finally:
                os.close(parent)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        call(_RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when the supervisor (pid `parent`) dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def limit_resources(memory_gb: float, file_gb: float) -> None:
    """Data segment (not on GPU nodes: CUDA reserves address space far beyond what it uses) and file size."""
    if memory_gb and not Path("/dev/nvidiactl").exists():
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb * 2**30),) * 2)
    if file_gb:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_gb * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
