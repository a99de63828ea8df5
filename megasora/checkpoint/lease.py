"""Who may write to a run's checkpoints: one process at a time, numbered by a strictly increasing incarnation.

Incarnation n is the file `.owner_<n>.json`, made by link(2), which fails when the name is there: the owner is the highest number, so a
number is never given twice and a takeover is one atomic step. Whatever incarnation n does to names that others read (`step_*`, `latest`)
is a rename out of or into its working folder `.work_<n>`, which is made once, at the takeover, and never again.

Why a check before such a rename is safe. A takeover (1) links its owner file, (2) empties and removes the working folders of all older
incarnations, (3) only then lists checkpoints. After (2) the old folder is a removed directory: a rename out of it or into it fails, and
so does making a folder in it, however long ago the check was. Therefore nothing of an older incarnation changes what (3) lists. A commit
before (2) is a whole checkpoint of a process that was the owner when it checked, and (3) lists it. A final folder that was set aside when
(2) came between the two renames of a replacement is put back by (2). The check itself only turns the failure into a sentence. Files that
a stale writer holds open lead into folders that nobody lists. A process that was slower with its takeover than the next one may make its
working folder after the next one's (2), but then every check it ever makes comes later than the next one's (1) and fails.
(tests/unit/checkpoint/test_fencing.py interleaves both sides at every call.)

Whether an owner lives: on the same host its process number, start time, boot and PID namespace; elsewhere whether its counter changes
while we watch. No clocks are compared. This module knows neither tensors nor ranks: rank 0 holds the lease.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megasora.config.errors import UserError
from megasora.config.files import sync_to_disk

BEAT_S = 5.0
"""Seconds between two heartbeats."""
WATCH_S = 12.0
"""Seconds of watching the counter of an owner on another host; two beats and the time a network file system takes to show them."""
OWNER = re.compile(r"\.owner_(\d{8,})\.json")
WORK = re.compile(r"\.work_(\d{8,})")
ASIDE = "replaced_"
"""Prefix of a final folder that stands aside, in a working folder, while its replacement is renamed."""
_RELEASED = "released"


class LeaseLostError(UserError):
    """Another run has taken over."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """Which process an owner is."""

    host: str
    place: str
    """Boot and PID namespace: where `pid` means something."""
    pid: int
    started: str
    """The process's start in clock ticks since boot (proc_pid_stat(5), field 22)."""
    slurm_job: str
    slurm_restart: int
    since: float
    """Unix time of the takeover, for messages only."""

    @classmethod
    def own(cls, environment: Mapping[str, str] | None = None) -> Token:
        """This process."""
        known = os.environ if environment is None else environment
        return cls(
            host=os.uname().nodename,
            place=_place(),
            pid=os.getpid(),
            started=_start_of(os.getpid()) or "",
            slurm_job=known.get("SLURM_JOB_ID", ""),
            slurm_restart=int(known.get("SLURM_RESTART_COUNT", "0") or 0),
            since=time.time(),
        )

    def described(self) -> str:
        """Host, process and age in words."""
        minutes = max(0, int(time.time() - self.since)) // 60
        age = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        return f"host {self.host}, pid {self.pid}{job}, for {age}"


@dataclass(frozen=True, kw_only=True)
class Owner:
    """An incarnation as its file says it."""

    incarnation: int
    token: Token | None
    """None when the file cannot be read."""
    beat: str


def current_owner(root: Path) -> Owner | None:
    """The highest incarnation of a checkpoints folder, released or not."""
    number = _highest(root)
    if number == 0:
        return None
    try:
        facts = json.loads(_owner_file(root, number).read_text())
        beat = facts.pop("beat")
        return Owner(incarnation=number, token=Token(**facts), beat=beat)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Owner(incarnation=number, token=None, beat="")


def refusal(root: Path, owner: Owner | None, own: Token, *, watch_s: float) -> str | None:
    """Why a run may not take over from this owner, or None: it is gone, has let go, or is this SLURM job before it was requeued."""
    if owner is None or owner.beat.strip() == _RELEASED:
        return None
    then = owner.token
    if then is not None:
        if own.slurm_job and own.slurm_job == then.slurm_job and own.slurm_restart > then.slurm_restart:
            return None
        if (then.host, then.place) == (own.host, own.place):
            alive = _start_of(then.pid) == then.started
            return _in_use(root, then.described()) if alive else None
    deadline = time.monotonic() + watch_s
    while time.monotonic() < deadline:
        time.sleep(min(0.5, watch_s / 4))
        now = current_owner(root)
        if now != owner:
            if now is not None and now.beat.strip() == _RELEASED:
                return None
            who = now.token.described() if now is not None and now.token is not None else "a run that is just starting"
            return _in_use(root, who)
    return None


def _in_use(root: Path, who: str) -> str:
    return f"{root} belongs to a run that is alive ({who}); stop that one first, or take its place with --checkpoint.take_over"


