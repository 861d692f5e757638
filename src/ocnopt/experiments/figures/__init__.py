"""Figures, as PNG files: training runs, feedback policies as images, their spectra."""

from ocnopt.experiments.figures.deconvolution import differential_image, to_image
from ocnopt.experiments.figures.feedback import feedback_direction, save_feedback_images
from ocnopt.experiments.figures.runs import running_mean, save_curves, save_run
from ocnopt.experiments.figures.spectrum import (
    Spectra,
    count_above_bulk,
    feedback_spectrum,
    save_spectra,
)

__all__ = [
    "Spectra",
    "count_above_bulk",
    "differential_image",
    "feedback_direction",
    "feedback_spectrum",
    "running_mean",
    "save_curves",
    "save_feedback_images",
    "save_run",
    "save_spectra",
    "to_image",
]
