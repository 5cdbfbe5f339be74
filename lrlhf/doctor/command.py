"""`lrlhf doctor`: what this machine can run; with --check, proof on its device, as a text and a JSON file to send."""

import json
import logging
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from lrlhf.cli.messages import CommandParser
from lrlhf.doctor.checks import CHECKS, Workplace
from lrlhf.doctor.machine import describe, environment, fitting, product_rates
from lrlhf.errors import UserError

DESCRIPTION = """What this machine can run. With --check it proves it: numbers, stages, memory, resuming and two
processes, in ten minutes on one GPU at most; the report goes to --out, to read or to send."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    passed: bool
    seconds: float
    lines: list[str]


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a bad option, or a check that failed.
    """
    parser = CommandParser(prog="lrlhf doctor", description=DESCRIPTION)
    parser.add_argument("--check", action="store_true", help="run the checks")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), help="these checks alone")
    parser.add_argument("--device", type=Literal["cpu", "cuda"] | None, help="cuda where there is one")
    parser.add_argument("--small", action="store_true", help="with tiny random models: minutes on a processor")
    parser.add_argument("--out", type=str, default="doctor.json", help="of --check; the text lies beside it")
    given = parser.parse_args(arguments)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("doctor: --device cuda: PyTorch sees no GPU; install a build for it, or leave --device out.")
    machine = environment()
    rates = {name: product_rates(name) for name in dict.fromkeys(("cpu", device))}
    lines = [*describe(machine, rates), *fitting(device)]
    print("\n".join(lines), flush=True)
    if not given.check:
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    findings = []
    with tempfile.TemporaryDirectory(prefix="lrlhf-doctor-") as folder:
        place = Workplace(device, given.small, Path(folder), rates[device])
        for name in given.only or CHECKS:
            findings.append(_run(name, place))
            lines += ["", *_lines(findings[-1])]
            print("\n".join(["", *_lines(findings[-1])]), flush=True)
    out = Path(given.out).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "product_rates": rates, "device": device, "small": given.small}
    out.write_text(json.dumps(report | {"checks": [asdict(finding) for finding in findings]}, indent=1))
    out.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    print(f"\n{out} and {out.with_suffix('.txt')} hold this report.")
    if failed := [finding.check for finding in findings if not finding.passed]:
        raise UserError(f"doctor: {', '.join(failed)} failed; please send the report.")


def _run(name: str, place: Workplace) -> Finding:
    """One check; whatever it raises is what it found."""
    start = time.perf_counter()
    try:
        passed, lines = True, CHECKS[name](place)
    except Exception as error:
        passed, lines = False, [f"{type(error).__name__}: {error}"]
    if place.device == "cuda":
        torch.cuda.empty_cache()
    return Finding(name, passed, round(time.perf_counter() - start, 1), lines)


def _lines(finding: Finding) -> list[str]:
    what = (CHECKS[finding.check].__doc__ or "").strip().splitlines()[0]
    title = f"{'passed' if finding.passed else 'FAILED'}  {finding.check} ({finding.seconds:.0f} s): {what}"
    return [title, *(f"  {line}" for line in finding.lines)]
