"""Pictures without a plotting package: PNG files of images, and line charts as SVG."""

import html
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing import log, outputs

# -------------------------------------------------------- PNG


def write_png(path, pixels, place=outputs.again):
    """Write uint8 pixels (H, W, 3) as a PNG file. place: outputs.again, or outputs.new."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + width * 3), np.uint8)  # each row starts with its filter type, 0
    rows[:, 1:] = pixels.reshape(height, -1)

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))  # 8 bits, RGB
    data = chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
    with place(path) as temporary:
        temporary.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))


SIDE, GAP = 96, 2  # pixels: the width of an image, and white around it


def picture(path, rows, place=outputs.again):
    """Write a PNG of rows of images, each a float tensor (B, 3, H, W) in [0, 1].

    Each image is enlarged by a whole factor to a width of about SIDE. place: see write_png.
    """
    scale = max(1, round(SIDE / rows[0].shape[-1]))
    lines = []
    for row in rows:
        row = (row.float().clamp(0, 1) * 255).round().byte().cpu().numpy().transpose(0, 2, 3, 1)
        row = row.repeat(scale, axis=1).repeat(scale, axis=2)
        row = np.pad(row, ((0, 0), (GAP, GAP), (GAP, GAP), (0, 0)), constant_values=255)
        lines.append(np.concatenate(list(row), axis=1))
    write_png(path, np.concatenate(lines, axis=0), place)


# -------------------------------------------------------- SVG line charts

COLOURS = "#1f6fb4", "#d1495b", "#2a8f5b", "#8457b0", "#c07a12", "#4a5560"  # of the lines
TEXT, MUTED, GRID = "#1d2329", "#59636e", "#e3e7eb"
CHARACTER = 6.3  # about the width of a character of 11-pixel text, in pixels


@dataclass(frozen=True)
class Axis:
    """Maps values from low to high to pixels from start to end."""

    low: float
    high: float
    start: float
    end: float

    def pixel(self, value):
        """The pixel coordinate of `value`."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def ticks(low, high):
    """About five round values in [low, high], low < high, and the same values as text."""
    span = high - low
    exponent = math.floor(math.log10(span)) - 1
    sizes = [(digit, power) for power in (exponent, exponent + 1) for digit in (1, 2, 2.5, 5)]
    digit, power = min(sizes, key=lambda size: abs(span / (size[0] * 10.0 ** size[1]) - 4.5))
    step = digit * 10.0**power
    slack = 1e-9 * span / step  # a tick at the very end must survive rounding
    indices = range(math.ceil(low / step - slack), math.floor(high / step + slack) + 1)
    values = [index * step for index in indices]
    if power < -5:
        return values, [f"{value:.3g}" for value in values]
    decimals = max(0, -power + (digit == 2.5))
    return values, [f"{value:,.{decimals}f}" for value in values]


def limits(values, margin=0.0):
    """The least and greatest of `values`, moved apart by a share `margin` of their distance.

    Never equal. No values: (0, 1).
    """
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = 0.1 * abs(high) or 0.5
    else:
        pad = margin * (high - low)
    return low - pad, high + pad


