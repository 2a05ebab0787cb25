"""Local model directories of transformers: what they hold, loading and saving."""

import copy
import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unlearn_fast._optional import require
from unlearn_fast.integrations.directories import copy_other_files

TASKS = ("causal-lm", "classification")
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD = "5GB"


class Pretrained:
    """A local model directory. Nothing is ever downloaded, and its code runs only where `trust_remote_code` is True.

    Attributes: `config`; `task`, one of TASKS; `tokenizer`, None where the directory has none.
    """

    def __init__(self, folder: Path, task: str | None, dtype: str, trust_remote_code: bool) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"model {str(folder)!r} is no directory: it must be a local one, nothing is downloaded"
            )
        if (folder / "adapter_config.json").exists():
            raise ValueError(f"model {str(folder)!r} holds an adapter: merge it into its model first")
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"model {str(folder)!r} is no model directory: it has no config.json")
        if task not in (None, *TASKS):
            raise ValueError(f"task is {task!r}: it must be one of {', '.join(map(repr, TASKS))}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}: it must be one of {', '.join(map(repr, DTYPES))}")
        require("transformers", "hf", "a model directory")
        from transformers import CONFIG_MAPPING, AutoConfig

        self.folder, self.dtype = folder, DTYPES[dtype]
        self.options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        try:
            record = json.loads((folder / "config.json").read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'} is no JSON: {error}") from error
        if "auto_map" in record and not trust_remote_code and record.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(
                f"model {str(folder)!r} comes with code of its own: read it, and then allow it by trust_remote_code"
                " (--trust-remote-code)"
            )
        self.config: Any = AutoConfig.from_pretrained(folder, **self.options)
        if getattr(self.config, "quantization_config", None) is not None:
            raise ValueError(f"model {str(folder)!r} is quantized: importances need its floating-point weights")
        self.task = task or _task(self.config)
        self.tokenizer = self._tokenizer()

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @property
    def positions(self) -> int | None:
        return getattr(self.text_config, "max_position_embeddings", None)

    def length(self, asked: int | None) -> int:
        """The number of tokens at which rows are cut: what was asked for, or the model's own limit, at most 1024."""
        if asked is None:
            limits = (1024, self.positions, getattr(self.tokenizer, "model_max_length", None))
            return min(int(limit) for limit in limits if limit)
        if asked < 2:
            raise ValueError(f"max_length is {asked}: it must be at least 2")
        if self.positions and asked > self.positions:
            raise ValueError(f"max_length is {asked}: the model has {self.positions} positions")
        return asked

    def load(self) -> nn.Module:
        """The model, on the CPU, in eval mode; ValueError where a part of it has no weights in the directory."""
        import transformers
        from safetensors import SafetensorError

        factory = {
            "causal-lm": transformers.AutoModelForCausalLM,
            "classification": transformers.AutoModelForSequenceClassification,
        }[self.task]
        name = "dtype" if _version(transformers) >= (4, 56) else "torch_dtype"
        options = self.options | {name: self.dtype or "auto", "config": self.config, "output_loading_info": True}
        try:
            model, found = factory.from_pretrained(self.folder, **options)
        except (RuntimeError, SafetensorError) as error:  # other shapes than the config's, or a damaged file
            raise ValueError(f"the weights of {str(self.folder)!r} cannot be loaded: {error}") from error
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"model {str(self.folder)!r} has no weights for {missing[0]!r} (of {len(missing)} such parameters) of"
                f" {type(model).__name__}: it must be a trained model for the task {self.task!r}"
            )
        if stray := sorted(found["unexpected_keys"]):
            warnings.warn(
                f"model {str(self.folder)!r} has {stray[0]!r} (of {len(stray)} such weights), which"
                f" {type(model).__name__} does not use: they are left out",
                stacklevel=3,
            )
        with tempfile.TemporaryDirectory() as probe:  # some configs cannot be saved: to be told now, not after hours
            copy.deepcopy(model.config).save_pretrained(probe)
        return model.eval()

    def save(self, model: Any, folder: Path) -> None:
        """Weights as `save_pretrained` writes them; every other file is the directory's own."""
        if model.can_generate():  # the default is always valid; what the directory has is copied
            model.generation_config = type(model.generation_config)()
        model.save_pretrained(folder, max_shard_size=SHARD)
        for path in folder.iterdir():
            if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        copy_other_files(self.folder, folder)
        self._adjust_config(model, folder / "config.json")
        for path in folder.glob("*.safetensors"):  # safetensors lets nobody else read them
            shutil.copymode(folder / "config.json", path)

    def _adjust_config(self, model: nn.Module, file: Path) -> None:
        """transformers would rewrite all of it, in the terms of its own version."""
        config = json.loads(file.read_text("utf-8"))
        changed = config | {"architectures": [type(model).__name__]}
        if self.dtype is not None:
            changed["dtype" if "dtype" in config else "torch_dtype"] = str(self.dtype).removeprefix("torch.")
        if changed != config:
            file.write_text(json.dumps(changed, indent=2) + "\n", "utf-8")

    def _tokenizer(self) -> Any:
        if not any(next(self.folder.glob(pattern), None) for pattern in ("tokenizer*", "vocab*", "*.model")):
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, **self.options)
        except Exception as error:  # tokenizers raises no narrower one
            raise ValueError(f"the tokenizer of {str(self.folder)!r} cannot be loaded: {error}") from error


def _task(config: Any) -> str:
    named = config.architectures or []
    for architecture in named:
        if architecture.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal-lm"
        if architecture.endswith("ForSequenceClassification"):
            return "classification"
    raise ValueError(
        f"config.json names the architecture {', '.join(named) or 'of no model'}: it must be a causal language model or"
        " a sequence classification, or task must say which"
    )


def _version(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])
