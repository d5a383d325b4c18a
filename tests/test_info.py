import pytest

from alexnet_triton.info import format_table, layer_table


@pytest.mark.parametrize(
    ("variant", "parameters", "millions"),
    [("paper", 60_965_224, 724.4), ("merged", 62_378_344, 1135.3), ("torchvision", 61_100_840, 714.2)],
)
def test_totals(variant, parameters, millions):
    rows = layer_table(variant)
    assert sum(row.parameters for row in rows) == parameters
    assert abs(sum(row.multiply_adds for row in rows) / 1e6 - millions) < 0.05


def test_rows_of_the_paper():
    rows = {row.name: row for row in layer_table("paper", batch=4) if row.name}
    assert list(rows) == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    assert rows["conv3"].parameters == 885_120
    assert rows["conv2"].output == (4, 256, 27, 27)
    assert rows["conv2"].multiply_adds == 4 * 256 * 27 * 27 * 48 * 25
    assert rows["fc6"].output == (4, 4096)


def test_table_is_aligned_and_totalled():
    lines = format_table(layer_table("caffe", num_classes=10)).splitlines()
    assert len({len(line) for line in (lines[0], lines[1], lines[-1])}) == 1
    assert lines[-1].startswith("total")
    assert "LRN 5 alpha 0.0001 k 1" in "\n".join(lines)
    assert "groups 2" in "\n".join(lines)


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="at least 1 image, got 0"):
        layer_table(batch=0)
    with pytest.raises(ValueError, match="unknown variant 'vgg'"):
        layer_table("vgg")
    with pytest.raises(ValueError, match="at least 67x67 pixels, got 40x40"):
        layer_table(image_size=40)
