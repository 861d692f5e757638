import pytest
import torch

from ocnopt.experiments.figures import running_mean, save_curves, save_run


def test_running_mean_is_of_at_most_the_window():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert running_mean(values, 2).tolist() == [1.0, 1.5, 2.5, 3.5]
    assert running_mean(values, 1).tolist() == values.tolist()
    assert running_mean(values[:0], 2).tolist() == []


@pytest.mark.parametrize("losses", [[], [float("nan")], [1.0, float("inf")], [0.0, 1.0]])
def test_short_and_diverged_runs_can_be_drawn(tmp_path, losses):
    rows = [
        {"step": 1, "test_accuracy": None, "diagnostics": {"feedback_share": None}},
        {"step": 2, "test_accuracy": 0.5, "diagnostics": {"predicted_decrease": 0.1}},
    ]
    for name, shown in (("with", rows), ("without", [])):
        save_run(tmp_path / name, "a run", torch.tensor(losses), shown)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    save_curves(tmp_path / "c", "curves", {"lr 1": {"SGD": [torch.tensor(losses)]}}, 2)
