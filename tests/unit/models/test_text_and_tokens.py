"""No text becomes, or spells, a control token; no token lies beyond the embedding; no response beyond the model's positions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.families import write_family
from helpers.small_checkpoints import text_config
from transformers import LlamaConfig, Phi3Config, Qwen2Config

from srcfast.config.settings import CandidatesConfig
from srcfast.errors import InputError
from srcfast.generation.beam_search import sentence_beam_search
from srcfast.generation.generate import Prompt, generate_greedy, sample_responses
from srcfast.models import load_lvlm
from srcfast.models.config_bounds import position_limit
from srcfast.models.scorer import load_scorer

ASSETS = Path(__file__).parents[3] / "srcfast" / "world" / "assets"
BACKBONES = pytest.mark.parametrize("backbone", ["handwritten", "transformers"])


def change_json(file: Path, change: Any) -> None:
    settings = json.loads(file.read_text())
    change(settings)
    file.write_text(json.dumps(settings))


def add_token(directory: Path, content: str, number: int) -> None:
    """A token that the tokenizer's file does not declare special."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    change_json(
        directory / "tokenizer.json", lambda it: it["added_tokens"].append({"id": number, "content": content, **plain})
    )


@BACKBONES
def test_no_text_may_spell_an_image_token_that_is_not_declared_special(backbone: str, tmp_path: Path) -> None:
    write_family("llava_llama", tmp_path)
    token = load_lvlm(tmp_path).image_token

    def undeclare(settings: dict[str, Any]) -> None:
        for added in settings["added_tokens"]:
            added["special"] = added["special"] and added["content"] != token

    change_json(tmp_path / "tokenizer.json", undeclare)
    ours = load_lvlm(tmp_path, backbone=backbone)
    prompt = ours.encode_prompt("Is it?", [], "s")
    for text in (token, f"It is {token} there.", f"a{token}{token}b"):
        with pytest.raises(InputError, match=rf"sample 's-7', field 'chosen': expected text without {token}.*Fix"):
            ours.response_tokens(prompt, text, "s-7", "chosen")
        with pytest.raises(InputError, match=r"sample 's-7', field 'question'"):
            ours.encode_prompt(text.replace(token, f"{token[:3]}{token[3:]}") + "</s>", [], "s-7")
        assert ours.image_token_id not in ours.encode_response(text)  # what a model has written stays text
    assert ours.response_tokens(prompt, "It is.", "s", "chosen").tolist() == ours.encode_response("It is.").tolist()


@BACKBONES
def test_tokens_of_other_media_that_the_config_names_are_control_tokens(backbone: str, tmp_path: Path) -> None:
    write_family("llava_llama", tmp_path)
    vocabulary = json.loads((tmp_path / "config.json").read_text())["text_config"]["vocab_size"]
    size = max(added["id"] for added in json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"])
    size = max(size, len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]) - 1)
    assert size + 2 < vocabulary
    add_token(tmp_path, "<clip>", size + 1)
    add_token(tmp_path, "<think>", size + 2)
    change_json(tmp_path / "config.json", lambda settings: settings.update(video_token_id=size + 1))
    ours = load_lvlm(tmp_path, backbone=backbone)
    with pytest.raises(InputError, match="text without <clip>"):
        ours.check_text("a <clip> b")
    assert size + 1 not in ours.encode_response("a <clip> b")
    ours.check_text("<think>a</think>")  # a token like any other
    assert size + 2 in ours.encode_response("<think>a</think>")


@BACKBONES
def test_tokens_beyond_the_embedding_are_refused_by_name(backbone: str, tmp_path: Path) -> None:
    write_family("llava_llama", tmp_path)
    vocabulary = json.loads((tmp_path / "config.json").read_text())["text_config"]["vocab_size"]
    known = len(load_lvlm(tmp_path).tokenizer)
    for number in range(known, vocabulary + 1):  # the tokenizer numbers added tokens without a gap
        add_token(tmp_path, f"<extra{number}>", number)
    ours = load_lvlm(tmp_path, backbone=backbone)
    extra = f"<extra{vocabulary}>"
    with pytest.raises(InputError, match=rf"sample 's', field 'question': expected text without {extra}"):
        ours.encode_prompt(f"Is it {extra}?", [], "s")
    assert max(ours.encode_response(f"It is {extra}.")) < vocabulary
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}" + extra)
    with pytest.raises(InputError, match=rf"field 'tokenizer': expected tokens below {vocabulary}.*found {vocabulary}"):
        load_lvlm(tmp_path, backbone=backbone).encode_prompt("Is it?", [], "s")


