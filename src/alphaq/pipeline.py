"""What each command does, as plain functions that a notebook can call; the code is where they are imported from."""

from alphaq.evaluation.certify import certify
from alphaq.evaluation.engine_run import run_in_engine as verify_run
from alphaq.evaluation.evaluate import evaluate
from alphaq.evaluation.skipping import skip_curve
from alphaq.measuring.analyze import analyze
from alphaq.measuring.resources import Resources
from alphaq.planning import checked_plan, make_plan, measure_for_plan
from alphaq.report.densities import densities
from alphaq.trials.demo import demo
from alphaq.writing.quantizing import quantize
from alphaq.writing.recoding import recode
from alphaq.writing.records import QuantizeResult, RecodeResult, VerifyResult, WriteOptions
from alphaq.writing.rounding import Rounding
from alphaq.writing.uploading import quantize_to_store
from alphaq.writing.verifying import verify

__all__ = [
    "QuantizeResult",
    "RecodeResult",
    "Resources",
    "Rounding",
    "VerifyResult",
    "WriteOptions",
    "analyze",
    "certify",
    "checked_plan",
    "demo",
    "densities",
    "evaluate",
    "make_plan",
    "measure_for_plan",
    "quantize",
    "quantize_to_store",
    "recode",
    "skip_curve",
    "verify",
    "verify_run",
]
