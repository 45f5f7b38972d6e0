"""`waypost doctor`: what this machine has, whether it keeps the numeric contract, what it can do at best, what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from waypost.cli._shared import AsJson, Threads, print_result

EXTRAS = {
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "structured": ("llguidance",),
    "gguf": ("gguf",),
    "erasure": ("zfec",),
    "data": ("pyarrow", "fsspec"),
    "plots": ("matplotlib",),
    "track": ("tensorboard", "trackio"),
}
"""Extra -> the modules that it brings."""


def command(
    quick: Annotated[bool, typer.Option("--quick", help="Skip the measurements of speed, which take some seconds.")] = False,
    folder: Annotated[Path, typer.Option(help="Folder on the disk to measure.")] = Path(),
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Looks at this machine and reports. It configures nothing.

    Exit status 1 where the numeric contract is not kept: `numerics: exact` would be refused here.

    Examples:
      waypost doctor
      waypost doctor --quick --threads 2
    """
    import torch

    from waypost.core.progress import say
    from waypost.kernels import build, select
    from waypost.measure.contract import try_contract, unpadded_row_counts

    if threads is not None:
        torch.set_num_threads(threads)
    found: dict[str, Any] = {"machine": _machine(folder), "software": _software()}
    say("trying the numeric contract ...")
    ops = select()
    findings = try_contract(ops)
    found["contract"] = {
        "kernels": ops.name,
        "compiler": build.compiler(),
        "threads": torch.get_num_threads(),
        "kept": all(f.kept for f in findings),
        "findings": [vars(f) for f in findings],
        "unpadded_row_counts_float32": unpadded_row_counts(torch.float32),
    }
    if not quick:
        say("measuring ...")
        found["peaks"] = _peaks(folder)
    print_result(found, as_json, None if as_json else _report(found))
    if not found["contract"]["kept"]:
        raise typer.Exit(1)


def _machine(folder: Path) -> dict[str, Any]:
    from waypost.measure.machine import cpu_name

    flags: set[str] = set()
    try:
        text = Path("/proc/cpuinfo").read_text()
        flags = set(next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split())
    except OSError:
        pass
    vector = [
        f for f in ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve", "bf16") if f in flags
    ]
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "vector": vector,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk_free_bytes": shutil.disk_usage(folder).free,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _software() -> dict[str, Any]:
    import torch

    extras = {extra: [m for m in modules if importlib.util.find_spec(m) is None] for extra, modules in EXTRAS.items()}
    return {
        "waypost": importlib.metadata.version("waypost"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "missing": {extra: modules for extra, modules in extras.items() if modules},
    }


def _peaks(folder: Path) -> dict[str, float]:
    from waypost.measure.machine import disk_bandwidth, machine

    measured = machine()
    return {
        "matmul_float32_gflops": measured.flops_float32 / 1e9,
        "matmul_bfloat16_gflops": measured.flops_bfloat16 / 1e9,
        "memory_bytes_s": measured.memory_bytes,
        "disk_write_bytes_s": disk_bandwidth(folder),
    }


def _report(found: dict[str, Any]) -> str:
    from waypost.keep.disk import human

    m, s, c = found["machine"], found["software"], found["contract"]
    vector = " ".join(m["vector"]) or "no vector unit known"
    lines = [
        f"machine    {m['cpu']}, {m['usable_cores']} of {m['cores']} cores usable, {vector}",
        f"           {human(m['memory_bytes'])} of memory, {human(m['disk_free_bytes'])} free on disk, {m['system']}",
        f"software   waypost {s['waypost']}, python {s['python']}, torch {s['torch']}, GPU: {s['gpu'] or 'none'}",
        f"kernels    {c['kernels']}, compiler: {c['compiler'] or 'none: install g++ for the compiled kernels'}",
        f"contract   {'kept' if c['kept'] else 'NOT KEPT'} with {c['threads']} threads",
    ]
    for finding in c["findings"]:
        mark = "ok  " if finding["kept"] else "FAIL"
        lines += [f"           {mark} {finding['what']} {finding['detail']}".rstrip()]
    odd = c["unpadded_row_counts_float32"]
    if odd:
        lines.append(f"           (unpadded float32 rows would differ at {', '.join(map(str, odd))} rows: why rows are padded)")
    for index, (name, value) in enumerate(found.get("peaks", {}).items()):
        what, unit = name.removesuffix("_gflops").removesuffix("_bytes_s").replace("_", " "), name.rpartition("_")[2]
        shown = f"{value:,.1f} GFLOP/s" if unit == "gflops" else f"{human(value)}/s"
        lines += [f"{'' if index else 'peaks':<10} {what}: {shown}"]
    missing = found["software"]["missing"]
    lines += [f'missing    {", ".join(modules)}: pip install "waypost[{extra}]"' for extra, modules in missing.items()]
    if not missing:
        lines.append("missing    nothing: every extra is installed")
    return "\n".join(lines)
