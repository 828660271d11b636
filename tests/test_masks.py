"Masks: decoded as by pycocotools, and no number of an annotation file reaches its C code unchecked."
import io

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image
from pycocotools import mask as M

from effdet_nb.data.faults import ConversionReport, Fault
from effdet_nb.data.masks import _mask_bounds, mask_exceeds_box, mask_png, mask_rle, run_lengths
from effdet_nb.data.record import RecordEncoder

HW = (40, 60)


def pixels_of(png): return np.asarray(Image.open(io.BytesIO(png)))


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0, .02, .5, .98, 1]), st.integers(0, 999))
def test_masks_are_decoded_as_by_pycocotools(h, w, share, seed):
    pixels = (np.random.default_rng(seed).random((h, w)) < share).astype(np.uint8)
    rle = M.encode(np.asfortranarray(pixels))
    y1, x1, y2, x2 = _mask_bounds(run_lengths(rle), h)
    if pixels.any(): assert [x1, y1, x2-x1, y2-y1] == M.toBbox(rle).tolist()
    np.testing.assert_array_equal(pixels_of(mask_png(rle)), pixels)
    as_list = mask_rle(dict(counts=run_lengths(rle).tolist(), size=[h, w]), (h, w))
    assert as_list == rle == mask_rle(dict(rle, counts=rle['counts'].decode()), (h, w)) | dict(counts=rle['counts'])


numbers = st.one_of(st.floats(), st.integers(-2**70, 2**70), st.sampled_from([None, '7', 'x', [], [1], {}, True]))
counts = st.one_of(st.text(max_size=30), st.binary(max_size=30), st.lists(numbers, max_size=9), numbers,
                   st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=20))
segmentations = st.one_of(numbers, st.text(max_size=9), st.lists(st.lists(numbers, max_size=14), max_size=4),
                          st.builds(lambda c, s: dict(counts=c, size=s), counts,
                                    st.one_of(st.just([*HW]), st.lists(numbers, max_size=3), numbers)))


@given(segmentations)
def test_any_segmentation_gives_a_mask_or_an_empty_one_with_a_note(segmentation):
    report = ConversionReport()
    annotation = dict(id=7, category_id=1, bbox=[1, 2, 30, 20], area=600, iscrowd=0, segmentation=segmentation)
    objects = RecordEncoder('', {1: 'cat'}, include_masks=True).encode_objects([annotation], HW, 3, report)
    mask = pixels_of(objects['image/object/mask'][0])
    assert mask.shape == HW and mask.max() <= 1
    assert mask.any() or not segmentation or report.notes or _is_empty(segmentation)


def _is_empty(segmentation):
    "Tests whether a mask without pixels is what the annotation says: only zeros, or a sliver between pixel centres."
    try: rle = mask_rle(segmentation, HW)
    except (ValueError, TypeError, OverflowError): return False
    return not M.decode(rle).any()


far = [0, 0, 9, 0, 9, 9]
hopeless = {
    'huge': [[0, 0, 3e8, 0, 3e8, 3e8]], 'negative': [[-4e9, 5, 10, 5, 10, 10]],
    'infinite': [[0, 0, 9, float('-inf'), 9, 9]],
    'not a number': [[float('nan')]*8], 'null': [[1, 2, None, 4, 5, 6]], 'second polygon': [far, [*far, 1e300, 0]],
    'long outline': [[0, 0, 9e5, 9e5]*40], 'outside': [[100, 100, 120, 100, 120, 110]],
    'too many runs': dict(counts=[0, 2401], size=[*HW]), 'negative run': dict(counts=[-1, 2401], size=[*HW]),
    'half a run': dict(counts=[.5, 2399.5], size=[*HW]), 'huge run': dict(counts=[2**40, 5], size=[*HW]),
    'unfinished text': dict(counts='PP', size=[*HW]), 'long digits': dict(counts='o'*12 + '0', size=[*HW]),
    'not ASCII': dict(counts='größe', size=[*HW]), 'a number': dict(counts=7, size=[*HW]),
    'another size': dict(counts=[16], size=[4, 4]), 'size of text': dict(counts=[2400], size='40x60'),
}


@pytest.mark.parametrize('segmentation', hopeless.values(), ids=hopeless)
def test_masks_that_would_break_c_code_are_refused(segmentation):
    with pytest.raises((ValueError, TypeError)): mask_rle(segmentation, HW)
    report = ConversionReport()
    annotation = dict(id=7, category_id=1, bbox=[1, 2, 30, 20], area=600, iscrowd=0, segmentation=segmentation)
    RecordEncoder('', {1: 'cat'}, include_masks=True).encode_objects([annotation], HW, 3, report)
    assert report.notes[Fault.NO_MASK, ''] == [7]


@pytest.mark.parametrize('segmentation, is_reported', [
    ([[0, 0, 0, 0, 0, 0]], True), ([[5, 5, 9, 9, 5, 5]], True), (dict(counts=[2400], size=[*HW]), True),
    (dict(counts=[2400, 0], size=[*HW]), True), ([[5, 5, 9, 5, 9, 9]], False),
    (dict(counts=[5, 1, 2394], size=[*HW]), False), (dict(counts=[0, 2400], size=[*HW]), False)])
def test_a_mask_without_a_pixel_is_reported(segmentation, is_reported):
    report = ConversionReport()
    annotation = dict(id=7, category_id=1, bbox=[1, 2, 30, 20], area=600, iscrowd=0, segmentation=segmentation)
    RecordEncoder('', {1: 'cat'}, include_masks=True).encode_objects([annotation], HW, 3, report)
    assert ((Fault.NO_MASK, '') in report.notes) == is_reported


def test_a_polygon_that_leaves_the_image_is_cut_at_its_edge():
    rle = mask_rle([[-500, 10, 500, 10, 500, 20, -500, 20]], HW)
    mask = pixels_of(mask_png(rle))
    assert mask[10:20].all() and not mask[:10].any() and not mask[21:].any()
    assert mask_exceeds_box(rle, [5, 10, 20, 10]) and not mask_exceeds_box(rle, [0, 10, 60, 10])
