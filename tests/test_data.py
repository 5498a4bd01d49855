"""Claims about data.py: what is read, how it is split and batched, and that each bad file gets its own line."""
import itertools
import json
import os
import pickle
import re
import signal
import struct
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import Batches, InputError, planted_streams, read_features


def arrays(n=50, **more):
    rng = np.random.default_rng(0)
    return {"a": rng.standard_normal((n, 6)).astype(np.float32), "b": rng.standard_normal((n, 4)).astype(np.float16),
            "labels": rng.integers(0, 3, n), **more}


def as_file(folder, name="f.npz", drop=(), **more):
    np.savez(folder / name, **{k: v for k, v in arrays(**more).items() if k not in drop})
    return str(folder / name)


def as_folder(folder, **more):
    for k, v in arrays(**more).items():
        np.save(folder / f"{k}.npy", v)
    return str(folder)


# -- reading -----------------------------------------------------------------------------------------------------------

def test_a_file_and_a_folder_give_the_same_features(tmp_path):
    (tmp_path / "d").mkdir()
    file, folder = read_features(as_file(tmp_path)), read_features(as_folder(tmp_path / "d"))
    assert file.dims == folder.dims == {"a": 6, "b": 4} and file.hash == folder.hash
    rows = np.array([3, 4, 40])
    for s, x in folder.batch(rows).items():
        assert isinstance(folder.streams[s], np.memmap) and x.dtype.is_floating_point and x.element_size() == 4
        np.testing.assert_array_equal(x, arrays()[s][rows].astype(np.float32))
        np.testing.assert_array_equal(x, file.batch(rows)[s])
    np.testing.assert_array_equal(file.split, folder.split)


def test_streams_are_picked_in_the_order_asked_for(tmp_path):
    assert list(read_features(as_file(tmp_path), ["b", "a"]).streams) == ["b", "a"]
    assert list(read_features(as_file(tmp_path), ["b"]).streams) == ["b"]
    assert data.Source(as_file(tmp_path)).streams == ["a", "b"]


def test_the_hash_depends_on_every_value_that_is_used(tmp_path):
    base = read_features(as_file(tmp_path)).hash
    changed = arrays()["a"]
    changed[49, 5] += 1e-3
    assert read_features(as_file(tmp_path, a=changed)).hash != base
    assert read_features(as_file(tmp_path, labels=1 - arrays()["labels"] % 2)).hash != base
    assert read_features(as_file(tmp_path, captions=np.array(["x"] * 50))).hash == base


def test_integer_and_boolean_labels_mean_the_same_and_negative_is_unlabelled(tmp_path):
    labels = arrays()["labels"]
    labels[:5] = -1
    ints = read_features(as_file(tmp_path, labels=labels, label_names=np.array(["x", "y", "z"])))
    one_hot = labels[:, None] == np.arange(3)
    hot = read_features(as_file(tmp_path, "g.npz", labels=one_hot, label_names=np.array(["x", "y", "z"])))
    rows = np.arange(50)
    np.testing.assert_array_equal(ints.label_matrix(rows), hot.label_matrix(rows))
    assert not ints.label_matrix(rows)[:5].any() and ints.label_matrix(rows)[5:].any(1).all()
    assert ints.label_names == hot.label_names == ["x", "y", "z"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.uint64, np.int64])
def test_labels_of_any_integer_type_and_as_medmnist_has_them_are_the_same(dtype, tmp_path):
    labels = arrays()["labels"]
    for shape in ((50,), (50, 1)):
        given = labels.astype(dtype).reshape(shape)
        found = read_features(as_file(tmp_path, labels=given))
        assert np.array_equal(found.labels, labels) and found.labelled.all()
        assert found.label_names == ["label 0", "label 1", "label 2"]


def test_text_labels_become_names_and_the_empty_one_is_unlabelled(tmp_path):
    text = np.array(["mass", "", "cyst", "mass"] * 12 + ["fat", "cyst"])
    for given in (text, text.astype("S")):
        found = read_features(as_file(tmp_path, labels=given))
        assert found.label_names == ["cyst", "fat", "mass"]
        assert found.labels[:4].tolist() == [2, -1, 0, 2] and found.labels[48:].tolist() == [1, 0]
        assert np.array_equal(found.labelled, text != "")
    names = np.array(["mass", "fat", "none seen", "cyst"])
    found = read_features(as_file(tmp_path, labels=text, label_names=names))
    assert found.labels[:4].tolist() == [0, -1, 3, 0] and found.label_names == names.tolist()


def test_a_mask_takes_labels_away_and_a_row_of_none_is_not_unlabelled(tmp_path):
    hot = np.zeros((50, 2), bool)
    hot[::2, 0] = True                                       # the others have none of both
    mask = np.arange(50) >= 10
    found = read_features(as_file(tmp_path, labels=hot, mask=mask))
    assert np.array_equal(found.labelled, mask)
    assert np.array_equal(found.label_matrix(np.arange(50)), hot & mask[:, None])
    assert read_features(as_file(tmp_path, labels=hot)).labelled.all()
    assert found.hash != read_features(as_file(tmp_path, labels=hot)).hash
    labels = arrays()["labels"]
    labels[20] = -7
    found = read_features(as_file(tmp_path, labels=labels, mask=mask))
    assert np.array_equal(found.labelled, mask & (np.arange(50) != 20))
    assert (found.labels[~found.labelled] < 0).all()
    assert not read_features(as_file(tmp_path, drop=["labels"])).labelled.any()


@pytest.mark.parametrize("more, message", [
    ({"labels": np.full(50, 10 ** 8)}, "row 0 is 100000000 - number the classes from 0"),
    ({"labels": np.array([2 ** 63] * 50, np.uint64)}, "row 0 is 9223372036854775808"),
    ({"labels": np.array(["a"] * 50), "label_names": np.array(["b"])}, "row 0 is 'a', no 'label_names'"),
    ({"labels": np.zeros(50)}, "'labels' has shape \\(50,\\) and type float64"),
    ({"labels": np.zeros((50, 0), int)}, "'labels' has shape \\(50, 0\\)"),
    ({"labels": np.array(3)}, "'labels' has shape \\(\\) "),
    ({"labels": np.zeros(49, int)}, "'labels' has 49 entries for 50"),
    ({"mask": np.ones(50)}, "'mask' has shape \\(50,\\) and type float64"),
    ({"mask": np.ones((50, 2), bool)}, "'mask' has shape \\(50, 2\\)"),
    ({"groups": np.zeros((50, 2))}, "'groups' has shape \\(50, 2\\)"),
    ({"ids": np.array("x")}, "'ids' has shape \\(\\) "),
    ({"captions": np.array([["a"]] * 50)}, "'captions' has shape \\(50, 1\\)"),
    ({"images": np.zeros((50, 4, 4, 4), np.uint8)}, "'images' has shape \\(50, 4, 4, 4\\)"),
    ({"images": np.zeros((50, 4, 4))}, "'images' has shape \\(50, 4, 4\\) and type float64"),
    ({"images": np.arange(50)}, "'images' has shape \\(50,\\) and type int64 - give \\(N,")])
