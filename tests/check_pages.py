"""Open pages in a headless browser, in light, dark, narrow and on paper, and keep pictures to look at.

    python -m tests.check_pages OUTPUT_FOLDER [PAGE.html ...]

Needs Chromium or Chrome; pages default to those in docs/. Fails where a page is not drawn, keeps the light paper in the dark, or makes
a request.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# name -> (width, Chromium's number for the preferred scheme, whether the paper is bright)
VIEWS = {"light": (1180, 1, True), "dark": (1180, 0, False), "narrow": (390, 1, True)}
HEIGHT = 6000


def browse(browser, *arguments):
    """Run the browser once in a profile of its own, without a network; returns its log."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stderr


def check(browser, page, output):
    """Every view of one page; returns what is wrong."""
    problems = []
    for name, (width, scheme, bright) in VIEWS.items():
        picture = output / f"{page.stem}-{name}.png"
        log = browse(
            browser,
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--window-size={width},{HEIGHT}",
            f"--screenshot={picture}",
            page.as_uri(),
        )
        problems += [f"{name}: {line}" for line in log.splitlines() if "CONSOLE" in line or "ERR_" in line]
        with Image.open(picture) as image:
            grey = image.convert("L")
            paper, colours = grey.getpixel((3, 3)), len(grey.resize((60, 300)).getcolors(256))
        if (paper > 128) != bright:
            problems.append(f"{name}: the paper has brightness {paper}")
        if colours < 10:
            problems.append(f"{name}: nothing is drawn")
    paper = output / f"{page.stem}.pdf"
    browse(browser, "--no-pdf-header-footer", f"--print-to-pdf={paper}", page.as_uri())
    if paper.stat().st_size < 20_000:
        problems.append("print: nothing is printed")
    return problems


def main():
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"No browser is found: install one of {', '.join(BROWSERS)}.")
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    pages = [Path(name).resolve() for name in sys.argv[2:]] or sorted((ROOT / "docs").glob("*.html"))
    failed = False
    for page in pages:
        problems = check(browser, page, output)
        failed |= bool(problems)
        print(f"{page.name}: {'; '.join(problems) or 'light, dark, narrow and print are drawn'}")
    print(f"Pictures: {output}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
