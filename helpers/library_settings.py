"""Environment variables by which libraries change a run from outside: the ones that are removed, and the ones that count.

accelerate, torch and diffusers read settings of their own from the environment. One that was left over from another program would
change the numbers of a run without a word (`ACCELERATE_GRADIENT_ACCUMULATION_STEPS=8` divides every gradient by 8). So the launcher and
the trainer remove these variables before a library sees them, and say so. INSTALL.md lists those that stay in effect.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from helpers.errors import ConfigError

# Whole groups that only accelerate reads. What a configuration file of accelerate says comes back through its own launcher.
_REMOVED_GROUPS = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
_KEPT = frozenset(  # of these groups: which device is used and what is logged, but no number of the training
    {
        "ACCELERATE_USE_CPU",
        "ACCELERATE_MIXED_PRECISION",  # the trainer passes its own
        "ACCELERATE_TORCH_DEVICE",
        "ACCELERATE_CPU_AFFINITY",
        "ACCELERATE_DEBUG_MODE",
        "ACCELERATE_LOG_LEVEL",
        "ACCELERATE_DISABLE_RICH",
        "ACCELERATE_ENABLE_RICH",
        "ACCELERATE_EXTRA_ARGS",  # ours: more arguments of accelerate launch
    }
)
_REMOVED = {  # variable => the option that says the same, where there is one
    "DIFFUSERS_ATTN_BACKEND": "--attention",
    "NVIDIA_TF32_OVERRIDE": "--allow_tf32",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "--allow_tf32",
    "ONEDNN_DEFAULT_FPMATH_MODE": "--mixed_precision",
    "DNNL_DEFAULT_FPMATH_MODE": "--mixed_precision",
    "XLA_USE_BF16": "--mixed_precision",
    "XLA_DOWNCAST_BF16": "--mixed_precision",
    "USE_TORCH_XLA": "",
}

_OFF = frozenset({"", "0", "no", "none", "false", "default"})  # values that change nothing, which accelerate launch sets by itself
_STRATEGIES = {  # variable by which accelerate is asked for one => its name
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism configuration",
}

# Which of several processes this one is. Job controllers leave them in every container; a launcher sets them anew for its processes.
_RANKS = frozenset(
    {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"}
)
_RANK_GROUPS = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "TORCHELASTIC_")

# Variables that choose kernels of torch and stay in effect. They change the last bits of numbers, or the precision of single operations.
COUNT = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_CBWR",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_ENABLE_MPS_FALLBACK",
    "PYTORCH_MPS_FAST_MATH",
    "PYTORCH_MPS_PREFER_METAL",
    "TORCHDYNAMO_DISABLE",
    "TORCHINDUCTOR_MAX_AUTOTUNE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_BLAS_PREFER_HIPBLASLT",
    "TORCH_COMPILE_DISABLE",
)


def remove_library_settings(environ: MutableMapping[str, str]) -> list[str]:
    """Remove from `environ` what would change numbers unsaid. Returns a sentence for each variable, to be shown to the user.

    Raises ConfigError where a variable asks accelerate for a strategy that the trainer does not have.
    """
    for name, strategy in _STRATEGIES.items():
        if environ.get(name, "").lower() not in _OFF:
            raise ConfigError(f"{name}={environ[name]} in the environment asks for {strategy}, which is not available yet: unset it.")
    notes = []
    for name in sorted(environ):
        grouped = name.startswith(_REMOVED_GROUPS) and name not in _KEPT
        if grouped or name in _REMOVED:
            value, instead = environ.pop(name), _REMOVED.get(name)
            if value.lower() not in _OFF or name in _REMOVED:
                notes.append(f"{name}={value} in the environment is ignored" + (f"; use {instead}" if instead else ""))
    return notes


def remove_ranks(environ: MutableMapping[str, str]) -> list[str]:
    """Remove the variables of a group of processes, for a launcher that starts its own. Returns a sentence where there were some."""
    removed = {name: environ.pop(name) for name in sorted(environ) if name in _RANKS or name.startswith(_RANK_GROUPS)}
    if not removed.keys() & {"RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}:
        return []
    listed = ", ".join(f"{name}={value}" for name, value in removed.items())
    return [f"{listed} in the environment is ignored: TRAINING_NUM_PROCESSES says how many processes train"]


def in_effect(environ: Mapping[str, str]) -> str:
    """The variables of `COUNT` that are set, as "NAME=value, ..."; "" where none is."""
    return ", ".join(f"{name}={environ[name]}" for name in COUNT if environ.get(name))
