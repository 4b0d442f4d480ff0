"""Faults of data sets and functions that are given from Python, and of limits."""

from __future__ import annotations

from faults import Fault

DATA, RUNS = "tests/data/test_python_data.py", "tests/train/test_data_sets.py"
PACKED = "tests/data/test_dataset_source.py"
SUBSET, LIMIT = "tests/data/test_subset.py", "tests/train/test_limit.py"
TRANSFORM = "tests/train/test_transform.py"
OWN_IMAGES = "tests/train/test_own_images.py"

FAULTS = [
    # data sets
    Fault("Floating-point pixels are cut off instead of rounded", "sslvit/data/array_images.py",
          "times 255\", lambda values: (values.astype(np.float32) * 255).round().astype",
          "times 255\", lambda values: (values.astype(np.float32) * 255).astype",
          (f"{DATA}::test_floating_point_pixels_are_rounded_to_8_bits",)),
    Fault("A picture that is decoded already stays as it lies", "sslvit/data/header.py",
          "image.getexif().get(274, 1) if upright else 1\n", "1\n",
          (f"{DATA}::test_a_picture_is_turned_as_its_exif_orientation_says",)),
    Fault("The digest of a data set is of its length alone", "sslvit/data/python_data.py",
          "        digest.update(bits)\n", "",
          (f"{RUNS}::test_another_data_set_is_refused_where_a_run_goes_on",)),
    Fault("No sample is read twice", "sslvit/data/python_data.py",
          "READ_TWICE = 8", "READ_TWICE = 0",
          (f"{DATA}::test_samples_that_change_from_one_reading_to_the_next_are_refused",)),
    Fault("Labels of an attribute are taken against what the samples say", "sslvit/data/python_labels.py",
          "        found = None  # the samples say something else\n", "        pass\n",
          (f"{DATA}::test_labels_are_taken_from_an_attribute_where_the_samples_agree",)),
    Fault("A part of a data set has the labels of its beginning", "sslvit/data/python_labels.py",
          "[whole[item] for item in dataset.indices]", "list(whole)",
          (f"{DATA}::test_labels_are_taken_from_an_attribute_where_the_samples_agree",)),
    Fault("Images of other sizes than the first are left out", "sslvit/data/reader.py",
          "any(OTHER_SIZE in reason for reason in self.unreadable.values())", "False",
          (f"{DATA}::test_small_images_of_one_size_are_decoded_once_and_others_when_they_are_read",)),
    Fault("Any resume on the command line goes on to open the data", "sslvit/train/folder.py",
          "if is_given(before.get(key))}", "if False}",
          (f"{RUNS}::test_a_run_says_in_words_what_it_was_given_and_how_it_goes_on",)),
    # packing
    Fault("Every file of a data set is called .png", "sslvit/data/store.py",
          "if suffix in IMAGE_SUFFIXES else suffix_of(content)", "if suffix in IMAGE_SUFFIXES else \".png\"",
          (f"{PACKED}::test_files_of_a_data_set_go_in_as_they_are_and_are_called_by_their_format",)),
    Fault("A data set of torchvision is always downloaded", "sslvit/data/dataset_source.py",
          'given["download"] = options.download', 'given["download"] = True',
          (f"{PACKED}::test_nothing_is_downloaded_unless_it_is_asked_for",)),
    # limits
    Fault("A limit draws without the seed", "sslvit/data/subset.py",
          'rng.generator(seed, "limit")', 'rng.generator(0, "limit")',
          (f"{SUBSET}::test_a_limit_draws_by_the_seed_and_a_larger_one_holds_the_smaller",)),
    Fault("A limit takes the first images", "sslvit/data/subset.py",
          "chosen = draw(len(index), seed)[: settings.limit]", "chosen = np.arange(len(index))[: settings.limit]",
          (f"{SUBSET}::test_a_limit_draws_by_the_seed_and_a_larger_one_holds_the_smaller",)),
    Fault("A limit per class takes the first images of each", "sslvit/data/subset.py",
          "    order = draw(len(labels), seed)\n", "    order = np.arange(len(labels))\n",
          (f"{SUBSET}::test_a_limit_per_class_draws_from_each_class",)),
    Fault("Shards without any image of a limit are fetched", "sslvit/data/plan.py",
          "return np.flatnonzero(self.shard_samples).tolist()", "return list(range(len(self.shard_samples)))",
          (f"{SUBSET}::test_labels_names_and_shards_stay_those_of_the_images",)),
    # refused before packing
    Fault("A folder's images are counted after packing", "sslvit/data/open.py",
          "            EpochPlan([images], settings.batch_for(images, usual_batch, multiple_of), seed)\n", "",
          (f"{OWN_IMAGES}::test_what_names_and_headers_tell_is_refused_before_images_are_packed",)),
    Fault("Channels of a folder's images are looked at after packing", "sslvit/data/open.py",
          "if channels is not None and (numbers := channels_of(found)):", "if numbers := set():",
          (f"{OWN_IMAGES}::test_what_names_and_headers_tell_is_refused_before_images_are_packed",)),
    Fault("Neighbors are counted after packing", "sslvit/evaluate/labeled.py",
          "open_shards(settings.train, check=check)", "open_shards(settings.train)",
          (f"{OWN_IMAGES}::test_what_names_and_headers_tell_is_refused_before_images_are_packed",)),
    Fault("What an earlier attempt downloaded counts", "sslvit/layouts/hub.py",
          "about.st_size if about.st_mtime >= began else 0", "about.st_size",
          ("tests/test_hub.py::test_what_is_downloaded_is_said",)),
    Fault("A count without a total says that nothing was found", "sslvit/progress.py",
          "            if count or total is not None:\n                try:",
          "            if True:\n                try:",
          ("tests/test_progress.py::test_elsewhere_a_count_without_a_total_is_a_line_once_something_is_done",)),
    # functions
    Fault("A function draws the same in every epoch", "sslvit/data/transform.py",
          'rng.all_seeded(self.seed, epoch, "transform", sample)', 'rng.all_seeded(self.seed, "transform", sample)',
          (f"{TRANSFORM}::test_the_views_of_an_image_follow_from_seed_epoch_and_sample",)),
    Fault("A function draws from Python's generator as it is", "sslvit/rng.py",
          "    random.seed(seeds[0])\n", "",
          (f"{TRANSFORM}::test_the_views_are_what_the_function_gives_and_others_generators_stay_as_they_were",)),
    Fault("A function leaves numpy's generator changed", "sslvit/rng.py",
          "        np.random.set_state(of_numpy)  # noqa: NPY002\n", "",
          (f"{TRANSFORM}::test_the_views_are_what_the_function_gives_and_others_generators_stay_as_they_were",)),
    Fault("Views of other sizes than the first pass", "sslvit/data/transform.py",
          "if self.settings.sizes and shapes != expected:", "if False:",
          (f"{TRANSFORM}::test_every_image_gives_the_views_of_the_first_and_a_failure_names_its_sample",)),
]  # fmt: skip
