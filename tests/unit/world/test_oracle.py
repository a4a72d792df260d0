"""The oracle: true rationales are right, every kind of fault is found, and no text makes it raise."""

import dataclasses
import random
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srcfast.data.rationale_format import format_response, parse_response
from srcfast.world.judgement import CASES, Verification
from srcfast.world.oracle import claimed_world, parse_claim, verify
from srcfast.world.programs import evaluate
from srcfast.world.questions import Question, ask
from srcfast.world.rationales import facts, true_rationale
from srcfast.world.scenes import COLORS, PLACES, SHAPES, SIZES, Object, Scene, sample_scenes

See, Think = tuple[str, ...], tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Parts:
    perception: tuple[str, ...]
    reasoning: tuple[str, ...]
    answer: str | None


def asked(n: int, seed: int, abilities: list[str] | None = None) -> list[tuple[Scene, Question, See, Think]]:
    rng = random.Random(seed)
    scenes = sample_scenes("base", n, seed) + sample_scenes("generalisation", n // 4, seed)
    kinds = {} if abilities is None else {"abilities": abilities}
    return [(s, q, *true_rationale(s, q)) for s in scenes for q in ask(s, rng, n=4, **kinds)]


def found(scene: Scene, question: Question, see: See, think: Think, answer: str | None = None) -> Verification:
    stated = question.answer if answer is None else answer
    return verify(Parts(see, think, stated), question.program, scene, question.answer)


def test_every_true_rationale_is_right_in_both_formats_and_in_any_order() -> None:
    rng = random.Random(0)
    for scene, question, see, think in asked(900, seed=random.randrange(10**6)):
        for judgement in (
            found(scene, question, see, think),
            found(scene, question, (), see + think),  # as `plain` is parsed
            found(scene, question, tuple(rng.sample(see, len(see))), think),
        ):
            assert judgement.case == "both_right" and judgement.aligned, (question, see, think, judgement)
            assert judgement.perception_right and judgement.reasoning_right
            assert {verdict for *_, verdict in judgement.claims} == {"true"}


def test_judging_goes_through_the_one_parser() -> None:
    for scene, question, see, think in asked(60, seed=1):
        for form in ("tagged", "plain"):
            response = parse_response(format_response(see, think, question.answer, form))
            assert verify(response, question.program, scene.to_json(), question.answer).aligned


def test_all_facts_suffice_for_every_question() -> None:
    for scene, question, _, _ in asked(400, seed=2):
        assert found(scene, question, facts(scene), ()).aligned, (question, facts(scene))


def test_a_wrong_final_answer_is_a_right_rationale_with_a_wrong_answer() -> None:
    others = {"yes": "no", "no": "yes"}
    for scene, question, see, think in asked(300, seed=3):
        judgement = found(scene, question, see, think, others.get(question.answer, "seven"))
        assert judgement.case == "right_rationale_wrong_answer"
        assert judgement.rationale_right and not judgement.leads_to_answer and not judgement.aligned


def test_a_bare_or_missing_answer_has_no_right_rationale() -> None:
    for scene, question, _, _ in asked(80, seed=4):
        assert found(scene, question, (), ()).case == "right_answer_wrong_rationale"
        assert not found(scene, question, (), ()).perception_right
        nothing = verify(Parts((), (), None), question.program, scene, question.answer)
        assert nothing.case == "both_wrong" and not nothing.leads_to_answer


def objects_in(see: See) -> list[int]:
    return [i for i, sentence in enumerate(see) if re.match(r"There is an? (small|large)", sentence)]


def altered(see: See, values: tuple[str, ...], scene: Scene, rng: random.Random) -> See | None:
    """What is seen, one object with another value of an attribute, such that the scene has none like it."""
    for i in rng.sample(objects_in(see), len(objects_in(see))):
        pattern = "|".join(sorted(values, key=len, reverse=True))
        ahead = "at the " if values is PLACES else ""
        present = re.search(rf"{ahead}({pattern})\b", see[i])
        assert present is not None
        other = rng.choice([v for v in values if v != present[1]])
        sentence = see[i][: present.start(1)] + other + see[i][present.end(1) :]
        if sentence not in facts(scene):
            return (*see[:i], sentence, *see[i + 1 :])
    return None


@pytest.mark.parametrize("values", [COLORS, SHAPES, SIZES, PLACES], ids=["color", "shape", "size", "place"])
def test_a_counterfactual_attribute_makes_the_rationale_wrong(values: tuple[str, ...]) -> None:
    rng, tried = random.Random(5), 0
    for scene, question, see, think in asked(300, seed=5):
        wrong = altered(see, values, scene, rng)
        if wrong is None:
            continue
        tried += 1
        judgement = found(scene, question, wrong, think)
        assert judgement.case == "right_answer_wrong_rationale" and not judgement.perception_right
        assert found(scene, question, wrong, think, "seven").case == "both_wrong"
    assert tried > 500


def test_an_invented_object_makes_the_rationale_wrong() -> None:
    rng = random.Random(6)
    for scene, question, see, think in asked(200, seed=6):
        taken = {o.place for o in scene.objects}
        place = rng.choice([p for p in PLACES if p not in taken])
        invented = f"There is a {rng.choice(SIZES)} {rng.choice(COLORS)} {rng.choice(SHAPES)} at the {place}."
        judgement = found(scene, question, (*see, invented), think)
        assert judgement.case == "right_answer_wrong_rationale" and not judgement.perception_right


def test_dropping_a_relevant_object_makes_the_rationale_insufficient() -> None:
    rng, tried = random.Random(7), 0
    for scene, question, see, think in asked(500, seed=7):
        objects = objects_in(see)
        # One dissenting object is enough for "Not all ...", and a closing superlative for a rival.
        if not objects or question.kind in ("all", "some_not", "all_either", "beyond_all"):
            continue
        drop = rng.choice(objects)
        rest = see[:drop] + see[drop + 1 :]
        judgement = found(scene, question, rest, think)
        assert judgement.case == "right_answer_wrong_rationale", (question, rest, think, judgement)
        if question.kind == "most_common" or question.kind == "more_side":
            assert found(scene, question, rest, ()).case == "right_answer_wrong_rationale"
        tried += 1
    assert tried > 800


def test_a_universal_needs_every_object_or_its_counterexample() -> None:
    for scene, question, see, _ in asked(300, seed=8, abilities=["logical_reasoning"]):
        if question.kind in ("all", "all_either") and question.answer == "yes" and len(see) > 1:
            assert not found(scene, question, see[1:], ()).rationale_right
            assert found(scene, question, see, ()).rationale_right  # all listed: there to see


def swap(pattern: str, change: Callable[[re.Match[str]], str]) -> Callable[[Think], Think | None]:
    def apply(think: Think) -> Think | None:
        for i, sentence in enumerate(think):
            changed = re.sub(pattern, change, sentence, count=1)
            if changed != sentence:
                return (*think[:i], changed, *think[i + 1 :])
        return None

    return apply


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OTHER_SIDE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
FAULTS = {
    "count": swap(r"(There (?:is|are)) (\d)", lambda m: f"{m[1]} {int(m[2]) + 1}"),
    "count either": swap(r"^(\d) object", lambda m: f"{int(m[1]) + 2} object"),
    "arithmetic": swap(r"minus (\d) is (\d)", lambda m: f"minus {m[1]} is {int(m[2]) + 1}"),
    "other numbers": swap(r"(\d) minus (\d)", lambda m: f"{int(m[1]) + 6} minus {int(m[2]) + 6}"),
    "denied": swap(r"is (not )?(?=left|right|above|below)", lambda m: "is " if m[1] else "is not "),
    "directly": swap(r"directly (left of|right of|above|below)", lambda m: f"directly {OPPOSITE[m[1]]}"),
    "universal": swap(r"^(Not all|All)", lambda m: "All" if m[1] == "Not all" else "Not all"),
    "sameness": swap(r"^Both are (?!small)\w+", lambda m: "Both are small"),
    "size": swap(r"is (not )?larger", lambda m: "is larger" if m[1] else "is not larger"),
    "mode": swap(r"(common \w+ is) \w+", lambda m: f"{m[1]} {'star' if 'shape' in m[1] else 'teal'}"),
    "superlative": swap(r"the (left|right|top|bottom)most", lambda m: f"the {OTHER_SIDE[m[1]]}most"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_unreasonable_conclusion_makes_the_rationale_wrong(fault: str) -> None:
    change = FAULTS[fault]
    tried = 0
    for scene, question, see, think in asked(500, seed=9):
        wrong = change(think)
        if wrong is None:
            continue
        if fault == "sameness" and all("small" in sentence for sentence in see):
            continue
        if fault == "mode" and re.search(r"is (star|teal)\.", think[-1]):
            continue
        judgement = found(scene, question, see, wrong)
        assert judgement.case == "right_answer_wrong_rationale", (question, see, wrong, judgement)
        assert judgement.perception_right
        # One object alone is the outermost on every side; only the scene refutes that.
        assert fault == "superlative" or not judgement.reasoning_right, (question, see, wrong)
        tried += 1
    assert tried > 20


def test_perception_and_reasoning_are_told_apart() -> None:
    scene = Scene((Object("circle", "red", "large", "left"), Object("star", "blue", "small", "right")), "plain")
    program = {"op": "count", "of": {"color": "red"}}
    misseen = verify(
        Parts(
            ("There is a large red circle at the left.", "There is a small red star at the right."),
            ("There are 2 red objects.",),
            "2",
        ),
        program,
        scene,
        "1",
    )
    assert (misseen.perception_right, misseen.reasoning_right, misseen.leads_to_answer) == (False, True, True)
    assert misseen.case == "both_wrong"
    misjudged = verify(
        Parts(("There is a large red circle at the left.",), ("There are 2 red objects.",), "2"),
        program,
        scene,
        "1",
    )
    assert (misjudged.perception_right, misjudged.reasoning_right, misjudged.leads_to_answer) == (
        True,
        False,
        False,
    )


def test_an_irrelevant_truth_does_not_settle_an_absence() -> None:
    scene = Scene((Object("circle", "red", "large", "left"), Object("star", "blue", "small", "right")), "plain")
    program = {"op": "exists", "of": {"shape": "star", "color": "green", "size": "small"}}

    def right(*sentences: str) -> bool:
        return verify(Parts(sentences, (), "no"), program, scene, "no").rationale_right

    assert not right("There is a large red circle at the left.")
    assert (
        right("There is no small green star.")
        and right("There is no green object.")
        and right("There is no star.") is False
    )
    assert not right("There is no large green star.")
    assert right(*facts(scene))
    assert not right("There is no small green star.", "And so it goes.")


def test_what_is_unknown_of_a_real_image_is_not_held_against_the_rationale() -> None:
    scene = Scene((Object(shape="circle"),), None, (Object(color="blue"),))
    program = {"op": "none", "of": {"color": "blue"}}
    judgement = verify(
        Parts(("There is a large red circle at the left.",), ("There is no blue object.",), "yes"),
        program,
        scene,
        "yes",
    )
    assert judgement.aligned and judgement.claims[0][2] == "unverifiable" and judgement.claims[1][2] == "true"
    ruled_out = verify(Parts(("There is a blue circle.",), (), "no"), program, scene, "yes")
    assert ruled_out.case == "both_wrong" and ruled_out.leads_to_answer
    assert verify(Parts(("There is a red star.",), (), "yes"), program, scene, "yes").claims[0][2] == "false"
    unclear = verify(Parts(("There is a circle.",), (), "yes"), program, scene, "yes")
    assert unclear.case == "right_answer_wrong_rationale"  # nothing says that it is not blue


def test_claims_about_the_same_object_are_merged() -> None:
    def world(*sentences: str, one_object: bool = False) -> int:
        claims = [claim for sentence in sentences if (claim := parse_claim(sentence))]
        assert len(claims) == len(sentences)
        return len(claimed_world(claims, one_object).objects)

    assert world("There is a red circle.", "There is a large red circle at the left.") == 1
    assert world("There is a red object.", "There is a red circle.") == 1
    assert world("There is a red object.", "There is a circle.") == 2
    assert world("There is a red object.", "There is a circle.", one_object=True) == 1
    assert world("There is a small red circle.", "There is a large red circle.") == 2


@pytest.mark.parametrize(
    "text",
    [
        "There is a red large circle at the left.",
        "There is a large red circle at the left of the image.",
        "There is a circle",
        "Both are nice.",
        "The red circle is left of.",
        "There are many circles.",
        "The most common color is circle.",
        "All circles are red or.",
        "The object is the leftmost object.",
        "",
        ".",
        "THERE  IS A LARGE RED CIRCLE AT THE LEFT.",
    ],
)
def test_the_grammar_is_read_whole_or_not_at_all(text: str) -> None:
    readable = text in ("There is a circle", "THERE  IS A LARGE RED CIRCLE AT THE LEFT.")
    assert (parse_claim(text) is not None) == readable


WORDS = (
    "there is are a an no not all both one the and or minus than larger most common background nothing at on "
    "in side row directly left right top bottom center of above below leftmost object objects circle circles "
    "star stars crosses red blue small large plain 0 1 2 3 other . ,"
).split()
SCENES = sample_scenes("test", 40, seed=1)
PROGRAMS = [(s, q) for s in SCENES for q in ask(s, random.Random(2), n=6)]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join) | st.text(max_size=60), max_size=6),
    st.none() | st.text(max_size=12),
    st.integers(0, len(PROGRAMS) - 1),
)
def test_no_text_makes_the_oracle_raise(sentences: list[str], answer: str | None, index: int) -> None:
    scene, question = PROGRAMS[index]
    middle = len(sentences) // 2
    response = Parts(tuple(sentences[:middle]), tuple(sentences[middle:]), answer)
    judgement = verify(response, question.program, scene, question.answer)
    assert judgement.case in CASES and len(judgement.claims) == len(sentences)
    assert not judgement.aligned or (judgement.rationale_right and judgement.answer_right)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(PROGRAMS) - 1), st.lists(st.integers(0, 10**6), max_size=8))
def test_a_rationale_judged_right_leads_to_the_gold_answer(index: int, picks: list[int]) -> None:
    """Random true sentences of any scene's rationales: whatever is judged right must give the gold answer."""
    scene, question = PROGRAMS[index]
    pool = [s for q in ask(scene, random.Random(3), n=8) for part in true_rationale(scene, q) for s in part]
    chosen = tuple(pool[pick % len(pool)] for pick in picks)
    judgement = verify(Parts(chosen, (), question.answer), question.program, scene, question.answer)
    claims = [claim for sentence in chosen if (claim := parse_claim(sentence))]
    world = claimed_world(claims)
    led_to = evaluate(question.program, world.objects, world.background, world.absent)
    assert not judgement.rationale_right or led_to == question.answer
