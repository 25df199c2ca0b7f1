"""Images: their pixels, their places, what a batch and a prompt have of them."""

from faults.fault import Fault

IMAGES, VIEWS = "accessory/visual/images.py", "accessory/visual/views.py"
PLACEMENT, STORE, READER = "accessory/data/placement.py", "accessory/data/store.py", "accessory/data/image_reader.py"
SIGHTS = "accessory/infer/sights.py"
PIXELS = "tests/test_images.py::test_padding_and_resizing_are_the_references_to_the_bit"
SEEN = "tests/test_images.py::test_what_is_seen_of_a_picture"
REFUSED = "tests/test_images.py::test_what_cannot_be_seen_is_told_in_a_sentence"
BESIDE = "tests/test_image_data.py::test_an_image_stands_beside_the_beginning_as_in_the_reference"
INLINE = "tests/test_image_data.py::test_images_stand_where_the_text_says"
CAPTIONS = "tests/test_image_data.py::test_an_epoch_takes_one_of_an_images_captions_and_the_next_another"
CUT = "tests/test_image_data.py::test_no_sample_is_cut_in_front_of_an_image"
BATCH = "tests/test_image_data.py::test_every_rank_has_the_pixels_of_its_samples"
ANSWERS = "tests/test_seen_answers.py::test_what_is_answered_together_is_what_is_answered_alone"

FAULTS = (
    Fault(
        "an image stands in the corner of its square",
        VIEWS,
        "((side - width) // 2, (side - height) // 2)",
        "(0, 0)",
        PIXELS,
    ),
    Fault("the square is black beside the image", VIEWS, "BACKGROUND = (122, 116, 104)", "BACKGROUND = (0, 0, 0)", PIXELS),
    Fault("an image is resized bilinearly", VIEWS, "Resampling.BICUBIC", "Resampling.BILINEAR", PIXELS),
    Fault(
        "quarters come by columns",
        VIEWS,
        "permute(0, 2, 4, 1, 3, 5)",
        "permute(0, 4, 2, 1, 3, 5)",
        "tests/test_images.py::test_views_are_the_whole_and_then_its_quarters",
    ),
    Fault("what a transparent pixel hides is seen", IMAGES, "if image.has_transparency_data:", "if False:", SEEN),
    Fault("an image lies as the camera was held", IMAGES, "ImageOps.exif_transpose(image)", "image", SEEN),
    Fault(
        "a strip becomes a square of any size",
        IMAGES,
        "max(width, height) ** 2 > MOST_SQUARE",
        "width * height > MOST_SQUARE",
        REFUSED,
    ),
    Fault(
        "an image stands before the beginning whatever the model",
        PLACEMENT,
        'int(visual.place == "after_bos" and',
        "int(False and",
        BESIDE,
    ),
    Fault(
        "a mark moves an image that stands at the beginning",
        PLACEMENT,
        'if visual.place != "inline" and marks == 1:',
        "if False:",
        BESIDE,
    ),
    Fault(
        "the words of an image are trained",
        PLACEMENT,
        "trained += [False] * visual.words",
        "trained += [True] * visual.words",
        INLINE,
    ),
    Fault(
        "every epoch takes the same caption",
        "accessory/data/order.py",
        "(begun % ways + rounds + self.round) % ways",
        "begun % ways",
        CAPTIONS,
    ),
    Fault(
        "a caption's turn comes with an epoch, not with its image",
        "accessory/data/order.py",
        "rounds[rest] += more",
        "pass",
        CAPTIONS,
    ),
    Fault(
        "the parts of a long text are taken for ways to say the same",
        STORE,
        "same[1:] &= self._seen[1:] > self._seen[:-1]",
        "pass",
        CAPTIONS,
    ),
    Fault(
        "a sample is cut through an image",
        STORE,
        "unseen = (sample.tokens[max_seq_len:] == PLACE).any()",
        "unseen = False",
        CUT,
    ),
    Fault(
        "of two images with one text one is a duplicate",
        STORE,
        "parts[-1].tobytes() + images[-1]",
        "parts[-1].tobytes()",
        "tests/test_image_data.py::test_equal_texts_of_other_images_are_no_duplicates",
    ),
    Fault(
        "the places of images hold no token of the model", "accessory/data/loader.py", "ids[in_images] = 0", "pass", BATCH
    ),
    Fault(
        "what cannot be seen is learnt blindly",
        READER,
        "trained=np.zeros_like(sample.trained)",
        "trained=sample.trained",
        "tests/test_image_data.py::test_an_image_that_is_damaged_in_its_middle_is_told_where_it_is_decoded",
    ),
    Fault(
        "a chunk of a prompt begins with the first word of its image",
        SIGHTS,
        "(before + n) % visual.words",
        "n % visual.words",
        ANSWERS,
    ),
    Fault(
        "every image is the same to the cache",
        SIGHTS,
        "return 1 + int.from_bytes(",
        "return 1 + 0 * int.from_bytes(",
        ANSWERS,
    ),
    Fault(
        "an image goes that the step needs",
        SIGHTS,
        "kept > self._most_bytes and number not in needed",
        "kept > self._most_bytes",
        "tests/test_seen_answers.py::test_the_newest_images_are_kept",
    ),
    Fault(
        "a client lets the server fetch from anywhere",
        "accessory/infer/client_images.py",
        "urlsplit(url).hostname not in hosts",
        "not hosts",
        "tests/test_seen_use.py::test_openais_client_sends_an_image",
    ),
)
