"""The record of a run: one line of strict JSON for each step. A kill tears at most the last line."""

from anybatch._record.append import AppendFile
from anybatch._record.json import json_line, strict
from anybatch._record.progress import progress_bar
from anybatch._record.provenance import run_config
from anybatch._record.read import Columns, iter_record, read_columns, read_record
from anybatch._record.record import MetricRecord, Run, StepRecord
from anybatch._record.record_sinks import Destination, RecordSinks, destinations
from anybatch._record.writer import RunRecord

__all__ = [
    "AppendFile",
    "Columns",
    "Destination",
    "MetricRecord",
    "RecordSinks",
    "Run",
    "RunRecord",
    "StepRecord",
    "destinations",
    "iter_record",
    "json_line",
    "progress_bar",
    "read_columns",
    "read_record",
    "run_config",
    "strict",
]
