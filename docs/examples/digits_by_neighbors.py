"""Classify handwritten digits by nearest neighbors in the features of released encoders, in ten seconds.

The encoders are included in sslvit (docs/record.md), and the digits in scikit-learn. Each digit is drawn at a random
size and position on a canvas of 14 x 14 pixels, as in `sslvit demo`.
"""

import tempfile

import sslvit
from sslvit.reports.demo import pack_digits

with tempfile.TemporaryDirectory() as folder:
    pack_digits(folder)  # train/ with 1,437 labeled digits, and test/ with 360 others
    for name in ("zoo:digits/dino", "zoo:digits/mae"):
        print(sslvit.knn(name, f"{folder}/train", f"{folder}/test", neighbors=[20], cache=None), "\n")
