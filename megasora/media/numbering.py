"""Numbers of frames: one count for everything that reads clips, exact at any start, in any container, at a variable frame rate.

Training and curation read through it, so a shot's first frame is the same picture for both. Needs PyAV alone, no torch.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import chain

import av

SEEK_FROM_FRAME = 64
"""Reads that start earlier count frames from the start of the file; a seek pays later on."""

MOST_LEADING_FRAMES = 16
"""Frames that may stand after a key frame in the file and before it on the screen (open groups of pictures): the reference frames H.264 and
HEVC allow are 16. The key frame sought lies so far before the start that it is shown before it too."""

ONE_FRAME_PER_PACKET = ("h264", "hevc", "vp9", "av1")
"""Codecs whose packets are one shown frame each, so that packets can be counted for frames. VP8 has packets that show nothing, MPEG-4 in
AVI packets with two frames."""


class LostCountError(Exception):
    """A read that began at a key frame cannot tell frame numbers; counting from the start of the file can."""


class MissingFrameError(Exception):
    """A frame between others did not come out of the decoder; `frame` is its number."""

    def __init__(self, frame: int) -> None:
        super().__init__(f"frame {frame} is missing")
        self.frame = frame


class Spoilage:
    """Which corrupt frame the frames of a read suffer from: it spoils what is predicted from it, up to the next key frame."""

    def __init__(self) -> None:
        self._corrupt: int | None = None

    def of(self, number: int, frame: av.VideoFrame) -> int | None:
        """Number of the corrupt frame that spoils this one; None when it is sound. To be asked of every frame, in order."""
        if frame.is_corrupt:
            self._corrupt = number
        elif frame.key_frame:  # nothing after it is predicted from before it
            self._corrupt = None
        return self._corrupt


def numbered_frames(
    container: av.container.InputContainer, stream: av.VideoStream, *, start: int, seek: bool, deadline: float
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(frame number, frame) from the start of the file, or from the last usable key frame before `start` on.

    After a seek a frame's number is the number of packets shown before it, so it is exact at a variable frame rate as well.

    Args:
        container: just opened; nothing was read from it.
        stream: its video.
        start: the first frame that is wanted; frames before it come as well.
        seek: begin at a key frame where that pays (`SEEK_FROM_FRAME`) and the codec's packets can be counted.
        deadline: `time.monotonic()` at which reading is given up; infinite for never.

    Raises:
        LostCountError: packets do not tell the number, or decoding cannot begin at the key frame; only after a seek.
        MissingFrameError: a later frame is missing.
        TimeoutError: the deadline passed.
    """
    if not seek or start < SEEK_FROM_FRAME or stream.codec_context.codec.canonical_name not in ONE_FRAME_PER_PACKET:
        yield from enumerate(chain.from_iterable(packet.decode() for packet in _packets(container, stream, deadline=deadline)))
        return
    counted, packets = _packets_from_key_frame(container, stream, start=start, deadline=deadline)
    stamps: list[int] = []  # of the packets since the key frame, in the order they are shown
    key_stamp: int | None = None
    expected: int | None = None
    for packet in packets:
        if packet.size:
            if packet.pts is None:
                raise LostCountError("packets carry no time stamps")
            key_stamp = packet.pts if key_stamp is None else key_stamp
            if not packet.is_discard:
                insort(stamps, packet.pts)
        for frame in packet.decode():
            if frame.pts is None or key_stamp is None:
                raise LostCountError("frames carry no time stamps")
            if frame.pts < key_stamp:  # predicted from frames before the key frame
                continue
            number = counted + bisect_left(stamps, frame.pts)
            if expected is None and frame.pts != stamps[bisect_left(stamps, key_stamp)]:
                raise LostCountError("the key frame itself did not come")  # a recovery point that takes some frames
            if expected is not None and number != expected:
                raise MissingFrameError(expected)
            expected = number + 1
            yield number, frame


def _packets(container: av.container.InputContainer, stream: av.VideoStream, *, deadline: float) -> Iterator[av.Packet]:
    for packet in container.demux(stream):
        if time.monotonic() > deadline:
            raise TimeoutError
        yield packet


def _packets_from_key_frame(
    container: av.container.InputContainer, stream: av.VideoStream, *, start: int, deadline: float
) -> tuple[int, Iterator[av.Packet]]:
    """(packets shown before the first one, packets from a key frame on).

    mp4 and mov index every packet, so the key frame's place is looked up and sought. Other containers are read from the start, but their
    packets before the key frame are not decoded.
    """
    index = stream.index_entries
    if "mp4" in container.format.name and len(index) == stream.frames > MOST_LEADING_FRAMES:
        aim = index[min(start, len(index) - 1) - MOST_LEADING_FRAMES]
        container.seek(aim.timestamp, stream=stream)
        packets = _packets(container, stream, deadline=deadline)
        first = next(packets)
        place = index.search_timestamp(first.dts, any_frame=True) if first.dts is not None else -1
        if place < 0 or index[place].pos != first.pos or not index[place].is_keyframe:
            raise LostCountError("the key frame is not in the index")
        shown = place - sum(index[earlier].is_discard for earlier in range(place))
        return shown, chain([first], packets)
    packets = _packets(container, stream, deadline=deadline)
    held: list[av.Packet] = []
    place = key_place = 0
    for packet in packets:
        if packet.is_keyframe and place <= start - MOST_LEADING_FRAMES:
            held.clear()
            key_place = place
        held.append(packet)
        place += not packet.is_discard
        if place > start - MOST_LEADING_FRAMES:
            break
    if not held[0].is_keyframe:
        raise LostCountError("the file does not begin with a key frame")
    return key_place, chain(held, packets)
