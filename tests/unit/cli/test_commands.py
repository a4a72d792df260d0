"""The commands through the command line, on a tiny random LLaVA checkpoint."""

from __future__ import annotations

import importlib
import json
import math
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from helpers.made_rows import preference_rows, sentence, write_rows
from PIL import Image
from safetensors.torch import load_file

from srcfast.cli.inputs import Source, read_preference_file
from srcfast.config.settings import Config
from srcfast.data.jsonl import write_shards
from srcfast.errors import InputError

Srcfast = Callable[..., Result]


def test_help_is_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "srcfast", "--help"], capture_output=True, text=True, check=True)
    assert "calibrate" in done.stdout and "doctor" in done.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, which a busy machine stretches less. It is 0.2 s; importing torch alone would add 1 s.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'pydantic', 'numpy'}"
    code = f"import sys, srcfast.cli.app; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_logprob_is_what_transformers_computes(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path
) -> None:
    transformers = importlib.import_module("transformers")
    rng = random.Random(5)
    rows = [
        {"images": [name], "prompt": prompt, "response": sentence(rng, rng.randint(1, 11))}
        for name, prompt in (
            ("a.png", "what color"),
            ("b.png", "how many"),
            ("a.png", "what color"),
            ("c.png", "is it red"),
        )
    ]
    rows.append({"images": [], "prompt": "no image here", "response": "yes"})
    out = tmp_path / "out.jsonl"
    data = write_rows(tmp_path / "in.jsonl", rows)
    result = srcfast(
        "logprob",
        "--model",
        model_dir,
        "--data",
        data,
        "--image-root",
        image_root,
        "--output",
        out,
        "token_budget=128",
    )
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in out.read_text().splitlines()]
    model = transformers.LlavaForConditionalGeneration.from_pretrained(model_dir).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    # From its module: transformers 5.17 says of the package's that it needs torchvision.
    automatic = importlib.import_module("transformers.models.auto.image_processing_auto").AutoImageProcessor
    processor = automatic.from_pretrained(model_dir, backend="pil")
    for row, mine in zip(rows, found, strict=True):
        content = [{"type": "image"} for _ in row["images"]] + [{"type": "text", "text": row["prompt"]}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text.replace("<image>", "<image>" * 36)).input_ids  # (72 / 12)^2 patches
        response = [*tokenizer(row["response"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *response]])
        pixels = {}
        if row["images"]:
            image = Image.open(image_root / row["images"][0]).convert("RGB")
            pixels = {"pixel_values": processor(images=image, return_tensors="pt")["pixel_values"]}
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits[0].log_softmax(-1)
        start = len(prompt)
        expected = sum(float(logits[start + n - 1, token]) for n, token in enumerate(response))
        assert mine["tokens"] == len(response)
        assert mine["logprob"] == pytest.approx(expected, rel=1e-4)  # fp32, another order of summation


def run_dpo(srcfast: Srcfast, model: Path, data: Path, images: Path, out: Path, *words: str) -> dict[str, torch.Tensor]:
    common = ("beta=0.2", "lora.r=4", "lora.alpha=8", "learning_rate=3e-3", "epochs=2", "seed=7", "--quiet")
    result = srcfast("dpo", "--model", model, "--data", data, "--image-root", images, "--output", out, *common, *words)
    assert result.exit_code == 0, result.output
    return load_file(out / "adapter_model.safetensors")


def test_dpo_gives_the_same_adapter_however_the_batch_is_cut(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows(7, seed=1))
    cuts = ((4, 1, 4096), (1, 4, 121), (2, 2, 300), (4, 1, 130))
    adapters = [
        run_dpo(
            srcfast, model_dir, data, image_root, tmp_path / f"out{n}",
            f"micro_batch_size={micro}", f"gradient_accumulation_steps={steps}", f"token_budget={budget}",
        )
        for n, (micro, steps, budget) in enumerate(cuts)
    ]  # fmt: skip
    moved = max(float(tensor.abs().max()) for name, tensor in adapters[0].items() if "lora_B" in name)
    assert moved > 1e-3  # B begins at zero: the training did something
    for other in adapters[1:]:
        assert other.keys() == adapters[0].keys()
        for name, tensor in adapters[0].items():
            # fp32 rounding through AdamW, which scales small gradients up: far below a step of 3e-3
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=5e-5)


