"""The command line: lrlhf fit | validate | test | predict | align | evaluate | export | report | plan | doctor | ..."""

import sys
from collections.abc import Callable, Sequence

from lrlhf.cli.start import check_config_files, fail, keep_few_kernels, keep_freed_memory, quiet
from lrlhf.errors import UserError

USAGE = """usage: lrlhf COMMAND [options]

  fit        train one stage:        lrlhf fit --config configs/demo/sft.yaml
  validate   its held-out metrics:   lrlhf validate --config runs/demo/sft/config.yaml
  test       the same on data.test
  predict    write responses in AlpacaEval format, or the scores of a reward model
  align      SFT, reward model, PPO (or another method): lrlhf align --config configs/demo/align.yaml
  evaluate   win rates, factual precision and more: lrlhf evaluate --config configs/evaluate/reward_model.yaml
  export     a peft adapter, a merged model, a GGUF file, a reward model of transformers, with a model card:
             lrlhf export runs/ppo --to exports/policy
  chat       talk to it: lrlhf chat runs/ppo --beside reference
  plan       the memory that a run needs, before it runs: lrlhf plan --config configs/demo/sft.yaml
  doctor     what this machine can run; --check proves it on its device
  verify-resume   prove on your config that a killed run ends like an uninterrupted one
  study      conditions times seeds, and what they say: lrlhf study --config configs/studies/regularizers.yaml
  match      coefficients under which penalties pull equally hard: lrlhf match RUN --divergences ...
  report     tables, plots and one HTML page of runs, side by side: lrlhf report runs/demo

lrlhf COMMAND --help tells the options; several --config files compose, later ones win."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a fault the user can mend becomes one sentence on stderr and exit code 1."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return
    quiet()
    keep_freed_memory()
    keep_few_kernels()
    try:
        check_config_files(words[1:])
        command(words[0])(words[1:])
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


def command(name: str) -> Callable[[list[str]], object]:
    """The function that runs a command; what others need is not imported."""
    if name in ("fit", "validate", "test", "predict"):
        from lrlhf.cli.lightning import run_stage

        return lambda arguments: run_stage([name, *arguments])
    if name == "align":
        from lrlhf.align.align import main as align

        return align
    if name == "evaluate":
        from lrlhf.evaluation.command import main as evaluate

        return evaluate
    if name == "export":
        from lrlhf.export.command import main as export

        return export
    if name == "chat":
        from lrlhf.chat import main as chat

        return chat
    if name == "study":
        from lrlhf.study.command import main as study

        return study
    if name == "match":
        from lrlhf.study.matching import main as match

        return match
    if name == "report":
        from lrlhf.report.report import main as report

        return report
    if name == "plan":
        from lrlhf.memory.command import main as plan

        return plan
    if name == "doctor":
        from lrlhf.doctor.command import main as doctor

        return doctor
    if name == "verify-resume":
        from lrlhf.cli.verify_resume import main as verify_resume

        return verify_resume
    if name == "--version":
        from lrlhf import __version__

        return lambda _: print(f"lrlhf {__version__}")
    raise UserError(f"there is no command {name!r}; see lrlhf --help.")


if __name__ == "__main__":
    main()
