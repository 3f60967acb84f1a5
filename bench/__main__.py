"""The command: choose servers and workloads, run the rounds, print the table."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import re
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import auth, manifest_load, packing, s3, servers, views, workloads
from bench.figures import GIB, Measure, as_markdown, as_text, judge, table
from bench.servers import CACHE, Candidate, Place, ServerFailed
from bench.wire import UnexpectedReply
from bench.workloads import QUICK, Material, Scale, Workload

WORKLOADS = (*workloads.WORKLOADS, *views.WORKLOADS, *auth.WORKLOADS)
DOCUMENT = Path("docs/performance.md")
PACKING = "kitclient"


@dataclass(frozen=True, slots=True)
class Session:
    """How this run measures."""

    scratch: Path
    scale: Scale
    rounds: int
    workers: int


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    # As Ctrl-C: the servers that were started end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    scale = QUICK if options.quick else Scale()
    candidates = options.candidates or _default_candidates()
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="run-", dir=options.scratch or CACHE) as scratch:
            session = Session(Path(scratch), scale, options.rounds or scale.rounds, options.workers)
            tables = list(_measured(options.only, candidates, session))
    except (ServerFailed, UnexpectedReply, packing.ClientFailed) as error:
        sys.exit("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]))
    if options.markdown:
        _write_document(tables, session)


def _measured(
    only: Sequence[str] | None, candidates: Sequence[Candidate], session: Session
) -> Iterator[Cells]:
    """The tables, each printed as soon as it is there."""
    in_folders = [candidate for candidate in candidates if not candidate.is_on_s3]
    on_s3 = [candidate for candidate in candidates if candidate.is_on_s3]
    if (chosen := _chosen(WORKLOADS, only)) and in_folders:
        yield from map(_printed, _measure_servers(chosen, in_folders, session, Place(session.scratch)))
    if (chosen := _chosen(s3.WORKLOADS, only)) and on_s3:
        yield from map(_printed, _measure_on_s3(chosen, on_s3, session))
    if (not only or PACKING in only) and in_folders:
        yield from map(_printed, _measure_clients(in_folders[0], session))


def _chosen(known: Sequence[Workload], only: Sequence[str] | None) -> list[Workload]:
    return [workload for workload in known if not only or workload.name in only]


def _printed(cells: Cells) -> Cells:
    print(f"\n{as_text(cells)}\n", flush=True)
    return cells


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, one round: shows only that everything runs"
    )
    names = [*(workload.name for workload in (*WORKLOADS, *s3.WORKLOADS)), PACKING]
    parser.add_argument("--only", action="append", choices=names, help="repeatable")
    parser.add_argument("--rounds", type=int, help="of each workload on each server (5)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="for {workers} in the commands (one a core)"
    )
    parser.add_argument(
        "--scratch", type=Path, help="where blobs and servers' folders go (.cache/bench); one disk for all"
    )
    parser.add_argument("--markdown", action="store_true", help=f"put the tables into {DOCUMENT}")
    server = parser.add_argument_group(
        "servers",
        "the first is compared with each of the others, on folders and on S3 apart; default: ours, CNCF Distribution",
    )
    server.add_argument(
        "--server",
        dest="candidates",
        action="append",
        type=_started,
        metavar="NAME[=COMMAND]",
        help="a command with {port}, {folder} and {workers} in it, or, to be measured on S3, with {endpoint}, {bucket} "
        f"and {{streams}} (true, false) for {{folder}}; known by name alone: {', '.join(_KNOWN)}",
    )
    server.add_argument(
        "--url",
        dest="candidates",
        action="append",
        type=_running_already,
        metavar="NAME=URL",
        help="a server that runs already",
    )
    return parser


def _started(text: str) -> Candidate:
    name, _, command = text.partition("=")
    if command:
        return Candidate(name, command=command)
    candidate = _KNOWN[name]() if name in _KNOWN else None
    if candidate is None:
        raise argparse.ArgumentTypeError(f"{name} is not known here; give NAME=COMMAND")
    return candidate


def _running_already(text: str) -> Candidate:
    name, found, url = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError("NAME=URL, please")
    return Candidate(name, url=url)


_KNOWN: dict[str, Callable[[], Candidate | None]] = {
    "ours": lambda: Candidate("ours", servers.OURS),
    "distribution": servers.distribution,
    "ours-s3": lambda: Candidate("ours-s3", servers.OURS_ON_S3),
    "distribution-s3": servers.distribution_on_s3,
}


def _default_candidates() -> list[Candidate]:
    found = [candidate for known in _KNOWN.values() if (candidate := known()) is not None]
    if len(found) < len(_KNOWN):
        print("no Go to build CNCF Distribution with: ours is measured alone")
    return found


Samples = dict[str, dict[str, list[float]]]
Cells = list[tuple[str, ...]]


def _measure_servers(
    chosen: Sequence[Workload], candidates: Sequence[Candidate], session: Session, place: Place
) -> list[Cells]:
    material = Material(session.scratch, session.scale)
    samples: Samples = defaultdict(lambda: defaultdict(list))
    for workload in chosen:
        for number in range(min(session.rounds, workload.rounds_max)):
            # Turn by turn, and who is first changes: what drifts, drifts for all.
            for candidate in candidates if number % 2 == 0 else reversed(candidates):
                workers = workload.workers or session.workers
                with servers.running(candidate, place, workers, streams=workload.streams) as server:
                    figures = workload.run(server, material)
                _note(samples, figures, candidate.name)
    measures = [measure for workload in chosen for measure in workload.measures]
    return _tables(measures, samples, [candidate.name for candidate in candidates])


def _measure_on_s3(
    chosen: Sequence[Workload], candidates: Sequence[Candidate], session: Session
) -> list[Cells]:
    binary = s3.gateway()
    if binary is None:
        print("no Go to build versitygw with: nothing is measured on S3")
        return []
    with s3.store(binary, session.scratch) as place:
        return _measure_servers(chosen, candidates, session, place)


def _measure_clients(registry: Candidate, session: Session) -> list[Cells]:
    peer = packing.peer()
    if peer is None:
        print("no `kit` on the PATH: kitclient is measured alone")
    clients = [packing.OURS] if peer is None else [packing.OURS, peer]
    for client in clients:
        packing.warm_up(client)
    samples: Samples = defaultdict(lambda: defaultdict(list))
    for case, model in packing.make_models(session.scratch / "models", session.scale).items():
        for number in range(session.rounds):
            for client in clients if number % 2 == 0 else reversed(clients):
                with servers.running(registry, Place(session.scratch), session.workers) as server:
                    figures = packing.measure(client, server, model, case, session.scratch)
                _note(samples, figures, client.name)
    return _tables(packing.MEASURES, samples, [client.name for client in clients])


def _note(samples: Samples, figures: dict[str, float], name: str) -> None:
    for row, figure in figures.items():
        samples[row][name].append(figure)
        print(f"{row:45} {name:14} {figure:.3f}", flush=True)


def _tables(measures: Sequence[Measure], samples: Samples, names: Sequence[str]) -> list[Cells]:
    """One for each peer; one with an empty column when there is none."""
    ours, *peers = names
    return [table(judge(measures, samples, ours, peer), ours, peer) for peer in peers or ["(no peer)"]]


def _write_document(tables: Sequence[Cells], session: Session) -> None:
    text = "\n\n".join([_circumstances(session), *map(as_markdown, tables)])
    document = DOCUMENT.read_text()
    DOCUMENT.write_text(_BETWEEN_MARKS.sub(lambda match: f"{match[1]}\n{text}\n{match[2]}", document))


_BETWEEN_MARKS = re.compile(r"(<!-- bench: begin -->).*(<!-- bench: end -->)", re.DOTALL)


def _circumstances(session: Session) -> str:
    processors = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    today = dt.datetime.now(dt.UTC).date()
    return (
        f"{today}: {os.cpu_count()} x {processors[0] if processors else platform.machine()}, {memory:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}; {session.rounds} rounds, {session.workers} workers, "
        f"CNCF Distribution {servers.DISTRIBUTION_VERSION}, versitygw {s3.VERSITYGW_VERSION}, manifests by {manifest_load.generator()}."
    )


if __name__ == "__main__":
    main()
