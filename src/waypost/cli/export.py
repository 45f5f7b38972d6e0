"""`waypost export CKPT OUT`: the folder to publish, a GGUF file, or a folder of torch.distributed.checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from waypost.cli._shared import AsJson, print_result


def command(
    ckpt: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder, whose latest checkpoint it is.")],
    out: Annotated[Path, typer.Argument(help="The folder or the GGUF file to write; it must not exist.")],
    weights_only: Annotated[
        bool,
        typer.Option("--weights-only", help="Write the folder to publish: everything but the training state."),
    ] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write one GGUF file that llama.cpp runs.")] = False,
    dcp: Annotated[
        bool, typer.Option("--dcp", help="Write a folder of torch.distributed.checkpoint: weights, moments, plain state.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="bf16|f32|keep", help="With --weights-only: how the weights are stored; keep by default."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--type", metavar="f32|f16|bf16|q8_0", help="With --gguf: the type of the matrices; bf16 by default."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let a checkpoint out: the folder to publish, a GGUF file, or a folder of torch.distributed.checkpoint.

    Examples:
      waypost export models/smollm2 smollm2.gguf --gguf --type q8_0
    """
    if weights_only + gguf + dcp != 1:
        raise typer.BadParameter("say what to write: --weights-only for the folder, or --gguf for a file, or --dcp")
    if not gguf and kind is not None:
        raise typer.BadParameter("--type belongs to --gguf; with --weights-only say --dtype")
    if not weights_only and dtype is not None:
        raise typer.BadParameter("--dtype belongs to --weights-only; with --gguf say --type")

    from waypost.core.errors import ConfigError
    from waypost.keep.disk import human
    from waypost.transform.converting.exporting import export_folder, export_gguf

    if not gguf and out.suffix == ".gguf":
        raise ConfigError(f"{out} names a GGUF file: say --gguf for one, or give a folder")
    if dcp:
        from waypost.transform.converting.torch_distributed import export_dcp

        written = export_dcp(ckpt, out)
    else:
        written = export_gguf(ckpt, out, kind=kind or "bf16") if gguf else export_folder(ckpt, out, dtype=dtype)
    files = [written] if written.is_file() else [path for path in written.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print_result({"out": str(out), "bytes": size, "files": len(files)}, as_json, f"{out}: {human(size)}")
