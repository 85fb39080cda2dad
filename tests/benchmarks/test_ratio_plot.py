"""The picture of ratios says what the figures say."""

import json
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from benchmarks.ratio_plot import main, ratio_plot

SPACE = "{http://www.w3.org/2000/svg}"
TEXT = f"{SPACE}text"


class Picture:
    """What can be measured in one, by the marks of its scale."""

    def __init__(self, source):
        self.root = ElementTree.fromstring(source)
        (even,) = self.of("line", "even")
        self.bars = self.of("rect", "bar")
        self.floor, *_, self.top = (float(line.get("y1")) for line in self.of("line", "grid"))
        marks = [part.text for part in self.root.iter(TEXT) if part.get("text-anchor") == "end"]
        assert marks[0] == "0"
        self.most = float(marks[-1].replace(",", ""))
        assert self.ratio(even.get("y1")) == pytest.approx(1, abs=self.most / 1000)

    def of(self, tag, name):
        return [part for part in self.root.iter(f"{SPACE}{tag}") if part.get("class") == name]

    def ratio(self, y):
        """From a place to the number it stands for."""
        return (self.floor - float(y)) / (self.floor - self.top) * self.most

    def words(self):
        return [part.text for part in self.root.iter(TEXT)]


def test_bars_end_at_medians_and_lines_at_the_ends_of_the_rounds():
    series = {"a": {"1x2+3": [2.0, 1.0, 1.5], "4x5+6": [0.5]}, "b": {"4x5+6": [4.0, 2.0]}}
    picture = Picture(ratio_plot("us <& them", series))
    medians = [picture.ratio(bar.get("y")) for bar in picture.bars]
    assert medians == pytest.approx([1.5, 0.5, 3.0], abs=0.01)
    spreads = picture.of("line", "spread")
    ends = [[picture.ratio(line.get(y)) for y in ("y1", "y2")] for line in spreads]
    assert ends == [pytest.approx([1.0, 2.0], abs=0.01), pytest.approx([2.0, 4.0], abs=0.01)]
    words = {"us <& them", "a", "b", "1x2+3", "4x5+6", "1.50", "0.50", "3.00"}
    assert words <= set(picture.words())
    places = [(float(bar.get("x")), float(bar.get("width"))) for bar in picture.bars]
    for (x, width), (following, _) in pairwise(places):
        assert x + width <= following, "bars lie beside each other"


@pytest.mark.parametrize("most", [0.2, 1.0, 1.43, 1.96, 9.7, 14.2, 99.0, 3200.0])
def test_everything_fits(most):
    picture = Picture(ratio_plot("t", {"a": {"1x2+3": [most]}}))
    (bar,) = picture.bars
    assert picture.ratio(bar.get("y")) == pytest.approx(most, abs=picture.most / 1000)
    assert float(bar.get("y")) > picture.top > 60, "below the legend"


def test_results_beside_each_other(tmp_path, capsys):
    words = []
    for name, peers in {"one": ["x"], "two": ["x", "y"]}.items():
        engines = [{"name": "dovetail", "cells": []}]
        for peer in peers:
            cells = [{"cell": "1x2+3", "ratios": [1.25]}, {"cell": "4x5+6", "ratios": []}]
            engines.append({"name": peer, "cells": cells})
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"engines": engines}))
        words.append(f"{name}={file}")
    assert main([*words, "--title", "all"]) == 0
    picture = Picture(capsys.readouterr().out)
    assert len(picture.bars) == 3
    assert {"one", "two, x", "two, y", "all", "1x2+3"} <= set(picture.words())
    assert "4x5+6" not in picture.words()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("no json", "JSONDecodeError"),
        ('{"engines": [{"name": "us"}, {"name": "x", "cells": [{"cell": "1x2+3"}]}]}', "ratios"),
        ("[]", "TypeError"),
        ('{"engines": [{"name": "us", "cells": []}]}', "no engine is compared"),
    ],
)
def test_what_is_no_result(text, message, tmp_path, capsys):
    file = tmp_path / "result.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit):
        main([f"a={file}", "--title", "all"])
    assert message in capsys.readouterr().err
