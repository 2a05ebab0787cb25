"""SSD on a model directory of transformers and on files of rows: what `unlearn_fast ssd` runs."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unlearn_fast._report import DampenReport
from unlearn_fast.fisher import Importance, causal_lm_losses, classification_losses, diagonal_fisher
from unlearn_fast.integrations.batches import Batches, unused_ending
from unlearn_fast.integrations.directories import appearing, check_new_directory, check_writable
from unlearn_fast.integrations.pretrained import Pretrained
from unlearn_fast.integrations.rows import DATA_FILES, CausalRows, ClassificationRows, Encode, Example, read_examples
from unlearn_fast.ops.dampen import check_settings
from unlearn_fast.ssd import ssd_

Name = str | os.PathLike[str]
IMPORTANCES = ".safetensors"


def ssd(
    model_dir: Name,
    forget: Name,
    reference: Name,
    out: Name | None = None,
    *,
    alpha: float,
    lam: float = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
    floor: float = 0.0,
    task: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    save_importances: Name | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> DampenReport:
    """Makes a model directory of transformers forget, into a new directory: importances of both sets, `ssd_`, saving.

    The model is a causal language model, measured by `causal_lm_losses`, or a sequence classification, measured by
    `classification_losses`. Everything that can be checked is checked before the measuring; nothing is downloaded.

    Rows of a causal language model:
        {"text"}: all of it is supervised.
        {"prompt", "completion"}, joined as they are, or {"question", "answer"}, joined by a space: the completion and
            the end of the sequence are supervised.
        {"messages": [{"role", "content"}, ...]}, through the chat template: the assistant's turns are supervised where
            the template marks them (`{% generation %}`), else the last of them.
        {"input_ids", "labels"}: labels that are not -100 are supervised; without labels, all.
    Rows of a classification: {"text", "label"}, {"sentence", "label"} or {"input_ids", "label"}, the label an integer.

    Args:
        model_dir: a local directory with config.json, weights and tokenizer. It is only read.
        forget, reference: a .jsonl or .parquet file of rows, or a .safetensors file that `Importance.save` wrote. The
            reference set is the full training set (released code) or the retained set only (most later work).
        out: the directory that appears, complete or not at all, with the dampened weights as safetensors and the other
            files of `model_dir` (no data, no training states). None: a dry run, which only reports.
        alpha, lam, exponent, cap, floor: see `ssd_`.
        task: "causal-lm" or "classification"; None: told from the `architectures` of config.json.
        batch_size: changes time and memory, not the result.
        max_length: rows are cut at so many tokens, with a warning. None: the model's own limit, at most 1024.
        device: "cpu", "cuda", or any of torch's.
        dtype: "float32", "bfloat16", or "auto", as the weights are stored: in which the model is loaded, measured,
            dampened and saved.
        save_importances: a directory for forget.safetensors and reference.safetensors, each written as soon as it is
            measured (in a dry run too); both can be given again, for other alphas.
        trust_remote_code: run the code that lies in `model_dir`, for models that transformers itself does not know.
        progress: show progress bars.

    Returns:
        A `DampenReport`.

    Raises:
        ImportError: transformers (or pyarrow, for .parquet) is not installed.
        OSError, TypeError, ValueError: an argument, a file or a row does not fit; `out` does then not exist.

    Warns:
        UserWarning: rows were cut; and all that `ssd_` warns of.
    """
    check_settings(alpha, lam, exponent, cap, floor)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    files = {"forget": Path(forget), "reference": Path(reference)}
    _check_files(files)
    target = None if out is None else Path(out)
    if target is not None:
        check_new_directory(target, Path(model_dir))
    to_save = _files_to_save(files, save_importances, apart_from={"out": target, "model_dir": Path(model_dir)})
    place = _device(device)

    pretrained = Pretrained(Path(model_dir), task, dtype, trust_remote_code)
    encode = _encoder(pretrained, max_length)
    sets = {name: _read(file, encode) for name, file in files.items()}
    model = pretrained.load()
    ready = {name: given for name, given in sets.items() if isinstance(given, Importance)}
    for name, importance in ready.items():
        mode = "per_example" if len(ready) < len(sets) else importance.mode
        _check_importance(files[name], importance, model, mode)
    if target is not None:
        _check_space(target, model)
    model.to(place)

    losses = causal_lm_losses if pretrained.task == "causal-lm" else classification_losses
    pad = _padding(pretrained, model, [given for given in sets.values() if not isinstance(given, Importance)])
    importances: dict[str, Importance] = {}
    for name, given in sets.items():
        if not isinstance(given, Importance):
            given = diagonal_fisher(model, Batches(given, batch_size, pad), losses, progress=progress)
            if name in to_save:
                to_save[name].parent.mkdir(exist_ok=True)
                given.save(to_save[name])
        importances[name] = given
    f, r = importances["forget"], importances["reference"]
    report = ssd_(model, forget=f, reference=r, alpha=alpha, lam=lam, exponent=exponent, cap=cap, floor=floor)
    if target is not None:
        with appearing(target) as folder:
            pretrained.save(model, folder)
    return report


def _check_files(files: dict[str, Path]) -> None:
    for name, file in files.items():
        if file.suffix not in (*DATA_FILES, IMPORTANCES):
            kinds = ", ".join((*DATA_FILES, IMPORTANCES))
            raise ValueError(f"{name} is {str(file)!r}: it must be a file that ends in one of {kinds}")
        if not file.is_file():
            raise FileNotFoundError(f"{name} is {str(file)!r}: there is no such file")


def _files_to_save(files: dict[str, Path], folder: Name | None, apart_from: dict[str, Path | None]) -> dict[str, Path]:
    if folder is None:
        return {}
    for name, other in apart_from.items():
        if other is not None and other.resolve() in (Path(folder).resolve(), *Path(folder).resolve().parents):
            raise ValueError(f"save_importances is {str(folder)!r}: it must be a directory outside of {name}")
    measured = {
        name: Path(folder) / f"{name}{IMPORTANCES}" for name, file in files.items() if file.suffix != IMPORTANCES
    }
    if not measured:
        raise ValueError("save_importances is given where forget and reference are importances: nothing is measured")
    for file in measured.values():
        if file.exists():
            raise FileExistsError(f"save_importances: {str(file)!r} exists: remove it, or give it instead of the rows")
    check_writable(Path(folder) if Path(folder).exists() else Path(folder).parent, "save_importances")
    return measured


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}: it must be 'cpu', 'cuda' or another of torch's") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, and torch {torch.__version__} sees no GPU here")
    return device


def _encoder(pretrained: Pretrained, max_length: int | None) -> Encode:
    length, vocabulary = pretrained.length(max_length), pretrained.text_config.vocab_size
    if pretrained.task == "causal-lm":
        return CausalRows(pretrained.tokenizer, length, vocabulary)
    kind = getattr(pretrained.config, "problem_type", None)
    if kind not in (None, "single_label_classification") or pretrained.config.num_labels < 2:
        raise ValueError(
            "the model classifies by no single label of several: its losses need code of your own and ssd_"
        )
    return ClassificationRows(pretrained.tokenizer, length, vocabulary, pretrained.config.num_labels)


def _read(file: Path, encode: Encode) -> Importance | list[Example]:
    if file.suffix in DATA_FILES:
        return read_examples(file, encode)
    from safetensors import SafetensorError

    try:
        return Importance.load(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from error


def _check_importance(file: Path, given: Importance, model: nn.Module, mode: str) -> None:
    """What `ssd_` would find only after the other set was measured."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    names = sorted(shapes.keys() | given.keys())
    if wrong := [name for name in names if name not in given or shapes.get(name) != given[name].shape]:
        raise ValueError(f"{file} holds importances of another model: {wrong[0]!r} (of {len(wrong)}) does not fit")
    if given.mode != mode:
        raise ValueError(f"{file} holds importances of mode {given.mode!r}: they must be of mode {mode!r}")


def _check_space(out: Path, model: nn.Module) -> None:
    need = sum(t.numel() * t.element_size() for t in model.parameters())
    if need > (free := shutil.disk_usage(out.parent).free):
        raise OSError(f"out {str(out)!r} needs {need / 1e9:.3g} GB, and there are {free / 1e9:.3g} GB left")


def _padding(pretrained: Pretrained, model: Any, sets: list[list[Example]]) -> int:
    """The token that fills up rows: the model's own, or one that it then takes for its own (what is saved has none)."""
    config, vocabulary = model.config.get_text_config(), pretrained.text_config.vocab_size
    if config.pad_token_id is None or not 0 <= config.pad_token_id < vocabulary:
        config.pad_token_id = unused_ending([example for examples in sets for example in examples], vocabulary)
    return config.pad_token_id
