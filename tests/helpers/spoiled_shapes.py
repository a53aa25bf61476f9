"""Images of spoiled shapes (cut, stretched, turned, merged, mixed), which a detector must not accept, and of slightly
unsteady ones, which it must.

All are drawn eight times as fine as they are shown, so that their edges are as smooth as those of drawn scenes.
"""

import cv2
import numpy as np

from data.packing.shapes import BACKGROUND, COLORS, PALETTE, SHAPES, Object, cover

_FINE = 8


def disturbed(image, rng, blur, noise):
    """The picture (H, W, 3) uint8, smoothed by a Gaussian of `blur` pixels, with noise of that deviation of 255."""
    pixels = image.astype(np.float32)
    if blur:
        pixels = cv2.GaussianBlur(pixels, (0, 0), blur, borderType=cv2.BORDER_REPLICATE)
    return np.clip(np.rint(pixels + rng.normal(0, 1, pixels.shape) * noise), 0, 255).astype(np.uint8)


def picture(coverage, color):
    """A fine coverage in a palette's colour on the ground, (H, W, 3) uint8."""
    size = len(coverage) // _FINE
    alpha = cv2.resize(np.float32(coverage), (size, size), interpolation=cv2.INTER_AREA)[..., None]
    ground = np.float32(BACKGROUND)
    return np.rint(ground + alpha * (np.float32(PALETTE[color]) - ground)).astype(np.uint8)


def drawn(shape, center, side, size=32):
    """The fine coverage of one shape; lengths are shares of the picture's side."""
    n = size * _FINE
    rows, columns, covered = cover(Object(shape, "red", center, side, 0), n)
    whole = np.zeros((n, n), np.float32)
    whole[rows, columns] = covered / np.float32(255)
    return whole


def cut(coverage, share, turn):
    """Less this share of its area, on one side of a straight line at an angle in turns."""
    y, x = np.mgrid[: len(coverage), : len(coverage)]
    along = x * np.cos(2 * np.pi * turn) + y * np.sin(2 * np.pi * turn)
    return coverage * (along > np.quantile(along[coverage > 0.5], share))


def transformed(coverage, center, matrix):
    """Mapped by a matrix (2, 2) about a centre."""
    about = np.array(center) * len(coverage)
    affine = np.hstack([matrix, (about - matrix @ about)[:, None]])
    return cv2.warpAffine(coverage, affine, coverage.shape, flags=cv2.INTER_LINEAR)


def stretched(coverage, center, ratio):
    """Of the same area, and of this ratio of width to height if it was 1."""
    return transformed(coverage, center, np.diag([ratio**0.5, ratio**-0.5]))


def turned(coverage, center, turn):
    """Rotated by an angle in turns."""
    c, s = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)
    return transformed(coverage, center, np.array([[c, -s], [s, c]]))


def warped(coverage, rng, pixels):
    """Every point moved by about that many pixels of the image, neighbours alike, as an unsteady hand draws."""
    n = len(coverage)
    shift = [_smooth_noise(rng, n, 0.1) * np.float32(pixels * _FINE) for _ in "xy"]
    y, x = np.mgrid[:n, :n].astype(np.float32)
    return cv2.remap(coverage, x + shift[0], y + shift[1], cv2.INTER_LINEAR)


def blob(rng, size=32):
    """One or more rounded patches about the middle, an eighth of the picture in all."""
    n = size * _FINE
    y, x = (np.mgrid[:n, :n] / n - 0.5).astype(np.float32)
    height = _smooth_noise(rng, n, 0.07) * 0.35 + 1.6 * np.exp(-(x**2 + y**2) / (2 * 0.16**2))
    return np.float32(height > np.quantile(height, 7 / 8))


def _smooth_noise(rng, n, scale):
    """Noise (n, n) of mean 0 and deviation 1, smoothed over `scale` of the side."""
    coarse = n // _FINE
    noise = cv2.GaussianBlur(rng.normal(size=(coarse, coarse)).astype(np.float32), (0, 0), coarse * scale)
    return cv2.resize(noise / noise.std(), (n, n), interpolation=cv2.INTER_CUBIC)


def spoiled(rng, size=32):
    """One picture of each kind, of random shapes: kind, picture, and the shape that it is of or was of.

    The kinds "unsteady ..." should be forgiven, "stretched 1.25" may be; all others are no shapes.
    """
    one, other = rng.permutation(SHAPES)[:2].tolist()
    side, turn, center = rng.uniform(0.28, 0.5), rng.uniform(), tuple(rng.uniform(0.42, 0.58, 2))
    whole, second = drawn(one, center, side, size), drawn(other, center, side, size)
    for name, share in (("half", 1 / 2), ("a third missing", 1 / 3), ("a quarter missing", 1 / 4)):
        yield name, cut(whole, share, turn), one
    yield "mean of two", (whole + second) / 2, None
    small, away = rng.uniform(0.28, 0.36), np.array([np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)]) / 2
    for name, distance in (("two, half overlapping", 0.5), ("two, hardly overlapping", 0.75)):
        pair = [(a, center + sign * small * distance * away) for a, sign in ((one, -1), (other, 1))]
        first, last = (drawn(shape, tuple(place), small, size) for shape, place in pair)
        yield name, np.maximum(first, last), None
    for ratio in (1.25, 1.4, 1.6):
        yield f"stretched {ratio}", stretched(whole, center, ratio if rng.uniform() < 0.5 else 1 / ratio), one
    angular = str(rng.choice([shape for shape in SHAPES if shape not in ("circle", "ring")]))
    yield "turned by 45 degrees", turned(drawn(angular, center, side, size), center, 1 / 8), None
    upright = str(rng.choice(["triangle", "heart", "star", "crescent"]))
    yield "upside down", turned(drawn(upright, center, side, size), center, 1 / 2), None
    yield "blob", blob(rng, size), None
    for pixels in (0.25, 0.5):
        yield f"unsteady by {pixels} px", warped(whole, rng, pixels * size / 32), one


def spoiled_pictures(count, size=32, seed=0):
    """For each kind `count` times (picture, shape), in the colours of the palette."""
    rng = np.random.default_rng(seed)
    found = {}
    for _ in range(count):
        for kind, coverage, shape in spoiled(rng, size):
            found.setdefault(kind, []).append((picture(coverage, COLORS[rng.integers(len(COLORS))]), shape))
    return found
