"""Annotations in arrays against lists of dictionaries, and boxes that are checked."""

import warnings

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from slimconv_lit.data.detection import Annotations, check_boxes

counts = st.lists(st.integers(0, 3), max_size=6)
fields = ("boxes", "labels", "difficult", "crowd", "area")


def annotations(counts, start):
    """Images with so many objects each, in which no two values are alike."""
    total, owners = sum(counts), np.repeat(np.arange(len(counts)), counts)
    values = np.arange(total) + start
    return Annotations(
        files=np.array([f"{start + i}.jpg" for i in range(len(counts))], dtype=str),
        ids=np.arange(len(counts)) + start,
        sizes=np.arange(2 * len(counts)).reshape(-1, 2) + start,
        owners=owners,
        boxes=np.arange(4 * total, dtype=np.float32).reshape(-1, 4) + start,
        labels=values,
        difficult=values % 2 == 0,
        crowd=values % 3 == 0,
        area=values.astype(np.float32),
    )


def listed(them):
    """One (file, id, size, objects) for each image."""
    found = [[] for _ in them.files]
    for row, owner in enumerate(them.owners):
        found[owner].append([tuple(np.ravel(getattr(them, name)[row])) for name in fields])
    return list(zip(them.files.tolist(), them.ids.tolist(), them.sizes.tolist(), found, strict=True))


@settings(max_examples=60)
@given(counts, counts, st.randoms(use_true_random=False))
def test_choosing_and_joining_keep_objects_with_their_images(first, second, random):
    a, b = annotations(first, 100), annotations(second, 900)
    both = a + b
    assert listed(both) == listed(a) + listed(b)
    images = np.array([random.random() < 0.5 for _ in both.files], dtype=bool)
    expected = [image for image, keep in zip(listed(both), images, strict=True) if keep]
    assert listed(both.images(images)) == expected
    objects = np.array([random.random() < 0.5 for _ in both.boxes], dtype=bool)
    rows = iter(objects)
    expected = [(*image, [one for one in found if next(rows)]) for *image, found in listed(both)]
    assert listed(both.objects(objects)) == expected


corners = st.tuples(*[st.floats(-60, 160) for _ in range(4)])


@settings(max_examples=100)
@given(st.lists(corners, max_size=8), st.sampled_from([0.0, 1.0]))
def test_what_is_left_lies_in_the_image_and_the_good_is_untouched(rows, least):
    boxes, sizes = np.array(rows).reshape(-1, 4), np.tile([100, 80], (len(rows), 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clipped, kept = check_boxes(boxes, sizes, least, "file", str)
    left = clipped[kept]
    assert ((left >= 0) & (left <= (100, 80, 100, 80))).all()
    assert (left[:, 2:] - left[:, :2] > least - 1e-4).all()
    whole = np.all((boxes >= 0) & (boxes <= (100, 80, 100, 80)), axis=1)
    np.testing.assert_array_equal(clipped[whole], boxes[whole].astype(np.float32))
    long = np.all(boxes[:, 2:] - boxes[:, :2] > least, axis=1)
    assert kept[whole & long].all()
    assert not kept[~long].any()
    assert len(caught) <= 2
    assert bool(caught) or (kept.all() and np.abs(clipped - boxes).max(initial=0) < 0.02)
