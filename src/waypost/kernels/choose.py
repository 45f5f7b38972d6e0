"""Which set of operators runs: `select` is the only place that knows that there are several."""

from __future__ import annotations

from typing import get_args

from waypost.core.errors import ConfigError, nearest
from waypost.kernels.ops import Kernel, Numerics, Ops


def select(numerics: Numerics = "exact", kernel: Kernel = "auto") -> Ops:
    """The set for `numerics` ("exact": bits independent of batching; "fast": what is fastest here, no promise).

    kernel "cpu" is the compiled set, "naive" plain PyTorch, "triton" for tensors on a GPU; "auto" takes "cpu" where the wheel
    brought it or a C++ compiler is at hand. For "fast", "auto" leaves machines with a GPU to PyTorch.
    """
    if kernel not in get_args(Kernel):
        raise ConfigError(f"kernel='{kernel}': no such kernel set.{nearest(str(kernel), get_args(Kernel))}")
    if numerics not in get_args(Numerics):
        raise ConfigError(f"numerics='{numerics}': no such mode.{nearest(str(numerics), ('exact', 'fast'))}")
    if kernel == "triton" and numerics == "exact":
        from waypost.kernels import triton

        return triton.ops()
    from waypost.kernels import build

    if numerics == "fast":
        import torch

        from waypost.kernels import fast

        compiled = kernel == "cpu" or (kernel == "auto" and build.available() and not torch.cuda.is_available())
        return fast.compiled() if compiled else fast.ops()
    if kernel == "cpu" or (kernel == "auto" and build.available()):
        from waypost.kernels import cpu

        return cpu.ops()
    from waypost.kernels import naive

    return naive.ops()
