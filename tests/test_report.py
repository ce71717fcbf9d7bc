"""The page: everything that was flagged is there, and nothing that could do harm."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cytodiffusion.errors import OutputError
from cytodiffusion.evaluate import metrics, report
from cytodiffusion.evaluate.report import write_report

CLASSES = ("eosinophil", "lymphocyte", "monocyte")
PNG = b"\x89PNG\r\n\x1a\n not much of a picture"
FACTS = {"model": "pbc8 1.0", "data": "sha256 77ab", "seed": 0, "command": "cytodiffusion demo"}
HOSTILE = '"><script>alert(1)</script>{{ 7 * 7 }}.png'


def row(path: str, flag: str = "ok", label: str | None = None, **more) -> dict:
    """A line of the predictions table."""
    chance = more.pop("chance", (0.1, 0.8, 0.1))
    best = int(np.argmax(chance))
    line = {
        "path": path,
        "sha256": "00",
        "predicted": CLASSES[best],
        "confidence": chance[best],
        "set": "|".join(c for c, p in zip(CLASSES, chance, strict=True) if p > 0.15),
        "anomaly": 0.1,
        "anomaly_p": 0.6,
        "flag": flag,
        "trials": 8,
        "passes": 9.0,
        "milliseconds": 4.0,
        "model": "pbc8",
    }
    line |= {f"prob_{c}": p for c, p in zip(CLASSES, chance, strict=True)}
    return line | ({} if label is None else {"label": label}) | more


def unreadable(path: str) -> dict:
    """A file that could not be opened, as a CSV file has it: empty places."""
    return dict.fromkeys(row(path), "") | {"path": path, "flag": "unreadable"}


def labelled_rows() -> list[dict]:
    return [
        row("a/1.png", label="lymphocyte"),
        row("a/2.png", label="monocyte"),
        row("a/3.png", "anomalous", label="blast", anomaly=0.97),
        row("a/4.png", "uncertain", label="monocyte", chance=(0.2, 0.3, 0.5)),
        unreadable("a/5.png"),
    ]


def measured(rows: list[dict]) -> dict:
    known = [r for r in rows if r.get("label") in CLASSES]
    truth = np.array([CLASSES.index(r["label"]) for r in known])
    table = np.array([[r[f"prob_{c}"] for c in CLASSES] for r in known])
    return metrics.summarise(truth, table, CLASSES, table > 0.15, draws=50)


def write(path, rows, **more) -> str:
    settings = {"title": "Slide 17", "metrics": None, "classes": CLASSES, "thumbnails": None}
    write_report(path, rows=rows, **(settings | {"facts": FACTS, "notes": []} | more))
    return path.read_text("utf-8")


def section(page: str, name: str) -> str:
    """The text of one part, tags taken out."""
    part = page.split(f'<section aria-labelledby="{name}">')[1].split("</section>")[0]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", part)).split())


class Tags(HTMLParser):
    """Every tag with its attributes; complains of a tag that is not closed."""

    EMPTY = ("meta", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_without_labels(tmp_path):
    page = write(tmp_path / "r.html", [row("1.png"), row("2.png", "anomalous")])
    assert page.startswith("<!DOCTYPE html>")
    assert "Research use only. Not a medical device; not for diagnosis." in page
    assert "How good the answers are" not in page
    assert "Against the labels" not in page
    assert "lymphocyte 2 1 100.0 %" in section(page, "differential")
    assert "cytodiffusion demo" in section(page, "facts")
    Tags(page)


def test_with_labels(tmp_path):
    rows = labelled_rows()
    page = write(tmp_path / "r.html", rows, metrics=measured(rows))
    good, truth = section(page, "measured"), section(page, "truth")
    assert "Measured on 3 labelled cells" in good
    assert "Accuracy 66.7 % 9.4 – 99.2 %" in good  # noqa: RUF001
    assert "1 cell is labelled blast, a class that cannot be answered here" in truth
    assert "1 cell was named otherwise than labelled" in truth
    assert "monocyte 0 1 1" in truth  # its row of the confusion matrix
    tags = Tags(page).found
    assert [tag for tag, _ in tags].count("svg") == 2
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_parts_come_in_order(tmp_path):
    rows = labelled_rows()
    page = write(tmp_path / "r.html", rows, metrics=measured(rows))
    order = re.findall(r'<section aria-labelledby="(\w+)"', page)
    assert order == ["strangers", "measured", "differential", "truth", "all", "facts"]


def test_differential_counts_what_was_named_and_says_how_sure(tmp_path):
    rows = [row(f"{i}.png") for i in range(50)] + [unreadable("x.png")]
    rows += [row(f"e{i}.png", chance=(0.9, 0.1, 0.0)) for i in range(50)]
    shown = section(write(tmp_path / "r.html", rows), "differential")
    assert "lymphocyte 50 – 50.0 % 39.8 – 60.2 %" in shown  # noqa: RUF001
    assert "monocyte 0 – 0.0 % 0.0 – 3.6 %" in shown  # noqa: RUF001


def test_every_flagged_cell_is_listed_strangest_first(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "GALLERY", 3)
    monkeypatch.setattr(report, "LISTED", 5)
    rows = [row(f"ok{i}.png") for i in range(10)]
    rows += [row(f"odd{i}.png", "anomalous", anomaly=0.5 + i / 100) for i in range(9)]
    rows += [row(f"unsure{i}.png", "uncertain", anomaly=0.9) for i in range(9)]
    thumbnails = {r["path"]: PNG for r in rows}
    page = write(tmp_path / "r.html", rows, thumbnails=thumbnails)
    shown = section(page, "strangers")
    listed = re.findall(
        r'<td class="path">((?:odd|unsure)\d\.png)', page.split('id="differential"')[0]
    )
    assert listed == [f"odd{i}.png" for i in range(8, -1, -1)] + [
        f"unsure{i}.png" for i in range(9)
    ]
    assert page.count("<img ") == 3
    assert "Pictures of the first 3 flagged cells; 15 more are in the table below" in shown
    assert "The first 5 of 28; all of them are in predictions.csv" in section(page, "all")


def test_unreadable_files_are_named_and_not_counted(tmp_path):
    page = write(tmp_path / "r.html", [row("1.png"), unreadable("broken/2.png")])
    assert "1 file could not be read broken/2.png" in section(page, "strangers")
    assert "all 1 cell that was named" in section(page, "differential")


@pytest.mark.parametrize("rows", [[], [unreadable("1.png")]])
def test_nothing_was_named(tmp_path, rows):
    page = write(tmp_path / "r.html", rows)
    assert "No cell could be named." in section(page, "all")
    Tags(page)


def test_hostile_names_stay_text(tmp_path):
    rows = [
        row(HOSTILE, "anomalous", label="lymphocyte"),
        row(HOSTILE + "2", label="monocyte"),
        unreadable(HOSTILE + "3"),
    ]
    page = write(
        tmp_path / "r.html",
        rows,
        title=HOSTILE,
        metrics=measured(rows),
        thumbnails={HOSTILE: PNG},
        facts=FACTS | {"data": HOSTILE, "command": HOSTILE},
        notes=[HOSTILE],
    )
    tags = Tags(page).found
    assert "script" not in {tag for tag, _ in tags}
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert HOSTILE in section(page, "strangers")
    assert HOSTILE in {attributes.get("title") for _, attributes in tags}


def test_nothing_comes_from_elsewhere(tmp_path):
    rows = labelled_rows()
    page = write(tmp_path / "r.html", rows, metrics=measured(rows), thumbnails={"a/3.png": PNG})
    for tag, attributes in Tags(page).found:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), tag
    assert "url(http" not in page
    assert "@import" not in page
    assert "<!DOCTYPE svg" not in page


def test_pictures_have_words_beside_them(tmp_path):
    page = write(tmp_path / "r.html", [row("1.png", "anomalous")], thumbnails={"1.png": PNG})
    (picture,) = [attributes for tag, attributes in Tags(page).found if tag == "img"]
    assert picture["alt"] == "Cell 1.png: anomalous, named lymphocyte"


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = labelled_rows()
    first = write(tmp_path / "1.html", rows, metrics=measured(rows))
    assert write(tmp_path / "2.html", rows, metrics=measured(rows)) == first


def test_a_name_that_is_no_text(tmp_path):
    page = write(tmp_path / "r.html", [row("b\udc80d.png", "anomalous")])
    assert r"b\udc80d.png" in section(page, "strangers")


def test_all_or_nothing(tmp_path, monkeypatch):
    """A disk that fills up leaves the page that was there, and no half of the new one."""
    path = tmp_path / "out" / "r.html"
    before = write(path, [row("1.png")])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"Cannot write the report .*: No space left") as error:
        write(path, [row("2.png")])
    assert "\n" not in str(error.value)
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["r.html"]


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="Give a folder"):
        write(tmp_path / "out" / "r.html", [row("1.png")])
