"""``phirt build``: a model folder for a device, from a checkpoint."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from phirt.cli.announce import Announcer
from phirt.cli.arguments import UsageError
from phirt.cli.lines import Line, paragraph, print_lines
from phirt.cli.progress import ProgressBars
from phirt.cli.selection import print_json
from phirt.cli.terminal import plain
from phirt.errors import PhirtError

if TYPE_CHECKING:
    from phirt.build.recipe import Quantization
    from phirt.building import BuildReport

__all__ = ["build"]


def build(arguments: argparse.Namespace) -> None:
    """Carry out ``phirt build``.

    Raises:
        UsageError: The arguments make no sense.
        DeclinedError: A download is large, and nobody agreed to it.
        PhirtError: It cannot be built, or is worse than asked.
    """
    if arguments.remove_engine is not None:
        others = (arguments.source, arguments.out, arguments.prepare_engine)
        if any(each is not None for each in others) or arguments.requirements or arguments.force:
            raise UsageError("--remove-engine does nothing else: give its NAME alone")
        _remove(arguments)
        return
    if arguments.prepare_engine is not None:
        if arguments.source is not None or arguments.out is not None:
            raise UsageError("--prepare-engine builds nothing: leave SOURCE and -o OUT out")
        _prepare(arguments)
        return
    if arguments.requirements or arguments.force:
        raise UsageError("--with and --force go with --prepare-engine")
    if arguments.source is None or arguments.out is None:
        raise UsageError("SOURCE and -o OUT are needed: phirt build SOURCE -o OUT")
    # Imported here, as what it needs is only this command's.
    from phirt.building import build_model

    with ProgressBars() as bars:
        try:
            report = build_model(
                arguments.source,
                arguments.out,
                format=arguments.format,
                precision=arguments.precision,
                device=arguments.device,
                engine=arguments.engine,
                quantization=_quantization(arguments),
                options=_options(arguments.extra),
                max_kl=arguments.check,
                check_tokens=arguments.check_tokens,
                overwrite=arguments.overwrite,
                offline=arguments.offline,
                progress=bars,
                announce=Announcer(bars, yes=arguments.yes),
            )
        except PhirtError:
            raise
        except ValueError as error:
            raise UsageError(" ".join(str(error).split())) from error
    if arguments.json:
        print_json(report.to_json())
    else:
        print_lines(lambda width: _lines(report, width=width))


def _prepare(arguments: argparse.Namespace) -> None:
    from phirt.build.engines.environments import prepare_engine

    with ProgressBars() as bars:
        try:
            path = prepare_engine(
                arguments.prepare_engine,
                requirements=arguments.requirements,
                progress=bars,
                force=arguments.force,
            )
        except PhirtError:
            raise
        except ValueError as error:
            raise UsageError(" ".join(str(error).split())) from error
    if arguments.json:
        print_json({"engine": arguments.prepare_engine, "path": str(path)})
    else:
        print(plain(f"The engine {arguments.prepare_engine} is ready in {path}"))


def _remove(arguments: argparse.Namespace) -> None:
    from phirt.build.engines.environments import remove_engine

    name = arguments.remove_engine
    try:
        was_there = remove_engine(name)
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error
    if arguments.json:
        print_json({"engine": name, "removed": was_there})
    elif was_there:
        print(plain(f"The environment of {name} is removed"))
    else:
        print(plain(f"There is no environment of {name}"))


def _quantization(arguments: argparse.Namespace) -> Quantization | None:
    """How int4 rounds; None where no option says anything of it."""
    layers = arguments.int8_layers
    asked = arguments.symmetric or arguments.calibrate or arguments.block_size is not None
    if not asked and layers is None:
        return None
    from phirt.build.recipe import DEFAULT_INT8_LAYERS, Quantization

    return Quantization(
        block_size=32 if arguments.block_size is None else arguments.block_size,
        symmetric=arguments.symmetric,
        int8_layers=DEFAULT_INT8_LAYERS
        if layers is None
        else tuple(pattern for pattern in layers if pattern != "none"),
        calibrate=arguments.calibrate,
    )


def _options(extra: list[str]) -> Mapping[str, str]:
    options = {}
    for each in extra:
        name, equals, value = each.partition("=")
        if not equals:
            raise UsageError(f"--extra {each}: an option reads like name=value")
        options[name] = value
    return options


def _quoted(path: Path) -> str:
    """A path as a shell takes it, in quotes where it needs them."""
    text = plain(str(path))
    if os.name == "nt":
        return f'"{text}"' if " " in text else text
    return shlex.quote(text)


def _lines(report: BuildReport, *, width: int) -> Iterator[Line]:
    what = f"{report.format}, {report.precision} for {report.device}"
    yield [(plain(str(report.path)), "bold")]
    yield from paragraph(
        f"{report.architecture} as {what}, built by {report.engine} from {plain(report.source)}: "
        f"{report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s",
        width=width,
    )
    if report.own_kl is not None:
        yield from paragraph(
            f"Rounding moved the canary by {report.own_kl:.4f} nats (mean KL on 8 positions).",
            width=width,
        )
    if report.quality is not None:
        from phirt.quality.report import KERNEL_NAMES

        kernels = ", ".join(
            f"{each.figures.kl_mean:.4f} ({KERNEL_NAMES[name]} kernels)"
            for name, each in report.quality.kernels.items()
        )
        yield from paragraph(f"Mean KL from fp32 on text: {kernels}.", width=width)
    yield []
    yield from paragraph(
        f'Run it: phirt run -m {_quoted(report.path)} "Hello"', width=width, style="dim"
    )
