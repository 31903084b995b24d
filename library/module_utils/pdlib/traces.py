"""The profiler's traces on the hosts that wrote them: room for them, waiting until they are whole, packing, removal.

They lie in ``<working directory of the unit>/profiles/<profile id>/``: the engine may write there, and a container has it, too.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import time
import zlib
from pathlib import Path
from typing import Dict, List, Sequence

from .accounts import own
from .errors import UserError
from .processes import work_dir
from .steps import STEP_S, Outcome

#: Seconds that a trace must not have grown for, before it is opened: torch's profiler writes in one go.
_STILL_S = 1.0
_SUFFIXES = (".trace.json.gz", ".trace.json", ".pickle")


def folder(state_dir: str, unit: str, profile_id: str) -> Path:
    """Return where a unit's traces go."""
    return Path(work_dir(state_dir, unit)) / "profiles" / profile_id


def prepare(state_dir: str, units: Sequence[str], profile_id: str, user: str) -> List[str]:
    """Make the folders, owned by ``user`` ("": us), and remove what profiles left that nobody fetched; return what was done."""
    done = []
    for unit in units:
        place = folder(state_dir, unit, profile_id)
        for old in sorted(place.parent.glob("*/")):
            shutil.rmtree(old, ignore_errors=True)
            done.append(f"removed profile {old.name}")
        place.mkdir(parents=True)
        if user:
            for path in (place.parent, place):
                own(path, user)
        done.append(f"made room for {unit}")
    return done


def files(state_dir: str, units: Sequence[str], profile_id: str) -> Dict[str, List[Path]]:
    """Return the traces of each unit."""
    return {
        unit: sorted(p for p in folder(state_dir, unit, profile_id).glob("*") if p.name.endswith(_SUFFIXES)) for unit in units
    }


def opens(path: Path) -> bool:
    """Tell whether a trace is whole: a gzip file has a checksum at its end, other files are taken as they are."""
    if not path.name.endswith(".gz"):
        return path.stat().st_size > 0
    try:
        with gzip.open(path) as stream:
            while stream.read(1 << 22):
                pass
    except (OSError, EOFError, zlib.error):
        return False
    return True


def collect(state_dir: str, wanted: Dict[str, int], profile_id: str) -> Outcome:
    """Wait some seconds until every unit has its traces (``wanted``: how many) and they are whole."""
    outcome, end = Outcome(), time.monotonic() + STEP_S
    while True:
        have = files(state_dir, list(wanted), profile_id)
        short = {unit: n for unit, n in wanted.items() if len(have[unit]) < n}
        written = [path for paths in have.values() for path in paths]
        still = all(time.time() - path.stat().st_mtime >= _STILL_S for path in written)
        if not short and still and all(map(opens, written)):
            outcome.done = True
            return outcome
        outcome.message = "; ".join(f"{unit} has written {len(have[unit])} of {n} traces" for unit, n in short.items())
        outcome.message = outcome.message or "traces are being written"
        if time.monotonic() >= end:
            return outcome
        time.sleep(0.3)


def pack(state_dir: str, profile_id: str, archive: str) -> None:
    """Write an archive of all traces of this host, ``<profile id>/traces/<worker>/``, for the owner of the folder it goes to."""

    def nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    try:
        # Traces are compressed already.
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            for place in sorted(Path(work_dir(state_dir, "x")).parent.glob(f"*/profiles/{profile_id}")):
                worker = place.parent.parent.name[len("pd-") :]
                for path in sorted(place.iterdir()):
                    tar.add(path, arcname=f"{profile_id}/traces/{worker}/{path.name}", filter=nobodys)
        owner = Path(archive).parent.stat()
        if owner.st_uid != os.geteuid():
            os.chown(archive, owner.st_uid, owner.st_gid)
    except OSError as error:
        raise UserError(f"the traces cannot be packed: {error.strerror} ({error.filename or archive})") from None


def drop(state_dir: str, profile_id: str) -> None:
    """Remove the traces from this host: the controller has them."""
    for place in Path(work_dir(state_dir, "x")).parent.glob(f"*/profiles/{profile_id}"):
        shutil.rmtree(place, ignore_errors=True)
