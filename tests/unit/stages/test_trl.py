"""TRL as oracle: its sigmoid DPO loss and gradients on one of its own batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_model import VOCABULARY, random_preferences

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

from srcfast.attention.forest_attention import forest_attend  # noqa: E402
from srcfast.config import settings as srcfast_settings  # noqa: E402
from srcfast.data.forest import Forest  # noqa: E402
from srcfast.models.decoder import Decoder, DecoderConfig  # noqa: E402
from srcfast.stages.dpo import PairMeta, pair_denominator, preference_loss  # noqa: E402
from srcfast.stages.pair_trees import pair_logprobs, preference_tree  # noqa: E402
from srcfast.training.items import TrainingItem  # noqa: E402

BETA = 0.3


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    letters = ["<pad>", "<end>", *"abcdefghijklmnop !"]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def as_decoder(model: LlamaForCausalLM) -> Decoder:
    decoder = Decoder(DecoderConfig.from_huggingface(model.config))
    decoder.load_state_dict({name.removeprefix("model."): value for name, value in model.state_dict().items()})
    return decoder


@pytest.mark.parametrize("quality", [0.0, 0.4])
def test_the_loss_and_its_gradients_equal_trl_s_when_all_weights_are_one(quality: float, tmp_path: Path) -> None:
    """With a quality loss it is MPO's without the likelihood, of which TRL takes the mean over the batch's tokens."""
    policy, reference = llama(0), llama(1)
    ours, ours_reference = as_decoder(policy), as_decoder(reference)
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in random_preferences(5)]
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path),
            beta=BETA,
            loss_type=["sigmoid", "bco_pair"] if quality else ["sigmoid"],
            loss_weights=[1.0, quality] if quality else None,
            per_device_train_batch_size=5,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=letter_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    policy.eval()
    expected = trainer.compute_loss(policy, dict(batch))
    expected.backward()

    sequences = []
    for ids, attended, completion in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        kept = attended.bool()
        ids, response = ids[kept].numpy(), completion[kept].bool().numpy()
        sequences.append((ids[~response], ids[response]))
    pairs = len(sequences) // 2
    trees = [
        preference_tree(prompt, chosen, rejected)
        for (prompt, chosen), (_, rejected) in zip(sequences[:pairs], sequences[pairs:], strict=True)
    ]
    assert any(len(tree.segments) == 4 for tree in trees)  # some responses begin alike
    forest = Forest.of(trees)
    hidden = ours(ours.embed(forest.token_ids), forest.positions, forest_attend(forest))
    with torch.no_grad():
        there = ours_reference(ours_reference.embed(forest.token_ids), forest.positions, forest_attend(forest))
        stored = pair_logprobs(there, forest, ours_reference.head)
    items = [
        TrainingItem(tree, PairMeta(1.0, 1.0, float(chosen), float(rejected)))
        for tree, chosen, rejected in zip(trees, *stored, strict=True)
    ]
    loss, metrics = preference_loss(srcfast_settings.DPOConfig(beta=BETA, quality_weight=quality, sft_weight=0.0))(
        hidden, forest, ours.head, items, pair_denominator(items)
    )
    loss.backward()

    assert abs(float(metrics["margin"])) > 0.05  # policy and reference differ, so the loss says something
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = {name.removeprefix("model."): p.grad for name, p in policy.named_parameters()}
    for name, parameter in ours.named_parameters():
        # fp32, sums in another order over padded and packed batches: 1e-4 of the largest entry.
        scale = float(np.abs(theirs[name].numpy()).max())
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=1e-4 * scale)
