"""The page in a headless Chromium: it says nothing on the console, asks for nothing, and shows its pictures."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.browser import NAMES, Browser, find_chromium, started_browser
from support.report_runs import config, evaluation, some_logits, training, write_metrics, write_result, write_run_folder
from unikd_fast.cli import main
from unikd_fast.report.figures import DARK, LIGHT, Theme
from unikd_fast.report.run_files import StepTime, write_step_time, write_test_logits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason=f"needs a Chromium (one of {', '.join(NAMES)}); see .ci/run"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = find_chromium()
    assert chromium is not None
    with started_browser(chromium, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods with two seeds each, every figure, and a name that would break a careless page."""
    folder = tmp_path_factory.mktemp("report")
    runs = {"student + KD": {"distill.method": "kd"}, "</style><script>x()</script>": {"distill.method": "unikd"}}
    root = write_run_folder(folder / "run", config(compare={"seeds": [0, 1], "runs": runs}))
    for seed in (0, 1):
        teacher = write_result(root / f"seed-{seed}" / "teacher", "teacher", seed=seed, model="cifar/resnet56")
        write_test_logits(teacher, *some_logits(60, 10, noise=0.5, seed=seed))
        for place, label in enumerate(runs):
            home = root / f"seed-{seed}" / str(place)
            write_result(home, label, seed=seed, method=runs[label]["distill.method"], best=71.0 + place, last=70.0)
            write_test_logits(home, *some_logits(60, 10, noise=1.0 + place, seed=10 + seed))
            epochs = range(1, 20)
            head = {"head_accuracy": 0.9, "head_mean_std": 0.9, "head_variance": 0.1}
            write_metrics(
                home,
                [training(float(epoch), logit_kl=(3.0 + place + seed) / epoch) for epoch in epochs]
                + [evaluation(epoch, ce=2.0 / epoch, probe_kl=4.0 / epoch, **head) for epoch in epochs],
            )
            write_step_time(home, StepTime(1.0, 5.0, 3.0, 0.5, 8.0, 0.5, "one GPU"))
    target = folder / "page.html"
    assert main(["report", str(root), "--to", str(target)]) == 0
    return target


def colours(screenshot: bytes) -> np.ndarray:
    return np.array(Image.open(BytesIO(screenshot)).convert("RGB"))


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[place : place + 2], 16)) for place in (1, 3, 5))})"


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_the_page_opens_without_errors_or_requests(browser: Browser, page: Path, theme: Theme) -> None:
    browser.open(page, scheme=theme.name)
    assert browser.complaints == []
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.evaluate("document.querySelectorAll('script').length") == 0


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_every_figure_is_shown_in_the_colour_scheme(browser: Browser, page: Path, theme: Theme) -> None:
    browser.open(page, scheme=theme.name)
    widths = browser.evaluate("[...document.images].map(image => image.naturalWidth * image.complete)")
    assert len(widths) == 7
    assert min(widths) > 400
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == rgb(theme.surface)
    shot = colours(browser.screenshot())
    boxes = browser.evaluate(
        "[...document.images].map(i => i.getBoundingClientRect()).map(b => [b.x, b.y + scrollY, b.width, b.height])"
    )
    surface = np.array([int(theme.surface[place : place + 2], 16) for place in (1, 3, 5)])
    for x, y, width, height in boxes:
        inside = shot[int(y) + 2 : int(y + height) - 2, int(x) + 2 : int(x + width) - 2]
        assert (inside[0, 0] == surface).all()  # one background with the page
        drawn = (np.abs(inside.astype(int) - surface).sum(axis=2) > 60).mean()
        assert drawn > 0.02


def test_printing_uses_the_light_theme(browser: Browser, page: Path) -> None:
    browser.open(page, scheme="dark", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == rgb(LIGHT.surface)
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    sources = browser.evaluate("[...document.images].map(image => image.currentSrc === image.src)")
    assert sources == [True] * 7


@pytest.mark.parametrize("width", [360, 1000, 1600])
def test_the_page_never_scrolls_sideways(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("<script>console.error('broken')</script>", "console.error: broken"),
        ("<script>undefined_function()</script>", "exception"),
        ("<img src='missing.png' alt='x'>", "ERR_FILE_NOT_FOUND"),
        (
            "<meta http-equiv='Content-Security-Policy' content=\"script-src 'none'\"><script>1</script>",
            "Content Security Policy",
        ),
    ],
    ids=["console", "exception", "missing picture", "refused script"],
)
def test_the_check_notices_a_broken_page(browser: Browser, tmp_path: Path, body: str, said: str) -> None:
    """Otherwise the tests above could not fail."""
    path = tmp_path / "bad.html"
    path.write_text(f"<!doctype html><html lang='en'><head><link rel='icon' href='data:,'></head><body>{body}</body>")
    browser.open(path)
    assert any(said in complaint for complaint in browser.complaints), browser.complaints


def test_the_check_notices_a_request(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "asks.html"
    path.write_text("<!doctype html><img src='http://127.0.0.1:9/a.png' alt='x'>")
    browser.open(path)
    assert "http://127.0.0.1:9/a.png" in browser.requests
