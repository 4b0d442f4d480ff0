"""Handwritten digits recognized by their nearest neighbors among the features of a released encoder: ten seconds.

The encoder comes with sslvit (docs/record.md), and the digits with scikit-learn; each is drawn at a random size and
place on a canvas of 14 x 14 pixels, as by `sslvit demo`.
"""

import tempfile

import sslvit
from sslvit.reports.demo import pack_digits

with tempfile.TemporaryDirectory() as folder:
    pack_digits(folder)  # train/ with 1,437 labeled digits, and test/ with 360 others
    for name in ("zoo:digits/dino", "zoo:digits/mae"):
        print(sslvit.knn(name, f"{folder}/train", f"{folder}/test", neighbors=[20], cache=None), "\n")
