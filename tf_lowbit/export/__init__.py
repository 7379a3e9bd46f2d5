"""Export of a trained network to TFLite, QONNX or an archive, with a proof."""

from tf_lowbit.export.archive.reader import Archive, ArchivedLayer, load_archive
from tf_lowbit.export.archive.writer import save_archive
from tf_lowbit.export.file_bytes import gzip_bytes
from tf_lowbit.export.lowering.problems import Check, check
from tf_lowbit.export.lowering.walk import Snapped, snap
from tf_lowbit.export.proof.verification import Report
from tf_lowbit.export.proof.verify import verify
from tf_lowbit.export.qonnx.agreement import QonnxAgreement, compare_qonnx
from tf_lowbit.export.qonnx.writer import to_qonnx
from tf_lowbit.export.targets import TARGETS, Target
from tf_lowbit.export.tflite.export import Export, read_info, to_tflite
from tf_lowbit.export.tflite.micro import MicroRunner
from tf_lowbit.export.tflite.runner import Runner, latencies
from tf_lowbit.export.types import ExportError, Note, Problem

__all__ = [
    "TARGETS",
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
    "Target",
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
