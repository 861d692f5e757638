import re
import sys
from typing import get_args

import pytest
import torch

from ocnopt.experiments import datasets
from ocnopt.experiments.data.locate import data_folder
from ocnopt.experiments.data.sets import DENSITIES, SETS, all_sets
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.order import DataOrder
from ocnopt.experiments.problems import PROBLEMS, DatasetName, DensityName, SetName


def test_digits_are_images_standardized_by_the_training_set():
    data = datasets.load("digits")
    assert data.train_x.shape == (1437, 1, 8, 8)
    assert data.test_x.shape == (360, 1, 8, 8)
    assert data.classes == 10
    assert data.train_x.mean().abs() < 1e-5
    assert abs(float(data.train_x.std()) - 1) < 1e-5
    assert data.train_y.dtype == torch.int64
    # Stratified: every class has its fifth in the test set.
    assert int((data.test_y.bincount() - 36).abs().max()) <= 1


def test_wine_is_standardized_per_feature():
    data = datasets.load("wine")
    assert data.shape == (13,)
    assert data.classes == 3
    torch.testing.assert_close(data.train_x.mean(0), torch.zeros(13), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_x.std(0), torch.ones(13), atol=1e-5, rtol=0)


def test_the_split_is_always_the_same():
    assert torch.equal(datasets.load("wine").test_x, datasets.load("wine").test_x)


def test_clusters_are_generated_the_same_and_balanced():
    data = datasets.load("clusters")
    facts = SETS["clusters"]
    assert data.train_x.shape == (facts.train, *facts.shape)
    assert data.test_x.shape == (facts.test, *facts.shape)
    assert data.classes == facts.classes
    assert data.train_y.bincount().unique().tolist() == [facts.train // facts.classes]
    assert data.test_y.bincount().unique().tolist() == [facts.test // facts.classes]
    torch.testing.assert_close(data.train_x.mean(0), torch.zeros(30), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_x.std(0), torch.ones(30), atol=1e-5, rtol=0)
    assert torch.equal(datasets.load("clusters").test_x, data.test_x)


@pytest.mark.parametrize("name", ["digits", "wine", "clusters"])
def test_what_needs_no_file_is_as_described(name):
    data, facts = datasets.load(name), SETS[name]
    assert (len(data.train_y), len(data.test_y)) == (facts.train, facts.test)
    assert (data.shape, data.classes) == (facts.shape, facts.classes)


def test_every_name_has_a_data_set_and_a_problem():
    assert set(SETS) == set(PROBLEMS) == set(get_args(DatasetName))
    assert set(DENSITIES) == set(get_args(DensityName))
    assert list(all_sets()) == list(get_args(SetName))
    for name, facts in all_sets().items():
        assert facts.name == name
        assert (facts.origin == "files") == bool(facts.folder) == bool(facts.files)
        # They can be fetched, or it is said how else they get there.
        assert bool(facts.files) == (bool(facts.downloads) != bool(facts.by_hand))
        assert (facts.classes > 0) == (name in SETS)
        for download in facts.downloads:
            assert download.urls and all(url.endswith("/" + download.name) for url in download.urls)
            if download.checksum is None:  # then what an archive holds is checked
                assert len(facts.published) == len(facts.files)
                assert download.name not in facts.files
            else:
                assert re.fullmatch("md5:[0-9a-f]{32}", download.checksum)


def test_a_set_that_has_to_be_brought_says_so(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*Half\); no server has it; put its two \.ts"):
        datasets.load("character-trajectories-half", tmp_path)


def test_the_half_is_never_to_be_compared():
    layout = SETS["character-trajectories-half"].layout
    assert "never be compared with published" in layout


def test_unknown_name():
    with pytest.raises(InputError, match="no data set 'cifar'; choose from digits"):
        datasets.load("cifar")


def test_missing_data_says_how_to_get_it(no_data_variable, tmp_path):
    with pytest.raises(InputError, match=r"'ocnopt data get mnist'.* or OCNOPT_DATA") as raised:
        datasets.load("mnist")
    assert str(no_data_variable / "mnist") in str(raised.value)
    with pytest.raises(InputError, match=r"no folder .*cifar-10-batches-bin") as raised:
        datasets.load("cifar-10", tmp_path)
    assert f"'ocnopt data get cifar-10 --data-root {tmp_path}'" in str(raised.value)
    (tmp_path / "mnist").mkdir()
    with pytest.raises(InputError, match=r"no file .*train-images-idx3-ubyte\.gz") as raised:
        datasets.load("mnist", tmp_path)
    assert "\n" not in str(raised.value)


def test_folder_given_then_variable_then_cache(no_data_variable, tmp_path, monkeypatch):
    assert data_folder() == no_data_variable
    monkeypatch.setenv("OCNOPT_DATA", str(tmp_path / "variable"))
    assert data_folder() == tmp_path / "variable"
    assert data_folder(tmp_path / "given") == tmp_path / "given"


def test_without_pooch_a_folder_has_to_be_given(no_data_variable, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(InputError, match="--data-root FOLDER or OCNOPT_DATA"):
        data_folder()
    assert data_folder(tmp_path) == tmp_path


def test_order_visits_every_sample_once_per_epoch_and_depends_on_the_step_alone():
    order = DataOrder(20, 4, seed=3, device=torch.device("cpu"))
    assert order.steps_per_epoch == 5
    batches = [order.batch(step).tolist() for step in range(15)]
    for epoch in range(3):
        seen = [i for batch in batches[5 * epoch : 5 * epoch + 5] for i in batch]
        assert sorted(seen) == list(range(20))
    assert batches[:5] != batches[5:10]
    other = DataOrder(20, 4, seed=3, device=torch.device("cpu"))
    assert [other.batch(step).tolist() for step in reversed(range(15))] == batches[::-1]


def test_orders_of_neighbouring_seeds_and_epochs_differ():
    def epoch(seed, number):
        return DataOrder(50, 50, seed, torch.device("cpu")).batch(number).tolist()

    assert epoch(0, 1) != epoch(1, 0)


def test_incomplete_batch_is_dropped():
    order = DataOrder(10, 4, seed=0, device=torch.device("cpu"))
    assert order.steps_per_epoch == 2
    assert all(len(order.batch(step)) == 4 for step in range(6))