def test_what_is_said_of_the_samples_has_the_shapes_that_the_header_gives(more, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_features(as_file(tmp_path, **more))


@pytest.mark.parametrize("shape", [(50, 6, 8), (50, 6, 8, 3)])
def test_pixels_in_a_feature_file_are_its_pictures(shape, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = as_file(tmp_path, images=pixels, mask=np.arange(50) > 3)
    found, images = read_features(path), data.read_images(path)
    rgb = np.broadcast_to(pixels.reshape(50, 6, 8, -1), (50, 6, 8, 3))
    for row in (0, 49):
        assert np.array_equal(found.picture(row), rgb[row])
        assert np.array_equal(images.open(row), rgb[row])
    assert len(images) == 50 and np.array_equal(images.labels[4:], arrays()["labels"][4:])
    assert np.array_equal(images.labelled, np.arange(50) > 3)
    assert images.hash != data.read_images(as_file(tmp_path, "g.npz", images=255 - pixels)).hash
    assert len(data.read_pictures(path, 8).labels) == 46     # those with a label
    assert read_features(as_file(tmp_path, "h.npz")).picture(0) is None


def test_statistics_are_those_of_the_given_rows(tmp_path):
    features = read_features(as_file(tmp_path, a=1e4 + arrays()["a"]))
    rows = np.arange(7, 33)
    for s, (mean, std) in features.statistics(rows, block=5).items():
        x = features.batch(rows)[s].double()
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(std, x.std(0, unbiased=False), rtol=1e-4)


def holes(n=50):
    """Arrays whose rows of NaN are: 3 and 4 in "a", 4 and 20 to 29 in "b"; sample 4 has nothing."""
    found = arrays(n)
    found["a"][3:5] = np.nan
    found["b"][[4, *range(20, 30)]] = np.nan
    return found


@pytest.mark.parametrize("write", [as_file, as_folder])
def test_rows_of_nan_are_missing_noted_and_left_out_of_statistics(write, tmp_path):
    given = holes()
    features = read_features(write(tmp_path, **given))
    assert features.notes == ["stream 'a' is missing (NaN) in 2 of 50 samples", "stream 'b' is missing (NaN) in 11 of 50 samples",
                              "1 samples have no stream at all, and are left out"]
    for s in "ab":
        assert np.array_equal(features.has(s, np.arange(50)), ~np.isnan(given[s]).any(1))
    assert sorted([*features.rows("train"), *features.rows("val")]) == [i for i in range(50) if i != 4]
    for s, (mean, std) in features.statistics(np.arange(3, 33), block=5).items():
        x = given[s][3:33].astype(float)
        np.testing.assert_allclose(mean, np.nanmean(x, 0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(std, np.nanstd(x, 0), rtol=1e-4)
    assert features.hash != read_features(as_file(tmp_path, "g.npz", **{**given, "a": np.nan_to_num(given["a"])})).hash


def test_a_sample_lacks_a_stream_of_tokens_with_all_of_them(tmp_path):
    x = np.random.default_rng(0).standard_normal((50, 5, 6)).astype(np.float32)
    x[7] = np.nan
    features = read_features(as_file(tmp_path, a=x, b=np.ones((50, 5, 2), np.float32))).per_token()
    assert np.flatnonzero(~features.has("a", np.arange(250))).tolist() == [35, 36, 37, 38, 39]
    x[8, 2] = np.nan
    with pytest.raises(InputError, match="stream 'a' has NaN or Inf in 1 or more rows, first row 8"):
        read_features(as_file(tmp_path, a=x, b=np.ones((50, 5, 2), np.float32)))


def test_a_row_that_is_partly_nan_and_a_stream_that_is_nowhere_are_refused(tmp_path):
    given = holes()
    given["a"][9, 2] = np.nan
    with pytest.raises(InputError, match="stream 'a' has NaN or Inf in 1 or more rows, first row 9"):
        read_features(as_file(tmp_path, **given))
    given["a"][:] = np.nan
    with pytest.raises(InputError, match="stream 'a' is NaN throughout"):
        read_features(as_file(tmp_path, **given))


def test_the_null_pairs_anew_what_is_there_and_leaves_gaps_where_they_are(tmp_path):
    features = read_features(as_file(tmp_path, **holes()))
    null, rows = features.shuffled(1), np.arange(50)
    before, after = features.batch(rows)["b"], null.batch(rows)["b"]
    assert torch.equal(before.isnan(), after.isnan()) and not torch.equal(before, after)
    assert torch.equal(before.nan_to_num(9).sort(0)[0], after.nan_to_num(9).sort(0)[0])
    assert all(torch.equal(before[i], after[i]) for i in (4, *range(20, 30)) if not before[i].isnan().any())


# -- splitting and batching --------------------------------------------------------------------------------------------

def test_without_a_split_four_fifths_train_and_the_seed_decides(tmp_path):
    path = as_file(tmp_path, n=200)
    a, b = read_features(path, seed=1), read_features(path, seed=2)
    assert (a.split == "train").sum() == 160 and (a.split == "val").sum() == 40
    assert (a.split != b.split).any() and (a.split == read_features(path, seed=1).split).all()


def test_a_group_never_lies_in_two_splits(tmp_path):
    groups = np.random.default_rng(0).integers(0, 20, 200)
    features = read_features(as_file(tmp_path, n=200, groups=groups))
    for g in np.unique(groups):
        assert len(set(features.split[groups == g])) == 1
    assert 0.6 < (features.split == "train").mean() < 0.95


def test_a_given_split_wins_and_a_torn_group_is_noted(tmp_path):
    split = np.where(np.arange(50) < 30, "train", "test")
    features = read_features(as_file(tmp_path, split=split, groups=np.arange(50) % 2))
    np.testing.assert_array_equal(features.split, split)
    assert "2 of 2 groups" in features.notes[0]
    np.testing.assert_array_equal(features.rows("val", "test"), np.arange(30, 50))


@pytest.mark.parametrize("shuffle", ["blocks", "samples"])
def test_an_epoch_sees_every_row_once_and_a_batch_is_a_function_of_its_step(shuffle):
    rows = np.flatnonzero(np.random.default_rng(0).random(130) < 0.8)
    batches = Batches(rows, 16, 7, shuffle)
    epochs = [[batches.rows(e * batches.epoch + i) for i in range(batches.epoch)] for e in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), rows)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(epochs[0], epochs[1]))
    again = Batches(rows, 16, 7, shuffle)
    np.testing.assert_array_equal(again.rows(11), batches.rows(11))


def test_blocks_are_contiguous_in_the_training_rows():
    rows = np.flatnonzero(np.random.default_rng(0).random(130) < 0.8)
    batches = Batches(rows, 16, 7)
    position = {r: i for i, r in enumerate(rows)}
    for step in range(2 * batches.epoch):
        places = [position[r] for r in batches.rows(step)]
        assert places == list(range(places[0], places[0] + len(places))) and places[0] % 16 == 0


def test_the_null_keeps_the_first_stream_and_permutes_the_others_inside_their_split():
    features = planted_streams(300)
    null = features.shuffled(5)
    for name in ("train", "val"):
        rows = features.rows(name)
        real, broken = features.batch(rows), null.batch(rows)
        assert (real["vision"] == broken["vision"]).all()
        for s in ("text", "sound"):
            assert (real[s] != broken[s]).any(1).float().mean() > 0.9
            np.testing.assert_array_equal(np.sort(real[s][:, 0]), np.sort(broken[s][:, 0]))


# -- the made-up world -------------------------------------------------------------------------------------------------

def test_planted_streams_are_mixtures_of_what_they_say():
    features = planted_streams(500, seed=3)
    assert features.hash == planted_streams(500, seed=3).hash != planted_streams(500, seed=4).hash
    assert features.labels.shape == (500, 48) and 2 <= features.labels.sum(1).min() <= features.labels.sum(1).max() <= 5
    seen = np.stack([np.linalg.norm(D, axis=1) for D in features.truth.values()], 1)
    assert np.allclose(seen[seen > 0], 1) and sorted(np.bincount((seen > 0).sum(1))) == [0, 6, 6, 36]
    for s, D in features.truth.items():                      # least squares on the labelled concepts explains a stream
        x = features.streams[s]
        residual = [xi - D[on].T @ np.linalg.lstsq(D[on].T, xi, rcond=None)[0] for xi, on in zip(x, features.labels)]
        assert np.square(residual).sum() < 0.1 * np.square(x).sum()
    assert [list(features.parents.values()).count(p) for p in (None, "world", "A", "A1")] == [1, 4, 3, 4]


# -- taxonomies --------------------------------------------------------------------------------------------------------

def taxonomy(folder, tree):
    (folder / "t.json").write_text(json.dumps(tree))
    return str(folder / "t.json")


def test_flat_and_nested_taxonomies_agree_and_a_repeated_name_counts_where_it_is_deepest(tmp_path):
    nested = {"LabelName": "r", "Subcategory": [{"LabelName": "x"}, {"LabelName": "g", "Subcategory": [
        {"LabelName": "x"}, {"LabelName": "y"}]}]}
    expected = {"r": None, "g": "r", "x": "g", "y": "g"}
    assert data.read_taxonomy(taxonomy(tmp_path, nested), ["x", "y"]) == expected
    assert data.read_taxonomy(taxonomy(tmp_path, expected), ["x", "y"]) == expected


@pytest.mark.parametrize("tree, message", [
    ({"r": None, "x": "y", "y": "x"}, "'x' is its own ancestor - break the cycle"),
    ({"r": None, "x": "q"}, "'x' has the unknown parent 'q'"), ({"x": None, "y": None}, "taxonomy has 2 roots"),
    ({"r": None, "y": "r"}, "taxonomy lacks the label 'x'"), ([1], "is not a readable taxonomy"),
    ({"x": "x"}, "'x' is its own ancestor")])
def test_a_broken_taxonomy_is_refused(tree, message, tmp_path):
    with pytest.raises(InputError, match=message):
        data.read_taxonomy(taxonomy(tmp_path, tree), ["x"])


def test_a_missing_or_unreadable_taxonomy_is_refused(tmp_path):
    (tmp_path / "t.json").write_text("{")
    for path, message in ((tmp_path / "none.json", "no file or folder .*none.json"), (tmp_path / "t.json", "is not a readable JSON file")):
        with pytest.raises(InputError, match=message):
            data.read_taxonomy(str(path), [])


# -- bad files ---------------------------------------------------------------------------------------------------------

def poisoned(value, row):
    x = arrays()["b"]
    x[row, 2] = value
    return x


@pytest.mark.parametrize("more, message", [
    ({"b": poisoned(np.nan, 17)}, "stream 'b' has NaN or Inf in 1 or more rows, first row 17"),
    ({"b": poisoned(np.inf, 3)}, "stream 'b' has NaN or Inf in 1 or more rows, first row 3"),
    ({"b": np.zeros((49, 4))}, r"stream 'b' has shape \(49, 4\) but 'a' \(50, 6\)"),
    ({"b": np.zeros((50, 4), int)}, "stream 'b' holds int64"),
    ({"b": np.zeros((50, 0))}, r"stream 'b' has shape \(50, 0\) .* at least one"),
    ({"b": np.zeros(50)}, r"stream 'b' has shape \(50,\)"),
    ({"labels": np.zeros(49, int)}, "'labels' has 49 entries for 50 samples"),
    ({"labels": np.zeros(50)}, "'labels' has shape .* float64"),
    ({"label_names": np.array(["x"])}, "'label_names' has 1 names for 3 labels"),
    ({"split": np.array(["train"] * 50)}, "the test and val split is empty"),
    ({"split": np.array(["test"] * 50)}, "the train split is empty"),
    ({"split": np.array(["train"] * 49 + ["dev"])}, "'split' row 49 is 'dev'"),
    ({"groups": np.zeros(50, int)}, "the test and val split is empty"),
    ({"n": 0}, "has shape .0, 6. .* at least one"),
    ({"b": np.array([{}] * 50)}, "key 'b' is not a readable array of an .npz file .Object arrays")])
def test_a_bad_array_is_refused_by_name(more, message, tmp_path):
    with pytest.raises(InputError, match=message):
        features = read_features(as_file(tmp_path, **more))
        features.rows("train")
        features.rows("test", "val")


def test_a_bad_file_is_refused(tmp_path):
    whole = open(as_file(tmp_path), "rb").read()
    (tmp_path / "cut.npz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.npz").write_text("not a file of ours")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"a": 1}))
    np.save(tmp_path / "one.npy", np.zeros((3, 2)))
    middle = bytearray(whole)
    middle[200:260] = bytes(60)
    (tmp_path / "damaged.npz").write_bytes(bytes(middle))
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "none.npz", labels=np.zeros(3, int))
    for name, message in (("missing.npz", "no file or folder"), ("cut.npz", "is not a readable .npz file"),
                          ("damaged.npz", "is not a readable"), ("text.npz", "is not a readable"),
                          ("pickle.npz", "is not a readable"), ("one.npy", "holds an array without a name"),
                          ("empty", "holds no stream"), ("none.npz", "holds no stream")):
        with pytest.raises(InputError, match=message):
            read_features(str(tmp_path / name))
    with pytest.raises(InputError, match="has no stream 'z' - it has a, b"):
        read_features(as_file(tmp_path), ["z"])


def test_a_cut_off_array_in_a_folder_is_refused(tmp_path):
    path = as_folder(tmp_path)
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:300])
    with pytest.raises(InputError, match="a.npy is"):
        read_features(path)


def test_zero_rows_are_noted_not_refused(tmp_path):
    x = arrays()["a"]
    x[[4, 9]] = 0
    assert "stream 'a' has 2 all-zero rows" in read_features(as_file(tmp_path, a=x)).notes[0]


