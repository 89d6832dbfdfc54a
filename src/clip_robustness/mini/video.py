"""A camera that moves around a scene: sets of frames about an anchor, as in ImageNet-Vid-Robust and YTBB-Robust.

Yaw, elevation, size and place of the solid drift smoothly and by the same scene's anchor at distance 0; all else stays.
"""

from collections.abc import Mapping

import numpy as np

# Largest amplitude of the drift, in the factor's own unit (see `world.FACTORS`); a set's own is between half and all.
_DRIFT = {"yaw": 20.0, "elevation": 7.0, "scale": 0.08, "x": 0.15, "y": 0.12}
_PACE = (0.1, 0.3)  # radians a frame: ten frames are between a sixth and half of a period


def move_camera(scenes: Mapping[str, np.ndarray], frames: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Columns [anchors] -> [anchors * (2 * frames + 1)]: each scene as 2 * frames + 1 frames, its anchor in the middle.

    A factor drifts by a (sin(w t + p) - sin p) at distance t, with a, w and p drawn for each set and factor: not at
    all at the anchor, and little from a frame to the next. Adds `distance` (int32, -frames..frames).
    """
    anchors = len(scenes["label"])
    distance = np.arange(-frames, frames + 1, dtype=np.int32)
    moved = {name: np.repeat(column, len(distance)) for name, column in scenes.items()}
    for name, largest in _DRIFT.items():
        amplitude = rng.uniform(0.5 * largest, largest, (anchors, 1))
        pace, phase = rng.uniform(*_PACE, (anchors, 1)), rng.uniform(0, 2 * np.pi, (anchors, 1))
        drift = amplitude * (np.sin(pace * distance + phase) - np.sin(phase))
        moved[name] += drift.ravel().astype(np.float32)
    moved["distance"] = np.tile(distance, anchors)
    return moved