def test_an_end_beyond_the_embedding_is_refused_when_the_model_is_loaded(tmp_path: Path) -> None:
    write_family("llava_llama", tmp_path)
    vocabulary = json.loads((tmp_path / "config.json").read_text())["text_config"]["vocab_size"]
    known = len(load_lvlm(tmp_path).tokenizer)
    for number in range(known, vocabulary + 1):
        add_token(tmp_path, f"<extra{number}>", number)
    change_json(tmp_path / "tokenizer_config.json", lambda it: it.update(eos_token=f"<extra{vocabulary}>"))
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}")
    with pytest.raises(InputError, match=rf"field 'tokenizer': expected tokens below {vocabulary}"):
        load_lvlm(tmp_path)


def test_an_r_scorer_s_text_beyond_its_embedding_is_refused_by_name(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(ASSETS / "scorer", tmp_path / "scorer"))
    scorer = load_scorer(directory)
    known, rows = len(scorer.text_model.tokenizer), len(scorer.text_model.decoder.head_weight)
    for number in range(known, rows + 1):
        add_token(directory, f"<extra{number}>", number)
    with pytest.raises(InputError, match=rf"field 'text': expected text of tokens below {rows}"):
        load_scorer(directory).encode(f"It is <extra{rows}>.")


# Positions --------------------------------------------------------------------------------------------------


@BACKBONES
def test_a_response_beyond_the_last_position_is_refused_and_none_is_generated(backbone: str, tmp_path: Path) -> None:
    write_family("llava_llama", tmp_path)
    change_json(tmp_path / "config.json", lambda it: it["text_config"].update(max_position_embeddings=160))
    ours = load_lvlm(tmp_path, backbone=backbone)
    prompt = ours.encode_prompt("Is it?", [], "s")
    room = 160 - len(prompt)
    fits = "x " * 200
    while len(ours.encode_response(fits)) > room:
        fits = fits[:-1]
    assert len(ours.response_tokens(prompt, fits, "s", "response")) == room
    with pytest.raises(
        InputError, match=r"sample 's-7', field 'chosen': expected at most 160 tokens of prompt and response"
    ):
        ours.response_tokens(prompt, fits + " x x", "s-7", "chosen")
    response = np.full(room + 1, ours.end_token_id)
    ours.check_room(prompt, "s-7", response[:room])
    with pytest.raises(InputError, match="expected at most 160 tokens of prompt and response, .* found 161 tokens"):
        ours.check_room(prompt, "s-7", response)
    ours.end_tokens = frozenset()  # so that nothing but the limit ends a response
    given = Prompt(prompt, (), "s")
    (greedy,) = generate_greedy(ours, [given], lambda keys: {}, 200, 2)
    assert len(greedy.token_ids) == room
    (sampled,) = sample_responses(ours, [given], lambda keys: {}, count=2, max_new_tokens=200, seed=3)
    assert [len(response.token_ids) for response in sampled] == [room, room]
    runs = []
    for most in (200, room):  # the limit of the positions is as that of the settings
        settings = CandidatesConfig(
            num_beams=2, proposals=2, max_new_tokens=most, max_sentence_tokens=9, max_sentences=100
        )
        runs.append(sentence_beam_search(ours, [given], lambda keys: {}, settings, 3))
    assert runs[0] == runs[1] and runs[0][0] == [[]]


def test_candidates_beyond_the_r_scorer_s_positions_are_refused_by_name(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(ASSETS / "scorer", tmp_path / "scorer"))
    change_json(directory / "config.json", lambda it: it.update(max_position_embeddings=60))
    scorer = load_scorer(directory)
    short = scorer.judge_tree("Q\n", ["a", "b"], key="s-7").tree  # root, two firsts, a second under each
    assert max(short.segments[0].tokens.size + 2 * one.tokens.size for one in short.segments[1:]) <= 60
    with pytest.raises(InputError, match=r"sample 's-7', field 'candidates': expected at most 60 tokens"):
        scorer.judge_tree("Q\n", ["a", "red " * 60], key="s-7")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
TINY = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (LlamaConfig(max_position_embeddings=4096, rope_scaling={"rope_type": "linear", "factor": 4.0}), 16384),
        (Qwen2Config(max_position_embeddings=32768, rope_scaling=YARN), 131072),
        (Qwen2Config(max_position_embeddings=131072, rope_scaling=YARN), 131072),
        (LlamaConfig(max_position_embeddings=131072, rope_scaling=LLAMA3 | {"original_max_position_embeddings": 8192}), 131072),
        (LlamaConfig(max_position_embeddings=4096, rope_scaling={"rope_type": "dynamic", "factor": 4.0}), 4096),
        (Phi3Config(max_position_embeddings=131072, original_max_position_embeddings=4096, rope_scaling=LONG, **TINY), 4096),
        (text_config("mistral", sliding_window=16), text_config("mistral").max_position_embeddings),
        (object(), 1 << 28),  # of a recurrent model, say, that names none
    ],
)  # fmt: skip
def test_positions_that_a_config_names(config: Any, expected: int) -> None:
    assert position_limit(config) == expected