# -- pictures ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("test", 3)):
        for name in ("a", "b"):
            (tmp_path / "p" / split / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(tmp_path / "p" / split / name / f"{i}.png")
    return tmp_path / "p"


def test_folders_give_splits_and_labels(pictures):
    images = data.read_images(pictures)
    assert len(images) == 18 and images.label_names == ["a", "b"] and len(images.rows("train")) == 12
    for path, label, split in zip(images.paths, images.labels, images.split):
        assert f"/{split}/{'ab'[label]}/" in path
    flat = data.read_images(pictures / "train" / "a")
    assert len(flat) == 6 and flat.labels is None and flat.split is None
    assert flat.rows("train").tolist() == list(range(6))       # all, where there is no split
    train, test = data.read_images(pictures / "train").knn_rows(0, 100)
    assert len(train) + len(test) == 12 and not set(train) & set(test)


def deep(folder):
    (folder / "train" / "a" / "deep").mkdir()
    return folder / "train" / "a" / "deep"


@pytest.mark.parametrize("name", ["valid", "validation", "val"])
def test_a_folder_of_any_name_for_validation_is_the_val_split(name, pictures):
    (pictures / "test" / "a").rename(pictures / "a")
    (pictures / name).mkdir()
    (pictures / "a").rename(pictures / name / "a")
    images = data.read_images(pictures)
    assert [len(images.rows(part)) for part in data.SPLITS] == [12, 3, 3]
    assert data.read_images(pictures / "train").split is None


def test_hidden_files_and_folders_are_passed_over(pictures):
    picture = (pictures / "train" / "a" / "0.png").read_bytes()
    for folder in ("train/.ipynb_checkpoints", "__MACOSX/train/a", "train/a/.cache", ".git"):
        (pictures / folder).mkdir(parents=True)
        (pictures / folder / "x.png").write_bytes(picture)
    (pictures / "train" / "b" / "._1.png").write_bytes(b"resource fork")
    images = data.read_images(pictures)
    assert len(images) == 18 and images.label_names == ["a", "b"]


@pytest.mark.parametrize("where", ["extra", "extra/a", "."])
def test_pictures_beside_the_split_folders_are_refused_and_other_things_are_not(where, pictures):
    (pictures / where).mkdir(parents=True, exist_ok=True)
    (pictures / where / "notes.txt").write_text("read me")
    assert len(data.read_images(pictures)) == 18
    (pictures / "train" / "a" / "0.png").rename(pictures / where / "0.png")
    with pytest.raises(InputError, match="0.png lies beside the train, val and test folders"):
        data.read_images(pictures)


def test_segmentations_beside_their_pictures_tell_its_boxes(tmp_path):
    """As BUSI is released: a file for each lesion, an empty one where there is none."""
    truth = {("benign", 1): [(8, 6, 20, 15)], ("malignant", 1): [(0, 0, 5, 30), (30, 10, 40, 29)], ("normal", 1): [], ("normal", 2): []}
    for (kind, i), boxes in truth.items():
        (tmp_path / kind).mkdir(exist_ok=True)
        name = tmp_path / kind / f"{kind} ({i})"
        Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(f"{name}.png")
        for n, (x0, y0, x1, y1) in enumerate(boxes or [(0, 0, 0, 0)]):
            mask = np.zeros((30, 40), np.uint8)
            mask[y0:y1, x0:x1] = 255
            Image.fromarray(mask).convert("1").save(f"{name}_mask{f'_{n}' * (n > 0)}.png")
    images = data.read_images(tmp_path)
    assert len(images) == 4 and images.label_names == ["benign", "malignant", "normal"] and images.boxes is not None
    np.testing.assert_allclose(images.boxes, [[i, label, x0 / 40, y0 / 30, x1 / 40, y1 / 30] for i, label, (x0, y0, x1, y1) in (
        (0, 0, (8, 6, 20, 15)), (1, 1, (0, 0, 5, 30)), (1, 1, (30, 10, 40, 29)))])
    out = tmp_path.parent / f"{tmp_path.name}.npz"
    np.savez(out, x=np.ones((4, 2)), **images.arrays(out))
    assert np.array_equal(data.read_features(out).boxes, images.boxes)
    assert data.read_images(tmp_path / "malignant").boxes is None             # of no class: nothing to call it
    deep = np.zeros((30, 40), np.uint16)
    for top in (1, 3, 60000):                                # masks of another depth, or with an alpha channel, or lossy
        deep[6:15, 8:20] = top
        Image.fromarray(deep).save(tmp_path / "benign" / "benign (1)_mask.png")
        np.testing.assert_allclose(data.read_images(tmp_path).boxes[0, 2:], [.2, .2, .5, .5])
    grey = np.uint8(deep > 0) * 255
    Image.fromarray(np.dstack([grey] * 3 + [grey * 0 + 255])).save(tmp_path / "benign" / "benign (1)_mask.png")
    np.testing.assert_allclose(data.read_images(tmp_path).boxes[0, 2:], [.2, .2, .5, .5])
    (tmp_path / "benign" / "benign (1)_mask.png").write_bytes(b"no")
    with pytest.raises(InputError, match=r"\(1\)_mask.png is not a readable mask"):
        data.read_images(tmp_path)
    assert len(data.read_slides(tmp_path)) == 4              # slides have no use for it, and may be too large to open


def test_segmentations_beside_their_pictures_are_left_out_with_a_note(pictures):
    """As BUSI is released: masks would tell the class, since healthy pictures have empty ones."""
    source = (pictures / "train" / "a" / "0.png").read_bytes()
    for name in ("0_mask.png", "0_mask_1.png", "lone_mask.png", "5_mask_of_it.png"):
        (pictures / "train" / "a" / name).write_bytes(source)
    (pictures / "train" / "b" / "9_mask.png").write_bytes(source)        # 9.png stands nowhere
    images = data.read_images(pictures)
    added = {p.rpartition("/")[2] for p in images.paths if "_mask" in p}
    assert len(images) == 21 and added == {"lone_mask.png", "5_mask_of_it.png", "9_mask.png"}
    assert "2 masks" in images.notes[0] and len(images.boxes) == 2
    assert data.read_pictures(str(pictures), 8).notes == images.notes
    assert data.read_images(pictures / "test").notes == []


@pytest.mark.parametrize("spoil, message", [
    (lambda p: (p / "train" / "a" / "0.png").write_bytes(b"no"), "0.png is not a readable picture"),
    (lambda p: (p / "train" / "stray.png").write_bytes((p / "train" / "a" / "1.png").read_bytes()), "stray.png lies beside class folders"),
    (lambda p: (p / "train" / "a" / "0.png").rename(deep(p) / "0.png"), "lies deeper than one"),
    (lambda p: Image.fromarray(np.zeros((13400, 13400), np.uint8)).save(p / "train" / "a" / "0.png"), "too large for one picture")])
def test_bad_picture_folders_are_refused_by_name(pictures, spoil, message):
    spoil(pictures)
    with pytest.raises(InputError, match=message):
        data.read_images(pictures)


def test_linked_class_folders_count_and_a_link_to_a_folder_above_ends(pictures, tmp_path):
    (tmp_path / "l" / "a").mkdir(parents=True)
    (tmp_path / "l" / "a" / "x.png").write_bytes((pictures / "test" / "a" / "0.png").read_bytes())
    (tmp_path / "l" / "b").symlink_to(pictures / "test" / "b")
    for place, to in (("up", "."), ("a/up", "..")):
        (tmp_path / "l" / place).symlink_to(to)
    images = data.read_images(tmp_path / "l")
    assert images.labels.tolist() == [0, 1, 1, 1] and images.label_names == ["a", "b"]


def test_a_picture_with_broken_tags_is_refused_by_name(tmp_path):
    Image.new("I;16", (5, 4)).save(tmp_path / "x.tif")
    whole = (tmp_path / "x.tif").read_bytes()
    one, many = (b"\x06\x01\x03\x00" + bytes([n]) for n in (1, 80))    # so many values of tag 262
    assert whole.count(one) == 1
    (tmp_path / "x.tif").write_bytes(whole.replace(one, many))
    with pytest.raises(InputError, match="x.tif is not a readable picture"):
        data.open_image(tmp_path / "x.tif")


def test_groups_that_the_split_of_listed_pictures_tears_are_noted(tmp_path):
    split = np.where(np.arange(6) < 4, "train", "test")
    for groups, notes in (([0, 0, 1, 2, 2, 3], ["1 of 4 groups (first: 2) lie in several splits"]),
                          ([0, 0, 1, 1, 2, 2], [])):
        np.savez(tmp_path / "f.npz", images=np.zeros((6, 4, 4), np.uint8), groups=np.array(groups),
                 split=split, labels=np.arange(6) % 2)
        assert data.read_images(tmp_path / "f.npz").notes == notes
        assert data.read_pictures(tmp_path / "f.npz", 4).notes == notes


def test_missing_and_empty_picture_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    for where, message in ((tmp_path / "no", "no folder"), (tmp_path, "no pictures in")):
        with pytest.raises(InputError, match=message):
            data.read_images(where)


def deep_pictures(folder, top):
    """Values (6, 8) from 0 to `top`, and files of them: how grey of more than 8 bits comes."""
    x = np.linspace(0, top, 48).round().reshape(6, 8)
    files = {"a.png": np.uint16, "b.tif": np.uint16, "c.tif": ">u2", "d.tif": np.int32}
    for name, dtype in files.items():
        Image.fromarray(x.astype(dtype)).save(folder / name)
    return x, [folder / name for name in files]


@pytest.mark.parametrize("top, most", [(4095, 4095), (3000, 4095), (65535, 65535), (20000, 65535)])
def test_pictures_of_16_bits_keep_their_greys_by_12_bits_or_16(top, most, tmp_path):
    x, paths = deep_pictures(tmp_path, top)
    for path in paths:
        found = np.asarray(data.open_image(path))
        assert found.shape == (6, 8, 3)
        np.testing.assert_allclose(found[..., 1], x / most * 255, atol=0.51)


def test_a_stated_range_a_window_and_the_span_of_floats_decide_what_is_white(tmp_path):
    x = np.linspace(100, 900, 48).round().reshape(6, 8)
    Image.fromarray(x.astype(np.uint16)).save(tmp_path / "s.tif", tiffinfo={280: 100, 281: 1000})
    stated, span = (x - 100) / 900, (x - 100) / 800
    floats = (x / 1e5).astype(np.float32)
    floats[0, 3] = np.nan
    Image.fromarray(floats).save(tmp_path / "f.tif")
    Image.fromarray((x - 500).astype(np.int32)).save(tmp_path / "n.tif")
    Image.fromarray(x.astype(np.uint16)).save(tmp_path / "w.tif", tiffinfo={262: 0, 281: 900})
    for name, wanted in (("s", stated), ("f", span), ("n", span), ("w", 1 - x / 900)):
        found = np.asarray(data.open_image(tmp_path / f"{name}.tif"))[..., 0]
        np.testing.assert_allclose(found[1:], 255 * wanted[1:], atol=1.1, err_msg=name)
    found = np.asarray(data.open_image(tmp_path / "s.tif", window=(300, 700)))[..., 0]
    np.testing.assert_allclose(found, 255 * np.clip((x - 300) / 400, 0, 1), atol=0.51)
    Image.fromarray((x / 4).astype(np.uint8)).save(tmp_path / "8.png")
    images = data.Images([str(tmp_path / "8.png")], window=(50, 200))
    grey = np.asarray(images.open(0))[..., 0]
    np.testing.assert_allclose(grey, 255 * np.clip((np.floor(x / 4) - 50) / 150, 0, 1), atol=0.51)
    assert data._grey_range(x, {258: (10,)}) == (0, 1023)
    images.about["coords"] = np.array([[2, 1, 4, 3]])        # a part of it looks the same
    assert np.array_equal(np.asarray(images.open(0))[..., 0], grey[1:4, 2:6])


def test_pictures_stand_as_their_exif_says(tmp_path):
    turned = Image.Exif()
    turned[274] = 6                                          # to be shown a quarter turn clockwise
    x = np.random.default_rng(0).integers(0, 255, (10, 20, 3), np.uint8)
    Image.fromarray(x).save(tmp_path / "c.png", exif=turned)
    Image.fromarray(x[..., 0].astype(np.uint16) * 257).save(tmp_path / "g.png", exif=turned)
    upright = np.rot90(x, -1)
    assert np.array_equal(np.asarray(data.open_image(tmp_path / "c.png")), upright)
    assert np.array_equal(np.asarray(data.open_image(tmp_path / "g.png"))[..., 0], upright[..., 0])
    assert data.Slide(str(tmp_path / "c.png")).size == (10, 20)


def test_crops_cover_the_asked_share_of_the_picture():
    """On a picture whose red is its column and green its row, the span of a crop's colours is the crop's side."""
    row, column = np.mgrid[:200, :200]
    image = Image.fromarray(np.stack([column, row, 0 * row], 2).astype(np.uint8))
    crops = data.Crops(40, 20, 3, (0.5, 0.6), (0.1, 0.2), blur=0.)
    t = data.vision().transforms
    for view, (low, high), side in zip(crops.views[1:3], ((0.5, 0.6), (0.1, 0.2)), (40, 20)):
        crop = next(step for step in view.transforms if isinstance(step, t.RandomResizedCrop))
        for _ in range(40):
            x = np.asarray(crop(image), float)
            assert x.shape == (side, side, 3)
            span = [(v.max() - v.min() + 1 + 200 / side * 0.5) / 200 for v in (x[..., 0], x[..., 1])]
            assert low * 0.75 < span[0] * span[1] < high * 1.35
    assert [view.size for view in crops(image)] == [(40, 40)] * 2 + [(20, 20)] * 3


def test_crops_of_a_step_are_the_same_whoever_makes_them(pictures):
    images, crops = data.read_images(pictures), data.Crops(16, 8, 2, blur=0.5)
    batches = data.Batches(images.rows("train"), 5, 0, "samples", drop_last=True)
    assert batches.epoch == 2
    torch.manual_seed(1)
    whole = [[v.clone() for v in views] for views in data.crop_batches(images, crops, batches, 3, 0, 4)]
    torch.manual_seed(2)
    late = list(data.crop_batches(images, crops, batches, 3, 2, 4, workers=1))
    assert len(whole) == 4 and len(late) == 2 and [len(v) for v in whole[0]] == [5] * 4
    for a, b in zip(whole[2:], late):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(whole[0][0], whole[2][0])


# -- slides and bags ---------------------------------------------------------------------------------------------------

def drawn_slide(tmp_path, holes=True):
    """A pale slide of 1200 x 900 with one pink piece (x 200..700, y 100..600) that has a hole, one speck, and grey dirt."""
    row, column = np.mgrid[:900, :1200]
    image = np.full((900, 1200, 3), 244, np.uint8)
    piece = (200 <= column) & (column < 700) & (100 <= row) & (row < 600)
    hole = (column - 450) ** 2 + (row - 350) ** 2 < 120 ** 2
    speck, dirt = (column - 1000) ** 2 + (row - 200) ** 2 < 10 ** 2, (column > 900) & (row > 700)
    image[piece & ~hole | speck] = (200, 90, 150)
    image[dirt] = (90, 90, 90)
    Image.fromarray(image).save(tmp_path / "slide.png")
    return tmp_path / "slide.png", image, piece, hole


def test_tissue_of_a_drawn_slide_is_the_mask_that_was_drawn(tmp_path):
    _, image, piece, hole = drawn_slide(tmp_path)
    found = data.find_tissue(image, least=1000, least_hole=1000)
    tissue = piece & ~hole
    assert ((found == 1) & tissue).sum() / ((found == 1) | tissue).sum() > 0.97
    assert ((found == -1) & hole).sum() / ((found == -1) | hole).sum() > 0.97 and found.max() == 1
    assert np.array_equal(np.abs(data.find_tissue(image, least=1000, least_hole=10 ** 6)), np.abs(found))
    assert (data.find_tissue(image, least=1000, max_holes=0) >= 0).all()                    # a hole that does not count is filled
    assert data.find_tissue(image, least=10).max() == 2                                     # and now the speck does


def test_otsu_has_the_largest_variance_between_classes():
    values = np.concatenate([np.random.default_rng(0).normal(m, s, 500) for m, s in ((60, 12), (170, 30))]).clip(0, 255).astype(np.uint8)

    def between(t):
        a, b = values[values <= t].astype(float), values[values > t].astype(float)
        return len(a) * len(b) * (a.mean() - b.mean()) ** 2 if len(a) and len(b) else 0
    assert between(data.otsu(values)) == pytest.approx(max(map(between, range(256))))


def test_tiles_start_at_the_corner_of_their_piece_and_leave_out_holes(tmp_path):
    path, *_ = drawn_slide(tmp_path)
    boxes, shown = data.tile_slide(path, 100, least=0.1, least_hole=0.1)
    x, y = {int(v) for v in boxes[:, 0]}, {int(v) for v in boxes[:, 1]}
    assert x == {min(x) + 100 * i for i in range(5)} and y == {min(y) + 100 * i for i in range(5)}
    assert abs(min(x) - 200) <= 4 and abs(min(y) - 100) <= 4 and (boxes[:, 2:] == 100).all()
    middle = (boxes[:, :2] + 50 - (450, 350)).astype(float)
    assert len(boxes) == 20 and (np.hypot(*middle.T) > 115).all()                           # 25 less the five centred in the hole
    assert shown.size == (1200, 900)
    assert len(data.tile_slide(path, 100, 50, least=0.1, least_hole=0.1)[0]) > 60
    edge, _ = data.tile_slide(path, 450, least=0.1)
    assert len(edge) == 1 and edge[0, 1] + 450 <= 900          # a second row would reach over the edge


def test_a_tile_is_read_as_its_part_of_the_slide(tmp_path):
    path, image, *_ = drawn_slide(tmp_path)
    boxes, _ = data.tile_slide(path, 100, least=0.1)
    images = data.Images([str(path)] * len(boxes), about={"coords": boxes})
    x, y, w, h = boxes[7]
    assert np.array_equal(np.asarray(images.open(7)), image[y:y + h, x:x + w])
    small, scale = data.Slide(path).overview(300)
    assert small.size == (300, 225) and scale == 4.


def test_a_slide_without_tissue_is_refused(tmp_path):
    Image.new("RGB", (600, 600), (240, 240, 240)).save(tmp_path / "empty.png")
    with pytest.raises(InputError, match="empty.png has no tissue"):
        data.tile_slide(tmp_path / "empty.png")
    with pytest.raises(InputError, match="has no tissue"):
        data.read_images(tmp_path / "empty.png")


def test_the_share_of_a_tile_inside_regions_is_their_area_with_cut_outs_taken_out():
    """Triangles, a nested region (counted once), a hole, and a random star against a raster forty times finer."""
    triangle = np.array([[0., 0], [100, 0], [0, 100]])
    for box, share in (((0, 0, 100, 100), 0.5), ((0, 0, 50, 50), 1.), ((200, 0, 50, 50), 0.), ((50, 0, 100, 50), 0.25)):
        assert data.region_share([(triangle, True)], box) == pytest.approx(share, abs=0.02)
        assert data.region_share([(triangle, True), (triangle / 2, True)], box) == pytest.approx(share, abs=0.02)
    square = np.array([[0., 0], [100, 0], [100, 100], [0, 100]])
    assert data.region_share([(square, True), (square / 2, False)], (0, 0, 100, 100)) == pytest.approx(0.75, abs=0.03)
    rng = np.random.default_rng(0)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 11))
    star = np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(20, 160, (11, 1)) + 128
    fine = Image.new("L", (2560, 2560))
    data.ImageDraw.Draw(fine).polygon([tuple(p * 10) for p in star], fill=1)
    for x, y, w, h in ((60, 60, 100, 80), (0, 0, 256, 256), (128, 128, 50, 50)):
        share = np.asarray(fine)[10 * y:10 * (y + h), 10 * x:10 * (x + w)].mean()
        assert data.region_share([(star, True)], (x, y, w, h)) == pytest.approx(share, abs=0.02)


