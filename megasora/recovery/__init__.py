"""Knowing why a run died, and bringing it back: heartbeats, watchdogs, exit records, goodput, stragglers, the supervisor.

Everything is files in run_dir/recovery, read and written without torch: what explains a dead run must not need a living one.
`sentry.Sentry` is a rank's part and the only thing training uses; `supervisor` starts ranks again; `report` is what `megasora doctor --run`
says.
"""
