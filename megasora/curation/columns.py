"""The columns of the pyramid's parquet tables; each stage keeps the columns of the one before and adds its own.

Every row stays until `filter`: a broken file, a shot that is too short and a clip whose scoring failed are rows with a reason, so that the
report can count them. A score that could not be taken is null, never a number.
"""

from __future__ import annotations

import pyarrow as pa

PROBE = pa.schema(
    [
        pa.field("id", pa.string(), metadata={"about": "16 hexadecimal digits from the path below the probed folder; stable over runs"}),
        pa.field("path", pa.string(), metadata={"about": "absolute path of the file"}),
        pa.field("text", pa.string(), metadata={"about": "caption from the sidecar file or table; empty when there is none"}),
        pa.field("media", pa.string(), metadata={"about": "video or image"}),
        pa.field("codec", pa.string(), metadata={"about": "FFmpeg's name of the decoder"}),
        pa.field("profile", pa.string(), metadata={"about": "codec profile, such as Constrained Baseline"}),
        pa.field("pix_fmt", pa.string(), metadata={"about": "FFmpeg's pixel format"}),
        pa.field("file_bytes", pa.int64(), metadata={"about": "size of the file"}),
        pa.field("duration_s", pa.float64(), metadata={"about": "seconds of video (of the shot after `shots`); 0 for an image"}),
        pa.field("num_frames", pa.int64(), metadata={"about": "frames (of the shot after `shots`)"}),
        pa.field("height", pa.int64(), metadata={"about": "pixels as stored"}),
        pa.field("width", pa.int64(), metadata={"about": "pixels as stored"}),
        pa.field("rotation", pa.int64(), metadata={"about": "degrees the picture must be turned to stand upright"}),
        pa.field(
            "sample_aspect_ratio", pa.float64(), metadata={"about": "width of a stored pixel / its height; 1 when the file does not say"}
        ),
        pa.field("aspect_ratio", pa.float64(), metadata={"about": "height / width in pixels as stored, after the crop"}),
        pa.field("resolution", pa.int64(), metadata={"about": "height x width, after the crop"}),
        pa.field("fps", pa.float64(), metadata={"about": "mean frame rate; 1 for an image"}),
        pa.field("bits_per_pixel", pa.float64(), metadata={"about": "bits of the video stream / (frames x height x width)"}),
        pa.field("variable_fps", pa.bool_(), metadata={"about": "time stamps are not evenly spaced; fps is a mean"}),
        pa.field("error", pa.string(), metadata={"about": "why the file cannot be used; empty when it can"}),
    ]
)
"""Written by `probe`."""

SHOTS = pa.schema(
    [
        *PROBE,
        pa.field("source_id", pa.string(), metadata={"about": "id of the file the shot is from"}),
        pa.field("start_frame", pa.int64(), metadata={"about": "first frame of the shot in the file"}),
        pa.field("end_frame", pa.int64(), metadata={"about": "one past the last frame"}),
        pa.field("crop_x", pa.int64(), metadata={"about": "left edge of the picture inside black borders; null without borders"}),
        pa.field("crop_y", pa.int64(), metadata={"about": "top edge"}),
        pa.field("crop_w", pa.int64(), metadata={"about": "width inside the borders"}),
        pa.field("crop_h", pa.int64(), metadata={"about": "height inside the borders"}),
    ]
)
"""Written by `shots`: one row a shot; `id` becomes <source_id>-<number>."""

SCORES = pa.schema(
    [
        pa.field(
            "vmaf_motion", pa.float64(), metadata={"about": "libavfilter vmafmotion, mean without the first frame; null for an image"}
        ),
        pa.field("blur_laplacian", pa.float64(), metadata={"about": "variance of the Laplacian, median of 5 frames: low is blurred"}),
        pa.field("blur_ffmpeg", pa.float64(), metadata={"about": "libavfilter blurdetect, mean: high is blurred; null on flat frames"}),
        pa.field("brightness", pa.float64(), metadata={"about": "mean luma in [0, 1]"}),
        pa.field("dark_share", pa.float64(), metadata={"about": "share of pixels with luma below 16 / 255"}),
        pa.field("bright_share", pa.float64(), metadata={"about": "share of pixels with luma above 239 / 255"}),
        pa.field("jitter", pa.float64(), metadata={"about": "mean change from frame to frame (PySceneDetect's content value, 0-255)"}),
        pa.field("freeze_share", pa.float64(), metadata={"about": "share of frames that repeat the one before"}),
        pa.field("black_share", pa.float64(), metadata={"about": "share of frames that are black"}),
        pa.field("text_area", pa.float64(), metadata={"about": "largest share of a frame covered by text boxes of confidence > 0.7"}),
        pa.field("aesthetic", pa.float64(), metadata={"about": "mean aesthetic score of first, middle and last frame"}),
        pa.field("frame_hashes", pa.list_(pa.binary(32)), metadata={"about": "PDQ hashes (256 bits) of evenly spaced frames"}),
        pa.field("score_error", pa.string(), metadata={"about": "why the clip could not be scored; empty when it could"}),
    ]
)
"""Added by `score`; a score that was not asked for has no column."""
