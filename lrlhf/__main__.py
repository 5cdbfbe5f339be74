"""The command line: lrlhf fit | validate | test | predict | align | report | plan | verify-resume."""

import sys
from collections.abc import Sequence

from lrlhf.cli.start import fail, keep_few_kernels, keep_freed_memory, quiet

USAGE = """usage: lrlhf COMMAND [options]

  fit        train one stage:        lrlhf fit --config configs/demo/sft.yaml
  validate   its held-out metrics:   lrlhf validate --config runs/demo/sft/config.yaml
  test       the same on data.test
  predict    write responses in AlpacaEval format, or the scores of a reward model
  align      SFT, reward model and PPO, one after the other: lrlhf align --config configs/demo/align.yaml
  plan       the memory that a run needs, before it runs: lrlhf plan --config configs/demo/sft.yaml
  verify-resume   prove on your config that a killed run ends like an uninterrupted one
  report     tables, plots and an HTML page of an align run: lrlhf report runs/demo

lrlhf COMMAND --help tells the options; several --config files compose, later ones win."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a fault the user can mend becomes one sentence on stderr and exit code 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    command, *rest = arguments
    quiet()
    keep_freed_memory()
    keep_few_kernels()
    from lrlhf.errors import UserError

    try:
        if command == "align":
            from lrlhf.align.align import align

            align(rest)
        elif command == "report":
            from lrlhf.align.report import main as report

            report(rest)
        elif command == "plan":
            from lrlhf.cli.settings import check_run

            check_run(command, rest)
            from lrlhf.memory.command import main as plan

            plan(rest)
        elif command == "verify-resume":
            from lrlhf.cli.settings import check_run

            check_run(command, rest)
            from lrlhf.cli.verify_resume import main as verify_resume

            verify_resume(rest)
        elif command in ("fit", "validate", "test", "predict"):
            from lrlhf.cli.settings import check_run

            check_run(command, rest)
            from lrlhf.cli.lightning import run_stage

            run_stage([command, *rest])
        elif command == "--version":
            from lrlhf import __version__

            print(f"lrlhf {__version__}")
        else:
            raise UserError(f"there is no command {command!r}; see lrlhf --help.")
    except UserError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error}.")
    except KeyboardInterrupt:
        fail("interrupted.")
    except SystemExit as stop:
        if type(stop).__name__ == "SIGTERMException":
            sys.exit(128 + 15)
        raise


if __name__ == "__main__":
    main()
