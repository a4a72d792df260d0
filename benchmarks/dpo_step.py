"""DPO steps on preference pairs of an LVLM: srcfast against TRL's DPOTrainer, from the same adapter, on the same batches.

The same checkpoint, pairs, LoRA and precision; AdamW at a constant rate; the losses must agree. TRL computes the reference
with every step, for it takes no stored ones for images. srcfast finds them stored with the pairs, as curation leaves them;
the implementation `references computed` counts the pass that computes them, for one epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from srcfast.config.settings import TrainingConfig
from srcfast.data.batching import global_batch
from srcfast.data.jsonl import read_jsonl
from srcfast.data.records import Preference
from srcfast_benchmarks.harness import Shape
from srcfast_benchmarks.random_models import (
    LLAVA_7B,
    SMALL,
    SMALL_QWEN3_VL,
    ModelShape,
    processor_of,
    write_model,
    write_records,
)
from srcfast_benchmarks.stage_harness import StageBenchmark, Watch, main

BETA, LEARNING_RATE = 0.1, 1e-3
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES: dict[str, list[Shape]] = {
    "cpu": [
        {"model": "5M", "image_tokens": 64, "batch": 16, "steps": 20, "r": 8, "quantize": "none", "dtype": "float32"},
    ],
    "cuda": [
        {
            "model": "7B",
            "image_tokens": 576,
            "batch": 16,
            "steps": 8,
            "r": 16,
            "quantize": quantize,
            "dtype": "bfloat16",
        }
        for quantize in ("nf4", "none")
    ],
}
MODELS: dict[str, ModelShape] = {"5M": SMALL, "Qwen3-VL 6M": SMALL_QWEN3_VL, "7B": LLAVA_7B}
SHORT, LONG = (9, 59), (127, 255)
RESPONSES = {"5M": SHORT, "Qwen3-VL 6M": SHORT, "7B": LONG}  # words; a token each, and one for the end
BUDGETS = {"5M": 16384, "Qwen3-VL 6M": 16384, "7B": 8192}  # tokens of a forest
GPU_MICRO_BATCH = 4  # of TRL: pairs that fit an 80 GB card


def prepare(shape: Shape, folder: Path, device: str) -> None:
    """The checkpoint, the records, and a new adapter that every implementation starts from."""
    from srcfast.config.settings import LoRAConfig
    from srcfast.models.lora import save_adapter

    model_shape = MODELS[shape["model"]]
    write_model(folder / "model", model_shape, device)
    lora = LoRAConfig(r=shape["r"], alpha=2.0 * shape["r"], target_modules=TARGETS)
    model = load_policy(shape, folder, device, lora)
    save_adapter(model, folder / "adapter")
    count, words = shape["batch"] * shape["steps"], RESPONSES[shape["model"]]
    write_records(folder, model.tokenizer, count, image_side=model_shape.image_size, response_words=words, seed=1)


def load_policy(shape: Shape, folder: Path, device: str, lora: Any = None) -> Any:
    from srcfast.models import load_lvlm

    return load_lvlm(
        folder / "model",
        quantize=None if shape["quantize"] == "none" else shape["quantize"],
        dtype=getattr(torch, shape["dtype"]),
        device=device,
        lora=lora or folder / "adapter",
    )


def settings_of(shape: Shape, checkpointing: int = 0) -> TrainingConfig:
    """srcfast's: a constant rate, a batch a step."""
    return TrainingConfig(
        activation_checkpointing=checkpointing,
        micro_batch_size=shape["batch"],
        token_budget=BUDGETS[shape["model"]],
        learning_rate=LEARNING_RATE,
        warmup_ratio=0.0,
        min_learning_rate_ratio=1.0,
        gradient_accumulation_steps=1,
    )


def in_file_order(records: Sequence[Any], shape: Shape) -> list[Any]:
    """The records rearranged so that srcfast's shuffled loop takes them in the order of the file."""
    settings = settings_of(shape)
    drawn = [index for step in range(shape["steps"]) for index in global_batch(len(records), step, settings)]
    place = {index: number for number, index in enumerate(drawn)}
    return [records[place[index]] for index in range(len(records))]


def read_pairs(folder: Path) -> list[Preference]:
    file, root = folder / "pairs.jsonl", folder / "images"
    return [Preference.from_json(row, file=file, line=line, image_root=root) for line, row in read_jsonl(file)]


