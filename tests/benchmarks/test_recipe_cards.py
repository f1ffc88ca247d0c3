"""Cards come from reports: their figures, their pictures, and what has changed since."""

from __future__ import annotations

import pytest

import accel
from benchmarks import recipe_cards
from benchmarks.results_file import RESULTS, read


def test_every_shipped_recipe_has_a_card_and_every_picture_is_there():
    text = recipe_cards.cards()
    names = [path.stem for path in sorted(recipe_cards.RECIPES.glob("*.yaml"))]
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == names
    for line in text.splitlines():
        if line.startswith("!["):
            assert (recipe_cards.RECIPES / line.partition("(")[2].rstrip(")")).is_file()


def test_a_card_says_what_the_report_says():
    found = read("report_digits-dit")
    assert found is not None
    row = next(r for r in found["recipes"] if r["recipe"] == "dpm.yaml")
    card = recipe_cards._card(recipe_cards.RECIPES / row["recipe"], found, row)
    assert f"{row['figures']['psnr']['value']['estimate']:.1f}\u202fdB" in card
    assert f"{row['speedup']['estimate']:.2f}x" in card
    assert found["protocol"]["sha256"][:12] in card
    assert "was changed" not in card
    assert "was changed" in recipe_cards._card(
        recipe_cards.RECIPES / row["recipe"], found, row | {"sha256": "0" * 64}
    )


def test_a_card_has_the_notes_on_its_own_recipe_and_no_article_among_its_worst_words():
    found = read("report_digits-dit")
    assert found is not None
    row = next(r for r in found["recipes"] if r["recipe"] == "dpm.yaml")
    notes = ["dpm-cache: another's.", "dpm: its own.", "No distance."]
    word = {"difference": -4.5, "strength": -3.0}
    words = [{"word": w, **word} for w in ("orange", "an")]
    card = recipe_cards._card(
        recipe_cards.RECIPES / row["recipe"], found | {"warnings": notes}, row | {"by_word": words}
    )
    assert [x for x in card.splitlines() if x.startswith("Note: ")] == ["Note: dpm: its own."]
    assert "Worst at: orange (-4.5 dB)." in card


def test_a_table_of_a_card_is_whole():
    found = read("report_digits-ddpm")
    assert found is not None
    row = found["recipes"][0]
    lines = recipe_cards._card(recipe_cards.RECIPES / row["recipe"], found, row).splitlines()
    rows = [number for number, line in enumerate(lines) if line.startswith("|")]
    assert rows == list(range(rows[0], rows[-1] + 1))
    assert lines[rows[-1]].startswith("| network evaluations")
    assert recipe_cards.unrelated(found, row) in lines[rows[-1] :]


def test_a_recipe_of_two_models_has_both_and_a_picture_of_each(monkeypatch):
    found = read("report_digits-dit")
    assert found is not None
    row = next(r for r in found["recipes"] if r["recipe"] == "dpm.yaml")
    other = {**found, "model": {"name": "zoo:another"}, "recipes": [row]}
    reports = {"report_digits-dit": found, "report_digits-sd": other}
    monkeypatch.setattr(recipe_cards, "read", reports.get)
    text = recipe_cards.cards()
    card = text[text.index("## dpm\n") : text.index("## taylor")]
    assert card.count(row["description"]) == 1
    for name in ("digits-dit", "another"):
        assert f"On `zoo:{name}`, {found['samples']} samples" in card
        assert f"(pictures/dpm.{name}.png)" in card


def test_where_nothing_of_the_baseline_is_left_it_is_said():
    found = read("report_digits-ddpm")
    assert found is not None
    row = found["recipes"][0]
    assert "other samples, as from another seed" in recipe_cards.unrelated(found, row)
    assert recipe_cards.unrelated(found | {"unrelated_psnr": 0.0}, row) == ""
    whole = read("report_digits-dit")
    assert whole is not None
    assert [recipe_cards.unrelated(whole, r) for r in whole["recipes"]] == [""] * len(
        whole["recipes"]
    )


@pytest.mark.parametrize("path", sorted(RESULTS.glob("report_*.json")), ids=lambda p: p.stem)
def test_a_kept_report_is_whole_and_names_shipped_recipes(path):
    found = read(path.stem)
    assert found is not None
    for row in found["recipes"]:
        assert accel.read_recipe(recipe_cards.RECIPES / row["recipe"]).name == row["label"]
        assert "per_sample" not in row
        assert row["worst"]
