"""Chat templates: which one is taken, that it shows what it is given, and that it ends, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from helpers.families import FAMILIES, write_family
from helpers.family_models import FamilyModels
from helpers.small_checkpoints import random_image, write_lvlm
from transformers import AutoProcessor, AutoTokenizer

from srcfast.data.turns import Turn
from srcfast.errors import InputError
from srcfast.models import load_lvlm, templates
from srcfast.models.scorer import load_scorer
from srcfast.models.templates import SECONDS, render

ASSETS = Path(__file__).parents[3] / "srcfast" / "world" / "assets"
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
GROWING = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = NEXT %}{% endfor %}{{ ns.x }}"
ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that pass over all": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "a condition that loops": "{% for i in range(99999) if (range(99999)|list|length) == 3 %}{% endfor %}",
    "a macro of itself": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(3) }}",
    "a macro twice in itself": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a recursive loop": "{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "a thousand lists": "{{ range(99999)|map('string')|map('upper')|list|length }}" * 1000,  # more take long to compile
    "a loop over characters": "{% for c in 'a'*9999999 %}{% for d in 'a'*9999999 %}{% endfor %}{% endfor %}",
    "searches of a long text": "{% set x = 'a'*9999999 %}{% for i in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}",
    "ends of a long text": "{% set x = 'a'*9999999 %}{% for i in range(99999) %}{% if x[1:] == 'a' %}{% endif %}{% endfor %}",
}
LARGE = {
    "a text many times": "{{ 'a' * 1000000000 }}",
    "a list many times": "{{ ([1] * 1000000000)|length }}",
    "a number times a text": "{{ 1000000000 * 'ab' }}",
    "texts put together": GROWING.replace("START", "'ab'").replace("NEXT", "ns.x ~ ns.x"),
    "texts added": GROWING.replace("START", "'ab'").replace("NEXT", "ns.x + ns.x"),
    "lists added": GROWING.replace("START", "[1]").replace("NEXT", "ns.x + ns.x"),
    "lists of lists": GROWING.replace("START", "['a' * 999]").replace("NEXT", "[ns.x, ns.x]"),
    "numbers multiplied": GROWING.replace("START", "7").replace("NEXT", "ns.x * ns.x"),
    "replacements": GROWING.replace("START", "'aaaaaaaa'").replace("NEXT", "ns.x.replace('a', ns.x)"),
    "replacements by a filter": GROWING.replace("START", "'aaaaaaaa'").replace("NEXT", "ns.x|replace('a', ns.x)"),
    "joined texts": GROWING.replace("START", "'aaaaaaaa'").replace("NEXT", "ns.x.join(ns.x)"),
    "joined by a filter": GROWING.replace("START", "'aaaaaaaa'").replace("NEXT", "range(9999)|join(ns.x)"),
    "a power": "{{ 10 ** 10 ** 10 }}",
    "a wide number": "{{ '%1000000000d' % 3 }}",
    "a wide format": "{{ '{:1000000000}'.format(3) }}",
    "a wide format by a filter": "{{ '%1000000000d'|format(3) }}",
    "a wide line": "{{ 'a'.ljust(1000000000) }}",
    "a wide line by a filter": "{{ 'a'|center(1000000000) }}",
    "tabs": "{{ '\\t'.expandtabs(1000000000) }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "Latin": "{{ lipsum(n=10000000) }}",
    "indents": "{{ messages|tojson(indent=1000000000) }}",
    "parts": "{{ messages|slice(1000000000)|list }}{{ messages|batch(1000000000, 1)|list }}",
    "a sum of lists": "{{ ([range(99999)|list] * 9999)|sum(start=[])|length }}",
    "text of a loop": "{% for a in range(99999) %}" + "x" * 20_000 + "{% endfor %}",
    "text of a block": "{% for a in range(99999) %}{% set x %}" + "x" * 20_000 + "{% endset %}{{ x }}{% endfor %}",
    "a template of 4 million characters": "x" * (1 << 22),
    "brackets": "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
}  # fmt: skip


@pytest.mark.parametrize("kind", [*ENDLESS, *LARGE])
def test_a_template_ends_in_bounded_time_and_memory(kind: str) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    with pytest.raises(Exception, match=r".") as error:
        render((ENDLESS | LARGE)[kind], MESSAGES, add_generation_prompt=True)
    assert type(error.value) not in (KeyboardInterrupt, SystemExit)
    assert time.process_time() - start < SECONDS + 4  # a pass of a loop, and what the processor does beside it
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss < 500_000  # KiB


def test_the_time_of_other_threads_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.1)
    start = time.process_time()
    busy = Thread(target=lambda: hashlib.pbkdf2_hmac("sha256", b"a", b"b", 1_000_000))  # without the interpreter's lock
    busy.start()
    assert render("{{ wait() }}{% for a in [1] %}done{% endfor %}", MESSAGES, wait=busy.join) == "Nonedone"
    assert time.process_time() - start > 0.1


def test_one_that_never_ends_is_refused_by_name_in_both_models(tmp_path: Path) -> None:
    base = Path(shutil.copytree(ASSETS / "base", tmp_path / "base"))
    (base / "chat_template.jinja").write_text(LARGE["texts put together"])
    with pytest.raises(InputError, match=r"sample 's', field 'chat_template'.*characters"):
        load_lvlm(base).encode_prompt("What is it?", [], "s")
    judge = Path(shutil.copytree(ASSETS / "scorer", tmp_path / "scorer"))
    (judge / "chat_template.jinja").write_text(ENDLESS["loops in loops"])
    with pytest.raises(InputError, match=r"field 'chat_template'.*seconds"):
        load_scorer(judge)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("paligemma")])
def test_families_templates_are_rendered_as_transformers_does(name: str, family: Callable[[str], FamilyModels]) -> None:
    ours = family(name).ours
    template = ours.chat_template or ours.tokenizer.chat_template
    talks = [
        MESSAGES,
        [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "A < B & 'c'."}]}, *MESSAGES],
    ]
    for messages in talks:
        for prompt in (True, False):
            expected = ours.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
            given = {"add_generation_prompt": prompt, **ours.tokenizer.special_tokens_map}
            assert render(template, messages, **given) == expected


# Which template is taken ------------------------------------------------------------------------------------

SHOWN = (
    "{% for m in messages %}NAME:"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}:"
)


def write_templates(directory: Path, *places: str) -> None:
    """A template in each of these places, which says which one it is."""
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    for place in places:
        text = SHOWN.replace("NAME", place)
        if place.endswith(".jinja"):
            (directory / place).parent.mkdir(exist_ok=True)
            (directory / place).write_text(text)
            continue
        file = directory / place
        settings = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(settings | {"chat_template": text}))


@pytest.mark.parametrize(
    "places",
    [
        ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"),
        ("chat_template.json", "chat_template.jinja", "tokenizer_config.json"),
        ("chat_template.jinja", "tokenizer_config.json"),
        ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
        ("tokenizer_config.json",),
    ],
)
@pytest.mark.parametrize("backbone", ["handwritten", "transformers"])
def test_the_template_is_the_one_that_transformers_takes(
    places: tuple[str, ...], backbone: str, tmp_path: Path
) -> None:
    write_family("llava_llama", tmp_path)
    write_templates(tmp_path, *places)
    ours = load_lvlm(tmp_path, backbone=backbone)
    shown = ours.prompt_text("what", 1, None)
    assert shown == f"{places[0]}:<image>what:"
    theirs = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    if places[0] == "tokenizer_config.json":  # which transformers' processors don't read
        assert theirs.chat_template is None
        theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    assert shown == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_templates_that_contradict_each_other_are_refused_as_transformers_refuses_them(tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    write_templates(tmp_path, "chat_template.json", "additional_chat_templates/tool_use.jinja")
    with pytest.raises(InputError, match=r"'chat_template'.*conflicting files"):
        load_lvlm(tmp_path)


@pytest.mark.parametrize("backbone", ["handwritten", "transformers"])
@pytest.mark.parametrize("kind", ["llava_next", "llava_mistral"])
def test_without_a_template_only_llava_1_5_s_own_model_is_loaded(kind: str, backbone: str, tmp_path: Path) -> None:
    FamilyModels(kind, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"'chat_template'.*Fix: "):
        load_lvlm(tmp_path, backbone=backbone)


# What a template shows --------------------------------------------------------------------------------------

PART = "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ TEXT }}{% endif %}{% endfor %}"
CHANGES = {
    "text of a list": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "JSON of a list": "{% for m in messages %}{{ m.content|tojson }}{% endfor %}",
    "images alone": "{% for m in messages %}{% for p in m.content if p.type == 'image' %}<image>{% endfor %}{% endfor %}",
    "a fixed question": "{% for m in messages %}<image>What is it?{% endfor %}",
    "capitals": "{% for m in messages %}" + PART.replace("TEXT", "p.text|upper") + "{% endfor %}",
    "escapes": "{% for m in messages %}" + PART.replace("TEXT", "p.text|e") + "{% endfor %}",
    "one line": "{% for m in messages %}" + PART.replace("TEXT", "p.text.replace('\\n', ' ')") + "{% endfor %}",
    "its beginning": "{% for m in messages %}" + PART.replace("TEXT", "p.text[:9]") + "{% endfor %}",
    "it twice": "{% for m in messages %}" + PART.replace("TEXT", "p.text ~ p.text") + "{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("backbone", ["handwritten", "transformers"])
@pytest.mark.parametrize("shown", CHANGES)
def test_a_template_that_does_not_show_the_question_as_it_is_is_refused(
    shown: str, backbone: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    write_family("llava_llama", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHANGES[shown])
    with pytest.raises(InputError, match=r"'chat_template': expected a template that shows each turn of user"):
        load_lvlm(tmp_path, backbone=backbone).encode_prompt("Is it?", [random_image(rng, 30, 20)], "s-7")


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("p.text if p.text|length < 60 else p.text[:60]", "Which of the two is larger? " * 5),
        ("p.text.replace('colour', 'color')", "Which colour is it?"),
        ("p.text if 'secret' not in p.text else ''", "The secret is which?"),
        ("p.text.split('</think>')[-1]", "What does </think> mean?"),
    ],
)
def test_a_template_that_changes_some_questions_is_refused_for_these_alone(
    text: str, question: str, tmp_path: Path
) -> None:
    write_lvlm(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}" + PART.replace("TEXT", text) + "{% endfor %}"
    )
    ours = load_lvlm(tmp_path)
    assert ours.prompt_text("  Which is it? ", 0, None).strip() == "Which is it?"
    with pytest.raises(
        InputError, match=r"sample 's-7', field 'chat_template': expected a template that shows this text"
    ):
        ours.encode_prompt(question, [], "s-7")


def test_images_are_shown_in_their_turns_and_between_their_words(tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    all_first = "{% for m in messages %}{% for p in m.content if p.type == 'image' %}<image>{% endfor %}{% endfor %}"
    texts = "{% for m in messages %}{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(all_first + texts)
    ours = load_lvlm(tmp_path)
    assert ours.prompt_text("Which?", 2, None) == "<image><image>Which?"
    assert ours.prompt_text("Which?<image>", 1, None) == "<image>Which?"  # no word is behind it
    for question, images, turns in (
        ("Is <image> darker than <image>?", 2, ()),
        ("And <image>now?", 2, (Turn("user", "<image>What?"), Turn("assistant", "It."))),
    ):
        with pytest.raises(
            InputError, match=r"sample 's', field 'chat_template': expected a template that shows each turn"
        ):
            ours.prompt_text(question, images, "s", turns)
