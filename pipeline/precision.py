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
        setting: "float32", "bf16", or "auto": bf16 where the device computes in it.
        device: Its type, "cpu" or "cuda".

    Raises:
        UserError: "bf16", and this device would only emulate it.
    """
    is_native, name = _cuda() if device == "cuda" else _cpu()
    if setting == "bf16" and not is_native:
        raise UserError(
            f"train.precision is bf16, and this processor ({name}) does not compute in it; choose auto or float32"
        )
    return torch.bfloat16 if is_native and setting != "float32" else None


def autocast(device: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    """Forward passes inside are cast to what `resolve_precision` gave for this type of device."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)


def _cpu() -> tuple[bool, str]:
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = any(capabilities.get(name, False) for name in _NATIVE_BF16)
    return has_bf16, str(capabilities.get("cpu_name", "unknown"))


def _cuda() -> tuple[bool, str]:
    return torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name()
