"""Results of a sweep as tables: read from a store, or exported with where they come from."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import warnings
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from paperlib.grid import to_json
from paperlib.replace_file import replace_files
from paperlib.store import Store

if TYPE_CHECKING:
    import pandas


def machine() -> dict[str, object]:
    """The kind of machine and the versions of the libraries that a result came from.

    No names and no paths: only what another reader needs to compare.
    """
    torch = sys.modules.get("torch")
    # Asking for the device would start CUDA in a process that computes on the CPU.
    on_gpu = torch is not None and torch.cuda.is_initialized()
    return _machine(torch.cuda.get_device_name() if on_gpu else None)


@lru_cache
def _machine(gpu: str | None) -> dict[str, object]:
    processor = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    libraries = {"python": platform.python_version()}
    for name in ("paperlib", "torch", "numpy", "scipy", "pandas"):
        try:
            libraries[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "libraries": libraries,
    }


def tabulate(records: list[dict], *, version: bool = False) -> pandas.DataFrame:
    """Records as a tidy table: parameters, results, then status, error and seconds.

    A column that lacks some values keeps its type: whole numbers are not turned into floats.
    """
    import pandas

    names = dict.fromkeys(name for record in records for name in record["parameters"])
    results = dict.fromkeys(name for record in records for name in record["results"])
    rows = [{**record["parameters"], **record["results"]} for record in records]
    columns = {}
    for name in [*names, *results]:
        values = [row.get(name) for row in rows]
        columns[name] = pandas.Series(values, dtype=_dtype(values))
    extra = ["version"] if version else []
    for name in ["status", "error", "seconds", *extra]:
        dtype = object if name == "error" else None
        columns[name] = pandas.Series([record[name] for record in records], dtype=dtype)
    return pandas.DataFrame(columns)


def _dtype(values: list) -> str | type | None:
    """The type of a column that pandas would not find by itself, or would find by rounding."""
    kinds = {type(value) for value in values}
    if kinds == {bool, type(None)}:
        return "boolean"
    if kinds == {int, type(None)}:
        small = all(value is None or abs(value) < 2**63 for value in values)
        return "Int64" if small else object
    return object if kinds & {list, dict} else None


def _read_records(path: str | os.PathLike | Store, version: str | None) -> list[dict]:
    if not isinstance(path, Store) and not (Path(path) / "store.json").is_file():
        raise FileNotFoundError(f"{path} is not a store of results")
    store = path if isinstance(path, Store) else Store(path)
    records, corrupt = store.read_all(store.keys())
    if corrupt:
        warnings.warn(f"{len(corrupt)} corrupt records left out: {corrupt}", stacklevel=3)
    found = [r for r in records.values() if version is None or r["version"] == version]
    if version is not None and not found:
        there = sorted({record["version"] for record in records.values()})
        raise ValueError(f"no record of version {version!r}: expected one of {there}")
    return sorted(found, key=lambda r: (r["version"], r["position"], r["key"]))


def read_store(path: str | os.PathLike | Store, *, version: str | None = None) -> pandas.DataFrame:
    """All results of a store, in the order of their grid.

    Args:
        path: the folder.
        version: only the records of this version of the experiment, as in the column `version`.

    Returns:
        A row for every cell: parameters, results, `status` ("ok" or "failed"), `error` (the
        traceback), `seconds`, `version`.

    Raises:
        FileNotFoundError: if `path` is not a store.
        ValueError: if no record has that version.
    """
    return tabulate(_read_records(path, version), version=True)


def save_table(table: pandas.DataFrame, path: str | os.PathLike) -> None:
    """A table as a CSV file and, beside it in `<path minus .csv>.machine.json`, the machine.

    Both are replaced together: a program that saves as it goes and dies leaves what it had saved.
    """
    beside = json.dumps(machine(), indent=1) + "\n"
    _replace_both(Path(path), table.to_csv(index=False).encode(), ".machine.json", beside)


def _replace_both(path: Path, table: bytes, ending: str, beside: str) -> Path:
    """Replace a table and what stands beside it under that ending; returns where that is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    other = path.with_suffix(ending)
    replace_files(path.parent, {path.name: table, other.name: beside.encode()})
    return other


def export_results(
    store: str | os.PathLike | Store, csv_path: str | os.PathLike, *, version: str | None = None
) -> Path:
    """The results of a store as a CSV file and, beside it, where they come from.

    `<csv_path>` holds the table of `read_store`, lists and dicts as JSON, errors by their last
    line; `<csv_path minus .csv>.provenance.json` holds the checksum of the CSV, the versions of
    experiment and libraries, the kinds of machines, and the counts and times. Neither holds a
    path or a name of a machine, so both can be published.

    Returns:
        The path of the provenance file.

    Raises:
        FileNotFoundError: if there is no store.
        ValueError: if the store is empty.
    """
    records = _read_records(store, version)
    if not records:
        raise ValueError(f"{store} holds no record to export")
    table = tabulate(records, version=True)
    for name in table.columns:
        nested = table[name].map(lambda value: isinstance(value, list | dict))
        if nested.any():
            table[name] = table[name].astype(object).where(~nested, table[name].map(to_json))
    table["error"] = [_public(record["error"]) for record in records]
    text = table.to_csv(index=False, lineterminator="\n").encode()
    machines: dict[str, dict] = {}
    for record in records:
        entry = machines.setdefault(to_json(record["machine"]), {**record["machine"], "cells": 0})
        entry["cells"] += 1
    statuses = [record["status"] for record in records]
    provenance = {
        "sha256": hashlib.sha256(text).hexdigest(),
        "cells": len(records),
        "status": {name: statuses.count(name) for name in sorted(set(statuses))},
        "versions": sorted({record["version"] for record in records}),
        "seconds": sum(record["seconds"] for record in records),
        "machines": [machines[name] for name in sorted(machines)],
    }
    beside = json.dumps(provenance, indent=2) + "\n"
    return _replace_both(Path(csv_path), text, ".provenance.json", beside)


def _public(error: str | None) -> str | None:
    """The last line of a traceback, each absolute path in it cut to its last name."""
    if not error:
        return None
    return re.sub(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+", "", error.strip().splitlines()[-1])
