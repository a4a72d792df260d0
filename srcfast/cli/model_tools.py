"""The commands that load a model or query PyTorch, but run no stage: merge, inspect, doctor, replay."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from srcfast.attention.forest_attention import available_backends
from srcfast.cli.hub_inputs import from_hub
from srcfast.cli.inputs import Source, check_output, read_all, rejected_records, require_option
from srcfast.cli.table import table
from srcfast.config.settings import Config
from srcfast.data.images import load_image
from srcfast.data.rationale_pairs import build_raps, read_teacher
from srcfast.errors import ConfigError, InputError, SrcfastError, printable
from srcfast.hub.names import model_name
from srcfast.memory.plan import policy_sizes
from srcfast.models.checkpoint import read_config, stored_dtypes
from srcfast.models.embedded import checkpoint_directory
from srcfast.models.lora import merge_lora
from srcfast.models.lvlm import LVLM, is_handwritten, restore_dtypes, save_lvlm
from srcfast.models.pretrained import check_runs
from srcfast.run.environment import environment, version
from srcfast.stages.policy import load_model
from srcfast.stages.replay import replay as rerun_batch
from srcfast.training.items import NotFinite
from srcfast.units import show_bytes
from srcfast_kernels import native
from srcfast_kernels.backends import backend_for
from srcfast_kernels.nf4_linear import why_not_fused
from srcfast_kernels.optional import import_failure


def merge(config: Config, adapter: Path | None, output: Path | None) -> None:
    """Merge an adapter into its base and write the checkpoint, in the base's types unless the settings have a dtype."""
    adapter = require_option(adapter, "--adapter", "the adapter to merge")
    output = require_option(output, "--output", "a folder for the checkpoint")
    check_output(config, output, adapter)
    if config.model.quantize != "none":
        raise ConfigError("model.quantize: expected none (an adapter is merged into whole weights), found nf4")
    config, options = from_hub(config, {"adapter": adapter}, models=["model"], directory=output)
    adapter = options["adapter"]
    dtypes = stored_dtypes(checkpoint_directory(config.model.path, "base"))
    if as_stored := "dtype" not in config.model.model_fields_set:
        widest = str(reduce(torch.promote_types, dtypes.values() or [torch.float32])).removeprefix("torch.")
        config = config.replace(model=config.model.replace(dtype=widest))
    model = load_model(config, adapter)
    count = merge_lora(model)
    save_lvlm(model, output)
    if as_stored and len({*dtypes.values()}) > 1:
        restore_dtypes(output, dtypes)
    print(f"{output}: {count} matrices merged")


def inspect(config: Config, source: Source, index: int) -> None:
    """Print one sample decoded: the prompt, which has no loss, dimmed; the response, which has, in green."""
    config, options = from_hub(config, {"source": source}, models=["model"], data="train")
    with rejected_records(Path(config.output)) as rejected:
        samples = read_all(config, options["source"], "rationale", rejected)
    if index >= len(samples):
        raise ConfigError(f"--index: expected less than {len(samples)} (the number of samples), found {index}")
    sample, teacher = samples[index], config.rationale.teacher
    raps, dropped = build_raps([sample], config.rationale.format, None if teacher is None else read_teacher(teacher))
    response = raps[0][1] if raps else sample.answer
    model = load_model(config, None)
    images = [load_image(sample.image_root, image) for image in sample.images]
    prompt = model.encode_prompt(sample.question, images, sample.id, sample.turns)
    target = model.encode_response(response)
    console = Console(highlight=False, soft_wrap=True)

    def show(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style=style))  # Text: markup in a record stays text

    show(f"sample {sample.id}", "bold")
    for name, image in zip(sample.images, images, strict=True):
        tokens = model.vision.num_tokens(image, len(images))
        show(f"image {name}: {image.width} x {image.height} pixels, {tokens} tokens")
    image_tokens = int((prompt == model.image_token_id).sum())
    show(f"prompt: {len(prompt)} tokens, {image_tokens} of them image tokens; no loss")
    show(_condensed(model, prompt), "dim")
    what = "response" if raps else f"bare answer (no rationale: {', '.join(dropped)})"
    show(f"{what}: {len(target)} tokens; loss on each")
    show(model.tokenizer.decode(target, skip_special_tokens=False), "green")


def _condensed(model: LVLM, prompt: Iterable[int]) -> str:
    """Decode a prompt, and write each run of image tokens as `[<image> x 576]`."""
    parts = []
    for is_image, run in groupby([int(token) for token in prompt], key=lambda token: token == model.image_token_id):
        tokens = list(run)
        text = model.tokenizer.decode(tokens, skip_special_tokens=False)
        parts.append(f"[{model.image_token} x {len(tokens)}]" if is_image else text)
    return "".join(parts)


