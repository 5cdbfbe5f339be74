"""The command line: lrlhf fit | validate | test | predict | align | report | plan | verify-resume."""

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Sequence

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
            from lrlhf.align import align

            align(rest)
        elif command == "report":
            from lrlhf.report import main as report

            report(rest)
        elif command == "plan":
            from lrlhf.settings import check_run

            check_run(command, rest)
            from lrlhf.planning.command import main as plan

            plan(rest)
        elif command == "verify-resume":
            from lrlhf.settings import check_run

            check_run(command, rest)
            from lrlhf.verify_resume import main as verify_resume

            verify_resume(rest)
        elif command in ("fit", "validate", "test", "predict"):
            from lrlhf.settings import check_run

            check_run(command, rest)
            from lrlhf.lightning_cli import run_stage

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


def fail(sentence: str) -> None:
    """Print one sentence and leave with exit code 1."""
    print(f"lrlhf: error: {sentence}", file=sys.stderr)
    sys.exit(1)


def quiet() -> None:
    """Keep other libraries' start-up chatter off the screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    for message in (
        ".*does not have many workers.*",
        ".*is_gradient_checkpointing.*",
        ".*gradient_checkpointing_enable.*",
        ".*in eval mode at the start of training.*",
        ".*LeafSpec.*",
        ".*checkpoint directory.*exists.*",
        ".*logs directory.*exists.*",
        ".*callbacks used to create the checkpoint.*Checkpoints.*",
        ".*your dataloader is not resumable.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning every large tensor: a fifth less time a step on CPUs."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
            mallopt(m_mmap_max, 0)
            mallopt(m_trim_threshold, 2**31 - 1)
            mallopt(m_top_pad, 64 * 2**20)


def keep_few_kernels() -> None:
    """Let oneDNN and PyTorch keep 64 kernels instead of 1,024: each is for one shape and holds up to a few MB."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


if __name__ == "__main__":
    main()