def svg_text(x, y, text, anchor="start", fill=MUTED, more=""):
    """A <text> element. anchor: start, middle or end. more: further attributes."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}"'
    return f"<text {place} {more}>{html.escape(text)}</text>"


def svg_axes(x_axis, y_axis, x_ticks, y_ticks, x_label, y_label):
    """Grid lines, tick values and labels of both axes: a list of SVG elements."""
    left, right, bottom, top = x_axis.start, x_axis.end, y_axis.start, y_axis.end
    parts = []
    for value, text in zip(*y_ticks):
        y = y_axis.pixel(value)
        line = f'x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}"'
        parts += [f'<line {line} stroke="{GRID}"/>', svg_text(left - 7, y + 4, text, "end")]
    for value, text in zip(*x_ticks):
        x = x_axis.pixel(value)
        line = f'x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}"'
        parts += [f'<line {line} stroke="{GRID}"/>', svg_text(x, bottom + 17, text, "middle")]
    line = f'x1="{left:.1f}" y1="{bottom:.1f}" x2="{right:.1f}" y2="{bottom:.1f}"'
    parts.append(f'<line {line} stroke="{MUTED}"/>')
    parts.append(svg_text((left + right) / 2, bottom + 36, x_label, "middle"))
    middle = (top + bottom) / 2
    turn = f'transform="rotate(-90 15 {middle:.1f})"'
    parts.append(svg_text(15, middle, y_label, "middle", more=turn))
    return parts


def svg_lines(series, x_axis, y_axis):
    """The line of each series and its last value: a list of SVG elements.

    series: a list of (colour, points); each list of points has at least one.
    """
    parts, ends = [], []
    for colour, points in series:
        pixels = [(x_axis.pixel(x), y_axis.pixel(y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        style = f'stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"'
        parts.append(f'<polyline points="{path}" fill="none" {style}/>')
        x, y = pixels[-1]
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8" fill="{colour}"/>')
        ends.append((y, x, f"{points[-1][1]:.4g}", colour))
    below = -math.inf  # where the value above ends: values that are close are moved apart
    for y, x, text, colour in sorted(ends):
        y = max(y + 4, below)
        below = y + 13
        parts.append(svg_text(x + 7, y, text, fill=colour, more='font-weight="600"'))
    return parts


def svg_legend(names, colours, left, right, y):
    """Colour samples and names from (left, y), in as many lines as they need to end at `right`.

    Returns (a list of SVG elements, y of the last line).
    """
    parts, x = [], left
    for name, colour in zip(names, colours):
        width = 21 + CHARACTER * len(name)
        if x > left and x + width > right:
            x, y = left, y + 15
        line = f'x1="{x:.1f}" y1="{y - 4:.1f}" x2="{x + 16:.1f}" y2="{y - 4:.1f}"'
        parts.append(f'<line {line} stroke="{colour}" stroke-width="2.4"/>')
        parts.append(svg_text(x + 21, y, name, fill=TEXT))
        x += width + 18
    return parts, y


def svg_curve(points, title, x_label, y_label, width=640, height=280):
    """A line chart: the text of a standalone <svg> element, `width` by `height` pixels.

    points: a list of (x, y), or {name: list} for several lines with a legend. Points that are not
    finite are left out. The value of each line's last point is written at its end.
    """
    series = points if isinstance(points, dict) else {"": points}
    series = {
        name: [(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)]
        for name, line in series.items()
    }
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(series))]
    lines = [(colour, line) for colour, line in zip(colours, series.values()) if line]
    x_low, x_high = limits([x for _, line in lines for x, _ in line])
    if 0 < x_low < 0.1 * x_high:  # a first report after a few steps: start the axis at step 0
        x_low = 0.0
    y_low, y_high = limits([y for _, line in lines for _, y in line], margin=0.06)
    x_ticks, y_ticks = ticks(x_low, x_high), ticks(y_low, y_high)
    last = max((len(f"{line[-1][1]:.4g}") for _, line in lines), default=0)
    left = 34 + CHARACTER * max(len(text) for text in y_ticks[1])  # room for label and tick values
    right = width - 16 - 1.1 * CHARACTER * last  # room for the last values
    x_axis = Axis(x_low, x_high, left, right)
    legend, below = [], 23  # y of the last line of text above the plot
    if len(series) > 1:
        legend, below = svg_legend(series, colours, left, width - 8, 41)
    y_axis = Axis(y_low, y_high, height - 46, below + 15)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="11">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        svg_text(left, 21, title, fill=TEXT, more='font-size="13" font-weight="600"'),
        *legend,
        *svg_axes(x_axis, y_axis, x_ticks, y_ticks, x_label, y_label),
        *svg_lines(lines, x_axis, y_axis),
        "</svg>\n",
    ]
    return "\n".join(parts)


def loss_curve(out):
    """Write OUT/loss.svg: the training loss of OUT/metrics.jsonl by step, and the held-out loss.

    The held-out loss is `mim_loss`, which only pretrain.py records.
    """
    records = [record for record in log.read_metrics(out) if "step" in record]
    training, held_out = (
        [(record["step"], record[name]) for record in records if record.get(name) is not None]
        for name in ("loss", "mim_loss")
    )
    points = {"training": training, "held out": held_out} if held_out else training
    with outputs.again(Path(out, "loss.svg")) as temporary:
        temporary.write_text(svg_curve(points, "Training loss", "step", "loss"))