# Optional packages, and what each adds.
OPTIONAL = {
    "flash-attn": "FlashAttention 2 for forests on NVIDIA GPUs, in place of PyTorch's (pip install wheel packaging ninja psutil; "
    "pip install 'flash-attn>=2.8,<3' --no-build-isolation)",
    "xformers": "one more backend of forest attention, for set_backend('xformers') alone (pip install 'xformers>=0.0.35')",
    "triton": "fused GPU kernels (comes with torch for CUDA)",
    "bitsandbytes": "fused 4-bit products in decoding (pip install 'srcfast[gpu]')",
    "liger-kernel": "a peer in `srcfast bench` (pip install 'srcfast[bench]')",
    "cut-cross-entropy": "a peer in `srcfast bench` (pip install 'srcfast[bench]')",
    "matplotlib": "the plots of reports and benchmarks (pip install 'srcfast[report]')",
    "easy-vqa": "the demo's second dataset (pip install easy-vqa)",
    "num2words": "SmolVLM's processor (pip install 'srcfast[smolvlm]')",
    **{
        name: f"a tracker, for `trackers: [{name}]` (pip install 'srcfast[{name}]')"
        for name in ("tensorboard", "wandb", "trackio", "mlflow")
    },
    "peft": "tests of adapters against PEFT (pip install 'srcfast[test]')",
    "trl": "tests of the loss against TRL (pip install 'srcfast[test]')",
}
SLOWER = "NF4 on the CPU (10 to 20 times), packing of many samples (10 times)"


def unusable() -> dict[str, str]:
    """Import what srcfast uses of the installed optional packages, and return by package why it can't be used."""
    reasons = {
        "flash-attn": import_failure("flash_attn", "flash_attn_varlen_func"),
        "xformers": import_failure("xformers.ops", "memory_efficient_attention"),
        "matplotlib": import_failure("matplotlib.figure", "Figure"),
        # Only decoding on a GPU uses bitsandbytes.
        "bitsandbytes": why_not_fused() if torch.cuda.is_available() else None,
    }
    return {name: reason for name, reason in reasons.items() if reason is not None and version(name) is not None}


def doctor(as_json: bool) -> None:
    """Print versions, backends, missing and unusable packages, and whether the embedded models are installed."""
    report: dict[str, Any] = environment()
    report["attention_backends"] = available_backends()
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    report["kernels"] = {device: backend_for(torch.empty(0, device=device)) for device in devices}
    report["native_library"] = native.why_not() or "loaded"
    report["optional"] = {name: version(name) for name in OPTIONAL}
    report["unusable"] = unusable()
    report["embedded"] = {
        name: (checkpoint_directory("embedded", name) / "config.json").is_file() for name in ("base", "scorer")
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    rows = [
        (name, "none" if value is None else str(value))
        for name, value in report.items()
        if isinstance(value, str | int | None) and name != "native_library"
    ]
    rows.append(("attention backends", ", ".join(report["attention_backends"])))
    rows.append(("kernels", ", ".join(f"{backend} on {device}" for device, backend in report["kernels"].items())))
    rows.append(("native library", report["native_library"] + ("" if native.available() else f"; slower: {SLOWER}")))
    broken = {name: f", can't be used: {reason}" for name, reason in report["unusable"].items()}
    rows += [
        (name, f"missing: {OPTIONAL[name]}" if installed is None else installed + broken.get(name, ""))
        for name, installed in report["optional"].items()
    ]
    rows += [(f"embedded {name}", "present" if present else "missing") for name, present in report["embedded"].items()]
    table("srcfast doctor", rows)


def doctor_model(model: str, as_json: bool) -> None:
    """Print whether a model runs, on which backbone, and what it needs; config and processor are read, weights are not.

    Of a name of the Hub the cache is read, without a request.

    Raises:
        InputError: it does not run, with what it would need, or it was not downloaded.
    """
    path = checkpoint_directory(model, "base")
    if model_name(str(path)) is not None:
        fix = f"srcfast estimate --model {model} downloads its config and processor"
        raise InputError(file=model, expected="a directory, or a repository in the cache", found="neither", fix=fix)
    config = read_config(path)
    handwritten = is_handwritten(config)
    if not handwritten:
        check_runs(config, path)
    report: dict[str, Any] = {
        "model": str(path),
        "family": config.model_type,
        "language_model": config.get_text_config().model_type,
        "backbone": "handwritten" if handwritten else "transformers",
    }
    for quantize in ("none", "nf4"):
        settings = Config.model_validate({"model": {"path": model, "dtype": "bfloat16", "quantize": quantize}})
        sizes = policy_sizes(settings)
        name = "weights_bfloat16" if quantize == "none" else "weights_nf4"
        report[name] = round(sizes.weight_bytes + sizes.quantisation_bytes)
    report["parameters"] = sum(sizes.parameters.values())
    report["image_tokens"] = None if sizes.vision is None else sizes.vision.image_tokens
    if as_json:
        print(json.dumps(report, indent=2))
        return
    shown = report | {name: show_bytes(report[name]) for name in ("weights_bfloat16", "weights_nf4")}
    table(
        "srcfast doctor",
        [
            (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
            for name, value in shown.items()
        ],
    )


def replay(directory: Path) -> None:
    """Run a saved batch again, and print its numbers.

    Raises:
        SrcfastError: its loss or gradient is not finite again.
    """
    try:
        metrics = rerun_batch(directory)
    except NotFinite as error:
        raise SrcfastError(f"reproduced: {error}") from error
    print(
        f"not reproduced: step {metrics['step']} has loss {metrics['loss']:.6g} and gradient norm {metrics['grad_norm']:.6g} "
        "here. Other hardware, kernels or versions may have made the difference"
    )