def test_asap_annotations_are_read_with_their_cut_outs_last_and_broken_ones_refused(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text("<ASAP_Annotations><Annotations>" + "".join(
        f'<Annotation PartOfGroup="{group}"><Coordinates><Coordinate Order="1" X="10" Y="0"/><Coordinate Order="0" X="{x}" Y="0"/>'
        '<Coordinate Order="2" X="0" Y="10"/></Coordinates></Annotation>' for group, x in (("_2", 3), ("_0", 0)))
        + "<Annotation><Coordinates><Coordinate Order='0' X='1' Y='1'/></Coordinates></Annotation></Annotations></ASAP_Annotations>")
    (first, inside), (second, outside) = data.read_polygons(path)
    assert first.tolist() == [[0, 0], [10, 0], [0, 10]] and inside and second[0].tolist() == [3, 0] and not outside
    path.write_text("<ASAP_Annotations><Annot")
    with pytest.raises(InputError, match="a.xml is not a readable ASAP"):
        data.read_polygons(path)


def test_a_slide_of_openslide_is_read_at_the_level_that_a_part_needs(tmp_path, monkeypatch):
    """A stand-in for openslide with levels 1, 4 and 16, whose pixels tell the level they come from."""
    class OpenSlide:
        dimensions, level_downsamples = (4096, 2048), (1., 4., 16.)

        @staticmethod
        def detect_format(path):
            return "aperio" if path.endswith(".svs") else None

        def __init__(self, path):
            assert path.endswith(".svs")

        def get_best_level_for_downsample(self, downsample):
            return max(i for i, d in enumerate(self.level_downsamples) if d <= downsample)

        def read_region(self, place, level, size):
            assert place in ((64, 32), (0, 0))
            return Image.new("RGBA", size, (level, 0, 0, 255))
    monkeypatch.setitem(sys.modules, "openslide", type(sys)("openslide"))
    sys.modules["openslide"].OpenSlide = OpenSlide
    slide = data.Slide("a.svs")
    for width, side, level in ((224, 224, 0), (896, 224, 1), (896, 518, 0), (3600, 224, 2)):
        image = slide.read((64, 32, width, width), side)
        assert image.getpixel((0, 0))[0] == level and image.width == round(width / OpenSlide.level_downsamples[level]) >= side
    whole, scale = slide.overview(1000)
    assert whole.size == (1000, 500) and scale == 4.096 and whole.getpixel((0, 0)) == (1, 0, 0)
    drawn_slide(tmp_path)
    assert data.Slide(str(tmp_path / "slide.png")).size == (1200, 900)                      # a plain picture: through Pillow


def test_boxes_are_cut_as_squares_around_them_by_the_official_splits(tmp_path):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / "voc" / name).mkdir(parents=True)
    row, column = np.mgrid[:200, :300]
    image = np.where((abs(column - 150) < 20)[..., None] & (abs(row - 100) < 40)[..., None], 255, 0).repeat(3, 2).astype(np.uint8)
    for stem in ("one", "two"):
        Image.fromarray(image).save(tmp_path / "voc" / "JPEGImages" / f"{stem}.jpg", quality=100)
        (tmp_path / "voc" / "Annotations" / f"{stem}.xml").write_text(
            "<annotation><object><name>cell</name><bndbox><xmin>130</xmin><ymin>60</ymin><xmax>170</xmax><ymax>140</ymax></bndbox></object>"
            "<object><name>dust</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>8</xmax><ymax>90</ymax></bndbox></object>"
            "<object><name>rim</name><bndbox><xmin>280</xmin><ymin>100</ymin><xmax>300</xmax><ymax>140</ymax></bndbox></object></annotation>")
    (tmp_path / "voc" / "ImageSets" / "Main" / "trainval.txt").write_text("one\n")
    with pytest.raises(InputError, match="test.txt - expected a Pascal VOC folder"):
        data.cut_boxes(tmp_path / "voc")
    (tmp_path / "voc" / "ImageSets" / "Main" / "test.txt").write_text("two\n")
    cuts = data.cut_boxes(tmp_path / "voc", 0.2)
    assert cuts.about["ids"].tolist() == [
        f"{split}/{name}" for split, stem in (("train", "one"), ("test", "two"))
        for name in (f"cell/{stem}_0", f"rim/{stem}_2")]
    assert (cuts.about["coords"][:, 2] == cuts.about["coords"][:, 3]).all()
    cut = np.asarray(cuts.open(2).resize((96, 96), Image.BICUBIC).convert("L")) > 128
    rows, columns = np.flatnonzero(cut.any(1)), np.flatnonzero(cut.any(0))
    edges = np.array([rows[0], rows[-1], columns[0], columns[-1]])
    assert (abs(edges - (8, 87, 28, 67)) <= 1).all()         # 80 and 40 of 96
    with Image.open(tmp_path / "voc" / "JPEGImages" / "one.jpg") as whole:
        expected = whole.crop((252, 96, 300, 144))           # moved inwards, not filled up
    assert np.array_equal(np.asarray(cuts.open(1)), np.asarray(expected))


