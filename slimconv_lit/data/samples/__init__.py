"""Small data sets in the official on-disk layouts, so that the real reading code runs with no download.

`compose_scene` makes a scene, one `write_*` function writes each layout.
"""

from slimconv_lit.data.samples.classification import DIGITS, NUMBERS, write_cifar100, write_imagenet
from slimconv_lit.data.samples.coco import write_coco2014
from slimconv_lit.data.samples.scenes import Box, Pool, Scene, build_once, compose_scene, scatter
from slimconv_lit.data.samples.voc import write_sbd, write_voc2007, write_voc2012

__all__ = [
    "DIGITS",
    "NUMBERS",
    "Box",
    "Pool",
    "Scene",
    "build_once",
    "compose_scene",
    "scatter",
    "write_cifar100",
    "write_coco2014",
    "write_imagenet",
    "write_sbd",
    "write_voc2007",
    "write_voc2012",
]