class Lease:
    """The right to write checkpoints, held from `take` until `release` or until another run takes over.

    Attributes:
        root: the checkpoints folder.
        incarnation: this run's number.
        work: its working folder, on the same file system as the checkpoints.
    """

    def __init__(self, root: Path, *, incarnation: int, token: Token, beat_s: float) -> None:
        self.root, self.incarnation = root, incarnation
        self.work = _work_folder(root, incarnation)
        self._token, self._beat_s = token, beat_s
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._trash: list[Path] = []
        self._thread = threading.Thread(target=self._keep, name="checkpoint-lease", daemon=True)

    @classmethod
    def take(
        cls, root: Path, *, force: bool = False, token: Token | None = None, beat_s: float = BEAT_S, watch_s: float = WATCH_S
    ) -> Lease:
        """Become the owner; when this returns, nothing of an older incarnation can change what `root` lists.

        Args:
            root: made when it is not there.
            force: take over from an owner that is alive.
            token: who asks; this process unless a test says otherwise.
            beat_s: seconds between heartbeats.
            watch_s: seconds of watching an owner on another host.

        Raises:
            UserError: another run is alive, or the folder cannot be written.
        """
        own = token or Token.own()
        try:
            root.mkdir(parents=True, exist_ok=True)
            before = current_owner(root)
            reason = None if force else refusal(root, before, own, watch_s=watch_s)
            if reason is not None:
                raise UserError(reason)
            lease = cls(root, incarnation=_claim(root, before, own), token=own, beat_s=beat_s)
        except OSError as error:
            raise UserError(f"{root} cannot take checkpoints: {error.strerror}; mend it or choose another --run_dir") from error
        try:
            lease._sweep()
        except OSError as error:
            lease.check()  # a faster run has swept this one
            raise UserError(f"{root} cannot take checkpoints: {error.strerror}; mend it or choose another --run_dir") from error
        lease._thread.start()
        return lease

    @property
    def lost(self) -> bool:
        """Whether the heartbeat has seen a newer owner; costs nothing."""
        return self._lost.is_set()

    def check(self) -> None:
        """Look whether this is still the owner.

        Raises:
            LeaseLostError: it is not.
            OSError: the folder cannot be read.
        """
        if self._lost.is_set() or _highest(self.root) > self.incarnation:
            self._lost.set()
            raise LeaseLostError(self.loss())

    def loss(self) -> str:
        """The sentence for a run that lost its lease."""
        owner = current_owner(self.root)
        who = f" ({owner.token.described()})" if owner is not None and owner.token is not None else ""
        return f"another run has taken over {self.root}{who}; this one stops, what it saved before is kept"

    def release(self) -> None:
        """Stop the heartbeat and let the next run take over at once."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):
            if not self._lost.is_set() and _highest(self.root) == self.incarnation:
                shutil.rmtree(self.work, ignore_errors=True)
                self._write_beat(_RELEASED)

    def _sweep(self) -> None:
        """Make the working folder, then end all older ones."""
        self.work.mkdir()
        for name in sorted(os.listdir(self.root)):
            match = WORK.fullmatch(name)
            if match and int(match[1]) < self.incarnation:
                self._end(self.root / name)
            match = OWNER.fullmatch(name)
            if match and int(match[1]) < self.incarnation:
                (self.root / name).unlink(missing_ok=True)
        sync_to_disk(self.root)
        self._trash = list(self.work.iterdir())

    def _end(self, folder: Path) -> None:
        """Empty and remove an older working folder; its owner may still be moving things in it."""
        while True:
            try:
                names = os.listdir(folder)
            except FileNotFoundError:
                return
            for name in names:
                with contextlib.suppress(OSError):  # moved by its owner meanwhile: look again
                    final = self.root / name.removeprefix(ASIDE)
                    restore = name.startswith(ASIDE) and not final.exists()
                    os.rename(folder / name, final if restore else self.work / f"{folder.name}.{name}")
            with contextlib.suppress(OSError):
                os.rmdir(folder)
                return
            time.sleep(0.001)

    def _keep(self) -> None:
        """Beat until the end or until a newer owner is there. What older incarnations left is removed beside it: that may take minutes."""
        threading.Thread(target=self._clear, name="megasora-trash", daemon=True).start()
        number = 0
        while not self._stop.wait(self._beat_s):
            number += 1
            with contextlib.suppress(OSError):  # a disk that is away for a moment is no loss
                if _highest(self.root) > self.incarnation:
                    self._lost.set()
                    return
                self._write_beat(str(number))

    def _clear(self) -> None:
        for path in self._trash:
            shutil.rmtree(path, ignore_errors=True)

    def _write_beat(self, beat: str) -> None:
        """In place and of one length: it needs no room on a full disk, and no reader sees half of it."""
        descriptor = os.open(_owner_file(self.root, self.incarnation), os.O_WRONLY)
        try:
            os.pwrite(descriptor, _content(self._token, beat), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _claim(root: Path, before: Owner | None, own: Token) -> int:
    """The next incarnation's number, once its owner file is there.

    Raises:
        UserError: another run was faster.
    """
    number = (before.incarnation if before else 0) + 1
    taken = f"{root} was taken by another run at this moment; one run at a time can have it"
    draft = root / f".draft_{own.host}_{own.pid}_{threading.get_ident()}"
    try:
        with draft.open("wb") as file:
            file.write(_content(own, "0"))
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, _owner_file(root, number))
    except FileExistsError as error:
        raise UserError(taken) from error
    finally:
        draft.unlink(missing_ok=True)
    if _highest(root) > number:  # the number was free again because its owner had been replaced meanwhile
        _owner_file(root, number).unlink(missing_ok=True)
        raise UserError(taken)
    return number


def _content(token: Token, beat: str) -> bytes:
    return json.dumps({**asdict(token), "beat": f"{beat:>12}"}).encode()


def _owner_file(root: Path, number: int) -> Path:
    return root / f".owner_{number:08d}.json"


def _work_folder(root: Path, number: int) -> Path:
    return root / f".work_{number:08d}"


def _highest(root: Path) -> int:
    return max((int(match[1]) for name in os.listdir(root) if (match := OWNER.fullmatch(name))), default=0)


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_of(pid: int) -> str | None:
    """When a process of this place started, or None when there is none; what follows the name's closing bracket is fields 3 and on."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
