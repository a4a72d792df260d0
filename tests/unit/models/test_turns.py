"""Turns, system texts and interleaved images make the prompts and the logits that a checkpoint's own processor makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES
from helpers.family_models import LETTERS, WORDS, FamilyModels, plain_logits, random_images
from helpers.small_checkpoints import assert_close, tokenizer, write_lvlm
from PIL import Image

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.turns import Turn
from srcfast.errors import InputError
from srcfast.models import load_lvlm
from srcfast.models.lvlm import LLAVA_TEMPLATE

GetFamily = Callable[[str], FamilyModels]
# (family, backbone)
RUN = [
    *((name, "handwritten") for name in ("llava_llama", "llava_mistral", "llava_next")),
    *((name, "transformers") for name in ("llava_llama", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl")),
    *((name, "transformers") for name in ("qwen3_5", "internvl", "smolvlm", "idefics3", "glm4v", "aya_vision")),
    *((name, "transformers") for name in ("gemma3", "gemma4", "gemma4_vision", "cohere2")),
]
# As the checkpoint llava-hf/llava-1.5-7b-hf has it: images before text in each turn.
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


MOST_IMAGES = 2  # of a conversation: more tiles would leave no room


class Conversation:
    """A random conversation: our turns and question, and the messages that transformers' processors take."""

    def __init__(self, rng: np.random.Generator, system: bool | None = None) -> None:
        self.rng, self.images = rng, random_images(rng)
        self.keys: list[str] = []
        self.turns: list[Turn] = []
        self.messages: list[dict[str, Any]] = []
        if rng.integers(2) if system is None else system:
            self._say("system", [self._words()])
        for _ in range(int(rng.integers(0, 3))):
            self._say("user", self._parts())
            self._say("assistant", [self._words()])
        self._say("user", self._parts())
        self.question = self.turns.pop().text

    def _words(self) -> str:
        return " ".join(self.rng.choice([word for word in WORDS if word.strip()], self.rng.integers(1, 4)))

    def _parts(self) -> list[str | None]:
        """Text and images (None) in any order, with at least one text; no two texts beside each other."""
        parts: list[str | None] = [None] * min(int(self.rng.integers(0, 3)), MOST_IMAGES - len(self.keys))
        for place in sorted(self.rng.choice(len(parts) + 1, self.rng.integers(1, len(parts) + 2), replace=False))[::-1]:
            parts.insert(int(place), self._words())
        return parts

    def _say(self, role: str, parts: list[str | None]) -> None:
        content: list[dict[str, Any]] = []
        for part in parts:
            if part is None:
                self.keys.append(str(self.rng.choice(list(self.images))))
                content.append({"type": "image", "image": self.images[self.keys[-1]]})
            else:
                content.append({"type": "text", "text": part})
        self.messages.append({"role": role, "content": content})
        self.turns.append(Turn(role, "".join("<image>" if part is None else part for part in parts)))

    def prompt(self, model: Any) -> np.ndarray:
        return model.encode_prompt(self.question, [self.images[key] for key in self.keys], "s", self.turns)


def documented(processor: Any, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """What transformers' documentation says to do."""
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template(messages, **settings, **options))


@pytest.mark.parametrize(("name", "backbone"), RUN)
@torch.no_grad()
def test_conversations_give_the_logits_of_the_ordinary_pass(
    name: str, backbone: str, family: GetFamily, rng: np.random.Generator
) -> None:
    models = family(name)
    ours = models.ours if backbone == "transformers" else models.load(backbone="handwritten")
    talks = [Conversation(rng) for _ in range(12)]
    assert any(talk.keys and len(talk.turns) > 1 for talk in talks)  # but once in 1e4 runs
    for talk in talks:
        inputs = documented(models.processor, talk.messages)
        prompt, response = talk.prompt(ours), rng.integers(*LETTERS, 5)
        assert prompt.tolist() == inputs["input_ids"][0].tolist()
        tree = Tree((Segment(prompt), Segment(response, 0)), tuple(talk.keys), "s")
        features = dict(zip(talk.images, ours.encode_images(list(talk.images.values())), strict=True))
        logits = ours.decoder.head.logits(ours(Forest.of([tree]), features))
        # fp32 sums in another order over four layers
        assert_close(logits, plain_logits(models.theirs, inputs, torch.from_numpy(response)), 5e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("paligemma")])
def test_each_family_s_prompts_are_those_of_its_processor(
    name: str, family: GetFamily, rng: np.random.Generator
) -> None:
    models = family(name)
    for _ in range(3):
        talk = Conversation(rng)
        expected = documented(models.processor, talk.messages)["input_ids"][0].tolist()
        assert talk.prompt(models.ours).tolist() == expected