def test_a_broken_annotation_and_a_name_that_is_a_path_are_refused(tmp_path):
    path = tmp_path / "a.xml"
    for text, message in (("<a><object><name>x</name></object></a>", "is not a readable Pascal VOC"), ("<a>", "is not a readable"),
                          ("<a><object><name>../x</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></a>",
                           "names an object '../x'")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            data.read_voc(path)


def test_tiles_of_several_slides_are_read_as_one_set(tmp_path):
    path, *_ = drawn_slide(tmp_path)
    boxes, _ = data.tile_slide(path, 100, least=0.1)
    (tmp_path / "t").mkdir()
    for i in range(2):
        np.savez(tmp_path / "t" / f"s{i}.npz", coords=boxes[i:], images=np.array(["../slide.png"] * (len(boxes) - i)),
                 labels=np.zeros(len(boxes) - i, int), label_names=np.array(["a"]))
    both = data.read_images(tmp_path / "t")
    assert len(both) == 2 * len(boxes) - 1 and both.labels.shape == (len(both),) and both.hash != data.read_images(tmp_path / "t" / "s0.npz").hash
    assert np.array_equal(np.asarray(both.open(len(boxes))), np.asarray(both.open(1)))
    Image.new("RGB", (300, 500)).save(tmp_path / "small.png")
    assert data.read_images(tmp_path / "small.png").boxes is None                           # hardly two tiles: one picture


def test_tiles_know_the_class_and_split_and_name_of_their_slide(tmp_path):
    path, *_ = drawn_slide(tmp_path)
    for split, label, name in (("train", "ill", "a"), ("train", "well", "b"), ("test", "ill", "c")):
        folder = tmp_path / "s" / split / label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(path.read_bytes())
    slides = data.read_slides(tmp_path / "s")
    assert slides.about["groups"].tolist() == ["c", "a", "b"]
    (tmp_path / "t").mkdir()
    boxes = np.array([[200, 100, 100, 100], [300, 100, 100, 100]])
    for i, name in enumerate(slides.about["groups"]):
        out = str(tmp_path / "t" / f"{name}.npz")
        np.savez(out, **data.slide_tiles(slides, i, boxes).arrays(out))
    tiles = data.read_images(tmp_path / "t")
    assert [tiles.label_names[y] for y in tiles.labels] == ["ill"] * 2 + ["well"] * 2 + ["ill"] * 2
    assert tiles.split.tolist() == ["train"] * 4 + ["test"] * 2
    assert tiles.about["groups"].tolist() == ["a", "a", "b", "b", "c", "c"]
    assert tiles.open(4).size == (100, 100)
    for more, message in (({"label_names": np.array(["a", "b"])}, "other 'label_names' than"),
                          ({"images": np.zeros((2, 4, 4), np.uint8)}, "'images' has shape")):
        with np.load(out) as z:
            np.savez(tmp_path / "t" / "d.npz", **{**z, **more})
        with pytest.raises(InputError, match=message):
            data.read_images(tmp_path / "t")
    regions = [(np.array([[200., 100], [230, 100], [230, 200], [200, 200]]), True)]
    for share, label in ((0.5, [0, 0]), (0.2, [1, 0])):
        there = data.slide_tiles(slides, 0, boxes, regions, share).arrays(out)
        assert there["labels"].tolist() == label and there["label_names"].tolist()[1] == "region"


def bag_file(path, **change):
    rng = np.random.default_rng(0)
    arrays = {"X": rng.standard_normal((10, 3)), "offsets": np.array([0, 2, 3, 7, 10]), "y": np.array([0, 1, 0, 1]), **change}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path, arrays


def test_padded_bags_are_their_instances_and_a_mask(tmp_path):
    path, arrays = bag_file(tmp_path / "b.npz")
    bags = data.read_bags(path)
    x, mask, y = bags.padded([2, 1])
    assert x.shape == (2, 4, 3) and mask.sum(1).tolist() == [4, 1] and y.tolist() == [0, 1]
    np.testing.assert_allclose(x[0].numpy(), arrays["X"][3:7], rtol=1e-6)
    assert torch.equal(x[1, 1:], torch.zeros(3, 3)) and np.array_equal(bags.x[1][0], x[1, 0])


@pytest.mark.parametrize("change, message", [
    ({"y": None}, "lacks 'y'"), ({"offsets": np.array([0, 2, 2, 7, 10])}, "bag 1 is empty"),
    ({"offsets": np.array([0, 2, 3, 10])}, r"'offsets' has shape \(4,\) .* for 4 bags"),
    ({"y": np.array([1, 1, 1, 1])}, "all bags have the label 1"), ({"y": np.array([0, 1, -1, 0])}, "'y' goes from -1 to 1"),
    ({"X": np.where(np.arange(10)[:, None] == 4, np.nan, np.ones((10, 3)))}, "bag 2 holds NaN"),
    ({"offsets": np.array([0., 2, 3, 7, 10])}, "'offsets' has shape .* float64 - give"), ({"y": np.array([[0], [1], [0], [1]])}, r"'y' has shape \(4, 1\)"),
    ({"y": np.array(1)}, r"'y' has shape \(\)"), ({"y": np.array(["a", "b", "a", "b"])}, "'y' has shape .* type <U1"),
    ({"folds": np.zeros((0, 2, 4), bool)}, "'folds' has no fold - leave the key out"),
    ({"y": np.zeros(0, int)}, "'y' goes from|'offsets' has shape"), ({"offsets": np.zeros(0, int)}, r"'offsets' has shape \(0,\)"),
    ({"folds": np.ones((2, 5), bool)}, "'folds' has shape"), ({"folds": np.ones((1, 2, 4), int)}, "and type int64 - give .* for 4 bags")])
def test_bad_bags_are_refused_by_name(change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        data.read_bags(bag_file(tmp_path / "b.npz", **change)[0])


def test_a_folder_of_bags_has_its_labels_and_pictures_and_one_width(tmp_path):
    for label in ("normal", "tumour"):
        (tmp_path / label).mkdir()
        for i in range(2):
            np.savez(tmp_path / label / f"s{i}.npz", f=np.full((3 + i, 5), i, np.float32), coords=np.zeros((3 + i, 4), int),
                     images=np.array(["../../slide.png"] * (3 + i)))
    bags = data.read_bags(tmp_path)
    assert bags.y.tolist() == [0, 0, 1, 1] and bags.label_names == ["normal", "tumour"] and [len(x) for x in bags.x] == [3, 4, 3, 4]
    assert bags.images[0].endswith("/../../slide.png") and len(bags.coords[1]) == 4
    np.savez(tmp_path / "normal" / "s2.npz", f=np.zeros((3, 6), np.float32))
    with pytest.raises(InputError, match=r"have widths \[5, 6\]"):
        data.read_bags(tmp_path)
    np.savez(tmp_path / "normal" / "s2.npz", f=np.zeros((3, 5)), g=np.zeros((3, 5)))
    with pytest.raises(InputError, match="has the streams f, g - pick one"):
        data.read_bags(tmp_path)


def test_each_group_of_a_feature_file_is_a_bag_with_its_one_label_and_split(tmp_path):
    group = np.array([2, 0, 1, 2, 0, 2])
    told = {"groups": np.array(["a", "b", "c"])[group], "labels": np.array(["ill", "well", "ill"])[group],
            "split": np.array(["train", "test", "val"])[group], "coords": np.arange(24).reshape(6, 4),
            "images": np.array(["s/a.png", "s/b.png", "s/c.png"])[group]}
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    np.savez(tmp_path / "f.npz", x=x, **told)
    bags = data.read_bags(str(tmp_path / "f.npz"))
    assert list(bags.names) == ["a", "b", "c"] and bags.label_names == ["ill", "well"]
    assert bags.y.tolist() == [0, 1, 0] and bags.split.tolist() == ["train", "test", "val"]
    for i in range(3):
        assert np.array_equal(bags.x[i], x[group == i])
        assert np.array_equal(bags.coords[i], told["coords"][group == i])
        assert bags.images[i] == str(tmp_path / "s" / f"{'abc'[i]}.png")
    np.testing.assert_allclose([x.mean(0) for x in bags.x], [x[group == i].mean(0) for i in range(3)], rtol=1e-5)
    for key, value in (("label", {"labels": np.arange(6) % 2}),
                       ("split", {"split": np.array(["train", "val", "test"] * 2)})):
        np.savez(tmp_path / "g.npz", x=x, **{**told, **value})
        with pytest.raises(InputError, match=f"group . has several {key}s"):
            data.read_bags(str(tmp_path / "g.npz"))


def test_folds_report_every_bag_once_and_hold_every_class(tmp_path):
    bags = data.Bags(60 * [np.zeros((1, 2))], np.arange(60) % 3, ["a", "b", "c"], [])
    rounds = bags.rounds(4, 0, "b")
    assert np.array_equal(np.sort(np.concatenate([test for *_, test in rounds])), np.arange(60))
    for train, val, test in rounds:
        assert not len(val) and not {*train} & {*test} and len(train) + len(test) == 60
        assert np.bincount(bags.y[test]).tolist() == [5, 5, 5]
    assert any(not np.array_equal(a[2], b[2]) for a, b in zip(rounds, bags.rounds(4, 1, "b")))


def test_parts_are_disjoint_and_hold_every_class_in_proportion():
    y = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [70, 31, 9]))
    parts = data.stratified_parts(y, (70, 15, 15), 5)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(110))
    for part, share in zip(parts, (0.7, 0.15, 0.15)):
        for c in range(3):
            assert abs((y[part] == c).sum() - share * (y == c).sum()) <= 1
    assert not np.array_equal(parts[2], data.stratified_parts(y, (70, 15, 15), 6)[2])


def test_parts_keep_groups_whole_and_the_rarest_class_in_every_part():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 600)
    y = np.where(np.isin(groups, np.arange(12)) & (rng.random(600) < 0.3), 1, 0)     # 12 are ill
    parts = data.stratified_parts(y, (70, 15, 15), 5, groups)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(600))
    of = [{*groups[part].tolist()} for part in parts]
    assert sum(map(len, of)) == 60 == len(set.union(*of))
    ill = {*groups[y == 1].tolist()}
    for part, share in zip(of, (0.7, 0.15, 0.15)):
        assert abs(len(part & ill) - share * len(ill)) <= 1 and abs(len(part) - share * 60) <= 2
    other = data.stratified_parts(y, (70, 15, 15), 6, groups)
    assert not np.array_equal(parts[2], other[2])


@pytest.mark.parametrize("shares, n", [((70, 15, 15), 6), ((70, 15, 15), 10), ((1,) * 5, 6)])
def test_few_groups_leave_no_part_empty_and_no_class_out_of_a_part_that_could_have_it(shares, n):
    groups = np.repeat(np.arange(n), 4)
    y = groups % 2                                           # n / 2 groups of each class
    for seed in range(20):
        parts = data.stratified_parts(y, shares, seed, groups)
        assert sum(len({*groups[part]}) for part in parts) == n and all(map(len, parts))
        if n // 2 >= len(shares):
            assert all(len({*y[part]}) == 2 for part in parts)


def test_nearest_neighbours_are_asked_of_other_groups_than_they_are_judged_on(tmp_path):
    groups = np.repeat([f"patient {i}" for i in range(20)], 10)
    np.savez(tmp_path / "f.npz", images=np.zeros((200, 4, 4), np.uint8), groups=groups)
    for seed in range(3):
        vote, judged = data.read_images(tmp_path / "f.npz").knn_rows(seed, 1000)
        assert not {*groups[vote]} & {*groups[judged]} and len(vote) == 160 and len(judged) == 40


