"""From a trained network to a file: TFLite, QONNX or an archive; and its proof."""

from tf_lowbit.export.archive import (
    Archive,
    ArchivedLayer,
    load_archive,
)
from tf_lowbit.export.archiving import save_archive
from tf_lowbit.export.convert import Export, read_info, to_tflite
from tf_lowbit.export.files import gzip_bytes
from tf_lowbit.export.forms import Check, check
from tf_lowbit.export.linear import Problem
from tf_lowbit.export.micro import MicroRunner
from tf_lowbit.export.proving import verify
from tf_lowbit.export.qonnx import to_qonnx
from tf_lowbit.export.qonnx_agreement import QonnxAgreement, compare_qonnx
from tf_lowbit.export.report import Report
from tf_lowbit.export.running import Runner, latencies
from tf_lowbit.export.snapping import ExportError, Note, Snapped, snap

__all__ = [
    "Archive",
    "ArchivedLayer",
    "Check",
    "Export",
    "ExportError",
    "MicroRunner",
    "Note",
    "Problem",
    "QonnxAgreement",
    "Report",
    "Runner",
    "Snapped",
    "check",
    "compare_qonnx",
    "gzip_bytes",
    "latencies",
    "load_archive",
    "read_info",
    "save_archive",
    "snap",
    "to_qonnx",
    "to_tflite",
    "verify",
]
