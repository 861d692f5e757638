"""What tables of samples there are whose density is to be learned; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping

from ocnopt.experiments.data.describe import DataSet, Download
from ocnopt.experiments.problems import DensityName

_PREPARED = "Papamakarios, Pavlakou and Murray, NIPS, 2017"
_ZENODO = "https://zenodo.org"

_MINIBOONE = DataSet(
    name="miniboone",
    title="signals of electron neutrinos",
    train=32_840,
    test=3_648,
    shape=(43,),
    classes=0,
    layout="a table as a NumPy file; its last tenth is the test part, validation counted as"
    " training",
    licence="CC BY 4.0",
    citation=f"Roe et al., Nucl. Instrum. Methods A 543, 2005; prepared by {_PREPARED}",
    folder="miniboone",
    files=("data.npy",),
    downloads=(
        Download(
            "data.tar.gz",
            (
                f"{_ZENODO}/records/1161203/files/data.tar.gz",
                f"{_ZENODO}/record/1161203/files/data.tar.gz",
            ),
            "md5:9b9c9b0375315ad270eba4ce80c093ab",
        ),
    ),
    inside="data/miniboone",
    published=(36_488,),
)

_GAS = DataSet(
    name="gas",
    title="readings of gas sensors",
    train=946_859,
    test=105_206,
    shape=(8,),
    classes=0,
    layout="UCI's text file; a quarter of its rows in random order, the last tenth of them the test"
    " part, validation counted as training",
    licence="CC BY 4.0",
    citation=f"Fonollosa et al., Sensors and Actuators B 215, 2015; prepared as in {_PREPARED}",
    folder="gas",
    files=("ethylene_CO.txt",),
    by_hand="it is not fetched; unpack ethylene_CO.txt of https://archive.ics.uci.edu/dataset/322"
    " there (ethylene_CO.pickle of other copies is not read: a pickle can run code)",
)

DENSITIES: Mapping[DensityName, DataSet] = {"miniboone": _MINIBOONE, "gas": _GAS}
