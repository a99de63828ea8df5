"""A supervisor of `tests.recovery.loop`: `python -m tests.recovery.supervise RUN_DIR WORDS_OF_THE_LOOP...`, placed by the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megasora.recovery.agreement import Agreement, Place, open_store
from megasora.recovery.folder import RecoveryFolder
from megasora.recovery.restarts import RestartPolicy
from megasora.recovery.supervisor import Supervision, Supervisor

if __name__ == "__main__":
    env = os.environ
    place = Place(rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]), master_addr="localhost", master_port=int(env["MASTER_PORT"]))
    supervision = Supervision(
        command=[sys.executable, "-m", "tests.recovery.loop", *sys.argv[1:]],
        folder=RecoveryFolder.of_run(Path(sys.argv[1])),
        policy=RestartPolicy(max_restarts=2, backoff_s=0.5),
        grace_s=8.0,
    )
    sys.exit(Supervisor(supervision, place, Agreement(open_store(place, timeout_s=60), place, timeout_s=60)).run())