def test_bags_keep_patients_together_and_are_no_tokens(tmp_path):
    x = np.random.default_rng(0).standard_normal((40, 3))
    bags = {"X": x, "offsets": np.arange(0, 41, 2), "y": np.arange(20) % 2}
    np.savez(tmp_path / "b.npz", **bags, groups=np.arange(20) // 4)
    assert data.read_bags(tmp_path / "b.npz").groups.tolist() == (np.arange(20) // 4).tolist()
    for change, message in (({"groups": np.arange(40)}, "'groups' has shape \\(40,\\) .* each of 20 bags"),
                            ({"X": x[:, None]}, "'X' has shape \\(40, 1, 3\\) .* no tokens")):
        np.savez(tmp_path / "c.npz", **{**bags, **change})
        with pytest.raises(InputError, match=message):
            data.read_bags(tmp_path / "c.npz")
    for i, name in enumerate(("a", "a", "b", "b")):
        (tmp_path / "d" / name).mkdir(parents=True, exist_ok=True)
        np.savez(tmp_path / "d" / name / f"{i}.npz", f=x[:5], groups=np.repeat(i % 2, 5))
    assert data.read_bags(tmp_path / "d").groups.tolist() == [0, 1, 0, 1]
    np.savez(tmp_path / "d" / "a" / "0.npz", f=x[:5, None])
    with pytest.raises(InputError, match="0.npz: stream 'f' has shape .* no tokens"):
        data.read_bags(tmp_path / "d")


def test_medmnist_files_and_class_folders_become_pictures(tmp_path, pictures):
    rng = np.random.default_rng(0)
    arrays = {f"{s}_{k}": v for s, n in (("train", 6), ("val", 2), ("test", 3)) for k, v in (
        ("images", rng.integers(0, 255, (n, 28, 28), np.uint8)), ("labels", np.arange(n, dtype=np.uint8)[:, None] % 2))}
    np.savez(tmp_path / "m.npz", **arrays)
    found = data.read_pictures(str(tmp_path / "m.npz"), 28)
    assert found.about["images"].shape == (11, 28, 28, 3) and found.split.tolist() == ["train"] * 6 + ["val"] * 2 + ["test"] * 3
    assert np.array_equal(found.about["images"][7, ..., 1], arrays["val_images"][1]) and found.labels[7] == 1
    assert data.read_pictures(str(pictures), 16).about["images"].shape == (18, 16, 16, 3)
    x = data.normalised(found.about["images"])
    back = x * torch.tensor(data.IMAGENET[1]).view(3, 1, 1) + torch.tensor(data.IMAGENET[0]).view(3, 1, 1)
    assert torch.equal((255 * back).round().to(torch.uint8).permute(0, 2, 3, 1), torch.from_numpy(found.about["images"]))
    for change, message in (({"train_images": arrays["train_images"].astype(float)}, "'images' has shape .* and type float64"),
                            ({"val_labels": np.zeros((2, 14), np.uint8)}, "is not a readable MedMNIST file"),
                            ({"val_labels": np.zeros((3, 1), np.uint8)}, r"MedMNIST file \(\[6, 3, 3\] labels of \[6, 2, 3\]"),
                            ({k: 0 * v for k, v in arrays.items() if "labels" in k}, "has the one class label 0")):
        np.savez(tmp_path / "n.npz", **{**arrays, **change})
        with pytest.raises(InputError, match=message):
            data.read_pictures(str(tmp_path / "n.npz"), 28)


def test_jitter_mirrors_and_shifts_and_nothing_else():
    x = torch.arange(32. * 32).view(1, 1, 32, 32).expand(64, 3, -1, -1).clone()
    seen = set()
    for v in data.jittered(x)[:, 0]:
        mirrored = bool(v[10, 11] < v[10, 10])
        v = v.flip(1) if mirrored else v
        shift = (int(v[16, 16]) // 32 - 16, int(v[16, 16]) % 32 - 16)
        seen.add((mirrored, shift))
        assert max(map(abs, shift)) <= 4 and torch.equal(v[8:24, 8:24], x[0, 0, 8 + shift[0]:24 + shift[0], 8 + shift[1]:24 + shift[1]])
    assert {m for m, _ in seen} == {True, False} and len(seen) > 20


# -- tokens ------------------------------------------------------------------------------------------------------------

def test_every_token_counts_as_a_sample_of_its_split_and_a_folder_stays_on_disk(tmp_path):
    x = np.random.default_rng(0).standard_normal((10, 4, 3)).astype(np.float16)
    split = np.array(["train"] * 7 + ["test"] * 3)
    np.savez(tmp_path / "f.npz", a=x, split=split, grid=[2, 2], labels=np.arange(10))
    (tmp_path / "d").mkdir()
    for key, v in (("a", x), ("split", split), ("grid", np.array([2, 2]))):
        np.save(tmp_path / "d" / f"{key}.npy", v)
    for path in ("f.npz", "d"):
        found = data.read_features(tmp_path / path)
        assert found.tokens == 4 and found.grid == (2, 2) and found.dims == {"a": 3}
        assert found.batch(np.array([1, 2]))["a"].shape == (2, 4, 3)
        flat = found.per_token()
        assert len(flat) == 40 and (flat.rows("train") == np.arange(28)).all() and flat.labels is None
        np.testing.assert_array_equal(flat.batch(np.array([5]))["a"][0], x[1, 1].astype(np.float32))
    assert isinstance(flat.streams["a"].base, np.memmap) or isinstance(flat.streams["a"], np.memmap)


@pytest.mark.parametrize("arrays, message", [
    ({"grid": np.array([2, 3])}, "'grid' is \\[2, 3\\] for 4 tokens"),
    ({"b": np.ones((5, 3, 2))}, "stream 'b' has shape .* but 'a' .* as many tokens"),
    ({"b": np.ones((5, 2))}, "stream 'b' has shape .* but 'a' .* as many tokens"),
    ({"boxes": np.array([[0, 0, 0.5, 0.1, 0.4, 0.2]]), "labels": np.zeros(5, int)}, "'boxes' row 0"),
    ({"boxes": np.array([[7, 0, 0.1, 0.1, 0.4, 0.2]]), "labels": np.zeros(5, int)}, "give a sample of 5"),
    ({"boxes": np.zeros((2, 4))}, "'boxes' has shape \\(2, 4\\)"),
])
def test_tokens_that_do_not_fit_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "f.npz", a=np.ones((5, 4, 2)), **arrays)
    with pytest.raises(InputError, match=message):
        data.read_features(tmp_path / "f.npz")


# -- the made-up tissue ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def specimen():
    return data.tissue(400, seed=3)


def test_the_same_seed_draws_the_same_bytes_and_another_does_not(specimen):
    again, other = data.tissue(400, seed=3), data.tissue(400, seed=4)
    assert all(np.array_equal(v, again[k]) for k, v in specimen.items() if k != "parents")
    assert not np.array_equal(specimen["pixels"], other["pixels"])


def test_labels_masks_boxes_captions_and_taxonomy_of_a_tissue_agree(specimen):
    names, labels, boxes = specimen["label_names"].tolist(), specimen["labels"], specimen["boxes"]
    kinds = [c[0] for c in data.CELLS]
    assert len(kinds) >= 8 and labels[:, -3:].sum(1).tolist() == [1] * 400
    for i in range(400):
        mine = boxes[boxes[:, 0] == i]
        numbers = [n for n in np.unique(specimen["instances"][i]) if n]
        assert len(mine) == len(numbers) and set(mine[:, 1].astype(int)) <= set(np.flatnonzero(labels[i, :len(kinds) + 1]))
        for n, (_, _, x0, y0, x1, y1) in zip(numbers, mine):
            y, x = np.nonzero(specimen["instances"][i] == n)
            np.testing.assert_allclose((x.min(), y.min(), x.max() + 1, y.max() + 1), np.array([x0, y0, x1, y1]) * 64, atol=1e-9)
        for word, k in (("eosinophil", 3), ("mucin", len(kinds)), ("mitos", 8)):
            assert word not in specimen["captions"][i] or labels[i, k]
    said = np.mean([kinds[3] in c for c, here in zip(specimen["captions"], labels[:, 3]) if here])
    assert 0.7 < said < 0.95                                 # not every fact is mentioned
    depth = {name: 0 for name, parent in specimen["parents"].items() if parent is None}
    while len(depth) < len(specimen["parents"]):
        depth.update({k: depth[v] + 1 for k, v in specimen["parents"].items() if v in depth})
    assert {depth[k] for k in kinds} == {3} and {depth[k] for k in names[len(kinds):]} == {2}


def test_cells_look_like_their_kind_where_the_masks_say(specimen):
    """Granules are red, mucin is blue-green, nuclei are dark: by the pixels under the masks."""
    mean = {}
    for i in range(400):
        mine = specimen["boxes"][specimen["boxes"][:, 0] == i]
        for n, box in zip([n for n in np.unique(specimen["instances"][i]) if n], mine):
            mean.setdefault(int(box[1]), []).append(specimen["pixels"][i][specimen["instances"][i] == n].mean(0))
    mean = {k: np.mean(v, 0) for k, v in mean.items()}
    lymphocyte, eosinophil, mucin = mean[0], mean[3], mean[9]
    outside = specimen["pixels"][specimen["instances"] == 0].mean(0)
    assert lymphocyte.mean() < outside.mean() - 60
    assert eosinophil[0] - eosinophil[2] > 20 > lymphocyte[0] - lymphocyte[2]
    assert mucin[2] > mucin[0]


def test_a_disease_shifts_the_mix_of_cells_and_patients_lie_in_one_split():
    made = data.tissue(2000)
    share = {d: made["labels"][made["disease"] == i].mean(0) for i, d in enumerate(made["disease_names"])}
    assert share["allergy"][3] > 2 * share["healthy"][3] and share["carcinoma"][6] > 0.4 > 0.05 > share["healthy"][6]
    assert share["infection"][2] > 1.5 * share["healthy"][2]
    for group in np.unique(made["groups"]):
        mine = made["groups"] == group
        assert len(set(made["split"][mine])) == 1 and len(set(made["disease"][mine])) == 1
        assert len(set(made["slides"][mine])) == 2
    assert set(made["disease"][made["split"] == "test"]) == {0, 1, 2, 3} and 0.2 < (made["split"] == "test").mean() < 0.4


def test_words_become_numbers_and_unknown_ones_are_named():
    words = data.Words(["a red cell", "A cell, blue", "red?", "once"])
    assert words.words == ["a", "cell", "red"] and words.size == 6
    assert words(["Red cell"], 6).tolist() == [[4, 3, 2, 5, 0, 0]]
    assert words(["a a a a a a"], 5).tolist() == [[4, 1, 1, 1, 5]]
    with pytest.raises(InputError, match="the word 'blue' is in no caption"):
        words(["blue cell"], 6)
    assert words(["blue cell"], 6, strict=False).tolist() == [[4, 2, 5, 0, 0, 0]]
    with pytest.raises(InputError, match="no word stands in two"):
        data.Words(["one", "two"])



def test_merges_number_tokens_as_clip_does():
    """As many merges as CLIP's file has make its vocabulary: 49,408, with 'a' at 320, start and end at 49,406 and 49,407."""
    merges = [f"x{i} y{i}" for i in range(49152 - 256 - 2)]
    words = data.Merges(merges)
    assert (words.size, words.start, words.end) == (49408, 49406, 49407)
    assert words(["A"], 4).tolist() == [[49406, 320, 49407, 0]]
    assert words.number["!"] == 0 and words.number["~</w>"] == 256 + 93                     # bytes in the order of their letters


def test_merges_join_pairs_in_the_order_of_the_list_as_a_slow_loop_does():
    """The loop joins, as CLIP's does, a pair wherever it stands in the word, in the order of the list."""
    rng = np.random.default_rng(0)
    pieces, merges = ["a", "b", "c", "a</w>", "b</w>", "c</w>"], []
    while len(merges) < 40:                                  # pairs of what there is by then, as training makes them
        first, second = rng.choice([p for p in pieces if not p.endswith("</w>")]), rng.choice(pieces)
        if f"{first} {second}" not in merges:
            merges.append(f"{first} {second}")
            pieces.append(first + second)
    words = data.Merges(merges)
    for _ in range(200):
        text = "".join(rng.choice(list("abc"), rng.integers(1, 12)))
        slow = [*text[:-1], text[-1] + "</w>"]
        for a, b in map(str.split, merges):
            joined = []
            for piece in slow:
                if joined and (joined[-1], piece) == (a, b):
                    joined[-1] += b
                else:
                    joined.append(piece)
            slow = joined
        assert words.merged(text) == slow
        assert [token for token, _ in words.pieces(text)] == [words.number[p] for p in slow]
    assert data.Merges(["a b"]).split("It's 12 Cells, é!?_ ") == ["it", "'s", "1", "2", "cells", ",", "é", "!?_"]
    assert [word for _, word in data.Merges(["a b"]).pieces("ab a")] == [(0, "ab"), (0, "ab"), (1, "a")]


def test_a_merges_file_is_read_plain_or_gzipped(tmp_path):
    import gzip
    text = "#version\na b\nab c</w>\n"
    (tmp_path / "m.txt").write_text(text)
    (tmp_path / "m.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert data.read_merges(str(tmp_path / "m.txt")) == data.read_merges(str(tmp_path / "m.txt.gz")) == ["a b", "ab c</w>"]
    (tmp_path / "bad.gz").write_text("plain")
    (tmp_path / "torn.gz").write_bytes(gzip.compress(text.encode())[:12] + b"xxxxxx")
    for name in ("bad.gz", "torn.gz", "none.txt"):
        missing, damaged = f"no file or folder .*{name}", f"{name} is not a readable merges file"
        with pytest.raises(InputError, match=missing if name == "none.txt" else damaged):
            data.read_merges(str(tmp_path / name))
    with pytest.raises(InputError, match="two pieces a line"):
        data.Merges(["a b c"])


def test_latent_semantics_are_the_singular_vectors_of_weighted_counts():
    """Against numpy's dense SVD of counts made by hand; cosines do not depend on the axes' signs."""
    texts = ["a b", "a c c", "b c", "A b", "d d a", "zz", "b d"]
    known = np.array([0, 1, 2, 4, 6])
    words = ["a", "b", "c", "d"]
    counts = np.array([[text.lower().split().count(w) for w in words] for text in texts], float)
    counts *= np.log(5 / (counts[known] > 0).sum(0)) + 1
    counts /= np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-12)
    axes = np.linalg.svd(counts[known], full_matrices=False)[2][:3]
    found = data.latent_semantics(texts, known)
    assert found.shape == (7, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found @ found.T, (counts @ axes.T) @ (counts @ axes.T).T, atol=1e-5)
    np.testing.assert_array_equal(found[0], found[3])
    assert (found[5] == 0).all()                             # none of its words was learned from
    assert data.latent_semantics(texts, known, 2, 2).shape == (7, 2)
    with pytest.raises(data.InputError, match="fewer than two words"):
        data.latent_semantics(["a", "a"], np.arange(2))


# -- damaged files: each is refused by the one reader of its kind ---------------------------------------------------------

READERS = {"f.npz": data.read_features, "q.npy": lambda path: data.read_features(os.path.dirname(path)), "t.json": lambda path: data.read_taxonomy(path, []), "a.png": data.open_image,
           "a.xml": data.read_polygons, "v.xml": data.read_voc, "m.txt": data.read_merges}


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_refused_instead_of_being_waited_for(name, tmp_path):
    def late(*_):
        raise TimeoutError
    os.mkfifo(tmp_path / name)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(2)
    try:
        with pytest.raises(InputError, match="is no plain file"):
            READERS[name](str(tmp_path / name))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def with_member(path, name, content, header=None):
    """The feature file `path` with one more member; header: (offset, byte) to change in the last central entry."""
    with zipfile.ZipFile(path, "a") as z:
        z.writestr(name, content)
    if header:
        raw = bytearray(open(path, "rb").read())
        raw[raw.rindex(b"PK\1\2") + header[0]] = header[1]
        open(path, "wb").write(raw)
    return path


def npy(shape, content=b""):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def test_a_declared_size_is_checked_before_room_is_made_for_it(tmp_path):
    path = with_member(as_file(tmp_path), "big.npy", npy("(10 ** 10, 4)".replace("10 ** 10", "9" * 10)))
    tracemalloc.start()
    with pytest.raises(InputError, match="key 'big' is not a readable"):
        read_features(path)
    assert tracemalloc.get_traced_memory()[1] < 10 ** 8
    tracemalloc.stop()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "q.npy").write_bytes(npy("(99999999999, 1)", bytes(8)))
    with pytest.raises(InputError, match="q.npy is not a readable"):
        read_features(str(tmp_path / "folder"))


def test_what_is_no_array_in_a_feature_file_is_passed_over(tmp_path):
    path = with_member(as_file(tmp_path), "readme.txt", b"hello")
    assert list(read_features(path).streams) == ["a", "b"]


@pytest.mark.parametrize("content, header, message", [
    (npy("(50, 1)", bytes(200)), (10, 9), "key 'odd' is not a readable"),                       # an unknown compression
    (npy("(50, 1)", bytes(200)), (8, 1), "key 'odd' is not a readable"),                        # encrypted
    (npy("((((((((("), None, "is not a readable"), (b"hello", None, "is not a readable"),
    (npy("(50, 1)", bytes(200)).replace(b"<f4", b"<M8"), None, "key 'odd'"),
    (npy("(50, 1)", bytes(200)).replace(b"<f4", b"<c8").replace(b"(50, 1)", b"(25, 1)"), None, "holds complex64")])
def test_a_member_that_cannot_be_read_is_refused_by_name(content, header, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_features(with_member(as_file(tmp_path), "odd.npy", content, header))


@pytest.mark.parametrize("more, message", [
    ({"groups": np.array(3)}, r"'groups' has shape \(\) and type int64"),
    ({"groups": np.zeros((50, 2))}, r"'groups' has shape \(50, 2\)"), ({"split": np.array("train")}, "'split' has shape"),
    ({"labels": np.full(50, 10 ** 5), "label_names": None}, "row 0 is 100000 - number"),
    ({"boxes": np.full((1, 6), "x")}, "'boxes' has shape"),
    ({"captions": np.array(["\ud800"] * 50)}, "key 'captions' is not a readable"),
    ({"captions": np.full(50, 0x110000, np.uint32).view("U1")}, "'captions' is not a readable"),
    ({"captions": np.full(50, 2 ** 32 - 1, np.uint32).view("U1")}, "'captions' is not")])
def test_odd_reserved_keys_are_refused_by_name(more, message, tmp_path):
    with np.load(as_file(tmp_path)) as z:
        arrays = {**z, **more}
    np.savez(tmp_path / "odd.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(InputError, match=message):
        read_features(str(tmp_path / "odd.npz"))


@pytest.mark.parametrize("grid", [[np.nan, 4], [-2, -2], ["2", "2"], [[2, 2]], [0, 4]])
def test_a_grid_that_is_none_is_refused(grid, tmp_path):
    np.savez(tmp_path / "t.npz", x=np.ones((6, 4, 3)), grid=np.array(grid))
    with pytest.raises(InputError, match="'grid' (is|has shape)"):
        read_features(str(tmp_path / "t.npz"))


def test_a_deep_taxonomy_is_read_in_no_time_and_a_nest_of_brackets_refused(tmp_path):
    chain = {"n0": None, **{f"n{i + 1}": f"n{i}" for i in range(20000)}}
    (tmp_path / "t.json").write_text(json.dumps(dict(reversed(chain.items()))))
    began = time.process_time()
    assert len(data.read_taxonomy(tmp_path / "t.json", ["n20000"])) == 20001 and time.process_time() - began < 2
    for text, message in (("[" * 30000 + "]" * 30000, "is not a readable JSON file"), ('{"a": 1, "b": null}', "'a' has the unknown parent '1'"),
                          ('{"LabelName": "a", "Subcategory": [3]}', "is not a readable taxonomy"),
                          ('{"LabelName": "a", "Subcategory": [{"LabelName": {}}]}', "is not a readable taxonomy")):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(InputError, match=message):
            data.read_taxonomy(tmp_path / "t.json", [])


@pytest.mark.parametrize("encoding", ["klingon", "utf-16", "\u00e9"])
def test_annotations_in_an_unknown_encoding_are_refused(encoding, tmp_path):
    (tmp_path / "a.xml").write_text(f'<?xml version="1.0" encoding="{encoding}"?><a/>', "latin-1")
    for read in (data.read_polygons, data.read_voc):
        with pytest.raises(InputError, match="is not a readable"):
            read(tmp_path / "a.xml")


def voc_folder(folder, stem="one", name="cell"):
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    Image.new("RGB", (100, 50)).save(folder / "JPEGImages" / "one.jpg")
    (folder / "Annotations" / "one.xml").write_text(
        f"<a><object><name>{name}</name><bndbox><xmin>10</xmin><ymin>5</ymin><xmax>60</xmax>"
        "<ymax>30</ymax></bndbox></object></a>")
    for part in ("trainval", "test"):
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text(stem + "\n")
    return folder


def test_a_voc_folder_is_read_with_its_splits_and_its_objects_as_labels_and_boxes(tmp_path):
    found = data.read_images(voc_folder(tmp_path))           # one picture, listed in both parts
    assert found.split.tolist() == ["train", "test"] and found.label_names == ["cell"]
    assert found.labels.tolist() == [[True], [True]] and found.boxes is not None
    expected = [[i, 0, 0.1, 0.1, 0.6, 0.6] for i in range(2)]
    np.testing.assert_allclose(found.arrays(tmp_path / "f.npz")["boxes"], expected)
    (tmp_path / "ImageSets/Main/trainval.txt").write_text("")
    (tmp_path / "ImageSets/Main/test.txt").write_text("")
    with pytest.raises(InputError, match="lists no pictures"):
        data.read_images(tmp_path)


@pytest.mark.parametrize("bad", ["../../../evil", "..", ".", "/tmp/evil", "a/b", "a\\b", "C:evil"])
def test_no_name_in_a_voc_folder_leads_out_of_it(bad, tmp_path):
    for i, (more, what) in enumerate((({"stem": bad}, "lists a picture"),
                                      ({"name": bad}, "names an object"))):
        folder = voc_folder(tmp_path / str(i) / "deep" / "voc", **more)
        with pytest.raises(InputError, match=f"{what} {re.escape(repr(bad))}"):
            data.cut_boxes(folder)
        with pytest.raises(InputError, match=f"{what} {re.escape(repr(bad))}"):
            data.read_images(folder)
    assert data.plain_name("a cell, 2..3 um", "f.xml names") == "a cell, 2..3 um"


# -- what counts as labelled -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("labels", [np.array([2, 0, 1, 2], kind) for kind in ("uint8", "int32", "uint64", ">i2")] + [
    np.array([[2], [0], [1], [2]], np.uint8), np.array(["c", "a", "b", "c"]), np.array([b"c", b"a", b"b", b"c"])])
def test_labels_of_any_integer_type_or_in_words_are_the_same_numbers(labels, tmp_path):
    np.savez(tmp_path / "f.npz", x=np.eye(4), labels=labels)
    found = data.read_features(tmp_path / "f.npz")
    assert found.labels.dtype == np.int64 and found.labels.tolist() == [2, 0, 1, 2]
    assert found.label_names == (["a", "b", "c"] if labels.dtype.kind in "US" else ["label 0", "label 1", "label 2"])


def test_a_negative_number_an_empty_word_and_a_masked_row_are_unlabelled_and_all_false_is_a_label(tmp_path):
    flags, mask = np.array([[1, 0], [0, 0], [0, 1], [1, 1]], bool), np.array([True, True, False, True])
    for labels, more in ((np.array([0, 1, -5, 1]), {}), (np.array(["a", "b", "", "b"]), {}),
                         (np.array([0, 1, 1, 1]), {"mask": mask}), (flags, {"mask": mask})):
        np.savez(tmp_path / "f.npz", x=np.eye(4), labels=labels, **more)
        found = data.read_features(tmp_path / "f.npz")
        assert found.labelled.tolist() == mask.tolist()
        if labels.ndim == 1:
            assert found.labels[[0, 1, 3]].tolist() == [0, 1, 1] and not found.label_matrix([2]).any()
    np.savez(tmp_path / "f.npz", x=np.eye(4), labels=flags)
    assert data.read_features(tmp_path / "f.npz").labelled.all()


@pytest.mark.parametrize("labels, more, message", [
    (np.array([0, 10 ** 8, 1, 1]), {}, "'labels' row 1 is 100000000 - number the classes from 0"),
    (np.array(["a", "b", "x", "b"]), {"label_names": np.array(["a", "b"])}, "'labels' row 2 is 'x'"),
    (np.array([0., 1, 1, 0]), {}, "'labels' has shape (4,) and type float64"),
    (np.array([0, 1, 1, 0]), {"mask": np.ones(3, bool)}, "'mask' has shape (3,)"),
    (np.array([0, 1, 1, 0]), {"groups": np.ones((4, 2))}, "'groups' has shape (4, 2)")])
def test_labels_that_cannot_be_meant_are_refused_at_once(labels, more, message, tmp_path):
    np.savez(tmp_path / "f.npz", x=np.eye(4), labels=labels, **more)
    with pytest.raises(data.InputError, match=re.escape(message)):
        data.read_features(tmp_path / "f.npz")


# -- what must not leak, and settings that must count -------------------------------------------

def crop_of(seed):
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    images = type("One", (), {"open": lambda self, i: picture, "__len__": lambda self: 1})()
    return data._views(images, data.Crops(16, 8, 1, blur=0.2), seed, [(3, 0)])[0][0]


@pytest.mark.parametrize("drawn", [
    lambda seed: Batches(np.arange(160), 16, seed).rows(3),
    lambda seed: Batches(np.arange(160), 16, seed, "samples").rows(3),
    lambda seed: planted_streams(40, seed=seed).streams["vision"],
    lambda seed: planted_streams(40, seed=0).shuffled(seed).order["text"],
    lambda seed: data.Images(["p"] * 60).knn_rows(seed, 20)[0],
    lambda seed: data.Images(["p"] * 60, split=np.repeat("train", 60)).knn_rows(seed, 20)[0],
    lambda seed: data.stratified_parts(np.arange(60) % 2, (70, 15, 15), seed)[0], crop_of],
    ids=["blocks", "samples", "planted", "null", "k-NN parts", "k-NN rows", "parts", "crops"])
def test_every_seed_decides_what_is_drawn(drawn):
    first, again, other = (np.asarray(drawn(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_pictures_that_vote_are_those_of_the_training_split():
    split = np.repeat(["test", "train", "val"], 20)
    vote, judged = data.Images(["p"] * 60, split=split).knn_rows(0, 15)
    assert set(split[vote]) == {"train"} and set(split[judged]) == {"test", "val"}
    assert len(vote) == len(judged) == 15


def test_words_of_other_captions_leave_the_encoder_of_captions_as_it_was():
    captions = ["pale stroma", "dark stroma", "two pale cells", "dark cells", "pale fibres here"]
    alone, *beside = (data.latent_semantics([*captions, *more], np.arange(5))[:5]
                      for more in ([], ["stroma"] * 9, ["stroma never seen", "seen never"]))
    assert all(np.array_equal(v, alone) for v in beside)


def test_latent_semantics_repeat_themselves_where_captions_span_few_dimensions():
    texts = ["a b", "a b", "c d", "c d", "a b c d", "c d"] * 4
    found = [data.latent_semantics(texts, np.arange(24), 1, 3) for _ in range(4)]
    assert found[0].shape == (24, 2) and all(np.allclose(v, found[0], atol=1e-5) for v in found)


def test_a_bag_without_the_group_that_others_have_is_refused(tmp_path):
    for i in range(6):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        np.savez(folder / f"{i}.npz", x=np.ones((3, 2)), **({} if i == 4 else {"groups": np.full(3, i // 2)}))
    with pytest.raises(data.InputError, match="4.npz has no single group"):
        data.read_bags(str(tmp_path))


def test_a_window_holds_for_the_pictures_of_a_medmnist_file(tmp_path):
    pixels = np.arange(0, 200, 2, dtype=np.uint8).reshape(4, 5, 5)
    np.savez(tmp_path / "m.npz", train_images=pixels, train_labels=np.array([0, 1, 0, 1]))
    plain, wide = (data.read_pictures(str(tmp_path / "m.npz"), 5, window=window).about["images"][..., 0] for window in (None, (0, 100)))
    assert np.array_equal(plain, pixels)
    np.testing.assert_allclose(wide, np.minimum(pixels * 2.55, 255), atol=0.51)


def test_names_of_latents_are_numbers_below_their_number(tmp_path):
    path = tmp_path / "n.json"
    path.write_text('{"3": "red", "7": "blue"}')
    assert data.read_names(path, 8) == {3: "red", 7: "blue"}
    for text, message in (('{"8": "x"}', "latent 8 is not among"), ("{}", "latent - is not"), ('{"a": "b"}', "is no file of names"),
                          ("[1]", "is no file of names")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            data.read_names(path, 8)


# ---- COCO's annotations -------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", (1, 9, 40))
def test_runs_of_coco_are_masks_down_the_columns(chunk):
    rng = np.random.default_rng(chunk)
    for _ in range(20):
        width, height = rng.integers(2, 120, 2).tolist()
        mask = np.kron(rng.random((height // chunk + 1, width // chunk + 1)) < 0.4, np.ones((chunk, chunk), bool))[:height, :width]
        runs, value = [0], False
        for x, y in itertools.product(range(width), range(height)):
            if mask[y, x] != value:
                runs, value = [*runs, 0], mask[y, x]
            runs[-1] += 1
        assert (data._outline({"counts": runs, "size": [height, width]}, (width, height), (width, height)) == mask).all()


def test_polygons_of_coco_are_masks_of_the_pixels_whose_middle_is_inside():
    """Against the even-odd rule at each pixel's middle, but for pixels that the outline cuts near there; two polygons join."""
    rng, x, y = np.random.default_rng(0), *np.meshgrid(np.arange(90) + 0.5, np.arange(70) + 0.5)
    for _ in range(20):
        polygons, expected, near = [], np.zeros((70, 90), bool), np.zeros((70, 90), bool)
        for middle in ((25, 30), (60, 40)):
            angle = np.sort(rng.uniform(0, 2 * np.pi, 12))
            points = np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(5, 22, (12, 1)) + middle
            inside = np.zeros((70, 90), bool)
            for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0)):
                inside ^= ((ay <= y) != (by <= y)) & (x < ax + (y - ay) / (by - ay) * (bx - ax))
                along = (((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2)).clip(0, 1)
                near |= np.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay)) < 0.71
            polygons.append(points.ravel().tolist())
            expected |= inside
        found = data._outline(polygons, (90, 70), (90, 70))
        assert found.dtype == bool and (found == expected)[~near].all() and abs(int(found.sum()) - int(expected.sum())) < 0.03 * expected.sum()
    assert data._outline([[2, 3, 7, 3, 7, 9, 2, 9]], (12, 12), (12, 12)).nonzero()[0].tolist() == [r for r in range(3, 9) for _ in range(5)]


@pytest.fixture
def coco(tmp_path):
    """Three pictures of two parts, ids that stand in both; an object of no area, a caption too many, a picture without any."""
    def part(name, pictures, objects, captions):
        (tmp_path / name).mkdir()
        for _, file, width, height in pictures:
            Image.new("RGB", (width, height)).save(tmp_path / name / file)
        told = {"images": [dict(zip(("id", "file_name", "width", "height"), v)) for v in pictures],
                "categories": [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}],
                "annotations": [{"image_id": i, "category_id": c, "bbox": box, "segmentation": outline} for i, c, box, outline in objects]}
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{name}.json").write_text(json.dumps(told))
        if captions:
            (tmp_path / "annotations" / f"captions_{name}.json").write_text(json.dumps({"annotations": captions}))
    square = [[1, 1, 3, 1, 3, 3, 1, 3]]
    part("train2017", [(5, "a.png", 8, 4), (6, "b.png", 10, 10)], [(6, 2, [0, 5, 20, 5], square), (6, 7, [2, 2, 4, 4], square),
         (6, 2, [1, 1, 0, 2], {"counts": [98, 2], "size": [10, 10]})], [
         {"image_id": 6, "caption": "first"}, {"image_id": 6, "caption": "second"}, {"image_id": 99, "caption": "of none"}])
    part("val2017", [(5, "c.png", 4, 4)], [(5, 7, [0, 0, 2, 4], {"counts": [0, 8, 8], "size": [4, 4]})], [])
    return tmp_path


def test_a_coco_folder_is_pictures_with_their_objects_captions_and_splits(coco):
    found = data.read_images(coco)
    assert [os.path.relpath(p, coco) for p in found.paths] == ["train2017/a.png", "train2017/b.png", "val2017/c.png"]
    assert found.split.tolist() == ["train", "train", "val"] and found.about["captions"].tolist() == ["", "first", ""]
    assert found.label_names == ["cat", "dog"] and found.labels.tolist() == [[False, False], [True, True], [True, False]]
    np.testing.assert_allclose(found.boxes, [[1, 1, 0, .5, 1, 1], [1, 0, .2, .2, .6, .6], [2, 0, 0, 0, .5, 1]])
    assert found.masks(0) == {} and found.masks(1)[1].sum() == 4 + 2 and found.masks(1)[1][8:, 9].all()
    assert found.masks(2)[0].tolist() == [[True, True, False, False]] * 4 and found.boxes is not None


def test_what_coco_does_not_tell_is_left_open(coco):
    """Without captions there are none; with one part, or one of another name, no split; an outline without a pixel is no mask."""
    os.remove(coco / "annotations" / "captions_train2017.json")
    assert "captions" not in data.read_images(coco).about
    for name in ("instances_val2017.json", "instances_minival.json"):
        os.rename(next((coco / "annotations").glob("*val*.json")), coco / "annotations" / name)
        if name == "instances_minival.json":
            os.rename(coco / "val2017", coco / "minival")
        found = data.read_images(coco)
        assert (found.split is None) == (name == "instances_minival.json") and len(found) == 3
    file = coco / "annotations" / "instances_train2017.json"
    told = json.loads(file.read_text())
    for one, outline in zip(told["annotations"], ([], [[90, 90, 95, 90, 95, 95]], [[1, 1, 2, 2]])):
        one["segmentation"] = outline
    file.write_text(json.dumps(told))
    assert data.read_images(coco).masks(1) == {}
    os.remove(coco / "annotations" / "instances_minival.json")
    assert data.read_images(coco).split is None


@pytest.mark.parametrize("name, wrong, message", (
    ("train2017", {"images": []}, "is not a readable file of COCO's (6"),
    ("val2017", {"categories": [{"id": 6, "name": "bird"}]}, "is not a readable file of COCO's (7)"),
    ("val2017", {"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, 0, 1, 1], "segmentation": {"counts": "08"}}]}, "c.png is not a"),
    ("val2017", {"images": [{"id": 5, "file_name": "d.png", "width": 4, "height": 4}]}, "no file or folder"),
    ("val2017", {"images": [{"id": 5, "file_name": "c.png", "width": 5, "height": 4}]}, "c.png is not a readable picture with outlines"),
    ("val2017", {"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, 0, 1, 1]}]}, "('segmentation')"),
    ("val2017", {"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, 0, 1, 1], "segmentation": [[1, 2, 3]]}]}, "c.png is not a readable"),
    ("val2017", {"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, 0, 1, 1], "segmentation": [[1, 2, float("nan"), 4, 5, 6]]}]}, "c.png is"),
    ("val2017", {"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, float("inf"), 1, 1], "segmentation": []}]}, "is not a readable file"),
    ("val2017", {"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, 0, 1, 1], "segmentation": {"counts": [4, 4, 8], "size": [2, 8]}}]}, "c.png"),
    ("val2017", {"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, 0, 1, 1], "segmentation": {"counts": [10 ** 12], "size": [4, 4]}}]}, "c.png"),
    ("val2017", {"images": [{"id": 5, "file_name": "c.png", "width": None, "height": 4}]}, "is not a readable file of COCO's"),
    ("val2017", {"categories": [{"id": 7, "name": "\ud800"}]}, "is not a readable file of COCO's"),
    ("captions_train2017", {"annotations": [{"image_id": 5, "caption": ["a", "b"]}]}, "is not a readable file of COCO's"),
    ("val2017", [], "instances_val2017.json is not a readable file of COCO's")))
def test_a_damaged_coco_folder_is_refused_by_name(coco, name, wrong, message):
    file = coco / "annotations" / (name if "_" in name else f"instances_{name}")
    file = file.with_suffix(".json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **wrong} if wrong else wrong))
    with pytest.raises(data.InputError, match=re.escape(message)):
        data.read_images(coco).masks(2)
