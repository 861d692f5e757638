"""What data sets of time series there are; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping

from ocnopt.experiments.data.describe import DataSet, Download
from ocnopt.experiments.problems import DatasetName

_SPLIT = "both .ts files merged and split 70/15/15, validation counted as training"
_ARCHIVE = "Bagnall et al., The UEA multivariate time series classification archive, 2018"
_CHARACTERS = "Williams, Toussaint and Storkey, ICANN, 2006"


def _files(stem: str) -> tuple[str, str]:
    return (f"{stem}_TRAIN.ts", f"{stem}_TEST.ts")


def _downloads(stem: str) -> tuple[Download]:
    name = f"{stem}.zip"
    host = "timeseriesclassification.com/aeon-toolkit"
    # The archive states no checksums, and its files have been revised under the same name.
    return (Download(name, (f"https://www.{host}/{name}", f"https://{host}/{name}"), None),)


_ARTICULARY_WORD_RECOGNITION = DataSet(
    name="articulary-word-recognition",
    title="movements of tongue and lips while a word is spoken",
    train=488,
    test=87,
    shape=(144, 19),
    classes=25,
    layout=_SPLIT,
    licence="none stated; its publishers ask to be cited",
    citation=f"Wang et al., Proc. SLPAT, 2013; {_ARCHIVE}",
    folder="uea/ArticularyWordRecognition",
    files=_files("ArticularyWordRecognition"),
    downloads=_downloads("ArticularyWordRecognition"),
    inside=".",
    published=(275, 300),
)

_CHARACTER_TRAJECTORIES = DataSet(
    name="character-trajectories",
    title="velocity and force of a pen that writes a letter",
    train=2429,
    test=429,
    shape=(182, 7),
    classes=20,
    layout=_SPLIT,
    licence="CC BY 4.0",
    citation=f"{_CHARACTERS}; {_ARCHIVE}",
    folder="uea/CharacterTrajectories",
    files=_files("CharacterTrajectories"),
    downloads=_downloads("CharacterTrajectories"),
    inside=".",
    published=(1422, 1436),
)

_CHARACTER_TRAJECTORIES_HALF = DataSet(
    name="character-trajectories-half",
    title="half of character-trajectories",
    train=1214,
    test=215,
    shape=(182, 7),
    classes=20,
    layout="the half of UCI's Character Trajectories that has labels, under a split of its own: its"
    " figures may never be compared with published ones of UEA's CharacterTrajectories; " + _SPLIT,
    licence="CC BY 4.0",
    citation=_CHARACTERS,
    folder="uea/CharacterTrajectoriesHalf",
    files=_files("CharacterTrajectoriesHalf"),
    by_hand="no server has it; put its two .ts files there by hand",
    published=(715, 714),
)

_SPOKEN_ARABIC_DIGITS = DataSet(
    name="spoken-arabic-digits",
    title="cepstral coefficients of a spoken digit",
    train=7478,
    test=1320,
    shape=(93, 27),
    classes=10,
    layout=_SPLIT,
    licence="CC BY 4.0",
    citation=f"Hammami and Bedda, Proc. ICCSIT, 2010; {_ARCHIVE}",
    folder="uea/SpokenArabicDigits",
    files=_files("SpokenArabicDigits"),
    downloads=_downloads("SpokenArabicDigits"),
    inside=".",
    published=(6599, 2199),
)

SERIES: Mapping[DatasetName, DataSet] = {
    "articulary-word-recognition": _ARTICULARY_WORD_RECOGNITION,
    "character-trajectories": _CHARACTER_TRAJECTORIES,
    "character-trajectories-half": _CHARACTER_TRAJECTORIES_HALF,
    "spoken-arabic-digits": _SPOKEN_ARABIC_DIGITS,
}