def srcfast(
    shape: Shape, folder: Path, device: str, watch: Watch, *, computed: bool = False, checkpointing: int = 0
) -> None:
    from srcfast.config.settings import DPOConfig
    from srcfast.models import ImageFeatures
    from srcfast.stages.dpo import train_preference
    from srcfast.stages.logprobs import reference_logprobs
    from srcfast.stages.prompts import image_loader

    model, settings = load_policy(shape, folder, device), settings_of(shape, checkpointing)
    pairs = in_file_order(read_pairs(folder), shape)
    features = ImageFeatures(model, image_loader(pairs))
    watch.start()
    referenced = {"reference_hash": "start", "token_budget": settings.token_budget}
    pairs = reference_logprobs(model, pairs, features=features, **referenced)
    watch.lap(0)
    seconds = watch.rounds.pop()["seconds"] / shape["steps"]  # of the references, a step
    if not computed:
        seconds, features = 0.0, ImageFeatures(model, features.load)  # nothing encoded yet
        watch.start()

    def on_step(metrics: dict[str, Any]) -> None:
        watch.lap(shape["batch"], metrics["tokens"], metrics["loss"])
        watch.rounds[-1]["seconds"] += seconds

    train_preference(
        model,
        pairs,
        DPOConfig(**settings.model_dump(), beta=BETA, sft_weight=0.0),
        expected_reference_hash="start",
        features=features,
        on_step=on_step,
    )


def trl(shape: Shape, folder: Path, device: str, watch: Watch, **options: Any) -> None:
    """As TRL's documentation has it for LVLMs; `gradient_checkpointing` is its default."""
    from trl import DPOConfig, DPOTrainer

    rows = [
        {
            "images": [str(pair.image_root / name) for name in pair.images],
            "prompt": [{"role": "user", "content": pair.prompt}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in read_pairs(folder)
    ]
    trl_trainer(shape, folder, device, watch, DPOTrainer, DPOConfig, rows, beta=BETA, **options).train()


def trl_trainer(
    shape: Shape,
    folder: Path,
    device: str,
    watch: Watch,
    kind: Any,
    settings: Any,
    rows: list[dict[str, Any]],
    **options: Any,
) -> Any:
    """One of TRL's trainers over these rows, in their order, with the common adapter; it stops the watch after each step."""
    import datasets
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForImageTextToText, TrainerCallback

    class Laps(TrainerCallback):
        tokens = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.start()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" in logs:  # once a step
                watch.lap(shape["batch"], int(logs["num_tokens"]) - self.tokens, float(logs["loss"]))
                self.tokens = int(logs["num_tokens"])

    class InOrder(kind):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset if dataset is None else dataset)

    dtype = getattr(torch, shape["dtype"])
    model_options: dict[str, Any] = {"dtype": dtype, "device_map": device}
    if shape["quantize"] == "nf4":
        from transformers import BitsAndBytesConfig

        model_options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    micro_batch = shape["batch"] if device == "cpu" else GPU_MICRO_BATCH
    trainer = InOrder(
        model=AutoModelForImageTextToText.from_pretrained(folder / "model", **model_options),
        args=settings(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=shape["batch"] // micro_batch,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            num_train_epochs=1,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=device == "cpu",
            bf16=device == "cuda",
            disable_tqdm=True,
            **options,
        ),
        train_dataset=datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image())),
        processing_class=processor_of(folder / "model"),
        peft_config=LoraConfig(
            r=shape["r"],
            lora_alpha=2 * shape["r"],
            target_modules=rf".*language_model\..*({'|'.join(TARGETS)})",
            task_type="CAUSAL_LM",
        ),
        callbacks=[Laps()],
    )
    taken = set_peft_model_state_dict(trainer.model, load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert not taken.unexpected_keys, taken.unexpected_keys
    return trainer


def trl_liger(shape: Shape, folder: Path, device: str, watch: Watch) -> None:
    if device != "cuda":
        raise ImportError("Liger's loss wants a GPU")
    import liger_kernel  # noqa: F401

    trl(shape, folder, device, watch, use_liger_kernel=True)


BENCHMARK = StageBenchmark(
    name="dpo_step",
    unit="pairs",
    shapes=SHAPES,
    prepare=prepare,
    implementations={
        "TRL": trl,
        "TRL, no checkpointing": partial(trl, gradient_checkpointing=False),
        "TRL, Liger": trl_liger,
        "srcfast": srcfast,
        "srcfast, references computed": partial(srcfast, computed=True),
        "srcfast, checkpointing": partial(srcfast, checkpointing=1),  # every layer recomputed, as TRL does by default
    },
    headline="srcfast, references computed",
    warm_up=2,
    tolerance=1e-4,
)

if __name__ == "__main__":
    main(BENCHMARK)