def test_dpo_writes_adapter_metrics_and_summary_and_starts_at_ln_2(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows(5, seed=2))
    run_dpo(
        srcfast,
        model_dir,
        data,
        image_root,
        out,
        "sft_weight=0",
        "micro_batch_size=5",
        "gradient_accumulation_steps=1",
    )
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    assert metrics[0]["loss"] == pytest.approx(0.6931472, rel=1e-5)
    assert metrics[1]["loss"] < metrics[0]["loss"]
    assert (summary["pairs"], summary["references_computed"], summary["steps"]) == (5, 5, len(metrics))


def test_dpo_of_a_model_in_four_bits_starts_at_ln_2_and_goes_down(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows(5, seed=2))
    settings = ("sft_weight=0", "micro_batch_size=5", "gradient_accumulation_steps=1", "model.quantize=nf4")
    run_dpo(srcfast, model_dir, data, image_root, tmp_path / "out", *settings)
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["loss"] == pytest.approx(0.6931472, rel=1e-5)
    assert metrics[1]["loss"] < metrics[0]["loss"]


def test_dpo_refuses_a_reference_that_is_not_the_policy(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path
) -> None:
    rows = [
        row | {"reference_chosen_logprob": -1.0, "reference_rejected_logprob": -2.0}
        for row in preference_rows(3, seed=3)
    ]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    words = (
        "dpo",
        "--model",
        model_dir,
        "--data",
        data,
        "--image-root",
        image_root,
        "--output",
        tmp_path / "out",
        "--quiet",
    )
    result = srcfast(*words)
    assert result.exit_code == 1
    assert "policy must equal its reference" in result.output
    write_rows(data, [row | {"reference_hash": "another"} for row in rows])
    result = srcfast(*words)
    assert result.exit_code == 2
    assert "'reference_hash'" in result.output and "those of another" in result.output
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_merged_checkpoint_answers_as_base_and_adapter_do(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path
) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", preference_rows(4, seed=4))
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    run_dpo(srcfast, model_dir, pairs, image_root, adapter)
    assert srcfast("merge", "--model", model_dir, "--adapter", adapter, "--output", merged).exit_code == 0
    rows = [{"images": ["b.png"], "prompt": "what is it", "response": "the red circle"}]
    data = write_rows(tmp_path / "in.jsonl", rows)
    found = []
    for name, words in (("both", ("--model", model_dir, "--adapter", adapter)), ("one", ("--model", merged))):
        out = tmp_path / f"{name}.jsonl"
        result = srcfast("logprob", *words, "--data", data, "--image-root", image_root, "--output", out, "--quiet")
        assert result.exit_code == 0, result.output
        found.append(json.loads(out.read_text())["logprob"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # fp32 rounding of the merged weights


def test_bad_logprob_line_is_named_and_nothing_is_written(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path
) -> None:
    rows = [{"images": [], "prompt": "a", "response": "b"}, {"images": [], "prompt": "a"}]
    data, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    result = srcfast("logprob", "--model", model_dir, "--data", data, "--image-root", image_root, "--output", out)
    assert result.exit_code == 2
    for word in ("in.jsonl", "line 2", "'response'", "expected", "found"):
        assert word in result.output
    assert "Traceback" not in result.output and not out.exists()


@pytest.mark.parametrize("output", [".", "/", "", ".."])
def test_logprob_refuses_a_folder_as_its_output_before_anything_is_read(srcfast: Srcfast, output: str) -> None:
    result = srcfast("logprob", "--model", "no-such-model", "--data", "no-such-file.jsonl", "--output", output)
    assert result.exit_code == 2
    assert "--output" in result.output and "folder" in result.output and "no-such" not in result.output


def test_unknown_setting_ends_with_status_2_and_the_nearest_known(srcfast: Srcfast, tmp_path: Path) -> None:
    result = srcfast("dpo", "--data", tmp_path / "x.jsonl", "--output", tmp_path, "betta=1")
    assert result.exit_code == 2
    assert "'dpo.beta'" in result.output and "Traceback" not in result.output


def test_rehearsal_is_refused_where_there_is_nothing_to_rehearse(srcfast: Srcfast, tmp_path: Path) -> None:
    result = srcfast("dpo", "--data", tmp_path / "x.jsonl", "--output", tmp_path, "rehearsal_weight=1")
    assert result.exit_code != 0
    assert "dpo.rehearsal_weight" in result.output and "Traceback" not in result.output


def test_two_config_files_are_refused(srcfast: Srcfast) -> None:
    result = srcfast("calibrate", "a.yaml", "b.yaml")
    assert result.exit_code == 2
    assert "a.yaml and b.yaml" in result.output


def test_inspect_shows_prompt_response_and_counts(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path
) -> None:
    from srcfast.models import load_lvlm

    row = {
        "id": "s1",
        "images": ["b.png"],
        "question": "what color is [red]it[/red]",
        "answer": "red",
        "facts": ["It is red."],
    }
    data = write_rows(tmp_path / "in.jsonl", [row, row | {"id": "s2"}])
    words = ("inspect", "--model", model_dir, "--data", data, "--image-root", image_root)
    result = srcfast(*words, "--index", 1)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "sample s2" in text and "50 x 91 pixels, 36 tokens" in text and "[<image> x 36]" in text
    assert "[red]it[/red]" in text  # a record's markup is text
    response = "<see> It is red. </see> <answer> red </answer>"
    count = len(load_lvlm(model_dir).encode_response(response))
    assert f"response: {count} tokens; loss on each" in text
    assert srcfast(*words, "--index", 2).exit_code == 2


def test_doctor_tells_versions_backends_and_what_is_missing(srcfast: Srcfast) -> None:
    result = srcfast("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["torch"] == torch.__version__
    assert {"blocks", "reference"} <= set(found["attention_backends"])
    table = srcfast("doctor").output
    for name, version in found["optional"].items():
        assert name in table and (version or "missing") in table


def test_doctor_counts_the_bytes_of_a_model_s_weights(srcfast: Srcfast, model_dir: Path) -> None:
    """In 4 bits: half a byte a weight of a decoder's linears, a byte each 64, four each 256 of these, and four."""
    result = srcfast("doctor", model_dir, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    halves = fours = count = 0
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        n = tensor.numel()
        count, halves = count + n, halves + 2 * n
        blocks = math.ceil(n / 64)
        is_linear = "language_model" in name and name.endswith("_proj.weight")
        fours += math.ceil(n / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 if is_linear else 2 * n
    assert (found["parameters"], found["weights_bfloat16"], found["weights_nf4"]) == (count, halves, fours)
    assert fours < halves and found["family"] == "llava" and found["backbone"] == "handwritten"
    assert f"{count:,}" in srcfast("doctor", model_dir).output


def test_stages_hand_their_files_on(srcfast: Srcfast, model_dir: Path, tmp_path: Path) -> None:
    from srcfast.world.samples import world_samples

    images = tmp_path / "images"
    samples = world_samples("train", 9, 5, image_dir=images)
    data = write_rows(tmp_path / "samples.jsonl", [sample.to_json() for sample in samples])
    common = ("--data", data, "--image-root", images, "--quiet")

    def run(name: str, *words: object) -> None:
        result = srcfast(name, *common, *words)
        assert result.exit_code == 0, result.output

    adapter, results = tmp_path / "adapter", tmp_path / "results"
    run("rationale", "--model", model_dir, "--output", adapter, "lora.r=2", "epochs=8", "learning_rate=3e-3")
    metrics = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    run("evaluate", "--model", model_dir, "--adapter", adapter, "--output", results, "max_new_tokens=3")
    (entry,) = json.loads((results / "summary.json").read_text())["evaluations"]
    assert (entry["n"], entry["dataset"], entry["split"]) == (9, "samples", "test")
    rows = [json.loads(line) for line in (results / "predictions" / "samples-test.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [sample.id for sample in samples]
    assert sum(row["right"] for row in rows) / 9 == pytest.approx(entry["accuracy"])

    found, pairs = tmp_path / "candidates" / "00000.jsonl", tmp_path / "pairs"
    found.parent.mkdir()
    answers = (sample.answer if number else "nothing" for sample in samples for number in range(2))
    write_rows(
        found,
        [
            {"id": f"c{n}", "sample_id": samples[n // 2].id, "logprob": -1.0}
            | {"text": f"<see> It is {n}. </see> <answer> {answer} </answer>"}
            for n, answer in enumerate(answers)
        ],
    )
    (found.parent / "COMPLETE").write_text('{"rows": 18, "shards": 1}')
    run("curate", "--candidates", found.parent, "--output", pairs, "pairing=answer")
    chosen = [json.loads(line) for line in (pairs / "00000.jsonl").read_text().splitlines()]
    assert [row["chosen"].split()[-2] for row in chosen] != ["nothing"] * len(chosen)
    assert all("nothing" in row["rejected"] for row in chosen) and len(chosen) == 9
    out = tmp_path / "tuned"
    words = (
        "--model",
        model_dir,
        "--adapter",
        adapter,
        "--data",
        pairs,
        "--output",
        out,
        "--quiet",
        "learning_rate=1e-3",
    )
    assert srcfast("dpo", *words).exit_code == 0
    assert json.loads((out / "summary.json").read_text())["pairs"] == 9


def test_curated_pairs_are_read_with_another_image_root_once_their_own_is_gone(tmp_path: Path) -> None:
    row = {"sample_id": "s", "images": ["a.png"], "prompt": "what", "chosen": "red", "rejected": "blue"}
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    write_shards(tmp_path / "pairs", [row | {"image_root": str(old)}])

    def root_given(root: Path | None) -> Path:
        (pair,) = read_preference_file(Config(), Source(tmp_path / "pairs", None, root), [])
        return pair.image_root

    assert root_given(None) == root_given(tmp_path) == old
    with pytest.raises(InputError, match="image_root"):  # there, and outside
        root_given(new)
    old.rename(new)
    assert root_given(new) == new
    assert root_given(None) == old  # which the first image then names


def test_one_image_root_stands_for_no_more_than_one_that_is_gone(tmp_path: Path) -> None:
    row = {"sample_id": "s", "images": ["a.png"], "prompt": "what", "chosen": "red", "rejected": "blue"}
    old, other, new = tmp_path / "old", tmp_path / "other", tmp_path / "new"
    new.mkdir()
    source = Source(tmp_path / "pairs", None, new)
    write_shards(source.data or Path(), [row | {"image_root": str(root)} for root in (old, other)])
    with pytest.raises(InputError, match="line 1.*image_root") as found:
        read_preference_file(Config(), source, [])
    assert f"{old}, {other}" in str(found.value)
    write_shards(source.data or Path(), [row | {"image_root": str(old)}] * 2)
    assert [pair.image_root for pair in read_preference_file(Config(), source, [])] == [new, new]


def test_convert_sets_bad_records_aside(srcfast: Srcfast, image_root: Path, tmp_path: Path) -> None:
    rows = [{"id": "1", "image": "a.png", "question": "Why?", "answer": "so"}, {"id": "2", "question": "How?"}]
    data = write_rows(tmp_path / "in.jsonl", rows)
    done = srcfast("convert", data, tmp_path / "out.json", "--image-root", image_root)
    assert done.exit_code == 0, done.output
    assert "1 records, 1 rejected" in done.output
    assert [row["id"] for row in json.loads((tmp_path / "out.json").read_text())] == ["1"]
    (rejected,) = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert (rejected["line"], rejected["field"]) == (2, "answer")


def test_convert_without_a_good_record_still_says_what_is_wrong_with_each(
    srcfast: Srcfast, image_root: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "in.jsonl", [{"id": "1", "question": "Why?"}, {"id": "2", "answer": "so"}])
    done = srcfast("convert", data, tmp_path / "out.json", "--image-root", image_root)
    assert done.exit_code == 2 and not (tmp_path / "out.json").exists()
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["field"]) for row in rejected] == [(1, "answer"), (2, "question")]
