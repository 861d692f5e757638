"""What tests of commands have in common."""


def one_line(capsys):
    """The one line on stderr, with nothing on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("ocnopt: ")
    return captured.err
