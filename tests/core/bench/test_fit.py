import xml.etree.ElementTree as ElementTree

import pytest

from dovetail.core.bench.fit import Point, fit_line, spread
from dovetail.core.bench.plot import latency_plot
from dovetail.core.errors import ConfigError

LENGTHS = (512, 2048, 8192)


def points(*off, bound=None):
    each = zip(LENGTHS, off or (0, 0, 0), strict=True)
    return [Point(context=x, milliseconds=3.5 + 0.04 * x / 1000 + o, bound=bound) for x, o in each]


def test_a_line_is_found():
    fit = fit_line(1, points())
    assert (fit.base, fit.slope) == (pytest.approx(3.5), pytest.approx(0.04))
    assert fit.residual == pytest.approx(0, abs=1e-9)
    assert fit.at(4000) == pytest.approx(3.66)
    assert fit.fraction is None
    assert fit.describe().startswith("ITL = 3.500 ms + 0.0400 ms x context / 1000")


def test_what_is_left_is_said():
    assert fit_line(1, points(0.1, -0.2, 0.1)).residual > 0.1


def test_fraction_of_the_roofline():
    fit = fit_line(1, points(bound=1.76))
    assert fit.points[0].fraction == pytest.approx(1.76 / 3.52048)
    assert fit.fraction == fit.points[1].fraction


def test_one_length_is_no_line():
    with pytest.raises(ConfigError, match="two different"):
        fit_line(1, points()[:1] * 2)


def test_lengths_are_spread_up_to_the_longest():
    assert spread(100_000) == [1024, 2048, 4096, 6144, 8192]
    assert spread(80) == [10, 20, 40, 60, 80]
    assert spread(2) == [1, 2]


def test_the_picture_shows_every_point():
    fits = [fit_line(1, points(bound=2.0)), fit_line(8, points(0.5, 0.4, 0.5))]
    root = ElementTree.fromstring(latency_plot("A & B <here>", fits))
    space = "{http://www.w3.org/2000/svg}"
    circles = root.findall(f"{space}circle")
    assert len(circles) == 6
    heights = [float(circle.attrib["cy"]) for circle in circles]
    assert heights[0] > heights[2] > heights[3], "more milliseconds are higher up"
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for circle in circles:
        assert 0 < float(circle.attrib["cx"]) < width
        assert 0 < float(circle.attrib["cy"]) < height
    kinds = [path.attrib["class"] for path in root.findall(f"{space}path")]
    assert (kinds.count("line"), kinds.count("bound")) == (2, 1)
    labels = [text.text for text in root.findall(f"{space}text")]
    assert "A & B <here>" in labels
    assert any(label.endswith("dashed: roofline") for label in labels)