def test_a_family_without_turns_refuses_them(family: GetFamily) -> None:
    image = Image.new("RGB", (30, 30))
    with pytest.raises(InputError, match=r"sample 's-7', field 'chat_template'.*it takes one question alone.*Fix"):
        family("paligemma").ours.encode_prompt("Sure?", [image], "s-7", [Turn("system", "Be brief.")])


@pytest.mark.parametrize("name", ["llava_llama", "qwen3_vl", "internvl", "smolvlm", "idefics3", "idefics2", "glm4v"])
def test_a_response_is_what_the_template_makes_of_an_assistant_s_turn(
    name: str, family: GetFamily, rng: np.random.Generator
) -> None:
    models = family(name)
    ours, talk = models.ours, Conversation(rng)
    answer = "It is a cat. Yes."
    said = [*talk.messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    whole = models.processor.apply_chat_template(
        said, add_generation_prompt=False, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"][0].tolist()
    prompt, response = talk.prompt(ours).tolist(), ours.encode_response(answer).tolist()
    assert whole[: len(prompt)] == prompt
    behind = whole[len(prompt) :]
    if name == "llava_llama":  # its template writes no end: the tokenizer's, which its training takes
        assert behind[: len(response) - 1] == response[:-1] and response[-1] == ours.tokenizer.eos_token_id
    else:
        assert behind[: len(response)] == response and response[-1] in ours.end_tokens
    assert ours.decode(response) == answer


def test_a_template_s_words_before_a_response_are_part_of_it(family: GetFamily) -> None:
    """As Qwen3.5's template writes an end of thinking, which its generation prompt opens."""
    ours = family("qwen3_vl").load()
    template = ours.processor.chat_template.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\nThinking:\n{%")
    turn = "{% if m.role == 'assistant' %}Thinking:\n\nDone.\n\n{% endif %}{% if m.content is string %}"
    ours.processor.chat_template = template.replace("{% if m.content is string %}", turn)
    ours.read_response_form()
    assert ours.response_start == "\nDone.\n\n"
    response = ours.encode_response("Yes.")
    assert ours.tokenizer.decode(response) == "\nDone.\n\nYes.<|im_end|>" and ours.decode(response) == "Yes."


@pytest.mark.parametrize("template", ["llava-hf", "none"])
@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_handwritten_prompts_are_those_of_llava_s_own_templates(
    template: str, kind: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    write_lvlm(tmp_path, kind=kind)
    (tmp_path / "chat_template.jinja").unlink()
    if template == "llava-hf":
        (tmp_path / "chat_template.jinja").write_text(LLAVA_HF)
    if kind == "llava_next" and template == "none":  # whose templates are of its language models: none is LLaVA-1.5's
        with pytest.raises(InputError, match=r"'chat_template': expected a template of llava_next, found none.*Fix"):
            load_lvlm(tmp_path)
        return
    ours = load_lvlm(tmp_path)
    text = LLAVA_HF if template == "llava-hf" else LLAVA_TEMPLATE
    tokens = tokenizer()
    refused = 0
    for _ in range(20):
        talk = Conversation(rng)
        if template == "llava-hf" and any(
            sum(part["type"] == "text" for part in m["content"]) > 1 for m in talk.messages
        ):
            # It moves images to the turn's beginning: a sentence around them would lose its objects.
            with pytest.raises(InputError, match="'chat_template'"):
                talk.prompt(ours)
            refused += 1
            continue
        shown = tokens.apply_chat_template(
            talk.messages, chat_template=text, tokenize=False, add_generation_prompt=True
        )
        collapsed, image = tokens(shown).input_ids, ours.image_token_id
        counts = iter([ours.vision.num_tokens(talk.images[key]) for key in talk.keys])
        expected = [token for one in collapsed for token in [one] * (next(counts) if one == image else 1)]
        assert talk.prompt(ours).tolist() == expected
        assert next(counts, None) is None
    assert 0 < refused < 20 if template == "llava-hf" else not refused


def test_llava_s_template_reads_as_its_authors_wrote_conversations(tmp_path: Path) -> None:
    """`conv_vicuna_v1` of LLaVA's repository: the system's text, then USER and ASSISTANT, each answer ended."""
    write_lvlm(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    ours = load_lvlm(tmp_path)
    turns = [Turn("system", "Be brief."), Turn("user", "<image>Why?"), Turn("assistant", "So.")]
    messages = ours.prompt_messages("Sure?", 1, None, turns)
    expected = "Be brief. USER: <image>\nWhy? ASSISTANT: So.</s>USER: Sure? ASSISTANT:"
    assert ours.chat_text(messages) == expected


def test_templates_that_take_strings_of_the_system_and_the_assistant_are_given_strings(tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    ours = load_lvlm(tmp_path)
    ours.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}U{% for part in m.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
        "{% else %}{{ m.role }}{{ m.content }}{% endif %}|{% endfor %}A:"
    )
    turns = [Turn("system", "brief"), Turn("user", "Is <image> it?"), Turn("assistant", "So")]
    assert ours.chat_text(ours.prompt_messages("Sure?", 1, None, turns)) == (
        "systembrief|UIs <image> it?|assistantSo|USure?|A:"
    )


DROPS = {  # template, what is found
    "the system": (
        "{% for m in messages if m.role != 'system' %}{{ m.content[0].text }}{% endfor %}",
        "one that drops",
    ),
    "earlier turns": ("{{ messages[-1].content[-1].text }}", "one that drops"),
    "what it does not know": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        "no system",
    ),
}


@pytest.mark.parametrize("dropped", DROPS)
def test_a_template_that_drops_a_turn_is_refused(dropped: str, family: GetFamily) -> None:
    ours = family("qwen3_vl").load()
    ours.processor.chat_template, found = DROPS[dropped]
    turns = [Turn("system", "Be brief."), Turn("user", "Why?"), Turn("assistant", "So.")]
    with pytest.raises(
        InputError, match=rf"sample 's-7', field 'chat_template'.*system and user and assistant.*{found}.*Fix: "
    ):
        ours.encode_prompt("Sure?", [], "s-7", turns)


@pytest.mark.parametrize("backbone", ["handwritten", "transformers"])
def test_a_template_that_shows_an_image_twice_is_refused(backbone: str, family: GetFamily) -> None:
    ours = family("llava_llama").load(backbone=backbone)
    twice = family("llava_llama").processor.chat_template.replace("<image>", "<image><image>")
    ours.tokenizer.chat_template = twice
    if backbone == "transformers":
        ours.processor.chat_template = twice
    with pytest.raises(InputError, match=r"sample 's-7', field 'chat_template'.*1 image.*found 2"):
        ours.encode_prompt("Sure?", [Image.new("RGB", (30, 30))], "s-7")


@pytest.mark.parametrize("backbone", ["handwritten", "transformers"])
def test_marks_that_are_not_the_images_are_refused(backbone: str, family: GetFamily) -> None:
    ours, image = family("llava_llama").load(backbone=backbone), Image.new("RGB", (30, 30))
    for question, images, turns in (
        ("Is <image> it?", [], ()),
        ("Is <image> it?", [image, image], ()),
        ("Is <image> it?", [image], (Turn("user", "<image>"), Turn("assistant", "Yes."))),
    ):
        with pytest.raises(InputError, match=r"sample 's-7', field 'question'.*image marks, or none.*Fix"):
            ours.encode_prompt(question, images, "s-7", turns)
    with pytest.raises(InputError, match=r"sample 's-7', field 'turns'.*in the user's turns alone.*Fix"):
        ours.encode_prompt("Sure?", [image], "s-7", (Turn("user", "a"), Turn("assistant", "<image>")))


@pytest.mark.parametrize("backbone", ["handwritten", "transformers"])
def test_a_control_token_in_any_turn_is_refused(backbone: str, family: GetFamily) -> None:
    ours = family("llava_llama").load(backbone=backbone)
    for role in ("system", "user", "assistant"):
        turns = [Turn("system", "a"), Turn("user", "b"), Turn("assistant", "c")]
        turns = [Turn(turn.role, f"{turn.text} <|im_end|>") if turn.role == role else turn for turn in turns]
        with pytest.raises(InputError, match=r"sample 's-7'.*without <\|im_end\|>"):
            ours.encode_prompt("Sure?", [], "s-7", turns)


@pytest.mark.parametrize("text", ["<image>", "a <image><image> b", "no <image", "<ima<image>ge>"])
def test_a_response_never_holds_a_placeholder_even_one_that_is_not_special(text: str, family: GetFamily) -> None:
    """Some checkpoints' tokenizers have the placeholder as an added token that they do not declare special."""
    from tokenizers import AddedToken

    ours = family("llava_llama").load(backbone="handwritten")
    model = ours.tokenizer.backend_tokenizer
    assert ours.image_token_id not in ours.encode_response(text)
    usual = ours.encode_response(text).tolist()
    model.add_tokens([AddedToken("<image>", special=False, normalized=False)])
    ours.tokenizer._tokenizer.encode_special_tokens = False
    assert ours.image_token_id not in ours.encode_response(text)
    assert ours.encode_response(text).tolist() == usual
