"""The page in a real browser: it shows the headline, folds, fits a phone, and asks nobody for anything."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from factory import report
from tests.report_run import whole

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
    "--disable-dev-shm-usage",
]  # fmt: skip


@pytest.fixture
def chromium() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    assert found, f"no browser: install one of {', '.join(NAMES)} (apt-get install chromium)"
    return found


def seen(chromium: str, page: Path, profile: Path, *options: str) -> str:
    """The document as the browser holds it after loading."""
    command = [chromium, *QUIET, f"--user-data-dir={profile}", *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_opens_with_its_headline_and_nothing_remote(chromium: str, tmp_path: Path) -> None:
    run = whole(tmp_path / "books")
    told = report.build(run)
    dom = seen(chromium, run / "report.html", tmp_path / "profile")
    headline = re.search(r'id="headline">([^<]*)<', dom)
    assert headline
    assert headline[1].replace("&nbsp;", " ").replace("&amp;", "&") == told["findings"][0]
    assert dom.count("<details") > 40
    assert "</html>" in dom
    assert not re.search(r"<(script|img|iframe|link|object|embed|video|audio)\b", dom)
    assert not re.search(r"\b(src|href|srcset|action|on\w+)=", dom)
    assert "url(" not in dom


def test_it_fits_a_phone(chromium: str, tmp_path: Path) -> None:
    """A page of ours with the report in a frame of 400 pixels measures whether anything sticks out."""
    run = whole(tmp_path / "books")
    report.build(run)
    styled = (run / "report.html").read_text().replace("default-src 'none'", "default-src 'unsafe-inline'")
    measure = "<script>document.title = document.documentElement.scrollWidth + ' in ' + innerWidth</script>"
    (run / "inner.html").write_text(styled.replace("</body>", f"{measure}</body>"))
    (run / "outer.html").write_text(
        "<iframe src=inner.html style='width:400px;height:900px;border:0'></iframe><script>"
        "onload = () => document.title = frames[0].document.title</script>"
    )
    dom = seen(chromium, run / "outer.html", tmp_path / "profile", "--allow-file-access-from-files")
    wide, frame = re.search(r"<title>(\d+) in (\d+)</title>", dom).groups()  # type: ignore[union-attr]
    assert int(frame) == 400
    assert int(wide) <= 400
