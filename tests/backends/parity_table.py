"""Measure how far MLX and PyTorch are apart and write the table into the README, between its parity markers.

python -m tests.backends.parity_table [README.md]
"""

import platform
import sys
from importlib.metadata import version
from pathlib import Path

from tests.backends import parity

BEGIN, END = "<!-- parity:begin -->", "<!-- parity:end -->"


def table(measurements):
    """The measurements in Markdown."""
    lines = ["| fp32 unless said otherwise | measured | band |", "|---|---|---|"]
    for m in measurements:
        measured = f"{m.value:.1e}" if m.value else "0"
        lines.append(f"| {m.what} | {measured} {m.unit}".rstrip() + f" | {m.band:g} |")
    shape = (
        f"{parity.SPEC.num_layers}x{parity.SPEC.width}, vocabulary {parity.SPEC.vocab_size}, context {parity.SPEC.context_length}"
    )
    place = f"MLX {version('mlx')} and PyTorch {version('torch')} on the CPU of {platform.system()} {platform.machine()}"
    return "\n".join([*lines, "", f"{place}; model {shape}; `make parity` measures again."])


def write(readme, text):
    """Replace what stands between the markers of a README."""
    before, found, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        sys.exit(f"{readme} has no {BEGIN} ... {END}")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main():
    measurements = parity.everything()
    text = table(measurements)
    print(text)
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]), text)
    outside = [m.what for m in measurements if m.value > m.band]
    if outside:
        sys.exit(f"outside its band: {'; '.join(outside)}")


if __name__ == "__main__":
    main()
