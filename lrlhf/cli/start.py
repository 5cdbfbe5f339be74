"""What a process of the command line sets before torch is imported, and how it ends on an error."""

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from lrlhf.errors import UserError


def check_config_files(arguments: Sequence[str]) -> None:
    """Say what is wrong with the files after --config before anything slow is imported.

    Raises:
        UserError: a file that is missing, is no YAML, or holds no keys.
    """
    for option, value in pairwise([word for argument in arguments for word in argument.split("=", 1)]):
        path = Path(value).expanduser()
        if option not in ("--config", "-c") or path.suffix not in (".yaml", ".yml"):
            continue
        if not path.is_file():
            raise UserError(f"there is no config file {path}.")
        try:
            values = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"line {mark.line + 1}: {error.problem}" if mark else " ".join(str(error).split())  # type: ignore
            raise UserError(f"{path}: not valid YAML ({where}).") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected keys and values, got {type(values).__name__}.")


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
