"""What forward passes of a training are computed in, on a processor or a GPU."""

from __future__ import annotations

import contextlib

import torch

from pipeline.errors import UserError

PRECISIONS = ("float32", "bf16", "auto")
_NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, ARM


def resolve_precision(setting: str, device: str = "cpu") -> torch.dtype | None:
    """What forward passes are cast to on this machine; None leaves them in float32.

    Args:
        setting: "float32", "bf16", or "auto": bf16 where the device gains by it. Intel's processors with AVX-512 alone
            do not: their float32 has all of AVX-512 too, and an update in bf16 takes them 1.2 to 1.5 times as long.
        device: Its type, "cpu" or "cuda".

    Raises:
        UserError: "bf16", and this device would only emulate it.
    """
    is_native, gains, name = _cuda() if device == "cuda" else _cpu()
    if setting == "bf16" and not is_native:
        raise UserError(
            f"train.precision is bf16, and this processor ({name}) does not compute in it; choose auto or float32"
        )
    return torch.bfloat16 if setting == "bf16" or (setting == "auto" and gains) else None


def autocast(device: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    """Forward passes inside are cast to what `resolve_precision` gave for this type of device."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)


def _cpu() -> tuple[bool, bool, str]:
    """Whether it computes in bf16, whether it gains by it, and its name."""
    capabilities = torch.cpu.get_capabilities()
    name = str(capabilities.get("cpu_name", "unknown"))
    has_bf16 = any(capabilities.get(part, False) for part in _NATIVE_BF16)
    return has_bf16, has_bf16 and ("Intel" not in name or bool(capabilities.get("amx_bf16", False))), name


def _cuda() -> tuple[bool, bool, str]:
    """The same of the GPU."""
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return has_bf16, has_bf16, torch.cuda.get_device_name()
