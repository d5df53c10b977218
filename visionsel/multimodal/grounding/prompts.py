"""From a heatmap to what a segmenter is asked with: points, a box, a mask.

VL-SAM (Lin et al. 2024, arXiv:2410.05963): the map is cut at a threshold; its largest connected component is
the positive area, the rest the negative one; the positive point is the highest place of the former, the
negative point the lowest of the latter. The paper names no threshold. Ours is half way between the least and
the largest value; Otsu's is the other choice (DecAF).

Arrays of numpy, for these are maps over pixels of one image at a time.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["Prompt", "cut_at", "find_components", "mask_logits", "otsu", "sample_prompt"]


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a heatmap points at.

    Attributes:
        points: float32 `[P, 2]`, (x, y) in pixels, the positive first.
        labels: int64 `[P]`: 1 inside, 0 outside.
        box: (x0, y0, x1, y1) around the area, the last two one past the end.
        area: bool `[H, W]`, the component.
    """

    points: np.ndarray
    labels: np.ndarray
    box: tuple[int, int, int, int]
    area: np.ndarray


def sample_prompt(
    heatmap: np.ndarray, threshold: float | str = 0.5, negative: bool = True, inside: np.ndarray | None = None
) -> Prompt | None:
    """The prompt of a heatmap.

    Of equal values the first counts, rows from top to bottom; so does the first of equally large components.

    Args:
        heatmap: `[H, W]`.
        threshold: see `cut_at`.
        negative: give a negative point too, where anything is outside.
        inside: bool `[H, W]`: only here can the area be, such as in an earlier mask.

    Returns:
        None where nothing stands out: for a map of one value, or nothing inside.

    Raises:
        ValueError: for a map that is no `[H, W]`, holds NaN or infinity, or an unknown threshold.
    """
    if heatmap.ndim != 2 or not heatmap.size:
        raise ValueError(f"a heatmap is [H, W], got {list(heatmap.shape)}")
    if not np.isfinite(heatmap).all():
        raise ValueError("the heatmap holds NaN or infinity")
    active = heatmap > cut_at(heatmap, threshold)
    if inside is not None:
        active &= inside
    if not active.any():
        return None
    labels = find_components(active)
    sizes = np.bincount(labels.ravel())
    area = labels == 1 + int(sizes[1:].argmax())
    rows, columns = np.flatnonzero(area.any(1)), np.flatnonzero(area.any(0))
    places = [int(np.where(area, heatmap, -np.inf).argmax())]
    if negative and not area.all():
        places.append(int(np.where(area, np.inf, heatmap).argmin()))
    y, x = np.unravel_index(places, heatmap.shape)
    return Prompt(
        np.stack((x, y), 1).astype(np.float32),
        np.array([1, 0][: len(places)], dtype=np.int64),
        (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1),
        area,
    )


def cut_at(heatmap: np.ndarray, threshold: float | str) -> float:
    """The value above which a map is active.

    Args:
        heatmap: of any shape.
        threshold: share of the way from the least to the largest value, 0 to below 1, or `"otsu"`.

    Raises:
        ValueError: for another threshold.
    """
    if threshold == "otsu":
        return otsu(heatmap)
    if isinstance(threshold, str) or not 0 <= threshold < 1:
        raise ValueError(f'threshold is "otsu" or a share from 0 to below 1, got {threshold!r}')
    low, high = float(heatmap.min()), float(heatmap.max())
    return low + threshold * (high - low)


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """The threshold that parts values into two groups with means as far apart as can be (Otsu 1979).

    Args:
        values: of any shape.
        bins: of the histogram between the least and the largest value.

    Returns:
        the border of two bins; values above it are the upper group. The value itself where all are equal.
    """
    low, high = float(values.min()), float(values.max())
    if not low < high:
        return low
    counts, edges = np.histogram(values, bins, (low, high))
    middles = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()[:-1].astype(np.float64)
    above = values.size - below
    sums = (counts * middles).cumsum()
    apart = sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    spread = below * above * apart**2
    best = np.flatnonzero(spread >= spread.max() * (1 - 1e-12))
    # between two clear groups every border in the gap is as good: the one in the middle
    return float(edges[1 + best[len(best) // 2]])


def find_components(active: np.ndarray) -> np.ndarray:
    """Connected components, neighbours over corners counted.

    Runs of each row are joined with those that they touch in the row before, so that the time goes with the
    number of runs.

    Args:
        active: bool `[H, W]`.

    Returns:
        int64 `[H, W]`: 0 where nothing is active, else the number of the component, from 1 in the order of
        their first pixels.
    """
    height, width = active.shape
    padded = np.zeros((height, width + 2), dtype=np.int8)
    padded[:, 1:-1] = active
    steps = np.diff(padded, axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]  # one past the last
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    first = np.searchsorted(rows, np.arange(height + 1)).tolist()
    begin, stop = starts.tolist(), ends.tolist()
    for row in range(1, height):
        above, run = first[row - 1], first[row]
        while above < first[row] and run < first[row + 1]:
            if begin[above] <= stop[run] and begin[run] <= stop[above]:
                old, new = sorted((root(above), root(run)))
                parent[new] = old
            if stop[above] < stop[run]:
                above += 1
            else:
                run += 1
    numbers: dict[int, int] = {}
    labels = np.zeros(active.shape, dtype=np.int64)
    for run, row in enumerate(rows.tolist()):
        labels[row, begin[run] : stop[run]] = numbers.setdefault(root(run), len(numbers) + 1)
    return labels


def mask_logits(heatmap: np.ndarray, least: float = 1e-3) -> np.ndarray:
    """A heatmap as logits for `Segmenter.mask_prompt`: stretched to [0, 1], where 0.5 is the border.

    Args:
        heatmap: `[H, W]`; of one value: nothing stands out, and all are at the lowest logit.
        least: how near to 0 and 1 shares may come.
    """
    low, high = float(heatmap.min()), float(heatmap.max())
    shares = np.clip((heatmap.astype(np.float64) - low) / ((high - low) or 1.0), least, 1 - least)
    return np.log(shares / (1 - shares)).astype(np.float32)
